"""Making another trace from a trace: faster, burstier, shorter, spread. All keep the order of the requests."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from traces.arrivals import US_PER_S
from traces.trace import Trace

# Largest power tried on the gaps; at this point the longest gap alone makes up practically the whole trace.
MAX_POWER = 1024.0


def scale_rate(trace: Trace, factor: float) -> Trace:
    """Make requests come `factor` times as fast: every gap is divided by it, so the CV stays."""
    _check_factor("rate scale", factor)
    return trace.with_arrivals(trace.arrivals_us() / factor)


def scale_burstiness(trace: Trace, factor: float) -> Trace:
    """Multiply the coefficient of variation (CV) of the gaps by `factor` and keep the mean rate.

    Every gap is raised to one power p and all are rescaled so that they sum to the old span. CV grows with p, so
    bisection finds it. No randomness: long gaps stay long, quiet hours stay where they were. Requests that came
    at the same instant stay together, which bounds the CV from below; one gap holding the whole span, from above.
    """
    _check_factor("burstiness scale", factor)
    arrivals_us = trace.arrivals_us()
    gaps = np.diff(arrivals_us)
    if factor == 1.0:
        return trace
    if len(gaps) < 2 or gaps.min() == gaps.max():
        raise ValueError(f"{trace.source}: all gaps between requests are equal; there is no burstiness to scale")
    power = _power_for(trace.source, gaps / gaps.max(), factor)
    shaped = _raised(gaps / gaps.max(), power)
    shaped *= arrivals_us[-1] / shaped.sum()
    return trace.with_arrivals(np.concatenate(([0.0], np.cumsum(shaped))))


def _raised(gaps: NDArray[np.float64], power: float) -> NDArray[np.float64]:
    """Gaps to a power; a zero gap stays zero even for power 0."""
    raised: NDArray[np.float64] = np.where(gaps > 0.0, gaps**power, 0.0)
    return raised


def _cv(gaps: NDArray[np.float64]) -> float:
    return float(gaps.std() / gaps.mean())


def _power_for(source: str, gaps: NDArray[np.float64], factor: float) -> float:
    """The power that multiplies the CV of `gaps` (largest 1) by `factor`."""
    target = _cv(gaps) * factor
    low, high = (0.0, 1.0) if factor < 1.0 else (1.0, MAX_POWER)
    lowest, highest = _cv(_raised(gaps, 0.0)), _cv(_raised(gaps, MAX_POWER))
    if not lowest <= target <= highest:
        raise ValueError(
            f"{source}: burstiness scale {factor:g} asks for a CV of {target:.4g}; "
            f"these arrivals can be given {lowest:.4g} to {highest:.4g}"
        )
    for _ in range(100):  # more halvings than a float has bits
        middle = 0.5 * (low + high)
        low, high = (middle, high) if _cv(_raised(gaps, middle)) < target else (low, middle)
    return 0.5 * (low + high)


def window(trace: Trace, start_s: float = 0.0, duration_s: float = math.inf) -> Trace:
    """Keep requests that arrive in [start, start + duration) seconds; the first that is kept moves to 0."""
    if not (start_s >= 0.0 and math.isfinite(start_s)):
        raise ValueError(f"window start {start_s:g} s is not possible; give 0 or more seconds")
    if not duration_s > 0.0:
        raise ValueError(f"window duration {duration_s:g} s is not possible; give seconds above 0")
    start_us, stop_us = start_s * US_PER_S, (start_s + duration_s) * US_PER_S
    kept = [request for request in trace.requests if start_us <= request.arrival_us < stop_us]
    if not kept:
        last_s = trace.requests[-1].arrival_us / US_PER_S
        raise ValueError(
            f"{trace.source}: no request arrives from {start_s:g} s to {start_s + duration_s:g} s; "
            f"the trace runs from 0 to {last_s:.3f} s"
        )
    return trace.renumbered(kept)


def limit(trace: Trace, num: int) -> Trace:
    """Keep the first `num` requests, or all where there are fewer."""
    if num < 1:
        raise ValueError(f"number of requests {num} is too small; give 1 or more")
    return replace(trace, requests=trace.requests[:num])


def clip_lengths(trace: Trace, max_prompt_tokens: int, max_output_tokens: int | None = None) -> tuple[Trace, int]:
    """Shorten prompts and outputs that are longer than the maxima; also say how many requests were shortened."""
    if max_prompt_tokens < 1:
        raise ValueError(f"maximum prompt length {max_prompt_tokens} is too small; give 1 or more")
    if max_output_tokens is not None and max_output_tokens < 0:
        raise ValueError(f"maximum output length {max_output_tokens} is too small; give 0 or more")
    clipped = []
    for request in trace.requests:
        prompt, output = min(request.num_prompt_tokens, max_prompt_tokens), request.num_output_tokens
        output = output if max_output_tokens is None else min(output, max_output_tokens)
        clipped.append(replace(request, num_prompt_tokens=prompt, num_output_tokens=output))
    changed = sum(new != old for new, old in zip(clipped, trace.requests, strict=True))
    return replace(trace, requests=tuple(clipped)), changed


def spread_buckets(trace: Trace, rng: np.random.Generator, bucket_s: float = 3.0) -> Trace:
    """Spread requests that carry the same time stamp evenly at random over their bucket, keeping their order.

    For traces whose stamps were rounded to a grid (Mooncake: 3 s). A bucket ends at the next stamp that differs,
    or `bucket_s` after its own where nothing came for longer than that.
    """
    if not (bucket_s > 0.0 and math.isfinite(bucket_s)):
        raise ValueError(f"bucket of {bucket_s:g} s is not possible; give seconds above 0")
    stamps, bucket = np.unique(trace.arrivals_us(), return_inverse=True)
    widths = np.minimum(np.diff(stamps, append=math.inf), bucket_s * US_PER_S)
    spread = stamps[bucket] + rng.random(len(bucket)) * widths[bucket]
    # Buckets are disjoint and in order, so one sort of all times sorts within each bucket.
    return trace.with_arrivals(np.sort(spread))


def _check_factor(name: str, factor: float) -> None:
    if not 1e-6 <= factor <= 1e6:
        raise ValueError(f"{name} {factor:g} is not possible; give a factor from 0.000001 to 1000000")
