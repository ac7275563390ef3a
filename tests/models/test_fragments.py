"""Pieces of a kernel add up to the whole, whatever the factor; what cannot be cut says so."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.kernel import Fragment, Kernel, Kind, SplitAxis, collective, elementwise, gemm

exact = settings(derandomize=True, deadline=None)
sizes = st.integers(1, 5000)
axes: st.SearchStrategy[SplitAxis] = st.sampled_from(("rows", "cols"))


def cut(kernel: Kernel, axis: SplitAxis, parts: int) -> list[Kernel]:
    return [kernel.fragment(Fragment(axis, i, i + 1, parts)) for i in range(parts)]


@exact
@given(rows=sizes, cols=sizes, inner=sizes, axis=axes, data=st.data())
def test_pieces_of_a_gemm_tile_it(rows: int, cols: int, inner: int, axis: SplitAxis, data: st.DataObject) -> None:
    whole = gemm("g", rows, cols, inner)
    parts = data.draw(st.integers(1, min(64, whole.max_parts(axis))))
    pieces = cut(whole, axis, parts)
    assert sum(p.flops for p in pieces) == whole.flops
    assert sum(p.rows * p.cols for p in pieces) == rows * cols
    assert all(p.inner == inner and p.name == "g" and p.kind is Kind.GEMM for p in pieces)
    # Every piece beyond the first reads the other operand again: weights for rows, activations for columns.
    again = inner * cols if axis == "rows" else rows * inner
    assert sum(p.bytes_moved for p in pieces) == whole.bytes_moved + 2 * (parts - 1) * again
    assert sum(p.num_ctas for p in pieces) >= whole.num_ctas


@exact
@given(elements=st.integers(1, 10**8), ranks=st.sampled_from((2, 4, 8)), data=st.data())
def test_chunks_of_an_all_reduce_tile_it(elements: int, ranks: int, data: st.DataObject) -> None:
    whole = collective("c", Kind.ALL_REDUCE, 2 * elements, ranks)
    parts = data.draw(st.integers(1, min(64, whole.max_parts("chunks"))))
    pieces = cut(whole, "chunks", parts)
    assert sum(p.message_bytes for p in pieces) == whole.message_bytes
    assert all(p.message_bytes % 2 == 0 and p.num_ranks == ranks and p.is_communication for p in pieces)
    assert max(p.message_bytes for p in pieces) - min(p.message_bytes for p in pieces) <= 2


@exact
@given(extent=st.integers(1, 10**6), of=st.integers(1, 200), data=st.data())
def test_bounds_of_any_partition_meet(extent: int, of: int, data: st.DataObject) -> None:
    inner = data.draw(st.sets(st.integers(1, of), max_size=10)) if of > 1 else set()
    stops = sorted(inner | {of})
    starts = [0, *stops[:-1]]
    bounds = [Fragment("rows", a, b, of).bounds(extent) for a, b in zip(starts, stops, strict=True)]
    assert bounds[0][0] == 0 and bounds[-1][1] == extent
    assert all(left[1] == right[0] for left, right in pairwise(bounds))


@exact
@given(rows=sizes, cols=sizes, axis=axes, of=st.integers(2, 40), data=st.data())
def test_a_wide_piece_is_the_narrow_ones_together(
    rows: int, cols: int, axis: SplitAxis, of: int, data: st.DataObject
) -> None:
    whole = gemm("g", max(rows, of), max(cols, of), 64)
    start = data.draw(st.integers(0, of - 1))
    stop = data.draw(st.integers(start + 1, of))
    wide = whole.fragment(Fragment(axis, start, stop, of))
    narrow = [whole.fragment(Fragment(axis, i, i + 1, of)) for i in range(start, stop)]
    assert wide.flops == sum(p.flops for p in narrow)


def test_the_whole_as_one_piece_is_the_kernel() -> None:
    kernel = gemm("g", 100, 200, 300)
    assert kernel.fragment(Fragment("rows", 0, 1, 1)) == kernel
    assert hash(kernel.fragment(Fragment("cols", 0, 3, 3))) == hash(kernel)


def test_what_cannot_be_cut() -> None:
    reduce, norm, few = collective("r", Kind.ALL_REDUCE, 8, 2), elementwise("norm", 1000), gemm("g", 2, 100, 10)
    with pytest.raises(ValueError, match=r"norm may be split along nothing, not rows"):
        norm.fragment(Fragment("rows", 0, 1, 2))
    with pytest.raises(ValueError, match=r"r may be split along \('chunks',\), not cols"):
        reduce.fragment(Fragment("cols", 0, 1, 2))
    with pytest.raises(ValueError, match=r"g: rows of 2x100 cannot be cut into 8"):
        few.fragment(Fragment("rows", 0, 1, 8))
    with pytest.raises(ValueError, match=r"r: 8 bytes cannot be cut into 9 chunks"):
        reduce.fragment(Fragment("chunks", 0, 1, 9))
    for kind in (Kind.ALL_GATHER, Kind.SEND, Kind.RECV):
        assert collective("c", kind, 1024, 2).max_parts("chunks") == 1


def test_max_parts_is_what_can_be_cut() -> None:
    kernel = gemm("g", 3, 5, 7)
    assert (kernel.max_parts("rows"), kernel.max_parts("cols"), kernel.max_parts("chunks")) == (3, 5, 1)
    assert collective("c", Kind.ALL_REDUCE, 8, 2).max_parts("chunks") == 4


@pytest.mark.parametrize(("start", "stop", "of"), [(0, 0, 4), (2, 1, 4), (-1, 1, 4), (3, 5, 4), (0, 1, 0)])
def test_empty_or_outside_fragments(start: int, stop: int, of: int) -> None:
    with pytest.raises(ValueError, match=f"fragment \\[{start}, {stop}\\) of {of} is empty or out of range"):
        Fragment("rows", start, stop, of)
