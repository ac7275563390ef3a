"""The kernels of a function vector, bound by name to one rank's weights and one slot's buffers.

Everything writes into the slot. Three kernels also allocate, because torch offers no `out=` for them: the norms and
attention make their result and copy it. Under graph capture that memory comes from the graph's pool; on a stream it is
reused only on that stream, so neither can disturb a batch on another lane.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional

from executor.operations import Collective, ComputeKernel, Gemm, Operation
from executor.slots import Buffers, Slot
from executor.weights import LayerWeights, Linear, Norm, Weights
from models.config import ModelConfig
from models.kernel import Fragment, Kernel, Kind
from models.transformer import BatchShape, Layout, function_vector

__all__ = ["Collective", "ComputeKernel", "Gemm", "Operation", "bind"]


@dataclass(frozen=True, slots=True)
class _Binding:
    """What the builders of one (rank, slot, shape) share."""

    config: ModelConfig
    layout: Layout
    weights: Weights
    buffers: Buffers
    shape: BatchShape

    @property
    def alpha(self) -> float:
        """Weight of the residual in every sum: DeepNorm's sqrt(2 layers) for GLM, else 1."""
        return float((2 * self.config.num_layers) ** 0.5) if self.config.family == "glm" else 1.0


def bind(
    config: ModelConfig, layout: Layout, stage: int, weights: Weights, slot: Slot, shape: BatchShape
) -> list[Operation]:
    """One operation per kernel of `function_vector(config, shape, layout, stage)`, in its order.

    Raises ValueError for a shape that these kernels cannot run (a KV cache is needed) or the slot cannot hold.
    """
    if shape.phase != "prefill" or shape.context_len:
        raise ValueError(f"the executor runs whole forward passes; phase {shape.phase!r} with {shape.context_len} "
                         "tokens of context needs a KV cache")  # fmt: skip
    if weights.stage != stage or weights.layout != layout or weights.config != config:
        raise ValueError(f"the weights are of {weights.config.model_id}, rank {weights.rank} of {weights.layout}; "
                         f"asked for {config.model_id}, stage {stage} of {layout}")  # fmt: skip
    if layout.pp > 1 and shape.rows * config.hidden_size % layout.tp:
        raise ValueError(f"{shape.rows} rows x {config.hidden_size} cannot be cut evenly over {layout.tp} ranks")
    vector = function_vector(config, shape, layout, stage)
    binding = _Binding(config, layout, weights, slot.view(shape), shape)
    operations: list[Operation] = []
    for index, kernel in enumerate(vector.kernels):
        layer, _ = vector.locate(index)
        if kernel.is_communication:
            operations.append(_collective(binding, kernel))
        elif 0 <= layer < vector.num_layers:
            operations.append(_LAYER[kernel.name](binding, layer))
        else:
            operations.append(_ENDS[kernel.name](binding))
    return operations


def _whole(name: str, body: Callable[[], None]) -> ComputeKernel:
    """A kernel that may not be split."""

    def run(fragment: Fragment | None = None) -> None:
        if fragment is not None:
            raise ValueError(f"{name} may be split along nothing, not {fragment.axis}")
        body()

    return run


def _normalise(config: ModelConfig, norm: Norm, eps: float, x: torch.Tensor) -> torch.Tensor:
    size = [config.hidden_size]
    if config.family == "llama":
        return functional.rms_norm(x, size, norm.weight, eps)
    return functional.layer_norm(x, size, norm.weight, norm.bias, eps)


def _add_norm(b: _Binding, name: str, norm: Norm, is_first: bool) -> ComputeKernel:
    """residual = alpha * residual + hidden, then its norm: beside it (pre-norm), or in its place (GLM's post-norm).

    The model's very first norm has no residual yet, only what the embedding wrote.
    """
    hidden, residual, normed, alpha = b.buffers.hidden, b.buffers.residual, b.buffers.normed, b.alpha
    config, eps = b.config, b.weights.traits.norm_eps

    def body() -> None:
        if is_first:
            residual.copy_(hidden)
        else:
            torch.add(hidden, residual, alpha=alpha, out=residual)
        normed.copy_(_normalise(config, norm, eps, residual))

    return _whole(name, body)


