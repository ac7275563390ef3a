"""Reading text line by line, plain or gzip, writing a whole file or none, and writing alone."""

from __future__ import annotations

import csv
import fcntl
import gzip
import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO

GZIP_MAGIC = b"\x1f\x8b"


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number (from 1) and text of every line that is not blank; gzip is told by its content, not by the name."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ValueError(f"{path} is a pipe or a device; write what it gives to a file, and give that")
    with path.open("rb") as raw:
        is_gzip = raw.read(2) == GZIP_MAGIC
        raw.seek(0)
        if is_gzip:
            with gzip.open(raw) as unpacked:
                yield from _decoded(path, unpacked)
        else:
            yield from _decoded(path, raw)


def _decoded(path: Path, stream: Iterable[bytes]) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        for raw_line in stream:
            number += 1
            line = raw_line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            if line and not line.isspace():
                yield number, line
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}:{number}: byte {error.start + 1} of the line is not UTF-8 text") from error
    except EOFError as error:
        raise ValueError(f"{path}:{number + 1}: the gzip file is cut off here; fetch it again") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}:{number + 1}: the gzip data is damaged here ({error}); fetch it again") from error


def csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Line number and stripped cells of every row. A quoted cell ends on its line: no column we read holds text."""
    for number, line in text_lines(path):
        try:
            row = next(csv.reader([line], strict=True)) if '"' in line else line.split(",")
        except csv.Error as error:
            raise ValueError(f"{path}:{number}: not a CSV row ({error})") from error
        yield number, [cell.strip() for cell in row]


def shown(text: str) -> str:
    """What a file says, quoted for a message, and cut where it is long."""
    return repr(text if len(text) <= 60 else text[:60] + "...")


def whole_number(text: str) -> int:
    """A count written in plain digits, at most nine of them: no sign, no fraction, no underscore."""
    if not (text.isascii() and text.isdigit() and len(text) <= 9):
        raise ValueError(f"{shown(text)} is not a whole number of tokens (0 to 999999999)")
    return int(text)


def write_whole(path: Path, content: bytes) -> None:
    """Write to a neighbouring file, then rename: a reader sees the old file or the new one, never half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:  # in the name that the caller knows
        raise type(error)(error.errno, error.strerror, str(path)) from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def lock(file: IO[bytes], where: Path, instead: str) -> None:
    """Until the file is closed, or this process is gone, nobody else locks it. Raises ValueError if somebody has:
    `where` they write, and what the user may give `instead`."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{where}: another weft writes there; wait until it has ended, or give {instead}") from None
