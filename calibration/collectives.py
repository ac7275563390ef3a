"""Tables of collectives from measured ones: a knot at every size that is not held out, smoothed where it is noisy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import log, log2, sqrt
from statistics import median

import numpy as np

from calibration.solve import Floats
from sim.spec import LinkSpec, Table, next_larger
from traces.measurement import Measurement

# How precisely a time is taken to be known, even if all repetitions agree; and how sharply a curve of log time over
# octaves of size may bend without being smoothed away: protocols switch, so sharply.
LEAST_NOISE, USUAL_BEND = 0.01, 0.4
# Series within so much of one another are the same algorithm with as many CTAs.
SAME = 0.05
LEAST_US = 0.1
# Sizes that are further apart than this factor get a knot between them.
WIDE_GAP = 1.5
MORE_CTAS = 8
# A time that is less than this share of a smaller message's is another protocol's; and the sizes that each has.
FALLS, LEAST_OF_A_SIDE = 0.95, 2
AS_FAST = "as fast as with"
SEEN_CTAS = "CTA count is the most with which messages were seen to be launched"
Key = tuple[str, int, int]
Launched = dict[Key, dict[int, int]]


@dataclass(frozen=True, slots=True)
class TableFit:
    """A fitted table, the standard error of its knots (share of a time, the median one), and a note on its CTAs."""

    table: Table
    error: float
    note: str


def fit_tables(
    rows: Sequence[Measurement], channels: Sequence[Measurement], base: LinkSpec, gap_us: float
) -> list[TableFit]:
    """A table for every operation, number of ranks and bound on CTAs that was measured at two sizes or more.

    `channels`: with how many CTAs collectives were seen to be launched. `gap_us`: from one collective of a graph to the
    next, which measured times have in them and tables have not. Rows with the library's number of CTAs go to the number
    that was seen; where none was, to the base node's default, which is an estimate: if the same number was also asked
    for and was slower, the default must be more.
    """
    launched = _launched(channels)
    series: dict[Key, dict[int, tuple[float, float]]] = {}
    for (op, ranks, ctas, size), some in sorted(_grouped(rows).items()):
        us = max(LEAST_US, median(row.values["us"] for row in some) - gap_us)
        noise = median(row.spread.get("us", 0.0) / row.values["us"] for row in some) / 1.35
        series.setdefault((op, ranks, ctas), {})[size] = (us, max(LEAST_NOISE, noise))
    fits = []
    for (op, ranks, ctas), points in series.items():
        if len(points) < 2:
            continue
        explicit = {key[2]: table for key, table in series.items() if key[:2] == (op, ranks) and key[2]}
        seen = launched.get((op, ranks, ctas), {})
        default = max(launched.get((op, ranks, 0), {0: 0}).values())
        if not ctas and default:
            count, note = default, SEEN_CTAS
        elif not ctas:
            count, note = _default_ctas(points, explicit, usual_ctas(base, op, ranks))
        elif (op, ranks, 0) in series and (ctas == default if default else _same(points, series[op, ranks, 0])):
            continue  # the default is measured as well, and is this
        else:
            count, note = ctas, ""
        fits.append(_smoothed(op, ranks, count, points, note, seen))
    return fits


def _launched(channels: Sequence[Measurement]) -> Launched:
    """CTAs by size, of each operation, number of ranks and bound."""
    found: Launched = {}
    for row in channels:
        key = str(row.at["op"]), int(row.at["num_ranks"]), int(row.at["ctas"])
        found.setdefault(key, {})[int(row.at["bytes"])] = int(row.values["ctas"])
    return found


def usual_ctas(base: LinkSpec, op: str, ranks: int) -> int:
    """The base node's default CTAs of an operation; of another number of ranks if it has none for this one."""
    exact = [t.ctas for t in base.tables if (t.op, t.ranks) == (op, ranks)]
    return max(exact or [t.ctas for t in base.tables if t.op == op] or [t.ctas for t in base.tables])


def _grouped(rows: Sequence[Measurement]) -> dict[tuple[str, int, int, int], list[Measurement]]:
    found: dict[tuple[str, int, int, int], list[Measurement]] = {}
    for row in rows:
        at = row.at
        key = (str(at["op"]), int(at["num_ranks"]), int(at["ctas"]), int(at["bytes"]))
        found.setdefault(key, []).append(row)
    return found


