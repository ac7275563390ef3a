"""Weights of one rank: only its shard, cut from the same logical full tensors whatever the layout.

Column-parallel (cut by output features): q, k, v, gate, up. Row-parallel (cut by input features): out, down. The bias
of a row-parallel matrix and OPT's positions belong to the first tensor-parallel rank alone, so that the all-reduce adds
them exactly once; the other ranks hold None. Key-value heads are replicated where ranks outnumber them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch

from executor.status import Steps
from models.config import ModelConfig
from models.transformer import Layout

# OPT's position table starts with two rows that no token uses (its padding id was 1).
OPT_POSITION_OFFSET = 2
EMBEDDING_STD = 0.02
NORM_NOISE = 0.02
MAX_BLOCKS = 16


@dataclass(frozen=True, slots=True)
class Traits:
    """What a checkpoint's numbers need and a shape does not say.

    `biased` names the matrices that have a bias. `tied`: the head is the embedding table.
    """

    norm_eps: float
    rope_theta: float
    biased: frozenset[str]
    tied: bool = True


MATRICES = ("q", "k", "v", "out", "gate", "up", "down")


def default_traits(config: ModelConfig) -> Traits:
    """The family's usual constants: OPT and GLM have biases everywhere, Llama nowhere; the head is tied."""
    biased: frozenset[str] = frozenset() if config.family == "llama" else frozenset(MATRICES)
    return Traits(norm_eps=1e-5, rope_theta=10000.0, biased=biased)


@dataclass(frozen=True, slots=True)
class Wanted:
    """Indices [low, high) along `axis` of a logical full tensor of `shape`; `layer` is None outside the layers.

    `name` is a matrix (q, k, v, out, gate, up, down), a norm (attn_norm, ffn_norm, final_norm) or embedding, positions,
    lm_head; `is_bias` asks for its bias instead. `units`: how many indivisible pieces (heads, say) the axis has.
    """

    name: str
    shape: tuple[int, ...]
    low: int
    high: int
    axis: int = 0
    layer: int | None = None
    is_bias: bool = False
    units: int = 1


