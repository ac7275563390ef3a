"""The simulator and the executor, given one log of admissions and one profile, make the same list of rounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from executor.order import RoundsHash
from executor.plan_cache import PlanCache
from executor.results import Output
from executor.settings import RunSettings
from models.config import MODELS
from models.transformer import Layout
from policy.options import Options
from policy.round import Round
from policy.scheduler import POLICIES, Admission, Scheduler
from sim.replay import planned, replay
from sim.simulate import Fidelity, Simulation
from sim.spec import load_node
from tests.executor.worlds import fresh_scheduler, requests, run_of, run_world

TP2 = Layout(2, 1)
SMALL = Options(pad_to=8, max_wait_us=500.0)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[RunSettings], list[Output]]:
    runs = [
        run_of("interleaved", TP2, host_delay_us=200.0),
        run_of("interleaved", TP2, options=replace(SMALL, slo_us=20_000.0, adaptive=False)),
        run_of("interleaved", TP2, profile=None),  # measured in the run
        run_of("liger-artifact", TP2, device_delay_us=200.0),
        run_of("tensor", TP2),
        run_of("pipeline", Layout(1, 2)),
    ]
    return runs, run_world(tmp_path_factory.mktemp("agreement"), runs)


def _hash(rounds: tuple[Round, ...]) -> str:
    hashed = RoundsHash()
    for round_ in rounds:
        hashed.add(round_)
    return hashed.digest()


@pytest.mark.parametrize("number", range(6))
def test_the_simulated_rounds_are_the_real_ones(number: int, world: tuple[list[RunSettings], list[Output]]) -> None:
    run, output = world[0][number], world[1][number]
    simulation = Simulation(
        load_node("h200-nvlink-x4"), run.layout, fresh_scheduler(run, output.profile), Fidelity(exact=True)
    )
    replayed = replay(simulation, run.requests, output.log)
    assert _hash(replayed.rounds) == output.rounds_hash
    assert replayed.rounds == planned(fresh_scheduler(run, output.profile), run.requests, output.log)
    # And every request is answered there too, not before it came.
    assert len(replayed.timeline.completions) == len(run.requests)
    assert all(done.finished_us > done.request.arrival_us for done in replayed.timeline.completions)


def test_a_measured_profile_is_kept_with_the_run(world: tuple[list[RunSettings], list[Output]]) -> None:
    table = world[1][2].profile
    assert table is not None
    assert {entry["name"] for entry in table["gemms"]} == {"qkv_proj", "out_proj", "fc1", "fc2", "lm_head"}
    durations = [us for entry in table["gemms"] for row in entry["us"] for us in row]
    assert all(0.0 < us < 1e6 for us in durations)


def test_a_log_that_does_not_fit_is_refused(world: tuple[list[RunSettings], list[Output]]) -> None:
    run, output = world[0][0], world[1][0]
    with pytest.raises(ValueError, match="the log admits 10 requests, which are not the 9 of the run"):
        planned(fresh_scheduler(run, output.profile), run.requests[:9], output.log)
    late = [*output.log[:-1], replace(output.log[-1], round_id=10_000)]
    with pytest.raises(ValueError, match="before round 10000, but nothing is in flight"):
        planned(fresh_scheduler(run, output.profile), run.requests, late)


def _random_log(
    scheduler: Scheduler, run: RunSettings, coin: Callable[[], bool]
) -> tuple[list[Round], list[Admission]]:
    """Requests that come at random rounds."""
    waiting, rounds = list(run.requests), []
    while True:
        if waiting and (coin() or not scheduler.state.flights):
            scheduler.add(waiting.pop(0))
        scheduler.enter(scheduler.admit(0.0, last=not waiting), 0.0)
        round_ = scheduler.next_round(0.0)
        if round_ is not None:
            rounds.append(round_)
        elif not waiting:
            return rounds, scheduler.log


VARIED = (
    Options(pad_to=8),
    Options(pad_to=16, adaptive=False),
    Options(pad_to=8, adaptive=False, sync="inter-stream", depth=3),
    Options(batch_size=1, pad_to=8, sync="cpu-gpu", decomposition="cols"),
    Options(switch_points=False, adaptive=False),
)


@settings(derandomize=True, deadline=None, max_examples=25)
@given(st.randoms(use_true_random=False), st.sampled_from(["interleaved", "liger-artifact"]), st.sampled_from(VARIED))
def test_remembered_plans_are_the_plans(rng: object, policy: str, options: Options) -> None:
    """Caching plans by situation changes no round, however deep the model and whatever enters when."""
    deep = replace(MODELS["tiny-opt"], num_layers=40)
    run = run_of(policy, TP2, model=deep, options=options, requests=requests(14))
    scheduler = fresh_scheduler(run, None)
    rounds, log = _random_log(scheduler, run, lambda: rng.random() < 0.2)  # type: ignore[attr-defined]
    cached = fresh_scheduler(run, None)
    cache = cached.plan = PlanCache(POLICIES[policy])
    assert list(planned(cached, run.requests, log)) == rounds
    assert cache.hits > 0


def test_plans_are_really_remembered() -> None:
    run = run_of("interleaved", TP2, model=replace(MODELS["tiny-opt"], num_layers=96), options=Options(adaptive=False))
    cache = PlanCache(POLICIES["interleaved"])
    for _ in range(2):
        scheduler = fresh_scheduler(run, None)
        scheduler.plan = cache
        _random_log(scheduler, run, lambda: True)
    assert cache.hits > 4 * cache.misses


def test_plans_come_back_near_the_end_of_batches() -> None:
    """What a plan is remembered for is how many layers it needs, not how many there were: two batches side by side run
    through their last ten layers on plans of the layers before."""
    run = run_of(
        "interleaved", TP2, model=replace(MODELS["tiny-opt"], num_layers=40), requests=requests(2),
        options=Options(batch_size=1, pad_to=128, adaptive=False),
    )  # fmt: skip
    scheduler = fresh_scheduler(run, None)
    cache = scheduler.plan = PlanCache(POLICIES["interleaved"])
    missed_at = list[int]()
    for request in run.requests:
        scheduler.add(request)
    scheduler.enter(scheduler.admit(0.0, last=True), 0.0)
    while scheduler.state.flights:
        before, flight = cache.misses, scheduler.state.flights[0]
        scheduler.next_round()
        if cache.misses > before:
            missed_at.append(flight.vector.locate(flight.cursor)[0])
    assert cache.hits > cache.misses
    assert not [layer for layer in missed_at if 28 <= layer <= 36]


@settings(derandomize=True, deadline=None, max_examples=15)
@given(st.randoms(use_true_random=False), st.sampled_from(["interleaved", "liger-artifact", "tensor"]))
def test_planning_ahead_changes_no_round(rng: object, policy: str) -> None:
    """A host that foresees rounds, whenever it likes, plans what it would have planned, whoever enters meanwhile."""
    run = run_of(policy, TP2, options=Options(pad_to=8), requests=requests(14))
    scheduler = fresh_scheduler(run, None)
    rounds, log = _random_log(scheduler, run, lambda: rng.random() < 0.2)  # type: ignore[attr-defined]
    ahead = fresh_scheduler(run, None)
    plain = ahead.next_round

    def next_round(now_us: float = 0.0) -> Round | None:
        round_ = plain(now_us)
        if rng.random() < 0.7:  # type: ignore[attr-defined]
            ahead.foresee()
        return round_

    ahead.next_round = next_round  # type: ignore[method-assign]
    assert list(planned(ahead, run.requests, log)) == rounds
