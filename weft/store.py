"""Results of many runs: a file of JSON lines that only grows, and a CSV table made from it at the end."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import models
import policy
import sim
import traces
from traces.files import lock, write_whole
from weft.report import encode

Row = dict[str, Any]


def code_hash() -> str:
    """A hash of the code that a simulated result depends on: an edited policy must not be answered with old results."""
    digest = hashlib.sha256()
    for package in (models, policy, sim, traces):
        for folder in package.__path__:
            for file in sorted(Path(folder).rglob("*.py")):
                digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


class Store:
    """Finished runs by configuration hash. Every run is written when it ends, so an interrupt loses none."""

    def __init__(self, path: Path, *, fresh: bool = False) -> None:
        self.path, self.code = path, code_hash()
        self.rows: dict[str, Row] = {}
        self._size = 0
        if fresh:
            path.unlink(missing_ok=True)
        if path.exists():
            self._read()

    def _read(self) -> None:
        content = self.path.read_bytes()
        # A last line without an end was cut off by a kill; it will be run and written again.
        self._size = content.rfind(b"\n") + 1
        for number, line in enumerate(content[: self._size].splitlines(), start=1):
            try:
                row = json.loads(line)
                key, code = row["config_hash"], row["code_hash"]
            except (ValueError, KeyError, TypeError) as error:
                reason = f"not a result of this command ({error!r})"
                raise ValueError(
                    f"{self.path}:{number}: {reason}; give another --out, or --fresh to start over"
                ) from None
            if code == self.code:
                self.rows[key] = row

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else writes the file meanwhile. Raises ValueError if somebody does."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            lock(file, self.path, "another --out")
            yield

    def add(self, row: Row) -> None:
        """Keep one finished run, at once on disk."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        row = {**row, "code_hash": self.code}
        row["sim_wall_s"] = row.pop("sim_wall_s")
        with self.path.open("ab") as file:
            file.truncate(self._size)
            file.write(encode(row) + b"\n")
            file.flush()
            self._size = file.tell()
        self.rows[row["config_hash"]] = row


def write_csv(rows: Iterable[Row], path: Path) -> None:
    """A table for spreadsheets and data frames; without wall-clock times, so that equal runs give equal bytes."""
    rows = list(rows)
    columns = list(dict.fromkeys(key for row in rows for key in row if key not in ("sim_wall_s", "code_hash")))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow([_cell(row.get(column, "")) for column in columns])
    write_whole(path, text.getvalue().encode())


def _cell(value: object) -> object:
    return " ".join(map(str, value)) if isinstance(value, list) else value
