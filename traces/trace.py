"""A trace: requests in order of arrival, and where they came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from traces.request import Request


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests sorted by arrival, the first at 0 and numbered 0, 1, 2, ...; never empty.

    `num_dropped` counts rows of the source that were left out because the request had failed there.
    """

    requests: tuple[Request, ...]
    source: str
    num_dropped: int = 0

    def arrivals_us(self) -> NDArray[np.float64]:
        """Arrival of each request in microseconds from the first."""
        return np.array([request.arrival_us for request in self.requests], dtype=np.float64)

    def with_arrivals(self, arrivals_us: NDArray[np.float64]) -> Trace:
        """The same requests at other times, which must be sorted; the first moves to 0."""
        return make_trace(arrivals_us, _lengths(self.requests), self.source, self.num_dropped)

    def renumbered(self, requests: Sequence[Request]) -> Trace:
        """A trace of some of these requests, numbered again from 0 and with the first arrival at 0."""
        arrivals_us = np.array([request.arrival_us for request in requests], dtype=np.float64)
        return make_trace(arrivals_us, _lengths(requests), self.source, self.num_dropped)


def _lengths(requests: Sequence[Request]) -> tuple[list[int], list[int]]:
    prompts = [request.num_prompt_tokens for request in requests]
    return prompts, [request.num_output_tokens for request in requests]


def make_trace(
    arrivals_us: NDArray[np.float64],
    lengths: tuple[Sequence[int], Sequence[int]],
    source: str,
    num_dropped: int = 0,
) -> Trace:
    """Put arrivals (us, sorted) and (prompt, output) token counts together; the first arrival moves to 0."""
    if not len(arrivals_us):
        raise ValueError(f"{source}: the trace has no requests")
    assert bool(np.all(np.diff(arrivals_us) >= 0.0)), "arrivals must be sorted"
    shifted = (arrivals_us - arrivals_us[0]).tolist()
    columns = zip(range(len(shifted)), shifted, *lengths, strict=True)
    return Trace(tuple(Request(*column) for column in columns), source, num_dropped)
