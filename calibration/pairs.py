"""Fitting what a compute kernel and a collective cost each other beyond SM slots, memory and links."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from calibration.holdout import shape_identity
from calibration.kernels import collective_of, ctas_of, kernel_of, withheld_of
from calibration.race import Outcome, Pair, race
from calibration.solve import Estimate, Floats, Parameter, Problem, sigma_of, solve
from sim.cost import Costs
from sim.spec import ContentionSpec, NodeSpec
from traces.measurement import Measurement

# Rows that a fit races in the simulator; of more, evenly spaced ones.
MOST_ROWS = 120
KNOWN_SLOWDOWN = 0.02
MOST_SLOWDOWN = 4.0
TRAFFIC = "hbm_per_byte"
SIDES = ("compute_slowdown", "comm_slowdown")
BY_KIND = {"gemm": "gemm_by_comm", "attention": "attention_by_comm", "elementwise": "elementwise_by_comm"}


@dataclass(frozen=True, slots=True)
class PairFit:
    """The node with its contention fitted, and the estimates behind it."""

    node: NodeSpec
    estimates: dict[str, Estimate]


def pair_of(row: Measurement) -> Pair:
    """The pair that a row measured."""
    priority = bool(int(row.at.get("priority", 1)))
    return Pair(kernel_of(row), collective_of(row), withheld_of(row), ctas_of(row), priority)


def is_simulated(row: Measurement, node: NodeSpec) -> bool:
    """Whether the node has a table for the row's collective."""
    op, ranks = str(row.at["op"]), int(row.at["num_ranks"])
    return any((table.op, table.ranks) == (op, ranks) for table in node.link.tables)


def race_row(costs: Costs, row: Measurement) -> Outcome:
    """What the simulator says of a row."""
    return race(costs, pair_of(row), with_delay="start_delay_us" in row.values)


def fit_pairs(rows: Sequence[Measurement], base: NodeSpec) -> PairFit:
    """Slowdowns by kind, of communication, and memory traffic of a collective per byte, on the node fitted so far."""
    usable = [row for row in rows if is_simulated(row, base) and all(side in row.values for side in SIDES)]
    usable = usable[:: -(-len(usable) // MOST_ROWS)] if usable else []
    contention = base.contention
    kinds = sorted({str(row.at["kind"]) for row in usable})
    fields = [BY_KIND[kind] for kind in kinds] + (["comm_by_compute"] if usable else [])
    parameters = [
        Parameter(field, getattr(contention, field), 1.0, MOST_SLOWDOWN, getattr(contention, field), KNOWN_SLOWDOWN)
        for field in fields
    ]
    traffic = base.link.hbm_per_byte
    parameters.append(Parameter(TRAFFIC, traffic, 0.1, 20.0, traffic))
    estimates: dict[str, Estimate] = {}
    if usable:
        estimates = dict(solve(_problem(usable, base, tuple(parameters))).estimates)
    for field in (*ContentionSpec.__struct_fields__, TRAFFIC):
        value = getattr(contention, field, traffic)
        estimates.setdefault(field, Estimate(field, value, float("nan"), False, "no such pair was measured"))
    return PairFit(_with(base, {name: e.value for name, e in estimates.items()}), estimates)


def _problem(rows: Sequence[Measurement], base: NodeSpec, parameters: tuple[Parameter, ...]) -> Problem:
    measured = np.array([[row.values[side] for side in SIDES] for row in rows])
    pairs = [pair_of(row) for row in rows]

    def log_ratio(values: dict[str, float]) -> Floats:
        costs = Costs(_with(base, values))
        found = [race(costs, pair, with_delay=False) for pair in pairs]
        simulated = np.array([(o.compute_slowdown, o.comm_slowdown) for o in found])
        ratio: Floats = np.log(simulated / measured).ravel()
        return ratio

    spread = [[row.spread.get(side, 0.0) for side in SIDES] for row in rows]
    sigma = sigma_of(measured.ravel().tolist(), np.array(spread).ravel().tolist())
    groups = tuple(shape_identity(row) for row in rows for _ in SIDES)
    return Problem(parameters, log_ratio, sigma, groups, is_staircase=True, is_dear=True)


def _with(base: NodeSpec, values: dict[str, float]) -> NodeSpec:
    known = {field: values[field] for field in ContentionSpec.__struct_fields__ if field in values}
    return msgspec.structs.replace(
        base,
        contention=msgspec.structs.replace(base.contention, **known),
        link=msgspec.structs.replace(base.link, hbm_per_byte=values[TRAFFIC]),
    )
