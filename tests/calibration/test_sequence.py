"""What a kernel takes longer for following another one: from forward passes beside series of one kernel."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import pytest

from calibration.compare import COMPUTE_ALONE
from calibration.fit import About, fit_node, residuals_of
from calibration.holdout import UNMIXED
from calibration.kernels import with_cuts
from calibration.sequence import computes_of, fit_serial, fit_switch, sequence_us
from calibration.validate_two_batches import GraphWorld, cell_of
from models.kernel import Fragment, Kind, collective
from sim.cost import Costs
from sim.spec import NodeSpec, load_node
from traces.measurement import Coordinates, Measurement

BASE = load_node("h200-nvlink-x4")
MODELS, ROWS = ("opt-30b", "llama-2-7b", "glm-130b"), (16, 64, 128, 512)


def node_with(switch_us: float) -> NodeSpec:
    return msgspec.structs.replace(BASE, device=BASE.device.with_switch(switch_us))


def forwards(node: NodeSpec, noise: float = 0.0) -> list[Measurement]:
    """Forward passes on a node, as a survey would have measured them."""
    rng, found = np.random.default_rng(3), []
    for model in MODELS:
        for rows in ROWS:
            at: Coordinates = {"model": model, "num_layers": 6, "rows": rows, "length": min(rows, 64), "num_ranks": 4}
            row = Measurement("sequence", at, {"us": 0.0}, {}, 5)
            us = sequence_us(Costs(node), row) * (1.0 + noise * rng.standard_normal())
            found.append(Measurement("sequence", at, {"us": us}, {"us": 0.0}, 5))
    return found


def alone(node: NodeSpec) -> list[Measurement]:
    """The GEMMs of those passes in series of their own."""
    costs, gap = Costs(node.in_series()), node.in_series().device.graph_gap_us
    kernels = {k for row in forwards(node) for k in computes_of(row) if k.kind is Kind.GEMM}
    return [
        Measurement("gemm", {"name": k.name, "rows": k.rows, "cols": k.cols, "inner": k.inner, "withheld_sms": 0},
                    {"us": costs.solo_us(k) + gap}, {"us": 0.0}, 5)
        for k in sorted(kernels, key=repr)
    ]  # fmt: skip


@pytest.mark.parametrize("switch_us", [1.0, 2.5])
def test_a_known_switch_is_found_within_its_error(switch_us: float) -> None:
    truth = node_with(switch_us)
    found = fit_switch(forwards(truth, noise=0.01), alone(truth), truth.in_series(), 0.0)
    assert found.is_determined and 0.0 < found.error < 0.5 * switch_us
    assert abs(found.value - switch_us) <= 3.0 * found.error
    exact = fit_switch(forwards(truth), alone(truth), truth.in_series(), 0.0)
    assert exact.value == pytest.approx(switch_us, rel=1e-6)


def test_passes_at_another_clock_do_not_hide_a_switch() -> None:
    """Two of them were measured when the GPU was 7 % faster than for their kernels, as it happens under load."""
    truth = node_with(1.5)
    passes = forwards(truth)
    for number in (0, 7):
        passes[number] = replace(passes[number], values={"us": 0.93 * passes[number].values["us"]})
    found = fit_switch(passes, alone(truth), truth.in_series(), 0.0)
    assert found.is_determined and found.value == pytest.approx(1.5, abs=0.08)


def test_without_a_switch_or_without_passes_nothing_is_invented() -> None:
    assert not fit_switch(forwards(BASE, noise=0.01), alone(BASE), BASE, 0.0).is_determined
    nothing = fit_switch([], alone(BASE), BASE, 0.7)
    assert not nothing.is_determined and nothing.value == 0.7


def test_the_fitted_node_says_passes_and_series_alike() -> None:
    truth = node_with(2.0)
    rows = [*forwards(truth), *alone(truth)]
    node = fit_node(rows, BASE, About("some", "2026-11-21", "NVIDIA H200")).node
    assert node.device.switch_us == pytest.approx(2.0, abs=0.3)
    assert node.device.graph_gap_us == pytest.approx(BASE.device.graph_gap_us + node.device.switch_us)
    errors = [abs(r.error) for r in residuals_of(node, rows) if r.kind == "sequence"]
    assert len(errors) == len(forwards(truth)) and np.median(errors) < 0.03
    assert "forward passes without collectives" in node.sources["device.switch_us"]
    assert node.sources["device.graph_gap_us"].endswith("changed by the fit of switch_us, which is part of it")


def test_a_pass_alone_takes_as_long_in_the_level_above() -> None:
    truth = node_with(2.0)
    row = forwards(truth)[0]
    cell = cell_of(Measurement("two_batches", row.at | {"schedule": COMPUTE_ALONE}, {"us": 1.0}, {}, 1), truth)
    assert GraphWorld(truth).makespan_us(cell, COMPUTE_ALONE)[0] == pytest.approx(row.values["us"])


def test_a_switch_is_part_of_the_gaps() -> None:
    assert node_with(1.5).in_series() == BASE
    with pytest.raises(ValueError, match="switch_us"):
        msgspec.structs.replace(BASE.device, switch_us=BASE.device.graph_gap_us + 1.0).__post_init__()


def cells(join_us: float, noise: float = 0.0) -> list[Measurement]:
    """One forward pass after another, and its parts alone, on a node."""
    truth = node_with(2.0)
    return passes(msgspec.structs.replace(truth, link=msgspec.structs.replace(truth.link, join_us=join_us)), noise)


def passes(truth: NodeSpec, noise: float = 0.0) -> list[Measurement]:
    """The same on any node."""
    world, rng, found = GraphWorld(truth), np.random.default_rng(5), []
    for row in forwards(truth):
        for schedule in UNMIXED:
            where = Measurement("two_batches", row.at | {"schedule": schedule}, {"us": 1.0}, {}, 1)
            us = world.makespan_us(cell_of(where, truth), schedule)[0] * (1.0 + noise * rng.standard_normal())
            found.append(replace(where, values={"us": us}))
    return found


@pytest.mark.parametrize("join_us", [5.0, 15.0])
def test_what_a_collective_waits_for_is_found_again(join_us: float) -> None:
    found = fit_serial(cells(join_us), BASE, 2.0, (0.0, 0.0))[0]
    assert found.is_determined and found.value == pytest.approx(join_us, abs=1.5)
    noisy = fit_serial(cells(join_us, noise=0.005), BASE, 2.0, (0.0, 0.0))[0]
    assert abs(noisy.value - found.value) <= 3.0 * noisy.error


@pytest.mark.parametrize("boost", [0.2, 0.3])
def test_how_much_faster_a_rested_gpu_computes_is_found_again_beside_waits(boost: float) -> None:
    slow = load_node("h200-hoststaged-x4")
    device = msgspec.structs.replace(slow.device.with_switch(2.0), rested_boost=boost)
    link = msgspec.structs.replace(slow.link, join_us=10.0)
    truth = msgspec.structs.replace(slow, device=device, link=link)
    join, found = fit_serial(passes(truth, noise=0.002), slow, 2.0, (0.0, 0.0))
    assert found.is_determined and abs(found.value - boost) <= 3.0 * found.error
    assert found.error < 0.3 * boost and join.value == pytest.approx(10.0, abs=2.0)


def test_links_that_leave_no_time_to_rest_tell_nothing_of_the_clock() -> None:
    found = fit_serial(cells(5.0), BASE, 2.0, (0.0, 0.07))[1]
    assert not found.is_determined and found.value == 0.07


def test_without_cells_nothing_is_known_of_waits() -> None:
    found = fit_serial([], BASE, 2.0, (3.0, 0.0))[0]
    assert not found.is_determined and found.value == 3.0


def test_models_that_nobody_knows_and_other_precisions_are_left_out() -> None:
    unknown = [replace(row, at=row.at | {"model": "mine"}) for row in cells(5.0)]
    assert not fit_serial(unknown, BASE, 2.0, (0.0, 0.0))[0].is_determined
    mixed = fit_serial([*cells(5.0), *unknown], BASE, 2.0, (0.0, 0.0))[0]
    assert mixed == fit_serial(cells(5.0), BASE, 2.0, (0.0, 0.0))[0]
    single = [replace(row, at=row.at | {"element_bytes": 4}) for row in forwards(node_with(2.0))]
    assert not computes_of(single[0])
    assert not fit_switch(single, [], BASE, 0.0).is_determined


def test_chunks_behind_the_first_do_not_wait_again() -> None:
    waiting = Costs(msgspec.structs.replace(BASE, link=msgspec.structs.replace(BASE.link, join_us=10.0)))
    whole = collective("sum", Kind.ALL_REDUCE, 1 << 20, 4)
    chunks = [whole.fragment(Fragment("chunks", number, number + 1, 4)) for number in range(4)]
    extra = [waiting.solo_us(chunk) - Costs(BASE).solo_us(chunk) for chunk in chunks]
    assert extra == pytest.approx([10.0, 0.0, 0.0, 0.0], abs=0.1)


def test_pieces_are_told_from_whole_kernels_of_other_models() -> None:
    shapes = {("fc2", 7168, 7168): 1, ("fc2", 3584, 7168): 2, ("fc2", 8192, 7168): 1, ("fc2", 4096, 7168): 2,
              ("fc1", 16384, 12288): 1, ("fc1", 12288, 12288): 1, ("fc1", 6144, 12288): 2,
              ("mine", 1000, 64): 1, ("mine", 500, 64): 2}  # fmt: skip
    rows = [
        Measurement("gemm", {"name": name, "rows": 64, "cols": cols, "inner": inner}, {"us": 1.0}, {}, 1)
        for name, cols, inner in shapes
    ]
    assert [row.at.get("cut", 1) for row in with_cuts(rows)] == list(shapes.values())
    said = Measurement("gemm", rows[1].at | {"cut": 1}, {"us": 1.0}, {}, 1)
    assert with_cuts([rows[0], said])[1] is said
