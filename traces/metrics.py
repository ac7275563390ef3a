"""Metrics of a run, under the names that `vllm bench serve` writes in its result file where it has them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from traces.arrivals import US_PER_S
from traces.timeline import Timeline

PERCENTILES = (50, 90, 95, 99)


def metrics(timeline: Timeline, num_requests: int | None = None, slo_e2el_ms: float | None = None) -> dict[str, float]:
    """Flat numbers about one run. Latencies are ms, duration s, throughputs per second, the rest fractions.

    - `duration`: from the first arrival to the last finish, over the requests that finished.
    - `total_*_tokens` and their throughputs: what was processed: prompts; a forward pass generates no output.
    - `failed`: of `num_requests` submitted, those that never finished (0 where the number is not given).
    - `*_e2el_ms`: from arrival to result; standard deviation of the population, linear percentiles.
    - `comm_share`: communication_us / (compute_us + communication_us - overlap_us), the share of the time in
      which a rank was busy at all during which communication ran (hidden or not).
    - `overlap_fraction`: overlap_us / communication_us, the share of communication hidden behind computation.
    - `compute_utilization`, `link_utilization`: compute_us and communication_us / (num_ranks * duration).
    - `request_goodput`, `slo_attainment` (with an SLO): finished within it, per second and per submitted request.

    A fraction of nothing (no communication at all) is 0.
    """
    latencies_ms = np.array([completion.latency_us for completion in timeline.completions]) / 1e3
    if not latencies_ms.size:
        raise ValueError("no request finished, so there is nothing to measure")
    duration_s = _duration_s(timeline)
    result = _counts(timeline, num_requests, duration_s) | _latencies(latencies_ms)
    result |= _utilizations(timeline, duration_s)
    if slo_e2el_ms is not None:
        if not slo_e2el_ms > 0.0:
            raise ValueError(f"latency objective {slo_e2el_ms:g} ms is not possible; give milliseconds above 0")
        within = int(np.count_nonzero(latencies_ms <= slo_e2el_ms))
        result["request_goodput"] = _ratio(within, duration_s)
        result["slo_attainment"] = within / (result["completed"] + result["failed"])
    return result


def _duration_s(timeline: Timeline) -> float:
    first_us = min(completion.request.arrival_us for completion in timeline.completions)
    last_us = max(completion.finished_us for completion in timeline.completions)
    return (last_us - first_us) / US_PER_S


def _counts(timeline: Timeline, num_requests: int | None, duration_s: float) -> dict[str, float]:
    completed = len(timeline.completions)
    submitted = completed if num_requests is None else num_requests
    if submitted < completed:
        raise ValueError(f"{completed} requests finished but only {submitted} were submitted")
    input_tokens = sum(completion.request.num_prompt_tokens for completion in timeline.completions)
    # One forward pass answers a request, whatever its trace says of outputs: no token is generated.
    output_tokens = 0
    return {
        "completed": completed,
        "failed": submitted - completed,
        "duration": duration_s,
        "total_input_tokens": input_tokens,
        "total_output_tokens": output_tokens,
        "request_throughput": _ratio(completed, duration_s),
        "output_throughput": _ratio(output_tokens, duration_s),
        "total_token_throughput": _ratio(input_tokens + output_tokens, duration_s),
    }


def _latencies(latencies_ms: NDArray[np.float64]) -> dict[str, float]:
    result = {
        "mean_e2el_ms": float(latencies_ms.mean()),
        "median_e2el_ms": float(np.median(latencies_ms)),
        "std_e2el_ms": float(latencies_ms.std()),
    }
    values = np.percentile(latencies_ms, PERCENTILES).tolist()
    return result | {f"p{p}_e2el_ms": value for p, value in zip(PERCENTILES, values, strict=True)}


def _utilizations(timeline: Timeline, duration_s: float) -> dict[str, float]:
    busy_us = timeline.compute_us + timeline.communication_us - timeline.overlap_us
    rank_us = timeline.num_ranks * duration_s * US_PER_S
    return {
        "comm_share": _ratio(timeline.communication_us, busy_us),
        "overlap_fraction": _ratio(timeline.overlap_us, timeline.communication_us),
        "compute_utilization": _ratio(timeline.compute_us, rank_us),
        "link_utilization": _ratio(timeline.communication_us, rank_us),
    }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0.0 else 0.0
