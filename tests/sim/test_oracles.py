"""Closed forms that the simulator must reproduce."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import pytest

from models.config import MODELS
from models.kernel import FunctionVector, Kernel, Kind, collective
from models.transformer import Layout, function_vector
from policy.options import Options
from policy.round import Lane, Launch
from policy.scheduler import Scheduler
from sim.believe import profile_of
from sim.cost import Costs, fair_share
from sim.simulate import Fidelity, Simulation
from sim.spec import NodeSpec, load_node
from tests.worlds import BYTES_PER_US, World, alone, changed, comm, compute, ideal_node, splittable
from traces.arrivals import poisson
from traces.request import Request


def layers(compute_us: float, comm_us: float, num: int) -> tuple[FunctionVector, ...]:
    return (FunctionVector((), (compute(compute_us), comm(comm_us)), num),)


def mean_wait_us(rate_per_us: float, service_us: float) -> float:
    """M/D/1: Pollaczek-Khinchine for a constant service time."""
    load = rate_per_us * service_us
    return service_us * load / (2 * (1 - load))


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_poisson_arrivals_at_a_deterministic_server_wait_as_in_m_d_1(load: float) -> None:
    service_us, num = 1000.0, 20_000
    world = World("tensor", ideal_node(), [layers(100.0, 150.0, 4)], alone())
    arrivals = poisson(num, load / service_us * 1e6, np.random.default_rng(1))
    timeline = world.run(arrivals.tolist(), Fidelity())
    waits = np.array([c.latency_us - service_us for c in timeline.completions])
    assert waits.min() >= -1.0
    assert waits.mean() == pytest.approx(mean_wait_us(load / service_us, service_us), rel=0.06)


def test_two_stage_pipeline_takes_its_length_once_and_then_its_slowest_stage_each_time() -> None:
    first, second, num = 300.0, 500.0, 20
    stages = (
        FunctionVector((compute(first), comm(10.0, 2)), ()),
        FunctionVector((comm(10.0, 2), compute(second)), ()),
    )
    send, receive = (
        tuple(_as(kernel, kind) for kernel in stage.kernels)
        for stage, kind in zip(stages, ("send", "recv"), strict=True)
    )
    vectors = (FunctionVector(send), FunctionVector(receive))
    world = World("pipeline", ideal_node(), [vectors], alone(depth=4), layout=Layout(1, 2))
    timeline = world.run([0.0] * num)
    # The last stage only receives, so every transfer but the first is hidden behind its computation.
    assert timeline.end_us == pytest.approx(first + 10.0 + num * second, abs=0.1)


def _as(kernel: Kernel, kind: str) -> Kernel:
    return collective(kind, Kind(kind), kernel.message_bytes, 2) if kernel.is_communication else kernel


@pytest.mark.parametrize("policy", ["tensor", "interleaved", "liger-artifact"])
def test_littles_law(policy: str) -> None:
    world = World(policy, ideal_node(), [layers(40.0, 30.0, 6)], alone())
    arrivals = poisson(400, 1800.0, np.random.default_rng(3)).tolist()
    timeline = world.run(arrivals, Fidelity())
    # The integral of the number in the system equals the sum of the times in it.
    events = sorted([(t, 1) for t in arrivals] + [(c.finished_us, -1) for c in timeline.completions])
    area, inside, last = 0.0, 0, 0.0
    for time, step in events:
        area, inside, last = area + inside * (time - last), inside + step, time
    assert inside == 0
    assert area == pytest.approx(sum(c.latency_us for c in timeline.completions), rel=1e-9)


@pytest.mark.parametrize("policy", ["tensor", "interleaved", "liger-artifact"])
def test_work_is_conserved(policy: str) -> None:
    num, depth = 7, 5
    world = World(policy, ideal_node(), [layers(40.0, 30.0, depth)], alone(decomposition="off", chunks=False))
    timeline = world.run([0.0] * num)
    ranks = 4
    assert timeline.compute_us == pytest.approx(ranks * num * depth * 40.0)
    assert timeline.num_kernels == ranks * num * depth * 2
    # A collective may hold its SMs while it waits for its turn, never less than it takes.
    assert timeline.communication_us >= ranks * num * depth * 30.0 - 1e-6


@pytest.mark.parametrize("policy", ["tensor", "interleaved", "liger-artifact"])
def test_one_batch_has_nothing_to_overlap_with(policy: str) -> None:
    world = World(policy, ideal_node(), [layers(40.0, 30.0, 6)], alone())
    timeline = world.run([0.0])
    assert timeline.overlap_us == 0.0
    assert timeline.end_us == pytest.approx(6 * 70.0, abs=0.1)


@pytest.mark.parametrize("kernels_us", [(60.0, 60.0), (90.0, 30.0), (70.0, 50.0, 30.0)])
def test_fills_that_go_on_to_the_end_of_their_segment_reach_the_bound_of_computation(
    kernels_us: tuple[float, ...],
) -> None:
    """Where segments are longer than collectives, a fill that keeps to its window leaves its own collective for the
    next but one, and nothing beside the oldest batch's computation."""
    num, segment = 40, sum(kernels_us)
    layer = FunctionVector((), (*map(compute, kernels_us), comm(40.0)), num)
    ends = {}
    for whole in ("on", "off"):
        options = alone(depth=2, max_wait_us=0.0, whole_segments=whole)
        ends[whole] = World("interleaved", ideal_node(), [(layer,)], options).run([0.0, 0.0]).end_us
    ideal = 2 * num * segment
    assert ideal <= ends["on"] <= 1.05 * ideal
    assert ends["off"] > 1.2 * ideal


