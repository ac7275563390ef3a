"""Transforms change what they say and nothing else."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from traces.arrivals import arrival_times
from traces.summary import summarize
from traces.synthetic import SyntheticSpec, synthetic_trace
from traces.trace import Trace, make_trace
from traces.transform import clip_lengths, limit, scale_burstiness, scale_rate, spread_buckets, window

gaps_us = st.lists(st.floats(0.0, 1e9), min_size=0, max_size=30)
exact = settings(derandomize=True, deadline=None, max_examples=60)


def trace_of(gaps: list[float]) -> Trace:
    """A trace with these gaps; prompt lengths 1, 2, 3, ... tell requests apart."""
    arrivals = np.concatenate(([0.0], np.cumsum(gaps)))
    return make_trace(arrivals, (range(1, len(arrivals) + 1), [0] * len(arrivals)), "test")


def names(trace: Trace) -> list[int]:
    """The prompt lengths, which name the requests of `trace_of`."""
    return [request.num_prompt_tokens for request in trace.requests]


@exact
@given(gaps_us, st.floats(0.01, 100.0))
def test_scale_rate_divides_times_and_keeps_everything_else(gaps: list[float], factor: float) -> None:
    trace = trace_of(gaps)
    scaled = scale_rate(trace, factor)
    assert np.allclose(scaled.arrivals_us() * factor, trace.arrivals_us(), rtol=1e-12)
    assert names(scaled) == names(trace)


@exact
@given(st.floats(0.3, 3.0), st.floats(0.3, 3.0), st.integers(0, 5))
def test_scale_burstiness_multiplies_the_cv_and_keeps_rate_and_order(shape: float, factor: float, seed: int) -> None:
    arrivals = arrival_times(400, 10.0, shape, np.random.default_rng(seed))
    trace = make_trace(arrivals, (range(1, 401), [1] * 400), "test")
    scaled = scale_burstiness(trace, factor)
    before, after = summarize(trace), summarize(scaled)
    assert after.cv == pytest.approx(before.cv * factor, rel=1e-6)
    assert after.rate == pytest.approx(before.rate, rel=1e-9)
    assert names(scaled) == names(trace)
    old_order = np.argsort(np.diff(trace.arrivals_us()), kind="stable")
    assert np.all(np.diff(np.diff(scaled.arrivals_us())[old_order]) >= -1e-3)  # long gaps stay the long ones


def test_burstiness_out_of_reach_names_the_range() -> None:
    half_together = trace_of([0.0, 10.0] * 50)  # CV is 1 exactly, and only the zero gaps make it
    with pytest.raises(ValueError, match=r"asks for a CV of 0\.5; these arrivals can be given 1 to 1"):
        scale_burstiness(half_together, 0.5)
    with pytest.raises(ValueError, match="all gaps between requests are equal"):
        scale_burstiness(trace_of([5.0] * 9), 2.0)
    with pytest.raises(ValueError, match="all gaps"):
        scale_burstiness(trace_of([]), 2.0)


@exact
@given(gaps_us, st.floats(0.0, 2e4), st.floats(0.001, 2e4))
def test_window_keeps_exactly_what_arrives_inside(gaps: list[float], start_s: float, duration_s: float) -> None:
    trace = trace_of(gaps)
    inside = [r for r in trace.requests if start_s * 1e6 <= r.arrival_us < (start_s + duration_s) * 1e6]
    if not inside:
        with pytest.raises(ValueError, match="no request arrives from"):
            window(trace, start_s, duration_s)
        return
    cut = window(trace, start_s, duration_s)
    assert names(cut) == [r.num_prompt_tokens for r in inside]
    assert [r.request_id for r in cut.requests] == list(range(len(inside)))
    assert cut.requests[0].arrival_us == 0.0
    expected = [r.arrival_us - inside[0].arrival_us for r in inside]
    assert cut.arrivals_us().tolist() == expected


def test_whole_window_and_adjacent_windows() -> None:
    trace = synthetic_trace(SyntheticSpec(num_requests=100))
    assert window(trace) == trace
    middle_s = trace.requests[40].arrival_us / 1e6  # the request on the border belongs to the second window
    assert len(window(trace, 0.0, middle_s).requests) == 40
    assert len(window(trace, middle_s).requests) == 60


@exact
@given(gaps_us, st.integers(1, 40))
def test_limit_keeps_the_first(gaps: list[float], num: int) -> None:
    trace = trace_of(gaps)
    assert limit(trace, num).requests == trace.requests[:num]


@exact
@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 50)), min_size=1), st.integers(1, 60), st.integers(0, 60))
def test_clip_shortens_and_counts(lengths: list[tuple[int, int]], most_in: int, most_out: int) -> None:
    prompts, outputs = [p for p, _ in lengths], [o for _, o in lengths]
    trace = make_trace(np.zeros(len(lengths)), (prompts, outputs), "test")
    clipped, changed = clip_lengths(trace, most_in, most_out)
    found = [(r.num_prompt_tokens, r.num_output_tokens) for r in clipped.requests]
    assert found == [(min(p, most_in), min(o, most_out)) for p, o in lengths]
    assert changed == sum(p > most_in or o > most_out for p, o in lengths)
    assert [r.num_output_tokens for r in clip_lengths(trace, most_in)[0].requests] == outputs


@exact
@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.floats(0.1, 5.0))
def test_spread_keeps_each_request_in_its_bucket(steps: list[int], bucket_s: float) -> None:
    trace = trace_of([step * 1e6 for step in steps])
    spread = spread_buckets(trace, np.random.default_rng(0), bucket_s)
    assert names(spread) == names(trace)
    shift = np.diff(spread.arrivals_us() - trace.arrivals_us())
    assert np.all(np.abs(shift) <= bucket_s * 1e6 + 1e-3)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_impossible_numbers_are_refused(value: float) -> None:
    trace = trace_of([1.0, 2.0])
    with pytest.raises(ValueError, match="rate scale"):
        scale_rate(trace, value)
    with pytest.raises(ValueError, match="burstiness scale"):
        scale_burstiness(trace, value)
    with pytest.raises(ValueError, match="bucket"):
        spread_buckets(trace, np.random.default_rng(0), value)
    if value:
        with pytest.raises(ValueError, match="window start"):
            window(trace, value)
    if value < math.inf or math.isnan(value):
        with pytest.raises(ValueError, match="window duration"):
            window(trace, 0.0, value)


def test_impossible_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="number of requests 0"):
        limit(trace_of([]), 0)
    with pytest.raises(ValueError, match="maximum prompt length 0"):
        clip_lengths(trace_of([]), 0)
    with pytest.raises(ValueError, match="maximum output length -1"):
        clip_lengths(trace_of([]), 1, -1)
