"""Published traces give their published statistics."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from traces.lengths import read_lengths
from traces.reader import read_trace
from traces.summary import summarize

# Requests, span s, rate /s, CV, peak per second; then mean, p50, p90, p99, max of prompts and of outputs.
KNOWN = {
    "AzureLLMInferenceTrace_conv.csv.gz": (
        (19366, 3501.7, 5.530, 1.094, 16),
        (1154.7, 1020, 2734.5, 4142, 14050),
        (211.1, 129, 424, 601, 1000),
    ),
    "AzureLLMInferenceTrace_code.csv.gz": (
        (8819, 3436, 2.567, 13.15, 67),
        (2048, 1469, 5188, 7436, 7437),
        (28, 13, 55, 251, 1899),
    ),
    "mooncake_conversation_trace.jsonl.gz": (
        (12031, 3537.0, 3.401, 3.034, 28),
        (12035, 6909, 27367, 85400, 126195),
        (342.6, 350, 597, 1119, 2000),
    ),
    "mooncake_synthetic_trace.jsonl.gz": (
        (3993, 1022.0, 3.906, 1.011, 13),
        (15325, 11587, 38611, 66456, 191378),
        (149.1, 69, 389, 768, 893),
    ),
}


@pytest.mark.parametrize("name", KNOWN)
def test_published_statistics(real_traces: Path, name: str) -> None:
    if not (real_traces / name).exists():
        pytest.skip(f"{name} is not in {real_traces}")
    found = summarize(read_trace(real_traces / name))
    (count, span_s, rate, cv, peak), prompt, output = KNOWN[name]
    assert (found.num_requests, found.peak_per_second) == (count, peak)
    assert found.span_s == pytest.approx(span_s, abs=0.5)
    assert found.rate == pytest.approx(rate, abs=0.0006)
    assert found.cv == pytest.approx(cv, abs=0.006)
    for lengths, known in ((found.prompt, prompt), (found.output, output)):
        numbers = (lengths.mean, lengths.p50, lengths.p90, lengths.p99, lengths.max)
        assert numbers == pytest.approx(known, abs=0.6)


def test_spreading_mooncake_buckets_shows_the_smooth_traffic_beneath(real_traces: Path) -> None:
    spread = read_trace(real_traces / "mooncake_conversation_trace.jsonl.gz", spread_rng=np.random.default_rng(0))
    found = summarize(spread)
    assert found.cv == pytest.approx(1.0, abs=0.05)  # 3.03 as stamped
    assert found.rate == pytest.approx(3.401, rel=0.001)


def test_sharegpt_lengths(real_traces: Path) -> None:
    lengths = read_lengths(real_traces / "sharegpt_v3_lengths.csv.gz", "num_prefill_tokens")
    assert (len(lengths), min(lengths), max(lengths)) == (58000, 1, 3973)
    assert np.mean(lengths) == pytest.approx(248.2, abs=0.05)
