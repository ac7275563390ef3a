"""The bound kernels: one model whatever the layout, whole or in fragments, and nothing read that was not written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from executor.inputs import Loader, load_own_tokens
from executor.kernels import Collective, Gemm, bind
from executor.slots import Slot
from executor.two_batches import only, serially
from executor.weights import make_weights
from models.config import MODELS, ModelConfig
from models.kernel import Fragment, Kernel, Kind, SplitAxis
from models.transformer import BatchShape, Layout, function_vector

TINY = [MODELS["tiny-opt"], MODELS["tiny-glm"], MODELS["tiny-llama"]]
IDS = ["opt", "glm", "llama"]
LAYOUTS = [Layout(2, 1), Layout(4, 1), Layout(8, 1), Layout(1, 2), Layout(2, 2), Layout(4, 3)]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"tp{layout.tp}pp{layout.pp}")
@pytest.mark.parametrize("config", TINY, ids=IDS)
def test_every_layout_computes_the_same_logits(
    config: ModelConfig, layout: Layout, make_ranks: Any, make_batch: Any
) -> None:
    # tp 8 also replicates tiny-llama's four key-value heads.
    batch = make_batch(config)
    whole = make_ranks(config, Layout()).run(batch)
    assert whole.std() > 0.01
    assert relative(make_ranks(config, layout).run(batch), whole) < 1e-5


def test_heads_and_vocabulary_that_are_no_power_of_two_shard_too(make_ranks: Any, make_batch: Any) -> None:
    config = ModelConfig("odd", "opt", 2, 96, 6, 6, 16, 90, False, 111, 32)
    batch = make_batch(config)
    whole = make_ranks(config, Layout()).run(batch)
    assert relative(make_ranks(config, Layout(3, 2)).run(batch), whole) < 1e-5


def parts_of(kernel: Kernel, axis: SplitAxis, count: int) -> list[Fragment | None]:
    """As many parts as asked for and possible; an all-reduce is cut into chunks instead."""
    axis = axis if axis in kernel.split_axes else "chunks"
    count = min(count, kernel.max_parts(axis))
    return [Fragment(axis, i, i + 1, count) for i in range(count)] if count > 1 else [None]


@pytest.fixture(scope="module")
def short_ranks(make_ranks: Any) -> dict[tuple[str, Layout], Any]:
    """One-layer models on the layouts that the fragments are tried on (two layers where there are two stages)."""
    layouts = [Layout(), Layout(2, 1), Layout(2, 2)]
    return {(c.family, at): make_ranks(replace(c, num_layers=at.pp), at) for c in TINY for at in layouts}


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    which=st.integers(0, 8),
    axis=st.sampled_from(["rows", "cols"]),
    count=st.integers(2, 60),
    order=st.randoms(use_true_random=False),
)
def test_fragments_in_any_order_make_the_whole(
    short_ranks: Any, make_batch: Any, which: int, axis: SplitAxis, count: int, order: Any
) -> None:
    ranks = list(short_ranks.values())[which]
    batch = make_batch(ranks.config, lengths=(5, 2, 9), seed=count)
    whole = ranks.run(batch)

    def shuffled(kernel: Kernel) -> list[Fragment | None]:
        parts = parts_of(kernel, axis, count)
        order.shuffle(parts)
        return parts

    serial = ranks.run(batch, lambda kernel: parts_of(kernel, axis, count))
    assert relative(serial, whole) < 1e-5
    assert torch.equal(ranks.run(batch, shuffled), serial)


def test_uneven_fragments_tile_a_gemm(make_ranks: Any, make_batch: Any) -> None:
    """A fragment may cover several of its equal parts, as when a plan takes two sevenths and then the rest."""
    config = MODELS["tiny-opt"]
    batch = make_batch(config)
    ranks = make_ranks(config, Layout(2, 1))
    for axis in ("rows", "cols"):

        def cut(kernel: Kernel, axis: Any = axis) -> list[Fragment | None]:
            if axis in kernel.split_axes and kernel.max_parts(axis) >= 7:
                return [Fragment(axis, 2, 7, 7), Fragment(axis, 0, 2, 7)]
            return [None]

        assert relative(ranks.run(batch, cut), ranks.run(batch)) < 1e-5


@pytest.mark.parametrize("config", TINY, ids=IDS)
def test_a_missing_fragment_shows(config: ModelConfig, make_ranks: Any, make_batch: Any) -> None:
    """The poison works: with one part of fc1 left out, the NaN that it should have replaced reaches the logits."""
    batch = make_batch(config)
    logits = make_ranks(config, Layout(2, 1)).run(
        batch, lambda kernel: [Fragment("cols", 0, 3, 4)] if kernel.name == "fc1" else [None]
    )
    assert logits.isnan().any()


@pytest.mark.parametrize("config", TINY, ids=IDS)
def test_padding_and_what_a_slot_held_before_do_not_matter(
    config: ModelConfig, make_ranks: Any, make_batch: Any
) -> None:
    ranks = make_ranks(config, Layout(2, 2), largest=BatchShape(8, 32))
    batch = make_batch(config)
    first = ranks.run(batch)
    assert not first.isnan().any()
    ranks.run(make_batch(config, lengths=(32,) * 8, seed=5))
    assert torch.equal(ranks.run(batch), first)
    other = batch.ids.clone()
    for row, length in enumerate(batch.lengths):
        other[row, length:] = 1
    assert torch.equal(ranks.run(replace(batch, ids=other)), first)
    alone = replace(batch, ids=batch.ids[1:2], lengths=batch.lengths[1:2])
    assert relative(ranks.run(alone), first[1:2]) < 1e-5


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("config", TINY, ids=IDS)
def test_computation_without_collectives_has_no_rows_of_zeros(config: ModelConfig, rank: int) -> None:
    """A GPU is faster with zeros than with numbers, and rows of other ranks' tokens would be zeros."""
    layout, shape = Layout(2, 1), BatchShape(4, 8)
    weights = make_weights(config, layout, rank, "cpu", torch.float32, seed=0)
    slot = Slot.allocate(config, layout, 0, shape, "cpu", torch.float32)
    slot.poison()
    load_own_tokens([slot], weights)
    for operation in bind(config, layout, 0, weights, slot, shape)[: len(function_vector(config, shape, layout).layer)]:
        if not isinstance(operation, Collective):
            operation(None)
    assert slot.whole.residual.abs().sum(dim=1).min() > 0.0


