"""Where measurements come from: folders of `weft measure`, and the rows of `benchmarks/gpu_forward.py` in that form."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path, PurePath
from typing import Any

from calibration.kernels import with_cuts
from policy.profile_table import profile_from
from sim.fitted import STALE_DAYS, age_days, machine_words, same_gpu
from sim.spec import NodeSpec
from traces.files import text_lines
from traces.measurement import CONDITIONS, ROWS, Measurement, file_hash, read_measurements

# The parts alone: what a forward pass computes, and what it communicates, with nothing beside it.
COMPUTE_ALONE, COMM_ALONE, SERIAL, POLICY, PLAIN = "compute alone", "comm alone", "serial", "policy", "no decomposition"
WHOLE = "policy, whole segments"
# A coordinate of rows of two batches: the hardware's plan in words, where it was noted.
PLAN = "plan"
HOST_STAGED, AS_IS = "host-staged", "as-is"
_PARTITION = re.compile(r"partition (\d+),? ctas (\d+|default)", re.IGNORECASE)
# The benchmark cut its batches into sequences of this length, or of all rows where there are fewer.
FORWARD_LENGTH = 64


@dataclass(frozen=True, slots=True)
class Source:
    """Rows of one link mode from one place. `beliefs`: what the policy believed where it made plans, a profile table by
    model. `file`, `digest`: where the rows stand, in full, and the hash of their file."""

    name: str
    rows: tuple[Measurement, ...]
    link_mode: str = ""
    gpu: str = ""
    measured_on: str = ""
    finished: bool = True
    beliefs: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    file: Path | None = None
    digest: str = ""

    def notes(self, node: NodeSpec, today: date) -> list[str]:
        """Stale, foreign, unfinished, or changed since the fit: one line each."""
        found = []
        if not self.finished:
            found.append(f"{self.name}: unfinished; its {len(self.rows)} rows are used")
        if self.gpu and not same_machine(self.gpu, node):
            where = machine_words(self.gpu)
            found.append(f"{self.name}: foreign: measured on {where}; node {node.name} describes {node.device.name}")
        if self.link_mode and not same_link(self.link_mode, node):
            found.append(f"{self.name}: foreign: link mode {self.link_mode}; node {node.name} has {node.link.kind}")
        age = age_days(self.measured_on, today)
        if age is not None and age > STALE_DAYS:
            found.append(f"{self.name}: stale: measured {age} days ago ({self.measured_on})")
        if name := self._changed(node):
            # A name such as `survey` is soon given again, so both are possible.
            why = f"node {node.name} was fitted to other contents under the name {name}"
            found.append(f"{self.name}: changed since the fit, or another of that name: {why}")
        return found

    def _changed(self, node: NodeSpec) -> str:
        """The name of what a node was fitted to, if it is this one's and the contents are not; empty otherwise."""
        fitted = node.fit.measurements if node.fit else {}
        if not self.digest or self.digest in fitted.values():
            return ""
        return next((name for name in fitted if self._is_called(name)), "")

    def _is_called(self, name: str) -> bool:
        """Whether a fit could have named this so: a folder by its own name, a file by the end of its path."""
        if self.file is None:
            return False
        parts = PurePath(name).parts
        is_folder = len(parts) == 1 and self.file.name == ROWS
        return (self.file.parent if is_folder else self.file).parts[-len(parts) :] == parts


