"""Fit the shipped H200 nodes again to the surveys that are committed, and write their files and reports.

Run: python benchmarks/refit.py [--out sim/nodes] [--report weft-refit] [--only NODE]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from calibration.compare import forward_rows
from calibration.fit import About, Fit, fit_node
from calibration.node_file import write_node
from calibration.plots import write_plots
from calibration.report import lines_of
from sim.spec import NodeSpec, load_node
from traces.coordinates import KERNELS
from traces.files import write_whole
from traces.measurement import LAUNCH, ROWS, Measurement, file_hash, read_measurements
from weft.calibrate_command import on_machine, read_folders

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "benchmarks" / "data" / "h200-x4-2026-11-21"
NOW = ROOT / "benchmarks" / "data" / "h200-x4-2026-11-22-one-by-one"
# Survey, and the node that keeps what the survey cannot tell.
SURVEYS = {"survey-nvlink": "h200-nvlink-x4", "survey-hoststaged": "h200-hoststaged-x4"}
# Measured again under load: collectives, pairs, schedules. Their hosts were half as fast as those before (a GEMM's call
# took 173 and 209 us, and 97 and 121 before), so what both timed of a host is the quicker one's.
NEWER = {
    "survey-nvlink": NOW / "survey-nvlink",
    "survey-hoststaged": NOW / "survey-hoststaged",
}
# Kernels of one rank of four, timed later and under load; the surveys' own were timed on GPUs that had been idle.
KERNELS_FROM = "survey-kernels"
# Whole forwards, of which one after the other and its parts alone say what a collective waits for.
FORWARDS = "second-forward.jsonl"
SUFFIX = "-fitted"
# Of two GPUs: a link mode, its latest survey, and the node that keeps what that cannot tell. Of other models, and of
# light kernels in pairs, what was measured before stays.
TWO = ROOT / "benchmarks" / "data" / "h200-x2-2026-11-21"
SIZED = ROOT / "benchmarks" / "data" / "h200-x2-2026-11-22-sized-gemms"
LATEST = ROOT / "benchmarks" / "data" / "h200-x2-2026-11-23"
OF_TWO = {
    "nvlink": (SIZED / "survey-nvlink", "h200-nvlink-x4"),
    "hoststaged": (LATEST / "survey-hoststaged", "h200-hoststaged-x4"),
}
KERNELS_OF_TWO = ("survey-kernels-opt-glm", "survey-kernels-glm-llama")
# Of so many older pairs of light kernels one, for GEMMs to stay most of all.
LIGHT_STEP = 5


def fitted(folder: Path, base: str) -> Fit:
    """The fit to a survey's collectives, pairs and host costs, to the kernels under load, and to whole forwards."""
    parts, node, about = parts_of(folder, base)
    return fit_node([row for part in parts for row in part], node, about)


def parts_of(folder: Path, base: str) -> tuple[list[list[Measurement]], NodeSpec, About]:
    """What a fit sees, in the order in which it was measured: of the survey, of the kernels, of whole forwards; the
    base node, and where all of it comes from."""
    newer, kernels = NEWER[folder.name], DATA / KERNELS_FROM
    conditions, _, about = read_folders([newer, kernels], base + SUFFIX)
    survey = of_the_quicker_host([row for row in _rows(newer) if row.what not in KERNELS], _rows(folder))
    forwards = forward_rows(DATA / FORWARDS)[conditions[0].link_mode]
    about = with_files(about, folder / ROWS, DATA / FORWARDS)
    return [survey, _rows(kernels), forwards], on_machine(load_node(base), conditions[0]), about


def of_the_quicker_host(rows: list[Measurement], before: list[Measurement]) -> list[Measurement]:
    """What a survey timed of its host, as the survey before had it where that did."""
    quicker = {row.at["name"]: row for row in before if row.what == "host"}
    return [quicker.get(row.at["name"], row) if row.what == "host" else row for row in rows]


def with_files(about: About, *paths: Path) -> About:
    """With files of which a fit sees a part, and their hashes."""
    found = {str(path.relative_to(DATA.parent)): file_hash(path) for path in paths}
    return replace(about, measurements=about.measurements | found)


def fitted_of_two(mode: str, survey: Path, base: str) -> Fit:
    """The same of two GPUs."""
    older = [TWO / each for each in KERNELS_OF_TWO]
    # Links do not matter to kernels, so one survey of them is for both link modes.
    kernels, before = SIZED / KERNELS_FROM, TWO / survey.name
    conditions, _, about = read_folders([survey, *older], f"h200-{mode}-x2{SUFFIX}")
    light = [row for row in _rows(before) if row.what == "pair" and row.at["kind"] != "gemm"]
    old = [row for folder in older for row in _rows(folder) if not is_made_for_the_whole_gpu(row)]
    latest = {row.key: row for row in [*light[::LIGHT_STEP], *old, *_rows(survey), *_rows(kernels)]}
    about = with_files(about, kernels / ROWS, before / ROWS)
    return fit_node(list(latest.values()), on_machine(load_node(base), conditions[0]), about)


def _rows(folder: Path) -> list[Measurement]:
    return read_measurements(folder)[1]


def is_made_for_the_whole_gpu(row: Measurement) -> bool:
    """Whether it times GEMMs under a partition as they were before they were made for its SMs."""
    is_gemm = row.what in ("gemm", LAUNCH) or (row.what == "pair" and row.at["kind"] == "gemm")
    return is_gemm and bool(row.at["withheld_sms"])


FITS: dict[str, Callable[[], Fit]] = {
    **{base + SUFFIX: partial(fitted, DATA / name, base) for name, base in SURVEYS.items()},
    **{f"h200-{mode}-x2{SUFFIX}": partial(fitted_of_two, mode, *of) for mode, of in OF_TWO.items()},
}


def main() -> None:
    """Fit and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "sim" / "nodes")
    parser.add_argument("--report", type=Path, default=Path("weft-refit"))
    parser.add_argument("--only", choices=tuple(FITS))
    args = parser.parse_args()
    for name, fit_of in FITS.items():
        if args.only not in (None, name):
            continue
        fit = fit_of()
        write_node(args.out / f"{fit.node.name}.toml", fit.node)
        folder = args.report / name
        folder.mkdir(parents=True, exist_ok=True)
        write_plots(fit, folder)
        text = "\n".join(lines_of(fit)) + "\n"
        write_whole(folder / "report.txt", text.encode())
        print(text)


if __name__ == "__main__":
    main()
