"""Ranks played one after another in one process: every collective done by hand, so no process group is needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch

from executor.kernels import Collective, Operation, bind
from executor.slots import Slot
from executor.weights import Weights, make_weights
from models.config import ModelConfig
from models.kernel import Fragment, Kernel, Kind
from models.transformer import BatchShape, Layout, function_vector

Cut = Callable[[Kernel], Sequence[Fragment | None]]


def _uncut(kernel: Kernel) -> Sequence[Fragment | None]:
    return [None]


@dataclass(frozen=True)
class Batch:
    """Token ids, right-padded to a rectangle, and the real length of each sequence."""

    ids: torch.Tensor
    lengths: torch.Tensor

    @property
    def shape(self) -> BatchShape:
        return BatchShape(*self.ids.shape)


@dataclass
class Ranks:
    """All ranks of one layout, in lockstep."""

    config: ModelConfig
    layout: Layout
    weights: list[Weights]
    slots: list[Slot]

    def run(self, batch: Batch, cut: Cut = _uncut) -> torch.Tensor:
        """Logits of each sequence's last token; the slots are poisoned first, so only what is written counts."""
        for slot in self.slots:
            slot.poison()
        mail: dict[tuple[int, int], list[torch.Tensor]] = {}
        for stage in range(self.layout.pp):
            kernels = function_vector(self.config, batch.shape, self.layout, stage).kernels
            ranks = range(stage * self.layout.tp, (stage + 1) * self.layout.tp)
            for rank in ranks:
                slot = self.slots[rank]
                slot.load(batch.shape, slot.pack(batch.shape, batch.ids, batch.lengths))
            bound = [
                bind(self.config, self.layout, stage, self.weights[rank], self.slots[rank], batch.shape)
                for rank in ranks
            ]
            assert all(len(operations) == len(kernels) for operations in bound)
            for index, kernel in enumerate(kernels):
                _step(kernel, stage, [operations[index] for operations in bound], cut(kernel), mail)
        assert not any(mail.values()), "something was sent that nobody received"
        results = [slot.result(batch.shape) for slot in self.slots[-self.layout.tp :]]
        assert all(torch.equal(results[0].nan_to_num(), other.nan_to_num()) for other in results[1:])
        return results[0].clone()


def _step(
    kernel: Kernel,
    stage: int,
    operations: list[Operation],
    parts: Sequence[Fragment | None],
    mail: dict[tuple[int, int], list[torch.Tensor]],
) -> None:
    with torch.inference_mode():
        for part in parts:
            if not kernel.is_communication:
                for operation in operations:
                    assert not isinstance(operation, Collective)
                    operation(part)
                continue
            moves = [operation for operation in operations if isinstance(operation, Collective)]
            assert len(moves) == len(operations)
            _communicate(stage, moves, part, mail)


def _communicate(
    stage: int, moves: list[Collective], part: Fragment | None, mail: dict[tuple[int, int], list[torch.Tensor]]
) -> None:
    kind = moves[0].kind
    chunks = [move.chunk(part) for move in moves]
    if kind is Kind.ALL_REDUCE:
        total = torch.stack(chunks).sum(dim=0)
        for chunk in chunks:
            chunk.copy_(total)
    elif kind is Kind.ALL_GATHER:
        whole = torch.cat(chunks)
        for move in moves:
            assert move.out is not None
            move.out.copy_(whole)
    else:
        for place, (move, chunk) in enumerate(zip(moves, chunks, strict=True)):
            if kind is Kind.SEND:
                assert move.group == "next"
                mail.setdefault((stage, place), []).append(chunk.clone())
            else:
                assert move.group == "prev"
                chunk.copy_(mail[stage - 1, place].pop(0))


def _make_ranks(
    config: ModelConfig, layout: Layout, weights: list[Weights] | None = None, largest: BatchShape | None = None
) -> Ranks:
    weights = weights or [
        make_weights(config, layout, rank, "cpu", torch.float32, seed=7) for rank in range(layout.num_ranks)
    ]
    slots = [
        Slot.allocate(
            config, layout, w.stage, largest or BatchShape(4, 16), "cpu", w.layers[0].qkv.weight.dtype
        )
        for w in weights
    ]  # fmt: skip
    return Ranks(config, layout, weights, slots)


@pytest.fixture(scope="session")
def make_ranks() -> Callable[..., Ranks]:
    """Ranks of a layout with random weights (or given ones), and a slot for each."""
    return _make_ranks


@pytest.fixture(scope="session")
def make_batch() -> Callable[..., Batch]:
    """A ragged batch of random token ids: one sequence of each given length, padded with random ids too."""

    def make(config: ModelConfig, lengths: Sequence[int] = (3, 11, 1, 7), seed: int = 0) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(config.vocab_size, (len(lengths), max(lengths)), generator=generator)
        return Batch(ids, torch.tensor(lengths))

    return make
