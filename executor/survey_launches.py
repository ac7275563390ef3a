"""How many CTAs a GEMM or a collective is launched with, and how many of a GEMM's an SM holds: as the profiler sees it,
in one go after everything has been timed, for a profiler slows what it looks at.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from executor.cuda import hold, on
from executor.survey_bed import Bed
from executor.survey_bench import Body, Row, sample_of
from executor.survey_cuda import CudaBench
from executor.survey_points import Point
from executor.survey_traffic import Traffic

# Between two calls comes a kernel of this name, which does nothing.
MARKER, MARKER_CYCLES = "spin_kernel", 100
# Registers of an SM, and in what portions; what a CTA takes of shared memory besides its own.
SM_REGISTERS, REGISTERS_STEP, SHARED_OF_CTA = 65536, 256, 1024


@dataclass(frozen=True, slots=True)
class Sm:
    """What an SM holds at a time: threads, CTAs, bytes of shared memory."""

    threads: int
    ctas: int
    shared: int


# By compute capability (CUDA C++ Programming Guide, technical specifications).
SMS = {
    (8, 0): Sm(2048, 32, 164 * 1024), (8, 6): Sm(1536, 16, 100 * 1024), (8, 9): Sm(1536, 24, 100 * 1024),
    (9, 0): Sm(2048, 32, 228 * 1024), (10, 0): Sm(2048, 32, 228 * 1024),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Launched:
    """One kernel as it was launched."""

    name: str
    ctas: int
    ctas_per_sm: int
    us: float


Call = tuple[torch.cuda.Stream, Body | None]


def launches(bed: Bed, bench: CudaBench, points: Sequence[Point]) -> list[Row | str | None]:
    """A row for every GEMM: its CTAs, and those that an SM holds at a time; of a call of several kernels, those of the
    one that takes longest."""
    if (sm := SMS.get(capability := torch.cuda.get_device_capability())) is None:
        return [f"how many CTAs an SM of compute capability {capability} holds is not known here"] * len(points)
    calls: list[Call] = []
    for point in points:
        calls.append((bench.compute_stream(int(point.at["withheld_sms"])), bed.calls("gemm", point.at)[0][0]))
    return [_row(each) if isinstance(each, Launched) else each for each in _seen(calls, sm)]


def channels(traffic: Traffic, bench: CudaBench, points: Sequence[Point]) -> list[Row | str | None]:
    """A row for every collective: its CTAs on this rank. Every rank must call it."""
    stream = bench.comm_stream()
    found = _seen([(stream, traffic.call(point)) for point in points], None)
    return [Row({"ctas": sample_of([each.ctas])}) if isinstance(each, Launched) else each for each in found]


def _row(kernel: Launched) -> Row:
    found = {"ctas": sample_of([kernel.ctas]), "ctas_per_sm": sample_of([kernel.ctas_per_sm])}
    return Row(found, {"kernel": kernel.name})


def _seen(calls: Sequence[Call], sm: Sm | None) -> list[Launched | str | None]:
    """The kernel of each call, or why it is not known; nothing where this rank has no part in it."""
    for stream, call in calls:  # what is made at a first use is made before
        with on(stream):
            if call is not None:
                call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for stream, call in calls:
            with on(stream):
                hold(MARKER_CYCLES)
                if call is not None:
                    call()
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        trace = json.loads(path.read_bytes())
    groups = kernels_of(trace, sm)
    if len(groups) != len(calls):
        return [f"the profiler saw {len(groups)} of {len(calls)} calls"] * len(calls)
    return [
        None if call is None else max(group, key=lambda k: k.us) if group else "the profiler saw no kernel"
        for (_, call), group in zip(calls, groups, strict=True)
    ]


def kernels_of(trace: dict[str, Any], sm: Sm | None) -> list[list[Launched]]:
    """The kernels behind each marker of a trace, in order of time; without an SM none is asked what it holds."""
    events = [event for event in trace["traceEvents"] if event.get("cat") == "kernel"]
    groups: list[list[Launched]] = []
    for event in sorted(events, key=lambda e: e["ts"]):
        if MARKER in event["name"]:
            groups.append([])
        elif groups:
            about = event["args"]
            x, y, z = about["grid"]
            per_sm = _per_sm(about, sm) if sm is not None else 1
            groups[-1].append(Launched(event["name"], x * y * z, per_sm, event["dur"]))
    return groups


def _per_sm(about: dict[str, Any], sm: Sm) -> int:
    """CTAs of a kernel that an SM holds at a time."""
    x, y, z = about["block"]
    threads = x * y * z
    registers = -(-threads * about["registers per thread"] // REGISTERS_STEP) * REGISTERS_STEP
    shared = about["shared memory"] + SHARED_OF_CTA
    fits = sm.ctas, sm.threads // threads, SM_REGISTERS // max(1, registers), sm.shared // shared
    return max(1, int(min(fits)))
