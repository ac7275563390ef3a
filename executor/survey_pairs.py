"""Pairs: a compute kernel beside a collective, both called over and over, and a collective that arrives alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

import torch

from executor.cuda import elapsed_us, hold, new_event
from executor.survey_bed import Bed
from executor.survey_bench import Row, sample_of
from executor.survey_cuda import HEAD_START_US, Captured, CudaBench
from executor.survey_points import Point, compute_of
from executor.survey_traffic import Traffic
from models.kernel import Kind
from traces.measurement import Coordinates, point_key

# Each side alone takes about this long; the time in which both run is what counts.
PAIR_US = 2500.0
# What is timed lets the device rest in between; so long a computation before each makes up for that.
KEEP_WARM_US = 10_000.0
LEAST_CALLS, MOST_CALLS = 2, 100
RACES = 4
# A collective arrives so far into a compute kernel, in shares of what the kernel takes: another phase every time.
PHASES = (0.37, 1.61, 0.83, 1.19, 0.52, 1.94)
PAUSE_US = 10.0
MOST_REPEATS = 16


@dataclass(frozen=True, slots=True)
class Comm:
    """A collective captured many times over and once; what arrives alone takes `single_us` on an idle device."""

    many: Captured
    single: Captured
    single_us: float


@dataclass(slots=True)
class Pairs:
    """Pairs of one model's kernels with collectives among all ranks; every rank measures the same one.

    - compute_slowdown, comm_slowdown: the time of a call while both run, over its time alone under the same partition.
      A collective that waits for SMs between two calls is slowed by that, too. compute_us, comm_us: those times.
    - start_delay_us: a collective by itself that is ready in the middle of the computation, from ready to end, less the
      same on an idle device: for a small message that is how long it waits for SMs.
    """

    bench: CudaBench
    bed: Bed
    traffic: Traffic
    _comms: dict[tuple[int, int, int], Comm] = field(default_factory=dict)
    _computes: dict[str, Captured] = field(default_factory=dict)
    _current: str = ""

    def measure(self, point: Point) -> Row:
        """One pair."""
        at = point.at
        compute = self._compute(at)
        self.bench.run_in(compute, self.bench.replays_us(compute, 1)[0])
        comm = self._comm(int(at["bytes"]), int(at["ctas"]), int(at["priority"]))
        alone = self.bench.alone_us(compute), self.bench.alone_us(comm.many)
        each = alone[0] / compute.calls, alone[1] / comm.many.calls
        slow = [shares(self._race(compute, comm), alone, each) for _ in range(RACES)]
        found = {
            "compute_slowdown": [one for one, _ in slow], "comm_slowdown": [two for _, two in slow],
            "compute_us": [one * each[0] for one, _ in slow], "comm_us": [two * each[1] for _, two in slow],
            "start_delay_us": self._delays_us(compute, comm, each[0]),
        }  # fmt: skip
        return Row({name: sample_of(values) for name, values in found.items()})

    # -- both sides, captured ---------------------------------------------------------------------------------------

    def _comm(self, size: int, ctas: int, priority: int) -> Comm:
        key = (size, ctas, priority)
        if key not in self._comms:
            bench, stream = self.bench, self.bench.comm_stream(priority=bool(priority))
            call = self.traffic.collective(Kind.ALL_REDUCE, size, self.bed.run.layout.tp, ctas)
            assert call is not None
            single = bench.captured(stream, [call], 1, "comm")
            single_us = median(self._arrive(single, [PAUSE_US] * 5, None, 0))
            # All ranks must call it equally often; rank 0 says how often.
            count = self.bed.session.mail.share(f"calls/{size}/{ctas}/{priority}", _calls(single_us), int)
            self._comms[key] = Comm(bench.captured(stream, [call], count, "comm"), single, single_us)
        return self._comms[key]

    def _compute(self, at: Coordinates) -> Captured:
        """Captured once per partition and priority; the graphs of the kernel before are given up."""
        kernel = compute_of(at)
        withheld, priority, what = int(at["withheld_sms"]), int(at["priority"]), str(at["kind"])
        current = point_key(what, {name: value for name, value in kernel.items() if name != "withheld_sms"})
        if current != self._current:
            self._current = current
            self._computes.clear()
        key = f"{withheld}/{priority}"
        if key not in self._computes:
            calls, guess_us = self.bed.calls(what, kernel)
            stream = self.bench.compute_stream(withheld, priority=bool(priority))
            self._computes[key] = self.bench.captured(stream, calls, _calls(guess_us), "pair")
        return self._computes[key]

    # -- both at once -----------------------------------------------------------------------------------------------

    def _race(self, compute: Captured, comm: Comm) -> tuple[float, float]:
        """When each side ended, from the moment in which both could start. All ranks start together: a collective on
        each comes first, and a pause in which the hosts issue the rest."""
        start, ends = new_event(timing=True), (new_event(timing=True), new_event(timing=True))
        torch.cuda.synchronize()
        self._keep_warm(compute, comm)
        with torch.cuda.stream(comm.many.stream):
            comm.single.graph.replay()
            hold(round(HEAD_START_US * self.bench.cycles_per_us))
            start.record()
        compute.stream.wait_event(start)
        for side, end in zip((compute, comm.many), ends, strict=True):
            side.replay()
            end.record(side.stream)
        torch.cuda.synchronize()
        first, second = (max(0.01, elapsed_us(start, end) - self.bench.replay_us) for end in ends)
        return first, second

    def _keep_warm(self, compute: Captured, comm: Comm) -> None:
        """Computation before what comes next on the collective's stream."""
        warm = new_event()
        self.bench.run_in(compute, compute.alone_us, KEEP_WARM_US)
        warm.record(compute.stream)
        comm.many.stream.wait_event(warm)

    def _delays_us(self, compute: Captured, comm: Comm, call_us: float) -> list[float]:
        """How much longer a lone collective takes, from ready to end, where computation runs when it arrives."""
        pauses = [PAUSE_US + phase * call_us for phase in PHASES]
        needed_us = sum(pauses) + len(pauses) * 2.0 * comm.single_us
        repeats = min(MOST_REPEATS, 1 + math.ceil(needed_us / self.bench.alone_us(compute)))
        self.bench.run_in(compute, compute.alone_us, KEEP_WARM_US)
        # All ranks must arrive equally often, so those that came too late count as well where none came in time.
        taken = self._arrive(comm.single, pauses, compute, repeats)
        return [max(0.0, us - comm.single_us) for us in taken]

    def _arrive(
        self, single: Captured, pauses: Sequence[float], compute: Captured | None, repeats: int
    ) -> list[float]:  # fmt: skip
        """Microseconds from ready to end of a collective after each pause, beside so many replays of a computation; of
        those that ended while it ran, or of all if none did."""
        start, over = new_event(timing=True), new_event(timing=True)
        ready = [new_event(timing=True) for _ in pauses]
        ended = [new_event(timing=True) for _ in pauses]
        torch.cuda.synchronize()
        with torch.cuda.stream(single.stream):
            single.graph.replay()
            hold(round(2.0 * HEAD_START_US * self.bench.cycles_per_us))
            start.record()
        if compute is not None:
            compute.stream.wait_event(start)
            for _ in range(repeats):
                compute.replay()
            over.record(compute.stream)
        with torch.cuda.stream(single.stream):
            for pause_us, before, after in zip(pauses, ready, ended, strict=True):
                hold(round(pause_us * self.bench.cycles_per_us))
                before.record()
                single.graph.replay()
                after.record()
        torch.cuda.synchronize()
        taken = [elapsed_us(before, after) for before, after in zip(ready, ended, strict=True)]
        if compute is None:
            return taken
        limit_us = elapsed_us(start, over)
        return [us for us, end in zip(taken, ended, strict=True) if elapsed_us(start, end) < limit_us] or taken


def _calls(us: float) -> int:
    return int(min(MOST_CALLS, max(LEAST_CALLS, PAIR_US / us)))


def shares(
    ends_us: tuple[float, float], alone_us: tuple[float, float], least_us: tuple[float, float]
) -> tuple[float, float]:
    """The slowdown of each side while both ran, from when each ended and how long each takes alone.

    The side that ended later ran alone at last, at its own pace: what it had done by then is its share. A side that was
    kept out altogether has done nothing; it counts as one call (`least_us`), for no slowdown is without end.
    """
    both = min(ends_us)
    first, second = (
        max(least, alone - (end - both)) for end, alone, least in zip(ends_us, alone_us, least_us, strict=True)
    )
    return both / first, both / second
