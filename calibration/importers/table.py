"""Rows of a CSV table by the names of its columns, with errors that say file, line and column."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from traces.files import csv_rows

LONGEST_US = 1e12
MOST = 10**12


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table."""

    path: Path
    number: int
    columns: dict[str, int]
    cells: list[str]

    @property
    def where(self) -> str:
        """File and line, for messages."""
        return f"{self.path}:{self.number}"

    def text(self, column: str) -> str:
        """A cell as it is; empty where the table has no such column."""
        index = self.columns.get(column)
        return "" if index is None else self.cells[index]

    def count(self, column: str, least: int = 1) -> int:
        """A whole number of at least `least`."""
        text = self.text(column)
        value = int(text) if text.isascii() and text.isdigit() and len(text) <= 12 else -1
        if not least <= value <= MOST:
            raise ValueError(f"{self.where}: {column} is {text!r}; expected a whole number, {least} or more")
        return value

    def number_of(self, column: str, *, may_be_zero: bool = False) -> float:
        """A finite number above 0 (or 0, where that may be)."""
        text = self.text(column)
        try:
            value = math.nan if "_" in text else float(text)
        except ValueError:
            value = math.nan
        if not 0.0 <= value < LONGEST_US or (value == 0.0 and not may_be_zero):
            raise ValueError(f"{self.where}: {column} is {text!r}; expected a number above 0")
        return value

    def flag(self, column: str) -> bool:
        """True or False as Python writes them."""
        text = self.text(column)
        if text not in ("True", "False"):
            raise ValueError(f"{self.where}: {column} is {text!r}; expected True or False")
        return text == "True"


def header_of(path: Path) -> tuple[str, ...]:
    """The names of the columns. Raises ValueError for an empty file."""
    for _, cells in csv_rows(path):
        return tuple(cells)
    raise ValueError(f"{path}:1: the file is empty; expected a CSV table with a header")


def rows_of(path: Path, needed: tuple[str, ...], what: str) -> Iterator[Row]:
    """The rows of a table that must have the columns `needed`; `what` names the table in messages.

    Raises ValueError for missing or repeated columns, a row of another length, or a table without rows.
    """
    lines = csv_rows(path)
    number, header = next(lines, (1, []))
    if missing := [name for name in needed if name not in header]:
        raise ValueError(f"{path}:{number}: {what} needs the column {missing[0]}; found {_some(header)}")
    columns = {name: index for index, name in enumerate(header)}
    if len(columns) < len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise ValueError(f"{path}:{number}: two columns are named {twice!r}; keep one")
    none = True
    for number, cells in lines:
        if len(cells) != len(header):
            raise ValueError(f"{path}:{number}: the row has {len(cells)} cells where the header has {len(header)}")
        none = False
        yield Row(path, number, columns, cells)
    if none:
        raise ValueError(f"{path}:{number}: the table has a header but no rows")


def _some(header: list[str]) -> str:
    shown = ", ".join(header[:12]) or "nothing"
    return shown if len(header) <= 12 else f"{shown}, ... ({len(header)} columns)"
