"""Arrival processes have the rate and the burstiness they were asked for."""

from __future__ import annotations

import math

import numpy as np
import pytest

from traces.arrivals import arrival_times, constant, gamma, poisson
from traces.lengths import Uniform
from traces.synthetic import SyntheticSpec, synthetic_trace


def test_constant_rate_is_a_metronome() -> None:
    assert constant(5, 4.0).tolist() == [0.0, 250_000.0, 500_000.0, 750_000.0, 1_000_000.0]


@pytest.mark.parametrize("shape", [0.25, 1.0, 4.0])
def test_gap_statistics_match_the_gamma_distribution(shape: float) -> None:
    num, rate = 200_001, 10.0
    gaps = np.diff(arrival_times(num, rate, shape, np.random.default_rng(1)))
    # The standard error of the mean is CV / sqrt(n) of it; five of them for a seeded draw.
    cv = 1.0 / math.sqrt(shape)
    assert gaps.mean() == pytest.approx(1e5, rel=5 * cv / math.sqrt(num))
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.02)
    third_moment = ((gaps - gaps.mean()) ** 3).mean() / gaps.std() ** 3
    assert third_moment == pytest.approx(2.0 / math.sqrt(shape), rel=0.1)


def test_poisson_is_gamma_of_shape_one_and_counts_vary_as_much_as_their_mean() -> None:
    arrivals = poisson(100_000, 50.0, np.random.default_rng(7))
    assert np.array_equal(arrivals, gamma(100_000, 50.0, 1.0, np.random.default_rng(7)))
    whole_seconds = int(arrivals[-1] // 1e6)
    counts = np.bincount((arrivals // 1e6).astype(int))[:whole_seconds]
    assert counts.var() / counts.mean() == pytest.approx(1.0, abs=0.12)


def test_infinite_rate_puts_all_requests_at_zero() -> None:
    assert not arrival_times(10, math.inf, 0.5, np.random.default_rng(0)).any()
    assert not constant(10, math.inf).any()


def test_rates_of_a_sweep_stretch_one_pattern() -> None:
    slow = arrival_times(100, 1.0, 0.5, np.random.default_rng(3))
    fast = arrival_times(100, 8.0, 0.5, np.random.default_rng(3))
    assert np.allclose(slow, 8.0 * fast, rtol=1e-12)


@pytest.mark.parametrize(
    ("num", "rate", "burstiness", "words"),
    [
        (0, 1.0, 1.0, "number of requests 0"),
        (5, 0.0, 1.0, "request rate 0 "),
        (5, -2.0, 1.0, "request rate -2 "),
        (5, math.nan, 1.0, "request rate nan"),
        (5, 1.0, 0.0, "burstiness 0 "),
        (5, 1.0, math.nan, "burstiness nan"),
    ],
)
def test_impossible_processes_are_refused(num: int, rate: float, burstiness: float, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        arrival_times(num, rate, burstiness, np.random.default_rng(0))


def test_an_infinite_shape_is_a_metronome() -> None:
    rng = np.random.default_rng(0)
    assert arrival_times(4, 10.0, math.inf, rng).tolist() == [0.0, 1e5, 2e5, 3e5]
    assert arrival_times(4, 10.0, 1e12, rng) == pytest.approx([0.0, 1e5, 2e5, 3e5], rel=1e-4)


def test_synthetic_trace_repeats_with_its_seed_only() -> None:
    spec = SyntheticSpec(num_requests=50, output_lengths=Uniform(1, 9))
    assert synthetic_trace(spec, 4) == synthetic_trace(spec, 4)
    assert synthetic_trace(spec, 4).requests != synthetic_trace(spec, 5).requests
    with pytest.raises(ValueError, match="seed -1"):
        synthetic_trace(spec, -1)


def test_synthetic_trace_keeps_its_requests_when_the_rate_changes() -> None:
    slow = synthetic_trace(SyntheticSpec(request_rate=1.0))
    fast = synthetic_trace(SyntheticSpec(request_rate=9.0, burstiness=0.3))
    assert [r.num_prompt_tokens for r in slow.requests] == [r.num_prompt_tokens for r in fast.requests]
    assert {r.num_output_tokens for r in slow.requests} == {0}
    assert [r.request_id for r in slow.requests] == list(range(200))
