"""From the GEMMs and collectives of profiler traces to rows: alone, and beside each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from calibration.importers.found import Sample
from calibration.importers.points import collective_at, gemm_at

Shape = tuple[int, int, int]
COVERED = 0.9
"""Share of a kernel's time with something beside it from which on it counts as overlapped."""


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """A kernel on a device; `launch` ties it to the operator that launched it, 0 to none."""

    name: str
    start_us: float
    end_us: float
    device: str
    stream: str
    launch: int
    args: dict[str, Any]

    @property
    def is_communication(self) -> bool:
        """Whether it is a kernel of NCCL."""
        return self.name.startswith("nccl")

    @property
    def us(self) -> float:
        """Its duration."""
        return self.end_us - self.start_us


@dataclass(frozen=True, slots=True, eq=False)
class Gemm:
    """One call of a GEMM: rows, cols, inner, and its kernels."""

    shape: Shape
    dtype: str
    works: tuple[Work, ...]

    @property
    def us(self) -> float:
        """The time of its kernels, without the gaps between them."""
        return sum(work.us for work in self.works)


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One rank's part in a collective."""

    op: str
    num_bytes: int
    num_ranks: int
    group: str
    rank: int
    work: Work

    @property
    def point(self) -> tuple[str, int, int]:
        """What makes two calls the same point."""
        return self.op, self.num_bytes, self.num_ranks


@dataclass(slots=True, eq=False)
class Trace:
    """One rank's kernels by start, and what is known of them."""

    path: Path
    rank: int
    works: list[Work]
    gemms: list[Gemm] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)

    def beside(self) -> dict[Work, list[Work]]:
        """For every kernel the others on its device that run at the same time for a while."""
        found: dict[Work, list[Work]] = {work: [] for work in self.works}
        running: list[Work] = []
        for work in self.works:
            running = [other for other in running if other.end_us > work.start_us]
            for other in running:
                if other.device == work.device and work.us > 0.0:
                    found[work].append(other)
                    found[other].append(work)
            running.append(work)
        return found


def samples_of(traces: list[Trace], priority: int | None, left_out: Counter[str]) -> list[Sample]:
    """All rows of the traces of one run."""
    beside: dict[Work, list[Work]] = {}
    for trace in traces:
        beside.update(trace.beside())
    rounds = _rounds(traces, left_out)
    gemms = [gemm for trace in traces for gemm in trace.gemms]
    alone = {id(gemm) for gemm in gemms if not any(_others(work, gemm, beside) for work in gemm.works)}
    rows = [Sample("gemm", gemm_at("gemm", *gemm.shape), {"us": gemm.us}) for gemm in gemms if id(gemm) in alone]
    free = [calls for calls in rounds if not any(beside[call.work] for call in calls)]
    rows += [Sample("collective", collective_at(*calls[0].point), {"us": _time(calls)}) for calls in free]
    left_out["collectives beside other kernels"] += len(rounds) - len(free)
    left_out["GEMMs beside other kernels"] += len(gemms) - len(alone)
    known = _Known(
        _medians([(gemm.shape, gemm.us) for gemm in gemms if id(gemm) in alone]),
        _medians([(calls[0].point, _time(calls)) for calls in free]),
    )
    pairs = list(_pairs([gemm for gemm in gemms if id(gemm) not in alone], rounds, beside, known))
    if priority is None:
        left_out["GEMMs beside one collective (a trace does not tell the priority; see --priority)"] += len(pairs)
        pairs = []
    rows += [_pair_row(pair, priority or 0) for pair in pairs]
    for reason in [reason for reason, count in left_out.items() if not count]:
        del left_out[reason]
    return rows


def _others(work: Work, gemm: Gemm, beside: dict[Work, list[Work]]) -> list[Work]:
    return [other for other in beside[work] if other not in gemm.works]


def _time(calls: list[Call]) -> float:
    """The collective itself: the kernel of the rank that came last."""
    return min(call.work.us for call in calls)


