"""Where a survey goes on once the coarse grid is there: where reading between its points is least certain.

The points that differ in one coordinate alone make a curve: the rows of a GEMM, the length of attention, the bytes of a
message. Every inner point of a curve is also read from its two neighbours, straight in logarithms; how far that is from
what was measured there is how far a reading between points may be off nearby. The uncertainty of an interval is the
largest of that distance at its two ends and of the relative spread of what was measured there. The most uncertain
intervals are halved (at the geometric mean, rounded to a size that occurs). What is found there counts from then on, so
that a step is closed in on and a smooth curve is left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from math import log, sqrt

from executor.survey_points import PER_SEQUENCE, SEQUENCE, SERIAL, Point, Shapes, compute_of, pair_at
from traces.measurement import Measurement, is_kept_out, point_key

AXES: dict[str, tuple[str, ...]] = {
    "gemm": ("rows",), "elementwise": ("rows",), "attention": ("length",), "collective": ("bytes",),
    "pair": ("bytes", "rows"), "two_batches": ("rows",),
}  # fmt: skip
# Coordinates that follow from the one that a curve runs along.
FOLLOWING = frozenset({"bytes_moved", "num_ctas", "flops"})
# Nothing says how a curve of two points bends.
UNKNOWN = 0.1
# Uncertainty below this is not worth a point; the fit itself is not as good.
ENOUGH = 0.005
# Neighbours nearer than this factor are near enough.
NARROW = 1.1
FEW_ROWS, ROWS_STEP, SMALL_STEP, BYTES_STEP = 64, 16, 4, 4096
ShapesOf = Callable[[str], Shapes | None]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A point that is worth measuring, and how uncertain the interval is in which it lies."""

    uncertainty: float
    point: Point


def candidates(known: Iterable[Point], rows: Mapping[str, Measurement], shapes_of: ShapesOf) -> list[Candidate]:
    """New points in all intervals of the curves to which the known points belong, the least certain first."""
    by_key: dict[str, Candidate] = {}
    for axis, template, curve in _curves(known, rows):
        for low, high, uncertainty in _intervals(curve):
            middle = midpoint(axis, low, high, template)
            if middle is None or uncertainty < ENOUGH:
                continue
            point = moved(template, shapes_of(template.model), axis, middle)
            if point.key not in rows and uncertainty > by_key.get(point.key, Candidate(0.0, point)).uncertainty:
                by_key[point.key] = Candidate(uncertainty, point)
    return sorted(by_key.values(), key=lambda c: (-c.uncertainty, c.point.key))


Curve = dict[int, Measurement]


def _curves(known: Iterable[Point], rows: Mapping[str, Measurement]) -> list[tuple[str, Point, Curve]]:
    """Axis, one point of the curve, and the rows along it. Rows of an earlier survey belong to curves as well."""
    templates: dict[tuple[str, str], Point] = {}
    for point in known:
        for axis in _axes(point.what, point.at):
            templates.setdefault((axis, _curve_key(point.what, point.at, axis)), point)
    curves: dict[tuple[str, str], Curve] = {}
    for row in rows.values():
        for axis in _axes(row.what, row.at):
            key = (axis, _curve_key(row.what, row.at, axis))
            if key in templates:
                curves.setdefault(key, {})[int(row.at[axis])] = row
    return [(key[0], templates[key], curve) for key, curve in curves.items()]


def _axes(what: str, at: Mapping[str, int | float | str]) -> tuple[str, ...]:
    axes = AXES.get(what, ())
    return axes[:1] if what == "pair" and at["kind"] != "gemm" else axes


def _curve_key(what: str, at: Mapping[str, int | float | str], axis: str) -> str:
    """Everything but the axis and what follows from it; a width stays, for it tells models apart."""
    dropped = {axis, *(FOLLOWING if axis != "bytes" else ()), *(("length",) if what == "two_batches" else ())}
    rest = {name: value for name, value in at.items() if name not in dropped}
    if what == "elementwise":
        rest["width"] = round(float(at["bytes_moved"]) / int(at["rows"]))
    return point_key(what, rest)


def _intervals(curve: Curve) -> list[tuple[int, int, float]]:
    """Neighbours on the curve and how uncertain it is between them."""
    sizes = sorted(curve)
    doubt = {size: _spread(curve[size]) for size in sizes}
    for low, middle, high in zip(sizes, sizes[1:], sizes[2:], strict=False):
        doubt[middle] = max(doubt[middle], _bend((low, middle, high), curve))
    least = UNKNOWN if len(sizes) < 3 else 0.0
    return [(low, high, max(least, doubt[low], doubt[high])) for low, high in pairwise(sizes)]


def _spread(row: Measurement) -> float:
    return max((row.spread[name] / row.values[name] for name in _names(row)), default=0.0)


def _bend(sizes: tuple[int, int, int], curve: Curve) -> float:
    """How far the middle point is from the straight line between its neighbours, as a share."""
    low, middle, high = sizes
    share = log(middle / low) / log(high / low)
    off = []
    for name in set.intersection(*(set(_names(curve[size])) for size in sizes)):
        a, b, c = (log(curve[size].values[name]) for size in sizes)
        off.append(abs(b - a * (1.0 - share) - c * share))
    return max(off, default=0.0)


def _names(row: Measurement) -> list[str]:
    if row.what != "pair":
        return ["us"]
    # How often a collective goes on beside computation that keeps it out is chance; no curve is drawn through that.
    return ["compute_slowdown"] if is_kept_out(row) else ["compute_slowdown", "comm_slowdown"]


def midpoint(axis: str, low: int, high: int, template: Point) -> int | None:
    """A size between two others that occurs in practice; None where there is none left."""
    step = BYTES_STEP
    if axis != "bytes":
        step = ROWS_STEP if high > FEW_ROWS or axis == "length" else SMALL_STEP
        if template.at.get("name") in PER_SEQUENCE:
            step = 1
        elif template.what == "two_batches":
            step = SEQUENCE if high > SEQUENCE else ROWS_STEP
    middle = round(sqrt(low * high) / step) * step
    return middle if low < middle < high and high > NARROW * low else None


def moved(point: Point, shapes: Shapes | None, axis: str, value: int) -> Point:
    """The same point at another value of one coordinate, with everything that depends on it."""
    at = dict(point.at)
    if point.what == "pair" and axis == "rows":
        compute = moved(Point(str(at["kind"]), compute_of(at)), shapes, axis, value).at
        variant = (int(at["withheld_sms"]), int(at["ctas"]), int(at["priority"]))
        return replace(point, at=pair_at(str(at["kind"]), compute, int(at["bytes"]), int(at["num_ranks"]), variant))
    if point.what == "elementwise":
        assert shapes is not None
        at = shapes.elementwise(str(at["name"]), value, int(at["withheld_sms"]))
    elif point.what == "attention":
        assert shapes is not None
        at = shapes.attention(int(at["num_sequences"]), value, int(at["withheld_sms"]))
    else:
        at[axis] = value
        if point.what == "two_batches":
            # One schedule would say nothing about the others; the serial one stands for all of them.
            at |= {"length": min(value, SEQUENCE), "schedule": SERIAL}
    return replace(point, at=at)
