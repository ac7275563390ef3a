"""Counts and volumes of communication against closed forms (vLLM and Megatron conventions) and a worked table."""

from __future__ import annotations

from collections import Counter

import pytest

from models.config import MODELS, ModelConfig
from models.kernel import Kernel, Kind
from models.transformer import BatchShape, Layout, function_vector

PROMPT, OUTPUT, ELEMENT = 128, 128, 2
WITH_EMBEDDING = sorted(name for name, config in MODELS.items() if config.vocab_size)

LLAMA_3B = ModelConfig("llama-3.2-3b", "llama", 28, 3072, 24, 8, 128, 8192, True, 128256, 8192)
# All-reduces per step; payload of one in prefill and in decode; calls and payload of 128 prompt and 128 output tokens.
WORKED = {
    LLAMA_3B: (57, 786432, 6144, 7296, 89303040),
    MODELS["llama-3-8b"]: (65, 1048576, 8192, 8320, 135782400),
    MODELS["llama-2-13b"]: (81, 1310720, 10240, 10368, 211507200),
    MODELS["llama-2-70b"]: (161, 2097152, 16384, 20608, 672645120),
    MODELS["llama-3-70b"]: (161, 2097152, 16384, 20608, 672645120),
    MODELS["opt-30b"]: (97, 1835008, 14336, 12416, 354600960),
    MODELS["opt-66b"]: (129, 2359296, 18432, 16512, 606320640),
    MODELS["glm-130b"]: (141, 3145728, 24576, 18048, 883630080),
}


def of_kind(kernels: tuple[Kernel, ...], kind: Kind) -> list[Kernel]:
    return [k for k in kernels if k.kind is kind]


def step(config: ModelConfig, shape: BatchShape, layout: Layout, stage: int = 0) -> tuple[Kernel, ...]:
    return function_vector(config, shape, layout, stage).kernels


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("config", WORKED, ids=lambda config: config.model_id)
def test_all_reduces_equal_the_worked_table(config: ModelConfig, tp: int) -> None:
    per_step, prefill, decode, calls, payload = WORKED[config]
    first = of_kind(step(config, BatchShape(1, PROMPT), Layout(tp)), Kind.ALL_REDUCE)
    assert len(first) == per_step
    assert {k.message_bytes for k in first} == {prefill}
    assert {k.num_ranks for k in first} == {tp}
    total, count = sum(k.message_bytes for k in first), len(first)
    for token in range(1, OUTPUT):
        shape = BatchShape(1, 1, "decode", PROMPT + token - 1)
        later = of_kind(step(config, shape, Layout(tp)), Kind.ALL_REDUCE)
        assert {k.message_bytes for k in later} == {decode}
        total, count = total + sum(k.message_bytes for k in later), count + len(later)
    assert (count, total) == (calls, payload)


@pytest.mark.parametrize("name", WITH_EMBEDDING)
def test_tensor_parallel_prefill(name: str) -> None:
    config, n = MODELS[name], 2 * PROMPT
    for tp in (2, 4):
        vector = function_vector(config, BatchShape(2, PROMPT), Layout(tp))
        reduces = of_kind(vector.kernels, Kind.ALL_REDUCE)
        assert len(reduces) == 2 * config.num_layers + 1
        assert {k.message_bytes for k in reduces} == {n * config.hidden_size * ELEMENT}
        gathers = of_kind(vector.kernels, Kind.ALL_GATHER)
        assert [k.message_bytes for k in gathers] == [2 * config.vocab_size * ELEMENT]  # last token of two sequences
        payload = (2 * config.num_layers + 1) * n * config.hidden_size * ELEMENT + 2 * config.vocab_size * ELEMENT
        assert vector.communication_bytes == payload


def test_layers_alone_have_two_all_reduces_each() -> None:
    config = MODELS["glm-130b-plain"]
    kinds = Counter(k.kind for k in step(config, BatchShape(1, PROMPT), Layout(4)) if k.is_communication)
    assert kinds == {Kind.ALL_REDUCE: 2 * config.num_layers}