def _attn_norm(b: _Binding, layer: int) -> ComputeKernel:
    is_first = layer == 0 and b.weights.stage == 0
    return _add_norm(b, "attn_norm", b.weights.layers[layer].attn_norm, is_first)


def _ffn_norm(b: _Binding, layer: int) -> ComputeKernel:
    return _add_norm(b, "ffn_norm", b.weights.layers[layer].ffn_norm, False)


def _rotary(b: _Binding, layer: int) -> ComputeKernel:
    """Rotates q and k into a buffer of their own, so that one multiply and two fused adds suffice; v stays in qkv."""
    assert b.weights.rotary is not None
    cos, sin = (table[: b.shape.padded_len, None] for table in b.weights.rotary)
    half = b.config.head_dim // 2
    turned = _heads(b, b.buffers.rotated)
    source = _heads(b, b.buffers.qkv)[:, :, : turned.shape[2]]
    low, high = turned[..., :half], turned[..., half:]
    source_low, source_high = source[..., :half], source[..., half:]
    minus_sin, plus_sin = sin[..., :half], sin[..., half:]

    def body() -> None:
        torch.mul(source, cos, out=turned)
        low.addcmul_(source_high, minus_sin)
        high.addcmul_(source_low, plus_sin)

    return _whole("rotary", body)


def _heads(b: _Binding, buffer: torch.Tensor) -> torch.Tensor:
    """A buffer of rows as [sequences, tokens, heads, head_dim]."""
    return buffer.view(b.shape.num_sequences, b.shape.padded_len, -1, b.config.head_dim)


def _attention(b: _Binding, layer: int) -> ComputeKernel:
    """Causal, so that a real token never sees the padding on its right; strides are those that flash kernels take."""
    num_heads, num_kv = b.config.num_heads // b.layout.tp, max(1, b.config.num_kv_heads // b.layout.tp)
    qkv = _heads(b, b.buffers.qkv)
    qk = _heads(b, b.buffers.rotated) if b.config.family != "opt" else qkv
    query = qk[:, :, :num_heads].transpose(1, 2)
    key = qk[:, :, num_heads : num_heads + num_kv].transpose(1, 2)
    value = qkv[:, :, num_heads + num_kv :].transpose(1, 2)
    out = _heads(b, b.buffers.attn_out).transpose(1, 2)
    is_grouped = num_heads != num_kv

    def body() -> None:
        out.copy_(functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=is_grouped))

    return _whole("attention", body)


def _activation(b: _Binding, layer: int) -> ComputeKernel:
    """ReLU; or SiLU or (exact) GELU of the gate half, times the up half."""
    act, width = b.buffers.act, b.buffers.act.shape[1]
    gate, up = b.buffers.ffn[:, :width], b.buffers.ffn[:, width:]
    # Operators, because the public functions of two of them take no out=; and relu's own out= would allocate.
    ops = torch.ops.aten
    curves: dict[str, Callable[[], object]] = {
        "opt": partial(ops.clamp_min.out, gate, 0, out=act),
        "llama": partial(ops.silu.out, gate, out=act),
        "glm": partial(ops.gelu.out, gate, out=act),
    }
    apply, is_gated = curves[b.config.family], b.config.gated

    def body() -> None:
        apply()
        if is_gated:
            act.mul_(up)

    return _whole("activation", body)


def _layer_gemm(
    name: str, source: Callable[[Buffers], torch.Tensor], linear: Callable[[LayerWeights], Linear],
    target: Callable[[Buffers], torch.Tensor],
) -> Callable[[_Binding, int], ComputeKernel]:  # fmt: skip
    def build(b: _Binding, layer: int) -> ComputeKernel:
        return Gemm(name, source(b.buffers), linear(b.weights.layers[layer]), target(b.buffers))

    return build


