"""What an importer found: samples, what the files say of the machine, and what was left out and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from traces.measurement import Coordinates, Measurement, point_key

MS = 1e3
"""Microseconds in a millisecond: the unit of the public tables."""


@dataclass(frozen=True, slots=True)
class Request:
    """What the user asked of an importer beside the files; each format looks at its own.

    `source`: the one version of a table that holds several. `op`: the operation of output that does not name it.
    `priority`: whether communication ran on a stream of higher priority (1) or not (0), which a trace does not tell.
    """

    source: str = ""
    op: str = ""
    priority: int | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """One measured point as a file has it. `spread` is empty where the file does not tell it."""

    what: str
    at: Coordinates
    values: dict[str, float]
    repetitions: int = 1
    spread: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class Found:
    """The samples of all files, and `about`: what the files say of themselves, by the names of a folder's conditions.

    `notes`: how the numbers were taken, by kind of row. `left_out`: how many entries were not used, by reason.
    """

    samples: list[Sample] = field(default_factory=list)
    about: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)

    def say(self, name: str, value: str, where: str) -> None:
        """Note what a file says of the machine. Raises ValueError where two places disagree."""
        if value and self.about.setdefault(name, value) != value:
            raise ValueError(
                f"{where}: {name} is {value!r}, but {self.about[name]!r} before; import one machine at a time"
            )

    def also(self, name: str, value: str) -> None:
        """Note one of several values that may stand beside each other, such as element types."""
        known = self.about.get(name, "")
        if value and value not in known.split("+"):
            self.about[name] = "+".join(filter(None, (known, value)))


def repeats_of(samples: list[Sample]) -> list[Measurement]:
    """One row per point: medians over repeated samples, in the order of their first appearance.

    The spread is the interquartile range of the samples, or what they tell of their own if that is more; it is 0 where
    neither is known, which is a single value without a spread.
    """
    points: dict[str, list[Sample]] = {}
    for sample in samples:
        points.setdefault(point_key(sample.what, sample.at), []).append(sample)
    return [_joined(repeats) for repeats in points.values()]


def _joined(repeats: list[Sample]) -> Measurement:
    first = repeats[0]
    values, spread = {}, {}
    for name in first.values:
        found = np.array([sample.values[name] for sample in repeats])
        low, middle, high = np.percentile(found, (25, 50, 75))
        own = float(np.median([sample.spread.get(name, 0.0) for sample in repeats]))
        values[name], spread[name] = float(middle), max(float(high - low), own)
    return Measurement(first.what, first.at, values, spread, sum(sample.repetitions for sample in repeats))
