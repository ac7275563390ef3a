"""Fitting what a compute kernel and a collective cost each other beyond SM slots, memory and links."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import msgspec
import numpy as np

from calibration.holdout import shape_identity
from calibration.kernels import collective_of, ctas_of, has_priority, kernel_of, withheld_of
from calibration.race import Outcome, Pair, race
from calibration.solve import Estimate, Floats, Parameter, Problem, Solution, cost_of, sigma_of, solve
from sim.cost import Costs
from sim.spec import ContentionSpec, NodeSpec
from traces.measurement import Measurement, is_kept_out

# Rows that a fit races in the simulator; of more, evenly spaced ones.
MOST_ROWS = 100
# Ways to model them are compared on fewer.
ROWS_FOR_WAYS = 50
KNOWN_SLOWDOWN = 0.02
MOST_SLOWDOWN = 6.0
# Races of each pair that a fit remembers: of a step in every direction, and of the point that they left.
KEPT_RACES = 16
_Known = tuple[tuple[str, float], ...]
# Ways whose cost is this much larger, and by so much, are not fitted any more.
FAR_BEHIND, FAR_COST = 1.5, 50.0
# CTAs that the default may have.
DEFAULTS = (2, 4, 12, 20, 24)
# SMs that a full wave of the GEMM library may leave.
LEFT_BY_WAVES = (4, 8, 12, 16)
DEFAULT_CTAS = "CTA count is the one with which the node explains best how the default gets on beside computation"
TRAFFIC = "hbm_per_byte"
SIDES = ("compute_slowdown", "comm_slowdown")
DELAY = "start_delay_us"
BY_KIND = {"gemm": "gemm_by_comm", "attention": "attention_by_comm", "elementwise": "elementwise_by_comm"}
BACK = {"gemm": "comm_by_compute", "attention": "comm_by_attention", "elementwise": "comm_by_elementwise"}
STREAM, BY_TRAFFIC, BY_MEMORY = "comm_stream_by_compute", "by_traffic", "comm_by_memory"
INDEPENDENT = "independent_ctas"
# SMs that lie together, by SMs of the device. Of a GH100's eight GPCs of 18 SMs (NVIDIA H100 whitepaper) a device with
# 132 SMs lacks six TPCs of two; one for each of six GPCs is a guess.
GPCS = {132: (18, 18, 16, 16, 16, 16, 16, 16)}
# Beside a collective of how many CTAs slowdowns are said, where several numbers of CTAs were measured.
PER_CTAS = 16.0
# Small and large kernels of a kind differ by this much at least.
SMALL_TO_LARGE = 8.0


@dataclass(frozen=True, slots=True)
class PairFit:
    """The node with its contention fitted, and the estimates behind it."""

    node: NodeSpec
    estimates: dict[str, Estimate]
    choices: dict[str, str]


def pair_of(row: Measurement) -> Pair:
    """The pair that a row measured."""
    return Pair(kernel_of(row), collective_of(row), withheld_of(row), ctas_of(row), has_priority(row))


def is_simulated(row: Measurement, node: NodeSpec) -> bool:
    """Whether the node has a table for the row's collective."""
    op, ranks = str(row.at["op"]), int(row.at["num_ranks"])
    return any((table.op, table.ranks) == (op, ranks) for table in node.link.tables)


def race_row(costs: Costs, row: Measurement) -> Outcome:
    """What the simulator says of a row."""
    return race(costs, pair_of(row), with_delay=DELAY in row.values)


