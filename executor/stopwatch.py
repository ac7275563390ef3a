"""Timing work on CUDA streams and on a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import median

import torch

from executor.cuda import elapsed_us, hold, new_event, on
from executor.graphs import capture
from executor.lanes import StreamKey
from executor.status import Steps
from policy.round import Lane

Body = Callable[[], None]
# Long enough for the host to launch two graphs.
HEAD_START_CYCLES = 600_000
# Calls that could not be captured are launched one by one.
UNCAPTURED_PATIENCE = 8
SERIES = 3
# How often two graphs take turns, on two streams or one.
HOPS = 20
# So many small kernels are such a graph.
FEW = 2
Replayed = tuple[Callable[[], None], bool]
Link = tuple[torch.cuda.Stream, Body]


class CpuStopwatch:
    """Calls run in this thread."""

    reps = 3

    def alone_us(self, key: StreamKey, calls: Sequence[Body]) -> float:
        """Median of the calls."""
        Steps.add()
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

    def crossing_us(self) -> float:
        """A queue's thread goes on as soon as another is through."""
        return 0.0


class CudaStopwatch:
    """Calls run as one graph on the streams that `stream_of` knows: as in a run, and at no host's pace."""

    reps = 8

    def __init__(self, stream_of: Callable[[StreamKey], torch.cuda.Stream]) -> None:
        self._stream_of = stream_of

    def alone_us(self, key: StreamKey, calls: Sequence[Body]) -> float:
        """Median over a few replays of the mean call of a series."""
        Steps.add()
        replay, captured = self._captured(key, calls)
        patience = 1 if captured else UNCAPTURED_PATIENCE
        return median(replays_us(self._stream_of(key), replay, SERIES, patience * HEAD_START_CYCLES)) / len(calls)

    def together_us(self, one: tuple[StreamKey, list[Body]], two: tuple[StreamKey, list[Body]]) -> tuple[float, float]:
        """Ends of both series, from the moment in which both could start: medians over a few replays."""
        Steps.add()
        graphs = [(key, self._captured(key, calls)) for key, calls in (one, two)]
        ends = []
        for _ in range(SERIES):
            start, (first, second) = self._race(graphs)
            ends.append((elapsed_us(start, first), elapsed_us(start, second)))
        return median(end for end, _ in ends), median(end for _, end in ends)

    def crossing_us(self) -> float:
        """How much later a graph starts that waits for one on another stream than behind it on its own."""
        small = torch.zeros(16, device="cuda")

        def call() -> None:
            small.add_(1.0)

        keys = StreamKey(Lane.COMPUTE), StreamKey(Lane.COMM)
        graphs = [(self._stream_of(key), self._captured(key, [call] * FEW)[0]) for key in keys]
        return max(0.0, median(crossings_us(graphs, SERIES, HEAD_START_CYCLES)))

    def _captured(self, key: StreamKey, calls: Sequence[Body]) -> Replayed:
        """The calls as one graph; as they are where a driver cannot capture on that stream."""
        stream = self._stream_of(key)
        torch.cuda.synchronize()

        def body() -> None:
            for call in calls:
                call()

        with torch.inference_mode(), on(stream):
            body()  # nothing is captured at its first use
            torch.cuda.synchronize()
            try:
                graph = capture(torch.cuda.graph_pool_handle(), body)
            except RuntimeError:
                if not key.withheld_sms:
                    raise
                return body, False
        return graph.replay, True

    def _race(self, graphs: list[tuple[StreamKey, Replayed]]) -> tuple[torch.cuda.Event, list[torch.cuda.Event]]:
        """Hold all streams back until everything is launched, then let them go; events of the start and of every end.

        All have run once before, so that ranks that a collective binds let theirs go together."""
        torch.cuda.synchronize()
        gate = self._stream_of(graphs[0][0])
        start = new_event(timing=True)
        patience = 1 if all(captured for _, (_, captured) in graphs) else UNCAPTURED_PATIENCE
        with torch.inference_mode():
            for end in self._launched(graphs):
                gate.wait_event(end)
            with torch.cuda.stream(gate):
                hold(patience * HEAD_START_CYCLES)
                start.record(gate)
            ends = self._launched(graphs, behind=start)
        torch.cuda.synchronize()
        return start, ends

    def _launched(
        self, graphs: list[tuple[StreamKey, Replayed]], behind: torch.cuda.Event | None = None
    ) -> list[torch.cuda.Event]:
        """The end of each, once it is launched on its stream."""
        ends = []
        for key, (replay, _) in graphs:
            stream = self._stream_of(key)
            with on(stream):
                if behind is not None:
                    stream.wait_event(behind)
                replay()
                end = new_event(timing=True)
                end.record(stream)
            ends.append(end)
        return ends


def replays_us(stream: torch.cuda.Stream, replay: Body, count: int, head_start_cycles: int) -> list[float]:
    """Microseconds of each of so many replays, all issued while the stream is held for the head start. A replay before
    them brings ranks together that a collective binds: where one comes late, the others' clocks would run for it."""
    events = [new_event(timing=True) for _ in range(count + 1)]
    torch.cuda.synchronize()
    with torch.inference_mode(), on(stream):
        replay()
        hold(head_start_cycles)
        events[0].record()
        for event in events[1:]:
            replay()
            event.record()
    torch.cuda.synchronize()
    return [elapsed_us(start, end) for start, end in pairwise(events)]


def crossings_us(links: Sequence[Link], series: int, cycles_each: int) -> list[float]:
    """How much longer a turn of these takes than one of the first alone, on its own stream: so many measurements."""
    apart = [_chain_us(links, cycles_each) for _ in range(series)]
    in_series = median(_chain_us([links[0]] * len(links), cycles_each) for _ in range(series))
    return [us - in_series for us in apart]


def _chain_us(links: Sequence[Link], cycles_each: int) -> float:
    """Microseconds of one of these where they take turns, each behind the one before, on whatever streams. Their first
    stream is held for so many cycles for each, so that all is issued before the first one starts."""
    start, end = new_event(timing=True), new_event(timing=True)
    torch.cuda.synchronize()
    last = links[0][0]
    with torch.inference_mode():
        with torch.cuda.stream(last):
            hold(HOPS * len(links) * cycles_each)
            start.record()
        for stream, replay in [*links] * HOPS:
            if stream is not last:
                behind = new_event()
                behind.record(last)
                stream.wait_event(behind)
            with torch.cuda.stream(stream):
                replay()
            last = stream
        end.record(last)
    torch.cuda.synchronize()
    return elapsed_us(start, end) / (HOPS * len(links))
