"""When requests come: arrival times in microseconds, the first at 0, from a rate and a burstiness."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

US_PER_S = 1e6
# One request in eleven days, a CV of 1000: below this only slips of the pen, and sums of gaps that overflow.
SMALLEST = 1e-6


def constant(num: int, rate: float) -> NDArray[np.float64]:
    """`num` arrivals with the same gap, 1 / `rate` seconds; an infinite rate puts all at 0."""
    _check(num, rate)
    return np.arange(num, dtype=np.float64) * (US_PER_S / rate)


def gamma(num: int, rate: float, burstiness: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """`num` arrivals with gamma-distributed gaps of mean 1 / `rate` seconds and shape `burstiness`.

    As in `vllm bench serve`: 1 is Poisson, below 1 burstier, above 1 more even, inf a metronome; the gaps' CV
    is 1 / sqrt(burstiness). The draws depend on shape and seed only, so a sweep over rates stretches one pattern.
    """
    _check(num, rate)
    if burstiness == math.inf:
        return constant(num, rate)
    if not burstiness >= SMALLEST:
        raise ValueError(
            f"burstiness {burstiness:g} is not possible; give a gamma shape of {SMALLEST:g} (1: Poisson) to inf"
        )
    gaps = rng.standard_gamma(burstiness, size=num - 1) / burstiness
    return np.concatenate(([0.0], np.cumsum(gaps))) * (US_PER_S / rate)


def poisson(num: int, rate: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """`num` arrivals of a Poisson process of `rate` requests per second."""
    return gamma(num, rate, 1.0, rng)


def arrival_times(num: int, rate: float, burstiness: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Arrivals as `--request-rate` and `--burstiness` describe them; an infinite rate puts all at 0."""
    return gamma(num, rate, burstiness, rng)


def _check(num: int, rate: float) -> None:
    if num < 1:
        raise ValueError(f"number of requests {num} is too small; give 1 or more")
    if not rate >= SMALLEST:
        raise ValueError(
            f"request rate {rate:g} is not possible; give {SMALLEST:g} or more requests per second, or inf"
        )
