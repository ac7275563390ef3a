"""Timing for a survey: samples with their spread, and how they are taken where there is no GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

Body = Callable[[], None]
REPETITIONS = 5


@dataclass(frozen=True, slots=True, order=True)
class Sample:
    """The median of several timings, their interquartile range, and how many there were; microseconds or factors."""

    value: float
    spread: float
    repetitions: int


def sample_of(timings: Sequence[float]) -> Sample:
    """A sample of these timings."""
    low, middle, high = np.percentile(np.asarray(timings), (25.0, 50.0, 75.0))
    return Sample(float(middle), float(high - low), len(timings))


@dataclass(frozen=True, slots=True)
class Row:
    """What was found at a point: samples by name, and what describes how it ran."""

    samples: dict[str, Sample]
    notes: dict[str, str] | None = None


class Bench(Protocol):
    """Times work on one kind of device. What is timed together with other ranks is timed equally often by all.

    `refused`: partitions on whose streams nothing can be captured, and why; their kernels are timed one by one.
    """

    refused: dict[int, str]

    def compute(self, withheld_sms: int, calls: Sequence[Body], estimate_us: float) -> Sample:
        """One call of a compute kernel, calls following one another in turn; `estimate_us` is about how long one
        takes."""

    def comm(self, call: Body, count: int) -> Sample:
        """One call of a collective, `count` of them back to back."""


class CpuBench:
    """Calls are made in this thread and timed one by one: a call's own cost is in the time."""

    def __init__(self) -> None:
        self.refused: dict[int, str] = {}

    def compute(self, withheld_sms: int, calls: Sequence[Body], estimate_us: float) -> Sample:
        """Each of the first few calls."""
        calls[0]()
        return sample_of([timed_us(calls[number % len(calls)]) for number in range(REPETITIONS)])

    def comm(self, call: Body, count: int) -> Sample:
        """The first call brings the ranks together and is not counted."""
        call()
        return sample_of([timed_us(call) for _ in range(REPETITIONS)])


def timed_us(call: Callable[[], object]) -> float:
    """Host microseconds of one call."""
    started = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - started) / 1e3
