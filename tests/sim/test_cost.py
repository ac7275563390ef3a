"""Solo durations against closed forms on a device made for it, and against published GEMM tables."""

from __future__ import annotations

import csv
import gzip
import os
from math import ceil
from pathlib import Path

import msgspec
import numpy as np
import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st

from models.config import MODELS
from models.kernel import Fragment, Kernel, Kind, SplitAxis, collective, elementwise, gemm
from models.transformer import BatchShape, layer_kernels
from policy.batch import TICK_US
from policy.round import Lane, Launch
from sim.cost import PARTIAL_BYTES, Costs, alone_us, cta_shape, memory_bandwidth, partition_sms
from sim.device import Device
from sim.spec import DeviceSpec, Table, load_node

exact = settings(derandomize=True, deadline=None)
SMS, SM_FLOPS = 10, 1e6  # a small device: 10 SMs of 1 TFLOPS, 1e6 operations per microsecond each
TILE = 128
WHOLE = 500  # an inner dimension that is too short to be split


def device(**changes: object) -> DeviceSpec:
    """A device without a bottleneck but its SMs, unless changed."""
    plain = DeviceSpec(
        name="toy", num_sms=SMS, peak_tflops=10.0, gemm_efficiency=1.0, attention_efficiency=1.0, hbm_gb_s=1e9,
        hbm_efficiency=1.0, sm_bandwidth_gb_s=1e9, gemm_tiles=((TILE, TILE, 1.0),), kernel_gap_us=1.0,
        graph_gap_us=1.0, event_gap_us=1.0,
    )  # fmt: skip
    return msgspec.structs.replace(plain, **changes)


def time_us(kernel: Kernel, spec: DeviceSpec, slots: int = SMS) -> float:
    return alone_us(cta_shape(kernel, spec), slots, spec)


def ticks(count: int) -> float:
    return count * TICK_US


# -- closed forms -----------------------------------------------------------------------------------------------------


@exact
@given(rows=st.integers(1, 3000), cols=st.integers(1, 3000), slots=st.integers(1, SMS))
def test_compute_bound_gemm_is_waves_times_a_tile(rows: int, cols: int, slots: int) -> None:
    tiles = ceil(rows / TILE) * ceil(cols / TILE)
    one = 2 * TILE * TILE * WHOLE / SM_FLOPS
    # Rounding up to the grid: once for the full waves, once for the rest.
    assert 0.0 <= time_us(gemm("g", rows, cols, WHOLE), device(), slots) - ceil(tiles / slots) * one <= ticks(2)


@exact
@given(rows=st.integers(1, 2000), cols=st.integers(1, 2000), slots=st.integers(2, SMS))
def test_compute_bound_gemm_is_monotone_in_rows_and_in_sms(rows: int, cols: int, slots: int) -> None:
    kernel, spec = gemm("g", rows, cols, WHOLE), device()
    least = time_us(kernel, spec, slots) - ticks(1)  # full waves and the rest are rounded up apart
    assert time_us(gemm("g", rows + 1, cols, WHOLE), spec, slots) >= least
    assert time_us(kernel, spec, slots - 1) >= least


@exact
@given(rows=st.integers(1, 200), bandwidth=st.floats(10.0, 5000.0), share=st.floats(0.1, 1.0), ramp=st.floats(0.0, 9.0))
def test_memory_bound_gemm_streams_its_operands(rows: int, bandwidth: float, share: float, ramp: float) -> None:
    spec = device(peak_tflops=1e9, hbm_gb_s=bandwidth, hbm_efficiency=share, ramp_us=ramp)
    kernel = gemm("g", rows, 600, WHOLE)
    expected = kernel.bytes_moved / (bandwidth * share * 1e3) + ramp  # GB/s are 1e3 bytes per microsecond
    assert time_us(kernel, spec) == pytest.approx(expected, rel=1e-9, abs=ticks(2))


def test_one_cta_draws_no_more_than_an_sm_can() -> None:
    spec = device(peak_tflops=1e9, hbm_gb_s=1000.0, sm_bandwidth_gb_s=50.0)
    kernel = gemm("g", 100, 100, WHOLE)
    assert time_us(kernel, spec) == pytest.approx(kernel.bytes_moved / 50e3, abs=ticks(2))


