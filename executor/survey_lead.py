"""What a survey measures next, and when it is over: decided by one rank, as points in small lots.

First the coarse grid: every kind of every model gets a share of the time that is left, so that a short budget covers
all of them, thinly; what a share was too short for comes later. Then round after round, models with the most doubt
first: what is left of the coarse grid, and after it the points of `executor.survey_refine`, a slice of time per kind.
Last, on GPUs, how the GEMMs and collectives are launched that were measured: that takes seconds, whatever the budget.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby

from executor.survey_points import (
    Grid,
    Point,
    Shapes,
    batch_points,
    collective_points,
    compute_of,
    host_points,
    kernel_points,
    pair_points,
    schedules,
)
from executor.survey_refine import candidates
from models.kernel import Kind
from traces.measurement import CHANNELS, LAUNCH, Measurement, point_key

# Shares of the budget that the kinds get of the coarse grid, per model where they need one.
SHARES = {"collective": 8.0, "host": 2.0, "gemm": 5.0, "attention": 1.0, "elementwise": 1.5, "sequence": 1.0,
          "pair": 8.0, "two_batches": 17.0}  # fmt: skip
# Seconds of a round that a kind gets of one model.
SLICES_S = {"gemm": 3.0, "pair": 3.0, "collective": 2.0, "two_batches": 3.0, "attention": 1.0, "elementwise": 1.0,
            "sequence": 1.0}  # fmt: skip
# Points between two looks at the clock.
LOTS = {"gemm": 12, "attention": 12, "elementwise": 12, "sequence": 4, "collective": 6, "pair": 8}
# Models beside whose kernels collectives are measured, and whose batches run in pairs.
PAIRED_MODELS = 2
# What one rank has nothing of.
TOGETHER = ("collective", "pair", "two_batches")
# A kind of which so many points failed, and none succeeded, is given up.
GIVE_UP = 8
TOP = 30


@dataclass(frozen=True, slots=True)
class Task:
    """The coarse points of one kind and model."""

    what: str
    model: str
    points: list[Point]


def make_tasks(models: Mapping[str, Shapes], grid: Grid, num_ranks: int, *, on_gpu: bool) -> list[Task]:
    """The coarse grid. Host costs are those of the first model."""
    tasks = [Task("collective", "", collective_points(num_ranks, grid))]
    for number, (model, shapes) in enumerate(models.items()):
        if number == 0:
            points = [Point(p.what, p.at, model) for p in host_points(on_gpu=on_gpu, num_ranks=num_ranks)]
            tasks.append(Task("host", model, points))
        tasks += [Task(what, model, points) for what, points in kernel_points(shapes, grid).items()]
        if number < PAIRED_MODELS and num_ranks > 1:
            tasks.append(Task("pair", model, pair_points(shapes, grid)))
            tasks.append(Task("two_batches", model, batch_points(shapes.config, num_ranks, grid)))
    return [task for task in tasks if task.points]


def why_never(what: str, num_ranks: int, *, on_gpu: bool) -> str:
    """Why a kind cannot be measured in such a world; empty if it can."""
    if num_ranks < 2 and what in TOGETHER:
        return "they need two ranks or more"
    if what == "pair" and not on_gpu:
        return "threads of one host share its cores; they are measured on GPUs alone"
    return ""


@dataclass(slots=True)
class Skipped:
    """Points of one kind that could not be measured, and the first reason."""

    points: int
    why: str


@dataclass(slots=True)
class Lead:
    """Gives out points in lots until the budget (seconds on the clock `now`) is spent or nothing is worth measuring.

    `rows`: what has been measured so far, also by an earlier survey; whoever uses the lead adds to it. A lot is of one
    kind and model; the schedules of two batches come all at once, and pairs by their compute kernel. `with_launches`:
    the last lots are how the GEMMs are launched that were measured.
    """

    tasks: list[Task]
    rows: Mapping[str, Measurement]
    models: Mapping[str, Shapes]
    grid: Grid
    budget_s: float
    now: Callable[[], float]
    with_launches: bool = False
    skipped: dict[str, Skipped] = field(default_factory=dict)
    _failed: set[str] = field(default_factory=set)
    _done: set[str] = field(default_factory=set)
    _end_s: float = 0.0

    def lots(self) -> Iterator[list[Point]]:
        """What to measure, lot after lot."""
        self._end_s = self.now() + self.budget_s
        yield from self._coarse()
        busy = True
        while busy:
            busy = False
            for model in self._by_doubt():
                for what, slice_s in SLICES_S.items():
                    task = next((t for t in self.tasks if (t.what, t.model) == (what, model)), None)
                    if task is not None:
                        until_s = min(self._end_s, self.now() + slice_s)
                        for lot in self._until(until_s, self._next(task)):
                            busy = True
                            yield lot
        if self.with_launches:
            yield from self._launches()

    def fail(self, point: Point, why: str) -> None:
        """The point cannot be measured; it is not tried again."""
        self._failed.add(point.key)
        known = self.skipped.setdefault(point.what, Skipped(0, why))
        known.points += 1

    def succeed(self, point: Point) -> None:
        """The point is in the rows."""
        self._done.add(point.what)

    # -- the order --------------------------------------------------------------------------------------------------

    def _coarse(self) -> Iterator[list[Point]]:
        for number, task in enumerate(self.tasks):
            left = sum(SHARES[later.what] for later in self.tasks[number:])
            now = self.now()
            until_s = now + (self._end_s - now) * SHARES[task.what] / left
            yield from self._until(until_s, task.points)

    def _launches(self) -> Iterator[list[Point]]:
        """The GEMMs that were measured, now or by an earlier survey, by model, and the collectives, as points of their
        own."""
        rows = list(self.rows.values())
        found = [
            [Point(LAUNCH, row.at, model) for row in rows if row.what == "gemm" and _is_of(shapes, row)]
            for model, shapes in self.models.items()
        ]
        for points in (*found, [Point(CHANNELS, row.at) for row in rows if row.what == "collective"]):
            if lot := [point for point in points if self._is_open(point)]:
                yield lot

    def _until(self, until_s: float, points: Iterable[Point]) -> Iterator[list[Point]]:
        """Lots of what is still to do, as long as there is time; one in any case while the budget lasts."""
        for number, lot in enumerate(in_lots(filter(self._is_open, points))):
            if self.now() >= (self._end_s if number == 0 else until_s):
                return
            yield lot

    def _is_open(self, point: Point) -> bool:
        failed = self.skipped.get(point.what)
        given_up = failed is not None and failed.points >= GIVE_UP and point.what not in self._done
        return point.key not in self.rows and point.key not in self._failed and not given_up

    def _next(self, task: Task) -> list[Point]:
        """What is left of the coarse grid, or else where there is most doubt."""
        left = [point for point in task.points if self._is_open(point)]
        return left or [point for _, point in self._doubts(task)]

    def _doubts(self, task: Task) -> list[tuple[float, Point]]:
        rows = {key: row for key, row in self.rows.items() if row.what == task.what}
        found: list[tuple[float, Point]] = []
        for candidate in candidates(task.points, rows, self.models.get):
            points = [candidate.point]
            if task.what == "two_batches":
                shapes = self.models[task.model]
                points = schedules(shapes.config, shapes.layout.tp, int(candidate.point.at["rows"]), self.grid)
            found += [(candidate.uncertainty, point) for point in points if self._is_open(point)]
        return found

    def _by_doubt(self) -> list[str]:
        """Models, the one with the largest sum of doubts first; what needs no model goes with the first."""
        doubt = {model: 0.0 for model in self.models}
        for task in self.tasks:
            if task.model and task.what in SLICES_S:
                left = sum(1 for point in task.points if self._is_open(point))
                doubt[task.model] += left + sum(value for value, _ in self._doubts(task)[:TOP])
        return ["", *sorted(doubt, key=lambda model: -doubt[model])]


def in_lots(points: Iterable[Point]) -> Iterator[list[Point]]:
    """Neighbours that are measured together."""
    for (what, *_), members in groupby(points, key=_group):
        lot = list(members)
        size = LOTS.get(what, len(lot))
        for start in range(0, len(lot), size):
            yield lot[start : start + size]


def _is_of(shapes: Shapes, row: Measurement) -> bool:
    """Whether a GEMM that was measured is one of this model's."""
    name, rows, withheld, cut = (row.at.get(key, 1) for key in ("name", "rows", "withheld_sms", "cut"))
    if name not in shapes.kernels(Kind.GEMM):
        return False
    like = shapes.gemm(str(name), int(rows), int(withheld), int(cut))
    return point_key("gemm", like) == row.key


def _group(point: Point) -> tuple[str, str, str]:
    same = ""
    if point.what == "two_batches":
        same = str(point.at["rows"])
    elif point.what == "pair":
        kernel = compute_of(point.at)
        same = point_key("", {name: value for name, value in kernel.items() if name != "withheld_sms"})
    return point.what, point.model, same
