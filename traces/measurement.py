"""Measurements of hardware: one row per point, with its spread and the conditions under which it was taken.

A folder holds one machine in one link mode: `conditions.json`, `measurements.jsonl` (a row a line, appended as it
comes, each with the hash of the conditions) and, once finished, `manifest.json` with the hashes of all files beside it.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from traces.coordinates import mistake_in
from traces.files import lock, write_whole

CONDITIONS, ROWS, MANIFEST = "conditions.json", "measurements.jsonl", "manifest.json"
ANOTHER_FOLDER = "another folder"
Coordinates = dict[str, int | float | str]

# Rows of all compute kernels of a forward pass, and of how GEMMs and collectives are launched, which a profiler saw.
SEQUENCE, LAUNCH, CHANNELS = "sequence", "launch", "channels"
SEEN = (LAUNCH, CHANNELS)
# Kinds of rows and the coordinates that each needs; it may have more.
NEEDED: dict[str, tuple[str, ...]] = {
    "gemm": ("name", "rows", "cols", "inner"),
    "attention": ("name", "num_sequences", "length", "num_heads", "head_dim", "flops", "bytes_moved", "num_ctas"),
    "elementwise": ("name", "rows", "bytes_moved", "num_ctas"),
    SEQUENCE: ("model", "num_layers", "rows", "length", "num_ranks"),
    "collective": ("op", "bytes", "num_ranks", "ctas"),
    "pair": ("compute", "kind", "op", "bytes", "num_ranks", "ctas", "withheld_sms", "priority"),
    "two_batches": ("model", "num_layers", "rows", "length", "schedule"),
    "host": ("name",),
    LAUNCH: ("name", "rows", "cols", "inner"),
    CHANNELS: ("op", "bytes", "num_ranks", "ctas"),
}
# Values that a row needs, if not `us`; a pair may know one side alone.
NEEDED_VALUES: dict[str, tuple[str, ...]] = {"pair": (), LAUNCH: ("ctas", "ctas_per_sm"), CHANNELS: ("ctas",)}
# A series of collectives that is slowed more is kept out by kernels that leave no SM: which of the two is first in
# between decides how much, so that such a number says nothing of one that comes alone, as in schedules.
KEPT_OUT = 4.0
# What may stand beside the coordinates and is none: the plan of two batches in words, what a kernel is called.
DESCRIBING = frozenset({"plan", "kernel"})


@dataclass(frozen=True, slots=True)
class Conditions:
    """What was measured on. Rows of different conditions must not be mixed; `date` and `finished` do not count.

    `environment`: the variables that change results. `link_mode`: how ranks reach each other. `finished`: the folder's
    manifest is there and right; false for one that is still being written or was cut off.
    """

    gpu: str
    num_gpus: int
    num_sms: int
    driver: str
    torch: str
    nccl: str
    link_mode: str
    dtype: str
    weft: str
    date: str
    environment: dict[str, str] = field(default_factory=dict)
    finished: bool = False

    @property
    def digest(self) -> str:
        """A short hash of everything but the date."""
        return hashlib.sha256(_canonical(self._counted())).hexdigest()[:16]

    def _counted(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name not in ("date", "finished")}

    def difference(self, other: Conditions) -> str:
        """The first thing in which two conditions differ, in words; empty if they are equal."""
        mine, theirs = self._counted(), other._counted()
        for name in mine:
            if name == "environment":
                for key in sorted({*mine[name], *theirs[name]}):
                    one, two = mine[name].get(key), theirs[name].get(key)
                    if one != two:
                        return f"{key} is {_quoted(one)} there and {_quoted(two)} here"
            elif mine[name] != theirs[name]:
                return f"{name} is {mine[name]!r} there and {theirs[name]!r} here"
        return ""


@dataclass(frozen=True, slots=True)
class Measurement:
    """One point: its kind, its coordinates, medians by name, their interquartile ranges, and how many repetitions."""

    what: str
    at: Coordinates
    values: dict[str, float]
    spread: dict[str, float]
    repetitions: int

    @property
    def key(self) -> str:
        """What makes it this point and no other, whatever the order of its coordinates."""
        return point_key(self.what, self.at)


def is_kept_out(pair: Measurement) -> bool:
    """Whether a series of collectives hardly ran at all beside the computation."""
    return pair.values["comm_slowdown"] > KEPT_OUT


def point_key(what: str, at: Coordinates) -> str:
    """The name of a point: its kind and its coordinates, without what only describes how it was run."""
    return _canonical([what, {name: value for name, value in at.items() if name not in DESCRIBING}]).decode()


def read_measurements(folder: Path) -> tuple[Conditions, list[Measurement]]:
    """The conditions and rows of a folder; of a point that was measured again the last row counts.

    Raises ValueError for rows of other conditions, broken rows, and files that changed after they were finished. A
    folder without a manifest is readable: its conditions say that it is not finished.
    """
    conditions = read_conditions(folder)
    path = folder / ROWS
    manifest = _manifest(folder)
    if manifest is not None:
        _check_hashes(folder, manifest)
    latest, digest = dict[str, Measurement](), conditions.digest
    for number, row in _rows(path, may_be_torn=manifest is None):
        measurement = _measurement(row, f"{path}:{number}", digest, conditions.num_sms)
        latest[measurement.key] = measurement
    return replace(conditions, finished=manifest is not None), list(latest.values())


def read_conditions(folder: Path) -> Conditions:
    """The conditions of a folder. Raises ValueError if it has none."""
    path = folder / CONDITIONS
    if not path.is_file():
        raise ValueError(f"{folder}: not a folder of measurements (it has no {CONDITIONS})")
    raw = _object(path.read_bytes(), str(path))
    raw.pop("conditions", None)
    known = {f.name: f for f in fields(Conditions)}
    wrong = [name for name in raw if name not in known] or [n for n in known if n not in raw and n != "finished"]
    if wrong:
        raise ValueError(f"{path}: {wrong[0]!r} is missing or unknown; conditions are: {', '.join(known)}")
    for name, value in raw.items():
        kinds: dict[str, type] = {"num_gpus": int, "num_sms": int, "environment": dict, "finished": bool}
        if not isinstance(value, kinds.get(name, str)):
            raise ValueError(f"{path}: {name} is {value!r}, which is not a {kinds.get(name, str).__name__}")
    return Conditions(**raw)


class MeasurementLog:
    """Appends rows to a folder, each on disk before the next; a folder of equal conditions is continued.

    Raises ValueError for a folder of other conditions or of none, one with broken rows, and one to which another
    process appends: the file of rows is locked until the log is closed, or its process is gone.
    """

    def __init__(self, folder: Path, conditions: Conditions) -> None:
        self.folder, self.conditions = folder, conditions
        folder.mkdir(parents=True, exist_ok=True)
        self.rows: dict[str, Measurement] = {}
        self._file: IO[bytes] = (folder / ROWS).open("ab")
        try:
            lock(self._file, folder, ANOTHER_FOLDER)
            if (folder / CONDITIONS).exists():
                self._resume()
            else:
                self._begin()
        except BaseException:
            self._file.close()
            raise

    def _begin(self) -> None:
        if self._file.tell():
            raise ValueError(
                f"{self.folder}: it has {ROWS} but no {CONDITIONS}, so that nobody knows where its rows were measured; "
                f"put {CONDITIONS} back, or give another folder"
            )
        about = {**asdict(self.conditions), "conditions": self.conditions.digest}
        del about["finished"]
        write_whole(self.folder / CONDITIONS, json.dumps(about, indent=1).encode() + b"\n")

    def _resume(self) -> None:
        there = read_conditions(self.folder)
        if why := there.difference(self.conditions):
            raise ValueError(f"{self.folder}: measured under other conditions ({why}); give another folder")
        self.conditions = there
        _, rows = read_measurements(self.folder)
        self.rows = {row.key: row for row in rows}
        _cut_torn_line(self.folder / ROWS)
        (self.folder / MANIFEST).unlink(missing_ok=True)

    def append(self, measurement: Measurement) -> None:
        """One more row."""
        row = {"conditions": self.conditions.digest, **asdict(measurement)}
        self._file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
        self._file.flush()
        self.rows[measurement.key] = measurement

    def finish(self, date: str, **notes: Any) -> None:
        """Write the manifest, and close; `notes` go into it as they are."""
        self._store()
        files = [path for path in sorted(self.folder.glob("*.json*")) if path.name != MANIFEST]
        hashes = {path.name: file_hash(path) for path in files}
        manifest = {"finished": date, "rows": len(self.rows), "sha256": hashes, **notes}
        write_whole(self.folder / MANIFEST, json.dumps(manifest, indent=1).encode() + b"\n")
        self.close()

    def close(self) -> None:
        """Close the file; without a manifest the folder stays unfinished."""
        if not self._file.closed:
            self._store()
            self._file.close()

    def _store(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> MeasurementLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def write_measurements(folder: Path, conditions: Conditions, rows: Iterable[Measurement]) -> None:
    """A whole, finished folder at once."""
    with MeasurementLog(folder, conditions) as log:
        for row in rows:
            log.append(row)
        log.finish(conditions.date)


def check_unwritten(folder: Path) -> None:
    """Raises ValueError if a log appends to the folder now."""
    if (folder / ROWS).exists():
        with (folder / ROWS).open("ab") as file:
            lock(file, folder, ANOTHER_FOLDER)


# -- reading -----------------------------------------------------------------------------------------------------------


def _manifest(folder: Path) -> dict[str, Any] | None:
    path = folder / MANIFEST
    return _object(path.read_bytes(), str(path)) if path.exists() else None


def _check_hashes(folder: Path, manifest: dict[str, Any]) -> None:
    """Everything that was there when the folder was finished is as it was; further files are nobody's concern."""
    hashes = manifest.get("sha256")
    if not isinstance(hashes, dict):
        raise ValueError(f"{folder / MANIFEST}: it has no hashes under 'sha256'")
    for name in {CONDITIONS: None, ROWS: None, **hashes}:
        if hashes.get(name) != file_hash(folder / name):
            raise ValueError(f"{folder / name}: the file was changed after it was finished ({MANIFEST} has its hash)")


