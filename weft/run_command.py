"""`weft run`: one run of one policy on real ranks: GPUs with NCCL, or processes with gloo on any machine."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from traces.files import write_whole
from weft.flags import add_layout_flags, add_policy_flags, add_workload_flags, config_of, path_of
from weft.outputs import check_outputs, dated, given_name, parse_metadata, rate_name, save, short_name
from weft.simulate_command import POLICY_HELP, add_result_flags, detailed, further_percentiles, parse_percentiles

if TYPE_CHECKING:
    from weft.executed import World
    from weft.runs import Run, RunConfig

DEFAULT_MODELS = {"gloo": "tiny-opt", "nccl": "llama-3-8b"}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `weft run` to the command line."""
    parser = subparsers.add_parser(
        "run", help="one run of one policy on real GPUs, or on CPU processes", description=__doc__
    )
    model_help = "model id, or a JSON file such as a Hugging Face config.json (default: tiny-opt with gloo, llama-3-8b)"
    parser.add_argument("--model", help=model_help)
    parser.add_argument("--policy", default="interleaved", help=f"{POLICY_HELP} (default: interleaved)")
    add_workload_flags(parser)
    add_layout_flags(parser)
    add_policy_flags(parser)
    add_result_flags(parser)
    _add_world_flags(parser)
    parser.set_defaults(run=run)


def _add_world_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("ranks")
    group.add_argument("--backend", choices=("nccl", "gloo"), help="default: nccl where there are GPUs, else gloo")
    group.add_argument("--ranks", type=int, metavar="N", help="processes (default: the GPUs of this machine; gloo: 2)")
    dtype_help = "float32, float16 or bfloat16 (default: float16 on GPUs, float32 with gloo)"
    group.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="", help=dtype_help)
    checkpoint_help = "folder with safetensors and config.json (default: random weights by seed)"
    group.add_argument("--checkpoint", type=path_of, metavar="DIR", help=checkpoint_help)
    group.add_argument("--layers", type=int, default=0, metavar="N", help="only the model's first N layers")
    delay_help = "random pauses of every rank's {}, up to so many microseconds: a test of correctness"
    group.add_argument("--host-delay-us", type=float, default=0.0, metavar="US", help=delay_help.format("host"))
    group.add_argument("--device-delay-us", type=float, default=0.0, metavar="US", help=delay_help.format("lanes"))
    timeout_help = "a rank that stands still for so long fails the run (default: 20)"
    group.add_argument("--timeout-s", type=float, default=20.0, metavar="S", help=timeout_help)
    bind_help = "address that the rendezvous listens on (default: 127.0.0.1, this machine alone)"
    group.add_argument("--bind-address", default="127.0.0.1", metavar="ADDRESS", help=bind_help)
    group.add_argument("--port", type=int, default=0, help="port of the rendezvous (default: a free one)")
    timeline_help = "write a Chrome trace, one file per rank: NAME.trace.json.gz (opens in Perfetto)"
    group.add_argument("--timeline", type=path_of, metavar="FILE", help=timeline_help)
    write_help = "run nothing; write the settings for `torchrun -m executor --settings FILE`"
    group.add_argument("--write-settings", type=path_of, metavar="FILE", help=write_help)
    read_help = "run nothing; report what torchrun left in this folder, given the flags that made its settings"
    group.add_argument("--read-output", type=path_of, metavar="DIR", help=read_help)


def run(args: argparse.Namespace) -> int:
    """Run, print the block of numbers, and save what was asked for."""
    world = _world(args)
    model = _model(args, world)
    config = config_of(args, model=model, policy=args.policy)
    percentiles, extra = parse_percentiles(args.metric_percentiles), parse_metadata(args.metadata, args.label)
    result_file = _result_file(args, config, world)
    if args.write_settings is not None:
        _check_write_settings(args)
    check_outputs(result_file, args.timeline, args.write_settings, may_make_folder=args.result_dir is not None)
    if args.write_settings is not None:
        return _write_settings(args, config, world)
    with _finished(args, config, world) as (finished, more):
        finished.result.update(further_percentiles(finished.timeline, percentiles))
        details = detailed(finished.timeline) | more if args.save_detailed else {}
        saved: list[Path] = []
        try:
            _save(args, finished, result_file, extra | details, saved)
        finally:
            print("\n".join([console_block(finished.result), *(f"wrote {path}" for path in saved)]))
    return 0


def _model(args: argparse.Namespace, world: World) -> str:
    if args.model == "":
        raise ValueError("--model is empty; give a model id or a JSON file, or leave it out for the default")
    return args.model or (str(args.checkpoint) if args.checkpoint else DEFAULT_MODELS[world.backend])


