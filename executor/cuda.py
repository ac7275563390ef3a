"""The few calls of torch.cuda that its own type hints do not cover, with types."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch

_cuda: Any = torch.cuda
_core: Any = torch._C


def new_event(*, timing: bool = False, blocking: bool = True) -> torch.cuda.Event:
    """An event; with `blocking` a host that waits for it sleeps instead of spinning."""
    return cast(torch.cuda.Event, _cuda.Event(enable_timing=timing, blocking=blocking))


def new_stream(device: torch.device, priority: int) -> torch.cuda.Stream:
    """A stream of the whole GPU; smaller numbers are more urgent."""
    return cast(torch.cuda.Stream, _cuda.Stream(device, priority=priority))


class PartitionStream(torch.cuda.Stream):
    """A stream on which kernels get the SMs of a green context alone. `withheld_sms`: the others."""

    withheld_sms = 0


def partition_stream(context: Any, withheld_sms: int) -> PartitionStream:
    """A stream of the green context, which lacks so many SMs."""
    found: Any = context.Stream()
    # Made anew: some versions give the general kind of stream, which CUDA events do not take.
    ids = {"stream_id": found.stream_id, "device_index": found.device_index, "device_type": found.device_type}
    stream = cast(PartitionStream, cast(Any, PartitionStream)(**ids))
    stream.withheld_sms = withheld_sms
    return stream


def enter(stream: torch.cuda.Stream) -> None:
    """Make a stream the current one. GEMMs called or captured on it are made for the SMs that it has: left to itself
    the library takes kernels whose CTAs fill the whole GPU in one wave, and a smaller one in two."""
    torch.cuda.set_stream(stream)
    size_gemms(getattr(stream, "withheld_sms", 0))


def size_gemms(withheld_sms: int) -> None:
    """Have GEMMs made for so many SMs fewer than the GPU has. Without torch's knob for it they stay as they are."""
    if not hasattr(_core, "_set_sm_carveout_experimental") or withheld_from_gemms() == withheld_sms:
        return
    _core._set_sm_carveout_experimental(withheld_sms or None)
    # Of the libraries that torch calls, cuBLASLt heeds it.
    cast(Any, torch.backends.cuda).preferred_blas_library("cublaslt" if withheld_sms else "default")


def withheld_from_gemms() -> int:
    """How many SMs fewer than the GPU has GEMMs are made for now."""
    return int(_core._get_sm_carveout_experimental() or 0) if hasattr(_core, "_set_sm_carveout_experimental") else 0


@contextmanager
def on(stream: torch.cuda.Stream) -> Iterator[None]:
    """The stream is the current one, as by `enter`, within this block, and what was so before is so again behind it."""
    before, sized = torch.cuda.current_stream(), withheld_from_gemms()
    enter(stream)
    try:
        yield
    finally:
        torch.cuda.set_stream(before)
        size_gemms(sized)


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
