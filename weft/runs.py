"""One simulated run from start to end: what is asked for, what comes out. Commands and notebooks build on this."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import msgspec

from models.config import ModelConfig, load_model
from models.kernel import Kind
from models.transformer import BatchShape, Layout, Vectors, function_vector, weight_bytes
from policy.options import OPTION_NAMES, Options
from policy.profile import Profile
from policy.scheduler import POLICIES, Scheduler
from sim.believe import profile_of
from sim.fitted import fit_notes
from sim.simulate import Fidelity, Simulation
from sim.spec import NodeSpec, load_node
from traces.arrivals import US_PER_S
from traces.lengths import parse_lengths
from traces.metrics import metrics
from traces.reader import read_trace
from traces.request import Request
from traces.synthetic import SyntheticSpec, synthetic_trace
from traces.timeline import Span, Timeline
from traces.trace import Trace
from traces.transform import clip_lengths, limit, scale_burstiness, scale_rate, window

DatasetName = Literal["random", "auto", "azure", "mooncake", "burstgpt", "csv"]


class RunConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is simulated. `tp` and `pp` 0: the policy's own layout. `request_rate` in requests per second, inf: at once.

    `dataset_name` random: `num_prompts` arrivals at `request_rate` with lengths `input_len`. Otherwise a trace file:
    of its requests in `duration_s` seconds from `start_s` the first `num_prompts` are taken (0: all); the CV of their
    gaps is multiplied by `burstiness_scale` and their rate scaled to `request_rate` (0: kept).
    Prompts longer than `max_input_len` tokens are shortened to it (0: never).
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
    max_input_len: int = 0
    start_s: float = 0.0
    duration_s: float = float("inf")
    burstiness_scale: float = 1.0
    seed: int = 0
    options: Options = Options()

    def check(self) -> None:
        """Raises ValueError if no run can be made of this."""
        if self.policy not in POLICIES:
            raise ValueError(f"unknown policy {self.policy!r}; choose from: {', '.join(POLICIES)}")
        if self.dataset_name != "random" and not self.dataset_path:
            raise ValueError(f"dataset {self.dataset_name} needs a file: give --dataset-path")
        if self.max_input_len < 0:
            raise ValueError(f"longest input is {self.max_input_len} tokens; it must be 1 or more, or 0 for no limit")
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
        layout = Layout(tp or 1, pp or max(1, num_gpus // (tp or 1)))
    elif policy == "hybrid":
        tp = tp or (max(1, num_gpus // pp) if pp else min(2, num_gpus))
        layout = Layout(tp, pp or max(1, num_gpus // tp))
    else:
        layout = Layout(tp or num_gpus, pp or 1)
    if policy in ("tensor", "interleaved", "liger-artifact") and layout.pp != 1:
        raise ValueError(f"policy {policy} runs on one stage, but {layout.pp} pipeline stages are asked for")
    if layout.num_ranks > num_gpus:
        raise ValueError(f"TP{layout.tp} x PP{layout.pp} needs {layout.num_ranks} ranks, but there are {num_gpus}")
    return layout


def options_for(policy: str, layout: Layout, options: Options) -> Options:
    """Options with enough buffers for every stage of a pipeline to be busy."""
    return replace(options, depth=max(options.depth, layout.pp + 2)) if layout.pp > 1 else options


def make_requests(config: RunConfig) -> tuple[Request, ...]:
    """The requests of a run: drawn by seed, or read from a trace."""
    return draw_requests(config)[0]


def draw_requests(config: RunConfig) -> tuple[tuple[Request, ...], int]:
    """The requests of a run, and how many of their prompts were shortened.

    As `vllm bench serve` does, the gaps that were drawn are scaled so that the run has exactly the rate asked for.
    """
    if config.dataset_name == "random":
        lengths = parse_lengths(config.input_len)
        spec = SyntheticSpec(config.num_prompts, config.request_rate, config.burstiness, lengths)
        trace = synthetic_trace(spec, config.seed)
    else:
        trace = read_trace(config.dataset_path, config.dataset_name)
        if (config.start_s, config.duration_s) != (0.0, float("inf")):
            trace = window(trace, config.start_s, config.duration_s)
        if config.num_prompts:
            trace = limit(trace, config.num_prompts)
        trace = scale_burstiness(trace, config.burstiness_scale)
    rate, own_rate = config.request_rate, _rate_of(trace)
    if rate == float("inf"):
        trace = trace.with_arrivals(0.0 * trace.arrivals_us())
    elif rate and own_rate != float("inf"):
        trace = scale_rate(trace, rate / own_rate)
    if not config.max_input_len:
        return trace.requests, 0
    trace, num_shortened = clip_lengths(trace, config.max_input_len)
    return trace.requests, num_shortened


def _rate_of(trace: Trace) -> float:
    """Requests per second as one over the mean gap; infinite where all come at once."""
    span_s = trace.requests[-1].arrival_us / US_PER_S
    return (len(trace.requests) - 1) / span_s if span_s > 0.0 else float("inf")


def make_scheduler(config: RunConfig, model: ModelConfig, layout: Layout, profile: Profile) -> Scheduler:
    """The policy object of a run, the same for simulator and executor."""
    options = options_for(config.policy, layout, config.options)
    return Scheduler(config.policy, options, profile, Vectors(model, layout))


def simulate(
    config: RunConfig, fidelity: Fidelity = Fidelity(), progress: Callable[[int], object] = lambda finished: None
) -> Run:
    """Run one simulation. Raises ValueError if the configuration is not possible."""
    config.check()
    model, node = load_model(config.model), load_node(config.node)
    layout = layout_of(config.policy, node.num_gpus, config.tp, config.pp)
    layout.check(model)
    check_options(config.options, model, node)
    requests, num_shortened = draw_requests(config)
    check_lengths(requests, model)
    scheduler = make_scheduler(config, model, layout, profile_of(node))
    simulation = Simulation(node, layout, scheduler, fidelity, progress)
    started = time.perf_counter()
    timeline = simulation.run(requests)
    wall = time.perf_counter() - started
    if fidelity.record and not fidelity.exact:
        timeline.spans = _unfold(timeline.spans, layout.tp)
    slo_ms = config.options.slo_us / 1e3
    result = _describe(config, model, node, layout) | {"num_prompts": len(requests), "num_shortened": num_shortened}
    result |= metrics(timeline, len(requests), slo_ms if slo_ms != float("inf") else None)
    result |= {
        "sim_iterations": timeline.num_batches,
        "sim_kernels": timeline.num_kernels,
        "sim_rounds": timeline.num_rounds,
        "out_of_range": sorted(simulation.out_of_range),
        "sim_wall_s": wall,
    }
    return Run(result, timeline)


def _unfold(spans: list[Span], tp: int) -> list[Span]:
    """The spans of all ranks from those of the first rank of every stage: tensor-parallel ranks run alike."""
    return [replace(span, rank=span.rank + offset) for offset in range(tp) for span in spans]


def check_lengths(requests: tuple[Request, ...], model: ModelConfig) -> None:
    """Raises ValueError if a request is longer than the model can take."""
    longest = max(requests, key=lambda r: r.num_prompt_tokens)
    if longest.num_prompt_tokens > model.max_positions:
        raise ValueError(
            f"request {longest.request_id} has {longest.num_prompt_tokens} prompt tokens, but {model.model_id} "
            f"has {model.max_positions} positions; --max-input-len {model.max_positions} shortens such prompts"
        )


def check_options(options: Options, model: ModelConfig, node: NodeSpec | None = None) -> None:
    """Raises ValueError if an option goes beyond the model, or the GPUs of the node if there is one."""
    if options.pad_to > model.max_positions:
        why = f"prompts cannot be padded beyond the {model.max_positions} positions of {model.model_id}"
        raise ValueError(f"policy option pad_to is {options.pad_to}; {why}; give at most {model.max_positions}")
    if node is None:
        return
    sms = node.device.num_sms
    for name, flag, most in (("partition", "--partition", sms - 1), ("comm_ctas", "--comm-ctas", sms)):
        if (value := getattr(options, name)) > most:
            raise ValueError(
                f"policy option {name} ({flag}) is {value}, but a GPU of {node.name} has {sms} SMs; give at most {most}"
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
        **describe_requests(config),
        "policy_options": changed_options(config.options),
        "seed": config.seed,
        "config_hash": config_hash(config),
        "weights_gb_per_gpu": weight_bytes(model, layout) / 1e9,
        "gpu_memory_gb": node.device.memory_gb or None,
        "memory_notes": memory_notes(model, node, layout),
        "estimates_used": estimates_used(node, model, layout),
        **({"fit_date": node.fit.date, "fit_notes": list(fit_notes(node))} if node.fit else {}),
    }


def describe_requests(config: RunConfig) -> dict[str, Any]:
    """Where the requests came from. What a trace file has of its own is null; its cuts are there for files only."""
    if config.dataset_name == "random":
        own = {"input_len": config.input_len, "request_rate": config.request_rate, "burstiness": config.burstiness}
        return {"dataset_name": "random", "num_prompts": config.num_prompts, **own}
    return {
        "dataset_name": config.dataset_name,
        "num_prompts": config.num_prompts,
        "input_len": "",
        "request_rate": config.request_rate or None,
        "burstiness": None,
        "trace_start_s": config.start_s,
        "trace_duration_s": config.duration_s,
        "burstiness_scale": config.burstiness_scale,
    }


def memory_notes(model: ModelConfig, node: NodeSpec, layout: Layout) -> list[str]:
    """What must be said where the weights do not fit a GPU. Not an error: published runs are compared on such nodes."""
    weights_gb, memory_gb = weight_bytes(model, layout) / 1e9, node.device.memory_gb
    if not memory_gb or weights_gb <= memory_gb:
        return []
    gpu = f"the {memory_gb:g} GB of {node.device.name}"
    return [f"weights of {weights_gb:.0f} GB a GPU ({model.model_id}) do not fit {gpu}; times are as if they did"]


def estimates_used(node: NodeSpec, model: ModelConfig, layout: Layout) -> list[str]:
    """The node's numbers that nobody measured, without tables of operations that this layout does not run."""
    kernels = {k for stage in range(layout.pp) for k in function_vector(model, BatchShape(1, 1), layout, stage).kernels}
    ops = {("send" if k.kind is Kind.RECV else k.kind.value, k.num_ranks) for k in kernels if k.is_communication}
    tables = tuple(f"link.tables.{op}.{num_ranks}." for op, num_ranks in ops)
    return [name for name in node.estimates if name.startswith(tables) or not name.startswith("link.tables.")]


def changed_options(options: Options) -> str:
    """The options that differ from the defaults, as `name=value` separated by spaces."""
    usual = Options()
    changed = [name for name in OPTION_NAMES if getattr(options, name) != getattr(usual, name)]
    return " ".join(f"{name}={getattr(options, name)}" for name in changed)


def config_hash(config: RunConfig) -> str:
    """A hash of all input that decides the result: configuration, node, model, and the contents of files."""
    node, model = load_node(config.node), load_model(config.model)
    parts = [msgspec.json.encode(config), node.digest.encode(), repr(model).encode()]
    # Lengths may come from a file too, written as FILE or FILE:COLUMN.
    for name in (config.dataset_path, config.input_len, config.input_len.rpartition(":")[0]):
        if name and Path(name).is_file():
            parts.append(hashlib.sha256(Path(name).read_bytes()).digest())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
