"""Where the parts of the GPU suite run, and where their results go."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from executor.launch import PROGRAM, launch
from executor.results import Output, read_output
from executor.settings import RunSettings, Settings
from models.config import MODELS, ModelConfig
from models.transformer import Layout
from policy.options import Options
from traces.lengths import Uniform
from traces.request import Request
from traces.synthetic import SyntheticSpec, synthetic_trace

GPU_PARTITIONS, GPU_CTAS = (0, 8, 16, 24, 32), (0, 8, 16)
SEED = 1
# What rehearsals have made of the policy's beliefs.
BELIEFS = ("launch_us", "round_us", "crossing_us", "host_margin", "partitions", "ctas", "rehearsed", "serial_us",
           "kept_to_windows_us", "whole_segments", "overlap_price")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Suite:
    """Where the parts run and where their results go."""

    part: str
    mode: str
    out: Path
    ranks: int
    dry_run: bool

    @property
    def tp(self) -> Layout:
        """Tensor parallelism over all ranks."""
        return Layout(self.ranks, 1)

    def emit(self, **values: Any) -> None:
        """One line of results, at once on disk."""
        row = {"part": self.part, "mode": self.mode, "dry_run": self.dry_run, **values}
        with self.out.open("a") as file:
            file.write(json.dumps(row, default=float) + "\n")
        print(f"[{self.part} {self.mode}] " + " ".join(f"{k}={_short(v)}" for k, v in values.items()), flush=True)

    def world(
        self, runs: Sequence[RunSettings], program: tuple[str, ...] = PROGRAM, timeout_s: float = 60.0
    ) -> list[Output]:
        """All runs in one world."""
        with tempfile.TemporaryDirectory() as folder:
            backend: Any = "gloo" if self.dry_run else "nccl"
            launch(Settings(runs=tuple(runs), backend=backend, output=folder, timeout_s=timeout_s), program=program)
            return [read_output(folder, number) for number in range(len(runs))]

    def logits(self, runs: Sequence[RunSettings]) -> list[dict[int, Any]]:
        """The logits of every run, by batch."""
        with tempfile.TemporaryDirectory() as folder:
            backend: Any = "gloo" if self.dry_run else "nccl"
            launch(Settings(runs=tuple(runs), backend=backend, output=folder, timeout_s=60.0))
            return [_load(Path(folder) / f"logits-{number}.npz") for number in range(len(runs))]

    def model(self, name: str, num_layers: int, **changes: Any) -> ModelConfig:
        """A model cut to its first layers; a tiny one in a dry run."""
        if self.dry_run:
            return replace(MODELS["tiny-" + MODELS[name].family], num_layers=2)
        return replace(MODELS[name], num_layers=num_layers, **changes)

    def run(
        self, policy: str, layout: Layout, model: ModelConfig, requests: tuple[Request, ...], **changes: Any
    ) -> RunSettings:
        """A run on this suite's ranks, with what a GPU lets the policy choose."""
        options = changes.pop("options", Options())
        options = replace(options, depth=max(options.depth, layout.pp + 2)) if layout.pp > 1 else options
        base = RunSettings(
            model=model, layout=layout, policy=policy, requests=requests, options=options, seed=SEED,
            dtype="float32" if self.dry_run else "float16",
            partitions=(0,) if self.dry_run else GPU_PARTITIONS, ctas=(0,) if self.dry_run else GPU_CTAS,
        )  # fmt: skip
        return msgspec.structs.replace(base, **changes)

    def arrivals(self, count: int, rate: float, low: int = 16, high: int = 115) -> tuple[Request, ...]:
        """Poisson arrivals at exactly this rate; few of them in a dry run."""
        return arrivals(min(count, 12) if self.dry_run else count, rate, low, high)

    def pairs(self, count: int, rate: float) -> tuple[Request, ...]:
        """Pairs of one length; few of them in a dry run."""
        return twins(self.arrivals(count, rate))


def arrivals(count: int, rate: float, low: int = 16, high: int = 115) -> tuple[Request, ...]:
    """Poisson arrivals at exactly this rate."""
    trace = synthetic_trace(SyntheticSpec(count, rate, 1.0, Uniform(low, high)), SEED)
    span_us = trace.requests[-1].arrival_us
    scale = (count - 1) / rate * 1e6 / span_us if span_us else 1.0
    return tuple(replace(request, arrival_us=request.arrival_us * scale) for request in trace.requests)


def twins(singles: tuple[Request, ...]) -> tuple[Request, ...]:
    """As the published artifact has them: each of its requests is a batch of two of one length. Rates are of pairs."""
    return tuple(replace(r, request_id=2 * r.request_id + twin) for r in singles for twin in (0, 1))


def _load(path: Path) -> dict[int, Any]:
    with np.load(path) as file:
        return {int(name): file[name] for name in file.files}


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = json.dumps(value, default=float) if isinstance(value, dict | list) else str(value)
    return text if len(text) <= 160 else text[:157] + "..."
