"""Lanes: in-order queues of one device. What a lane is made of (a CUDA stream, a thread) only its maker knows."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from policy.round import Lane

Work = Callable[[], None]


class StreamKey(NamedTuple):
    """A physical queue: a lane, and how many SMs are withheld from what runs on it."""

    lane: Lane
    withheld_sms: int = 0


@dataclass(slots=True)
class Clock:
    """Microseconds since the run began, on rank 0's clock. Ranks of one host share the clock that this reads."""

    origin_ns: int = 0

    def now_us(self) -> float:
        """The time of the run."""
        return (time.perf_counter_ns() - self.origin_ns) / 1e3


def random_delays(most_us: float, seed: tuple[int, ...]) -> Iterator[float]:
    """Endless pauses, uniform from 0 to `most_us`."""
    if not most_us:
        return itertools.repeat(0.0)
    rng = np.random.default_rng(seed)
    return (float(rng.uniform(0.0, most_us)) for _ in itertools.count())


class Ticket(Protocol):
    """A piece of work that was put on a queue."""

    @property
    def key(self) -> StreamKey:
        """The queue it is on."""

    @property
    def done(self) -> bool:
        """Whether it is known to have ended; false may only mean that nobody has asked."""


class Lanes(Protocol):
    """The queues of one device.

    `can_capture`: ranges of kernels may be replayed as one graph. `timing`: starts and ends are wanted to be known.
    `spin`: a waiting host may burn its core.
    Work on one key runs in the order it was put there.
    """

    can_capture: bool
    timing: bool
    spin: bool

    def run(self, key: StreamKey, waits: Sequence[Ticket], work: Work) -> Ticket:
        """Put work on a queue, behind what is there and behind the tickets."""

    def synchronize(self, ticket: Ticket) -> None:
        """Block the host, without spinning, until the work has ended."""

    def is_done(self, ticket: Ticket) -> bool:
        """Whether the work has ended; does not wait."""

    def times_us(self, ticket: Ticket) -> tuple[float, float]:
        """When finished work started and ended, on the clock of the run."""

    def release(self, ticket: Ticket) -> None:
        """Nobody will ask for the times of this finished work any more."""

    def begin_run(self, clock: Clock, delay_us: float, seed: tuple[int, ...]) -> None:
        """Times are on this clock from now on, and every piece of work waits up to `delay_us` first, at random."""

    def drain(self) -> None:
        """Wait for everything."""
