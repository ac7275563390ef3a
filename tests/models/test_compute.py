"""FLOPs and bytes of a whole forward against closed forms, over all ranks of every layout."""

from __future__ import annotations

import pytest

from models.config import MODELS, ModelConfig
from models.kernel import Kernel, Kind, gemm
from models.transformer import BatchShape, Layout, function_vector, layer_kernels, weight_bytes

SHAPES = [BatchShape(1, 128), BatchShape(3, 17), BatchShape(5, 1, "decode", 200), BatchShape(2, 8, "prefill", 64)]


def forward(config: ModelConfig, shape: BatchShape, layout: Layout) -> list[Kernel]:
    """Every kernel of every rank."""
    stages = [function_vector(config, shape, layout, stage).kernels for stage in range(layout.pp)]
    return [k for kernels in stages for k in kernels for _ in range(layout.tp)]


def flops(kernels: list[Kernel], kind: Kind) -> float:
    return sum(k.flops for k in kernels if k.kind is kind)


def expected_gemm_flops(config: ModelConfig, shape: BatchShape) -> int:
    """2 x parameters x tokens; the head, which shares the embedding's weights, sees the last token of a sequence."""
    head = config.vocab_size * config.hidden_size
    return 2 * (config.num_parameters - head) * shape.rows + 2 * head * shape.num_sequences


def expected_attention_flops(config: ModelConfig, shape: BatchShape) -> int:
    """Two products of 2 x head_dim per pair of query and visible key, counted one by one."""
    pairs = sum(shape.context_len + i + 1 for i in range(shape.padded_len)) * shape.num_sequences
    return config.num_layers * 2 * 2 * pairs * config.num_heads * config.head_dim


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", sorted(MODELS))
def test_flops_of_a_forward(name: str, shape: BatchShape) -> None:
    config = MODELS[name]
    for layout in (Layout(), Layout(2), Layout(4), Layout(1, 4), Layout(2, 2)):
        kernels = forward(config, shape, layout)
        assert flops(kernels, Kind.GEMM) == expected_gemm_flops(config, shape)
        assert flops(kernels, Kind.ATTENTION) == expected_attention_flops(config, shape)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_weights_are_read_once_over_all_ranks(name: str) -> None:
    config, shape = MODELS[name], BatchShape(1, 1, "decode", 10)
    for layout in (Layout(), Layout(4), Layout(2, 2)):
        weights = sum(k.cols * k.inner for k in forward(config, shape, layout) if k.kind is Kind.GEMM)
        assert weights == config.num_parameters


# Totals that the model cards give; these models have a head of their own beside the embedding.
PUBLISHED = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "qwen2.5-32b": 32.76e9,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    config = MODELS[name]
    total = config.num_parameters + config.vocab_size * config.hidden_size
    assert total == pytest.approx(PUBLISHED[name], rel=1e-3)  # norms and biases are left out


@pytest.mark.parametrize(("name", "billions"), [("opt-30b", 30), ("opt-66b", 66), ("glm-130b", 130)])
def test_parameter_counts_are_what_the_names_say(name: str, billions: float) -> None:
    assert MODELS[name].num_parameters / 1e9 == pytest.approx(billions, rel=0.015)


def test_key_value_heads_are_repeated_when_there_are_too_few() -> None:
    config = MODELS["tiny-llama"]  # 8 heads, 4 key-value heads
    (alone,) = [k for k in layer_kernels(config, BatchShape(1, 8), 1) if k.name == "qkv_proj"]
    (shared,) = [k for k in layer_kernels(config, BatchShape(1, 8), 8) if k.name == "qkv_proj"]
    assert alone.cols == (8 + 2 * 4) * config.head_dim
    assert shared.cols == (1 + 2 * 1) * config.head_dim


def test_bytes_of_a_gemm_touch_every_operand_once() -> None:
    kernel = gemm("x", 3, 5, 7, element_bytes=2)
    assert kernel.bytes_moved == 2 * (3 * 7 + 7 * 5 + 3 * 5)
    assert kernel.flops == 2 * 3 * 5 * 7


