"""`weft validate`: how far the simulator is from the hardware, level by level, on what no fit ever saw."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from traces.files import write_whole
from weft.flags import path_of

if TYPE_CHECKING:
    from calibration.validate import Inputs, Validation
    from calibration.validate_serving import Served
    from sim.spec import NodeSpec
    from traces.timeline import Span
    from weft.executed import World
    from weft.runs import RunConfig

LIVE_POLICIES = ("tensor", "interleaved")
LIVE_RATES = (20.0, math.inf)
RESULT, LIVE_RUNS = "validation.json", "live-runs.jsonl"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `weft validate` to the command line."""
    parser = subparsers.add_parser(
        "validate", help="one error table of the simulator against hardware", description=__doc__
    )
    parser.add_argument("--node", required=True, metavar="NODE", help="node name (see: weft nodes), or a TOML file")
    measured_help = "folders of weft measure, or files or folders of forward*.jsonl from benchmarks/gpu_suite.py"
    parser.add_argument("--measurements", type=Path, nargs="+", default=[], metavar="DIR", help=measured_help)
    runs_help = "results of weft run --save-result --save-detailed; runs of equal settings are repeats"
    parser.add_argument("--runs", type=Path, nargs="+", default=[], metavar="FILE", help=runs_help)
    timeline_help = "rank 0's files of weft run --timeline, one for each recorded run among --runs, in their order"
    parser.add_argument("--timeline", type=Path, nargs="+", default=[], metavar="FILE", help=timeline_help)
    all_help = "also single kernels and pairs that a fit may have seen (default: held-out shapes alone)"
    parser.add_argument("--all-rows", action="store_true", help=all_help)
    out_help = f"folder for {RESULT} and the pictures; made if missing"
    parser.add_argument("--out", type=path_of, metavar="DIR", help=out_help)
    parser.add_argument("--disable-tqdm", action="store_true", help="no progress bar")
    _add_live_flags(parser)
    parser.set_defaults(run=run)


def _add_live_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("runs made now")
    live_help = "make runs here, of every policy at every rate, and hold the node against them"
    group.add_argument("--live", action="store_true", help=live_help)
    policy_help = f"policies to run (default: {' '.join(LIVE_POLICIES)})"
    group.add_argument("--policy", nargs="+", default=LIVE_POLICIES, metavar="POLICY", help=policy_help)
    group.add_argument("--backend", choices=("nccl", "gloo"), help="default: nccl where there are GPUs, else gloo")
    group.add_argument("--ranks", type=int, metavar="N", help="processes (default: the GPUs of this machine; gloo: 2)")
    group.add_argument("--model", help="model id or JSON file (default: tiny-opt with gloo, llama-3-8b)")
    group.add_argument("--layers", type=int, default=0, metavar="N", help="only the model's first N layers")
    rate_help = "requests per second; inf: all at once (default: 20 inf)"
    group.add_argument("--request-rate", type=float, nargs="+", default=LIVE_RATES, metavar="RATE", help=rate_help)
    group.add_argument("--num-prompts", type=int, default=60, metavar="N", help="requests a run (default: 60)")
    group.add_argument("--input-len", default="16:128", metavar="LEN", help="prompt tokens (default: 16:128)")
    repeats_help = "how often every run is made; two or more show its own spread (default: 2)"
    group.add_argument("--repeats", type=int, default=2, metavar="N", help=repeats_help)


def run(args: argparse.Namespace) -> int:
    """Print the table; write everything where asked for. Large errors are a result, not a failure."""
    from calibration.compare import read_sources
    from calibration.validate import Inputs
    from calibration.validate_serving import read_runs
    from sim.spec import load_node
    from weft.outputs import check_writable

    if not (args.measurements or args.runs or args.live):
        raise ValueError("nothing to compare with; give --measurements, --runs or --live")
    if args.timeline and not args.runs:
        raise ValueError("--timeline shows recorded runs; give their results with --runs")
    node = load_node(args.node)
    sources = tuple(source for path in args.measurements for source in read_sources(path, node))
    runs = read_runs(args.runs)
    recorded = _recorded(args.timeline, runs)
    # Written at the end; what cannot be should be known before it takes long, and before anything is replaced.
    live_runs = _live_runs(args) if args.live else None
    if args.out is not None:
        for name in (RESULT, LIVE_RUNS):
            check_writable(args.out / name, may_make_folder=True)
    if live_runs is not None:
        with _folder(args.out) as folder:
            live, spans = _live(args, live_runs, folder)
        runs, recorded = runs + live, recorded + spans
    found = _validate(args, node, Inputs(sources, tuple(runs), args.all_rows), recorded)
    from calibration.validate_text import table

    print("\n".join(table(found)))
    if args.out is not None:
        for path in _write(found, args.out):
            print(f"wrote {path}")
    return 0


