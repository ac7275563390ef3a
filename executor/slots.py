"""Slots: the static buffers of one batch in flight, allocated once for the largest shape and viewed for smaller ones.

Static, because captured graphs bake addresses in and because an allocation between two launches would stall the host.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import torch

from models.config import ModelConfig
from models.transformer import BatchShape, Layout


@dataclass(frozen=True, slots=True)
class Buffers:
    """Contiguous buffers for one shape: n sequences right-padded to l tokens, n * l rows.

    `hidden` is the output of the latest branch, `residual` the stream beside it; both cross a stage boundary.
    `normed` is what the next GEMM reads (for GLM's post-norm it is `residual` itself). `last_rows` are the rows of each
    sequence's last real token. `logits` is this rank's part of the vocabulary, [n, vocabulary / tp]; `gathered` is flat
    and holds every rank's, in rank order. Both, and the head_ buffers, are empty where there is no head.
    """

    token_ids: torch.Tensor
    local_ids: torch.Tensor
    clamped_ids: torch.Tensor
    outside: torch.Tensor
    last_rows: torch.Tensor
    hidden: torch.Tensor
    residual: torch.Tensor
    normed: torch.Tensor
    qkv: torch.Tensor
    rotated: torch.Tensor
    attn_out: torch.Tensor
    ffn: torch.Tensor
    act: torch.Tensor
    head_hidden: torch.Tensor
    head_residual: torch.Tensor
    logits: torch.Tensor
    gathered: torch.Tensor


# Buffers with a row per sequence; the others, but for the flat `gathered`, have a row per token.
_PER_SEQUENCE = frozenset({"last_rows", "head_hidden", "head_residual", "logits"})


@dataclass(frozen=True, slots=True)
class Slot:
    """The buffers of one batch in flight on one rank.

    Any shape with no more rows and no more sequences than `largest` fits. One batch at a time owns a slot: the driver
    must not load the next before the previous one's result has been read.
    """

    config: ModelConfig
    layout: Layout
    largest: BatchShape
    whole: Buffers
    _views: dict[BatchShape, Buffers] = field(default_factory=dict, repr=False)

    @classmethod
    def allocate(
        cls, config: ModelConfig, layout: Layout, stage: int, largest: BatchShape, device: torch.device | str,
        dtype: torch.dtype,
    ) -> Slot:  # fmt: skip
        """Uninitialised buffers for `largest` on one rank of `stage`; only the last stage has room for logits."""
        layout.check(config)
        sizes = _widths(config, layout)
        has_head = config.vocab_size > 0 and stage == layout.pp - 1

        def ints(rows: int) -> torch.Tensor:
            return torch.zeros(rows, dtype=torch.int64, device=device)

        def floats(rows: int, *names: str) -> dict[str, torch.Tensor]:
            return {name: torch.empty(rows, sizes[name], dtype=dtype, device=device) for name in names}

        tokens, n = largest.rows, largest.num_sequences
        num_heads = n if has_head else 0
        buffers = floats(tokens, "hidden", "residual", "qkv", "rotated", "attn_out", "ffn", "act")
        buffers |= floats(num_heads, "head_hidden", "head_residual", "logits")
        normed = buffers["residual"] if config.family == "glm" else torch.empty_like(buffers["hidden"])
        # Without tensor parallelism there is nothing to gather: the rank's logits are the logits.
        gathered = buffers["logits"].view(-1)
        if layout.tp > 1:
            gathered = torch.empty(num_heads * config.vocab_size, dtype=dtype, device=device)
        whole = Buffers(
            token_ids=ints(tokens), local_ids=ints(tokens), clamped_ids=ints(tokens),
            outside=torch.zeros(tokens, dtype=torch.bool, device=device), last_rows=ints(n),
            normed=normed, gathered=gathered, **buffers,
        )  # fmt: skip
        return cls(config, layout, largest, whole)

    def view(self, shape: BatchShape) -> Buffers:
        """The buffers cut to `shape`; the same shape always gives the same addresses.

        Raises ValueError if the shape does not fit this slot or the model's positions.
        """
        found = self._views.get(shape)
        if found is None:
            found = self._views[shape] = self._cut(shape)
        return found

    def _cut(self, shape: BatchShape) -> Buffers:
        if shape.rows > self.largest.rows or shape.num_sequences > self.largest.num_sequences:
            raise ValueError(
                f"a batch of {shape.num_sequences} sequences x {shape.padded_len} tokens does not fit a slot made for "
                f"{self.largest.num_sequences} x {self.largest.padded_len}"
            )
        if shape.padded_len > self.config.max_positions:
            raise ValueError(
                f"padded length is {shape.padded_len}; {self.config.model_id} has {self.config.max_positions} positions"
            )
        cut: dict[str, torch.Tensor] = {}
        for part in fields(Buffers):
            buffer: torch.Tensor = getattr(self.whole, part.name)
            rows = shape.num_sequences if part.name in _PER_SEQUENCE else shape.rows
            if part.name == "gathered":
                rows = shape.num_sequences * self.config.vocab_size
            cut[part.name] = buffer[:rows]
        return Buffers(**cut)

    def pack(self, shape: BatchShape, token_ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """A batch as one host tensor: token ids [n, l] (anything beyond a sequence's length is padding) from its first
        number on, then the last real row of every sequence, from its real length [n].

        Raises ValueError for a batch that is not `shape`, or for ids and lengths out of range.
        """
        n = shape.num_sequences
        if tuple(token_ids.shape) != (n, shape.padded_len) or tuple(lengths.shape) != (n,):
            raise ValueError(
                f"token ids are {list(token_ids.shape)} and lengths {list(lengths.shape)}; a batch of this shape has "
                f"{[n, shape.padded_len]} and {[n]}"
            )
        if self.config.vocab_size:
            _check_range("token id", token_ids, 0, self.config.vocab_size - 1)
        _check_range("length", lengths, 1, shape.padded_len)
        starts = torch.arange(n) * shape.padded_len
        return torch.cat((token_ids.reshape(-1), starts + lengths - 1))

    def load(self, shape: BatchShape, packed: torch.Tensor) -> None:
        """Copies a packed batch in. Every stage loads: the first needs the ids, the last the rows."""
        buffers = self.view(shape)
        buffers.token_ids.copy_(packed[: shape.rows], non_blocking=True)
        buffers.last_rows.copy_(packed[shape.rows :], non_blocking=True)

    def result(self, shape: BatchShape) -> torch.Tensor:
        """Logits of each sequence's last token, [n, vocabulary], on every rank of the last stage (after the gather)."""
        flat, tp, n = self.view(shape).gathered, self.layout.tp, shape.num_sequences
        if not flat.numel():
            raise ValueError(f"{self.config.model_id}: this stage has no head, so it has no logits")
        return flat.view(tp, n, -1).transpose(0, 1).reshape(n, -1)

    def poison(self) -> None:
        """NaN in every float buffer and 0 in the others, so that a kernel that reads what no kernel wrote shows."""
        for part in fields(Buffers):
            buffer: torch.Tensor = getattr(self.whole, part.name)
            buffer.fill_(float("nan") if buffer.is_floating_point() else 0)


def _widths(config: ModelConfig, layout: Layout) -> dict[str, int]:
    """Columns of each float buffer on one rank."""
    heads, kv_heads = config.num_heads // layout.tp, max(1, config.num_kv_heads // layout.tp)
    ffn, hidden = config.ffn_size // layout.tp, config.hidden_size
    return {
        "hidden": hidden, "residual": hidden, "head_hidden": hidden, "head_residual": hidden,
        "qkv": (heads + 2 * kv_heads) * config.head_dim,
        "rotated": (heads + kv_heads) * config.head_dim if config.family != "opt" else 0,
        "attn_out": heads * config.head_dim,
        "ffn": 2 * ffn if config.gated else ffn,
        "act": ffn,
        "logits": config.vocab_size // layout.tp,
    }  # fmt: skip


def _check_range(what: str, values: torch.Tensor, low: int, high: int) -> None:
    smallest, largest = int(values.min()), int(values.max())
    if smallest < low or largest > high:
        wrong = smallest if smallest < low else largest
        raise ValueError(f"{what} {wrong} is out of range; it must be {low} to {high}")
