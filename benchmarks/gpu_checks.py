"""Correctness on GPUs: overlapped equals serial, layouts equal one process, fifty runs under random delays."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np

from benchmarks.gpu_world import Suite
from executor.settings import RunSettings
from models.config import MODELS, ModelConfig
from models.transformer import Layout
from policy.options import Options
from traces.request import Request

RANDOM_PLAN = Path(__file__).resolve().parent.parent / "tests" / "executor" / "random_plan.py"


def correct(suite: Suite) -> None:
    """1-3: overlapped equals serial to the last bit, layouts equal one process, one order on all ranks."""
    tp, delays = suite.tp, {"host_delay_us": 300.0, "device_delay_us": 300.0}
    model = suite.model("llama-2-7b", 4)
    requests = suite.arrivals(24, 2000.0)
    half = Layout(suite.ranks // 2, 2) if suite.ranks > 2 else Layout(1, 2)
    forced = Options(adaptive=False)
    cases: list[tuple[str, Layout, Options]] = [
        ("interleaved", tp, forced), ("interleaved", tp, replace(forced, decomposition="rows", capture=False)),
        ("interleaved", tp, replace(forced, partition=0 if suite.dry_run else 24, comm_ctas=0 if suite.dry_run else 8)),
        ("interleaved", tp, replace(forced, sync="inter-stream")), ("liger-artifact", tp, Options()),
        ("interleaved", tp, replace(forced, whole_segments="on")),
        ("tensor", tp, Options()), ("pipeline", Layout(1, suite.ranks), Options()), ("hybrid", half, Options()),
    ]  # fmt: skip
    runs: list[RunSettings] = []
    for policy, layout, options in cases:
        base = suite.run(policy, layout, model, requests, options=options, poison=True)
        runs.append(msgspec.structs.replace(base, delay_seed=len(runs), **delays))
        runs.append(msgspec.structs.replace(base, replay=len(runs) - 1, serial=True, warm_up=False))
    outputs = suite.world(runs)
    for number, (policy, layout, options) in enumerate(cases):
        one, two = outputs[2 * number], outputs[2 * number + 1]
        suite.emit(check="overlapped equals serial", policy=policy, layout=[layout.tp, layout.pp],
                   sync=options.sync, decomposition=options.decomposition, partition=options.partition,
                   ok=one.hashes == two.hashes and len(one.hashes) == one.timeline.num_batches,
                   num_batches=one.timeline.num_batches, overlap_us=one.timeline.overlap_us, num_graphs=one.num_graphs,
                   refused=one.host["graphs_refused"], order_hash=one.order_hash)  # fmt: skip
    _random_plans(suite, model, requests)
    _layouts(suite, half)


def _random_plans(suite: Suite, model: ModelConfig, requests: tuple[Request, ...]) -> None:
    base = suite.run("interleaved", suite.tp, model, requests, poison=True, host_delay_us=300.0, device_delay_us=300.0)
    # Serial runs take over the log but plan with the same random policy; launches are captured or not, at random.
    runs = [base, msgspec.structs.replace(base, replay=0, serial=True, warm_up=False)]
    one, two = suite.world(runs, (sys.executable, str(RANDOM_PLAN)))
    suite.emit(check="any legal plan equals serial", ok=one.hashes == two.hashes, num_graphs=one.num_graphs)


def _layouts(suite: Suite, half: Layout) -> None:
    """fp32 within 1e-5 and half precision within 1e-2 of one process, relative to the largest logit."""
    requests = tuple(replace(request, arrival_us=0.0) for request in suite.arrivals(12, 100.0))
    for name in ("opt-30b", "llama-2-7b", "glm-130b"):
        family = MODELS[name].family
        config = MODELS[f"tiny-{family}"]
        if not suite.dry_run:
            kv_heads = 8 if family == "llama" else 16
            config = replace(config, num_layers=4, hidden_size=1024, num_heads=16, num_kv_heads=kv_heads, head_dim=64,
                             ffn_size=4096)  # fmt: skip
        for dtype, bound in (("float32", 1e-5), ("float16", 1e-2)):
            change = {"dtype": dtype, "keep_logits": True, "warm_up": False}
            expected = suite.logits([suite.run("tensor", Layout(1, 1), config, requests, **change)])[0]
            layouts = (("tensor", suite.tp), ("pipeline", Layout(1, suite.ranks)), ("hybrid", half))
            for (policy, layout), found in zip(
                layouts,
                suite.logits([suite.run(p, one, config, requests, **change) for p, one in layouts]),
                strict=True,
            ):
                worst = max(float(np.abs(found[b] - e).max() / np.abs(e).max()) for b, e in expected.items())
                suite.emit(check="layout equals one process", family=family, dtype=dtype, layout=[layout.tp, layout.pp],
                           policy=policy, difference=worst, bound=bound, ok=worst <= bound)  # fmt: skip


def soak(suite: Suite) -> None:
    """5: fifty runs with random delays, in five worlds: no hang, no wrong number."""
    worlds, each = (1, 2) if suite.dry_run else (5, 10)
    model, requests = suite.model("llama-2-7b", 4), suite.arrivals(16, 1500.0)
    policies = ("interleaved", "interleaved", "interleaved", "liger-artifact", "tensor")
    for world in range(worlds):
        runs: list[RunSettings] = []
        base = suite.run(policies[world % 5], suite.tp, model, requests, poison=True, options=Options(adaptive=False))
        for number in range(each):
            seed = world * each + number
            runs.append(msgspec.structs.replace(base, delay_seed=seed, host_delay_us=500.0, device_delay_us=500.0))
            runs.append(msgspec.structs.replace(base, replay=len(runs) - 1, serial=True, warm_up=False))
        outputs = suite.world(runs)
        equal = [one.hashes == two.hashes for one, two in zip(outputs[::2], outputs[1::2], strict=True)]
        suite.emit(check="soak", world=world, policy=base.policy, runs=each, equal=sum(equal), ok=all(equal))
