"""One real run from start to end: what is asked for, the ranks that do it, and a result like a simulated one's."""

from __future__ import annotations

import hashlib
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from executor.launch import WorldError, launch
from executor.results import Output, read_output
from executor.settings import Backend, RunSettings, Settings, decode, encode, run_flags
from models.config import ModelConfig, load_model
from models.transformer import Layout, weight_bytes
from policy.profile_table import profile_from
from policy.scheduler import Admission
from sim.believe import profile_of
from sim.replay import Replayed, replay
from sim.simulate import Simulation
from sim.spec import NodeSpec, load_node
from traces.files import text_lines
from traces.metrics import metrics
from weft.runs import (
    Run,
    RunConfig,
    changed_options,
    check_lengths,
    check_options,
    describe_requests,
    draw_requests,
    layout_of,
    make_requests,
    make_scheduler,
    options_for,
)

# What a policy may withhold from compute and give to collectives on a GPU; which it takes, it decides by regime.
GPU_PARTITIONS = (0, 8, 16, 24, 32)
GPU_CTAS = (0, 8)
HIGHEST_PORT = 65_535
# A setting's text up to here is shown in a message; of longer ones the name must do. So many settings are named.
SHORT_TEXT = 40
MOST_SHOWN = 3
# Without GPUs as many processes as there must be for anything to be shared.
GLOO_RANKS = 2
# These tell communication from computation, which a graph that holds both hides.
SPLIT_KEYS = ("comm_share", "overlap_fraction", "compute_utilization", "link_utilization")


@dataclass(frozen=True, slots=True)
class World:
    """Where a run takes place. `num_layers` 0: all of the model's. Delays are the most of uniform random pauses, in
    microseconds. `dtype` "": float16 on GPUs, float32 on a CPU."""

    backend: Backend = "gloo"
    num_ranks: int = 2
    dtype: str = ""
    checkpoint: str = ""
    num_layers: int = 0
    host_delay_us: float = 0.0
    device_delay_us: float = 0.0
    timeout_s: float = 20.0
    bind_address: str = "127.0.0.1"
    port: int = 0


