"""What ran when: spans, the requests they served, and the timeline that both drivers write."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from traces.request import Request


@dataclass(frozen=True, slots=True)
class Span:
    """One kernel (or fragment) that ran on one stream of one device. Times in microseconds."""

    rank: int
    lane: str
    name: str
    is_communication: bool
    start_us: float
    end_us: float
    batch_id: int
    kernel_index: int
    round_id: int


@dataclass(frozen=True, slots=True)
class Completion:
    """One finished request: when the batch it rode in entered the device and when its result was there."""

    request: Request
    batch_id: int
    admitted_us: float
    finished_us: float

    @property
    def latency_us(self) -> float:
        """End-to-end latency: from arrival to result."""
        return self.finished_us - self.request.arrival_us


@dataclass(slots=True)
class Timeline:
    """The record of a run. `spans` is filled only where asked for; the busy times always are.

    Busy times are microseconds summed over ranks: `compute_us` with at least one compute kernel running,
    `communication_us` likewise, `overlap_us` with both. `num_ranks` is how many ranks they sum over.
    """

    num_ranks: int
    completions: list[Completion] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    start_us: float = 0.0
    end_us: float = 0.0
    compute_us: float = 0.0
    communication_us: float = 0.0
    overlap_us: float = 0.0
    num_kernels: int = 0
    num_batches: int = 0
    num_rounds: int = 0

    def lanes(self) -> Iterator[tuple[int, str]]:
        """The (rank, lane) pairs that have spans, in order."""
        return iter(sorted({(span.rank, span.lane) for span in self.spans}))
