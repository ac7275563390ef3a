"""The few calls of torch.cuda that its own type hints do not cover, with types."""

from __future__ import annotations

from typing import Any, cast

import torch

_cuda: Any = torch.cuda


def new_event(*, timing: bool = False, blocking: bool = True) -> torch.cuda.Event:
    """An event; with `blocking` a host that waits for it sleeps instead of spinning."""
    return cast(torch.cuda.Event, _cuda.Event(enable_timing=timing, blocking=blocking))


def new_stream(device: torch.device, priority: int) -> torch.cuda.Stream:
    """A stream of the whole GPU; smaller numbers are more urgent."""
    return cast(torch.cuda.Stream, _cuda.Stream(device, priority=priority))


def partition_stream(context: Any) -> torch.cuda.Stream:
    """A stream on which kernels get the SMs of a green context alone."""
    found: Any = context.Stream()
    if isinstance(found, torch.cuda.Stream):
        return found
    # Some versions give the general kind of stream, which CUDA events do not take.
    ids = {"stream_id": found.stream_id, "device_index": found.device_index, "device_type": found.device_type}
    return cast(torch.cuda.Stream, _cuda.Stream(**ids))


def priorities() -> tuple[int, int]:
    """The least and the most urgent priority."""
    least, greatest = _cuda.Stream.priority_range()
    return int(least), int(greatest)


def hold(cycles: int) -> None:
    """Keep the current stream busy for so many clock cycles."""
    _cuda._sleep(cycles)


def has_ended(event: torch.cuda.Event) -> bool:
    """Whether everything before the event is done."""
    return bool(cast(Any, event).query())


def elapsed_us(start: torch.cuda.Event, end: torch.cuda.Event) -> float:
    """Microseconds between two timing events that are done."""
    return float(cast(Any, start).elapsed_time(end)) * 1e3


def nccl_version() -> str:
    """As it calls itself."""
    version = _cuda.nccl.version()
    return ".".join(map(str, version)) if isinstance(version, tuple) else str(version)


def settle(device: torch.device) -> None:
    """Wait for what the default stream makes. Lanes do not wait for it, and memory that it gave from one tensor to the
    next may still be written for the first one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def replay_us(graph: torch.cuda.CUDAGraph, count: int) -> float:
    """Microseconds a replay on the current stream, the mean of so many in a row."""
    start, end = new_event(timing=True), new_event(timing=True)
    start.record()
    for _ in range(count):
        graph.replay()
    end.record()
    end.synchronize()
    return elapsed_us(start, end) / count
