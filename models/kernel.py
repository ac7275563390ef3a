"""Kernels and function vectors: the ordered launches of one batch on one rank, each with its cost and legal splits."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property, lru_cache
from typing import Literal

SplitAxis = Literal["rows", "cols", "chunks"]

# CTA tile of a dense half-precision GEMM (rows x output features); a common choice of cuBLAS on large shapes.
GEMM_TILE = (128, 128)
ELEMENTWISE_BYTES_PER_CTA = 32 * 1024
ATTENTION_ROWS_PER_CTA = 128


class Kind(StrEnum):
    """What a kernel does, which decides the resource it occupies."""

    GEMM = "gemm"
    ATTENTION = "attention"
    ELEMENTWISE = "elementwise"
    ALL_REDUCE = "all_reduce"
    ALL_GATHER = "all_gather"
    SEND = "send"
    RECV = "recv"


COMMUNICATION = frozenset({Kind.ALL_REDUCE, Kind.ALL_GATHER, Kind.SEND, Kind.RECV})


@dataclass(frozen=True, slots=True)
class Fragment:
    """The part [start, stop) of a kernel that was cut along `axis` into `of` equal parts."""

    axis: SplitAxis
    start: int
    stop: int
    of: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop <= self.of:
            raise ValueError(f"fragment [{self.start}, {self.stop}) of {self.of} is empty or out of range")

    def bounds(self, extent: int) -> tuple[int, int]:
        """The half-open index range of this part of an axis of length `extent`; the parts of one cut tile the axis."""
        return extent * self.start // self.of, extent * self.stop // self.of


@dataclass(frozen=True, slots=True)
class Kernel:
    """One launch on one rank.

    `rows`, `cols`, `inner` are a GEMM's m, n, k on this rank. `flops` counts a multiply-add as two;
    `bytes_moved` is HBM traffic with every operand touched once; `message_bytes` is a collective's payload
    per rank (nccl-tests convention) or the bytes that a send or receive carries. `num_ranks` is the size of the group.
    `is_piece`: computes some columns of a wider result, which do not lie together in memory; of a collective, a chunk
    behind the first. `variant`: which of the programs of that name it is, where models have different norms or
    activations.
    """

    name: str
    kind: Kind
    flops: float = 0.0
    bytes_moved: float = 0.0
    message_bytes: int = 0
    rows: int = 0
    cols: int = 0
    inner: int = 0
    num_ctas: int = 1
    num_ranks: int = 1
    element_bytes: int = 2
    split_axes: tuple[SplitAxis, ...] = ()
    is_piece: bool = False
    variant: str = ""
    is_communication: bool = field(init=False, compare=False)
    _hash: int = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "is_communication", self.kind in COMMUNICATION)
        # Kernels are keys of every cost table; hashing a dozen fields each time would dominate a plan.
        shape = (self.rows, self.cols, self.inner, self.num_ctas, self.num_ranks)
        key = (self.name, self.kind, self.flops, self.bytes_moved, self.message_bytes, shape)
        object.__setattr__(self, "_hash", hash(key))

    def __hash__(self) -> int:
        return self._hash

    def fragment(self, part: Fragment) -> Kernel:
        """The kernel that computes only `part`.

        Rows: the weights are read again by every piece. Cols: the activations are. Chunks: a share of the message.

        Raises ValueError if this kernel may not be cut along the axis, or the piece would be empty.
        """
        return _fragment(self, part)

    def _cut(self, part: Fragment) -> Kernel:
        if part.axis not in self.split_axes:
            raise ValueError(f"{self.name} may be split along {self.split_axes or 'nothing'}, not {part.axis}")
        if part.axis == "chunks":
            low, high = part.bounds(self.message_bytes // self.element_bytes)
            if low == high:
                raise ValueError(f"{self.name}: {self.message_bytes} bytes cannot be cut into {part.of} chunks")
            return replace(self, message_bytes=(high - low) * self.element_bytes, is_piece=part.start > 0)
        low, high = part.bounds(self.rows if part.axis == "rows" else self.cols)
        if low == high:
            raise ValueError(f"{self.name}: {part.axis} of {self.rows}x{self.cols} cannot be cut into {part.of}")
        rows, cols = (high - low, self.cols) if part.axis == "rows" else (self.rows, high - low)
        piece = gemm(self.name, rows, cols, self.inner, self.element_bytes)
        return replace(piece, is_piece=True) if self.is_piece or part.axis == "cols" else piece

    def max_parts(self, axis: SplitAxis) -> int:
        """Into how many non-empty parts this kernel can be cut along `axis` (1: it cannot)."""
        if axis not in self.split_axes:
            return 1
        extents = {"rows": self.rows, "cols": self.cols, "chunks": self.message_bytes // self.element_bytes}
        return max(1, extents[axis])


@lru_cache(maxsize=65536)
def _fragment(kernel: Kernel, part: Fragment) -> Kernel:
    """Policies ask for the same pieces again and again, and making a kernel is dear."""
    return kernel._cut(part)


def gemm(name: str, rows: int, cols: int, inner: int, element_bytes: int = 2) -> Kernel:
    """Y[rows, cols] = X[rows, inner] @ W[inner, cols]."""
    tiles = -(-rows // GEMM_TILE[0]) * -(-cols // GEMM_TILE[1])
    moved = element_bytes * (rows * inner + inner * cols + rows * cols)
    axes: tuple[SplitAxis, ...] = ("rows", "cols")
    return Kernel(
        name, Kind.GEMM, 2.0 * rows * cols * inner, float(moved), rows=rows, cols=cols, inner=inner,
        num_ctas=tiles, element_bytes=element_bytes, split_axes=axes,
    )  # fmt: skip


def elementwise(name: str, bytes_moved: int, flops_per_byte: float = 1.0, variant: str = "") -> Kernel:
    """A norm, activation, rotation or copy: bound by memory."""
    ctas = max(1, -(-bytes_moved // ELEMENTWISE_BYTES_PER_CTA))
    flops, moved = bytes_moved * flops_per_byte, float(bytes_moved)
    return Kernel(name, Kind.ELEMENTWISE, flops, moved, num_ctas=ctas, variant=variant)


def collective(name: str, kind: Kind, message_bytes: int, num_ranks: int, element_bytes: int = 2) -> Kernel:
    """A collective or a point-to-point transfer; only all-reduces may be cut into chunks."""
    axes: tuple[SplitAxis, ...] = ("chunks",) if kind is Kind.ALL_REDUCE else ()
    return Kernel(
        name, kind, message_bytes=message_bytes, num_ranks=num_ranks, element_bytes=element_bytes, split_axes=axes
    )


@dataclass(frozen=True, eq=False)
class FunctionVector:
    """The kernels of one batch on one rank, in order: a prologue, a layer that repeats, an epilogue.

    Compared by identity: builders return one object per shape, so that plans can be cached by it.
    """

    prologue: tuple[Kernel, ...]
    layer: tuple[Kernel, ...] = ()
    num_layers: int = 0
    epilogue: tuple[Kernel, ...] = ()

    def __post_init__(self) -> None:
        if not len(self):
            raise ValueError("a function vector needs at least one kernel")

    def __len__(self) -> int:
        return self._length

    @cached_property
    def _length(self) -> int:
        return len(self.prologue) + self.num_layers * len(self.layer) + len(self.epilogue)

    @cached_property
    def kernels(self) -> tuple[Kernel, ...]:
        """Every kernel in launch order."""
        return self.prologue + self.layer * self.num_layers + self.epilogue

    @cached_property
    def communicates(self) -> tuple[bool | None, ...]:
        """For every index, whether that kernel is communication; None behind the last."""
        return (*(kernel.is_communication for kernel in self.kernels), None)

    @cached_property
    def run_end(self) -> tuple[int, ...]:
        """For every index, where the run of kernels of the same resource (compute or communication) ends."""
        kernels, ends = self.kernels, [0] * len(self)
        end = len(self)
        for index in range(len(self) - 1, -1, -1):
            if index + 1 < len(self) and kernels[index].is_communication != kernels[index + 1].is_communication:
                end = index + 1
            ends[index] = end
        return tuple(ends)

    @cached_property
    def unit_end(self) -> tuple[int, ...]:
        """For every index, where its unit ends: units are runs cut behind every GEMM, so that a run of a layer is two
        or so. Drivers capture units as graphs, and policies cut runs between them."""
        ends, kernels, end = [0] * len(self), self.kernels, len(self)
        for index in range(len(self) - 1, -1, -1):
            if index + 1 == self.run_end[index] or kernels[index].kind is Kind.GEMM:
                end = index + 1
            ends[index] = end
        return tuple(ends)

    @cached_property
    def _ranges(self) -> dict[tuple[int, int], tuple[Kernel, ...]]:
        return {}

    def range(self, first: int, last: int) -> tuple[Kernel, ...]:
        """Kernels [first, last); the same object every time, so that what is known of a range can be kept by
        identity."""
        kernels = self._ranges.get((first, last))
        if kernels is None:
            kernels = self._ranges[first, last] = self.kernels[first:last]
        return kernels

    def locate(self, index: int) -> tuple[int, int]:
        """(layer, position in the layer) of a kernel; layer is -1 in the prologue, `num_layers` in the epilogue."""
        inner = index - len(self.prologue)
        if inner < 0:
            return -1, index
        if not self.layer or inner >= self.num_layers * len(self.layer):
            return self.num_layers, inner - self.num_layers * len(self.layer)
        return divmod(inner, len(self.layer))

    @cached_property
    def communication_bytes(self) -> int:
        """Payload of all communication kernels, in bytes."""
        return sum(k.message_bytes for k in self.kernels if k.is_communication)