def _medians(found: list[tuple[Any, float]]) -> dict[Any, float]:
    by_point: dict[Any, list[float]] = {}
    for point, us in found:
        by_point.setdefault(point, []).append(us)
    return {point: median(times) for point, times in by_point.items()}


def _rounds(traces: list[Trace], left_out: Counter[str]) -> list[list[Call]]:
    """The calls of all ranks that belong together: the n-th of a group on every rank, if all are there and agree."""
    groups: dict[str, dict[int, list[Call]]] = {}
    for trace in traces:
        for call in trace.calls:
            groups.setdefault(call.group, {}).setdefault(trace.rank, []).append(call)
    rounds = []
    for ranks in groups.values():
        calls = list(ranks.values())
        total = sum(map(len, calls))
        if len(calls) != calls[0][0].num_ranks:
            left_out["collectives without the traces of all their ranks (a rank's own time holds its wait)"] += total
        elif len({tuple(call.point for call in sequence) for sequence in calls}) > 1:
            left_out["collectives of groups whose ranks recorded different calls"] += total
        else:
            rounds += [list(together) for together in zip(*calls, strict=True)]
    return rounds


# -- pairs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Known:
    """Times alone, by GEMM shape and by collective."""

    gemms: dict[Shape, float]
    calls: dict[tuple[str, int, int], float]


@dataclass(frozen=True, slots=True)
class _Pair:
    gemm: Gemm
    call: Call
    compute_slowdown: float
    comm_slowdown: float
    comm_us: float


def _pairs(
    gemms: list[Gemm], rounds: list[list[Call]], beside: dict[Work, list[Work]], known: _Known
) -> Iterator[_Pair]:
    """GEMMs that ran beside one collective and nothing else, where both are known alone and the collective had GEMMs
    of this one shape beside it almost from start to end."""
    calls = {call.work: together for together in rounds for call in together}
    owner = {work: gemm for gemm in gemms for work in gemm.works}
    for gemm in gemms:
        others = {other for work in gemm.works for other in _others(work, gemm, beside)}
        together = calls.get(next(iter(others))) if len(others) == 1 else None
        if together is None or gemm.shape not in known.gemms or together[0].point not in known.calls:
            continue
        fastest = min(together, key=lambda call: call.work.us)
        company = [owner.get(other) for other in beside[fastest.work]]
        one_shape = all(other is not None and other.shape == gemm.shape for other in company)
        (comm,) = others
        if not one_shape or _shared(fastest.work, beside[fastest.work]) < COVERED or _within(gemm, comm) < COVERED:
            continue
        yield _Pair(
            gemm, fastest, gemm.us / known.gemms[gemm.shape], fastest.work.us / known.calls[fastest.point],
            fastest.work.us,
        )  # fmt: skip


def _within(gemm: Gemm, comm: Work) -> float:
    """Share of the GEMM's time in which the collective's kernel ran."""
    inside = sum(max(0.0, min(w.end_us, comm.end_us) - max(w.start_us, comm.start_us)) for w in gemm.works)
    return inside / gemm.us if gemm.us else 0.0


def _shared(comm: Work, others: list[Work]) -> float:
    """Share of the collective's time in which others ran, which do not overlap each other on one stream."""
    inside = sum(max(0.0, min(w.end_us, comm.end_us) - max(w.start_us, comm.start_us)) for w in others)
    return inside / comm.us if comm.us else 0.0


def _pair_row(pair: _Pair, priority: int) -> Sample:
    op, num_bytes, num_ranks = pair.call.point
    rows, cols, inner = pair.gemm.shape
    at = {
        "compute": "gemm", "kind": "gemm", "rows": rows, "cols": cols, "inner": inner, "withheld_sms": 0,
        "priority": priority, **collective_at(op, num_bytes, num_ranks),
    }  # fmt: skip
    values = {
        "compute_slowdown": pair.compute_slowdown, "comm_slowdown": pair.comm_slowdown,
        "compute_us": pair.gemm.us, "comm_us": pair.comm_us,
    }  # fmt: skip
    return Sample("pair", at, values)