def count_gpus() -> int:
    """GPUs that this process may use, by their device files; the ranks ask the driver itself."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([word for word in visible.split(",") if word.strip()])
    return len([path for path in Path("/dev").glob("nvidia*") if path.name.removeprefix("nvidia").isdigit()])


def backend_and_ranks(backend: Backend | None, ranks: int | None) -> tuple[Backend, int]:
    """What was asked for, or else what this machine has: NCCL on all GPUs, or gloo on two processes."""
    gpus = count_gpus()
    chosen: Backend = backend or ("nccl" if gpus else "gloo")
    if ranks is not None:
        return chosen, ranks
    return chosen, (gpus or 1) if chosen == "nccl" else GLOO_RANKS


def model_of(config: RunConfig, world: World) -> ModelConfig:
    """The model, cut to its first layers where asked."""
    model = load_model(config.model)
    if not world.num_layers:
        return model
    if not 0 < world.num_layers <= model.num_layers:
        raise ValueError(f"--layers {world.num_layers} is not possible: {model.model_id} has {model.num_layers} layers")
    return replace(model, num_layers=world.num_layers)


def settings_of(config: RunConfig, world: World, output: Path, *, record: bool = False) -> Settings:
    """What the ranks are told. Raises ValueError if no run can be made of it."""
    config.check()
    if not 0 <= world.port <= HIGHEST_PORT:
        raise ValueError(f"--port {world.port} is not possible; give 1 to {HIGHEST_PORT}, or 0 for a free one")
    _check_address(world.bind_address)
    if world.num_ranks < 1:
        raise ValueError(f"--ranks {world.num_ranks} is not possible; give 1 or more")
    model = model_of(config, world)
    layout = layout_of(config.policy, world.num_ranks, config.tp, config.pp)
    if layout.num_ranks != world.num_ranks:
        raise ValueError(
            f"the layout TP{layout.tp} x PP{layout.pp} needs {layout.num_ranks} ranks, but there are {world.num_ranks}"
        )
    check_options(config.options, model)
    requests = make_requests(config)
    check_lengths(requests, model)
    on_gpu = world.backend == "nccl"
    for flag, value in (("--partition", config.options.partition), ("--comm-ctas", config.options.comm_ctas)):
        if not on_gpu and value > 0:
            raise ValueError(f"{flag} {value} needs GPUs; with gloo there are no SMs to share, leave it out")
    dtype: Any = world.dtype or ("float16" if on_gpu else "float32")
    run = RunSettings(
        model=model, layout=layout, policy=config.policy, options=options_for(config.policy, layout, config.options),
        requests=requests, dtype=dtype, seed=config.seed, checkpoint=world.checkpoint, record=record,
        host_delay_us=world.host_delay_us, device_delay_us=world.device_delay_us,
        partitions=GPU_PARTITIONS if on_gpu else (0,), ctas=GPU_CTAS if on_gpu else (0,),
        completions_path=str(output / "completions.jsonl"),
    )  # fmt: skip
    settings = Settings(
        runs=(run,), backend=world.backend, timeout_s=world.timeout_s, bind_address=world.bind_address, port=world.port,
        output=str(output),
    )  # fmt: skip
    settings.check()
    return settings


def _check_address(address: str) -> None:
    """Raises ValueError for an address that the rendezvous cannot listen on; an empty one would be all interfaces."""
    if not address:
        raise ValueError("--bind-address is empty; give an address of this machine, such as 127.0.0.1")
    try:
        socket.getaddrinfo(address, None, socket.AF_INET)
    except (OSError, UnicodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not the name of a machine"
        raise ValueError(
            f"--bind-address {address} cannot be resolved to an IPv4 address ({why}); "
            "give one of this machine, such as 127.0.0.1"
        ) from None


def execute(
    config: RunConfig, world: World, *, record: bool = False, progress: Callable[[int], object] = lambda finished: None
) -> tuple[Run, dict[str, Any]]:
    """Run it on real ranks; returns the result, and the details for a file. See `executing`."""
    with executing(config, world, record=record, progress=progress) as made:
        return made


@contextmanager
def executing(
    config: RunConfig, world: World, *, record: bool = False, progress: Callable[[int], object] = lambda finished: None
) -> Iterator[tuple[Run, dict[str, Any]]]:
    """Run it on real ranks; gives the result, and the details for a file, to a block that writes them.

    Raises ValueError if it is not possible, WorldError if a rank fails. What the ranks wrote is deleted when the block
    has ended well; if it has not, all of it is kept, and the message says where.
    """
    output = Path(tempfile.mkdtemp(prefix="weft-run-"))
    made = _run_ranks(config, world, output, record, progress)
    try:
        yield made
    except (OSError, ValueError, KeyboardInterrupt) as error:
        kind = ValueError if isinstance(error, ValueError) else type(error)
        again = f"the same command with --read-output {output} writes what it says"
        raise kind(f"{_why(error)}; the answers are in {output}: {again}") from None
    _remove(output, None)


def _run_ranks(
    config: RunConfig, world: World, output: Path, record: bool, progress: Callable[[int], object]
) -> tuple[Run, dict[str, Any]]:
    """The run itself. If it fails or is interrupted, the requests that were answered before are all that is kept."""
    completions = output / "completions.jsonl"
    kept, done = False, False
    try:
        settings = settings_of(config, world, output, record=record)
        launch(settings, progress)
        finished = read_output(str(output), 0)
        made = run_of(config, settings, finished), detailed_run(settings, finished)
        done = True
        return made
    except (WorldError, KeyboardInterrupt) as error:
        kept = completions.exists() and completions.stat().st_size > 0
        why = str(error) or "interrupted; all ranks were ended"
        raise type(error)(why + (f"; the answered requests are in {completions}" if kept else "")) from None
    finally:
        if not done:
            _remove(output, completions if kept else None)


def _why(error: BaseException) -> str:
    """The error in words; of a file it names the file."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error) or "interrupted"


def _remove(folder: Path, kept: Path | None) -> None:
    for path in folder.iterdir():
        if path != kept:
            path.unlink()
    if kept is None:
        folder.rmdir()


def run_of(config: RunConfig, settings: Settings, output: Output) -> Run:
    """The flat result: the keys of a simulated run, and what only a real one knows."""
    run, timeline = settings.runs[0], output.timeline
    slo_ms = config.options.slo_us / 1e3
    result = _describe(config, settings, output)
    result |= metrics(timeline, len(run.requests), slo_ms if slo_ms != float("inf") else None)
    if output.opaque:
        result |= dict.fromkeys(SPLIT_KEYS)
    rounds, launches = max(1, output.host_times[0].rounds), max(1, output.host_times[0].launches)
    first = output.host_times[0]
    result |= {
        "iterations": timeline.num_batches,
        "kernels": timeline.num_kernels,
        "rounds": timeline.num_rounds,
        "host_plan_us_per_round": first.plan_s / rounds * 1e6,
        "host_issue_us_per_round": first.issue_s / rounds * 1e6,
        "host_issue_us_per_launch": first.issue_s / launches * 1e6,
        "host_bound_fraction": max(busy.host_bound_us for busy in output.busy) / (output.wall_s * 1e6),
        "num_graphs": output.num_graphs,
        "output_checksum": output.checksum,
        "order_hash": output.order_hash,
        "rounds_hash": output.rounds_hash,
        "host": output.host,
        "wall_s": output.wall_s,
    }
    return Run(result, timeline)


