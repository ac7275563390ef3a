"""An imported table as a folder of measurements, with its source, its hash and its licence in the conditions."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from calibration.importers.aiconfigurator import read_aiconfigurator
from calibration.importers.found import Found, Request, repeats_of
from calibration.importers.kineto import read_kineto
from calibration.importers.nccl_tests import read_nccl_tests
from calibration.importers.vidur import read_vidur
from traces.measurement import Conditions, Measurement, write_measurements

UNKNOWN = "not stated"

READERS: dict[str, Callable[[Sequence[Path], Request], Found]] = {
    "aiconfigurator": read_aiconfigurator,
    "vidur": read_vidur,
    "kineto": read_kineto,
    "nccl-tests": read_nccl_tests,
}

# Data sheets; matched by the first name that a GPU's own name contains.
NUM_SMS = {"A100": 108, "H100 PCIe": 114, "H100": 132, "H200": 132, "V100": 80}


@dataclass(frozen=True, slots=True)
class Stated:
    """What the user says of the machine and the files; empty or 0: what the files say.

    `date`: when it was measured, as YYYY-MM-DD. `weft`: the version that imports.
    """

    gpu: str = ""
    num_gpus: int = 0
    num_sms: int = 0
    link_mode: str = ""
    licence: str = ""
    date: str = ""
    weft: str = ""


@dataclass(frozen=True, slots=True)
class Imported:
    """A table in our form; `left_out`: how many of its entries were not used, by reason."""

    conditions: Conditions
    rows: list[Measurement]
    left_out: dict[str, int]


def import_files(kind: str, paths: Sequence[Path], request: Request, stated: Stated) -> Imported:
    """Read files of one format and one machine.

    Raises ValueError for an unknown format, broken files, and files of which nothing can be used.
    """
    if kind not in READERS:
        raise ValueError(f"format {kind!r} is not known; use one of {', '.join(READERS)}")
    if twice := [path for path in paths if list(paths).count(path) > 1]:
        raise ValueError(f"{twice[0]} is given twice")
    found = READERS[kind](paths, request)
    if not found.samples:
        reasons = "; ".join(f"{count} x {reason}" for reason, count in found.left_out.most_common(3))
        raise ValueError(f"{paths[0]}: nothing in it can be used ({reasons or 'no entries'})")
    conditions = _conditions(kind, paths, found, stated)
    return Imported(conditions, repeats_of(found.samples), dict(found.left_out.most_common()))


def _conditions(kind: str, paths: Sequence[Path], found: Found, stated: Stated) -> Conditions:
    about = dict(found.about)
    gpu = about.get("gpu", stated.gpu)
    if stated.gpu not in ("", gpu):
        raise ValueError(f"--gpu {stated.gpu!r} contradicts {paths[0]}, which says {gpu!r}; leave it out")
    sms = stated.num_sms or int(about.get("num_sms") or _num_sms(gpu))
    ranks = [int(sample.at["num_ranks"]) for sample in found.samples if "num_ranks" in sample.at]
    gpus = stated.num_gpus or int(about.get("num_gpus") or max(ranks, default=1))
    source = {f"source.{i}": f"{path.name} sha256 {_sha256(path)}" for i, path in enumerate(paths)}
    environment = {
        "imported": kind, **source, "licence": stated.licence or UNKNOWN,
        **{f"timing.{name}": note for name, note in found.notes.items()},
        **{name: value for name, value in about.items() if "." in name},
    }  # fmt: skip
    return Conditions(
        gpu=gpu or UNKNOWN, num_gpus=gpus, num_sms=sms, driver=UNKNOWN, torch=UNKNOWN,
        nccl=about.get("nccl", UNKNOWN), link_mode=stated.link_mode or UNKNOWN, dtype=about.get("dtype", UNKNOWN),
        weft=stated.weft, date=stated.date or UNKNOWN, environment=environment,
    )  # fmt: skip


def _num_sms(gpu: str) -> int:
    """Streaming multiprocessors by the data sheet; 0 for a GPU that is not known."""
    return next((count for name, count in NUM_SMS.items() if name.lower() in gpu.lower()), 0)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_folder(imported: Imported, folder: Path) -> None:
    """Write a new folder, whole or not at all. Raises ValueError if there is something at its place."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already and not empty; give another place with --out")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        write_measurements(temporary, imported.conditions, imported.rows)
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
