"""GEMM shapes that were measured, as tables over rows: a library's choice of tiles is its own, and known where it was
seen. Shapes that are held out get none, so that their errors stay those of the model."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from statistics import median

from calibration.kernels import kernel_of, withheld_of
from sim.cost import TABLE_BYTES
from sim.spec import GemmTable, NodeSpec
from traces.measurement import Measurement

SHORTEST_US = 1e-3


def gemm_tables(rows: Sequence[Measurement], launches: Sequence[Measurement], base: NodeSpec) -> tuple[GemmTable, ...]:
    """A table for each shape, partition, and whether it is a piece; the base's where nothing was measured. Several rows
    of one point, as of kernels of different names, count as their median. `base` is a node in series."""
    found: dict[tuple[int, int, int, bool], dict[int, list[float]]] = {}
    seen = _launched(launches)
    for row in rows:
        kernel = kernel_of(row)
        if kernel.element_bytes == TABLE_BYTES:
            key = kernel.cols, kernel.inner, withheld_of(row), kernel.is_piece
            us = max(SHORTEST_US, row.values["us"] - base.device.graph_gap_us)
            found.setdefault(key, {}).setdefault(kernel.rows, []).append(us)
    kept = [t for t in base.gemms if (t.cols, t.inner, t.withheld_sms, t.is_piece) not in found]
    tables = [
        GemmTable(
            cols=cols, inner=inner, withheld_sms=withheld, is_piece=is_piece, rows=tuple(sorted(points)),
            us=tuple(median(points[count]) for count in sorted(points)),
            ctas=_ctas(seen.get((cols, inner, is_piece), {}), sorted(points)),
        )
        for (cols, inner, withheld, is_piece), points in sorted(found.items())
    ]  # fmt: skip
    return (*kept, *tables)


def _launched(launches: Sequence[Measurement]) -> dict[tuple[int, int, bool], dict[int, int]]:
    """CTAs by shape and rows, in units of what an SM holds: the library does not look at partitions."""
    found: dict[tuple[int, int, bool], dict[int, int]] = {}
    for row in launches:
        at = row.at
        if at.get("element_bytes", TABLE_BYTES) != TABLE_BYTES:
            continue
        key = int(at["cols"]), int(at["inner"]), int(at.get("cut", 1)) > 1
        found.setdefault(key, {})[int(at["rows"])] = ceil(row.values["ctas"] / row.values["ctas_per_sm"])
    return found


def _ctas(seen: dict[int, int], rows: Sequence[int]) -> tuple[int, ...]:
    """The CTAs at each number of rows: those of the next larger one that was seen, or of the largest."""
    if not seen:
        return ()
    return tuple(seen[min((count for count in seen if count >= some), default=max(seen))] for some in rows)