def _describe(config: RunConfig, settings: Settings, output: Output) -> dict[str, Any]:
    run, host = settings.runs[0], output.host
    layout: Layout = run.layout
    node = f"{output.num_ranks} x {host['gpu']}" if host["gpu"] != "none" else f"{output.num_ranks} processes"
    return {
        "backend": settings.backend,
        "model_id": run.model.model_id,
        "num_layers": run.model.num_layers,
        "dtype": run.dtype,
        "node": f"{node}, {host['link_mode']}",
        "policy": config.policy,
        "tensor_parallel_size": layout.tp,
        "pipeline_parallel_size": layout.pp,
        **describe_requests(config),
        "request_rate": config.request_rate,  # 0 for a trace's own: what validation reads is a number
        "num_prompts": len(run.requests),
        "num_shortened": draw_requests(config)[1],
        "policy_options": changed_options(config.options),
        "seed": config.seed,
        "config_hash": hashlib.sha256(encode(settings).replace(settings.output.encode(), b"")).hexdigest()[:16],
        "weights_gb_per_gpu": weight_bytes(run.model, layout) / 1e9 * (2 if run.dtype == "float32" else 1),
        "gpu_memory_gb": None,
        "memory_notes": [],
        "estimates_used": [],
        "out_of_range": [],
    }


def read_run(config: RunConfig, world: World, folder: Path, *, record: bool) -> tuple[Run, dict[str, Any]]:
    """What torchrun left in a folder, as `execute` returns it. Raises ValueError if it was made with other settings."""
    output = read_output(str(folder), 0)
    settings = settings_of(config, world, folder, record=record)
    _check_made_with(decode(encode(settings), str(folder)).runs[0], output, folder)
    return run_of(config, settings, output), detailed_run(settings, output)


def _check_made_with(run: RunSettings, output: Output, folder: Path) -> None:
    """`run` has been written and read, as the ranks' settings were: 1 and 1.0 are then the same."""
    if not output.flags:
        raise ValueError(f"--read-output {folder}: it does not say which settings made it; run it again with this weft")
    asked = run_flags(run)
    names = [name for name in asked if name != "completions_path" and asked[name] != output.flags.get(name)]
    if names:
        some = [_difference(name, output.flags.get(name, ""), asked[name]) for name in names[:MOST_SHOWN]]
        shown = ", ".join([*some, f"and {len(names) - len(some)} more"] if len(names) > len(some) else some)
        raise ValueError(
            f"--read-output {folder}: it was made with other settings than these flags give ({shown}); "
            "give the flags that made its settings"
        )


def _difference(name: str, made: str, asked: str) -> str:
    """The name of a setting, and its values where they are short."""
    return f"{name} {made}, not {asked}" if max(len(made), len(asked)) <= SHORT_TEXT else name


def detailed_run(settings: Settings, output: Output) -> dict[str, Any]:
    """What the simulator needs to replay the run: its settings, what entered before which round, what was believed."""
    return {
        "settings": msgspec.json.decode(encode(settings)),
        "admission_log": msgspec.to_builtins(output.log),
        "profile": output.profile,
    }


class Saved(msgspec.Struct):
    """What a replay reads of the result of a run that was saved with details."""

    settings: dict[str, Any]
    admission_log: list[Admission]
    profile: dict[str, Any] | None
    rounds_hash: str
    duration: float
    mean_e2el_ms: float


def read_saved(path: Path) -> Saved:
    """The result in a file. Raises ValueError, which names the file, if it is none, or not the only one."""
    lines = [line for _, line in text_lines(path)]
    if len(lines) > 1 and _is_json(lines[0]):
        raise ValueError(f"{path}: {len(lines)} lines; a replay takes a file with one result, without --append-result")
    wanted = "give a result of weft run --save-result --save-detailed"
    try:
        raw = msgspec.json.decode("\n".join(lines))
    except msgspec.DecodeError as error:
        raise ValueError(f"{path}: not JSON ({error}); {wanted}") from None
    if not isinstance(raw, dict) or "admission_log" not in raw:
        raise ValueError(f"{path}: it has no log of admissions; {wanted}")
    try:
        return msgspec.convert(raw, Saved, strict=False)
    except msgspec.ValidationError as error:
        raise ValueError(f"{path}: not the result of a run ({error}); {wanted}") from None


def _is_json(line: str) -> bool:
    try:
        msgspec.json.decode(line)
    except msgspec.DecodeError:
        return False
    return True


def replay_result(path: Path, node: str) -> Replayed:
    """Run in the simulator, on one of its nodes, what a real run admitted; `path` is a result saved with details.

    The rounds are those of the real run, the times the simulated node's.
    """
    return replay_saved(read_saved(path), load_node(node), path)


def replay_saved(saved: Saved, node: NodeSpec, path: Path) -> Replayed:
    """Run it on a simulated node; `path` names it in errors."""
    run = decode(msgspec.json.encode(saved.settings), str(path)).runs[0]
    try:
        check_options(run.options, run.model, node)
        profile = profile_from(saved.profile) if saved.profile else profile_of(node)
        config = RunConfig(policy=run.policy, options=run.options)
        scheduler = make_scheduler(config, run.model, run.layout, profile)
        return replay(Simulation(node, run.layout, scheduler), run.requests, saved.admission_log)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
