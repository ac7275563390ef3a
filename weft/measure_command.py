"""`weft measure`: measure this machine through the executor's own kernels, for `weft calibrate` and `weft validate`."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from traces.measurement import NEEDED, SEEN
from weft.flags import path_of
from weft.outputs import version_of_weft

if TYPE_CHECKING:
    from executor.settings import Settings
    from traces.measurement import Measurement

# Enough different shapes for some to be kept out of every fit.
DEFAULT_MODELS = {"nccl": "opt-30b,glm-130b,llama-3-70b,opt-66b", "gloo": "tiny-opt,tiny-llama,tiny-glm"}
# More layers than a cache holds the weights of, and few enough to load at once.
DEFAULT_LAYERS = {"nccl": 6, "gloo": 2}
DEFAULT_BUDGET_S, DEFAULT_TIMEOUT_S = 600.0, 60.0
STAGING = "NCCL_P2P_DISABLE"
KINDS = tuple(kind for kind in NEEDED if kind not in SEEN)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `weft measure` to the command line."""
    text = "measure kernels, collectives, pairs, host costs and schedules on this machine's GPUs, or on CPU processes"
    parser = subparsers.add_parser("measure", help="measure this machine for a fitted node", description=text)
    out_help = "folder for the rows; one that is there is continued, if the conditions are the same"
    parser.add_argument("--out", type=path_of, required=True, metavar="DIR", help=out_help)
    budget_help = "seconds to measure, once all ranks are there (default: 600); a coarse grid comes first"
    parser.add_argument("--budget-s", type=float, default=DEFAULT_BUDGET_S, metavar="S", help=budget_help)
    models_help = f"ids or files, separated by commas; pairs and schedules are those of the first two (default: \
{DEFAULT_MODELS['nccl']})"
    parser.add_argument("--models", default="", metavar="A,B", help=models_help)
    kinds_help = f"kinds to measure, separated by commas, of {', '.join(KINDS)}; how GEMMs and \
collectives are launched comes with them, after the budget (default: all)"
    parser.add_argument("--kinds", default="", metavar="A,B", help=kinds_help)
    parser.add_argument("--layers", type=int, default=0, metavar="N", help="layers of each model (default: 6; gloo: 2)")
    mode_help = "host-staged keeps GPUs from reaching each other directly (default: as-is)"
    parser.add_argument("--link-mode", choices=("as-is", "host-staged"), default="as-is", help=mode_help)
    parser.add_argument("--backend", choices=("nccl", "gloo"), help="default: nccl where there are GPUs, else gloo")
    parser.add_argument("--ranks", type=int, metavar="N", help="processes (default: the GPUs of this machine; gloo: 2)")
    tp_help = "with one rank: its kernels are those of one of N tensor-parallel ranks, so that one GPU measures the \
kernels of several (default: the ranks)"
    parser.add_argument("--tp", type=int, metavar="N", help=tp_help)
    dtype_help = "float32, float16 or bfloat16 (default: float16 on GPUs, float32 with gloo)"
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="", help=dtype_help)
    timeout_help = "a rank that does not respond for so long ends the survey (default: 60)"
    parser.add_argument("--timeout-s", type=float, default=DEFAULT_TIMEOUT_S, metavar="S", help=timeout_help)
    parser.add_argument("--disable-tqdm", action="store_true", help="no progress bar")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, and say what there is now."""
    from executor.launch import WorldError, launch
    from traces.measurement import check_unwritten
    from weft.progress import bar

    if not 0.0 < args.budget_s < math.inf:
        raise ValueError(f"--budget-s {args.budget_s:g} is not possible; give more than 0 seconds")
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out} is a file; give a folder")
    kinds = kinds_of(args.kinds)
    settings = settings_of(args)
    _check_kinds(kinds, settings)
    check_unwritten(args.out)
    before = _count(args.out)
    try:
        with (
            _link_mode(args.link_mode, settings.backend),
            bar(math.ceil(args.budget_s), "s", disable=args.disable_tqdm) as progress,
        ):
            shards = (args.tp or settings.num_ranks) // settings.num_ranks
            launch(settings, progress.update, _program(args.budget_s, shards, kinds))
    except WorldError as error:
        # The launcher counts requests, of which there are none here.
        raise WorldError(str(error).partition("; all ranks were ended")[0] + _kept(args.out, before)) from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted" + _kept(args.out, before)) from None
    print("\n".join(report(args.out)))
    return 0


def settings_of(args: argparse.Namespace) -> Settings:
    """What the ranks are told: a run per model, whose requests nobody serves. Raises ValueError for what cannot be."""
    from executor.settings import RunSettings, Settings
    from models.transformer import Layout
    from policy.options import Options
    from traces.request import Request
    from weft.executed import backend_and_ranks

    backend, ranks = backend_and_ranks(args.backend, args.ranks)
    if ranks < 1:
        raise ValueError(f"--ranks {ranks} is not possible; give 1 or more")
    dtype: Any = args.dtype or ("float16" if backend == "nccl" else "float32")
    runs = tuple(
        RunSettings(model=model, layout=Layout(ranks, 1), policy="tensor", requests=(Request(0, 0.0, 16),),
                    options=Options(depth=2), dtype=dtype, warm_up=False, timing=False)
        for model in shards_of(
            models_of(args.models or DEFAULT_MODELS[backend], args.layers or DEFAULT_LAYERS[backend]), ranks, args.tp
        )
    )  # fmt: skip
    settings = Settings(runs=runs, backend=backend, timeout_s=args.timeout_s, output=str(args.out.absolute()))
    settings.check()
    return settings


def kinds_of(names: str) -> tuple[str, ...]:
    """Kinds by name. Raises ValueError for one that there is not."""
    found = tuple(filter(None, (word.strip() for word in names.split(","))))
    for name in found:
        if name not in KINDS:
            raise ValueError(f"--kinds {name} is not a kind; there are {', '.join(KINDS)}")
    return found


def _check_kinds(kinds: tuple[str, ...], settings: Settings) -> None:
    """Raises ValueError if none of the kinds that were asked for can be measured by these ranks."""
    from executor.survey_lead import why_never

    whys = [why_never(kind, settings.num_ranks, on_gpu=settings.backend == "nccl") for kind in kinds]
    if whys and all(whys):
        where = f"--ranks {settings.num_ranks} and {settings.backend}"
        raise ValueError(f"--kinds {','.join(kinds)} is not possible with {where}: {whys[0]}")


def models_of(names: str, num_layers: int) -> list[Any]:
    """Models by id or file, each cut to its first layers."""
    from models.config import load_model

    found: dict[str, Any] = {}
    for name in filter(None, (word.strip() for word in names.split(","))):
        model = load_model(name)
        if not 0 < num_layers <= model.num_layers:
            raise ValueError(f"--layers {num_layers} is not possible: {model.model_id} has {model.num_layers} layers")
        found[model.model_id] = replace(model, num_layers=num_layers)
    if not found:
        raise ValueError(f"--models {names!r} names no model")
    return list(found.values())


def shards_of(models: list[Any], ranks: int, tp: int | None) -> list[Any]:
    """Models as one rank of `tp` has them, each as a model of its own; as they are if the ranks are as many. Raises
    ValueError where several ranks stand for others, or a model cannot be shared so."""
    from models.transformer import Layout

    if tp is None or tp == ranks:
        return models
    if ranks != 1 or tp < 1:
        raise ValueError(f"--tp {tp} is not possible with --ranks {ranks}; give --ranks 1, or leave --tp out")
    for model in models:
        Layout(tp, 1).check(model)
    return [
        replace(m, num_heads=m.num_heads // tp, num_kv_heads=max(1, m.num_kv_heads // tp), ffn_size=m.ffn_size // tp,
                vocab_size=-(-m.vocab_size // tp))
        for m in models
    ]  # fmt: skip


@contextmanager
def _link_mode(link_mode: str, backend: str) -> Iterator[None]:
    """Ranks inherit the environment. As-is is what this environment already says, unless it says host-staged."""
    if link_mode == "host-staged" and backend != "nccl":
        raise ValueError("--link-mode host-staged needs nccl: processes on a CPU reach each other in one way only")
    before = os.environ.get(STAGING)
    if link_mode == "as-is" and before == "1":
        raise ValueError(f"{STAGING}=1 is set, which is --link-mode host-staged; ask for that, or unset it")
    if link_mode == "host-staged":
        os.environ[STAGING] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(STAGING, None)


def _program(budget_s: float, num_shards: int, kinds: tuple[str, ...]) -> tuple[str, ...]:
    import msgspec

    told = {"budget_s": budget_s, "weft": version_of_weft(missing=""), "num_shards": num_shards, "kinds": kinds}
    orders = msgspec.json.encode(told).decode()
    return (sys.executable, "-m", "executor.survey", orders)


def _count(folder: Path) -> int:
    """Rows that are there; those that cannot be read are told of later, by the rank that goes on with them."""
    from traces.measurement import read_measurements

    try:
        return len(read_measurements(folder)[1])
    except ValueError:
        return 0


def _kept(folder: Path, before: int) -> str:
    """What an end before the time leaves."""
    rows = _count(folder)
    return f"; {rows} rows are in {folder}, and the same command goes on from there" if rows > before else ""


def report(folder: Path) -> list[str]:
    """What is in a folder: rows by kind with their spread, what is missing and why, and where it was measured."""
    import json

    from traces.measurement import MANIFEST, read_measurements

    conditions, rows = read_measurements(folder)
    manifest = json.loads((folder / MANIFEST).read_bytes())
    where = f"{conditions.num_gpus} x {conditions.gpu}" if conditions.gpu != "none" else "processes on a CPU"
    lines = [f"{folder}: {len(rows)} rows of {where}, {conditions.link_mode}, torch {conditions.torch}"]
    counts = Counter(row.what for row in rows)
    for what in NEEDED:
        skipped = manifest["skipped"].get(what)
        if what in SEEN and not (counts[what] or skipped):
            continue
        text = f"  {what:<12}{counts[what]:>6} rows"
        if counts[what] and what not in SEEN:
            text += f", median spread {100.0 * _spread([row for row in rows if row.what == what]):.1f} %"
        if skipped:
            text += f"; {skipped['points'] or 'all'} skipped: {skipped['why']}"
        lines.append(text)
    return lines


def _spread(rows: list[Measurement]) -> float:
    """The median over rows of the interquartile range, as a share of the median; of pairs, the first value's."""
    shares = sorted(next(iter(row.spread.values())) / next(iter(row.values.values())) for row in rows)
    return shares[len(shares) // 2]
