"""From (model, batch shape, layout, stage) to a function vector: Megatron-style sharding, vLLM's communication."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from models.config import ModelConfig
from models.kernel import (
    ATTENTION_ROWS_PER_CTA,
    FunctionVector,
    Kernel,
    Kind,
    collective,
    elementwise,
    gemm,
)

Phase = Literal["prefill", "decode"]


@dataclass(frozen=True, slots=True)
class BatchShape:
    """What a batch looks like to the kernels: sequences, each padded to the same number of new tokens.

    `context_len` is how many tokens are already in the KV cache (0 for a discriminative forward or a whole prefill).
    """

    num_sequences: int
    padded_len: int
    phase: Phase = "prefill"
    context_len: int = 0

    @property
    def rows(self) -> int:
        """Tokens in the step: the m of every GEMM."""
        return self.num_sequences * self.padded_len


@dataclass(frozen=True, slots=True)
class Layout:
    """Tensor parallelism over `tp` ranks within each of `pp` pipeline stages; tensor-parallel ranks are adjacent."""

    tp: int = 1
    pp: int = 1

    def __post_init__(self) -> None:
        if self.tp < 1 or self.pp < 1:
            raise ValueError(f"a layout of {self.tp} tensor x {self.pp} pipeline ranks is not possible; 1 or more each")

    @property
    def num_ranks(self) -> int:
        """GPUs that one replica of the model occupies."""
        return self.tp * self.pp

    def stage_of(self, rank: int) -> int:
        """The pipeline stage of a rank."""
        return rank // self.tp

    def layers_of(self, stage: int, num_layers: int) -> range:
        """The layers of a stage; earlier stages take the remainder."""
        base, extra = divmod(num_layers, self.pp)
        start = stage * base + min(stage, extra)
        return range(start, start + base + (stage < extra))

    def check(self, config: ModelConfig) -> None:
        """Raises ValueError if the model cannot be laid out so."""
        for what, value in (("heads", config.num_heads), ("FFN size", config.ffn_size)):
            if value % self.tp:
                raise ValueError(f"{config.model_id}: {what} {value} cannot be divided over {self.tp} ranks")
        if config.num_kv_heads % self.tp and self.tp % config.num_kv_heads:
            raise ValueError(
                f"{config.model_id}: {config.num_kv_heads} key-value heads cannot be shared by {self.tp} ranks"
            )
        if config.vocab_size % self.tp:
            raise ValueError(f"{config.model_id}: vocabulary {config.vocab_size} cannot be divided over {self.tp}")
        if self.pp > config.num_layers:
            raise ValueError(f"{config.model_id}: {config.num_layers} layers cannot fill {self.pp} stages")


# What the families' norms and activations are called; each is a program of its own.
NORMS = {"opt": "layer norm", "glm": "deep norm", "llama": "rms norm"}
ACTIVATIONS = {
    ("opt", False): "relu", ("opt", True): "reglu", ("glm", False): "gelu", ("glm", True): "geglu",
    ("llama", False): "silu", ("llama", True): "swiglu",
}  # fmt: skip
ELEMENT_BYTES = 2


def weight_bytes(config: ModelConfig, layout: Layout) -> int:
    """Half-precision weights of the rank that holds most, biases and norms left out; a tied head lies with the
    embedding, so that pipelines hold the matrix on their first and on their last stage."""
    heads, kv_heads = config.num_heads // layout.tp, max(1, config.num_kv_heads // layout.tp)
    attention = config.hidden_size * config.head_dim * (2 * heads + 2 * kv_heads)
    ffn = (3 if config.gated else 2) * config.hidden_size * (config.ffn_size // layout.tp)
    embedding = config.hidden_size * config.vocab_size // layout.tp
    per_stage = [
        len(layout.layers_of(stage, config.num_layers)) * (attention + ffn)
        + (embedding if stage in (0, layout.pp - 1) else 0)
        for stage in range(layout.pp)
    ]
    return max(per_stage) * ELEMENT_BYTES


def layer_kernels(config: ModelConfig, shape: BatchShape, tp: int) -> tuple[Kernel, ...]:
    """One layer on one rank: attention, all-reduce, FFN, all-reduce (no collective when tp is 1).

    Every half starts with the fused residual-add and norm, so the two tensors (branch output and residual) are what
    crosses a layer or a pipeline boundary, as in vLLM's intermediate tensors (paper-facts D2).
    """
    rows, hidden, b = shape.rows, config.hidden_size, ELEMENT_BYTES
    heads, kv_heads = config.num_heads // tp, max(1, config.num_kv_heads // tp)
    width, kv_width = heads * config.head_dim, kv_heads * config.head_dim
    ffn = config.ffn_size // tp
    norm_bytes, norm = 4 * rows * hidden * b, NORMS[config.family]
    kernels = [
        elementwise("attn_norm", norm_bytes, variant=norm),
        gemm("qkv_proj", rows, width + 2 * kv_width, hidden),
    ]
    if config.family != "opt":
        kernels.append(elementwise("rotary", 2 * rows * (width + kv_width) * b))
    kernels += [_attention(shape, heads, kv_heads, config.head_dim), gemm("out_proj", rows, hidden, width)]
    kernels += _all_reduce("attn_all_reduce", rows * hidden * b, tp)
    fc1 = 2 * ffn if config.gated else ffn
    kernels += [
        elementwise("ffn_norm", norm_bytes, variant=norm),
        gemm("fc1", rows, fc1, hidden),
        elementwise("activation", rows * (fc1 + ffn) * b, variant=ACTIVATIONS[config.family, config.gated]),
        gemm("fc2", rows, hidden, ffn),
    ]
    kernels += _all_reduce("ffn_all_reduce", rows * hidden * b, tp)
    return tuple(kernels)


def _attention(shape: BatchShape, heads: int, kv_heads: int, head_dim: int) -> Kernel:
    """IO-aware attention (FlashAttention, section 3): the score matrix never leaves the SM."""
    q, total, b = shape.padded_len, shape.context_len + shape.padded_len, ELEMENT_BYTES
    # Causal: query i sees context + i + 1 keys.
    pairs = shape.num_sequences * (q * shape.context_len + q * (q + 1) // 2)
    moved = shape.num_sequences * head_dim * b * (2 * q * heads + 2 * total * kv_heads)
    ctas = shape.num_sequences * heads * -(-q // ATTENTION_ROWS_PER_CTA)
    return Kernel("attention", Kind.ATTENTION, 4.0 * pairs * heads * head_dim, float(moved), rows=shape.rows,
                  num_ctas=ctas)  # fmt: skip


def _all_reduce(name: str, message_bytes: int, tp: int) -> list[Kernel]:
    return [collective(name, Kind.ALL_REDUCE, message_bytes, tp)] if tp > 1 else []


@lru_cache(maxsize=65536)
def function_vector(config: ModelConfig, shape: BatchShape, layout: Layout, stage: int = 0) -> FunctionVector:
    """The kernels of one batch on every rank of one stage, in launch order.

    The first stage looks up the embedding (vocabulary-parallel: one more all-reduce), the last applies the head to the
    last token of every sequence and gathers the logits. A stage boundary moves two tensors (branch output, residual);
    under tensor parallelism each rank sends its 1/tp slice and the receiver gathers (paper-facts D2).
    """
    layout.check(config)
    layers = layout.layers_of(stage, config.num_layers)
    prologue = _embedding(config, shape, layout) if stage == 0 else _receive(config, shape, layout)
    epilogue = _head(config, shape, layout) if stage == layout.pp - 1 else _send(config, shape, layout)
    return FunctionVector(tuple(prologue), layer_kernels(config, shape, layout.tp), len(layers), tuple(epilogue))


@dataclass(frozen=True, slots=True)
class Vectors:
    """Function vectors of a model by batch shape, one per stage; the same objects for the same shape."""

    config: ModelConfig
    layout: Layout

    def __call__(self, shape: BatchShape) -> tuple[FunctionVector, ...]:
        """What the ranks of every stage run."""
        return tuple(function_vector(self.config, shape, self.layout, stage) for stage in range(self.layout.pp))


def _embedding(config: ModelConfig, shape: BatchShape, layout: Layout) -> list[Kernel]:
    if not config.vocab_size:
        return []
    size = shape.rows * config.hidden_size * ELEMENT_BYTES
    # OPT looks its positions up as well.
    embedding = elementwise("embedding", 2 * size, variant="positions" if config.family == "opt" else "")
    return [embedding, *_all_reduce("embedding_all_reduce", size, layout.tp)]


def _head(config: ModelConfig, shape: BatchShape, layout: Layout) -> list[Kernel]:
    if not config.vocab_size:
        return []
    n, b = shape.num_sequences, ELEMENT_BYTES
    kernels = [
        elementwise("final_norm", 4 * n * config.hidden_size * b, variant=NORMS[config.family]),
        gemm("lm_head", n, config.vocab_size // layout.tp, config.hidden_size),
    ]
    if layout.tp > 1:
        kernels.append(collective("logits_gather", Kind.ALL_GATHER, n * config.vocab_size * b, layout.tp))
    return kernels


_BOUNDARY = ("hidden", "residual")


def _send(config: ModelConfig, shape: BatchShape, layout: Layout) -> list[Kernel]:
    size = shape.rows * config.hidden_size * ELEMENT_BYTES // layout.tp
    return [collective(f"send_{name}", Kind.SEND, size, 2) for name in _BOUNDARY]


def _receive(config: ModelConfig, shape: BatchShape, layout: Layout) -> list[Kernel]:
    size = shape.rows * config.hidden_size * ELEMENT_BYTES
    kernels = [collective(f"recv_{name}", Kind.RECV, size // layout.tp, 2) for name in _BOUNDARY]
    if layout.tp > 1:
        kernels += [collective(f"gather_{name}", Kind.ALL_GATHER, size, layout.tp) for name in _BOUNDARY]
    return kernels
