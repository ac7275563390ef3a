"""A trace in a dozen numbers: how many, how fast, how bursty, how long."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from traces.arrivals import US_PER_S
from traces.trace import Trace


@dataclass(frozen=True, slots=True)
class LengthSummary:
    """Token counts: mean, percentiles (linear interpolation) and maximum."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: int


@dataclass(frozen=True, slots=True)
class TraceSummary:
    """What a trace looks like.

    `rate` is requests per second as one over the mean gap, (count - 1) / span; infinite where all come at once.
    `cv` is standard deviation (of the population) over mean of the gaps: 1 for Poisson, 0 for a metronome,
    NaN where there is no positive gap. `peak_per_second` is the most arrivals in one whole second of the trace.
    """

    num_requests: int
    num_dropped: int
    span_s: float
    rate: float
    cv: float
    peak_per_second: int
    prompt: LengthSummary
    output: LengthSummary


def summarize(trace: Trace) -> TraceSummary:
    """Count, span, rate, burstiness and lengths of a trace."""
    arrivals_s = trace.arrivals_us() / US_PER_S
    gaps = np.diff(arrivals_s)
    span_s = float(arrivals_s[-1] - arrivals_s[0])
    _, per_second = np.unique(np.floor(arrivals_s), return_counts=True)
    return TraceSummary(
        num_requests=len(trace.requests),
        num_dropped=trace.num_dropped,
        span_s=span_s,
        rate=len(gaps) / span_s if span_s > 0.0 else math.inf,
        cv=float(gaps.std() / gaps.mean()) if span_s > 0.0 else math.nan,
        peak_per_second=int(per_second.max()),
        prompt=_summarize([request.num_prompt_tokens for request in trace.requests]),
        output=_summarize([request.num_output_tokens for request in trace.requests]),
    )


def _summarize(lengths: Sequence[int]) -> LengthSummary:
    p50, p90, p99 = np.percentile(lengths, [50, 90, 99]).tolist()
    return LengthSummary(float(np.mean(lengths)), p50, p90, p99, max(lengths))