def fit_pairs(rows: Sequence[Measurement], base: NodeSpec) -> PairFit:
    """Slowdowns by kind, of communication, and memory traffic of a collective per byte, on the node fitted so far."""
    usable = [row for row in rows if is_simulated(row, base) and all(side in row.values for side in SIDES)]
    usable = usable[:: -(-len(usable) // MOST_ROWS)] if usable else []
    estimates, choices = dict[str, Estimate](), dict[str, str]()
    traffic = base.link.hbm_per_byte
    if usable:
        base, solution, choices = _modelled(usable, base)
        estimates = dict(solution.estimates)
        if per := base.contention.per_ctas:
            told = "slowdowns of compute are said beside so many CTAs"
            estimates["per_ctas"] = Estimate("per_ctas", per, float("nan"), True, told)
    for field in (*(name for name in ContentionSpec.__struct_fields__ if name not in (BY_TRAFFIC, BY_MEMORY)), TRAFFIC):
        value = getattr(base.contention, field, traffic)
        estimates.setdefault(field, Estimate(field, value, float("nan"), False, "no such pair was measured"))
    return PairFit(_with(base, {name: e.value for name, e in estimates.items()}), estimates, choices)


def _modelled(rows: Sequence[Measurement], base: NodeSpec) -> tuple[NodeSpec, Solution, dict[str, str]]:
    """The node with pairs modelled in the way that explains them best, its solution, and what was chosen for it."""
    counts = {ctas_of(row) for row in rows}
    ways = [base, _linked(base, independent_ctas=not base.link.independent_ctas)]
    if 0 in counts and len(counts) > 1:
        per = base.contention.per_ctas or PER_CTAS
        ways = [_with_counts(_contending(way, per_ctas=per), rows) for way in ways]
    ways = [_contending(way, comm_by_memory=by_memory) for way, by_memory in product(ways, (False, True))]
    few = rows[:: -(-len(rows) // ROWS_FOR_WAYS)]
    base, solution, costs = _best(few, ways)
    base, solution, landing = _landing(few, base, solution)
    if len(few) < len(rows):
        solution = solve(_problem(rows, base, _parameters(rows, base)))
    slowed = "the memory traffic of computation" if base.contention.comm_by_memory else "any computation"
    choices = {BY_MEMORY: f"collectives are slowed by {slowed} ({_compared([min(costs[::2]), min(costs[1::2])])})"}
    choices |= landing
    begun = [min(costs[:2]), min(costs[2:])]
    if begun[0] != begun[1]:
        begin = "one by one" if base.link.independent_ctas else "together"
        choices[INDEPENDENT] = f"CTAs of collectives begin {begin} ({_compared(begun)})"
    if _tells_traffic(rows):
        base, solution, costs = _best(rows, [base, _contending(base, by_traffic=True)], solution)
        share = "what a collective streams" if base.contention.by_traffic else "all collectives alike"
        choices[BY_TRAFFIC] = f"computation is slowed by {share} ({_compared(costs)})"
    return base, solution, choices


def _landing(
    rows: Sequence[Measurement], base: NodeSpec, solution: Solution
) -> tuple[NodeSpec, Solution, dict[str, str]]:
    """Whether SMs that a collective has are lost to clusters of CTAs with their neighbours, where clusters were seen;
    and whether it takes SMs of a partition too, where there were any."""
    choices = {}
    gpcs = GPCS.get(base.device.num_sms)
    if gpcs and any(table.clusters for table in base.gemms):
        clustered = msgspec.structs.replace(base, device=msgspec.structs.replace(base.device, gpcs=gpcs))
        base, solution, costs = _best(rows, [base, clustered], solution)
        lost = "are lost to clusters of CTAs with their neighbours" if base.device.gpcs else "are lost alone"
        choices["gpcs"] = f"SMs that collectives have {lost}; sizes are assumed ({_compared(costs)})"
    if any(map(withheld_of, rows)):
        base, solution, costs = _best(rows, [base, _linked(base, ctas_anywhere=True)], solution)
        where = "anywhere" if base.link.ctas_anywhere else "outside of a partition first"
        choices["ctas_anywhere"] = f"CTAs of collectives land {where} ({_compared(costs)})"
    return base, solution, choices


def _parameters(rows: Sequence[Measurement], base: NodeSpec) -> tuple[Parameter, ...]:
    """What these rows may tell: by kind both ways where that kind was measured, and what is the same for all."""
    contention, traffic = base.contention, base.link.hbm_per_byte
    kinds = sorted({str(row.at["kind"]) for row in rows})
    both = contention.comm_by_compute
    found = {BY_KIND[kind]: getattr(contention, BY_KIND[kind]) for kind in kinds} | {"comm_by_compute": both}
    if len(kinds) > 1:
        found |= {BACK[kind]: getattr(contention, BACK[kind]) or both for kind in kinds}
    slow = [Parameter(name, v, 1.0, MOST_SLOWDOWN, v, KNOWN_SLOWDOWN) for name, v in found.items()]
    stream = contention.comm_stream_by_compute
    if len({int(row.at["bytes"]) for row in rows}) > 1:
        slow.append(Parameter(STREAM, stream or both, 1.0, MOST_SLOWDOWN, stream or both, KNOWN_SLOWDOWN))
    return (*slow, Parameter(TRAFFIC, traffic, 0.1, 20.0, traffic))


def _tells_traffic(rows: Sequence[Measurement]) -> bool:
    """Whether light kernels of one kind were measured small and large, beside messages of several sizes."""
    for kind in ("attention", "elementwise"):
        some = [row for row in rows if row.at["kind"] == kind]
        moved = [float(row.at["bytes_moved"]) for row in some]
        if len({int(row.at["bytes"]) for row in some}) > 1 and max(moved) > SMALL_TO_LARGE * min(moved):
            return True
    return False


def _best(
    rows: Sequence[Measurement], ways: Sequence[NodeSpec], first: Solution | None = None
) -> tuple[NodeSpec, Solution, list[float]]:
    """Of several ways to model the node the one that fits best, the first of equals; its solution, and the costs of
    all. `first`: what is known of the first way. None is fitted that the best one's values leave far behind, or that
    says of these rows what another one does."""
    found = [(first, ways[0])] if first else []
    costs = [first.cost] if first else []
    for way in ways[len(costs) :]:
        problem = _problem(rows, way, _parameters(rows, way))
        # What each way that was fitted costs, and what this one does at the same values.
        beside = [(solution.cost, cost_of(problem, solution.values)) for solution, _ in found]
        lowest, at_best = min(beside, default=(0.0, 0.0))
        if same := [cost for cost, tried in beside if tried == cost]:
            costs.append(same[0])
        elif at_best > FAR_BEHIND * lowest + FAR_COST:
            costs.append(at_best)
        else:
            found.append((solve(problem), way))
            costs.append(found[-1][0].cost)
    solution, base = min(found, key=lambda each: each[0].cost)
    return base, solution, costs


def _compared(costs: Sequence[float]) -> str:
    return f"robust cost of pairs {min(costs):.0f}, the other way {max(costs):.0f}"


def _contending(base: NodeSpec, **changes: float) -> NodeSpec:
    """The node with another contention."""
    return msgspec.structs.replace(base, contention=msgspec.structs.replace(base.contention, **changes))


def _linked(base: NodeSpec, **changes: Any) -> NodeSpec:
    """The node with other links."""
    return msgspec.structs.replace(base, link=msgspec.structs.replace(base.link, **changes))


def _with_counts(base: NodeSpec, rows: Sequence[Measurement]) -> NodeSpec:
    """How many CTAs the library's default has, and with how many the GEMM library fills a wave, is what explains best
    how they get on with each other: whether both fit on the SMs decides whether a GEMM needs a wave more. The second is
    asked only where GEMM shapes have tables, whose times do not hang on it. What was seen at launches is not asked."""
    known = {ctas_of(row) for row in rows} - {0}
    some = [row for row in rows if not ctas_of(row)]
    op, ranks = str(some[0].at["op"]), int(some[0].at["num_ranks"])
    tables = {t.ctas for t in base.link.tables if (t.op, t.ranks) == (op, ranks)}
    # The base may have called its default by another number than the tables that were fitted since.
    usual = base.link.default_ctas if base.link.default_ctas in tables else max(tables)
    device, found = base.device, list[tuple[float, int, int, NodeSpec]]()
    asked = bool(base.gemms) and not device.gemm_persistent
    waves = {device.gemm_wave_ctas, *(device.num_sms - left for left in LEFT_BY_WAVES if asked)}
    # A default that is as fast as a number that was asked for has that number, and one table with it.
    is_seen = usual in known or any(table.launched for table in base.link.tables)
    counts = [usual] if is_seen else sorted({usual, *DEFAULTS} - known)
    for ctas, wave in product(counts, sorted(waves)):
        node = msgspec.structs.replace(base, device=msgspec.structs.replace(device, gemm_wave_ctas=wave))
        node = _default_of(node, usual, ctas, ranks)
        found.append((_cost(rows, node), (ctas != usual) + (wave != device.gemm_wave_ctas), len(found), node))
    return min(found, key=lambda each: each[:3])[3]


def _cost(rows: Sequence[Measurement], node: NodeSpec) -> float:
    problem = _problem(rows, node, _parameters(rows, node))
    return cost_of(problem, {p.name: p.start for p in problem.parameters})


def _default_of(base: NodeSpec, usual: int, ctas: int, ranks: int) -> NodeSpec:
    """The node whose default table, of `usual` CTAs among so many ranks, has `ctas`."""
    tables = tuple(
        msgspec.structs.replace(t, ctas=ctas) if (t.op, t.ranks, t.ctas) == ("all_reduce", ranks, usual) else t
        for t in base.link.tables
    )
    return _linked(base, tables=tables, default_ctas=ctas)


def _problem(rows: Sequence[Measurement], base: NodeSpec, parameters: tuple[Parameter, ...]) -> Problem:
    pairs, told = [pair_of(row) for row in rows], [_told(row) for row in rows]
    measured = np.log([value for each in told for value, _ in each.values()])

    @lru_cache(maxsize=len(BY_KIND))
    def costs_of(known: _Known) -> Costs:
        return Costs(_with(base, dict(known)))

    # Most steps of a fit move a value that a pair of another kind knows nothing of.
    @lru_cache(maxsize=KEPT_RACES * len(rows))
    def raced(number: int, known: _Known) -> Outcome:
        return race(costs_of(known), pairs[number], with_delay=DELAY in told[number])

    def log_ratio(values: dict[str, float]) -> Floats:
        known = {kind: _known_to(kind, values) for kind in BY_KIND}
        found: list[float] = []
        for number, (row, each) in enumerate(zip(rows, told, strict=True)):
            outcome = raced(number, known[str(row.at["kind"])])
            simulated = {"compute_slowdown": outcome.compute_slowdown, "comm_slowdown": outcome.comm_slowdown}
            if DELAY in each:
                simulated[DELAY] = 1.0 + outcome.start_delay_us / _alone_us(row)
            found += [simulated[name] for name in each]
        ratio: Floats = np.log(found) - measured
        return ratio

    flat = [pair for each in told for pair in each.values()]
    sigma = sigma_of([value for value, _ in flat], [spread for _, spread in flat])
    groups = tuple(shape_identity(row) for row, each in zip(rows, told, strict=True) for _ in each)
    return Problem(parameters, log_ratio, sigma, groups, is_staircase=True, is_dear=True)


def _known_to(kind: str, values: dict[str, float]) -> _Known:
    """The values that a pair with this kind of computation hangs on. What slows GEMMs' collectives stands for all kinds
    that say nothing else."""
    strange = {names[other] for names in (BY_KIND, BACK) for other in BY_KIND if other != kind} - {BACK["gemm"]}
    return tuple((name, value) for name, value in values.items() if name not in strange)


def _told(row: Measurement) -> dict[str, tuple[float, float]]:
    """What a row tells, with its spread: slowdowns, of the collective only if it ran at all beside the computation, and
    how much longer one takes that comes alone."""
    names = SIDES[:1] if is_kept_out(row) else SIDES
    found = {name: (row.values[name], row.spread.get(name, 0.0)) for name in names}
    if DELAY in row.values and "comm_us" in row.values:
        alone = _alone_us(row)
        found[DELAY] = (1.0 + row.values[DELAY] / alone, row.spread.get(DELAY, 0.0) / alone)
    return found


def _alone_us(row: Measurement) -> float:
    """How long the collective of a pair takes alone."""
    return row.values["comm_us"] / row.values["comm_slowdown"]


def _with(base: NodeSpec, values: dict[str, float]) -> NodeSpec:
    known = {field: values[field] for field in ContentionSpec.__struct_fields__ if field in values}
    return _linked(_contending(base, **known), hbm_per_byte=values[TRAFFIC])