_LAYER: dict[str, Callable[[_Binding, int], ComputeKernel]] = {
    "attn_norm": _attn_norm,
    "qkv_proj": _layer_gemm("qkv_proj", lambda b: b.normed, lambda w: w.qkv, lambda b: b.qkv),
    "rotary": _rotary,
    "attention": _attention,
    "out_proj": _layer_gemm("out_proj", lambda b: b.attn_out, lambda w: w.out_proj, lambda b: b.hidden),
    "ffn_norm": _ffn_norm,
    "fc1": _layer_gemm("fc1", lambda b: b.normed, lambda w: w.fc1, lambda b: b.ffn),
    "activation": _activation,
    "fc2": _layer_gemm("fc2", lambda b: b.act, lambda w: w.fc2, lambda b: b.hidden),
}


def _embedding(b: _Binding) -> ComputeKernel:
    """Rows of this rank's vocabulary, zeros for the others' tokens; the first rank adds OPT's positions."""
    table, positions, buffers = b.weights.embedding, b.weights.positions, b.buffers
    assert table is not None
    ids, local, clamped, outside = buffers.token_ids, buffers.local_ids, buffers.clamped_ids, buffers.outside
    start, last, is_sharded = b.weights.tp_rank * len(table), len(table) - 1, b.layout.tp > 1
    hidden, absent = buffers.hidden, outside[:, None]
    by_sequence = hidden.view(b.shape.num_sequences, b.shape.padded_len, -1)
    offsets = None if positions is None else positions[: b.shape.padded_len]

    def body() -> None:
        if is_sharded:
            torch.sub(ids, start, out=local)
            torch.clamp(local, 0, last, out=clamped)
            torch.ne(local, clamped, out=outside)
            torch.index_select(table, 0, clamped, out=hidden)
            hidden.masked_fill_(absent, 0.0)
        else:
            torch.index_select(table, 0, ids, out=hidden)
        if offsets is not None:
            by_sequence.add_(offsets)

    return _whole("embedding", body)


def _final_norm(b: _Binding) -> ComputeKernel:
    """Only the last real token of each sequence goes on to the head."""
    norm, buffers, alpha = b.weights.final_norm, b.buffers, b.alpha
    assert norm is not None
    hidden, residual = buffers.head_hidden, buffers.head_residual
    config, eps = b.config, b.weights.traits.norm_eps

    def body() -> None:
        torch.index_select(buffers.hidden, 0, buffers.last_rows, out=hidden)
        torch.index_select(buffers.residual, 0, buffers.last_rows, out=residual)
        torch.add(hidden, residual, alpha=alpha, out=residual)
        hidden.copy_(_normalise(config, norm, eps, residual))

    return _whole("final_norm", body)


def _lm_head(b: _Binding) -> ComputeKernel:
    assert b.weights.lm_head is not None
    return Gemm("lm_head", b.buffers.head_hidden, Linear(b.weights.lm_head, None), b.buffers.logits)


_ENDS: dict[str, Callable[[_Binding], ComputeKernel]] = {
    "embedding": _embedding,
    "final_norm": _final_norm,
    "lm_head": _lm_head,
}


def _collective(b: _Binding, kernel: Kernel) -> Collective:
    """The tensor that a communication kernel moves, by its name."""
    if kernel.name == "logits_gather":
        return Collective(kernel.kind, b.buffers.logits.view(-1), "tp", b.buffers.gathered)
    if kernel.kind is Kind.ALL_REDUCE:
        return Collective(kernel.kind, b.buffers.hidden.view(-1), "tp")
    whole = (b.buffers.residual if kernel.name.endswith("residual") else b.buffers.hidden).view(-1)
    size = whole.numel() // b.layout.tp
    part = whole[b.weights.tp_rank * size : (b.weights.tp_rank + 1) * size]
    if kernel.kind is Kind.ALL_GATHER:
        return Collective(kernel.kind, part, "tp", whole)
    return Collective(kernel.kind, part, "next" if kernel.kind is Kind.SEND else "prev")
