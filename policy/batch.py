"""Batches, the batches in flight, and the state that a plan is a function of.

What is made anew at every launch is a named tuple, because frozen dataclasses cost the host several times as much to
make, to change and to hash.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from models.kernel import FunctionVector, Kernel
from models.transformer import BatchShape
from policy.round import Lane, Mark
from traces.request import Request

# Believed times are kept on this grid (microseconds), so that equal situations compare equal.
TICK_US = 1.0 / 1024.0


def on_grid(time_us: float) -> float:
    """The nearest time on the grid. Sums of such times are exact, whatever their order."""
    return round(time_us * 1024.0) * TICK_US


@dataclass(frozen=True, slots=True)
class Batch:
    """Requests that run as one; `vectors[s]` is the function vector of every rank of stage s."""

    batch_id: int
    requests: tuple[Request, ...]
    shape: BatchShape
    vectors: tuple[FunctionVector, ...]
    arrival_us: float
    slot: int = 0
    deadline_us: float = float("inf")

    def end_mark(self, stage: int = 0) -> Mark:
        """Everything of this batch is done on `stage`."""
        return Mark(self.batch_id, len(self.vectors[stage]), 0.0, stage)


class Flight(NamedTuple):
    """A batch in flight and what has been issued of it on stage 0.

    `cursor` is the next kernel; `issued` of `parts` pieces of it have been issued already (0 of 1: none), cut along
    `axis`. `ready_us` is when the work issued so far is believed to end, on the clock of the state. `lane` ran the
    last piece.
    `protected`: its deadline leaves no time for others, so fills must not delay it.
    """

    batch: Batch
    cursor: int = 0
    issued: int = 0
    parts: int = 1
    axis: str = ""
    ready_us: float = 0.0
    lane: Lane | None = None
    protected: bool = False

    @property
    def vector(self) -> FunctionVector:
        """The function vector of stage 0."""
        return self.batch.vectors[0]

    @property
    def mark(self) -> Mark:
        """What will be done when everything issued so far has ended."""
        return Mark(self.batch.batch_id, self.cursor, self.issued / self.parts)


class Busy(NamedTuple):
    """What is believed to occupy a lane until `end_us`: a kernel of the flight at this index (-1: of none in
    flight)."""

    end_us: float = 0.0
    kernel: Kernel | None = None
    flight: int = -1


class State(NamedTuple):
    """What a plan is a function of: flights oldest first, and what the two lanes are believed to be busy with.

    Times are relative: only differences matter. `held` are the marks that earlier rounds left for the host to wait for.
    """

    flights: tuple[Flight, ...] = ()
    compute: Busy = Busy()
    comm: Busy = Busy()
    held: tuple[tuple[Mark, ...], ...] = ()

    @property
    def oldest(self) -> tuple[FunctionVector, ...]:
        """The two oldest batches' vectors: the pair that overlaps most of the time."""
        return tuple(flight.vector for flight in self.flights[:2])