def _default_ctas(
    default: dict[int, tuple[float, float]], explicit: dict[int, dict[int, tuple[float, float]]], usual: int
) -> tuple[int, str]:
    """How many CTAs the default is taken to have, and why. It must be most, for that is what `sim.cost` takes."""
    for ctas, points in sorted(explicit.items()):
        if _same(default, points):
            return ctas, f"{AS_FAST} {ctas} CTAs asked for, so taken to be {ctas}"
    most = max(explicit, default=0)
    if most >= usual:
        return most + MORE_CTAS, f"CTA count is an estimate: unlike {most}, the most that was asked for, so more"
    return usual, "CTA count is the base node's"


def _same(one: dict[int, tuple[float, float]], two: dict[int, tuple[float, float]]) -> bool:
    """Whether two series are equally fast at the sizes that both have."""
    ratios = [abs(np.log(one[size][0] / two[size][0])) for size in one if size in two]
    return bool(ratios) and float(np.median(ratios)) < SAME


def _smoothed(
    op: str, ranks: int, ctas: int, points: dict[int, tuple[float, float]], note: str, seen: dict[int, int]
) -> TableFit:
    """Times at the measured sizes. Where a larger message takes less, the library changes its protocol, and each side
    goes on as it was until halfway."""
    sides = [_curve({size: points[size] for size in side}) for side in _sides(points)]
    curve = sides[0][0]
    for side, _ in sides[1:]:
        halfway = round(sqrt(curve[-1][0] * side[0][0]))
        before = _extended(curve[-2], curve[-1], halfway)
        curve = [*curve, (halfway, before), (halfway + 1, _extended(side[0], side[1], halfway + 1)), *side]
    sizes = tuple(size for size, _ in curve)
    known = sorted(seen)
    launched = tuple(next_larger(known, [seen[other] for other in known], size) for size in sizes) if seen else ()
    rounded = tuple(float(f"{us:.4g}") for _, us in curve)
    table = Table(op=op, ranks=ranks, ctas=ctas, bytes=sizes, us=rounded, launched=launched)
    return TableFit(table, median(error for _, error in sides), note)


def _sides(points: dict[int, tuple[float, float]]) -> list[list[int]]:
    """Sizes, cut where the time falls by more than noise; every side has two sizes or more."""
    sizes = sorted(points)
    cuts = [0]
    for place in range(2, len(sizes) - 1):
        if points[sizes[place]][0] < points[sizes[place - 1]][0] * FALLS and place - cuts[-1] >= LEAST_OF_A_SIDE:
            cuts.append(place)
    return [sizes[first:last] for first, last in pairwise([*cuts, len(sizes)])]


def _extended(one: tuple[int, float], two: tuple[int, float], size: int) -> float:
    """The line through two points, straight in logarithms, at another size."""
    slope = log(two[1] / one[1]) / log(two[0] / one[0])
    return float(two[1] * (size / two[0]) ** slope)


def _curve(points: dict[int, tuple[float, float]]) -> tuple[list[tuple[int, float]], float]:
    """Times that are near the measured ones and do not bend needlessly: least squares of both, each in units of what is
    usual; and the standard error, of the median knot."""
    sizes = sorted({*points, *_between(sorted(points))})
    octaves = np.array([log2(size) for size in sizes])
    weight = np.array([points[size][1] ** -2.0 if size in points else 0.0 for size in sizes])
    log_us = np.log([points[size][0] if size in points else 1.0 for size in sizes])
    bends = _bends(octaves) / USUAL_BEND
    covariance = np.linalg.inv(np.diag(weight) + bends.T @ bends)
    us = np.exp(covariance @ (log_us * weight))
    return list(zip(sizes, map(float, us), strict=True)), float(np.median(np.sqrt(np.diag(covariance))))


def _between(sizes: Sequence[int]) -> list[int]:
    """Powers of two in wide gaps: a straight line in logarithms is too high over a curve that bends, so the least bent
    curve gets knots there too."""
    found = []
    for low, high in pairwise(sizes):
        octave = 1 << low.bit_length()
        while octave * WIDE_GAP < high:
            if octave > low * WIDE_GAP:
                found.append(octave)
            octave *= 2
    return found


def _bends(x: Floats) -> Floats:
    """Rows that take the change of slope at every inner point of a curve."""
    rows = np.zeros((max(0, len(x) - 2), len(x)))
    for i in range(len(x) - 2):
        left, right = x[i + 1] - x[i], x[i + 2] - x[i + 1]
        rows[i, i : i + 3] = (1.0 / left, -1.0 / left - 1.0 / right, 1.0 / right)
    return rows
