"""A function vector's derived views agree with the plain list of its kernels."""

from __future__ import annotations

from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.config import MODELS
from models.kernel import FunctionVector, Kernel, Kind, collective, elementwise
from models.transformer import BatchShape, Layout, function_vector

exact = settings(derandomize=True, deadline=None)


def kernel(number: int, communication: bool) -> Kernel:
    if communication:
        return collective(f"c{number}", Kind.ALL_REDUCE, 2 * (number + 1), 2)
    return elementwise(f"e{number}", number + 1)


kernels = st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=6).map(
    lambda items: tuple(kernel(*item) for item in items)
)
vectors = (
    st.tuples(kernels, kernels, st.integers(0, 5), kernels)
    .filter(lambda t: bool(t[0] or t[3] or (t[1] and t[2])))
    .map(lambda t: FunctionVector(*t))
)


@exact
@given(vectors)
def test_length_and_order(vector: FunctionVector) -> None:
    assert len(vector) == len(vector.kernels)
    assert vector.kernels == (*vector.prologue, *(k for _ in range(vector.num_layers) for k in vector.layer),
                              *vector.epilogue)  # fmt: skip


@exact
@given(vectors)
def test_run_end_is_where_the_resource_changes(vector: FunctionVector) -> None:
    ends: list[int] = []
    for _, group in groupby(vector.kernels, key=lambda k: k.is_communication):
        length = len(list(group))
        ends += [len(ends) + length] * length
    assert vector.run_end == tuple(ends)


@exact
@given(vectors)
def test_locate_finds_the_kernel_again(vector: FunctionVector) -> None:
    for index, expected in enumerate(vector.kernels):
        layer, position = vector.locate(index)
        if layer == -1:
            assert vector.prologue[position] is expected
        elif layer == vector.num_layers:
            assert vector.epilogue[position] is expected
        else:
            assert 0 <= layer < vector.num_layers
            assert vector.layer[position] is expected
            assert index == len(vector.prologue) + layer * len(vector.layer) + position


@exact
@given(vectors)
def test_communication_bytes(vector: FunctionVector) -> None:
    assert vector.communication_bytes == sum(k.message_bytes for k in vector.kernels)


def test_locate_in_a_real_model() -> None:
    vector = function_vector(MODELS["glm-130b"], BatchShape(2, 64), Layout(4))
    assert [k.name for k in vector.prologue] == ["embedding", "embedding_all_reduce"]
    assert [k.name for k in vector.epilogue] == ["final_norm", "lm_head", "logits_gather"]
    assert vector.locate(0) == (-1, 0)
    assert vector.locate(2) == (0, 0)
    assert vector.locate(2 + 69 * len(vector.layer)) == (69, 0)
    assert vector.locate(len(vector) - 1) == (70, 2)


def test_a_vector_without_kernels() -> None:
    with pytest.raises(ValueError, match="a function vector needs at least one kernel"):
        FunctionVector((), (elementwise("x", 1),), 0)
