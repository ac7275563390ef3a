"""Worlds of real processes for the tests: settings, a made-up profile, and where results go."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from executor.launch import PROGRAM, launch
from executor.results import Output, read_output
from executor.settings import RunSettings, Settings
from models.config import MODELS
from models.transformer import BatchShape, Layout, function_vector
from policy.options import Options
from policy.profile_table import profile_from
from policy.scheduler import Scheduler
from traces.request import Request

TINY = replace(MODELS["tiny-opt"], num_layers=3, hidden_size=64, num_heads=4, num_kv_heads=4, ffn_size=192)


def requests(count: int, gap_us: float = 0.0) -> tuple[Request, ...]:
    """Lengths that differ from batch to batch."""
    return tuple(Request(number, number * gap_us, 3 + number * 11 % 45) for number in range(count))


def beliefs(partitions: tuple[int, ...] = (0,)) -> dict[str, Any]:
    """A made-up profile: GEMMs in proportion to rows x features, collectives about as long as what lies between them.

    Nothing is measured, so it is the same everywhere; kernels are long enough against a launch to be worth cutting.
    """
    rows, cols = [8, 64, 512], [16, 64, 512]
    sheets = {"qkv_proj": 1.0, "out_proj": 1.0, "fc1": 2.0, "fc2": 2.0, "lm_head": 1.0}
    gemms = [
        {
            "name": name,
            "withheld": 0,
            "rows": rows,
            "cols": cols,
            "us": [[w * (20 + r * c / 40) for r in rows] for c in cols],
        }
        for name, w in sheets.items()
    ]
    names = ("embedding", "attn_norm", "attention", "rotary", "ffn_norm", "activation", "final_norm")
    others = [{"name": name, "withheld": 0, "bytes": [1e3, 1e6], "us": [8.0, 400.0]} for name in names]
    comms = [
        {"kind": kind, "ctas": 0, "bytes": [1e3, 1e6], "us": [120.0, 9000.0]} for kind in ("all_reduce", "all_gather")
    ]
    pairs = [{"kind": "gemm", "withheld": 0, "ctas": 0, "rows": [8, 512], "compute": [1.1, 1.2], "comm": [1.3, 1.1]}]
    return {"name": "made up", "gemms": gemms, "others": others, "comms": comms, "pairs": pairs,
            "partitions": list(partitions), "ctas": [0], "launch_us": 2.0}  # fmt: skip


def run_of(policy: str, layout: Layout, **changes: Any) -> RunSettings:
    """A run of the tiny model."""
    options = changes.pop("options", Options(pad_to=8, max_wait_us=500.0))
    options = replace(options, depth=max(options.depth, layout.pp + 2)) if layout.pp > 1 else options
    base = RunSettings(
        model=TINY, layout=layout, policy=policy, options=options, requests=requests(10, 300.0), profile=beliefs(),
        poison=True, warm_up=False, keep_logits=True,
    )  # fmt: skip
    return msgspec.structs.replace(base, **changes)


def run_world(
    folder: Path, runs: list[RunSettings], program: tuple[str, ...] = PROGRAM, **settings: Any
) -> list[Output]:
    """All runs in one world of gloo ranks."""
    launch(Settings(runs=tuple(runs), output=str(folder), **settings), program=program)
    return [read_output(str(folder), number) for number in range(len(runs))]


def logits(folder: Path, number: int) -> dict[int, np.ndarray[Any, np.dtype[np.float32]]]:
    """The logits that a run saved, by batch."""
    with np.load(folder / f"logits-{number}.npz") as file:
        return {int(name): file[name] for name in file.files}


def fresh_scheduler(run: RunSettings, table: dict[str, Any] | None) -> Scheduler:
    """The scheduler of a run, as any driver would make it."""
    profile = profile_from(table or beliefs())

    def vectors_of(shape: BatchShape) -> tuple[Any, ...]:
        return tuple(function_vector(run.model, shape, run.layout, stage) for stage in range(run.layout.pp))

    return Scheduler(run.policy, run.options, profile, vectors_of)
