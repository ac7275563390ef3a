"""Tables of durations: what was measured comes out again, between two sizes the line, and mistakes are named."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.kernel import Fragment, Kernel, Kind, collective, elementwise, gemm
from policy.profile_table import profile_from
from tests.executor.worlds import beliefs


def test_what_was_measured_comes_out_again() -> None:
    table = beliefs()
    profile = profile_from(table)
    for entry in table["gemms"]:
        for cols, row in zip(entry["cols"], entry["us"], strict=True):
            for rows, us in zip(entry["rows"], row, strict=True):
                assert profile.solo_us(gemm(entry["name"], rows, cols, 64), 0, 0) == pytest.approx(us, abs=1e-3)
    for entry in table["comms"]:
        for size, us in zip(entry["bytes"], entry["us"], strict=True):
            kernel = collective("x", Kind(entry["kind"]), int(size), 2)
            assert profile.solo_us(kernel, 0, 0) == pytest.approx(us, abs=1e-3)


def test_between_two_sizes_is_the_line_and_beyond_the_last_its_proportion() -> None:
    profile = profile_from(beliefs())
    halfway = profile.solo_us(elementwise("ffn_norm", 500_500), 0, 0)
    assert halfway == pytest.approx((8.0 + 400.0) / 2, abs=1e-3)
    assert profile.solo_us(elementwise("ffn_norm", 2_000_000), 0, 0) == pytest.approx(800.0, abs=1e-3)
    assert profile.solo_us(elementwise("ffn_norm", 10), 0, 0) == 8.0


def test_an_unmeasured_partition_is_as_none() -> None:
    profile = profile_from(beliefs())
    kernel = gemm("fc1", 64, 64, 64)
    assert profile.solo_us(kernel, 24, 0) == profile.solo_us(kernel, 0, 0)


@settings(derandomize=True, deadline=None)
@given(st.integers(8, 512), st.integers(16, 512), st.integers(2, 8), st.data())
def test_a_piece_costs_no_more_than_the_whole(rows: int, cols: int, parts: int, data: st.DataObject) -> None:
    profile = profile_from(beliefs())
    axis: Any = data.draw(st.sampled_from(["rows", "cols"]))
    stop = data.draw(st.integers(1, parts))
    kernel = gemm("fc1", rows, cols, 64)
    assert profile.part_us(kernel, Fragment(axis, 0, stop, parts)) <= profile.solo_us(kernel, 0, 0) + 1e-3


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("gemms", 0, "rows"), [64, 8, 512], "profile table of qkv_proj: sizes must grow"),
        (("others", 0, "us"), [8.0, -1.0], "values must not be negative"),
        (("comms", 0, "us"), [1.0], "2 sizes and 1 values"),
        (("comms", 0, "us"), [1.0, "a"], "of all_reduce: 'a' is among its numbers"),
        (("comms", 0, "us"), "a", "of all_reduce: 'a' is where a list"),
        (("others", 0, "us"), 7, "of embedding: 7 is where a list"),
        (("gemms", 0, "us"), 7, "of qkv_proj: us is 7"),
        (("gemms", 0, "withheld"), "x", "withheld is 'x'; it must be a whole number"),
        (("gemms",), 7, "gemms is not a list of objects"),
        (("partitions",), 0, "partitions is 0; it must be a list of counts"),
        (("partitions",), [], r"partitions is \[\]; it must be a list of counts"),
        (("partitions",), ["x"], r"partitions is \['x'\]; it must be a list of counts"),
        (("ctas",), [], r"ctas is \[\]; it must be a list of counts"),
        (("launch_us",), True, "launch_us is True"),
    ],
)
def test_mistakes_are_named(path: tuple[Any, ...], value: Any, message: str) -> None:
    table: Any = beliefs()
    place = table
    for step in path[:-1]:
        place = place[step]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    with pytest.raises(ValueError, match=message):
        profile_from(table)


def test_a_kernel_that_nobody_measured_is_named() -> None:
    with pytest.raises(ValueError, match="no durations of silu"):
        profile_from(beliefs()).solo_us(elementwise("silu", 100), 0, 0)


@pytest.mark.parametrize("name", ["overlap_price", "host_margin"])
@pytest.mark.parametrize("price", [0.0, -1.0, float("nan"), float("inf"), "dear", None])
def test_a_factor_that_is_none_is_refused(name: str, price: object) -> None:
    assert getattr(profile_from(beliefs() | {name: 1.25}), name) == 1.25
    with pytest.raises(ValueError, match=name):
        profile_from(beliefs() | {name: price})


@pytest.mark.parametrize("name", ["launch_us", "round_us", "crossing_us"])
@pytest.mark.parametrize("price", [-1.0, float("nan"), float("inf"), "fast", None])
def test_a_price_that_is_none_is_refused(name: str, price: object) -> None:
    assert getattr(profile_from(beliefs() | {name: 0}), name) == 0.0
    with pytest.raises(ValueError, match=f"{name} is .*from 0"):
        profile_from(beliefs() | {name: price})


@pytest.mark.parametrize("told", [1, "yes", None])
def test_what_is_neither_true_nor_false_is_refused(told: object) -> None:
    assert not profile_from(beliefs()).whole_segments
    assert profile_from(beliefs() | {"whole_segments": True}).whole_segments
    with pytest.raises(ValueError, match=r"whole_segments is .*true or false"):
        profile_from(beliefs() | {"whole_segments": told})


@pytest.mark.parametrize("sizes", [{"cols": 0}, {"cols": "wide", "inner": "deep"}, {"inner": 2.5}, {"cols": None}])
def test_a_gemm_of_no_size_beside_a_collective_is_refused(sizes: dict[str, object]) -> None:
    table = beliefs()
    table["pairs"] = [{**pair, **sizes} for pair in table["pairs"]]
    assert table["pairs"]
    with pytest.raises(ValueError, match="cols and inner must be whole numbers"):
        profile_from(table)


def test_of_gemms_beside_a_collective_the_one_of_nearest_size_is_believed() -> None:
    table = beliefs()
    first = table["pairs"][0]
    flat = {"rows": [1, 4096], "comm": [1.0, 1.0]}
    large = {**first, **flat, "kind": "gemm", "withheld": 0, "ctas": 0, "cols": 8192, "inner": 8192}
    small = {**large, "cols": 1024, "inner": 1024}
    table["pairs"] = [{**large, "compute": [1.25, 1.25]}, {**small, "compute": [1.75, 1.75]}]
    profile, beside = profile_from(table), collective("sum", Kind.ALL_REDUCE, 1 << 20, 4)

    def slowdown(kernel: Kernel) -> float:
        return profile.contention(kernel, beside, 0, 0).compute

    assert slowdown(gemm("fc1", 64, 8192, 6000)) == 1.25
    assert slowdown(gemm("out_proj", 64, 1024, 2000)) == 1.75
    assert slowdown(elementwise("norm", 100)) == 1.25