def _rows(path: Path, *, may_be_torn: bool) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and rows. The last line of a file that is still being written may be torn: it is left out."""
    content = path.read_bytes() if path.exists() else b""
    lines = content.split(b"\n")
    torn = lines.pop()
    if torn and not may_be_torn:
        lines.append(torn)
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield number, _object(line, f"{path}:{number}")


def _object(content: bytes, where: str) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except ValueError as error:  # of JSON, or of UTF-8
        raise ValueError(f"{where}: not JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(found).__name__}")
    return found


def _measurement(row: dict[str, Any], where: str, digest: str, num_sms: int) -> Measurement:
    if row.get("conditions") != digest:
        raise ValueError(
            f"{where}: the row was measured under other conditions ({row.get('conditions')!r}; this folder's are "
            f"{digest!r}); keep one folder per machine and link mode"
        )
    what, at = row.get("what"), row.get("at")
    if not isinstance(what, str) or what not in NEEDED:
        raise ValueError(f"{where}: what is {what!r}; it must be one of {', '.join(NEEDED)}")
    if not isinstance(at, dict) or not all(_is_number(v) or isinstance(v, str) for v in at.values()):
        raise ValueError(f"{where}: at is {at!r}; it must be an object of numbers and texts")
    _check_coordinates(what, at, where, num_sms)
    values, spread, repetitions = row.get("values"), row.get("spread"), row.get("repetitions")
    for name, part in (("values", values), ("spread", spread)):
        if not isinstance(part, dict) or not part or not all(_is_number(value) for value in part.values()):
            raise ValueError(f"{where}: {name} is {part!r}; it must be an object of finite numbers")
    assert isinstance(values, dict) and isinstance(spread, dict)
    if missing := [name for name in NEEDED_VALUES.get(what, ("us",)) if name not in values]:
        raise ValueError(f"{where}: a row of {what} needs {missing[0]!r} in values")
    if values.keys() != spread.keys():
        raise ValueError(f"{where}: spread has {', '.join(spread)} where values has {', '.join(values)}")
    for name, value in values.items():
        # A time or a slowdown; only a delay may come out as nothing.
        if value < 0.0 or (value == 0.0 and not name.endswith("delay_us")):
            raise ValueError(f"{where}: {name} is {value!r}; it must be above 0")
    if not isinstance(repetitions, int) or isinstance(repetitions, bool) or repetitions < 1:
        raise ValueError(f"{where}: repetitions is {repetitions!r}; it must be a whole number, 1 or more")
    return Measurement(
        what, at, {k: float(v) for k, v in values.items()}, {k: float(v) for k, v in spread.items()}, repetitions
    )


def _check_coordinates(what: str, at: Coordinates, where: str, num_sms: int) -> None:
    """All that a row needs is there and can be; a pair needs what its compute kernel has, whose name is `compute`."""
    if missing := [name for name in NEEDED[what] if name not in at]:
        raise ValueError(f"{where}: a row of {what} needs {missing[0]!r} in at")
    if wrong := mistake_in(what, at, num_sms):
        raise ValueError(f"{where}: {wrong}")
    kernel = NEEDED[str(at["kind"])] if what == "pair" else ()
    if missing := [name for name in kernel if name not in at and name != "name"]:
        raise ValueError(f"{where}: a pair of kind {at['kind']} needs {missing[0]!r} in at")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _cut_torn_line(path: Path) -> None:
    """Remove what was being written when the writer was killed."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes; empty if there is none."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _quoted(value: str | None) -> str:
    return "not set" if value is None else repr(value)
