"""Real gloo processes: overlapping changes no bit, layouts agree, waiting buffers may hold anything."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from executor.execute import Driver
from executor.launch import launch
from executor.results import Output
from executor.settings import RunSettings, Settings
from models.config import MODELS
from models.transformer import Layout
from policy.options import Options
from policy.round import Launch, Mark
from policy.scheduler import POLICIES
from sim.replay import planned
from tests.executor import random_plan
from tests.executor.worlds import TINY, fresh_scheduler, logits, requests, run_of, run_world

DELAYS = {"host_delay_us": 400.0, "device_delay_us": 400.0}
SMALL = Options(pad_to=8, max_wait_us=500.0)
AT_ONCE = {"requests": requests(10), "options": Options(pad_to=8)}
TP2, TP4 = Layout(2, 1), Layout(4, 1)


@dataclass(frozen=True)
class Finished:
    """Runs of one world: the even ones overlapped and delayed, each followed by its launches one at a time."""

    runs: list[RunSettings]
    outputs: list[Output]
    folder: Path

    def launches(self, number: int) -> list[Launch]:
        run, output = self.runs[number], self.outputs[number]
        scheduler = fresh_scheduler(run, output.profile)
        rounds = planned(scheduler, run.requests, output.log)
        return [launch for round_ in rounds for launch in round_.launches]

    def check_serial(self) -> None:
        for number in range(0, len(self.runs), 2):
            overlapped, serial = self.outputs[number], self.outputs[number + 1]
            assert len(overlapped.hashes) == overlapped.timeline.num_batches
            assert overlapped.hashes == serial.hashes, f"run {number}: {self.runs[number].policy}"
            assert overlapped.rounds_hash == serial.rounds_hash
            answered = sorted(completion.request.request_id for completion in overlapped.timeline.completions)
            assert answered == list(range(10))


def _finish(folder: Path, runs: list[RunSettings], **world: Any) -> Finished:
    both: list[RunSettings] = []
    for run in runs:
        both.append(msgspec.structs.replace(run, delay_seed=len(both), **DELAYS))
        both.append(msgspec.structs.replace(run, replay=len(both) - 1, serial=True))
    return Finished(both, run_world(folder, both, **world), folder)


IMITATED = (sys.executable, str(Path(__file__).with_name("imitated_graphs.py")))


def test_captured_ranges_compute_what_the_same_launches_do_one_by_one(tmp_path: Path) -> None:
    """Everything captured ahead for every length, sealed, then served: overlapped, delayed, and again serially."""
    forced = replace(SMALL, adaptive=False)
    runs = [
        run_of("interleaved", TP2, options=forced, warm_up=True),
        run_of("interleaved", TP2, options=replace(forced, decomposition="cols", chunks=True), warm_up=True),
        run_of("tensor", TP2, warm_up=True),
        run_of("liger-artifact", TP2, warm_up=True),
        run_of("hybrid", Layout(1, 2), warm_up=True),
    ]
    finished = _finish(tmp_path, runs, program=IMITATED)
    finished.check_serial()
    assert all(output.num_graphs > 10 for output in finished.outputs[:6])


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    forced = replace(SMALL, adaptive=False)
    glm = replace(MODELS["tiny-glm"], vocab_size=0)
    runs = [
        run_of("interleaved", TP2),
        run_of("interleaved", TP2, options=replace(forced, decomposition="rows")),
        run_of("interleaved", TP2, options=replace(forced, decomposition="cols", depth=3, batch_size=1)),
        run_of("interleaved", TP2, options=replace(forced, sync="inter-stream", lookahead=False)),
        run_of("interleaved", TP2, model=MODELS["tiny-llama"], requests=requests(10, 200.0), options=forced),
        run_of("liger-artifact", TP2),
        run_of("tensor", TP2),
        run_of("tensor", TP2, options=replace(SMALL, capture=False, sync="cpu-gpu")),
        run_of("pipeline", Layout(1, 2)),
        run_of("interleaved", TP2, model=glm, dtype="bfloat16"),
    ]
    return _finish(tmp_path_factory.mktemp("two"), runs)


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    four_layers = MODELS["tiny-opt"]
    runs = [
        run_of("tensor", TP4, **AT_ONCE),
        run_of("pipeline", Layout(1, 4), **{**AT_ONCE, "model": four_layers}),
        run_of("hybrid", Layout(2, 2), **AT_ONCE),
        run_of("interleaved", TP4, **AT_ONCE),
    ]
    return _finish(tmp_path_factory.mktemp("four"), runs)


def test_overlap_changes_no_bit_on_two_ranks(two_ranks: Finished) -> None:
    two_ranks.check_serial()


def test_overlap_changes_no_bit_on_four_ranks(four_ranks: Finished) -> None:
    four_ranks.check_serial()


def test_batches_really_overlapped(two_ranks: Finished) -> None:
    for number in (0, 2, 4, 6, 8, 10):
        assert {"fill", "compute"} <= {str(launch.lane) for launch in two_ranks.launches(number)}
        assert two_ranks.outputs[number].timeline.overlap_us > 0.0
        assert two_ranks.outputs[number + 1].timeline.overlap_us < 1.0  # one launch at a time


def test_any_legal_plan_computes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random lanes, cuts along every axis, any order between batches: the driver keeps what depends on what."""
    monkeypatch.setitem(POLICIES, "interleaved", random_plan.plan)
    models = (TINY, MODELS["tiny-llama"], MODELS["tiny-glm"])
    runs = [run_of("interleaved", TP2, model=model, **AT_ONCE) for model in models]
    runs.append(run_of("interleaved", TP2, requests=requests(10, 100.0), dtype="float16"))
    finished = _finish(tmp_path, runs, program=(sys.executable, random_plan.__file__))
    finished.check_serial()
    cuts = {launch.fragment.axis for n in (0, 2, 4, 6) for launch in finished.launches(n) if launch.fragment}
    assert cuts == {"rows", "cols", "chunks"}