def _world(args: argparse.Namespace) -> World:
    from weft.executed import World, backend_and_ranks

    backend, ranks = backend_and_ranks(args.backend, args.ranks)
    return World(
        backend, ranks, args.dtype, str(args.checkpoint or ""), args.layers, args.host_delay_us, args.device_delay_us,
        args.timeout_s, args.bind_address, args.port,
    )  # fmt: skip


@contextmanager
def _finished(args: argparse.Namespace, config: RunConfig, world: World) -> Iterator[tuple[Run, dict[str, Any]]]:
    """The result and its details, made now or read. What the ranks left is there until the block has ended well."""
    from weft.executed import executing, read_run
    from weft.progress import bar
    from weft.runs import make_requests

    record = args.timeline is not None
    if args.read_output is not None:
        yield read_run(config, world, args.read_output, record=record)
        return
    with ExitStack() as stack:
        with bar(len(make_requests(config)), "requests", disable=args.disable_tqdm) as progress:
            made = stack.enter_context(executing(config, world, record=record, progress=progress.update))
        yield made


def _check_write_settings(args: argparse.Namespace) -> None:
    """Raises ValueError for a file beside which no folder of its name can be, and for flags that would be ignored."""
    path, folder = args.write_settings, args.write_settings.with_suffix("")
    if not path.suffix:
        raise ValueError(
            f"--write-settings {path}: give the name an ending, as in {path}.json; {path} will be the results' folder"
        )
    if folder.exists() and not folder.is_dir():
        raise ValueError(
            f"--write-settings {path}: results would go to {folder}, which is no folder; give another name"
        )
    if args.read_output is not None:
        raise ValueError("--write-settings is for before the ranks run and --read-output for after; give one of them")
    given = {
        "--save-result": args.save_result,
        "--save-detailed": args.save_detailed,
        "--append-result": args.append_result,
        "--result-dir": args.result_dir,
        "--result-filename": args.result_filename,
        "--metadata": args.metadata,
        "--label": args.label,
        "--metric-percentiles": args.metric_percentiles,
    }
    if ignored := [flag for flag, value in given.items() if value]:
        raise ValueError(
            f"--write-settings runs nothing, so there is no result for {', '.join(ignored)}; give it to --read-output"
        )


def _write_settings(args: argparse.Namespace, config: RunConfig, world: World) -> int:
    from executor.settings import encode
    from weft.executed import settings_of

    folder = args.write_settings.with_suffix("")
    settings = settings_of(config, world, folder.absolute(), record=args.timeline is not None)
    write_whole(args.write_settings, encode(settings))
    folder.mkdir(exist_ok=True)
    print(f"wrote {args.write_settings}; results will be in {folder}. Start {world.num_ranks} ranks, for example:")
    print(f"  torchrun --nproc-per-node {world.num_ranks} -m executor --settings {args.write_settings}")
    return 0


def _result_file(args: argparse.Namespace, config: RunConfig, world: World) -> Path | None:
    name = given_name(args.result_filename)
    if not (args.save_result or args.append_result or args.save_detailed or name):
        return None
    if name:
        return Path(args.result_dir or "") / name
    parts = (
        world.backend,
        rate_name(config.request_rate),
        short_name(config.model),
        f"{world.num_ranks}ranks",
        config.policy,
    )
    return Path(args.result_dir or "") / ("-".join(parts) + ".json")


def _save(
    args: argparse.Namespace, finished: Run, result_file: Path | None, extra: dict[str, Any], saved: list[Path]
) -> None:
    """Write what was asked for, the result first, as a timeline may fill the disk; `saved` is told what was written."""
    from weft.report import encode

    if result_file is not None:
        save(result_file, encode(dated(extra | finished.result)), append=args.append_result)
        saved.append(result_file)
    if args.timeline is not None:
        from traces.chrome import write_chrome_trace

        saved += write_chrome_trace(finished.timeline, args.timeline)


def console_block(result: dict[str, Any]) -> str:
    """The numbers of a real run, laid out as those of a simulated one."""
    from weft.report import WIDTH, gpu_rows, latency_rows, policy_text, request_rows, row, title

    lines = [
        title(" Serving Benchmark Result ", "="),
        row("Model:", f"{result['model_id']} ({result['num_layers']} layers, {result['dtype']})"),
        row("Ranks:", f"{result['node']} ({result['backend']})"),
        row("Policy:", policy_text(result)),
        *request_rows(result),
        *latency_rows(result),
        *gpu_rows(result),
        title("Execution", "-"),
        row("Host, plan per round (us):", result["host_plan_us_per_round"]),
        row("Host, issue per launch (us):", result["host_issue_us_per_launch"]),
        row("Device waited for the host (%):", 100.0 * result["host_bound_fraction"]),
        row("Batches / rounds / kernels:", f"{result['iterations']:,} / {result['rounds']:,} / {result['kernels']:,}"),
        row("Output checksum:", result["output_checksum"][:16]),
    ]
    return "\n".join([*lines, "=" * WIDTH])
