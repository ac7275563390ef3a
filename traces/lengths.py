"""How long requests are: token counts that are fixed, uniform, or drawn from a file of real lengths."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from traces.files import csv_rows, whole_number


class Lengths(Protocol):
    """A distribution of token counts."""

    def sample(self, num: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """Draw `num` token counts."""
        ...


@dataclass(frozen=True, slots=True)
class Uniform:
    """Every whole number from `low` to `high`, both included, equally likely; `low == high` is a fixed length."""

    low: int
    high: int

    def sample(self, num: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """Draw `num` token counts."""
        return rng.integers(self.low, self.high, size=num, endpoint=True, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Empirical:
    """Lengths seen elsewhere, drawn again with replacement."""

    values: tuple[int, ...]

    def sample(self, num: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """Draw `num` token counts."""
        table = np.array(self.values, dtype=np.int64)
        return table[rng.integers(0, len(table), size=num)]


def parse_lengths(text: str, minimum: int = 1) -> Lengths:
    """Lengths from what a user writes: `128`, `16:128` (both included), a file, or `FILE:COLUMN` of a CSV file.

    `minimum` is the smallest allowed count: 1 for prompts, 0 for outputs (a discriminative request has none).
    """
    numbers = re.fullmatch(r"(\d{1,9})(?::(\d{1,9}))?", text, re.ASCII)
    if numbers is None:
        return _from_file(text, minimum)
    low = int(numbers[1])
    high = int(numbers[2] or numbers[1])
    if high < low:
        raise ValueError(f"length range {text} runs backwards; write {high}:{low}")
    if low < minimum:
        raise ValueError(f"length {text} starts below {minimum}, the smallest that makes sense here")
    return Uniform(low, high)


def _from_file(text: str, minimum: int) -> Empirical:
    path, column = Path(text), ""
    if not path.is_file() and ":" in text:
        head, _, column = text.rpartition(":")
        path = Path(head)
    if not path.is_file():
        raise ValueError(f"length {text!r} is not N, LOW:HIGH, a file or FILE:COLUMN")
    return Empirical(read_lengths(path, column, minimum))


def read_lengths(path: Path, column: str = "", minimum: int = 1) -> tuple[int, ...]:
    """Token counts of one column of a CSV file, or of a file with one number per line; plain or gzip."""
    rows = csv_rows(path)
    number, first = next(rows, (1, []))
    if not first:
        raise ValueError(f"{path}:1: the file is empty; one length per line was expected")
    has_header = not first[0].isdigit()
    position = _position(path, first, has_header, column)
    values = [] if has_header else [_length(path, number, first, position, minimum)]
    values += [_length(path, number, row, position, minimum) for number, row in rows]
    if not values:
        raise ValueError(f"{path}:{number + 1}: the file has a header but no lengths")
    return tuple(values)


def _position(path: Path, first: list[str], has_header: bool, column: str) -> int:
    if column and has_header and column in first:
        return first.index(column)
    if column:
        found = ", ".join(first) if has_header else "no header"
        raise ValueError(f"{path}:1: no column {column!r}; found {found}")
    if len(first) > 1:
        names = ", ".join(first) if has_header else f"{len(first)} columns without names"
        raise ValueError(f"{path}:1: which column holds the lengths? Write {path.name}:COLUMN (found {names})")
    return 0


def _length(path: Path, number: int, row: list[str], position: int, minimum: int) -> int:
    if position >= len(row):
        raise ValueError(f"{path}:{number}: the row has {len(row)} columns; the length is in column {position + 1}")
    try:
        value = whole_number(row[position])
    except ValueError as error:
        raise ValueError(f"{path}:{number}: {error}") from error
    if value < minimum:
        raise ValueError(f"{path}:{number}: length {value} is below {minimum}, the smallest that makes sense here")
    return value
