"""Synthetic traces: an arrival process and two length distributions, drawn from one seed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from traces.arrivals import arrival_times
from traces.lengths import Lengths, Uniform
from traces.trace import Trace, make_trace

PROMPTS = Uniform(16, 128)
NO_OUTPUT = Uniform(0, 0)


@dataclass(frozen=True, slots=True)
class SyntheticSpec:
    """What to draw. Rates are requests per second; lengths are tokens.

    The defaults are small and ours: prompts of 16 to 128 tokens as in Liger's experiments, no output tokens.
    """

    num_requests: int = 200
    request_rate: float = 20.0
    burstiness: float = 1.0
    prompt_lengths: Lengths = PROMPTS
    output_lengths: Lengths = NO_OUTPUT


def synthetic_trace(spec: SyntheticSpec, seed: int = 0) -> Trace:
    """Draw a trace; the same seed gives the same trace.

    Arrivals, prompts and outputs have a random stream each, so that two rates of a sweep see the same requests.
    """
    if seed < 0:
        raise ValueError(f"seed {seed} is negative; give 0 or more")
    arrivals, prompts, outputs = (np.random.default_rng([seed, stream]) for stream in range(3))
    num = spec.num_requests
    arrivals_us = arrival_times(num, spec.request_rate, spec.burstiness, arrivals)
    lengths = spec.prompt_lengths.sample(num, prompts).tolist(), spec.output_lengths.sample(num, outputs).tolist()
    return make_trace(arrivals_us, lengths, f"synthetic (seed {seed})")
