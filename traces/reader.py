"""Reading request traces: Azure, Mooncake, BurstGPT and plain CSV, as text or gzip.

| name     | columns                                                    | time                       |
|----------|------------------------------------------------------------|----------------------------|
| azure    | TIMESTAMP, ContextTokens, GeneratedTokens                  | wall clock, any fraction   |
| burstgpt | Timestamp, Request tokens, Response tokens, others ignored | seconds                    |
| mooncake | JSON lines: timestamp, input_length, output_length         | milliseconds               |
| csv      | one name of each tuple in `FORMATS["csv"]`; output optional | seconds                    |

Names are matched without regard to case or order. A csv file of bare numbers is read as arrival, prompt, output.
Files must be sorted by time, as the published ones are: a step back in time is more often damage than disorder.
BurstGPT marks failed requests with 0 response tokens; they are dropped and counted.
Mooncake's recorded traces are stamped in steps of about 3 s; pass `spread_rng` to spread each step.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np

from traces.arrivals import US_PER_S
from traces.files import csv_rows, shown, text_lines, whole_number
from traces.trace import Trace, make_trace
from traces.transform import spread_buckets

DatasetName = Literal["auto", "azure", "mooncake", "burstgpt", "csv"]
DATASET_NAMES: tuple[DatasetName, ...] = ("auto", "azure", "mooncake", "burstgpt", "csv")
Row = tuple[int, float, int, int]
"""Line number, time in the unit of the format, prompt tokens, output tokens."""

TICKS_PER_S = 10_000_000
LONGEST_S = 1e12
CLOCK = re.compile(r"(\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(Z|[+-]\d\d:\d\d)?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Format:
    """Names that a CSV column may have, and how its times are written."""

    arrival: tuple[str, ...]
    prompt: tuple[str, ...]
    output: tuple[str, ...]
    read_time: Callable[[str], float]
    units_per_s: int = 1
    needs_output: bool = True
    drops_failures: bool = False


def _clock_ticks(text: str) -> float:
    """Wall clock as a whole number of 100 ns ticks: a float of seconds since 1970 could not hold them."""
    match = CLOCK.fullmatch(text)
    if match is None:
        raise ValueError(f"time {text!r} is not a date and time such as 2023-11-16 18:15:46.6805900")
    seconds = _whole_seconds(match[1] + (match[3] or "+00:00"))
    return seconds * TICKS_PER_S + int((match[2] or "0").ljust(7, "0")[:7])


@lru_cache(maxsize=16)
def _whole_seconds(text: str) -> int:
    """Seconds since 1970; neighbouring rows share a second, and parsing a date is the slow part."""
    return round(datetime.fromisoformat(text).astimezone(UTC).timestamp())


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not abs(value) < LONGEST_S or "_" in text:
        raise ValueError(f"time {text!r} is not a number of seconds")
    if value < 0.0:
        raise ValueError(f"time {text} is negative; times count up from 0")
    return value


FORMATS: dict[str, Format] = {
    "azure": Format(("timestamp",), ("contexttokens",), ("generatedtokens",), _clock_ticks, TICKS_PER_S),
    "burstgpt": Format(("timestamp",), ("request tokens",), ("response tokens",), _seconds, drops_failures=True),
    "csv": Format(
        ("arrival_s", "arrived_at", "arrival_time", "timestamp"),
        ("num_prompt_tokens", "num_prefill_tokens", "prompt_tokens", "input_tokens", "input_length", "input_len"),
        ("num_output_tokens", "num_decode_tokens", "output_tokens", "output_length", "output_len"),
        _seconds,
        needs_output=False,
    ),
}


def read_trace(path: Path | str, dataset_name: str = "auto", spread_rng: np.random.Generator | None = None) -> Trace:
    """Read a trace; the first arrival moves to 0. `auto` tells the format by the first line.

    With `spread_rng`, requests that share a time stamp are spread at random inside their step (off by default).
    """
    path = Path(path)
    if dataset_name not in DATASET_NAMES:
        raise ValueError(f"dataset name {dataset_name!r} is not known; use one of {', '.join(DATASET_NAMES)}")
    number, first = next(text_lines(path), (1, ""))
    if not first:
        raise ValueError(f"{path}:1: the file is empty; a trace with at least one request was expected")
    name = _detect(path, number, first) if dataset_name == "auto" else dataset_name
    if name == "mooncake":
        trace = _collect(path, _mooncake_rows(path), 1000, False)
    else:
        trace = _collect(path, _csv_rows(path, name), FORMATS[name].units_per_s, FORMATS[name].drops_failures)
    return trace if spread_rng is None else spread_buckets(trace, spread_rng)


def _collect(path: Path, rows: Iterator[Row], units_per_s: int, drops_failures: bool) -> Trace:
    """Check what every format must hold (order, prompt length) and build the trace."""
    times: list[float] = []
    prompts: list[int] = []
    outputs: list[int] = []
    num_dropped, number, last = 0, 1, -math.inf
    for number, time, prompt, output in rows:
        if time < last:
            raise ValueError(
                f"{path}:{number}: this request comes {(last - time) / units_per_s:g} s before the one above it; "
                "sort the file by time"
            )
        last = time
        if drops_failures and output == 0:
            num_dropped += 1
            continue
        if prompt < 1:
            raise ValueError(f"{path}:{number}: the request has {prompt} prompt tokens; it needs at least 1")
        times.append(time)
        prompts.append(prompt)
        outputs.append(output)
    if not times:
        raise ValueError(f"{path}:{number}: no requests in the file ({num_dropped} failed requests were dropped)")
    since_first = [time - times[0] for time in times]  # exact for ticks, which are whole numbers too long for a float
    arrivals_us = np.array(since_first, dtype=np.float64) * US_PER_S / units_per_s
    return make_trace(arrivals_us, (prompts, outputs), str(path), num_dropped)


def _detect(path: Path, number: int, first: str) -> str:
    if first.lstrip().startswith("{"):
        return "mooncake"
    header = _header(next(csv_rows(path))[1])
    for name, form in FORMATS.items():
        if _columns(form, header) is not None:
            return name
    raise ValueError(
        f"{path}:{number}: cannot tell the format from the first line ({shown(first)}); "
        "expected azure (TIMESTAMP,ContextTokens,GeneratedTokens), burstgpt (Timestamp,...,Request tokens,"
        "Response tokens), mooncake (JSON lines) or csv (arrival_s,num_prompt_tokens,num_output_tokens)"
    )


def _header(cells: list[str]) -> list[str]:
    """Lower-case column names; a first row of bare numbers stands for the plain columns in their usual order."""
    if len(cells) in (2, 3) and all(re.fullmatch(r"[+-]?[\d.]+(e[+-]?\d+)?", cell, re.I) for cell in cells):
        return ["arrival_s", "num_prompt_tokens", "num_output_tokens"][: len(cells)]
    return [cell.lower() for cell in cells]


def _columns(form: Format, header: list[str]) -> tuple[int, int, int | None] | None:
    """Positions of arrival, prompt and output in the header, or None where one that is needed is missing."""
    found = [
        next((header.index(name) for name in names if name in header), None)
        for names in (form.arrival, form.prompt, form.output)
    ]
    arrival, prompt, output = found
    if arrival is None or prompt is None or (output is None and form.needs_output):
        return None
    return arrival, prompt, output


def _csv_rows(path: Path, name: str) -> Iterator[Row]:
    form = FORMATS[name]
    header: list[str] = []
    arrival, prompt, output = 0, 0, None
    for number, cells in csv_rows(path):
        if not header:
            header = _header(cells)
            arrival, prompt, output = _require_columns(path, number, name, header)
            if header == [cell.lower() for cell in cells]:
                continue
        if len(cells) != len(header):
            raise ValueError(f"{path}:{number}: the row has {len(cells)} columns where the first row has {len(header)}")
        try:
            time = form.read_time(cells[arrival])
            tokens = whole_number(cells[prompt]), 0 if output is None else whole_number(cells[output])
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from error
        yield number, time, *tokens


def _require_columns(path: Path, number: int, name: str, header: list[str]) -> tuple[int, int, int | None]:
    form = FORMATS[name]
    found = _columns(form, header)
    if found is None:
        wanted = [form.arrival, form.prompt] + ([form.output] if form.needs_output else [])
        expected = ", ".join("|".join(names) for names in wanted)
        raise ValueError(f"{path}:{number}: {name} needs the columns {expected}; found {shown(', '.join(header))}")
    return found


def _mooncake_rows(path: Path) -> Iterator[Row]:
    for number, line in text_lines(path):
        try:
            yield number, *_mooncake_row(json.loads(line))
        except (ValueError, RecursionError) as error:
            reason = str(error).partition("; use sys.")[0]  # Python's advice on numbers of thousands of digits
            if isinstance(error, json.JSONDecodeError | RecursionError):
                reason = "not one JSON object"
            raise ValueError(f"{path}:{number}: {reason}") from error


def _mooncake_row(record: object) -> tuple[float, int, int]:
    if not isinstance(record, dict):
        raise ValueError("not one JSON object")
    missing = [key for key in ("timestamp", "input_length", "output_length") if key not in record]
    if missing:
        raise ValueError(f"{', '.join(missing)} is missing; each line needs timestamp, input_length, output_length")
    time = record["timestamp"]
    if isinstance(time, bool) or not isinstance(time, int | float) or not abs(time) < 1e3 * LONGEST_S:
        raise ValueError(f"timestamp {shown(str(time))} is not a number of milliseconds")
    if time < 0:
        raise ValueError(f"timestamp {time} is negative; times count up from 0")
    lengths = [record["input_length"], record["output_length"]]
    for length in lengths:
        if isinstance(length, bool) or not isinstance(length, int) or not 0 <= length < 1_000_000_000:
            raise ValueError(f"{shown(str(length))} is not a whole number of tokens (0 to 999999999)")
    return float(time), lengths[0], lengths[1]
