"""From a measured point back to the kernels that were measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

from models.config import MODELS, ModelConfig
from models.kernel import FunctionVector, Kernel, Kind, collective, elementwise, gemm
from models.transformer import BatchShape, Layout, function_vector, layer_kernels
from traces.coordinates import KERNELS

if TYPE_CHECKING:
    from traces.measurement import Coordinates, Measurement

# Numbers of tensor-parallel ranks on which models are measured.
RANKS = (1, 2, 4, 8, 16)


def kernel_of(measurement: Measurement) -> Kernel:
    """The kernel of a point; of a pair, its compute kernel. Raises ValueError for what is no kernel, and for missing
    coordinates."""
    at, what = measurement.at, measurement.what
    try:
        if what == "pair":
            return _compute(Kind(str(at["kind"])), str(at["compute"]), at)
        if what == "collective":
            return _collective(at)
        if what in KERNELS:
            return _compute(Kind(what), str(at["name"]), at)
    except KeyError as error:
        raise ValueError(f"a measurement of {what} lacks {error.args[0]!r}: {at}") from None
    raise ValueError(f"a measurement of {what!r} is not one of a kernel")


Shape = tuple[str, int, int]


def forward_pass(model: ModelConfig, at: Coordinates) -> FunctionVector:
    """What each of `num_ranks` tensor-parallel ranks runs of a model's first `num_layers`, for a batch of `rows` in
    sequences of `length`."""
    shape = BatchShape(max(1, int(at["rows"]) // int(at["length"])), int(at["length"]))
    return function_vector(replace(model, num_layers=int(at["num_layers"])), shape, Layout(int(at["num_ranks"]), 1))


def with_cuts(rows: Sequence[Measurement]) -> list[Measurement]:
    """The rows of one survey, with `cut` in GEMMs that are pieces and do not say so: those that are no whole kernel of
    a known model, but share name and inner dimension with one that has a multiple of their columns. Of a name and inner
    dimension of which no model knows, those with the most columns are whole."""
    silent = {_shape_of(row) for row in rows if row.what == "gemm" and "cut" not in row.at}
    # One survey is of one number of ranks: the one on which most of it is whole.
    whole = max((silent & _whole_shapes(tp) for tp in RANKS), key=len)
    named = {(name, inner) for name, _, inner in whole}
    for name, cols, inner in silent:
        if (name, inner) not in named and cols == max(c for n, c, i in silent if (n, i) == (name, inner)):
            whole.add((name, cols, inner))
    return [_with_cut(row, whole) if row.what == "gemm" and "cut" not in row.at else row for row in rows]


def _with_cut(row: Measurement, whole: set[Shape]) -> Measurement:
    name, cols, inner = _shape_of(row)
    of = sorted(c for n, c, i in whole if (n, i) == (name, inner) and c > cols and c % cols == 0)
    return replace(row, at={**row.at, "cut": of[0] // cols}) if of and (name, cols, inner) not in whole else row


def _shape_of(row: Measurement) -> Shape:
    return str(row.at["name"]), int(row.at["cols"]), int(row.at["inner"])


@cache
def _whole_shapes(tp: int) -> frozenset[Shape]:
    """Name, columns and inner dimension of every known model's GEMMs on so many ranks."""
    found: set[Shape] = set()
    for model in MODELS.values():
        if not (model.num_heads % tp or model.ffn_size % tp):
            kernels = layer_kernels(model, BatchShape(1, 16), tp)
            found |= {(k.name, k.cols, k.inner) for k in kernels if k.kind is Kind.GEMM}
    return frozenset(found)


def collective_of(measurement: Measurement) -> Kernel:
    """The communication kernel of a collective's point or of a pair."""
    return _collective(measurement.at)


def label_of(at: Coordinates) -> str:
    """A compute kernel's name at some coordinates, and its variant where it has one; as its operation is called."""
    name, variant = str(at.get("name", at.get("compute"))), str(at.get("variant", ""))
    return f"{name} ({variant})" if variant else name


def has_priority(measurement: Measurement) -> bool:
    """Whether a pair's communication ran on a stream of higher priority."""
    return bool(int(measurement.at.get("priority", 1)))


def withheld_of(measurement: Measurement) -> int:
    """SMs that compute was kept from."""
    return int(measurement.at.get("withheld_sms", 0))


def ctas_of(measurement: Measurement) -> int:
    """The bound on a collective's CTAs; 0 is the library's default."""
    return int(measurement.at.get("ctas", 0))


def _compute(kind: Kind, name: str, at: Coordinates) -> Kernel:
    if kind is Kind.GEMM:
        shape = (int(at["rows"]), int(at["cols"]), int(at["inner"]))
        kernel = gemm(name, *shape, int(at.get("element_bytes", 2)))
        return replace(kernel, is_piece=True) if int(at.get("cut", 1)) > 1 else kernel
    if kind is Kind.ELEMENTWISE:
        kernel = elementwise(name, int(at["bytes_moved"]), variant=str(at.get("variant", "")))
        return replace(kernel, num_ctas=int(at.get("num_ctas", kernel.num_ctas)))
    if kind is not Kind.ATTENTION:
        raise ValueError(f"{kind} does not compute; a pair's kind must be gemm, attention or elementwise")
    rows = int(at["rows"]) if "rows" in at else int(at["num_sequences"]) * int(at["length"])
    moved = float(at["bytes_moved"])
    return Kernel(name, kind, float(at["flops"]), moved, rows=rows, num_ctas=int(at["num_ctas"]))


def _collective(at: Coordinates) -> Kernel:
    op = str(at["op"])
    return collective(op, Kind(op), int(at["bytes"]), int(at["num_ranks"]), int(at.get("element_bytes", 2)))