@pytest.mark.parametrize("build", [serially, partial(only, comm=False)])
def test_forward_passes_in_a_row_start_from_the_same_input(
    build: Callable[[Any, BatchShape], Callable[[], None]],
) -> None:
    """Without an embedding a pass would start from what the last one left, and its rows become alike."""
    config, shape = replace(MODELS["tiny-glm"], vocab_size=0), BatchShape(2, 8)
    weights = make_weights(config, Layout(), 0, "cpu", torch.float32, seed=0)
    slots = [Slot.allocate(config, Layout(), 0, shape, "cpu", torch.float32) for _ in range(2)]
    loader = Loader(config, torch.device("cpu"), torch.float32, shape)
    parts = SimpleNamespace(groups=None, slots=slots, loader=loader)
    bound = [bind(config, Layout(), 0, weights, slot, shape) for slot in slots]
    device = SimpleNamespace(parts=parts, bound=lambda slot, shape: bound[slot])
    body = build(device, shape)
    body()
    first = slots[0].whole.hidden.clone()
    body()
    assert first.std() > 0.01 and torch.equal(slots[0].whole.hidden, first)


@pytest.mark.parametrize("layout", [Layout(), *LAYOUTS], ids=lambda layout: f"tp{layout.tp}pp{layout.pp}")
@pytest.mark.parametrize("config", TINY, ids=IDS)
def test_operations_have_the_sizes_that_the_model_predicts(config: ModelConfig, layout: Layout) -> None:
    shape = BatchShape(3, 8)
    for stage in range(layout.pp):
        rank = stage * layout.tp + layout.tp - 1
        weights = make_weights(config, layout, rank, "cpu", torch.float32, seed=0)
        slot = Slot.allocate(config, layout, stage, shape, "cpu", torch.float32)
        vector = function_vector(config, shape, layout, stage)
        operations = bind(config, layout, stage, weights, slot, shape)
        for kernel, operation in zip(vector.kernels, operations, strict=True):
            assert isinstance(operation, Collective) == kernel.is_communication
            assert isinstance(operation, Gemm) == (kernel.kind is Kind.GEMM)
            if isinstance(operation, Gemm):
                assert operation.shape == (kernel.rows, kernel.cols, kernel.inner)
            if isinstance(operation, Collective):
                moved = operation.chunk() if operation.out is None else operation.out
                assert moved.numel() == kernel.message_bytes // kernel.element_bytes
                assert moved.is_contiguous() and operation.chunk().is_contiguous()


