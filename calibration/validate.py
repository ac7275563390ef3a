"""How far the simulator is from the hardware, level by level, on what no fit ever saw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from typing import Any

from calibration import validate_kernels, validate_serving, validate_two_batches
from calibration.compare import Source, same_link, same_machine
from calibration.validate_errors import Line, Point
from calibration.validate_kernels import Kernels, compare_kernels, compare_pairs, unseen
from calibration.validate_ranking import rankings
from calibration.validate_serving import LEVELS, METRICS, Served, Serving, compare_runs, without_recorded
from calibration.validate_timeline import Stretch
from calibration.validate_two_batches import TwoBatches, compare_two_batches
from sim.fitted import fit_notes, machine_words
from sim.spec import NodeSpec
from traces.measurement import Measurement


@dataclass(slots=True)
class Validation:
    """Everything that was compared on one node. `notes`: what a reader must know of the inputs, a line each."""

    node: NodeSpec
    sources: tuple[str, ...] = ()
    kernels: Kernels = field(default_factory=Kernels)
    pairs: Kernels = field(default_factory=Kernels)
    two_batches: TwoBatches = field(default_factory=TwoBatches)
    serving: Serving = field(default_factory=Serving)
    stretches: list[Stretch] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def lines(self) -> list[Line]:
        """The error table."""
        lines = validate_kernels.kernel_lines(self.kernels) + validate_kernels.pair_lines(self.pairs)
        return lines + validate_two_batches.lines(self.two_batches) + validate_serving.lines(self.serving)

    @property
    def points(self) -> list[Point]:
        """Every single comparison."""
        found = [point for part in (self.kernels, self.pairs) for points in part.points.values() for point in points]
        found += [point for schedules in self.two_batches.cells.values() for point in schedules.values()]
        return found + [point for _, points in serving_points(self.serving) for point in points]

    @property
    def verdict(self) -> tuple[int, int]:
        """How many targets are met, of how many that there is something to judge by."""
        judged = [line.met for line in self.lines if line.met is not None]
        return sum(judged), len(judged)


def serving_points(serving: Serving) -> list[tuple[str, list[Point]]]:
    """Of every group of runs, how it went and its points."""
    return [
        (group.runs[0].label, [group.point(f"{LEVELS[mode]}: {name}", key) for key, name, _ in METRICS])
        for mode, groups in serving.groups.items() for group in groups
    ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Inputs:
    """What is held against the node. `all_rows`: single kernels and pairs that a fit may have seen, too."""

    sources: tuple[Source, ...] = ()
    runs: tuple[Served, ...] = ()
    all_rows: bool = False

    def num_steps(self) -> int:
        """How often `told` will be called."""
        return len(self.measured_parts()) + len(self.two_batches()) + 2 * len(without_recorded(self.runs)[0])

    def measured_parts(self) -> list[Measurement]:
        """Rows of single kernels and pairs that count."""
        parts = (*validate_kernels.TARGETS, "pair")
        return unseen((r for s in self.sources for r in s.rows if r.what in parts), all_rows=self.all_rows)

    def two_batches(self) -> list[Measurement]:
        """Rows of two batches; a fit sees few of them, and of those no overlap."""
        return [row for source in self.sources for row in source.rows if row.what == "two_batches"]


def validate(node: NodeSpec, inputs: Inputs, today: date, told: Callable[[], object] = lambda: None) -> Validation:
    """Compare level by level. `told` is called after every simulated point. Raises ValueError if nothing is given that
    could be compared."""
    found = Validation(node, tuple(source.name for source in inputs.sources))
    found.notes = list(fit_notes(node, today))
    found.notes += [note for source in inputs.sources for note in source.notes(node, today)]
    found.notes += _foreign_runs(node, inputs.runs)
    parts = inputs.measured_parts()
    found.kernels, found.pairs = compare_kernels(node, parts, told), compare_pairs(node, parts, told)
    found.two_batches = compare_two_batches(node, inputs.sources, told)
    runs, num_recorded = without_recorded(inputs.runs)
    found.serving = compare_runs(node, runs, told)
    for part in (found.kernels, found.pairs, found.two_batches):
        found.notes += [f"left out: {count} rows: {why}" for why, count in part.left_out.items()]
    found.notes += [f"left out: {why}" for why in found.serving.left_out]
    if num_recorded:
        found.notes.append(
            f"recorded runs serve for timelines alone ({num_recorded} here); recording changes their times"
        )
    if beyond := sorted(found.kernels.out_of_range | found.serving.out_of_range):
        found.notes.append(f"beyond what the node knows, so extrapolated: {some_of(beyond)}")
    if not found.points:
        raise ValueError("; ".join(["there is nothing to compare", *found.notes]))
    return found


def some_of(names: Sequence[str], most: int = 3) -> str:
    """The first names, and how many more there are."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def _foreign_runs(node: NodeSpec, runs: Sequence[Served]) -> list[str]:
    """Runs on other hardware than the node describes, or with another link; a line per kind."""
    foreign: dict[str, int] = {}
    for run in runs:
        if not same_machine(run.gpu, node):
            why = f"made on {machine_words(run.gpu)}; node {node.name} describes {node.device.name}"
        elif not same_link(run.link_mode, node):
            why = f"made with link mode {run.link_mode}; node {node.name} has {node.link.kind}"
        else:
            continue
        foreign[why] = foreign.get(why, 0) + 1
    return [f"foreign: {count} runs were {why}" for why, count in foreign.items()]


def as_json(found: Validation) -> dict[str, Any]:
    """Everything, as plain data: the table, every point, every ranking, the notes."""
    met, judged = found.verdict
    return {
        "node": found.node.name,
        "node_digest": found.node.digest,
        "sources": list(found.sources),
        "runs": [run.name for groups in found.serving.groups.values() for g in groups for run in g.runs],
        "notes": found.notes,
        "targets_met": met,
        "targets_judged": judged,
        "table": [asdict(line) | {"met": line.met} for line in found.lines],
        "rankings": [asdict(ranking) for ranking in rankings(found.two_batches.cells)],
        "points": [asdict(point) | {"error": point.error if point.measured else None} for point in found.points],
    }
