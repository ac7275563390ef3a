"""Whether the simulator orders the schedules of a cell as the hardware does: a tool for choosing must choose right."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

from calibration.compare import COMM_ALONE, COMPUTE_ALONE
from calibration.validate_errors import Line, Point, Target, line_of, line_of_share

LEVEL = "two batches"
RANKING = Target(95.0, is_share=True)
# Where no spread was recorded, schedules closer than this share are not told apart: on 4 x H200 options that make the
# same plan came 0.2 to 5 % apart, mostly 2 % and less (benchmarks/data/h200-x4-2026-11-21).
UNKNOWN_SPREAD = 0.02


@dataclass(frozen=True, slots=True)
class Cell:
    """What is compared between schedules: a model cut to some layers, batches of so many rows, on so many ranks, from
    one source."""

    model: str
    num_layers: int
    rows: int
    length: int
    num_ranks: int
    source: str = ""

    def __str__(self) -> str:
        return f"{self.model} x {self.num_layers}, {self.rows} rows"

    @property
    def num_sequences(self) -> int:
        """Sequences of a batch."""
        return max(1, self.rows // self.length)


@dataclass(frozen=True, slots=True)
class Ranking:
    """How the schedules of a cell are ordered. `decided`: pairs that the hardware tells apart, `right`: of those, in
    the simulator's order too. `chosen` is what the simulator would take, `best` what was fastest; `regret`: how much
    slower the chosen one was, as a share."""

    cell: Cell
    decided: int
    right: int
    chosen: str
    best: str
    regret: float
    is_best: bool


def rankings(cells: Mapping[Cell, Mapping[str, Point]]) -> list[Ranking]:
    """The ranking of every cell with at least two schedules."""
    ranked = []
    for cell, schedules in cells.items():
        plans = {name: point for name, point in schedules.items() if name not in (COMPUTE_ALONE, COMM_ALONE)}
        if len(plans) > 1:
            ranked.append(_ranking(cell, plans))
    return ranked


def _ranking(cell: Cell, plans: dict[str, Point]) -> Ranking:
    decided = right = 0
    for one, two in combinations(plans.values(), 2):
        if abs(one.measured - two.measured) > max(_spread(one), _spread(two)):
            decided += 1
            right += (one.measured - two.measured) * (one.predicted - two.predicted) > 0.0
    best = min(plans, key=lambda name: plans[name].measured)
    chosen = min(plans, key=lambda name: plans[name].predicted)
    late = plans[chosen].measured - plans[best].measured
    is_best = late <= max(_spread(plans[chosen]), _spread(plans[best]))
    return Ranking(cell, decided, right, chosen, best, late / plans[best].measured, is_best)


def _spread(point: Point) -> float:
    return UNKNOWN_SPREAD * point.measured if point.spread is None else point.spread


def ranking_lines(cells: Mapping[Cell, Mapping[str, Point]]) -> list[Line]:
    """How often all told-apart pairs of a cell are in the right order, how often the choice is right, what it costs."""
    ranked = rankings(cells)
    if not ranked:
        return []
    whole = sum(1 for ranking in ranked if ranking.right == ranking.decided)
    chosen = sum(1 for ranking in ranked if ranking.is_best)
    decided, right = sum(r.decided for r in ranked), sum(r.right for r in ranked)
    names = [f"{r.cell}: {r.chosen} for {r.best}" if r.regret else "" for r in ranked]
    regrets = [Point(LEVEL, name, 1.0, 1.0 + r.regret) for name, r in zip(names, ranked, strict=True)]
    return [
        line_of_share(LEVEL, "cells ranked right", whole, len(ranked), RANKING),
        line_of_share(LEVEL, "cells with the best chosen", chosen, len(ranked)),
        line_of_share(LEVEL, "pairs in the right order", right, decided),
        line_of(LEVEL, "cost of the choice", regrets),
    ]