@pytest.mark.parametrize("captured", [True, False])
@pytest.mark.parametrize("rest", [0.0, 0.25, 1.0])
def test_arithmetic_goes_faster_where_collectives_let_the_gpu_rest(rest: float, captured: bool) -> None:
    """The clock rises with the cube root of the power that rest saves, to its limit: closed form of a captured range of
    GEMMs and collectives; what is not one range does not rest."""
    gemm, num = splittable(), 4
    node = changed(ideal_node(), "device", rested_boost=0.2)
    gemm_us = Costs(node).solo_us(gemm)
    kernels = (gemm, comm(rest * gemm_us)) if rest else (gemm,)
    world = World("tensor", node, [(FunctionVector((), kernels, num),)], alone(capture=captured))
    boost = min(1.2, (1.0 + rest) ** (1.0 / 3.0)) if captured else 1.0
    assert world.run([0.0]).end_us == pytest.approx(num * gemm_us * (1.0 / boost + rest), rel=1e-3)


def test_what_memory_bounds_is_no_faster_on_a_rested_gpu() -> None:
    node = changed(ideal_node(), "device", rested_boost=0.2, hbm_gb_s=1.0)
    usual, rested = (Costs(node).shape(splittable(), 0, clock) for clock in (1.0, 1.2))
    assert rested.pace_us(8, 1.0) == usual.pace_us(8, 1.0) and rested.pace_us(8, 1e9) < usual.pace_us(8, 1e9)


@pytest.mark.parametrize(("compute_us", "comm_us"), [(50.0, 50.0), (80.0, 40.0), (40.0, 80.0)])
def test_without_contention_two_batches_reach_the_ideal_bound(compute_us: float, comm_us: float) -> None:
    num = 40
    world = World("interleaved", ideal_node(), [layers(compute_us, comm_us, num)], alone(depth=2, max_wait_us=0.0))
    timeline = world.run([0.0, 0.0])
    ideal = 2 * num * max(compute_us, comm_us)
    # One batch must begin and one must end alone: at most a layer on top of the bound.
    assert ideal <= timeline.end_us <= ideal + 1.05 * (compute_us + comm_us)


def test_contention_slows_both_sides_by_what_the_node_says() -> None:
    node = ideal_node(slowdown=1.25)
    world = World("interleaved", node, [layers(50.0, 50.0, 40)], alone(depth=2, adaptive=False))
    timeline = world.run([0.0, 0.0])
    assert timeline.end_us == pytest.approx(2 * 40 * 50.0 * 1.25, rel=0.03)


def test_the_published_contention_factor_refuses_a_fill_as_long_as_its_window() -> None:
    """0.8 of the window is less than the fill, and what cannot be split is never launched: no overlap at all."""
    world = World("liger-artifact", ideal_node(), [layers(50.0, 50.0, 10)], alone(depth=2))
    assert world.run([0.0, 0.0]).overlap_us == 0.0


