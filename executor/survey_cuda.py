"""Device times by CUDA graphs: a graph of many calls is replayed a few times between events, so that no host cost is in
the time. The price of a replay itself, which the events see, is measured once and taken off.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from executor.cuda import elapsed_us, hold, new_event, new_stream, on, priorities
from executor.graphs import capture
from executor.lanes import StreamKey
from executor.lanes_cuda import CYCLES_PER_US, CudaLanes
from executor.measure import Stopwatch
from executor.stopwatch import crossings_us, replays_us
from executor.survey_bench import Body, Sample, sample_of
from policy.round import Lane

# A graph of a kernel is about this long, with so many calls at least and at most.
GRAPH_US = 800.0
LEAST_CALLS, MOST_CALLS = 6, 40
REPLAYS, REPLAYS_OF_LONG = 7, 5
# A GPU that computes reaches its power limit after some tens of milliseconds and lowers its clock: from 1980 MHz, in
# 80 ms of GEMMs of 128 rows or more, mostly to 1230-1650. A GPU that serves is in that state, so kernels are too.
RUN_IN_US = 60_000.0
# The host issues all replays meanwhile, so that the device never waits for it.
HEAD_START_US = 250.0
FEW_NODES, MANY_NODES = 8, 64
CLOCK_CYCLES = 5_000_000


@dataclass(slots=True)
class Captured:
    """A graph, the stream that it was captured on and is replayed on, and how many calls are in it. `alone_us`: how
    long it takes with the device to itself; measured when it is asked for."""

    graph: torch.cuda.CUDAGraph
    stream: torch.cuda.Stream
    calls: int
    alone_us: float = 0.0

    def replay(self) -> None:
        """Once, on its stream."""
        with torch.cuda.stream(self.stream):
            self.graph.replay()


@dataclass(slots=True)
class CudaBench:
    """Graphs on the streams of a rank's lanes. `refused`: partitions on whose streams nothing can be captured."""

    lanes: CudaLanes
    stopwatch: Stopwatch
    refused: dict[int, str] = field(default_factory=dict)
    replay_us: float = 0.0
    cycles_per_us: float = CYCLES_PER_US
    _anchors: dict[str, tuple[torch.cuda.CUDAGraph, Any]] = field(default_factory=dict)
    _plain: torch.cuda.Stream | None = None

    def __post_init__(self) -> None:
        start, end = new_event(timing=True), new_event(timing=True)
        hold(10 * CLOCK_CYCLES)  # an idle GPU's clock takes its time to come up
        start.record()
        hold(CLOCK_CYCLES)
        end.record()
        torch.cuda.synchronize()
        self.cycles_per_us = CLOCK_CYCLES / elapsed_us(start, end)
        self.replay_us = self._price_of_replay()

    # -- streams and graphs -----------------------------------------------------------------------------------------

    def comm_stream(self, *, priority: bool = True) -> torch.cuda.Stream:
        """Where collectives run: more urgent than computation, or no more urgent than it."""
        if priority:
            return self.lanes.stream(StreamKey(Lane.COMM))
        if self._plain is None:
            self._plain = new_stream(self.lanes.device, priorities()[0])
        return self._plain

    def compute_stream(self, withheld_sms: int, *, priority: bool = True) -> torch.cuda.Stream:
        """The compute lane under a partition. Without priorities it is the lane of fills, whose priority is the least;
        that of a partition's streams is as well."""
        return self.lanes.stream(StreamKey(Lane.COMPUTE if priority or withheld_sms else Lane.FILL, withheld_sms))

    def captured(self, stream: torch.cuda.Stream, calls: Sequence[Body], count: int, room: str) -> Captured:
        """A graph of `count` calls in turn. What is made at a first use is made before. `room`: graphs of one room
        share memory, so they must not run at the same time."""

        def body() -> None:
            for number in range(count):
                calls[number % len(calls)]()

        torch.cuda.synchronize()
        with on(stream):
            for call in calls[:count]:
                call()
            torch.cuda.synchronize()
            return Captured(capture(self._pool(room), body), stream, count)

    def _pool(self, room: str) -> Any:
        """A pool lives as long as a graph that uses it: a small one that stays keeps it for those that come and go."""
        if room not in self._anchors:
            small, pool = torch.zeros(16, device=self.lanes.device), torch.cuda.graph_pool_handle()

            def touch() -> None:
                small.add_(1.0)

            touch()
            torch.cuda.synchronize()
            self._anchors[room] = capture(pool, touch), pool
        return self._anchors[room][1]

    # -- timing -----------------------------------------------------------------------------------------------------

    def compute(self, withheld_sms: int, calls: Sequence[Body], estimate_us: float) -> Sample:
        """One call with the device to itself; the calls of a graph are those of several layers in turn."""
        count = int(min(MOST_CALLS, max(LEAST_CALLS, GRAPH_US / max(estimate_us, 1.0))))
        if withheld_sms not in self.refused:
            try:
                graph = self.captured(self.compute_stream(withheld_sms), calls, count, "compute")
            except RuntimeError as error:
                if not withheld_sms:
                    raise
                self.refused[withheld_sms] = " ".join(str(error).split())[:200]
            else:
                self.run_in(graph, estimate_us * count)
                return self.replayed(graph, REPLAYS if estimate_us * count < 2.0 * GRAPH_US else REPLAYS_OF_LONG)
        turn = [calls[number % len(calls)] for number in range(count)]
        key = StreamKey(Lane.COMPUTE, withheld_sms)
        return sample_of([self.stopwatch.alone_us(key, turn) for _ in range(3)])

    def comm(self, call: Body, count: int) -> Sample:
        """One call of a collective. The first replay brings the ranks together; they stay so, for what they wait for
        from then on is equally long on all."""
        return self.replayed(self.captured(self.comm_stream(), [call], count, "comm"), REPLAYS_OF_LONG)

    def run_in(self, graph: Captured, estimate_us: float, us: float = RUN_IN_US) -> None:
        """Keep the device busy for so long with a computation of about `estimate_us`; no rank waits for another."""
        for _ in range(math.ceil(us / estimate_us)):
            graph.replay()

    def replayed(self, graph: Captured, replays: int) -> Sample:
        """Microseconds a call, over several replays."""
        return sample_of([us / graph.calls for us in self.replays_us(graph, replays)])

    def replays_us(self, graph: Captured, replays: int) -> list[float]:
        """Microseconds of each of several replays."""
        head_start = round(HEAD_START_US * self.cycles_per_us)
        found = replays_us(graph.stream, graph.graph.replay, replays, head_start)
        return [max(0.01, us - self.replay_us) for us in found]

    def crossings_us(self, graphs: Sequence[Captured], series: int) -> list[float]:
        """How much later graphs start that wait for one on another stream than behind it on its own. The host is far
        ahead in both cases."""
        links = [(graph.stream, graph.graph.replay) for graph in graphs]
        return crossings_us(links, series, round(HEAD_START_US * self.cycles_per_us))

    def alone_us(self, graph: Captured) -> float:
        """A whole graph with the device to itself."""
        if not graph.alone_us:
            graph.alone_us = median(self.replays_us(graph, REPLAYS_OF_LONG))
        return graph.alone_us

    def _price_of_replay(self) -> float:
        """What the events see of a replay besides its kernels: from graphs of few and of many equal small kernels."""
        small = torch.zeros(16, device=self.lanes.device)

        def call() -> None:
            small.add_(1.0)

        times = []
        for count in (FEW_NODES, MANY_NODES):
            graph = self.captured(self.compute_stream(0), [call], count, "compute")
            times.append(median(self.replays_us(graph, 3 * REPLAYS)))
        each = (times[1] - times[0]) / (MANY_NODES - FEW_NODES)
        return max(0.0, times[0] - FEW_NODES * each)


def host_us(call: Callable[[], object], series: int = 9, count: int = 20) -> list[float]:
    """Host microseconds of a call, the mean of each of several series; the device is idle before each."""
    call()
    found = []
    for _ in range(series):
        torch.cuda.synchronize()
        started = time.perf_counter_ns()
        for _ in range(count):
            call()
        found.append((time.perf_counter_ns() - started) / 1e3 / count)
    torch.cuda.synchronize()
    return found
