"""Summaries of traces and metrics of runs, against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from traces.metrics import metrics
from traces.request import Request
from traces.summary import summarize
from traces.timeline import Completion, Timeline
from traces.trace import make_trace


def test_summary_of_a_small_trace() -> None:
    arrivals_us = np.array([0.0, 1e6, 1.5e6, 1.9e6, 4e6])
    summary = summarize(make_trace(arrivals_us, ([1, 2, 3, 4, 10], [0, 0, 0, 0, 5]), "test", num_dropped=3))
    gaps = [1.0, 0.5, 0.4, 2.1]
    deviation = math.sqrt(sum((gap - 1.0) ** 2 for gap in gaps) / 4)
    assert (summary.num_requests, summary.num_dropped, summary.span_s, summary.rate) == (5, 3, 4.0, 1.0)
    assert summary.cv == pytest.approx(deviation)
    assert summary.peak_per_second == 3
    assert (summary.prompt.mean, summary.prompt.p50, summary.prompt.max) == (4.0, 3.0, 10)
    assert summary.prompt.p90 == pytest.approx(4 + 0.6 * 6)  # rank 0.9 * 4 = 3.6 between the 4th and the 5th
    assert summary.output.p99 == pytest.approx(0.96 * 5)


@pytest.mark.parametrize("num", [1, 4])
def test_all_at_once_has_no_rate_and_no_cv(num: int) -> None:
    summary = summarize(make_trace(np.zeros(num), ([1] * num, [1] * num), "test"))
    assert (summary.rate, summary.span_s, summary.peak_per_second) == (math.inf, 0.0, num)
    assert math.isnan(summary.cv)


def run_of_four() -> Timeline:
    """Latencies 10, 20, 30 and 40 ms; from the first arrival at 1 s to the last finish at 1.1 s."""
    completions = []
    for index, latency_ms in enumerate((40, 10, 30, 20)):
        arrival_us = 1e6 + 20_000.0 * index
        request = Request(index, arrival_us, 100, 5)
        completions.append(Completion(request, 0, arrival_us, arrival_us + 1000.0 * latency_ms))
    last = Completion(Request(4, 1.05e6, 100, 5), 1, 1.05e6, 1.1e6)
    return Timeline(2, [*completions, last], compute_us=120_000.0, communication_us=60_000.0, overlap_us=30_000.0)


def test_metrics_by_hand() -> None:
    found = metrics(run_of_four(), num_requests=8, slo_e2el_ms=30.0)
    assert found == pytest.approx(
        {
            "completed": 5,
            "failed": 3,
            "duration": 0.1,
            "total_input_tokens": 500,
            "total_output_tokens": 0,  # though each request of the trace had 5
            "request_throughput": 50.0,
            "output_throughput": 0.0,
            "total_token_throughput": 5000.0,
            "mean_e2el_ms": 30.0,
            "median_e2el_ms": 30.0,
            "std_e2el_ms": math.sqrt(200.0),
            "p50_e2el_ms": 30.0,
            "p90_e2el_ms": 46.0,
            "p95_e2el_ms": 48.0,
            "p99_e2el_ms": 49.6,
            "comm_share": 0.4,
            "overlap_fraction": 0.5,
            "compute_utilization": 0.6,
            "link_utilization": 0.3,
            "request_goodput": 30.0,
            "slo_attainment": 3 / 8,
        }
    )


def test_without_an_objective_there_is_no_goodput_and_without_communication_no_overlap() -> None:
    timeline = run_of_four()
    timeline.communication_us = timeline.overlap_us = 0.0
    found = metrics(timeline)
    assert found["failed"] == 0
    assert (found["comm_share"], found["overlap_fraction"]) == (0.0, 0.0)
    assert not {"request_goodput", "slo_attainment"} & found.keys()


def test_metrics_refuse_what_cannot_be_measured() -> None:
    with pytest.raises(ValueError, match="no request finished"):
        metrics(Timeline(1))
    with pytest.raises(ValueError, match="5 requests finished but only 2"):
        metrics(run_of_four(), num_requests=2)
    with pytest.raises(ValueError, match="latency objective 0 ms"):
        metrics(run_of_four(), slo_e2el_ms=0.0)