@pytest.mark.parametrize(
    ("priority", "withheld", "start_us"), [(True, 0, 100.0), (False, 0, 200.0), (True, 4, 50.0), (False, 4, 50.0)]
)
def test_a_collective_waits_for_sms(priority: bool, withheld: int, start_us: float) -> None:
    """It comes at 50 us, in the first of two waves of 100 us that fill every SM they may use.

    CTAs are never preempted: with priority it waits for the wave, without for the whole kernel to be on the SMs, and
    not at all where SMs are withheld for it.
    """
    assert _span_beside_two_waves(ideal_node(comm_ctas=4), priority, withheld)[0] == pytest.approx(start_us, abs=0.01)


def _span_beside_two_waves(node: NodeSpec, priority: bool, withheld: int) -> tuple[float, float]:
    """Start and end of an all-reduce of 30 us that comes at 50 us."""
    slots = 100 - withheld
    big = Kernel("big", Kind.ATTENTION, flops=2 * 100.0 * 1e4 * slots, num_ctas=2 * slots)
    return _beside(node, big, 30.0, at_us=50.0, priority=priority, withheld=withheld)[1]


def _beside(
    node: NodeSpec, big: Kernel, comm_us: float, *, at_us: float = 0.0, priority: bool = True, withheld: int = 0
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Start and end of a kernel, and of an all-reduce that comes beside it."""
    world = World("tensor", node, [(FunctionVector((big,)),)], alone(priority=priority))
    device = Simulation(node, Layout(4, 1), world.scheduler, Fidelity(record=True)).fresh_device()
    device.on_progress = lambda device, batch_id, point: None
    device.issue(Launch(0, 0, 1, Lane.COMPUTE, withheld_sms=withheld), (big,), 0)
    later = device.env.timeout(at_us)
    later.callbacks.append(lambda _: device.issue(Launch(1, 0, 1, Lane.COMM), (comm(comm_us),), 0))
    device.env.run()
    one, two = sorted(device.spans, key=lambda span: span.is_communication)
    return (one.start_us, one.end_us), (two.start_us, two.end_us)


@pytest.mark.parametrize(
    ("priority", "with_two", "end_us"), [(True, None, 105.0), (False, None, 110.0), (False, 36.0, 86.0)]
)
def test_a_collective_of_independent_ctas_moves_with_those_that_have_sms(
    priority: bool, with_two: float | None, end_us: float
) -> None:
    """Two of its four CTAs find SMs at 50 us. In proportion that is half the pace, so that at 100 us 5 of 30 us are
    left: with priority the next wave leaves it all its SMs. Where two CTAs were measured, their time is what it takes.
    """
    node = ideal_node(comm_ctas=4)
    tables = node.link.tables
    if with_two is not None:
        known = next(t for t in tables if (t.op, t.ranks) == ("all_reduce", 4))
        slower = tuple(us * with_two / 30.0 for us in known.us)
        tables = (*tables, msgspec.structs.replace(known, ctas=2, us=slower))
    node = changed(node, "link", tables=tables, independent_ctas=True)
    assert _span_beside_two_waves(node, priority, 2) == pytest.approx((50.0, end_us), abs=0.01)


def test_a_collective_slows_computation_as_much_as_it_moves() -> None:
    """All four of its CTAs would double what a wave takes; the two that have SMs from 50 to 110 us make it half longer,
    so that of the 50 us that were left 10 are behind its end."""
    node = changed(ideal_node(comm_ctas=4), "link", independent_ctas=True)
    node = changed(node, "contention", attention_by_comm=2.0, per_ctas=4.0)
    big = Kernel("big", Kind.ATTENTION, flops=2 * 100.0 * 1e4 * 98, num_ctas=2 * 98)
    compute, comm = _beside(node, big, 30.0, at_us=50.0, withheld=2)
    assert comm == pytest.approx((50.0, 110.0), abs=0.01)
    assert compute == pytest.approx((0.0, 220.0), abs=0.01)


@pytest.mark.parametrize(("drawn", "slow"), [(0.1, 1.01), (0.5, 1.25), (0.9, 1.81)])
def test_what_slows_communication_by_memory_goes_with_the_square_of_the_bandwidth_drawn(
    drawn: float, slow: float
) -> None:
    """Beside a kernel of 400 us that draws this share of the memory's bandwidth, and would double it if it drew all."""
    bandwidth = 1e6
    node = changed(ideal_node(), "contention", comm_by_compute=2.0, comm_by_memory=True)
    node = changed(node, "device", hbm_gb_s=bandwidth / 1e3)
    node = changed(node, "link", hbm_per_byte=0.1)
    big = replace(compute(400.0), bytes_moved=400.0 * bandwidth * drawn)
    start_us, end_us = _beside(node, big, 100.0)[1]
    assert end_us - start_us == pytest.approx(100.0 * slow, rel=1e-3)


def test_memory_is_shared_fairly() -> None:
    """Two kernels that each want all of the memory's bandwidth take twice as long side by side."""
    assert fair_share([10.0, 10.0], 10.0) == 5.0
    assert fair_share([2.0, 10.0], 10.0) == 8.0
    assert fair_share([2.0, 3.0], 10.0) == float("inf")


def test_flows_share_the_root_that_they_cross() -> None:
    """Two tensor-parallel pairs whose all-reduces each need the whole root take twice as long together."""
    vector = FunctionVector((compute(10.0), comm(100.0, 2), compute(1.0), comm(1.0, 2)))
    receiver = FunctionVector((comm(1.0, 2), comm(100.0, 2)))
    vectors = (_renamed(vector, "send", 3), _renamed(receiver, "recv", 0))
    free = World("hybrid", ideal_node(), [vectors], alone(depth=4), layout=Layout(2, 2)).run([0.0, 0.0])
    tight_node = changed(ideal_node(), "link", root_gb_s=2 * BYTES_PER_US / 1e3)
    tight = World("hybrid", tight_node, [vectors], alone(depth=4), layout=Layout(2, 2)).run([0.0, 0.0])
    assert tight.end_us > free.end_us + 50.0


def _renamed(vector: FunctionVector, kind: str, index: int) -> FunctionVector:
    kernels = list(vector.kernels)
    kernels[index] = _as(kernels[index], kind)
    return FunctionVector(tuple(kernels))


@pytest.mark.parametrize("policy", ["tensor", "pipeline", "hybrid", "interleaved", "liger-artifact"])
@pytest.mark.parametrize("node_name", ["a100-pcie-x4", "h200-nvlink-x4", "h200-nvlink-x4-fitted"])
def test_folding_and_skipping_change_nothing(policy: str, node_name: str) -> None:
    """The default mode gives, to the last bit, what simulating every rank and every layer gives."""
    model, node = MODELS["opt-30b"], changed(load_node(node_name), "device", rested_boost=0.2)
    layout = {"pipeline": Layout(1, 4), "hybrid": Layout(2, 2)}.get(policy, Layout(4, 1))
    rng = np.random.default_rng(5)
    arrivals = np.cumsum(rng.exponential(8e3, 24))
    requests = [
        Request(i, float(t), int(n)) for i, (t, n) in enumerate(zip(arrivals, rng.integers(16, 129, 24), strict=True))
    ]

    def outcome(fidelity: Fidelity) -> tuple[object, ...]:
        scheduler = Scheduler(
            policy, Options(), profile_of(node),
            lambda shape: tuple(function_vector(model, shape, layout, s) for s in range(layout.pp)),
        )  # fmt: skip
        timeline = Simulation(node, layout, scheduler, fidelity).run(requests)
        ends = [(c.request.request_id, c.admitted_us, c.finished_us) for c in timeline.completions]
        busy = (timeline.compute_us, timeline.communication_us, timeline.overlap_us, timeline.num_kernels)
        return ends, busy, timeline.num_rounds

    assert outcome(Fidelity()) == outcome(Fidelity(exact=True))


def test_forgetting_what_was_remembered_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded by dropping what is known; the result does not depend on when."""

    def run() -> list[tuple[float, float]]:
        world = World("interleaved", ideal_node(), [layers(40.0, 30.0, 6), layers(25.0, 45.0, 9)], alone())
        timeline = world.run(poisson(60, 2500.0, np.random.default_rng(2)).tolist(), Fidelity())
        return [(c.admitted_us, c.finished_us) for c in timeline.completions]

    remembered = run()
    monkeypatch.setattr("sim.recall.MAX_TRANSITIONS", 7)
    assert run() == remembered
