"""Timing work on CUDA streams and on a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch

from executor.cuda import elapsed_us, hold, new_event
from executor.lanes import StreamKey

Body = Callable[[], None]
# Long enough for the host to issue everything before the device begins, so that launch cost is not in the time.
HEAD_START_CYCLES_PER_CALL = 40_000
SERIES = 3


class CpuStopwatch:
    """Calls run in this thread."""

    reps = 3

    def launch_us(self) -> float:
        """A launch is a call here."""
        return 1.0

    def alone_us(self, key: StreamKey, calls: Sequence[Body]) -> float:
        """Median of the calls."""
        times = []
        with torch.inference_mode():
            for call in calls:
                started = time.perf_counter_ns()
                call()
                times.append((time.perf_counter_ns() - started) / 1e3)
        return median(times)

    def together_us(self, one: tuple[StreamKey, list[Body]], two: tuple[StreamKey, list[Body]]) -> tuple[float, float]:
        """Threads of one host share its cores; nothing is measured."""
        raise NotImplementedError("side by side is measured on GPUs alone")


class CudaStopwatch:
    """Calls run on the streams that `stream_of` knows."""

    reps = 10

    def __init__(self, stream_of: Callable[[StreamKey], torch.cuda.Stream]) -> None:
        self._stream_of = stream_of

    def launch_us(self) -> float:
        """Host microseconds of one small launch."""
        small = torch.zeros(16, device="cuda")
        small.add_(1.0)
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(100):
            small.add_(1.0)
        elapsed = time.perf_counter() - started
        torch.cuda.synchronize()
        return elapsed * 1e4

    def alone_us(self, key: StreamKey, calls: Sequence[Body]) -> float:
        """Median over a few series of the mean call of a series."""
        means = []
        for _ in range(SERIES):
            start, (end,) = self._race([(key, list(calls))])
            means.append(elapsed_us(start, end) / len(calls))
        return median(means)

    def together_us(self, one: tuple[StreamKey, list[Body]], two: tuple[StreamKey, list[Body]]) -> tuple[float, float]:
        """Ends of both series, from the moment in which both could start."""
        start, (first, second) = self._race([one, two])
        return elapsed_us(start, first), elapsed_us(start, second)

    def _race(self, series: list[tuple[StreamKey, list[Body]]]) -> tuple[torch.cuda.Event, list[torch.cuda.Event]]:
        """Hold all streams back until everything is issued, then let them go; events of the start and of every end."""
        torch.cuda.synchronize()
        gate = self._stream_of(series[0][0])
        start = new_event(timing=True)
        ends = [new_event(timing=True) for _ in series]
        with torch.inference_mode():
            with torch.cuda.stream(gate):
                hold(HEAD_START_CYCLES_PER_CALL * sum(len(calls) for _, calls in series))
                start.record(gate)
            # Issued in turn, so that neither series is far ahead of the other.
            for stream in {self._stream_of(key) for key, _ in series} - {gate}:
                stream.wait_event(start)
            for number in range(max(len(calls) for _, calls in series)):
                for key, calls in series:
                    if number < len(calls):
                        with torch.cuda.stream(self._stream_of(key)):
                            calls[number]()
        for (key, _), end in zip(series, ends, strict=True):
            end.record(self._stream_of(key))
        torch.cuda.synchronize()
        return start, ends