@pytest.mark.parametrize(("tiles", "waves"), [(1, 1), (10, 1), (11, 2), (30, 3)])
def test_every_wave_pays_its_ctas_start(tiles: int, waves: int) -> None:
    kernel = gemm("g", TILE * tiles, TILE, WHOLE)
    added = time_us(kernel, device(cta_start_us=3.0)) - time_us(kernel, device())
    assert added == pytest.approx(3.0 * waves, abs=ticks(2))


def test_a_small_gemm_is_split_along_its_inner_dimension() -> None:
    kernel = gemm("g", TILE, TILE, 2048)
    shape = cta_shape(kernel, device())
    assert shape.num_ctas == 8  # one tile, eight parts of 256
    assert shape.cta_us == pytest.approx(2 * TILE * TILE * 256 / SM_FLOPS)
    assert shape.cta_bytes * 8 == pytest.approx(kernel.bytes_moved + PARTIAL_BYTES * TILE * TILE * 8)
    # Where the partial sums cost more than idle SMs, it stays whole.
    assert cta_shape(kernel, device(hbm_gb_s=5.0)).num_ctas == 1


def test_the_tile_that_ends_first_is_taken() -> None:
    tiles = ((128, 128, 1.0), (64, 128, 0.9))
    spec = device(gemm_tiles=tiles)
    assert cta_shape(gemm("g", 640, 128, WHOLE), spec).num_ctas == 10  # ten small tiles on ten SMs, not five large
    assert cta_shape(gemm("g", 1280, 128, WHOLE), spec).num_ctas == 10  # one wave of large tiles, not two of small


def test_elementwise_is_bound_by_memory() -> None:
    kernel = elementwise("norm", 40_000_000)
    spec = device(hbm_gb_s=1000.0, hbm_efficiency=0.8)
    assert time_us(kernel, spec) == pytest.approx(40e6 / 800e3, rel=0.01)  # the last wave is not full


def test_attention_is_waves_of_its_operations() -> None:
    kernel = Kernel("a", Kind.ATTENTION, flops=25e6, bytes_moved=1.0, num_ctas=25)
    assert time_us(kernel, device(attention_efficiency=0.5)) == pytest.approx(3 * 2.0, abs=ticks(2))


@pytest.mark.parametrize("node", ["a100-pcie-x4", "h200-nvlink-x4"])
def test_solo_times_of_real_kernels_keep_their_bounds(node: str) -> None:
    costs = Costs(load_node(node))
    spec = costs.device
    for rows in (1, 100, 512, 2000):
        kernels = layer_kernels(MODELS["glm-130b"], BatchShape(1, rows), 4)
        for kernel in (k for k in kernels if not k.is_communication):
            shape = cta_shape(kernel, spec)
            for withheld in (0, 8, 20, spec.num_sms - 1):
                slots = partition_sms(spec, withheld)
                time = costs.solo_us(kernel, withheld)
                stream = shape.num_ctas * shape.cta_bytes / memory_bandwidth(spec)
                waves = ceil(shape.num_ctas / slots) * shape.cta_us
                assert max(stream, waves) <= time + ticks(1)
                assert time <= stream + waves + ticks(2)


@pytest.mark.parametrize("node", ["a100-nvlink-x4", "h200-nvlink-x4"])
def test_twice_the_rows_are_never_faster(node: str) -> None:
    costs = Costs(load_node(node))
    for cols, inner in ((9216, 12288), (12288, 8192), (7168, 7168), (1536, 4096)):
        times = [costs.solo_us(gemm("g", 2**i, cols, inner)) for i in range(14)]
        assert times == sorted(times)


