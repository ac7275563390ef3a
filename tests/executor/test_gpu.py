"""The same on real GPUs with NCCL, where there are two or more: graphs, partitions, communicators of few CTAs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from executor.settings import RunSettings
from models.config import MODELS
from models.transformer import Layout
from policy.options import Options
from tests.executor.worlds import logits, requests, run_of, run_world

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two or more CUDA devices"),
]
MODEL = replace(
    MODELS["tiny-llama"], num_layers=6, hidden_size=1024, num_heads=16, num_kv_heads=8, head_dim=64, ffn_size=2816
)
DELAYS = {"host_delay_us": 300.0, "device_delay_us": 300.0}


def test_overlap_changes_no_bit(tmp_path: Path) -> None:
    forced = Options(pad_to=16, adaptive=False, max_wait_us=500.0)
    runs: list[RunSettings] = []
    for options in (forced, replace(forced, capture=False), replace(forced, partition=24, comm_ctas=8)):
        run = run_of("interleaved", Layout(2, 1), model=MODEL, dtype="float16", options=options,
                     requests=requests(16, 200.0), warm_up=True)  # fmt: skip
        runs.append(msgspec.structs.replace(run, delay_seed=len(runs), **DELAYS))
        runs.append(msgspec.structs.replace(run, replay=len(runs) - 1, serial=True))
    outputs = run_world(tmp_path, runs, backend="nccl", timeout_s=60.0)
    for overlapped, serial in zip(outputs[::2], outputs[1::2], strict=True):
        assert overlapped.hashes == serial.hashes
        assert overlapped.host["graphs_refused"] == {}
    assert outputs[0].num_graphs > 0


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("float16", 1e-2)])
def test_layouts_equal_one_process(dtype: str, bound: float, tmp_path: Path) -> None:
    at_once = {"model": MODEL, "dtype": dtype, "requests": requests(8), "options": Options(pad_to=16)}
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    run_world(tmp_path / "one", [run_of("tensor", Layout(1, 1), **at_once)], backend="nccl", timeout_s=60.0)
    layouts = [run_of("tensor", Layout(2, 1), **at_once), run_of("pipeline", Layout(1, 2), **at_once)]
    run_world(tmp_path / "two", layouts, backend="nccl", timeout_s=60.0)
    expected = logits(tmp_path / "one", 0)
    for number in range(len(layouts)):
        for batch_id, found in logits(tmp_path / "two", number).items():
            scale = np.abs(expected[batch_id]).max()
            np.testing.assert_allclose(found, expected[batch_id], rtol=0.0, atol=bound * scale)
