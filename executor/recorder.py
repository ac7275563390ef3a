"""From finished work to spans, busy times and completions; and how long the device waited for its host."""

from __future__ import annotations

import json
from array import array
from dataclasses import dataclass, field
from typing import NamedTuple, TextIO

import numpy as np
from numpy.typing import NDArray

from executor.lanes import Lanes, Ticket
from executor.results import Busy
from policy.batch import Batch
from traces.timeline import Completion, Span


class Piece(NamedTuple):
    """One piece of work as it was issued: what it is, and its ticket. `opaque`: a graph with collectives inside."""

    ticket: Ticket
    name: str
    lane: str
    is_communication: bool
    opaque: bool
    batch_id: int
    kernel_index: int
    round_id: int
    num_kernels: int
    issued_us: float


@dataclass(slots=True)
class Recorder:
    """What one rank keeps of a run: four numbers a piece, and its span where asked for."""

    rank: int
    record: bool
    timing: bool
    completions_file: TextIO | None = None
    spans: list[Span] = field(default_factory=list)
    completions: list[Completion] = field(default_factory=list)
    num_kernels: int = 0
    opaque: bool = False
    _columns: tuple[array[float], array[float], array[float], array[float]] = field(
        default_factory=lambda: (array("d"), array("d"), array("d"), array("d"))
    )

    def keep(self, piece: Piece, lanes: Lanes) -> None:
        """A finished piece."""
        self.num_kernels += piece.num_kernels
        if not self.timing:
            return
        start_us, end_us = lanes.times_us(piece.ticket)
        self.opaque |= piece.opaque
        row = (start_us, end_us, float(piece.is_communication), piece.issued_us)
        for column, value in zip(self._columns, row, strict=True):
            column.append(value)
        if self.record:
            self.spans.append(Span(self.rank, piece.lane, piece.name, piece.is_communication, start_us, end_us,
                                   piece.batch_id, piece.kernel_index, piece.round_id))  # fmt: skip

    def complete(self, batch: Batch, admitted_us: float, finished_us: float) -> None:
        """A batch is answered; its requests are written down at once, so that a run that fails later keeps them."""
        for request in batch.requests:
            completion = Completion(request, batch.batch_id, admitted_us, finished_us)
            self.completions.append(completion)
            if self.completions_file is not None:
                row = {"request_id": request.request_id, "batch_id": batch.batch_id, "arrival_us": request.arrival_us,
                       "admitted_us": admitted_us, "finished_us": finished_us}  # fmt: skip
                self.completions_file.write(json.dumps(row) + "\n")
        if self.completions_file is not None:
            self.completions_file.flush()

    def busy(self, entered_us: NDArray[np.float64]) -> Busy:
        """Totals. `entered_us`: when a batch entered an idle device; no host is late before that."""
        starts, ends, comm, issued = (np.array(column) for column in self._columns)
        is_comm = comm > 0.0
        compute_us = union_us(starts[~is_comm], ends[~is_comm])
        comm_us = union_us(starts[is_comm], ends[is_comm])
        overlap = compute_us + comm_us - union_us(starts, ends)
        late = host_bound_us(starts, ends, issued, entered_us)
        return Busy(compute_us, comm_us, max(0.0, overlap), late, self.opaque, self.num_kernels)


def union_us(starts: NDArray[np.float64], ends: NDArray[np.float64]) -> float:
    """Length of the union of intervals."""
    if not len(starts):
        return 0.0
    order = np.argsort(starts, kind="stable")
    starts, ends = starts[order], ends[order]
    reach = np.maximum.accumulate(ends)
    covered = np.concatenate(([starts[0]], reach[:-1]))
    return float(np.maximum(reach - np.maximum(starts, covered), 0.0).sum())


def host_bound_us(
    starts: NDArray[np.float64], ends: NDArray[np.float64], issued: NDArray[np.float64], entered: NDArray[np.float64]
) -> float:
    """Time in which nothing ran because the piece that ran next had not been issued yet.

    A gap counts from its start (or from when a batch last entered an idle device, if that was later) until the issue.
    """
    if len(starts) < 2:
        return 0.0
    order = np.argsort(starts, kind="stable")
    starts, ends, issued = starts[order], ends[order], issued[order]
    reach = np.maximum.accumulate(ends)[:-1]
    gap_start, gap_end = reach, starts[1:]
    if len(entered):
        entered = np.sort(entered)
        before = np.searchsorted(entered, gap_end, side="right") - 1
        gap_start = np.where(before >= 0, np.maximum(gap_start, entered[np.maximum(before, 0)]), gap_start)
    late_until = np.minimum(issued[1:], gap_end)
    return float(np.maximum(late_until - gap_start, 0.0).sum())