@pytest.mark.parametrize("config", TINY, ids=IDS)
def test_shards_hold_the_full_tensors_once(config: ModelConfig) -> None:
    full = make_weights(config, Layout(), 0, "cpu", torch.float32, seed=3)
    shards = [make_weights(config, Layout(4, 1), rank, "cpu", torch.float32, seed=3) for rank in range(4)]
    assert full.embedding is not None and shards[0].embedding is not None
    assert torch.equal(torch.cat([w.embedding for w in shards if w.embedding is not None]), full.embedding)
    for index, layer in enumerate(full.layers):
        mine = [w.layers[index] for w in shards]
        assert torch.equal(torch.cat([m.fc2.weight for m in mine], dim=1), layer.fc2.weight)
        assert torch.equal(torch.cat([m.out_proj.weight for m in mine], dim=1), layer.out_proj.weight)
        for part, rows in ((0, config.num_heads), (1, config.num_kv_heads), (2, config.num_kv_heads)):
            counts = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
            whole = torch.split(layer.qkv.weight, [n * config.head_dim for n in counts])[part]
            cut = [torch.split(m.qkv.weight, [n // 4 * config.head_dim for n in counts])[part] for m in mine]
            assert torch.equal(torch.cat(cut), whole) and len(whole) == rows * config.head_dim
        assert all(m.out_proj.bias is None and m.fc2.bias is None for m in mine[1:])
    assert not torch.equal(full.layers[0].fc1.weight, full.layers[1].fc1.weight)
    other = make_weights(config, Layout(), 0, "cpu", torch.float32, seed=4)
    assert not torch.equal(other.layers[0].fc1.weight, full.layers[0].fc1.weight)


@pytest.mark.parametrize("config", TINY, ids=IDS)
def test_a_hundred_layers_stay_in_range_in_half_precision(
    config: ModelConfig, make_ranks: Any, make_batch: Any
) -> None:
    deep = replace(config, num_layers=100)
    weights = [make_weights(deep, Layout(), 0, "cpu", torch.float16, seed=1)]
    ranks = make_ranks(deep, Layout(), weights)
    batch = make_batch(deep)
    logits = ranks.run(batch)
    residual = ranks.slots[0].view(batch.shape).residual.float()
    assert logits.isfinite().all() and logits.std() > 0.01
    assert 0.1 < residual.square().mean().sqrt() < 10


def test_a_model_without_embedding_starts_from_what_the_slot_holds() -> None:
    config = replace(MODELS["tiny-glm"], vocab_size=0)
    shape, layout = BatchShape(2, 4), Layout()
    weights = make_weights(config, layout, 0, "cpu", torch.float32, seed=0)
    slot = Slot.allocate(config, layout, 0, shape, "cpu", torch.float32)
    slot.poison()
    slot.view(shape).hidden.copy_(torch.randn(8, 128, generator=torch.Generator().manual_seed(0)))
    for operation in bind(config, layout, 0, weights, slot, shape):
        assert not isinstance(operation, Collective)
        operation()
    assert slot.view(shape).hidden.isfinite().all()
    with pytest.raises(ValueError, match="has no head"):
        slot.result(shape)


def test_what_cannot_be_bound_or_split_is_refused() -> None:
    config, layout, shape = MODELS["tiny-opt"], Layout(2, 2), BatchShape(2, 8)
    weights = make_weights(config, layout, 0, "cpu", torch.float32, seed=0)
    slot = Slot.allocate(config, layout, 0, shape, "cpu", torch.float32)
    with pytest.raises(ValueError, match="KV cache"):
        bind(config, layout, 0, weights, slot, BatchShape(2, 1, "decode", 8))
    with pytest.raises(ValueError, match="asked for tiny-opt, stage 1"):
        bind(config, layout, 1, weights, slot, shape)
    with pytest.raises(ValueError, match="3 sequences x 8 tokens does not fit a slot made for 2 x 8"):
        bind(config, layout, 0, weights, slot, BatchShape(3, 8))
    with pytest.raises(ValueError, match="rank is 4; tp 2 x pp 2 has ranks 0 to 3"):
        make_weights(config, layout, 4, "cpu", torch.float32, seed=0)
    operations = dict(zip(
        (k.name for k in function_vector(config, shape, layout, 0).kernels),
        bind(config, layout, 0, weights, slot, shape), strict=False,
    ))  # fmt: skip
    with pytest.raises(ValueError, match="attention may be split along nothing, not rows"):
        operations["attention"](Fragment("rows", 0, 1, 2))  # type: ignore[operator]
    with pytest.raises(ValueError, match="fc1 may be split along rows or cols, not chunks"):
        operations["fc1"](Fragment("chunks", 0, 1, 2))  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"fc1: rows of .* cannot be cut into 50"):
        operations["fc1"](Fragment("rows", 0, 1, 50))  # type: ignore[operator]
    with pytest.raises(ValueError, match="send may not be split"):
        operations["send_hidden"].chunk(Fragment("chunks", 0, 1, 2))  # type: ignore[union-attr]


def test_a_batch_that_is_not_the_shape_is_refused() -> None:
    config, shape = MODELS["tiny-opt"], BatchShape(2, 4)
    slot = Slot.allocate(config, Layout(), 0, shape, "cpu", torch.float32)
    ids, lengths = torch.zeros(2, 4, dtype=torch.int64), torch.tensor([4, 1])
    slot.load(shape, slot.pack(shape, ids, lengths))
    assert slot.view(shape).last_rows.tolist() == [3, 4]
    with pytest.raises(ValueError, match=r"token ids are \[2, 3\]"):
        slot.pack(shape, ids[:, :3], lengths)
    with pytest.raises(ValueError, match="token id 512 is out of range; it must be 0 to 511"):
        slot.pack(shape, ids + 512, lengths)
    with pytest.raises(ValueError, match="length 5 is out of range; it must be 1 to 4"):
        slot.pack(shape, ids, lengths + 1)
    with pytest.raises(ValueError, match="padded length is 300; tiny-opt has 256 positions"):
        Slot.allocate(config, Layout(), 0, BatchShape(1, 300), "cpu", torch.float32).view(BatchShape(1, 300))
