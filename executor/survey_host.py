"""What a rank's launching thread pays: calls of torch and NCCL, the executor's launches, plans, messages, waking up;
and what the device pays for launches that wait for one another.

On a CPU a launch is an entry in a thread's queue and waking up is that thread's answer; there are no graphs or events.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median

import torch

from executor.cuda import elapsed_us, has_ended, hold, new_event
from executor.lanes import StreamKey
from executor.mail import Note
from executor.operations import Collective
from executor.plan_cache import PlanCache
from executor.session import UNASKED
from executor.survey_bed import Bed, guess_us
from executor.survey_bench import Bench, Body, Row, sample_of, timed_us
from executor.survey_cuda import CudaBench, host_us
from executor.survey_points import Point
from executor.warm_up import Preparation, let_go, made_up_requests
from models.kernel import Kernel, Kind
from models.transformer import BatchShape
from policy.batch import Batch
from policy.profile import Contention, Profile
from policy.round import Lane, Launch, Mark
from policy.scheduler import POLICIES, Scheduler

# Kernels small enough for the device to keep up with the host.
SHAPE = BatchShape(2, 16)
FEW, MANY = 2, 64
SERIES, NOTES, WAKE_UPS, PASSES = 25, 60, 20, 5
ROOMS = ("compute", "comm")
BUSY_CYCLES = 1_000_000
GUESS_COMM_BYTES_PER_US = 2e5


@dataclass(slots=True)
class Host:
    """Host costs on one rank. What several rows come from is measured once."""

    bed: Bed
    bench: Bench
    _known: dict[str, Row] = field(default_factory=dict)

    def measure(self, point: Point) -> Row:
        """One cost, by its name. Every rank must ask for the same ones in the same order."""
        name = str(point.at["name"])
        if name not in self._known:
            self._known |= {key: Row({"us": sample_of(us)}) for key, us in self._sources()[name]().items()}
        return self._known[name]

    def _sources(self) -> dict[str, Callable[[], dict[str, list[float]]]]:
        issued, graphs = self._issued, self._graphs
        return {
            "launch": self._launch, "collective_launch": self._collective_launch, "event": self._event,
            "graph_launch": graphs, "graph_kernel": graphs, "synchronize": partial(self._wake_up, spin=False),
            "synchronize_spinning": partial(self._wake_up, spin=True), "broadcast": self._broadcast,
            "plan": self._plan, "issue": issued, "issue_collective": issued, "issue_graph": issued,
            "issue_kernel": issued, "event_gap": self._event_gap,
        }  # fmt: skip

    # -- calls of torch ---------------------------------------------------------------------------------------------

    def _gemm(self) -> Body:
        calls, _ = self.bed.calls("gemm", self.bed.shapes.gemm("out_proj", SHAPE.rows, 0))
        return calls[0]

    def _launch(self) -> dict[str, list[float]]:
        if isinstance(self.bench, CudaBench):
            return {"launch": host_us(self._gemm())}
        lanes, key = self.bed.backing.lanes, StreamKey(Lane.COMPUTE)

        def empty() -> None: ...

        times = [timed_us(lambda: lanes.run(key, (), empty)) for _ in range(SERIES)]
        lanes.drain()
        return {"launch": times}

    def _collective_launch(self) -> dict[str, list[float]]:
        collective = next(op for op in self.bed.device.bound(0, SHAPE) if isinstance(op, Collective))
        return {"collective_launch": host_us(lambda: self.bed.groups.call(collective))}

    def _event(self) -> dict[str, list[float]]:
        assert isinstance(self.bench, CudaBench)
        event, side = new_event(), self.bench.comm_stream()

        def hop() -> None:
            event.record()
            side.wait_event(event)

        return {"event": host_us(hop)}

    def _graphs(self) -> dict[str, list[float]]:
        """A replay costs its own part and one per kernel in it."""
        bench, gemm = self.bench, self._gemm()
        assert isinstance(bench, CudaBench)
        found = []
        for count in (FEW, MANY):
            graph = bench.captured(bench.compute_stream(0), [gemm], count, "compute")
            with torch.cuda.stream(graph.stream):
                found.append(host_us(graph.graph.replay, SERIES, 1))
        few, many = found
        each = [max(1e-3, (b - a) / (MANY - FEW)) for a, b in zip(few, many, strict=True)]
        fixed = median(each) * FEW
        return {"graph_kernel": each, "graph_launch": [max(1e-3, us - fixed) for us in few]}

    def _event_gap(self) -> dict[str, list[float]]:
        """Of the device: what a wait for another stream costs."""
        bench = self.bench
        assert isinstance(bench, CudaBench)
        small = torch.zeros(16, device=bench.lanes.device)

        def call() -> None:
            small.add_(1.0)

        streams = bench.compute_stream(0), bench.comm_stream()
        graphs = [bench.captured(stream, [call], FEW, room) for stream, room in zip(streams, ROOMS, strict=True)]
        return {"event_gap": [max(1e-3, us) for us in bench.crossings_us(graphs, SERIES)]}

    def _wake_up(self, *, spin: bool) -> dict[str, list[float]]:
        """How long after the end of some work the host goes on."""
        name = "synchronize_spinning" if spin else "synchronize"
        if isinstance(self.bench, CudaBench):
            return {name: [wake_up_us(spin=spin) for _ in range(WAKE_UPS)]}
        lanes, key, ends = self.bed.backing.lanes, StreamKey(Lane.COMPUTE), list[int]()
        times = []
        for _ in range(WAKE_UPS):
            lanes.synchronize(lanes.run(key, (), lambda: ends.append(time.perf_counter_ns())))
            times.append((time.perf_counter_ns() - ends[-1]) / 1e3)
        return {name: times}

    # -- the executor -----------------------------------------------------------------------------------------------

    def _broadcast(self) -> dict[str, list[float]]:
        """From a note's posting on rank 0 to its receipt by the last rank; the ranks of a host read one clock."""
        mail, late = self.bed.session.mail, []
        mail.together("broadcast")
        for _ in range(NOTES):
            if mail.rank == 0:
                time.sleep(1e-3)  # so that the others are waiting
                mail.post(Note(time.perf_counter_ns() / 1e3))
            else:
                sent_us = mail.next().now_us
                late.append(time.perf_counter_ns() / 1e3 - sent_us)
        theirs = mail.gather("late", late, list)[1:]
        return {"broadcast": [max(each) for each in zip(*theirs, strict=True)] or [1e-3]}

    def _plan(self) -> dict[str, list[float]]:
        """Deciding a round that has come before: plans are remembered, and a run's situations recur."""
        cache = PlanCache(POLICIES["interleaved"])
        profile = Profile("guesses", _solo_us, lambda compute, comm, withheld, ctas: Contention(1.1, 1.1, 0.0))
        options = replace(self.bed.run.options, batch_size=SHAPE.num_sequences, adaptive=False)
        requests, times = made_up_requests(SHAPE), list[float]()
        for number in range(1 + PASSES):
            scheduler = Scheduler("interleaved", options, profile, self.bed.vectors)
            scheduler.plan = cache
            scheduler.enter((requests, requests), 0.0)
            while scheduler.state.flights:
                us = timed_us(scheduler.next_round)
                if number:
                    times.append(us)
        return {"plan": times}

    def _issued(self) -> dict[str, list[float]]:
        """The executor's whole way of one launch: marks, events, records and all, timed as the launches of runs are."""
        device, lanes = self.bed.device, self.bed.backing.lanes
        found: dict[str, list[float]] = {"issue": [], "issue_collective": [], "issue_graph": []}
        lanes.timing = True
        try:
            for number in range(1 + PASSES):
                for captured in (False, True):
                    times = self._issue(captured=captured)
                    for name, us in times if number else ():
                        found[name].append(us)
            found["issue_kernel"] = self._issue_kernel(found["issue_graph"])
        finally:
            lanes.timing = False
            device.forget()
        return {name: times for name, times in found.items() if times}

    def _issue_kernel(self, runs: list[float]) -> list[float]:
        """What a kernel adds to a graph's launch: of a whole forward pass, collectives and all, beside a run's."""
        if not (runs and isinstance(self.bench, CudaBench)):
            return []
        device, vectors = self.bed.device, self.bed.vectors
        vector, times = vectors(SHAPE)[0], list[float]()
        for number in range(1 + PASSES):
            batch = self._entered()
            us = timed_us(partial(device.issue, Launch(batch.batch_id, 0, len(vector), Lane.COMPUTE, captured=True), 0))
            if number:
                times.append(max(1e-3, (us - median(runs)) / len(vector)))
            let_go(device)
        return times

    def _entered(self) -> Batch:
        """A batch in flight on an idle device."""
        device, options = self.bed.device, replace(self.bed.run.options, batch_size=SHAPE.num_sequences)
        scheduler = Scheduler("tensor", options, UNASKED, self.bed.vectors)
        batch = scheduler.enter((made_up_requests(SHAPE),), 0.0)[0]
        device.enter(batch, 0.0, Preparation(device, batch))
        device.parts.lanes.drain()
        return batch

    def _issue(self, *, captured: bool) -> list[tuple[str, float]]:
        """One batch, kernel by kernel, or run by run where the runs of compute kernels are graphs."""
        device, batch = self.bed.device, self._entered()
        vector, first, times = batch.vectors[0], 0, list[tuple[str, float]]()
        while first < len(vector):
            comm = vector.kernels[first].is_communication
            last = vector.run_end[first] if captured else first + 1
            lane, waits = (Lane.COMM if comm else Lane.COMPUTE), (Mark(batch.batch_id, first),) if first else ()
            graph = captured and not comm and last - first > 1
            launch = Launch(batch.batch_id, first, last, lane, waits, captured=graph)
            us = timed_us(partial(device.issue, launch, 0))
            if comm or captured == graph:
                times.append(("issue_collective" if comm else "issue_graph" if graph else "issue", us))
            first = last
        let_go(device)
        return times


def _solo_us(kernel: Kernel, withheld_sms: int, ctas: int) -> float:
    """A guess of any kernel's duration; what a plan costs to decide does not hang on it."""
    if not kernel.is_communication:
        return guess_us(kernel)
    assert kernel.kind is not Kind.GEMM
    return 10.0 + kernel.message_bytes / GUESS_COMM_BYTES_PER_US


def wake_up_us(*, spin: bool) -> float:
    """Beyond what the device says that the work took."""
    start, end = new_event(timing=True), new_event(timing=True)
    torch.cuda.synchronize()
    began = time.perf_counter()
    start.record()
    hold(BUSY_CYCLES)
    end.record()
    if spin:
        while not has_ended(end):
            pass
    else:
        end.synchronize()
    return max(1e-3, (time.perf_counter() - began) * 1e6 - elapsed_us(start, end))