@exact
@given(
    rows=st.integers(1, 3000),
    shape=st.sampled_from([(9216, 12288), (4096, 1024), (7168, 1792)]),
    withheld=st.integers(0, 60),
)
def test_the_simulated_device_takes_what_the_cost_says(rows: int, shape: tuple[int, int], withheld: int) -> None:
    costs = Costs(load_node("a100-pcie-x4"))
    kernel = gemm("g", rows, *shape)
    env = simpy.Environment()
    gpu = Device(env, 0, costs, priority=True, record=True)
    gpu.issue(Launch(0, 0, 1, Lane.COMPUTE, withheld_sms=withheld), (kernel,), 0)
    env.run()
    (span,) = gpu.spans
    assert span.end_us - span.start_us == costs.solo_us(kernel, withheld)


# -- tables of the links ----------------------------------------------------------------------------------------------


@exact
@given(
    points=st.lists(st.tuples(st.integers(1, 10**9), st.floats(1.0, 1e6)), min_size=2, max_size=8,
                    unique_by=lambda p: p[0]),
    size=st.integers(1, 10**10),
)  # fmt: skip
def test_interpolation_of_a_table(points: list[tuple[int, float]], size: int) -> None:
    sizes = tuple(sorted(p[0] for p in points))
    times = tuple(sorted(p[1] for p in points))
    table = Table(op="all_reduce", ranks=4, ctas=8, bytes=sizes, us=times)
    for at, time in zip(sizes, times, strict=True):
        assert table.at(at) == pytest.approx(time, rel=1e-12)
    assert table.at(size + 1) >= table.at(size) * (1 - 1e-12)  # increasing points, increasing times
    if size <= sizes[0]:
        assert table.at(size) == times[0]
    if size >= sizes[-1]:
        assert table.at(size) == pytest.approx(times[-1] * size / sizes[-1])  # the last bandwidth holds


def test_between_two_points_a_table_is_a_power_law() -> None:
    table = Table(op="send", ranks=2, ctas=4, bytes=(100, 10_000), us=(1.0, 100.0))
    assert table.at(1000) == pytest.approx(10.0)


@pytest.mark.parametrize("node", ["a100-pcie-x4", "a100-nvlink-x4", "v100-nvlink-x4", "h200-nvlink-x4"])
def test_solo_time_of_a_collective_is_its_tables(node: str) -> None:
    spec = load_node(node)
    costs = Costs(spec)
    for table in spec.link.tables:
        kernel = collective("c", Kind(table.op), table.bytes[1], table.ranks)
        assert costs.solo_us(kernel, 0, table.ctas, table.path) == pytest.approx(table.us[1], abs=ticks(1))
        assert costs.ctas_of(kernel, table.ctas, table.path) == table.ctas


def test_choice_of_a_table() -> None:
    costs = Costs(load_node("h200-nvlink-x4"))  # all-reduce among 4 with 16 and with 2 CTAs
    reduce = collective("r", Kind.ALL_REDUCE, 1 << 20, 4)
    assert [costs.ctas_of(reduce, limit) for limit in (0, 16, 15, 2, 1)] == [16, 16, 2, 2, 2]
    assert costs.solo_us(reduce, 0, 2) == 109.0 and costs.solo_us(reduce) == 21.0
    send, receive = (collective("p", kind, 1 << 20, 2) for kind in (Kind.SEND, Kind.RECV))
    assert costs.solo_us(receive) == costs.solo_us(send)
    assert costs.solo_us(send, path="pair") == costs.solo_us(send)  # no bridged pairs here
    assert costs.solo_us(reduce, 40) == costs.solo_us(reduce)  # withholding SMs is for compute


def test_operations_and_sizes_that_a_node_does_not_know() -> None:
    costs = Costs(load_node("a100-pcie-x4"))
    with pytest.raises(ValueError, match="node a100-pcie-x4 has no table for all_reduce among 3 ranks"):
        costs.solo_us(collective("r", Kind.ALL_REDUCE, 1024, 3))
    largest = costs.table(collective("r", Kind.ALL_REDUCE, 1024, 4), 0, "").bytes[-1]
    assert not costs.beyond(collective("r", Kind.ALL_REDUCE, largest, 4))
    assert costs.beyond(collective("r", Kind.ALL_REDUCE, largest + 2, 4))
    assert not costs.beyond(gemm("g", 1, 1, 1))


