"""`weft explore`: which latency at which throughput every policy reaches, as a picture, a table and files."""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from weft.flags import add_policy_flags, add_workload_flags, config_of, path_of

if TYPE_CHECKING:
    from weft.backends import Backend
    from weft.explore import Region, Study

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class Output:
    """Where results go and what is drawn: a percentile, picture formats, and a line at the SLO if there is one."""

    folder: Path
    percentile: int = 90
    formats: tuple[str, ...] = ("png",)
    slo_ms: float | None = None
    fresh: bool = False
    again: str = "the same command"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `weft explore` to the command line."""
    parser = subparsers.add_parser("explore", help="latency over throughput of several policies", description=__doc__)
    parser.add_argument("--model", nargs="+", default=["glm-130b"], help="model ids or files (default: glm-130b)")
    parser.add_argument("--node", nargs="+", default=["a100-pcie-x4"], help="nodes or files (default: a100-pcie-x4)")
    policies = ["tensor", "pipeline", "hybrid", "interleaved"]
    policy_help = "also: liger-artifact (default: tensor pipeline hybrid interleaved)"
    parser.add_argument("--policy", nargs="+", default=policies, help=policy_help)
    add_workload_flags(parser, several_rates=True)
    add_policy_flags(parser)
    group = parser.add_argument_group("output")
    group.add_argument("--out", type=path_of, default=Path("weft-explore"), metavar="DIR", help="default: weft-explore")
    group.add_argument(
        "--percentile", type=int, choices=PERCENTILES, default=90, help="of the large panel (default: 90)"
    )
    format_help = "of the picture: png, pdf, svg (default: png)"
    group.add_argument("--format", nargs="+", choices=("png", "pdf", "svg"), default=["png"], help=format_help)
    group.add_argument("--fresh", action="store_true", help="forget earlier results in DIR")
    add_backend_flags(parser)
    parser.set_defaults(run=run)


def add_backend_flags(parser: argparse.ArgumentParser) -> None:
    """Where to compute."""
    group = parser.add_argument_group("computing")
    group.add_argument("--jobs", "-j", type=int, default=-1, metavar="N", help="processes (default: one per core)")
    backend_help = "this machine's cores, or a Dask or Ray cluster (default: loky)"
    group.add_argument("--backend", choices=("loky", "dask", "ray"), default="loky", help=backend_help)
    group.add_argument("--scheduler", default="", metavar="ADDRESS", help="of the cluster (default: start one here)")


def run(args: argparse.Namespace) -> int:
    """Explore what the flags describe."""
    from weft.backends import Backend
    from weft.explore import Study

    base = config_of(args, request_rate=1.0)
    rates = tuple(args.request_rate or ())
    study = Study(base, tuple(args.policy), tuple(args.model), tuple(args.node), rates)
    _check_rates(study)
    slo_ms = base.options.slo_us / 1e3 if base.options.slo_us < math.inf else None
    output = Output(args.out, args.percentile, tuple(dict.fromkeys(args.format)), slo_ms, args.fresh)
    return explore_and_report(study, Backend(args.backend, args.jobs, args.scheduler), output)


def _check_rates(study: Study) -> None:
    """Raises ValueError, before anything runs, if a rate was given twice or no requests can be made to come at it."""
    from msgspec.structs import replace

    from weft.runs import make_requests

    study.check()
    for rate in study.rates:
        if study.rates.count(rate) > 1:
            raise ValueError(f"--request-rate {rate:g} is given more than once; name each rate once")
    for rate in {min(study.rates), max(study.rates)} if study.rates else ():
        make_requests(replace(study.base, request_rate=rate))


def explore_and_report(study: Study, backend: Backend, output: Output) -> int:
    """Run the study, write CSV and pictures, print the tables."""
    from weft.explore import explore
    from weft.progress import bar
    from weft.store import Store, write_csv

    study.check()
    backend.check()
    pictures = _pictures([(model, node) for model in study.models for node in study.nodes])
    check_folder(output.folder, [f"{name}.{kind}" for name in pictures for kind in output.formats])
    store = Store(output.folder / "results.jsonl", fresh=output.fresh)
    known = len(store.rows)
    with store.locked(), bar(0, "runs") as shown, warnings.catch_warnings():
        # Joblib's remark on tasks that an interrupt or an error cut off; what is said below is enough.
        warnings.filterwarnings("ignore", r"\d+ tasks (which were still being processed|have been)", UserWarning)

        def progress(finished: int, planned: int) -> None:
            shown.total = planned
            shown.update(finished - shown.n)

        try:
            regions = explore(study, store, backend, progress)
        except KeyboardInterrupt:
            kept = f"{len(store.rows)} finished runs are kept in {store.path}"
            raise KeyboardInterrupt(f"interrupted; {kept}, and {output.again} goes on from there") from None
    written = [output.folder / "results.csv"]
    write_csv((row for region in regions for curve in region.curves for row in curve.rows), written[0])
    written += _draw(regions, output)
    _report(regions, output)
    reused = f", {min(known, len(store.rows))} of them from earlier" if known else ""
    print(f"\nresults: {store.path} ({len(store.rows)} runs{reused})")
    for path in written:
        print(f"wrote {path}")
    return 0


def check_folder(folder: Path, pictures: list[str] | None = None) -> None:
    """Know before the work that its results can be kept."""
    from weft.outputs import check_writable

    for name in ("results.jsonl", "results.csv", *(pictures or ())):
        check_writable(folder / name, may_make_folder=True)


def _draw(regions: list[Region], output: Output) -> list[Path]:
    from weft.region_plot import write_region

    written = []
    names = _pictures([(region.place.model, region.place.node) for region in regions])
    for region, name in zip(regions, names, strict=True):
        paths = [output.folder / f"{name}.{kind}" for kind in output.formats]
        write_region(region, paths, output.percentile, output.slo_ms)
        written += paths
    return written


def _pictures(places: list[tuple[str, str]]) -> list[str]:
    """A name per model and node; files of the same name are told apart by a number."""
    from weft.outputs import short_name

    if len(places) == 1:
        return ["region"]
    names: list[str] = []
    for model, node in places:
        name = f"region-{short_name(model)}-{short_name(node)}"
        number = 2
        free = name
        while free in names:
            free, number = f"{name}-{number}", number + 1
        names.append(free)
    return names


def _report(regions: list[Region], output: Output) -> None:
    from weft.region_table import region_table

    for region in regions:
        print("\n".join(["", *region_table(region, output.percentile, output.slo_ms)]))
    sys.stdout.flush()
