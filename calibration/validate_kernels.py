"""Single kernels and pairs: what the simulator says of them, against what was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from calibration.holdout import is_held_out
from calibration.kernels import ctas_of, has_priority, kernel_of, withheld_of
from calibration.pairs import race_row
from calibration.sequence import sequence_us, why_unknown
from calibration.validate_errors import Line, Point, Target, line_of, line_of_times
from sim.cost import Costs
from sim.spec import NodeSpec
from traces.measurement import SEQUENCE, Measurement

LEVEL, PAIRS = "single kernels", "pairs"
COMPUTE = Target(5.0)
TARGETS = {"gemm": COMPUTE, "attention": COMPUTE, "elementwise": COMPUTE, SEQUENCE: COMPUTE, "collective": Target(7.0)}
PAIR = Target(10.0)
COMPUTE_SIDE, COMM_SIDE, DELAY = "compute slowdown", "comm slowdown", "start delay"
_VALUES = {COMPUTE_SIDE: "compute_slowdown", COMM_SIDE: "comm_slowdown", DELAY: "start_delay_us"}


@dataclass(slots=True)
class Kernels:
    """Points by class or side, and by part of it. `left_out`: what the node has no numbers for, and how many rows.
    `out_of_range`: what lies beyond its tables and its fit."""

    points: dict[str, list[Point]] = field(default_factory=dict)
    parts: dict[str, dict[str, list[Point]]] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    out_of_range: set[str] = field(default_factory=set)

    def add(self, name: str, part: str, point: Point) -> None:
        """One more point of a class."""
        self.points.setdefault(name, []).append(point)
        self.parts.setdefault(name, {}).setdefault(part, []).append(point)

    def part_lines(self, level: str, name: str) -> list[Line]:
        """A line per part, where a class has several."""
        parts = self.parts[name]
        return [line_of(level, f"  {part}", parts[part]) for part in sorted(parts)] if len(parts) > 1 else []

    def leave_out(self, why: str) -> None:
        """One more row that cannot be compared."""
        self.left_out[why] = self.left_out.get(why, 0) + 1


def unseen(rows: Iterable[Measurement], *, all_rows: bool = False) -> list[Measurement]:
    """The rows that no fit saw."""
    return [row for row in rows if all_rows or is_held_out(row)]


def compare_kernels(node: NodeSpec, rows: Iterable[Measurement], told: Callable[[], object]) -> Kernels:
    """Every row of a single kernel. A measured time includes the gap to the next kernel of the graph, as the fit has
    it; a sequence is one kernel for this purpose."""
    series, found, in_turn = node.in_series(), Kernels(), Costs(node)
    costs = Costs(series)
    for row in rows:
        if row.what not in TARGETS:
            continue
        told()
        measured, spread = row.values["us"], row.spread.get("us")
        if row.what == SEQUENCE:
            if why := why_unknown(row.at):
                found.leave_out(why)
                continue
            point = Point(LEVEL, label_of(row), measured, sequence_us(in_turn, row), spread)
            found.add(row.what, str(row.at["model"]), point)
            continue
        kernel = kernel_of(row)
        if why := _no_table(node, row):
            found.leave_out(why)
            continue
        if beyond := costs.beyond(kernel):
            found.out_of_range.add(beyond)
        solo = costs.solo_us(kernel, withheld_of(row), ctas_of(row))
        point = Point(LEVEL, label_of(row), measured, solo + series.device.graph_gap_us, spread)
        found.add(row.what, _part_of(row), point)
    return found


def compare_pairs(node: NodeSpec, rows: Iterable[Measurement], told: Callable[[], object]) -> Kernels:
    """Every row of a pair, raced in the simulator as the survey raced it on hardware. Pairs without priorities are a
    part of their own: no policy runs so unless it is told to."""
    costs, found = Costs(node.in_series()), Kernels()
    for row in rows:
        if row.what != "pair":
            continue
        told()
        if why := _no_table(node, row):
            found.leave_out(why)
            continue
        outcome = race_row(costs, row)
        for side, name in _VALUES.items():
            if name in row.values:
                predicted = getattr(outcome, name)
                point = Point(PAIRS, label_of(row), row.values[name], predicted, row.spread.get(name))
                if has_priority(row):
                    found.add(side, f"of {row.at['kind']}", point)
                else:
                    found.parts.setdefault(side, {}).setdefault("without priority", []).append(point)
    return found


def _no_table(node: NodeSpec, row: Measurement) -> str:
    """Why the node's tables do not hold the collective of a row; empty if they do, or it has none."""
    if row.what not in ("collective", "pair"):
        return ""
    op, ranks, ctas = str(row.at["op"]), int(row.at["num_ranks"]), ctas_of(row)
    known = {t.ctas for t in node.link.tables if t.op == op and t.ranks == ranks and not t.path}
    if not known:
        return f"node {node.name} has no {op} table for {ranks} ranks"
    if ctas and ctas not in known:
        return f"node {node.name} has no {op} table for {ctas} CTAs"
    return ""


def _part_of(row: Measurement) -> str:
    """What is told apart within a class: operations, and whether SMs were withheld."""
    if row.what == "collective":
        return f"{row.at['op']}, {row.at['num_ranks']} ranks"
    return f"{withheld_of(row)} SMs withheld" if withheld_of(row) else "all SMs"


def label_of(row: Measurement) -> str:
    """A point in a few words."""
    at = row.at
    shape = " x ".join(str(at[key]) for key in ("num_sequences", "length", "rows", "cols", "inner") if key in at)
    words = [str(at.get("compute", at.get("name", at.get("model", "")))), shape]
    if "op" in at:
        words.append(f"{at['op']} of {int(at['bytes']):,} bytes among {at['num_ranks']}")
    if ctas_of(row):
        words.append(f"{ctas_of(row)} CTAs")
    if withheld_of(row):
        words.append(f"{withheld_of(row)} SMs withheld")
    return ", ".join(word for word in words if word)


def kernel_lines(found: Kernels) -> list[Line]:
    """A line per class, and one per part of it."""
    lines = []
    for name, target in TARGETS.items():
        if name in found.points:
            lines += [line_of(LEVEL, name, found.points[name], target), *found.part_lines(LEVEL, name)]
    return lines


def pair_lines(found: Kernels) -> list[Line]:
    """A line per side, and one per kind of compute kernel; the delay in microseconds, as it may be nothing."""
    lines = []
    for side in (COMPUTE_SIDE, COMM_SIDE):
        if side in found.points:
            lines += [line_of(PAIRS, side, found.points[side], PAIR), *found.part_lines(PAIRS, side)]
    return lines + ([line_of_times(PAIRS, DELAY, found.points[DELAY])] if DELAY in found.points else [])
