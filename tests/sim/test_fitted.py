"""What fitted nodes may have on top: overlap, balance, partitions that the library sees, starts of operations."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.node_file import write_node
from calibration.race import Pair, race
from models.kernel import Fragment, Kernel, Kind, collective, elementwise, gemm
from policy.batch import TICK_US
from policy.options import Options
from sim.cost import Costs, Shape, alone_us, cta_shape, memory_bandwidth, partition_sms, slowed_comm
from sim.fitted import fit_notes
from sim.later import LATER
from sim.simulate import Fidelity
from sim.spec import DeviceSpec, GemmTable, NodeSpec, OperationSpec, load_node
from weft.runs import RunConfig, simulate

exact = settings(derandomize=True, deadline=None)
FITTED: dict[str, Any] = {
    "gemm_balance": 0.8, "gemm_overlap_order": 3.5, "split_us": 1.2, "gemm_sees_partition": True,
    "attention_start_us": 6.0, "elementwise_start_us": 3.0, "attention_cta_us": 0.4, "attention_overlap_order": 2.0,
    "operations": (OperationSpec(name="attn_norm", start_us=5.0, traffic=1.5),),
    "memory_gb": 96.0, "partition_step": 4, "gemm_wave_ctas": 128, "gemm_persistent": True, "piece_us": 4.0,
    "switch_us": 0.5, "gpcs": (18, 18, 16, 16, 16, 16, 16, 16), "rested_boost": 0.15,
}  # fmt: skip


def node(**changes: Any) -> NodeSpec:
    base = load_node("h200-nvlink-x4")
    return msgspec.structs.replace(base, device=msgspec.structs.replace(base.device, **changes))


def test_every_later_number_is_a_number_of_the_device() -> None:
    assert set(LATER) == set(FITTED) <= set(DeviceSpec.__struct_fields__)


@pytest.mark.parametrize("name", LATER)
def test_a_number_that_is_used_changes_the_digest(name: str) -> None:
    base = load_node("h200-nvlink-x4")
    changed = node(**{name: FITTED[name]})
    assert changed.digest != base.digest
    assert changed.numbers_digest != base.numbers_digest


@pytest.mark.parametrize(("order", "us"), [(1.0, 7.0), (2.0, 5.0)])
def test_the_start_of_a_norm_overlaps_with_its_traffic(order: float, us: float) -> None:
    """A start of 3 us and 4 us of traffic."""
    fitted = node(operations=(OperationSpec(name="attn_norm", start_us=3.0, overlap_order=order),))
    moved = round(4.0 * memory_bandwidth(fitted.device))
    assert Costs(fitted).solo_us(replace(elementwise("attn_norm", moved), num_ctas=132)) == pytest.approx(us, rel=0.01)


@exact
@given(compute=st.floats(0.1, 1e4), stream=st.floats(0.1, 1e4), order=st.floats(1.0, 50.0), lead=st.floats(0.0, 10.0))
def test_overlap_lies_between_perfect_and_none(compute: float, stream: float, order: float, lead: float) -> None:
    pace = Shape(1, compute, stream, lead, order).pace_us(1, 1.0)
    slack = 1e-9 * (compute + stream)
    assert max(compute, stream) + lead - slack <= pace <= compute + stream + lead + slack
    assert Shape(1, compute, stream, lead).pace_us(1, 1.0) == lead + max(compute, stream)


@exact
@given(rows=st.integers(1, 4096), cols=st.integers(1, 64), balance=st.floats(0.0, 1.0))
def test_a_balanced_library_is_never_slower_and_never_beats_even_work(rows: int, cols: int, balance: float) -> None:
    """One tile, no memory: between whole waves of tiles and work that is spread evenly."""
    spec = msgspec.structs.replace(
        node().device, gemm_tiles=((128, 128, 1.0),), cta_start_us=0.0, ramp_us=0.0, hbm_gb_s=1e9, sm_bandwidth_gb_s=1e9
    )
    kernel = gemm("g", rows, 128 * cols, 500)
    uneven = alone_us(cta_shape(kernel, spec), spec.num_sms, spec)
    balanced = msgspec.structs.replace(spec, gemm_balance=balance)
    evened = alone_us(cta_shape(kernel, balanced), spec.num_sms, spec)
    tiles = -(-rows // 128) * cols
    even = uneven / -(-tiles // spec.num_sms) * max(1.0, tiles / spec.num_sms)
    assert even - 3 * TICK_US <= evened <= uneven + 3 * TICK_US
    assert evened == pytest.approx((1.0 - balance) * uneven + balance * even, abs=3 * TICK_US)


def test_what_an_operation_takes_at_least() -> None:
    costs = Costs(node(**FITTED))
    assert costs.solo_us(elementwise("activation", 64)) == pytest.approx(3.0, abs=0.1)
    assert costs.solo_us(elementwise("attn_norm", 64)) == pytest.approx(5.0, abs=0.1)
    tiny = Kernel("attention", Kind.ATTENTION, flops=1.0, bytes_moved=64.0)
    assert costs.solo_us(tiny) == pytest.approx(6.0 + 0.4, abs=0.1)
    # Many waves start once, and stream as much more as they really move.
    plain, size = Costs(node()), 1 << 28
    expected = 5.0 + 1.5 * plain.solo_us(elementwise("attn_norm", size))
    assert costs.solo_us(elementwise("attn_norm", size)) == pytest.approx(expected, rel=0.01)


def test_a_library_that_sees_the_partition_does_not_leave_a_wave_nearly_empty() -> None:
    kernel = gemm("g", 2048, 128 * 132 // 16, 4096)  # one wave of 128 x 128 on all SMs
    blind, seeing = (Costs(node(gemm_balance=1.0, gemm_sees_partition=sees)) for sees in (False, True))
    assert blind.solo_us(kernel) == seeing.solo_us(kernel)
    assert seeing.solo_us(kernel, 4) < 1.2 * seeing.solo_us(kernel)
    assert blind.solo_us(kernel, 4) > 1.1 * seeing.solo_us(kernel, 4)


COMPUTE = [
    gemm("fc1", 64, 7168, 7168),
    gemm("fc1", 1024, 7168, 7168),
    elementwise("attn_norm", 1 << 24),
    elementwise("activation", 1 << 20),
    Kernel("attention", Kind.ATTENTION, flops=4e9, bytes_moved=2e7, num_ctas=300),
]


@pytest.mark.parametrize("kernel", COMPUTE, ids=lambda k: f"{k.name} {k.rows or int(k.bytes_moved)}")
@pytest.mark.parametrize("size", [1 << 16, 1 << 22])
def test_company_never_makes_a_kernel_faster(kernel: Kernel, size: int) -> None:
    """Without contention, what runs side by side costs each other SMs and memory alone."""
    base = node(**FITTED)
    none = msgspec.structs.replace(
        base.contention, gemm_by_comm=1.0, attention_by_comm=1.0, elementwise_by_comm=1.0, comm_by_compute=1.0
    )
    costs = Costs(msgspec.structs.replace(base, contention=none))
    outcome = race(costs, Pair(kernel, collective("c", Kind.ALL_REDUCE, size, 4)))
    assert outcome.compute_slowdown > 0.98
    assert outcome.comm_slowdown > 0.98


@pytest.mark.parametrize("policy", ["tensor", "interleaved"])
def test_skipping_what_repeats_changes_nothing_on_fitted_nodes(policy: str, tmp_path: Path) -> None:
    path = tmp_path / "fitted.toml"
    base = node(**FITTED)
    new = [*(f"device.{name}" for name in FITTED), "link.independent_ctas", "link.ctas_anywhere", "gemms"]
    in_clusters = GemmTable(cols=7168, inner=7168, rows=(16, 2048), us=(20.0, 300.0), ctas=(112, 128), clusters=(8, 2))
    write_node(path, msgspec.structs.replace(
        base, sources=base.sources | dict.fromkeys(new, "fitted: for a test"), gemms=(in_clusters,),
        link=msgspec.structs.replace(base.link, independent_ctas=True, ctas_anywhere=True),
    ))  # fmt: skip
    config = RunConfig(
        model="opt-30b", node=str(path), policy=policy, num_prompts=24, request_rate=300.0, input_len="16:512",
        options=Options(batch_size=2, partition=16 if policy == "interleaved" else 0),
    )  # fmt: skip
    quick, whole = (simulate(config, Fidelity(exact=exactly)).timeline for exactly in (False, True))
    assert [(c.request.request_id, c.finished_us) for c in quick.completions] == [
        (c.request.request_id, c.finished_us) for c in whole.completions
    ]
    assert quick.compute_us == whole.compute_us


@pytest.mark.parametrize(("withheld", "sms"), [(0, 132), (1, 132), (8, 128), (16, 120), (24, 112), (32, 104), (131, 8)])
def test_partitions_come_in_steps(withheld: int, sms: int) -> None:
    assert partition_sms(node(partition_step=8).device, withheld) == sms
    assert partition_sms(node(partition_step=0).device, withheld) == 132 - withheld


def test_a_filled_wave_of_fewer_ctas_survives_a_small_partition() -> None:
    filled = gemm("g", 1024, 7168, 7168)
    full, few = node(gemm_balance=1.0, partition_step=8), node(gemm_balance=1.0, partition_step=8, gemm_wave_ctas=128)
    assert Costs(full).solo_us(filled, 8) > 1.2 * Costs(full).solo_us(filled)
    assert Costs(few).solo_us(filled, 8) == pytest.approx(Costs(few).solo_us(filled), rel=0.02)
    assert Costs(few).solo_us(filled, 16) > 1.2 * Costs(few).solo_us(filled)


def test_a_piece_costs_its_launch_and_two_passes_over_its_result() -> None:
    spec = node(piece_us=4.0)
    whole = gemm("g", 512, 3584, 7168)
    piece = gemm("g", 512, 7168, 7168).fragment(Fragment("cols", 0, 1, 2))
    assert piece.is_piece and piece.cols == whole.cols
    passes = 2 * 2 * 512 * 3584 / (spec.device.hbm_gb_s * spec.device.hbm_efficiency * 1e3)
    extra = Costs(spec).solo_us(piece) - Costs(spec).solo_us(whole)
    assert extra == pytest.approx(4.0 + passes, abs=0.2)
    assert Costs(node()).solo_us(piece) == Costs(node()).solo_us(whole)


def test_the_default_table_may_have_few_ctas() -> None:
    base = load_node("h200-nvlink-x4")
    kernel = collective("c", Kind.ALL_REDUCE, 1 << 20, 4)
    assert Costs(base).ctas_of(kernel, 0) == 16
    usual = Costs(msgspec.structs.replace(base, link=msgspec.structs.replace(base.link, default_ctas=2)))
    assert (usual.ctas_of(kernel, 0), usual.ctas_of(kernel, 16), usual.ctas_of(kernel, 2)) == (2, 16, 2)


def beside(size: int, **contention: float) -> float:
    """Slowdown of a collective on a node that has so much contention and nothing else to share."""
    base = load_node("h200-nvlink-x4")
    spec = msgspec.structs.replace(base.contention, gemm_by_comm=1.0, **contention)
    world = msgspec.structs.replace(base, contention=spec)
    pair = Pair(gemm("g", 256, 4096, 8192), collective("c", Kind.ALL_REDUCE, size, 4), 32)
    return race(Costs(world), pair, with_delay=False).comm_slowdown


def test_compute_delays_latency_or_streaming() -> None:
    latency = {"comm_by_compute": 3.0, "comm_stream_by_compute": 1.0}
    stream = {"comm_by_compute": 1.0, "comm_stream_by_compute": 3.0}
    small, large = 1 << 16, 1 << 26
    assert beside(small, **latency) > 1.5 * beside(large, **latency)
    assert beside(large, **stream) > 1.5 * beside(small, **stream)
    kinds = slowed_comm(msgspec.structs.replace(load_node("h200-nvlink-x4").contention, comm_by_attention=2.0))
    assert kinds == {Kind.GEMM: 1.1, Kind.ATTENTION: 2.0, Kind.ELEMENTWISE: 1.1}


@pytest.mark.parametrize("name", ["h200-hoststaged-x4-fitted", "h200-nvlink-x4-fitted"])
def test_fitted_nodes_are_as_their_fit_left_them(name: str) -> None:
    assert fit_notes(load_node(name)) == ()
