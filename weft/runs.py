"""One simulated run from start to end: what is asked for, what comes out. Everything above (commands, notebooks) uses this."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import msgspec

from models.config import ModelConfig, load_model
from models.transformer import BatchShape, Layout, function_vector
from policy.options import Options
from policy.profile import Profile
from policy.scheduler import POLICIES, Scheduler
from sim.believe import profile_of
from sim.simulate import Fidelity, Simulation
from sim.spec import NodeSpec, load_node
from traces.lengths import parse_lengths
from traces.metrics import metrics
from traces.reader import read_trace
from traces.request import Request
from traces.synthetic import SyntheticSpec, synthetic_trace
from traces.timeline import Timeline
from traces.transform import limit, scale_rate

DatasetName = Literal["random", "auto", "azure", "mooncake", "burstgpt", "csv"]


class RunConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is simulated. `tp` and `pp` 0: the policy's own layout. `request_rate` in requests per second.

    `dataset_name` random: `num_prompts` arrivals at `request_rate` with lengths `input_len`. Otherwise a trace file, of
    which the first `num_prompts` requests are taken (0: all) and whose rate is scaled to `request_rate` (0: kept).
    """

    model: str = "glm-130b"
    node: str = "a100-pcie-x4"
    policy: str = "interleaved"
    tp: int = 0
    pp: int = 0
    dataset_name: DatasetName = "random"
    dataset_path: str = ""
    num_prompts: int = 1000
    request_rate: float = 20.0
    burstiness: float = 1.0
    input_len: str = "16:128"
    seed: int = 0
    options: Options = Options()

    def check(self) -> None:
        """Raises ValueError if no run can be made of this."""
        if self.policy not in POLICIES:
            raise ValueError(f"unknown policy {self.policy!r}; choose from: {', '.join(POLICIES)}")
        if self.dataset_name != "random" and not self.dataset_path:
            raise ValueError(f"dataset {self.dataset_name} needs a file: give --dataset-path")
        least = 1 if self.dataset_name == "random" else 0
        if self.num_prompts < least:
            raise ValueError(f"number of prompts is {self.num_prompts}; it must be {least} or more")
        if not self.request_rate >= 0.0 or (self.dataset_name == "random" and not self.request_rate):
            raise ValueError(f"request rate is {self.request_rate}; it must be above 0 requests per second (or inf)")


@dataclass(frozen=True, slots=True)
class Run:
    """A finished run: the flat result (keys of `vllm bench serve` where it has them) and the timeline."""

    result: dict[str, Any]
    timeline: Timeline


def layout_of(policy: str, num_gpus: int, tp: int = 0, pp: int = 0) -> Layout:
    """The layout a policy uses on a node, unless degrees are given.

    Tensor parallelism, and what interleaves it, spans all GPUs; pipeline has a stage per GPU; hybrid two ranks a stage.
    """
    if policy == "pipeline":
        layout = Layout(tp or 1, pp or num_gpus // (tp or 1))
    elif policy == "hybrid":
        layout = Layout(tp or (num_gpus // pp if pp else min(2, num_gpus)), pp or num_gpus // (tp or min(2, num_gpus)))
    else:
        layout = Layout(tp or num_gpus, pp or 1)
    if policy in ("tensor", "interleaved", "liger-artifact") and layout.pp != 1:
        raise ValueError(f"policy {policy} runs on one stage, but {layout.pp} pipeline stages are asked for")
    return layout


def options_for(policy: str, layout: Layout, options: Options) -> Options:
    """Options with enough buffers for every stage of a pipeline to be busy."""
    return replace(options, depth=max(options.depth, layout.pp + 2)) if layout.pp > 1 else options


def make_requests(config: RunConfig) -> tuple[Request, ...]:
    """The requests of a run: drawn by seed, or read from a trace."""
    if config.dataset_name == "random":
        spec = SyntheticSpec(config.num_prompts, config.request_rate, config.burstiness, parse_lengths(config.input_len))
        return synthetic_trace(spec, config.seed).requests
    trace = read_trace(config.dataset_path, config.dataset_name)
    if config.num_prompts:
        trace = limit(trace, config.num_prompts)
    span_s = trace.requests[-1].arrival_us / 1e6
    if config.request_rate and span_s > 0.0:
        trace = scale_rate(trace, config.request_rate * span_s / (len(trace.requests) - 1))
    return trace.requests


@dataclass(slots=True)
class _Vectors:
    """Function vectors of a model by batch shape; one object per shape."""

    config: ModelConfig
    layout: Layout

    def __call__(self, shape: BatchShape) -> tuple[Any, ...]:
        return tuple(function_vector(self.config, shape, self.layout, stage) for stage in range(self.layout.pp))


def make_scheduler(config: RunConfig, model: ModelConfig, layout: Layout, profile: Profile) -> Scheduler:
    """The policy object of a run, the same for simulator and executor."""
    return Scheduler(config.policy, options_for(config.policy, layout, config.options), profile, _Vectors(model, layout))


def simulate(
    config: RunConfig, fidelity: Fidelity = Fidelity(), progress: Callable[[int], object] = lambda finished: None
) -> Run:
    """Run one simulation. Raises ValueError if the configuration is not possible."""
    config.check()
    model, node = load_model(config.model), load_node(config.node)
    layout = layout_of(config.policy, node.num_gpus, config.tp, config.pp)
    layout.check(model)
    requests = make_requests(config)
    _check_lengths(requests, model)
    scheduler = make_scheduler(config, model, layout, profile_of(node))
    simulation = Simulation(node, layout, scheduler, fidelity, progress)
    started = time.perf_counter()
    timeline = simulation.run(requests)
    wall = time.perf_counter() - started
    slo_ms = config.options.slo_us / 1e3
    result = _describe(config, model, node, layout)
    result |= metrics(timeline, len(requests), slo_ms if slo_ms != float("inf") else None)
    result |= {
        "sim_iterations": timeline.num_batches,
        "sim_kernels": timeline.num_kernels,
        "sim_rounds": timeline.num_rounds,
        "out_of_range": sorted(simulation.out_of_range),
        "sim_wall_s": wall,
    }
    return Run(result, timeline)


def _check_lengths(requests: tuple[Request, ...], model: ModelConfig) -> None:
    longest = max(requests, key=lambda r: r.num_prompt_tokens)
    if longest.num_prompt_tokens > model.max_positions:
        raise ValueError(
            f"request {longest.request_id} has {longest.num_prompt_tokens} prompt tokens, but {model.model_id} "
            f"has {model.max_positions} positions"
        )


def _describe(config: RunConfig, model: ModelConfig, node: NodeSpec, layout: Layout) -> dict[str, Any]:
    return {
        "backend": "simulated",
        "model_id": model.model_id,
        "node": node.name,
        "node_digest": node.digest,
        "policy": config.policy,
        "tensor_parallel_size": layout.tp,
        "pipeline_parallel_size": layout.pp,
        "dataset_name": config.dataset_name,
        "num_prompts": config.num_prompts,
        "request_rate": config.request_rate,
        "burstiness": config.burstiness,
        "seed": config.seed,
        "config_hash": config_hash(config),
        "estimates_used": list(node.estimates),
    }


def config_hash(config: RunConfig) -> str:
    """A hash of everything that decides the result: the configuration, the node's numbers, the model's shape, the trace."""
    parts = [msgspec.json.encode(config), load_node(config.node).digest.encode(), repr(load_model(config.model)).encode()]
    if config.dataset_path:
        with open(config.dataset_path, "rb") as file:
            parts.append(hashlib.sha256(file.read()).digest())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