Source = Callable[[Wanted], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Norm:
    """Scale and (LayerNorm only) shift of a norm over the hidden size."""

    weight: torch.Tensor
    bias: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Linear:
    """y = x @ weight.T + bias, with weight [output features, input features] of this rank."""

    weight: torch.Tensor
    bias: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer on one rank; `qkv` stacks the rank's q, k, v heads and `fc1` its gate and up halves."""

    attn_norm: Norm
    qkv: Linear
    out_proj: Linear
    ffn_norm: Norm
    fc1: Linear
    fc2: Linear


@dataclass(frozen=True, slots=True)
class Weights:
    """Everything that one rank multiplies by: its stage's layers, and the ends of the model where it holds them.

    `rotary` is (cos, sin), each [positions, head_dim]; the first half of sin is negated, ready for the rotation.
    """

    config: ModelConfig
    layout: Layout
    rank: int
    traits: Traits
    layers: tuple[LayerWeights, ...]
    embedding: torch.Tensor | None
    positions: torch.Tensor | None
    final_norm: Norm | None
    lm_head: torch.Tensor | None
    rotary: tuple[torch.Tensor, torch.Tensor] | None

    @property
    def tp_rank(self) -> int:
        """Place among the tensor-parallel ranks of the stage."""
        return self.rank % self.layout.tp

    @property
    def stage(self) -> int:
        """The pipeline stage of this rank."""
        return self.layout.stage_of(self.rank)


def make_weights(
    config: ModelConfig, layout: Layout, rank: int, device: torch.device | str, dtype: torch.dtype, seed: int
) -> Weights:
    """Random weights of one rank, drawn on its device; one seed gives one model on every layout (per device type).

    Raises ValueError if the layout does not fit the model or has no such rank.
    """
    source = RandomSource(config, torch.device(device), dtype, seed)
    return assemble(config, layout, rank, source, default_traits(config))


def assemble(config: ModelConfig, layout: Layout, rank: int, source: Source, traits: Traits) -> Weights:
    """The weights of one rank, read piece by piece from `source`."""
    layout.check(config)
    if not 0 <= rank < layout.num_ranks:
        raise ValueError(f"rank is {rank}; tp {layout.tp} x pp {layout.pp} has ranks 0 to {layout.num_ranks - 1}")
    shard = _Shard(config, layout.tp, rank % layout.tp, source, traits)
    stage = layout.stage_of(rank)
    layers = tuple(shard.layer(index) for index in layout.layers_of(stage, config.num_layers))
    has_ends = config.vocab_size > 0
    first, last = has_ends and stage == 0, has_ends and stage == layout.pp - 1
    embedding = shard.vocabulary("embedding") if first or (last and traits.tied) else None
    return Weights(
        config=config,
        layout=layout,
        rank=rank,
        traits=traits,
        layers=layers,
        embedding=embedding,
        positions=shard.positions() if first and config.family == "opt" and shard.place == 0 else None,
        final_norm=shard.norm("final_norm", None) if last else None,
        lm_head=(embedding if traits.tied else shard.vocabulary("lm_head")) if last else None,
        rotary=_rotary(config, traits, layers[0].qkv.weight) if config.family != "opt" else None,
    )


@dataclass(frozen=True, slots=True)
class _Shard:
    """Which part of each logical tensor belongs to tensor-parallel rank `place` of `tp`."""

    config: ModelConfig
    tp: int
    place: int
    source: Source
    traits: Traits

    def layer(self, index: int) -> LayerWeights:
        config = self.config
        fc1 = ("gate", "up") if config.gated else ("up",)
        return LayerWeights(
            attn_norm=self.norm("attn_norm", index),
            qkv=_stack([self._columns(name, index) for name in ("q", "k", "v")]),
            out_proj=self._rows("out", index, config.num_heads * config.head_dim, config.num_heads),
            ffn_norm=self.norm("ffn_norm", index),
            fc1=_stack([self._columns(name, index) for name in fc1]),
            fc2=self._rows("down", index, config.ffn_size, config.ffn_size),
        )

    def norm(self, name: str, layer: int | None) -> Norm:
        hidden = self.config.hidden_size
        weight = self.source(Wanted(name, (hidden,), 0, hidden, layer=layer))
        is_rms = self.config.family == "llama"
        bias = None if is_rms else self.source(Wanted(name, (hidden,), 0, hidden, layer=layer, is_bias=True))
        return Norm(weight, bias)

    def vocabulary(self, name: str) -> torch.Tensor:
        rows, part = self.config.vocab_size, self.config.vocab_size // self.tp
        low = self.place * part
        return self.source(Wanted(name, (rows, self.config.hidden_size), low, low + part, units=rows))

    def positions(self) -> torch.Tensor:
        rows = self.config.max_positions + OPT_POSITION_OFFSET
        return self.source(Wanted("positions", (rows, self.config.hidden_size), OPT_POSITION_OFFSET, rows))

    def _columns(self, name: str, layer: int) -> Linear:
        """This rank's output features; a key-value head that several ranks share goes to each of them."""
        config = self.config
        kv = (config.num_kv_heads, config.head_dim)
        cuts = {"q": (config.num_heads, config.head_dim), "k": kv, "v": kv}
        units, size = cuts.get(name, (config.ffn_size, 1))
        low = self.place * units // self.tp * size
        high = low + max(1, units // self.tp) * size
        full = units * size
        weight = self.source(Wanted(name, (full, config.hidden_size), low, high, layer=layer, units=units))
        if name not in self.traits.biased:
            return Linear(weight, None)
        return Linear(weight, self.source(Wanted(name, (full,), low, high, layer=layer, is_bias=True)))

    def _rows(self, name: str, layer: int, inner: int, units: int) -> Linear:
        """This rank's input features; the first rank alone adds the bias, inside its GEMM."""
        hidden, part = self.config.hidden_size, inner // self.tp
        low = self.place * part
        weight = self.source(Wanted(name, (hidden, inner), low, low + part, axis=1, layer=layer, units=units))
        if name not in self.traits.biased or self.place > 0:
            return Linear(weight, None)
        return Linear(weight, self.source(Wanted(name, (hidden,), 0, hidden, layer=layer, is_bias=True)))


def _stack(parts: list[Linear]) -> Linear:
    """One matrix with the output features of all parts; a part without a bias gets zeros if another has one."""
    weight = torch.cat([part.weight for part in parts]) if len(parts) > 1 else parts[0].weight
    if all(part.bias is None for part in parts):
        return Linear(weight, None)
    rows = [part.weight.new_zeros(len(part.weight)) if part.bias is None else part.bias for part in parts]
    return Linear(weight, torch.cat(rows))


def _rotary(config: ModelConfig, traits: Traits, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Angles in float32 (half precision loses far positions), then cast; the pairs are (i, i + head_dim / 2)."""
    if config.head_dim % 2:
        raise ValueError(f"{config.model_id}: head_dim is {config.head_dim}; rotary positions need an even number")
    steps = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=like.device)
    frequencies = 1.0 / traits.rope_theta ** (steps / config.head_dim)
    angles = torch.outer(torch.arange(config.max_positions, dtype=torch.float32, device=like.device), frequencies)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=1).to(like.dtype), torch.cat([-sin, sin], dim=1).to(like.dtype)


@dataclass(frozen=True, slots=True)
class RandomSource:
    """Random logical tensors, drawn block by block so that a shard costs only its own blocks.

    Each block along the cut axis has its own seed, from (seed, layer, name, block). The number of blocks depends on the
    model alone, so that every layout sees the same tensor; a block that a shard cuts through is drawn whole and cut.
    """

    config: ModelConfig
    device: torch.device
    dtype: torch.dtype
    seed: int

    def __call__(self, wanted: Wanted) -> torch.Tensor:
        """The wanted part, on the device."""
        full, axis = wanted.shape[wanted.axis], wanted.axis
        step = full // _num_blocks(wanted.units)
        pieces = []
        for block in range(wanted.low // step, -(-wanted.high // step)):
            start = block * step
            piece = self._block(wanted, block, step)
            low, high = max(wanted.low - start, 0), min(wanted.high - start, step)
            pieces.append(piece.narrow(axis, low, high - low))
        return torch.cat(pieces, dim=axis) if len(pieces) > 1 else pieces[0].contiguous()

    def _block(self, wanted: Wanted, block: int, step: int) -> torch.Tensor:
        Steps.add()
        shape = list(wanted.shape)
        shape[wanted.axis] = step
        key = f"{self.seed}/{wanted.layer}/{wanted.name}/{wanted.is_bias}/{block}".encode()
        generator = torch.Generator(self.device)
        generator.manual_seed(int.from_bytes(hashlib.blake2b(key, digest_size=7).digest(), "big"))
        mean, std = _mean_std(self.config, wanted)
        return torch.empty(shape, device=self.device, dtype=self.dtype).normal_(mean, std, generator=generator)


def _num_blocks(units: int) -> int:
    """The divisor of `units`, MAX_BLOCKS at most, that most powers of two divide; then the largest such."""
    divisors = [d for d in range(1, MAX_BLOCKS + 1) if units % d == 0]
    return max(divisors, key=lambda d: (d & -d, d))


def _mean_std(config: ModelConfig, wanted: Wanted) -> tuple[float, float]:
    """Scales that keep activations near 1 in half precision, however deep the model.

    Branch outputs shrink with depth: by sqrt(2 layers) where residuals add up (GPT-2), by DeepNorm's
    (8 layers) ** 0.25 where every sum is normalised.
    """
    if wanted.is_bias or len(wanted.shape) == 1:
        return (0.0 if wanted.is_bias else 1.0), NORM_NOISE
    if wanted.name in ("embedding", "positions", "lm_head"):
        return 0.0, EMBEDDING_STD
    std = prod(wanted.shape[1:]) ** -0.5
    if wanted.name in ("out", "down"):
        std *= (8 * config.num_layers) ** -0.25 if config.family == "glm" else (2 * config.num_layers) ** -0.5
    return 0.0, std
