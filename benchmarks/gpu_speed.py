"""Speed on GPUs: two batches through a forward pass, serving, the latency-throughput plane, the worth of each lever."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.gpu_world import BELIEFS, Suite
from executor.launch import launch
from executor.results import Output
from executor.settings import RunSettings, Settings
from models.config import ModelConfig
from models.transformer import Layout
from policy.options import Options
from traces.metrics import metrics
from traces.request import Request

RANK_PROGRAM = (sys.executable, str(Path(__file__).with_name("gpu_rank.py")))


def probe(suite: Suite) -> None:
    """What this torch, driver and NCCL can do, and what the host's calls cost."""
    _measured_inside(
        suite, "probe", [suite.run("interleaved", suite.tp, suite.model("opt-30b", 4), (Request(0, 0.0, 64),))]
    )


def forward(suite: Suite) -> None:
    """6: two batches, whole forward, against the ideal and against plain tensor parallelism as one graph."""
    models = [suite.model("glm-130b", 24), suite.model("opt-30b", 48)]
    for model in models:
        runs = []
        for rows in (32,) if suite.dry_run else (128, 512, 16, 2048, 64, 256, 1024):
            length = min(rows, 64)
            requests = tuple(Request(number, 0.0, length) for number in range(rows // length))
            options = Options(batch_size=len(requests), pad_to=16, depth=2)
            runs.append(
                suite.run("interleaved", suite.tp, model, requests, options=options, warm_up=False, timing=False)
            )
        _measured_inside(suite, "forward", runs)


def _measured_inside(suite: Suite, what: str, runs: list[RunSettings]) -> None:
    rows = suite.out.with_name(f".{suite.out.name}.{what}.{suite.mode}")
    rows.unlink(missing_ok=True)
    backend: Any = "gloo" if suite.dry_run else "nccl"
    try:
        launch(Settings(runs=tuple(runs), backend=backend, timeout_s=120.0), program=(*RANK_PROGRAM, what, str(rows)))
    finally:
        for line in rows.read_text().splitlines() if rows.exists() else ():
            suite.emit(**json.loads(line))
        rows.unlink(missing_ok=True)


# Model, layers, lengths are multiples of, overload rate, rates below capacity, requests; a request is a batch of two,
# as published. Graphs are made for every length and layer, so the deep model has fewer lengths.
WIDE = ("glm-130b-plain", 4, 8, 1500.0, (230.0,), 400)
DEEP = ("opt-30b", 48, 16, 200.0, (30.0,), 160)


def serving(suite: Suite) -> None:
    """7: capacity and tail latency beside tensor parallelism, with the published artifact's requests."""
    _served_beside_tensor(suite, WIDE)


def deep(suite: Suite) -> None:
    """7 again, of a whole model."""
    _served_beside_tensor(suite, DEEP)


def _served_beside_tensor(suite: Suite, what: tuple[str, int, int, float, tuple[float, ...], int]) -> None:
    name, layers, pad_to, overload, below, count = what
    options = Options(pad_to=pad_to)
    model = suite.model(name, layers, vocab_size=0)
    for policy in ("tensor", "interleaved", "liger-artifact"):
        rates = (overload, *below) if policy != "liger-artifact" else (overload,)
        traces = [suite.pairs(count, rate) for rate in rates]
        _serve(suite, policy, suite.tp, model, traces, rates, options=options, pad_to=pad_to)


def _serve(
    suite: Suite,
    policy: str,
    layout: Layout,
    model: ModelConfig,
    traces: list[tuple[Request, ...]],
    rates: Sequence[float],
    **about: Any,
) -> None:
    """One world: the first trace once unmeasured, for what only a real run warms, and then all of them."""
    options = about.pop("options", Options())
    runs = [
        suite.run(
            policy, layout, model, trace, options=options, checksum=False, warm_up=number == 0, spin=True, timing=False
        )
        for number, trace in enumerate((traces[0], *traces))
    ]
    outputs = suite.world(runs)[1:]
    for rate, run, output in zip(rates, runs[1:], outputs, strict=True):
        suite.emit(model=model.model_id, num_layers=model.num_layers, policy=policy, layout=[layout.tp, layout.pp],
                   rate=rate, num_requests=len(run.requests), **about, **_served(output))  # fmt: skip


def _served(output: Output) -> dict[str, Any]:
    numbers = metrics(output.timeline)
    host = output.host_times[0]
    kept = ("request_throughput", "duration", "mean_e2el_ms", "median_e2el_ms", "p90_e2el_ms", "p95_e2el_ms",
            "p99_e2el_ms", "overlap_fraction", "comm_share")  # fmt: skip
    result: dict[str, Any] = {key: numbers[key] for key in kept}
    if output.opaque:
        result["overlap_fraction"] = result["comm_share"] = None
    return result | {
        "batch_throughput": result["request_throughput"] / 2,
        "host_plan_us_per_round": host.plan_s / max(1, host.rounds) * 1e6,
        "host_issue_us_per_round": host.issue_s / max(1, host.rounds) * 1e6,
        "host_issue_us_per_launch": host.issue_s / max(1, host.launches) * 1e6,
        "host_synchronize_fraction": host.synchronize_s / output.wall_s,
        "host_mail_us_per_round": host.mail_s / max(1, host.rounds) * 1e6,
        "host_bound_fraction": max(busy.host_bound_us for busy in output.busy) / (output.wall_s * 1e6),
        "num_rounds": host.rounds, "num_graphs": output.num_graphs, "refused": output.host["graphs_refused"],
        "beliefs": {key: output.profile[key] for key in BELIEFS if key in output.profile} if output.profile else None,
    }  # fmt: skip


# Requests, and rates of two ranks and of more; the highest first: what it makes of the plan cache serves the others.
FEW, MANY = (75, (90.0, 15.0, 30.0, 40.0, 50.0, 60.0, 75.0)), (100, (240.0, 30.0, 60.0, 90.0, 120.0, 160.0, 200.0))


def plane(suite: Suite) -> None:
    """8: latency against throughput for four policies over a sweep of rates."""
    model = suite.model("opt-30b", 48, vocab_size=0)
    layouts = {"tensor": suite.tp, "interleaved": suite.tp, "pipeline": Layout(1, suite.ranks)}
    if suite.ranks > 2:  # two ranks are either a stage each or one stage together
        layouts["hybrid"] = Layout(suite.ranks // 2, 2)
    count, rates = MANY if suite.ranks > 2 else FEW
    for policy, layout in layouts.items():
        _serve(suite, policy, layout, model, [suite.arrivals(count, rate) for rate in rates], rates)


LEVERS: dict[str, dict[str, Any]] = {
    "all": {},
    "no priority": {"priority": False},
    "no SM partition": {"partition": 0},
    "default CTAs": {"comm_ctas": 0},
    "no CUDA graphs": {"capture": False},
    "no decomposition": {"decomposition": "off"},
    "no contention anticipation": {"anticipation": "off"},
    "scalar anticipation": {"anticipation": "scalar"},
    "no lookahead": {"lookahead": False},
    "no chunks": {"chunks": False},
    "no fills of whole segments": {"whole_segments": "off"},
    "not adaptive": {"adaptive": False},
}


def ablation(suite: Suite) -> None:
    """9: what each lever is worth: capacity of the serving workload without it."""
    name, layers, _, overload, _, count = WIDE
    model = suite.model(name, layers, vocab_size=0)
    levers = list(LEVERS.items())
    # A change of priority needs other streams, and so everything anew: it comes last.
    levers.sort(key=lambda item: "priority" in item[1])
    trace = suite.pairs(count, overload)
    runs: list[RunSettings] = []
    for _, change in levers[:2] if suite.dry_run else levers:
        run = suite.run("interleaved", suite.tp, model, trace, options=replace(Options(), **change), checksum=False)
        runs += [run, run]
    outputs = suite.world(runs)[1::2]
    for (lever, _), output in zip(levers, outputs, strict=False):
        suite.emit(lever=lever, model=model.model_id, num_layers=layers, rate=overload, **_served(output))
    tensor = suite.run("tensor", suite.tp, model, trace, checksum=False)
    suite.emit(lever="tensor parallelism", model=model.model_id, num_layers=layers, rate=overload,
               **_served(suite.world([tensor, tensor])[1]))  # fmt: skip