@pytest.mark.parametrize("rows", [128, 256, 512, 1024, 2048])
def test_share_of_communication_is_plausible(rows: int) -> None:
    """GLM-130B on four A100 over PCIe: 47.1 % in the literature, 44 to 49 % from measured parts on faster SXM cards."""
    costs = Costs(load_node("a100-pcie-x4"))
    layer = layer_kernels(MODELS["glm-130b"], BatchShape(1, rows), 4)
    communication = sum(costs.solo_us(k) for k in layer if k.is_communication)
    assert 0.40 < communication / sum(costs.solo_us(k) for k in layer) < 0.50


# -- published measurements -------------------------------------------------------------------------------------------

# f x time(piece) / time(whole) of GEMMs of rows x 8192 x 12288 cut into 8, measured (cuBLAS in vLLM): rows, columns.
CUT_IN_8 = {
    "a100-nvlink-x4": {128: (7.07, 1.53), 256: (4.78, 1.36), 512: (2.62, 1.19)},
    "h200-nvlink-x4": {128: (7.82, 1.87), 256: (6.07, 1.80), 512: (3.73, 1.52)},
}


@pytest.mark.parametrize("node", CUT_IN_8)
def test_cost_of_cutting_a_gemm(node: str) -> None:
    costs = Costs(load_node(node))
    gap = costs.device.graph_gap_us
    axes: tuple[SplitAxis, SplitAxis] = ("rows", "cols")
    for rows, measured in CUT_IN_8[node].items():
        kernel = gemm("g", rows, 8192, 12288)
        whole = costs.solo_us(kernel) + gap
        for axis, ratio in zip(axes, measured, strict=True):
            pieces = [kernel.fragment(Fragment(axis, i, i + 1, 8)) for i in range(8)]
            assert sum(costs.solo_us(p) + gap for p in pieces) / whole == pytest.approx(ratio, rel=0.3)


def gemm_table(system: str) -> dict[tuple[int, int, int], float]:
    """Microseconds by (rows, cols, inner), from the tables of AIConfigurator."""
    root = Path(__file__).resolve().parents[2]
    data = Path(os.environ.get("WEFT_DATA", root.parent / "shared" / "data"))
    path = data / "aiconfigurator" / system / "gemm_bf16.csv.gz"
    if not path.is_file():
        pytest.skip(f"no reference table at {path}; set WEFT_DATA to the folder that holds aiconfigurator/")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return {(int(r["m"]), int(r["n"]), int(r["k"])): 1e3 * float(r["latency"]) for r in csv.DictReader(file)}


def held_out(table: dict[tuple[int, int, int], float]) -> set[tuple[int, int]]:
    """The third of the (cols, inner) pairs that the nodes' numbers were not fitted to."""
    fc1_of_glm = (65536, 12288)
    pairs = sorted({(n, k) for _, n, k in table if max(n, k) <= 16384 or (n, k) == fc1_of_glm})
    return set(pairs[1::3])


@pytest.mark.parametrize(
    ("node", "system", "bound"), [("a100-nvlink-x4", "a100_sxm", 0.065), ("h200-nvlink-x4", "h200_sxm", 0.075)]
)
def test_gemm_times_against_shapes_kept_out_of_the_fit(node: str, system: str, bound: float) -> None:
    table, costs = gemm_table(system), Costs(load_node(node))
    kept = held_out(table)
    keys = [key for key in table if key[0] <= 4096 and key[1:] in kept]
    assert len(kept) == 50 and len(keys) == 3400
    # The tables replay a CUDA graph, so a kernel's time has the gap to the next one in it.
    gap = costs.device.graph_gap_us
    error = np.array([(costs.solo_us(gemm("g", *key)) + gap) / table[key] - 1.0 for key in keys])
    assert np.abs(error).mean() < bound  # found: 6.0 % (A100), 6.9 % (H200)
    assert abs(error.mean()) < 0.02
    rows = np.array([key[0] for key in keys])
    for low, high in ((1, 64), (65, 256), (257, 1024), (1025, 4096)):
        assert np.abs(error[(rows >= low) & (rows <= high)]).mean() < 0.12