@pytest.mark.parametrize("name", sorted(MODELS))
def test_one_rank_does_not_communicate(name: str) -> None:
    assert not any(k.is_communication for k in step(MODELS[name], BatchShape(2, PROMPT), Layout()))


@pytest.mark.parametrize("pp", [2, 4])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_pipeline_moves_two_tensors_over_every_boundary(name: str, pp: int) -> None:
    config, shape = MODELS[name], BatchShape(1, PROMPT)
    stages = [step(config, shape, Layout(1, pp), stage) for stage in range(pp)]
    sends = [k for kernels in stages for k in of_kind(kernels, Kind.SEND)]
    receives = [k for kernels in stages for k in of_kind(kernels, Kind.RECV)]
    assert len(sends) == len(receives) == 2 * (pp - 1)
    assert {k.message_bytes for k in sends + receives} == {PROMPT * config.hidden_size * ELEMENT}
    assert not of_kind(stages[0], Kind.RECV) and not of_kind(stages[-1], Kind.SEND)
    others = {k.kind for kernels in stages for k in kernels if k.is_communication} - {Kind.SEND, Kind.RECV}
    assert not others


def test_pipeline_of_two_over_a_whole_request() -> None:
    config, layout = MODELS["llama-3-8b"], Layout(1, 2)
    shapes = [BatchShape(1, PROMPT)] + [BatchShape(1, 1, "decode", PROMPT + t) for t in range(OUTPUT - 1)]
    sends = [k for shape in shapes for k in of_kind(step(config, shape, layout), Kind.SEND)]
    assert len(sends) == 256
    assert sum(k.message_bytes for k in sends) == 4_177_920


@pytest.mark.parametrize("name", WITH_EMBEDDING)
@pytest.mark.parametrize(("tp", "pp"), [(2, 2), (4, 2), (2, 4)])
def test_hybrid_sends_slices_and_gathers_them(name: str, tp: int, pp: int) -> None:
    config, shape, layout = MODELS[name], BatchShape(1, PROMPT), Layout(tp, pp)
    whole = PROMPT * config.hidden_size * ELEMENT
    stages = [step(config, shape, layout, stage) for stage in range(pp)]
    for stage, kernels in enumerate(stages):
        layers = len(layout.layers_of(stage, config.num_layers))
        assert len(of_kind(kernels, Kind.ALL_REDUCE)) == 2 * layers + (stage == 0)
        sends, receives = of_kind(kernels, Kind.SEND), of_kind(kernels, Kind.RECV)
        assert [k.message_bytes for k in sends] == [whole // tp] * (2 * (stage < pp - 1))
        assert [k.message_bytes for k in receives] == [whole // tp] * (2 * (stage > 0))
        gathers = [k for k in of_kind(kernels, Kind.ALL_GATHER) if k.name != "logits_gather"]
        assert [k.message_bytes for k in gathers] == [whole] * (2 * (stage > 0))
    gathers = [k for kernels in stages for k in of_kind(kernels, Kind.ALL_GATHER) if k.name != "logits_gather"]
    assert len(gathers) == 2 * (pp - 1)


@pytest.mark.parametrize("pp", [1, 2, 3, 4])
@pytest.mark.parametrize("num_layers", [4, 7, 70])
def test_stages_tile_the_layers(num_layers: int, pp: int) -> None:
    stages = [Layout(2, pp).layers_of(stage, num_layers) for stage in range(pp)]
    assert [layer for stage in stages for layer in stage] == list(range(num_layers))
    assert max(map(len, stages)) - min(map(len, stages)) <= 1


def test_ranks_of_a_stage_are_adjacent() -> None:
    layout = Layout(2, 3)
    assert [layout.stage_of(rank) for rank in range(layout.num_ranks)] == [0, 0, 1, 1, 2, 2]
