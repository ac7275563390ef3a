"""Published tables, once imported, show the numbers that are known of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from calibration.importers.aiconfigurator import read_aiconfigurator
from calibration.importers.found import Found, Request, repeats_of
from calibration.importers.vidur import read_vidur
from calibration.kernels import kernel_of
from traces.measurement import Measurement

LARGE = 512 * 2**20


def aiconfigurator(real_data: Path, system: str, *names: str, source: str = "") -> list[Measurement]:
    folder = real_data / "aiconfigurator" / system
    found = read_aiconfigurator([folder / f"{name}.csv.gz" for name in names], Request(source=source))
    return repeats_of(found.samples)


def vidur(real_data: Path, *paths: str) -> tuple[Found, list[Measurement]]:
    files = [real_data / "vidur" / path for path in paths]
    if missing := [file for file in files if not file.exists()]:
        pytest.skip(f"no reference table at {missing[0]}")
    found = read_vidur(files, Request())
    return found, repeats_of(found.samples)


def bus_gb_s(row: Measurement) -> float:
    """Bandwidth of the busiest link as nccl-tests defines it."""
    ranks, op = int(row.at["num_ranks"]), row.at["op"]
    factor = {"all_reduce": 2 * (ranks - 1) / ranks, "all_gather": (ranks - 1) / ranks, "send": 1.0}[str(op)]
    return factor * float(row.at["bytes"]) / row.values["us"] / 1e3


@pytest.mark.parametrize(
    ("system", "source", "op", "expected"),
    [
        ("a100_sxm", "", "all_reduce", {2: 193, 4: 217, 8: 222}),
        ("a100_sxm", "", "all_gather", {2: 150, 4: 192, 8: 205}),
        ("h200_sxm", "nccl/2.29.2", "all_reduce", {2: 315, 4: 348, 8: 460}),
    ],
)
def test_bus_bandwidth_of_nccl(real_data: Path, system: str, source: str, op: str, expected: dict[int, int]) -> None:
    rows = aiconfigurator(real_data, system, "nccl", source=source)
    found = {row.at["num_ranks"]: bus_gb_s(row) for row in rows if row.at["op"] == op and row.at["bytes"] == LARGE}
    assert found == pytest.approx(expected, abs=0.6)
    assert min(int(row.at["bytes"]) for row in rows) in (512, 2048)


def test_the_engines_all_reduce_is_faster_when_small(real_data: Path) -> None:
    rows = aiconfigurator(real_data, "a100_sxm", "custom_allreduce", source="vllm/0.14.0")
    small = {row.at["num_ranks"]: row.values["us"] for row in rows if row.at["bytes"] == 16384}
    assert small == pytest.approx({2: 5.3, 4: 6.0, 8: 6.5}, abs=0.06)


@pytest.mark.parametrize(("system", "percentiles"), [("a100_sxm", (239, 247, 258)), ("h200_sxm", (731, 795, 817))])
def test_rate_of_gemms(real_data: Path, system: str, percentiles: tuple[int, int, int]) -> None:
    rows = aiconfigurator(real_data, system, "gemm_bf16")
    assert len(rows) > 14_000
    rates = [
        kernel_of(row).flops / row.values["us"] / 1e6 for row in rows
        if row.at["rows"] == 4096 and all(4096 <= int(row.at[axis]) <= 16384 for axis in ("cols", "inner"))
    ]  # fmt: skip
    assert np.percentile(rates, (10, 50, 90)) == pytest.approx(percentiles, abs=1.0)
    single = [
        2e-3 * int(row.at["cols"]) * int(row.at["inner"]) / row.values["us"] for row in rows
        if row.at["rows"] == 1 and int(row.at["cols"]) * int(row.at["inner"]) > 100e6
    ]  # fmt: skip
    assert np.median(single) == pytest.approx({"a100_sxm": 1523, "h200_sxm": 3985}[system], rel=0.005)


def test_rates_of_attention(real_data: Path) -> None:
    rows = aiconfigurator(real_data, "a100_sxm", "context_attention", "generation_attention", source="vllm/0.14.0")
    prefill = [
        kernel_of(row).flops / row.values["us"] / 1e6 for row in rows
        if int(row.at["length"]) >= 4096 and int(row.at["num_heads"]) >= 8
    ]  # fmt: skip
    # The known percentiles count 306 points twice; here each counts once.
    assert np.percentile(prefill, (10, 50, 90)) == pytest.approx((153, 171, 178), rel=0.02)
    decode = [row for row in rows if row.at["length"] == 1 and kernel_of(row).bytes_moved > 1e9]
    rates = [kernel_of(row).bytes_moved / row.values["us"] / 1e3 for row in decode]
    assert np.percentile(rates, (10, 50, 90)) == pytest.approx((1245, 1533, 1659), rel=0.01)
    assert max(row.repetitions for row in rows) == 12  # keys that the table holds twice


def test_vidurs_layers(real_data: Path) -> None:
    found, rows = vidur(real_data, "compute/a100/Llama-2-70b-hf/mlp.csv.gz", "compute/a100/Llama-2-7b-hf/mlp.csv.gz")
    fc1 = [r for r in rows if r.at["name"] == "fc1" and r.at["rows"] == 4096 and int(r.at["cols"]) > 20_000]
    rates = [kernel_of(row).flops / row.values["us"] / 1e6 for row in fc1]
    assert rates and min(rates) > 215 and max(rates) < 253
    # A residual sum streams its three tensors; nothing streams faster than memory does.
    add = [r for r in rows if r.at["name"] == "add" and kernel_of(r).bytes_moved > 100e6]
    rates = [kernel_of(row).bytes_moved / row.values["us"] / 1e3 for row in add]
    assert rates and min(rates) > 1600 and max(rates) < 2039
    # What only one of the two models has is there, and what both are measured twice at is one row.
    assert len({row.key for row in rows}) == len(rows)
    assert not [reason for reason in found.left_out if "ranks cannot share" in reason]


def test_vidurs_links(real_data: Path) -> None:
    paths = [f"network/a100_pairwise_nvlink/{name}.csv.gz" for name in ("all_reduce", "send_recv")]
    found, rows = vidur(real_data, *paths)
    rates: dict[tuple[object, object], list[float]] = {}
    for row in rows:
        if 32 * 2**20 <= int(row.at["bytes"]) <= 64 * 2**20:
            rates.setdefault((row.at["op"], row.at["num_ranks"]), []).append(bus_gb_s(row))
    # Four GPUs meet across PCIe, two over their bridge; sends are faster than their link (300 GB/s): known to be so.
    middle = {key: float(np.median(values)) for key, values in rates.items()}
    assert middle == pytest.approx({("all_reduce", 4): 23.5, ("all_reduce", 2): 168, ("send", 2): 323}, rel=0.04)
    assert found.left_out["collective: across nodes"] > 0


def test_vidurs_attention(real_data: Path) -> None:
    _, rows = vidur(real_data, "compute/a100/attention_gqa64_8_8192_tp2.csv.gz")
    prefill = [row for row in rows if int(row.at["length"]) > 1]
    assert {(row.at["num_heads"], row.at["num_kv_heads"], row.at["head_dim"]) for row in rows} == {(32, 4, 128)}
    assert 0 < len(prefill) < len(rows)
    rates = [
        kernel_of(row).flops / row.values["us"] / 1e6 for row in prefill
        if int(row.at["length"]) >= 512 and int(row.at["context_len"]) >= 3 * int(row.at["length"])
    ]  # fmt: skip
    assert rates and 80 < np.median(rates) < 140  # an older kernel: a newer one reaches 170