def test_attention_never_moves_the_score_matrix() -> None:
    config = MODELS["llama-3-8b"]

    def moved(length: int) -> float:
        (kernel,) = [k for k in layer_kernels(config, BatchShape(1, length), 1) if k.kind is Kind.ATTENTION]
        return kernel.bytes_moved

    assert moved(4096) == 2 * moved(2048)  # linear in the length
    assert moved(2048) == 2048 * 128 * 2 * (2 * 32 + 2 * 8)  # q and output of 32 heads, k and v of 8


@pytest.mark.parametrize("name", ["glm-130b", "opt-30b"])
def test_kernels_of_a_layer_in_order(name: str) -> None:
    config = MODELS[name]
    names = [k.name for k in layer_kernels(config, BatchShape(1, 8), 2)]
    rotary = [] if config.family == "opt" else ["rotary"]
    assert names == [
        "attn_norm", "qkv_proj", *rotary, "attention", "out_proj", "attn_all_reduce",
        "ffn_norm", "fc1", "activation", "fc2", "ffn_all_reduce",
    ]  # fmt: skip


def test_one_object_per_shape() -> None:
    """Plans are cached by the identity of a function vector."""
    config = MODELS["tiny-glm"]
    assert function_vector(config, BatchShape(2, 8), Layout(2)) is function_vector(config, BatchShape(2, 8), Layout(2))


@pytest.mark.parametrize(
    ("name", "layout", "message"),
    [
        ("opt-30b", Layout(3), "opt-30b: heads 56 cannot be divided over 3 ranks"),
        ("llama-2-7b", Layout(1, 40), "llama-2-7b: 32 layers cannot fill 40 stages"),
        ("tiny-glm", Layout(16), "tiny-glm: heads 8 cannot be divided over 16 ranks"),
        ("llama-2-13b", Layout(5), "llama-2-13b: FFN size 13824 cannot be divided over 5 ranks"),
    ],
)
def test_impossible_layouts(name: str, layout: Layout, message: str) -> None:
    with pytest.raises(ValueError) as error:
        function_vector(MODELS[name], BatchShape(1, 8), layout)
    assert str(error.value) == message


def test_layouts_that_the_shape_alone_forbids() -> None:
    odd_kv = ModelConfig("odd", "llama", 2, 96, 12, 6, 8, 96, True, 96, 64)
    with pytest.raises(ValueError, match="odd: 6 key-value heads cannot be shared by 4 ranks"):
        Layout(4).check(odd_kv)
    odd_vocab = ModelConfig("odd", "llama", 2, 64, 8, 8, 8, 64, True, 97, 64)
    with pytest.raises(ValueError, match="odd: vocabulary 97 cannot be divided over 2"):
        Layout(2).check(odd_vocab)


@pytest.mark.parametrize("degrees", [(0, 1), (1, 0), (-2, 1)])
def test_degrees_are_positive(degrees: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="is not possible; 1 or more each"):
        Layout(*degrees)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_weights_of_the_fullest_rank(name: str) -> None:
    config, half = MODELS[name], 2
    assert weight_bytes(config, Layout()) == half * config.num_parameters
    assert weight_bytes(config, Layout(4)) == half * config.num_parameters // 4  # every model has 4 key-value heads
    embedding = config.vocab_size * config.hidden_size
    per_layer = (config.num_parameters - embedding) // config.num_layers
    stages = [len(Layout(1, 3).layers_of(stage, config.num_layers)) * per_layer for stage in range(3)]
    fullest = max(stages[0] + embedding, stages[1], stages[2] + embedding)
    assert weight_bytes(config, Layout(1, 3)) == half * fullest


def test_key_value_heads_fewer_than_ranks_are_held_by_several() -> None:
    config = MODELS["tiny-llama"]
    alone, shared = weight_bytes(config, Layout(4)), weight_bytes(config, Layout(8))
    own_kv_head = config.num_layers * 2 * config.hidden_size * config.head_dim * 2
    assert 2 * shared - alone == own_kv_head
