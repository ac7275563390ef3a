"""From a measured point back to the kernels that were measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from models.kernel import Kernel, Kind, collective, elementwise, gemm

if TYPE_CHECKING:
    from traces.measurement import Coordinates, Measurement


def kernel_of(measurement: Measurement) -> Kernel:
    """The kernel of a point; of a pair, its compute kernel. Raises ValueError for what is no kernel, and for missing
    coordinates."""
    at, what = measurement.at, measurement.what
    try:
        if what == "pair":
            return _compute(Kind(str(at["kind"])), str(at["compute"]), at)
        if what == "collective":
            return _collective(at)
        if what in ("gemm", "attention", "elementwise"):
            return _compute(Kind(what), str(at["name"]), at)
    except KeyError as error:
        raise ValueError(f"a measurement of {what} lacks {error.args[0]!r}: {at}") from None
    raise ValueError(f"a measurement of {what!r} is not one of a kernel")


def with_cuts(rows: Sequence[Measurement]) -> list[Measurement]:
    """The rows of one survey, with `cut` in GEMMs that are pieces: of the same name and inner dimension, there are some
    with a multiple of their columns."""
    whole: dict[tuple[str, int], int] = {}
    for row in rows:
        if row.what == "gemm":
            key = str(row.at["name"]), int(row.at["inner"])
            whole[key] = max(whole.get(key, 0), int(row.at["cols"]))
    found = []
    for row in rows:
        if row.what == "gemm" and "cut" not in row.at:
            most, cols = whole[str(row.at["name"]), int(row.at["inner"])], int(row.at["cols"])
            if most > cols and most % cols == 0:
                row = replace(row, at={**row.at, "cut": most // cols})
        found.append(row)
    return found


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
