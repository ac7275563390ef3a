"""What every policy must keep, on random vectors, depths, switches and beliefs that are wrong by up to 10x."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from models.kernel import FunctionVector, Kernel
from models.transformer import BatchShape, Layout
from policy import interleaved
from policy.batch import Batch, Flight, State
from policy.options import Options
from policy.profile import Profile
from policy.round import Lane, Mark, Round
from sim.simulate import Fidelity
from tests.worlds import World, alone, comm, compute, ideal_node, simple_profile, splittable
from traces.timeline import Timeline

SETTINGS = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)  # fmt: skip

kernels = st.one_of(
    st.integers(1, 400).map(lambda us: compute(us / 4)),
    st.integers(1, 400).map(lambda us: comm(us / 4)),
    st.tuples(st.sampled_from([64, 512, 2048]), st.sampled_from([64, 1024])).map(lambda s: splittable(*s)),
)
vectors = st.builds(
    FunctionVector,
    st.lists(kernels, min_size=1, max_size=5).map(tuple),
    st.lists(kernels, max_size=6).map(tuple),
    st.integers(0, 4),
    st.lists(kernels, max_size=2).map(tuple),
)
switches = st.fixed_dictionaries(
    {
        "depth": st.integers(1, 5),
        "switch_points": st.booleans(),
        "duration_matching": st.booleans(),
        "anticipation": st.sampled_from(["pairs", "scalar", "off"]),
        "decomposition": st.sampled_from(["auto", "rows", "cols", "off"]),
        "max_parts": st.integers(2, 9),
        "chunks": st.booleans(),
        "whole_segments": st.sampled_from(["on", "off"]),
        "lookahead": st.booleans(),
        "partition": st.sampled_from([-1, 0, 8]),
        "adaptive": st.booleans(),
        "sync": st.sampled_from(["hybrid", "cpu-gpu", "inter-stream"]),
        "run_ahead": st.integers(0, 2),
        "capture": st.booleans(),
        "priority": st.booleans(),
        "slo_us": st.sampled_from([float("inf"), 100.0, 5000.0]),
    }
)
arrivals = st.lists(st.integers(0, 3000).map(float), min_size=1, max_size=6).map(sorted)
node = ideal_node(slowdown=1.1, launch_us=0.5, collective_launch_us=1.0, event_us=0.1, synchronize_us=0.5, plan_us=0.5)


@pytest.mark.parametrize("policy", ["tensor", "interleaved", "liger-artifact"])
@SETTINGS
@given(st.data())
def test_every_policy_runs_everything_once_in_order_on_all_ranks(policy: str, data: st.DataObject) -> None:
    shapes = data.draw(st.lists(vectors, min_size=1, max_size=3))
    errors = data.draw(st.lists(st.sampled_from([0.1, 0.5, 1.0, 2.0, 10.0]), min_size=3, max_size=3))
    options = alone(**data.draw(switches))

    def believed(kernel: Kernel) -> float:
        return errors[len(kernel.name) % 3]

    world = World(policy, node, [(v,) for v in shapes], options, profile=simple_profile(node, believed))
    times = data.draw(arrivals)
    timeline = world.run(times)  # raises if anything is left over: a deadlock
    assert len(timeline.completions) == len(times)
    assert outcome(timeline) == outcome(
        World(policy, node, [(v,) for v in shapes], options, profile=simple_profile(node, believed)).run(
            times, Fidelity()
        )
    )
    lengths = {i: len(shapes[i % len(shapes)]) for i in range(len(times))}
    issued_once_in_order(world.rounds, lengths)
    waits_look_back(world.rounds)
    runs_once_in_order(timeline, lengths)
    collectives_have_one_order(timeline)


def outcome(timeline: Timeline) -> tuple[object, ...]:
    """What must be the same to the last bit whether or not ranks are folded and repetitions recalled."""
    ends = [(c.request.request_id, c.admitted_us, c.finished_us) for c in timeline.completions]
    return ends, timeline.compute_us, timeline.communication_us, timeline.overlap_us, timeline.num_kernels


def issued_once_in_order(rounds: list[Round], lengths: dict[int, int]) -> None:
    """The launches of a batch tile its vector from first to last, fragments included."""
    at: dict[int, tuple[int, Fraction]] = defaultdict(lambda: (0, Fraction(0)))
    for launch in (launch for round_ in rounds for launch in round_.launches):
        part = launch.fragment
        begins = (launch.first, Fraction(part.start, part.of) if part else Fraction(0))
        assert at[launch.batch_id] == begins
        whole = part is None or part.stop == part.of
        at[launch.batch_id] = (
            (launch.last, Fraction(0)) if whole or part is None else (launch.first, Fraction(part.stop, part.of))
        )
    assert {batch: at[batch] for batch in lengths} == {batch: (n, Fraction(0)) for batch, n in lengths.items()}


def waits_look_back(rounds: list[Round]) -> None:
    """Every wait is for a launch that was issued before: then lanes that run in order cannot deadlock."""
    issued: set[Mark] = set()
    for round_ in rounds:
        for launch in round_.launches:
            for mark in launch.waits:
                assert _implied(mark, issued)
            issued.add(launch.mark)
        assert all(_implied(mark, issued) for mark in round_.synchronize)


def _implied(mark: Mark, issued: set[Mark]) -> bool:
    """Something issued stands for it or for more; the very beginning of a batch needs nothing."""
    if (mark.kernel, mark.part) == (0, 0.0):
        return True
    return any(m.batch_id == mark.batch_id and m.stage == mark.stage and m >= mark for m in issued)


def runs_once_in_order(timeline: Timeline, lengths: dict[int, int]) -> None:
    by_batch = defaultdict(list)
    for span in sorted(timeline.spans, key=lambda s: (s.end_us, s.start_us)):
        by_batch[span.rank, span.batch_id].append(span)
    for (_, batch), spans in by_batch.items():
        assert sorted({span.kernel_index for span in spans}) == list(range(lengths[batch]))
        for before, after in pairwise(spans):
            assert before.end_us <= after.start_us + 1e-9
            assert before.kernel_index <= after.kernel_index


def collectives_have_one_order(timeline: Timeline) -> None:
    orders = defaultdict(list)
    for span in sorted(timeline.spans, key=lambda s: (s.end_us, s.start_us)):
        if span.is_communication:
            orders[span.rank].append((span.batch_id, span.kernel_index))
    assert all(order == orders[0] for order in orders.values())


@pytest.mark.parametrize(("policy", "tp"), [("pipeline", 1), ("hybrid", 2)])
@SETTINGS
@given(st.data())
def test_pipelines_run_everything_once_on_every_stage(policy: str, tp: int, data: st.DataObject) -> None:
    from tests.sim.test_oracles import _as

    stages = data.draw(st.integers(2, 4 // tp))
    times = [data.draw(st.integers(1, 300)) / 2 for _ in range(stages)]
    chain = []
    for stage, us in enumerate(times):
        own = [compute(us / 3), *[comm(us / 5, tp)] * (tp > 1)] * 3
        before = [_as(comm(7.0, 2), "recv")] if stage else []
        after = [_as(comm(7.0, 2), "send")] if stage < stages - 1 else []
        chain.append(FunctionVector((*before, *own, *after)))
    options = alone(depth=data.draw(st.integers(1, 6)), capture=data.draw(st.booleans()),
                    sync=data.draw(st.sampled_from(["hybrid", "cpu-gpu", "inter-stream"])))  # fmt: skip
    num = data.draw(st.integers(1, 6))
    world = World(policy, node, [tuple(chain)], options, layout=Layout(tp, stages))
    timeline = world.run([0.0] * num)
    assert len(timeline.completions) == num
    assert timeline.num_kernels == num * tp * sum(len(vector) for vector in chain)
    waits_look_back(world.rounds)
    for stage, vector in enumerate(chain):
        spans = [span for span in timeline.spans if span.rank // tp == stage]
        runs_once_in_order(replace(timeline, spans=spans), dict.fromkeys(range(num), len(vector)))


@SETTINGS
@given(st.data())
def test_a_batch_without_slack_is_not_delayed_beyond_what_was_priced(data: st.DataObject) -> None:
    """With right estimates and no contention, a protected batch takes as long as alone, whatever fills beside it.

    What is left is the piece that was under way when it came.
    """
    calm = ideal_node()
    shapes = data.draw(st.lists(vectors, min_size=2, max_size=3))
    # Between two collectives in a row a fill's next wave takes the SMs, and waves are never preempted; no model has
    # that.
    kernels = shapes[0].kernels
    assume(not any(a.is_communication and b.is_communication for a, b in pairwise(kernels)))
    world = World("interleaved", calm, [(v,) for v in shapes], alone(depth=3, adaptive=False, partition=0))
    protect_all(world)
    timeline = world.run([0.0] * 3)
    first = min(timeline.completions, key=lambda c: c.batch_id)
    alone_us = world.scheduler.profile.run_us(shapes[0].kernels)
    longest = max(world.scheduler.profile.solo_us(k, 0, 0) for v in shapes for k in v.kernels)
    assert first.latency_us <= alone_us + 0.05 * longest + 0.5


@settings(SETTINGS, max_examples=20)
@given(st.lists(st.integers(0, 40_000).map(float), min_size=4, max_size=8).map(sorted), st.integers(40, 60))
def test_batches_that_wait_are_recalled_as_they_would_have_run(times: list[float], layers: int) -> None:
    """Where overlap does not pay and others wait, rounds are long; what is remembered of one must not depend on where
    the end of its batch is."""
    busy = ideal_node(slowdown=3.0, launch_us=0.5, event_us=0.1, plan_us=0.5)
    vector = FunctionVector((compute(20.0),), (compute(40.0), comm(60.0)), layers, (compute(10.0),))
    exact, recalled = (
        outcome(World("interleaved", busy, [(vector,)], alone(depth=3)).run(times, fidelity))
        for fidelity in (Fidelity(exact=True), Fidelity())
    )
    assert exact == recalled


def protect_all(world: World) -> None:
    """As if every batch would miss its deadline if it were delayed."""

    def with_slack(now_us: float) -> State:
        state = world.scheduler.state
        return state._replace(flights=tuple(flight._replace(protected=True) for flight in state.flights))

    world.scheduler._with_slack = with_slack  # type: ignore[method-assign]


@pytest.mark.parametrize(("share", "protected"), [(0.9, False), (1.0, True), (1.4, True), (1.6, False)])
def test_a_batch_is_protected_where_only_a_delay_would_make_it_late(share: float, protected: bool) -> None:
    vector = FunctionVector((), (compute(40.0), comm(60.0)), 6)
    world = World("interleaved", node, [(vector,)], alone(slo_us=share * 6 * 100.0))
    seen: list[bool] = []
    plan = world.scheduler.plan

    def watched(state: State, options: Options, profile: Profile) -> tuple[Round, State]:
        seen.append(state.flights[0].protected)
        return plan(state, options, profile)

    world.scheduler.plan = watched
    world.run([0.0])
    assert seen[0] is protected


def test_a_deadline_that_cannot_be_met_costs_no_capacity() -> None:
    """Batches that are late in any case are interleaved like those without a deadline."""
    vector = FunctionVector((), (compute(40.0), comm(40.0)), 12)
    ends = []
    for slo_us in (float("inf"), 1.0):
        world = World("interleaved", node, [(vector,)], alone(depth=2, slo_us=slo_us))
        ends.append(world.run([0.0] * 8, Fidelity()).end_us)
    assert ends[0] == ends[1]


def test_equal_states_give_equal_rounds() -> None:
    """Deciding is pure: two schedulers with the same admissions give the same rounds."""
    vector = FunctionVector((), (compute(40.0), splittable(2048, 2048), comm(60.0)), 6)
    runs = []
    for _ in range(2):
        world = World("interleaved", node, [(vector,)], alone(depth=3))
        world.run([0.0, 10.0, 400.0])
        runs.append(world.rounds)
    assert runs[0] == runs[1]


def test_what_does_not_fit_the_window_of_a_batch_without_slack_is_cut() -> None:
    long = FunctionVector((), (splittable(1024, 4096), comm(6000.0)), 6)
    world = World("interleaved", node, [(long,)], alone(depth=2, adaptive=False))
    protect_all(world)
    world.run([0.0, 0.0])
    parts = [launch.fragment for round_ in world.rounds for launch in round_.launches if launch.fragment]
    assert any(part.axis in ("rows", "cols") for part in parts)


@pytest.mark.parametrize("cursor", [1, 2, 3, 4, 6, 7])
def test_a_batch_that_is_left_alone_in_a_layer_goes_on_in_whole_layers(cursor: int) -> None:
    """Drivers have graphs of ranges that begin with a layer; the rest of a layer is launched run by run."""
    vector = FunctionVector((), (compute(20.0), comm(10.0), compute(30.0), comm(10.0)), 12)
    batch = Batch(0, (), BatchShape(1, 16), (vector,), 0.0)
    state = State((Flight(batch, cursor, lane=Lane.COMPUTE),))
    rounds = []
    while state.flights:
        round_, state = interleaved.plan(state, Options(), simple_profile(node))
        rounds.append(round_.launches)
    launches = [launch for round_ in rounds for launch in round_]
    whole = [launch for launch in launches if launch.last - launch.first > 1]
    assert all(launch.first % 4 == 0 for launch in whole)
    assert launches[0].first == cursor and all(a.last == b.first for a, b in pairwise(launches))
    # What waits to be admitted waits no longer than two layers take, at the end three.
    assert all(len(round_) <= 4 and sum(launch.last - launch.first for launch in round_) <= 12 for round_ in rounds)