def _recorded(files: list[Path], runs: list[Served]) -> list[tuple[Served, list[Span]]]:
    """The recorded runs with their spans, in order."""
    from calibration.validate_timeline import read_spans

    if not files:
        return []
    recorded = [served for served in runs if served.run.record]
    if len(recorded) != len(files):
        raise ValueError(
            f"--timeline names {len(files)} files, but {len(recorded)} of the runs were recorded; give the file that "
            "weft run --timeline wrote for rank 0, one for each"
        )
    return [(served, read_spans(path)) for served, path in zip(recorded, files, strict=True)]


def _validate(
    args: argparse.Namespace, node: NodeSpec, inputs: Inputs, recorded: list[tuple[Served, list[Span]]]
) -> Validation:
    from datetime import date

    from calibration.validate import validate
    from calibration.validate_timeline import stretch_of
    from weft.progress import bar

    with bar(inputs.num_steps(), "points", disable=args.disable_tqdm) as progress:
        found = validate(node, inputs, date.today(), lambda: progress.update(1))
    found.stretches = [stretch_of(node, served, spans) for served, spans in recorded]
    return found


def _write(found: Validation, folder: Path) -> list[Path]:
    from calibration.validate import as_json
    from calibration.validate_plots import write_pictures

    folder.mkdir(parents=True, exist_ok=True)
    result = folder / RESULT
    write_whole(result, json.dumps(as_json(found), indent=1, allow_nan=False).encode() + b"\n")
    return [result, *write_pictures(found, folder)]


# -- runs made now ---------------------------------------------------------------------------------------------------


@contextmanager
def _folder(out: Path | None) -> Iterator[Path]:
    """Where live runs are kept: the folder asked for, or one that goes away."""
    if out is not None:
        yield out
        return
    with TemporaryDirectory() as folder:
        yield Path(folder)


def _live_runs(args: argparse.Namespace) -> tuple[World, list[RunConfig]]:
    """Where runs are made, and every policy at every rate, repeated. Raises ValueError if one is not possible."""
    from weft.executed import World, backend_and_ranks, settings_of
    from weft.flags import MOST_PROMPTS
    from weft.run_command import DEFAULT_MODELS
    from weft.runs import RunConfig

    if args.repeats < 1:
        raise ValueError(f"--repeats {args.repeats} is not possible; give 1 or more")
    if not 1 <= args.num_prompts <= MOST_PROMPTS:
        raise ValueError(f"--num-prompts {args.num_prompts} is not possible; give 1 to {MOST_PROMPTS}")
    backend, ranks = backend_and_ranks(args.backend, args.ranks)
    world, model = World(backend, ranks, num_layers=args.layers), args.model or DEFAULT_MODELS[backend]
    common: dict[str, Any] = {"num_prompts": args.num_prompts, "input_len": args.input_len, "model": model}
    kinds = [RunConfig(policy=p, request_rate=rate, **common) for p in args.policy for rate in args.request_rate]
    for config in kinds:
        settings_of(config, world, Path())
    return world, [config for config in kinds for _ in range(args.repeats)]


def _live(
    args: argparse.Namespace, live_runs: tuple[World, list[RunConfig]], folder: Path
) -> tuple[list[Served], list[tuple[Served, list[Span]]]]:
    """The runs; then one more, recorded for its timeline. Runs of an earlier time are replaced once the first one has
    come to its end."""
    import msgspec

    from calibration.validate_serving import read_runs
    from weft.progress import bar

    world, configs = live_runs
    path = folder / LIVE_RUNS
    with bar(len(configs) + 1, "runs", disable=args.disable_tqdm) as progress:
        for number, config in enumerate(configs):
            _execute(config, world, path, append=number > 0)
            progress.update(1)
        last = msgspec.structs.replace(configs[-1], request_rate=args.request_rate[0])
        spans = _execute(last, world, path, record=True)
    runs = read_runs([path])
    return runs, [(runs[-1], [span for span in spans if span.rank == 0])]


def _execute(config: RunConfig, world: World, path: Path, *, append: bool = True, record: bool = False) -> list[Span]:
    """One real run, its result added to the file (or in its place); returns its spans."""
    from weft.executed import execute
    from weft.outputs import save
    from weft.report import encode
    from weft.simulate_command import detailed

    finished, more = execute(config, world, record=record)
    save(path, encode(detailed(finished.timeline) | more | finished.result), append=append)
    return finished.timeline.spans
