"""Predicted against measured: single points, and the error table's lines that sum them up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np


@dataclass(frozen=True, slots=True)
class Point:
    """One prediction and the measurement it is held against, in one unit. `spread`: of the measurement, in that unit;
    None where nobody recorded it."""

    level: str
    label: str
    measured: float
    predicted: float
    spread: float | None = None

    @property
    def error(self) -> float:
        """Relative: 0.1 is 10 % too much."""
        return self.predicted / self.measured - 1.0


@dataclass(frozen=True, slots=True)
class Target:
    """What an error must not exceed, in per cent (or, for a share, must reach); None: no such target."""

    typical: float | None = None
    worst: float | None = None
    is_share: bool = False

    def words(self) -> str:
        """As the table shows it."""
        if self.is_share:
            return f"≥ {self.typical:g}"
        parts = [f"{value:g}" for value in (self.typical, self.worst) if value is not None]
        return f"≤ {', '.join(parts)}" if parts else ""


NO_TARGET = Target()


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the table. Errors, bias (median signed error) and spread (median) in `unit`; for a share only
    `typical` is there. Numbers that do not exist are None."""

    level: str
    what: str
    count: int
    typical: float | None = None
    p90: float | None = None
    worst: float | None = None
    worst_at: str = ""
    bias: float | None = None
    spread: float | None = None
    target: Target = NO_TARGET
    unit: str = "%"

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None where there is none, or nothing to judge by."""
        if self.typical is None or self.target.typical is None:
            return None
        if self.target.is_share:
            return self.typical >= self.target.typical
        within = self.typical <= self.target.typical
        return within and (self.target.worst is None or self.worst is None or self.worst <= self.target.worst)


def line_of(level: str, what: str, points: Sequence[Point], target: Target = NO_TARGET) -> Line:
    """Sums up points by relative error: mean, 90th percentile and largest absolute error in per cent."""
    if not points:
        return Line(level, what, 0, target=target)
    errors = np.array([100.0 * point.error for point in points])
    absolute = np.abs(errors)
    spreads = [100.0 * point.spread / point.measured for point in points if point.spread is not None]
    worst = int(absolute.argmax())
    return Line(
        level, what, len(points), float(absolute.mean()), float(np.percentile(absolute, 90)), float(absolute[worst]),
        points[worst].label, float(np.median(errors)), median(spreads) if spreads else None, target,
    )  # fmt: skip


def line_of_times(level: str, what: str, points: Sequence[Point]) -> Line:
    """Sums up points whose measured value may be nothing: absolute errors in microseconds."""
    if not points:
        return Line(level, what, 0, unit="us")
    errors = np.array([point.predicted - point.measured for point in points])
    absolute = np.abs(errors)
    spreads = [point.spread for point in points if point.spread is not None]
    worst = int(absolute.argmax())
    return Line(
        level, what, len(points), float(absolute.mean()), float(np.percentile(absolute, 90)), float(absolute[worst]),
        points[worst].label, float(np.median(errors)), median(spreads) if spreads else None, unit="us",
    )  # fmt: skip


def line_of_share(level: str, what: str, hits: int, count: int, target: Target = NO_TARGET) -> Line:
    """A share of cells in per cent."""
    return Line(level, what, count, 100.0 * hits / count if count else None, target=target)
