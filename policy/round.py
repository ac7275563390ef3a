"""The language that both drivers interpret: launches on lanes, waits for marks, and where the host synchronises."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

from models.kernel import Fragment


class Lane(StrEnum):
    """A stream of a device. FILL has a lower priority than COMPUTE; COMM has the highest."""

    COMPUTE = "compute"
    FILL = "fill"
    COMM = "comm"

    # A lane is part of every key; an Enum hashes its name in Python.
    __hash__ = str.__hash__


class Mark(NamedTuple):
    """A point in the life of a batch on one stage: all kernels before `kernel`, and `part` of `kernel` itself, are
    done.

    Marks of one batch and stage are ordered; an event on a lane is named by the mark that it stands for.
    """

    batch_id: int
    kernel: int
    part: float = 0.0
    stage: int = 0


class Launch(NamedTuple):
    """Kernels [first, last) of a batch, issued in order on one lane; or one fragment of one kernel.

    Every launch records its mark when it ends, and waits for `waits` before it starts. `captured`: the driver may
    replay the whole range as one graph, at the host cost of one launch. `withheld_sms` SMs are kept free of its CTAs;
    `max_ctas` bounds the CTAs of a collective (0: the library's default).
    """

    batch_id: int
    first: int
    last: int
    lane: Lane
    waits: tuple[Mark, ...] = ()
    fragment: Fragment | None = None
    stage: int = 0
    captured: bool = False
    withheld_sms: int = 0
    max_ctas: int = 0

    @property
    def mark(self) -> Mark:
        """What is done once this launch has ended."""
        part = self.fragment
        if part is None or part.stop == part.of:
            return Mark(self.batch_id, self.last, 0.0, self.stage)
        return Mark(self.batch_id, self.first, part.stop / part.of, self.stage)

    @property
    def begins(self) -> Mark:
        """What must be done before this launch may start."""
        part = self.fragment
        return Mark(self.batch_id, self.first, part.start / part.of if part else 0.0, self.stage)


class Round(NamedTuple):
    """Launches in the order in which every rank's host issues them, and the marks that the host then waits for.

    Each rank issues the launches of its own stage and waits for the marks of its own stage.
    """

    round_id: int
    launches: tuple[Launch, ...]
    synchronize: tuple[Mark, ...] = ()
