"""`weft calibrate`: a node from measurements, with standard errors, and how far it is from what it did not see."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

from weft.flags import path_of

if TYPE_CHECKING:
    from calibration.fit import About, Fit, Told
    from sim.spec import NodeSpec
    from traces.measurement import Conditions, Measurement

DEFAULT_BASE = "h200-nvlink-x4"
REPORT_FILES = TEXT, DATA = "report.txt", "report.json"
UNFINISHED = "unfinished: the survey was cut off or still runs"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `weft calibrate` to the command line."""
    help_text = "fit a simulated node to measurements"
    parser = subparsers.add_parser("calibrate", help=help_text, description=__doc__)
    folders_help = "folders that `weft measure` or `weft import` wrote, all of one machine and link mode"
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help=folders_help)
    out_help = "the node file to write; its name becomes the node's"
    parser.add_argument("--out", type=path_of, required=True, metavar="NODE.toml", help=out_help)
    base_help = f"node that keeps what the measurements cannot tell (default: {DEFAULT_BASE})"
    parser.add_argument("--base", default=DEFAULT_BASE, metavar="NODE", help=base_help)
    report_help = "folder for the report: text, JSON, a picture per class, and beliefs for policies"
    parser.add_argument("--report", type=path_of, metavar="DIR", help=report_help)
    parser.add_argument("--seed", type=int, default=0, help="seed of the resampling behind standard errors")
    parser.add_argument("--disable-tqdm", action="store_true", help="no progress bar")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Read, fit, print, write."""
    from calibration.fit import fit_node
    from calibration.node_file import write_node
    from calibration.report import lines_of
    from sim.fitted import machine_words, same_gpu
    from sim.spec import load_node
    from weft.outputs import check_writable

    if args.out.suffix != ".toml":
        raise ValueError(f"--out {args.out}: a node file must be named *.toml")
    if args.seed < 0:
        raise ValueError(f"--seed {args.seed} is negative; give 0 or more")
    # A fit may take minutes; what cannot be written should be known before.
    check_writable(args.out)
    if args.report is not None:
        _check_report(args.report, args.out)
    base = load_node(args.base)
    conditions, rows, about = read_folders(args.folders, args.out.stem)
    cautions = [f"{folder}: {UNFINISHED}" for folder, c in zip(args.folders, conditions, strict=True) if not c.finished]
    if not same_gpu(about.gpu, base.device.name):
        cautions.append(
            f"foreign: the measurements are of {machine_words(about.gpu)}, the base node {base.name} is "
            f"{base.device.name}; what was not measured stays that of the base (--base)"
        )
    cautions += _stale(about)
    with _progress(disable=args.disable_tqdm) as told:
        fit = fit_node(rows, on_machine(base, several(conditions)), about, args.seed, told)
    print("\n".join(lines_of(fit)))
    for caution in cautions:
        print(f"caution: {caution}")
    write_node(args.out, fit.node)
    for path in [args.out, *(_write_report(fit, rows, args.report) if args.report is not None else [])]:
        print(f"wrote {path}")
    return 0


@contextmanager
def _progress(*, disable: bool) -> Iterator[Told]:
    """A bar that says what is being fitted, and to how many rows: thousands of GEMMs take minutes."""
    from calibration.fit import STAGES
    from weft.progress import bar

    with bar(len(STAGES), "parts", disable=disable) as progress:

        def told(stage: str, num_rows: int) -> None:
            progress.n = STAGES.index(stage)
            progress.set_description(f"{stage}, {num_rows:,} rows")

        yield told


def _check_report(folder: Path, node_file: Path) -> None:
    """Raises ValueError if the report cannot be written, or stands where the node file will."""
    from weft.outputs import check_writable

    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--report {folder} is a file; give the name of a folder")
    if folder.resolve() == node_file.resolve():
        raise ValueError(f"--report {folder} is the node file that --out names; give each a name of its own")
    for name in REPORT_FILES:
        check_writable(folder / name, may_make_folder=True)


def read_folders(folders: list[Path], name: str) -> tuple[list[Conditions], list[Measurement], About]:
    """The rows of all folders. Raises ValueError if they are not of one machine and link mode."""
    import hashlib

    from calibration.fit import About
    from traces.measurement import ROWS, read_measurements

    conditions: list[Conditions] = []
    rows: list[Measurement] = []
    hashes: dict[str, str] = {}
    for folder in folders:
        found, some = read_measurements(folder)
        for other, known in zip(folders, conditions, strict=False):
            if why := _difference(known, found):
                raise ValueError(f"{folder}: not of the same machine as {other}: {why}; calibrate them apart")
        if folder.resolve().name in hashes:
            raise ValueError(f"{folder}: two folders of that name; give each a name of its own")
        conditions.append(found)
        rows += some
        path = folder / ROWS
        hashes[folder.resolve().name] = hashlib.sha256(path.read_bytes() if path.exists() else b"").hexdigest()
    # What is said of links is what those said that have some.
    first = several(conditions)
    told = {"link_mode": first.link_mode, "num_gpus": str(first.num_gpus), "driver": first.driver,
            "torch": first.torch, "nccl": first.nccl, "dtype": first.dtype, "weft": first.weft}  # fmt: skip
    # The oldest rows decide how old the fit is.
    measured = min((c.date for c in conditions if c.date), default="")
    return conditions, rows, About(name, measured[:10] or "undated", first.gpu, told | first.environment, hashes)


def several(conditions: list[Conditions]) -> Conditions:
    """The first that are of several GPUs, which say what links there are; the first if none are."""
    return next((c for c in conditions if c.num_gpus > 1), conditions[0])


def on_machine(base: NodeSpec, conditions: Conditions) -> NodeSpec:
    """The base node with as many SMs as the machine's GPUs had, if it says; and with as many GPUs, if fewer were
    measured together: nothing is known of more."""
    import msgspec

    from sim.fitted import same_gpu

    device, link, gpus, description = base.device, base.link, base.num_gpus, base.description
    if conditions.num_sms > 0 and conditions.num_sms != device.num_sms:
        device = msgspec.structs.replace(device, num_sms=conditions.num_sms)
    if 1 < conditions.num_gpus < gpus and "imported" not in conditions.environment:
        gpus = conditions.num_gpus
        tables = tuple(table for table in link.tables if table.ranks <= gpus)
        link = msgspec.structs.replace(link, tables=tables, pairs=tuple(p for p in link.pairs if max(p) < gpus))
        if same_gpu(conditions.gpu, device.name):
            description = description.replace(f"{base.num_gpus} x ", f"{gpus} x ")
    return msgspec.structs.replace(base, device=device, link=link, num_gpus=gpus, description=description)


def _difference(one: Conditions, two: Conditions) -> str:
    # The environment of imported rows names the files that they came from; one GPU has no links.
    imported = "imported" in one.environment or "imported" in two.environment
    alone = min(one.num_gpus, two.num_gpus) == 1
    links = () if alone else ("link_mode",)
    for name in ("gpu", "num_sms", *links, *(() if imported or alone else ("environment",))):
        if getattr(one, name) != getattr(two, name):
            return f"{name} is {getattr(two, name)!r}, not {getattr(one, name)!r}"
    return ""


def _stale(about: About) -> list[str]:
    from sim.fitted import STALE_DAYS, age_days

    age = age_days(about.date, date.today())
    if age is None:
        return ["the measurements say no date"]
    return [f"stale: the measurements are {age} days old ({about.date})"] if age > STALE_DAYS else []


def _write_report(fit: Fit, rows: list[Measurement], folder: Path) -> list[Path]:
    import json

    from calibration.node_file import beliefs, measured_models
    from calibration.plots import write_plots
    from calibration.report import data_of, lines_of
    from traces.files import write_whole

    folder.mkdir(parents=True, exist_ok=True)
    paths = write_plots(fit, folder)
    texts = {TEXT: "\n".join(lines_of(fit)) + "\n", DATA: json.dumps(data_of(fit), indent=1) + "\n"}
    for config, tp in measured_models(rows, fit.node):
        texts[f"profile-{config.model_id}-tp{tp}.json"] = json.dumps(beliefs(fit.node, config, tp, rows)) + "\n"
    for name, text in texts.items():
        write_whole(folder / name, text.encode())
        paths.append(folder / name)
    return paths