def test_latencies_are_times_of_the_run(two_ranks: Finished) -> None:
    first = two_ranks.outputs[0]
    for completion in first.timeline.completions:
        assert completion.request.arrival_us <= completion.admitted_us < completion.finished_us
    assert first.timeline.end_us <= first.wall_s * 1e6


@pytest.mark.parametrize(("number", "reference"), [(0, 0), (2, 1), (4, 0), (6, 0)])
def test_layouts_equal_one_process(number: int, reference: int, four_ranks: Finished, one_process: Path) -> None:
    ours, theirs = logits(four_ranks.folder, number), logits(one_process, reference)
    assert ours.keys() == theirs.keys()
    for batch_id, expected in theirs.items():
        np.testing.assert_allclose(ours[batch_id], expected, rtol=0.0, atol=1e-5 * np.abs(expected).max())


@pytest.fixture(scope="module")
def one_process(four_ranks: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    models = [four_ranks.runs[number].model for number in (0, 2)]
    run_world(folder, [run_of("tensor", Layout(1, 1), **{**AT_ONCE, "model": model}) for model in models])
    return folder


def test_a_request_is_answered_when_it_is_done_and_not_when_the_next_one_comes(tmp_path: Path) -> None:
    apart = (replace(requests(1)[0]), replace(requests(2)[1], arrival_us=1.5e6))
    answered: list[float] = []
    run = run_of("tensor", TP2, requests=apart)
    launch(
        Settings(runs=(run,), output=str(tmp_path)), progress=lambda count: answered.extend([time.monotonic()] * count)
    )
    assert len(answered) == 2
    assert answered[1] - answered[0] > 1.0


@pytest.mark.parametrize("spin", [True, False])
def test_a_batch_is_answered_when_it_is_through_and_not_when_the_next_one_is(
    monkeypatch: pytest.MonkeyPatch, spin: bool
) -> None:
    """The first batch ends at 3 while the host waits for a mark of the second, which is reached at 9."""
    now, answered = [0], list[tuple[str, int]]()
    first, second = (
        SimpleNamespace(name=name, is_issued=True, end=end) for name, end in (("first", 3), ("second", 20))
    )
    flights = {0: first, 1: second}

    def later() -> int:
        now[0] += 1
        return now[0]

    def take_finished() -> list[SimpleNamespace]:
        over = [number for number, flight in flights.items() if flight.end <= now[0]]
        return [flights.pop(number) for number in over]

    lanes = SimpleNamespace(spin=spin, is_done=lambda ticket: ticket <= later())
    waits: list[int] = []
    driver = Driver.__new__(Driver)
    driver.device = SimpleNamespace(  # type: ignore[assignment]
        parts=SimpleNamespace(lanes=lanes), flights=flights, ticket=lambda mark: 9, take_finished=take_finished,
        synchronize=lambda mark: waits.append(now[0]),
    )  # fmt: skip
    monkeypatch.setattr(Driver, "_answer", lambda self, flight: answered.append((flight.name, now[0])))
    driver._await(Mark(1, 5))
    assert answered == [("first", 3)]
    assert waits == [9] and list(flights) == [1]
