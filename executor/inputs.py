"""What goes into a batch and what comes out: token ids by seed, logits, their hash."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from executor.slots import Slot
from executor.weights import Weights
from models.config import ModelConfig
from models.transformer import BatchShape
from policy.batch import Batch

NOISE_SEED = 7


def tokens_of(batch: Batch, config: ModelConfig, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [n, padded length] and real lengths [n] on the host; a request's ids depend on its id and the seed."""
    ids = torch.zeros(batch.shape.num_sequences, batch.shape.padded_len, dtype=torch.int64)
    if config.vocab_size:
        for row, request in enumerate(batch.requests):
            rng = np.random.default_rng((seed, request.request_id))
            drawn = rng.integers(0, config.vocab_size, request.num_prompt_tokens)
            ids[row, : request.num_prompt_tokens] = torch.from_numpy(drawn)
    lengths = torch.tensor([request.num_prompt_tokens for request in batch.requests], dtype=torch.int64)
    return ids, lengths


class Loader:
    """Puts batches into slots. A model without an embedding gets the same noise as hidden states every time."""

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype, largest: BatchShape) -> None:
        self.config, self.device = config, device
        self.noise: torch.Tensor | None = None
        if not config.vocab_size:
            generator = torch.Generator(device).manual_seed(NOISE_SEED)
            self.noise = torch.randn(largest.rows, config.hidden_size, generator=generator, device=device, dtype=dtype)

    def stage(self, slot: Slot, shape: BatchShape, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor | None:
        """A batch on the host as a device can fetch it without making the host wait; nothing for noise."""
        if self.noise is not None:
            return None
        packed = slot.pack(shape, ids, lengths)
        return packed.pin_memory() if self.device.type == "cuda" else packed

    def load(self, slot: Slot, shape: BatchShape, packed: torch.Tensor | None) -> None:
        """Runs on the lane of the batch's first kernel."""
        if packed is not None:
            slot.load(shape, packed)
        else:
            self.renew(slot, shape)

    def renew(self, slot: Slot, shape: BatchShape) -> None:
        """The noise again, which a forward pass leaves nothing of; nothing where an embedding does that.

        A pass over the last one's output makes rows more alike, and a GPU is faster with rows that are: of six layers
        of GLM-130B's block, 768 wide, their mean cosine is 0.23 in the second pass and 0.996 in the fortieth.
        """
        if self.noise is not None:
            slot.view(shape).hidden.copy_(self.noise[: shape.rows])


def load_own_tokens(slots: Sequence[Slot], weights: Weights) -> None:
    """Random tokens of this rank's own part of the vocabulary, in whole slots.

    An embedding has zeros for other ranks' tokens until it is summed. Where computation runs without collectives those
    rows would stay zeros, and a GPU computes with zeros at less power and a higher clock.
    """
    if weights.embedding is None:
        return
    own = len(weights.embedding)
    for number, slot in enumerate(slots):
        ids = slot.whole.token_ids
        generator = torch.Generator(ids.device).manual_seed(number)
        first = weights.tp_rank * own if slot.layout.tp > 1 else 0
        ids.copy_(torch.randint(first, first + own, ids.shape, generator=generator, device=ids.device))


@dataclass(slots=True)
class Outputs:
    """Logits of finished batches, copied to the host by the lane that made them, then hashed in batch order."""

    device: torch.device
    keep: bool = False
    num_wrong: int = 0
    hashes: dict[int, str] = field(default_factory=dict)
    kept: dict[int, torch.Tensor] = field(default_factory=dict)
    _pending: dict[int, torch.Tensor] = field(default_factory=dict)
    _free: dict[tuple[int, ...], list[torch.Tensor]] = field(default_factory=dict)

    def copy(self, batch_id: int, slot: Slot, shape: BatchShape) -> None:
        """Runs on the lane of the batch's last kernel."""
        has_head = slot.config.vocab_size > 0
        result = slot.result(shape) if has_head else slot.view(shape).hidden
        self._pending[batch_id] = self._buffer(result).copy_(result, non_blocking=True)

    def _buffer(self, like: torch.Tensor) -> torch.Tensor:
        """Host memory; pinned memory is dear, so it is used again."""
        if self.device.type == "cpu":
            return torch.empty_like(like)
        free = self._free.get(tuple(like.shape))
        return free.pop() if free else torch.empty(like.shape, dtype=like.dtype, pin_memory=True)

    def finish(self, batch_id: int) -> None:
        """The batch is through: hash what was copied, and count numbers that are not finite."""
        target = self._pending.pop(batch_id, None)
        if target is None:
            return
        self.num_wrong += int((~torch.isfinite(target)).sum())
        self.hashes[batch_id] = hashlib.sha256(target.view(torch.uint8).numpy().tobytes()).hexdigest()
        if self.keep:
            self.kept[batch_id] = target.float()
        else:
            self._give_back(target)

    def discard(self, batch_id: int) -> None:
        """The batch was not a real one: only its buffer is of use."""
        self._give_back(self._pending.pop(batch_id, None))

    def _give_back(self, target: torch.Tensor | None) -> None:
        if target is not None and self.device.type == "cuda":
            self._free.setdefault(tuple(target.shape), []).append(target)

    def checksum(self) -> str:
        """One hash over all batches, in batch order."""
        text = "".join(self.hashes[batch_id] for batch_id in sorted(self.hashes))
        return hashlib.sha256(text.encode()).hexdigest()
