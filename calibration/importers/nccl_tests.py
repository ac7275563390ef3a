"""The text that nccl-tests prints: a header with the ranks, then a line per size; out-of-place times are taken.

Newer versions name the operation ("Collective test starting: all_reduce_perf"); for older ones a quoted command line
may, or the user says it. It is checked against the file: bus bandwidth is algorithm bandwidth times a factor that
depends on the operation and the ranks. Several runs may follow each other in one file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from calibration.importers.found import Found, Request, Sample
from calibration.importers.points import collective_at
from traces.files import text_lines

PROGRAM = re.compile(r"\b([a-z_]+)_perf\b")
RANK = re.compile(r"#\s*Rank\s+(\d+)\s.*?\bon\s+(\S+)\s+device\s+\d+\s+\[[^]]*\]\s*(.*)")
# What stands above the results of a run: its command line, its name, its parameters.
STARTS = ("_perf -", "Collective test starting", "minBytes")
LIBRARY = re.compile(r"nccl-library=(\d+)")
ITERATIONS = re.compile(r"(?<!warmup )(?<!agg )\biters:\s*(\d+).*?\bgraph:\s*(\d+)")

OPS = {"all_reduce": "all_reduce", "all_gather": "all_gather", "sendrecv": "send"}
OTHERS = ("alltoall", "broadcast", "gather", "hypercube", "reduce", "reduce_scatter", "scatter")
# Bus bandwidth over algorithm bandwidth among n ranks, as nccl-tests defines it.
BUS_FACTOR: dict[str, Callable[[int], float]] = {
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "all_gather": lambda n: (n - 1) / n,
    "sendrecv": lambda n: 1.0,
}
FACTOR_TOLERANCE = 0.02
LEAST_GB_S = 5.0  # below, two printed decimals do not tell the factor


@dataclass(slots=True)
class _Run:
    """What the header of one run says."""

    op: str = ""
    ranks: dict[int, str] = field(default_factory=dict)
    iterations: int = 1
    graph: bool = False
    columns: dict[str, int] = field(default_factory=dict)


def read_nccl_tests(paths: Sequence[Path], request: Request) -> Found:
    """The rows of several files of one machine.

    Raises ValueError for files without results, broken lines, wrong results, ranks on several hosts, and an operation
    that is not named or does not fit the numbers.
    """
    if request.op and request.op not in (*OPS, *OTHERS):
        raise ValueError(f"--op {request.op!r} is not one of {', '.join((*OPS, *OTHERS))}")
    found = Found()
    for path in paths:
        before = len(found.samples) + found.left_out.total()
        _read(path, request, found)
        if len(found.samples) + found.left_out.total() == before:
            raise ValueError(f"{path}:1: no line of results of nccl-tests was found")
    return found


def _read(path: Path, request: Request, found: Found) -> None:
    run = _Run()
    for number, line in text_lines(path):
        where = f"{path}:{number}"
        words = line.split()
        if run.columns and words[0].isdigit():
            _result(words, run, where, request, found)
            continue
        if run.columns and any(sign in line for sign in STARTS):
            run = _Run()  # the next run's header
        _header(line, words, run, where, found)


def _header(line: str, words: list[str], run: _Run, where: str, found: Found) -> None:
    if match := RANK.match(line):
        run.ranks[int(match[1])] = match[2]
        found.say("gpu", match[3].strip(), where)
        if len(set(run.ranks.values())) > 1:
            raise ValueError(f"{where}: the ranks are on several hosts ({match[2]} too); a node is one host")
    elif match := ITERATIONS.search(line):
        run.iterations, run.graph = max(1, int(match[1])), match[2] != "0"
    elif words[:2] == ["#", "size"] or words[:2] == ["#", "bytes"]:
        names = words[1:]
        if "time" not in names or "busbw" not in names:
            raise ValueError(f"{where}: the header has no columns time and busbw; found {', '.join(names)}")
        run.columns = {name: names.index(name) for name in names}  # the first of each name: out of place
    elif "concluded" not in line and (match := PROGRAM.search(line)):
        run.op = match[1]
    if match := LIBRARY.search(line):
        found.say("nccl", _version(int(match[1])), where)


def _version(number: int) -> str:
    """22707 is 2.27.7; before 2.9 it was 2804 for 2.8.4."""
    major, rest = divmod(number, 10_000) if number >= 10_000 else divmod(number, 1000)
    return f"{major}.{rest // 100}.{rest % 100}"


def _result(words: list[str], run: _Run, where: str, request: Request, found: Found) -> None:
    op = run.op or request.op
    if not op:
        raise ValueError(f"{where}: the file does not name the operation; give --op all_reduce, all_gather or sendrecv")
    if len(run.ranks) < 2:
        raise ValueError(f"{where}: {len(run.ranks)} ranks are listed above this line; expected 2 or more '# Rank ...'")
    if len(words) <= max(run.columns.values()):
        raise ValueError(f"{where}: the line has {len(words)} columns where the header has {len(run.columns)} or more")
    if op not in OPS:
        found.left_out[f"{op}, which no layer of ours uses"] += 1
        return
    size = int(words[0])
    if size == 0:
        found.left_out["messages of 0 bytes"] += 1
        return
    time, algbw, busbw = (_number(words[run.columns[name]], name, where) for name in ("time", "algbw", "busbw"))
    if time <= 0.0:
        raise ValueError(f"{where}: time is {words[run.columns['time']]!r}; expected microseconds above 0")
    wrong = next((words[run.columns[name]] for name in ("#wrong", "error") if name in run.columns), "0")
    if wrong not in ("0", "N/A") and _number(wrong, "#wrong", where) != 0.0 and "#wrong" in run.columns:
        raise ValueError(f"{where}: {wrong} wrong results; a time of wrong results is no measurement")
    _check_factor(op, len(run.ranks), algbw, busbw, where)
    found.notes["collective"] = "nccl-tests, out of place" + (", in a CUDA graph" if run.graph else ", no graph")
    found.also("dtype", words[run.columns["type"]] if "type" in run.columns else "")
    # A send is between two ranks, however many send at once.
    ranks = 2 if op == "sendrecv" else len(run.ranks)
    at = collective_at(OPS[op], size, ranks)
    found.samples.append(Sample("collective", at, {"us": time}, run.iterations))


def _check_factor(op: str, ranks: int, algbw: float, busbw: float, where: str) -> None:
    expected = BUS_FACTOR[op](ranks)
    if algbw >= LEAST_GB_S and abs(busbw / algbw - expected) > FACTOR_TOLERANCE * expected:
        raise ValueError(
            f"{where}: busbw is {busbw / algbw:.2f} times algbw, but {op} among {ranks} ranks has {expected:.2f}; "
            "is the operation right?"
        )


def _number(text: str, name: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value < 1e12:
        raise ValueError(f"{where}: {name} is {text!r}; expected a number")
    return value
