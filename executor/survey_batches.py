"""Two batches through a forward pass, every schedule of one pair of batches in turn, so that a drift hits all alike."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from executor.lanes import StreamKey
from executor.rehearsal import forced
from executor.session import Opened
from executor.survey_bed import Bed
from executor.survey_bench import Bench, Row, sample_of
from executor.survey_cuda import Captured, CudaBench
from executor.survey_points import COMM_ALONE, COMPUTE_ALONE, PLAIN, POLICY, SERIAL, Point
from executor.two_batches import captured, in_words, only, plan, serially, undivided
from policy.options import Options
from policy.round import Lane

PASSES, REPLAYS = 2, 3
# A schedule runs for so long before it is timed, in both passes: after 60 ms long ones were up to 2 % faster.
SETTLE_US = 200_000.0
MOST_RUN_IN = 100


@dataclass(frozen=True, slots=True)
class Built:
    """A schedule as a graph, and its plan in words where it has one."""

    graph: Captured
    notes: dict[str, str] | None = None


def measure_batches(
    bed: Bed, bench: Bench, points: list[Point], folder: Path | None, guard: Callable[[Exception], str]
) -> list[Row | str]:
    """The points of one pair of batches; a schedule that fails is its reason, in the words of `guard`."""
    opened = bed.two(int(points[0].at["rows"]), folder)
    bed.load_own_tokens()
    if not isinstance(bench, CudaBench):
        # A CPU's lanes are threads that share its cores: only one batch after the other means anything there.
        return [Row({"us": bench.compute(0, [serially(opened.device, opened.shapes[-1])], 0.0)}) for _ in points]
    torch.cuda.empty_cache()  # every graph has memory of its own; what the last ones had comes back only so
    built: dict[int, Built] = {}
    found: dict[int, Row | str] = {}
    for number, point in enumerate(points):
        try:
            built[number] = _build(opened, bench, str(point.at["schedule"]))
        except Exception as error:
            found[number] = guard(error)
    counts = {number: _run_in(bed, bench, number, schedule.graph) for number, schedule in built.items()}
    times: dict[int, list[float]] = {number: [] for number in built}
    for _ in range(PASSES):
        for number, schedule in built.items():
            for _ in range(counts[number]):
                schedule.graph.replay()
            times[number] += bench.replays_us(schedule.graph, REPLAYS)
    for number, schedule in built.items():
        found[number] = Row({"us": sample_of(times[number])}, schedule.notes)
    return [found[number] for number in range(len(points))]


def _run_in(bed: Bed, bench: CudaBench, number: int, graph: Captured) -> int:
    """How often a schedule runs before it is timed, for the device to be as warm as it makes it: equally often on all
    ranks, which wait for each other in it."""
    needed = math.ceil(SETTLE_US / bench.replays_us(graph, 1)[0])
    return bed.session.mail.share(f"run in/{number}", min(MOST_RUN_IN, needed), int)


def _build(opened: Opened, bench: CudaBench, schedule: str) -> Built:
    lanes, options, what = bench.lanes, opened.run.options, (opened.device, opened.shapes[-1])
    whole = {SERIAL: serially(*what), COMPUTE_ALONE: only(*what, comm=False), COMM_ALONE: only(*what, comm=True)}
    if schedule in whole:
        key = StreamKey(Lane.COMM if schedule == COMM_ALONE else Lane.COMPUTE)
        return Built(Captured(captured(whole[schedule], opened, key), lanes.stream(key), 1))
    graph, words = _planned(opened, _options(options, schedule))
    return Built(Captured(graph, lanes.stream(StreamKey(Lane.COMPUTE)), 1), {"plan": words})


def _options(options: Options, schedule: str) -> Options:
    """From the name of a schedule."""
    if schedule == POLICY:
        return options
    if schedule == PLAIN:
        return undivided(options)
    words = schedule.split()
    assert words[0] == "partition" and words[2] == "ctas"
    return forced(options, int(words[1]), int(words[3]))


def _planned(opened: Opened, options: Options) -> tuple[torch.cuda.CUDAGraph, str]:
    from executor.graphs import capture_plan

    launches = plan(opened, options)
    try:
        return capture_plan(opened.device, launches), in_words(launches)
    finally:
        opened.device.parts.lanes.drain()  # the lanes begin anew: which stream is the current one they may remember
