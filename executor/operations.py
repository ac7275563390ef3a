"""What a driver is handed to issue: compute kernels that it calls, and collectives whose calls it makes itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from executor.weights import Linear
from models.kernel import Fragment, Kind


class ComputeKernel(Protocol):
    """Runs one kernel, or one fragment of a GEMM, on the current stream."""

    def __call__(self, fragment: Fragment | None = None) -> None:
        """Writes into the slot; None runs the whole kernel."""


@dataclass(frozen=True, slots=True)
class Collective:
    """What one communication kernel moves; the driver makes the call.

    all_reduce: sums `buffer` in place over the group "tp". all_gather: every rank's `buffer`, in rank order, into `out`
    (flat; for a gather_ kernel `buffer` is this rank's part of `out`, which NCCL calls an in-place gather). send and
    recv: `buffer` to the "next" or from the "prev" stage's rank of the same tensor-parallel place. All are contiguous.
    """

    kind: Kind
    buffer: torch.Tensor
    group: Literal["tp", "prev", "next"]
    out: torch.Tensor | None = None

    def chunk(self, fragment: Fragment | None = None) -> torch.Tensor:
        """The flat part of `buffer` that a fragment covers; all of it for None."""
        flat = self.buffer.view(-1)
        if fragment is None:
            return flat
        if fragment.axis != "chunks" or self.kind is not Kind.ALL_REDUCE:
            raise ValueError(f"{self.kind.value} may not be split along {fragment.axis}")
        low, high = fragment.bounds(flat.numel())
        return flat[low:high]


class Gemm:
    """out = x @ weight.T + bias, whole or in fragments; the views of a fragment are made once and kept."""

    __slots__ = ("_bias", "_name", "_out", "_pieces", "_weight", "_x")

    def __init__(self, name: str, x: torch.Tensor, linear: Linear, out: torch.Tensor) -> None:
        self._name, self._x, self._out = name, x, out
        self._weight, self._bias = linear.weight, linear.bias
        self._pieces: dict[Fragment | None, tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]] = {
            None: (x, linear.weight.t(), linear.bias, out)
        }

    @property
    def shape(self) -> tuple[int, int, int]:
        """Rows, output features and input features: a GEMM's m, n, k."""
        return self._out.shape[0], self._out.shape[1], self._x.shape[1]

    def __call__(self, fragment: Fragment | None = None) -> None:
        """Rows computes rows [low, high) of the output, cols its features [low, high)."""
        piece = self._pieces.get(fragment)
        if piece is None:
            assert fragment is not None
            piece = self._pieces[fragment] = self._cut(fragment)
        x, weight, bias, out = piece
        if bias is None:
            torch.mm(x, weight, out=out)
        else:
            torch.addmm(bias, x, weight, out=out)

    def _cut(self, part: Fragment) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
        if part.axis == "chunks":
            raise ValueError(f"{self._name} may be split along rows or cols, not chunks")
        low, high = part.bounds(self._out.shape[0 if part.axis == "rows" else 1])
        if low == high:
            raise ValueError(f"{self._name}: {part.axis} of {list(self._out.shape)} cannot be cut into {part.of}")
        if part.axis == "rows":
            return self._x[low:high], self._weight.t(), self._bias, self._out[low:high]
        bias = None if self._bias is None else self._bias[low:high]
        return self._x, self._weight[low:high].t(), bias, self._out[:, low:high]


Operation = ComputeKernel | Collective