def read_sources(path: Path, node: NodeSpec) -> list[Source]:
    """The measurements at a path: a folder of `weft measure`, or a file or folder of the benchmark's forward rows.

    Of forward rows in several link modes those of the node's mode are taken. Raises ValueError for anything else, for
    changed files, and for broken rows.
    """
    if path.is_dir() and (path / CONDITIONS).is_file():
        known, rows = read_measurements(path)
        mode = known.link_mode if known.num_gpus > 1 else ""  # one GPU has no links
        rows = with_cuts(rows)
        file, beliefs = path.resolve() / ROWS, _beliefs(path)
        told = (known.gpu, known.date, known.finished)
        return [Source(str(path), tuple(rows), mode, *told, beliefs, file, file_hash(file))]
    files = sorted(path.glob("forward*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path}: neither a folder of measurements (no {CONDITIONS}) nor one with forward*.jsonl")
    found = []
    for file in files:
        modes = forward_rows(file)
        if len(modes) > 1:
            modes = {mode: rows for mode, rows in modes.items() if same_link(mode, node)}
        gpu, day = _about(file)
        place, digest = file.resolve(), file_hash(file)
        found += [
            Source(str(file), tuple(rows), mode, gpu, day, file=place, digest=digest) for mode, rows in modes.items()
        ]
    return found


def _beliefs(folder: Path) -> dict[str, dict[str, Any]]:
    """The profile tables that a survey leaves beside its rows, by model."""
    found = {}
    for path in sorted(folder.glob("profile-*.json")):
        try:
            table = json.loads(path.read_bytes())
            profile_from(table)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: not a profile table ({error})") from None
        found[path.stem.removeprefix("profile-")] = table
    return found


def same_machine(gpu: str, node: NodeSpec) -> bool:
    """Whether a node describes this GPU, or was fitted to it. `none`: CPU processes."""
    return (node.fit is not None and node.fit.gpu == gpu) or same_gpu(gpu, node.device.name)


def same_link(mode: str, node: NodeSpec) -> bool:
    """Whether a node describes ranks that reach each other so: its fit says, or else the kind of its link."""
    fitted = node.fit.conditions.get("link_mode") if node.fit else None
    return mode == (fitted or (HOST_STAGED if node.link.kind == "host memory" else AS_IS))


# -- forward rows of the benchmark ------------------------------------------------------------------------------------


def forward_rows(path: Path) -> dict[str, list[Measurement]]:
    """The benchmark's forward rows by link mode, as rows of two batches. Times are medians; no spread was recorded.

    Raises ValueError with file and line for what is not such a row.
    """
    found: dict[str, list[Measurement]] = {}
    for number, line in text_lines(path):
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where}: not JSON ({error})") from None
        if not isinstance(row, dict) or "part" not in row:
            raise ValueError(f"{where}: not a row of the GPU suite (it names no part)")
        if row["part"] != "forward" or "serial_ms" not in row or row.get("dry_run"):
            continue
        try:
            found.setdefault(str(row["mode"]), []).extend(_forward(row))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{where}: not a forward row of the GPU suite ({error!r})") from None
    if not found:
        raise ValueError(f"{path}: it has no forward rows of the GPU suite")
    return found


def _forward(row: dict[str, Any]) -> Iterator[Measurement]:
    at: dict[str, int | float | str] = {
        "model": str(row["model"]), "num_layers": int(row["num_layers"]), "rows": int(row["rows"]),
        "length": min(int(row["rows"]), FORWARD_LENGTH),
    }  # fmt: skip
    plan = row.get("notes", {}).get("plan")
    times = {COMPUTE_ALONE: row["compute_ms"], COMM_ALONE: row["comm_ms"], SERIAL: row["serial_ms"]}
    for name, ms in (times | row["plans_ms"]).items():
        noted = {PLAN: str(plan)} if plan and name == POLICY else {}
        where = at | {"schedule": schedule_name(name)} | noted
        yield Measurement("two_batches", where, {"us": 1e3 * float(ms)}, {}, 1)


def schedule_name(name: str) -> str:
    """One spelling of a schedule: `partition 8 ctas 0`, where 0 CTAs are the library's default."""
    found = _PARTITION.fullmatch(name.strip())
    if found is None:
        return name.strip()
    return f"partition {int(found[1])} ctas {0 if found[2].lower() == 'default' else int(found[2])}"


def partition_of(schedule: str) -> tuple[int, int] | None:
    """Withheld SMs and CTAs of a forced partition; None for any other schedule."""
    found = _PARTITION.fullmatch(schedule)
    return (int(found[1]), int(found[2])) if found else None


def _about(path: Path) -> tuple[str, str]:
    """GPU and date, from the README beside the rows; empty where it does not say."""
    readme = path.with_name("README.md")
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    gpu, day = re.search(r"NVIDIA \w+", text), re.search(r"\d{4}-\d{2}-\d{2}", text)
    return (gpu[0] if gpu else ""), (day[0] if day else "")


def normalised(measurement: Measurement) -> Measurement:
    """A row of two batches with its schedule in the one spelling."""
    return replace(measurement, at={**measurement.at, "schedule": schedule_name(str(measurement.at["schedule"]))})
