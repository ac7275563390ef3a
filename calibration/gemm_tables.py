"""GEMM shapes that were measured, as tables over rows: a library's choice of tiles is its own, and known where it was
seen. Shapes that are held out get none, so that their errors stay those of the model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import ceil, prod
from statistics import median

from calibration.kernels import kernel_of, withheld_of
from sim.cost import TABLE_BYTES, partition_sms
from sim.spec import DeviceSpec, GemmTable, NodeSpec, next_larger
from traces.measurement import Measurement

SHORTEST_US = 1e-3
# In names such as nvjet_sm90_hsh_192x128_64x5_1x2_h_bz_coopB_bias_TNT: the tile (columns, rows) of the result, and how
# many CTAs lie side by side in a cluster.
TILE = re.compile(r"^nvjet_\w+?_(\d+)x(\d+)_\d+x\d+_(\d+)x(\d+)_")
LARGEST_TILE = 256 * 256
# A shape: columns and inner dimension, SMs withheld, whether it is a piece. And CTAs, with how many in a cluster.
Key = tuple[int, int, int, bool]
Ctas = tuple[int, int]


def gemm_tables(rows: Sequence[Measurement], launches: Sequence[Measurement], base: NodeSpec) -> tuple[GemmTable, ...]:
    """A table for each shape, partition, and whether it is a piece; the base's where nothing was measured. Several rows
    of one point, as of kernels of different names, count as their median. `base` is a node in series."""
    found: dict[Key, dict[int, list[float]]] = {}
    seen = _launched(launches, base.device)
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
            **_as_launched(seen, (cols, inner, withheld, is_piece), sorted(points)),
        )
        for (cols, inner, withheld, is_piece), points in sorted(found.items())
    ]  # fmt: skip
    return (*kept, *tables)


def _launched(launches: Sequence[Measurement], device: DeviceSpec) -> dict[Key, dict[int, Ctas]]:
    """CTAs, in units of what an SM holds, and how many of them are a cluster, by shape, partition and rows."""
    found: dict[Key, dict[int, Ctas]] = {}
    for row in launches:
        at = row.at
        if at.get("element_bytes", TABLE_BYTES) != TABLE_BYTES:
            continue
        withheld = int(at.get("withheld_sms", 0))
        key = int(at["cols"]), int(at["inner"]), withheld, int(at.get("cut", 1)) > 1
        found.setdefault(key, {})[int(at["rows"])] = _in_turn(row, partition_sms(device, withheld))
    return found


def _in_turn(row: Measurement, num_sms: int) -> Ctas:
    """CTAs in units of what an SM holds; where there is one for every SM, the tiles that they take in turn, where the
    name of the kernel tells them: those that find none left in the last turn leave their SMs to others."""
    ctas, at = _filled(row), row.at
    if (tile := TILE.search(str(at.get("kernel", "")))) is None:
        return ctas, 1
    cols, rows, *cluster = map(int, tile.groups())
    tiles = ceil(int(at["cols"]) / cols) * ceil(int(at["rows"]) / rows) if ctas == num_sms else 0
    return max(ctas, tiles), prod(cluster)


def _filled(launch: Measurement) -> int:
    """How many SMs a launch fills."""
    return ceil(launch.values["ctas"] / launch.values["ctas_per_sm"])


def are_persistent(launches: Sequence[Measurement], num_sms: int) -> bool:
    """Whether GEMMs never have more CTAs than the SMs hold, however large they are."""
    most = max(map(_filled, launches), default=0)
    large = [row for row in launches if int(row.at["rows"]) * int(row.at["cols"]) > LARGEST_TILE * num_sms]
    return bool(large) and most <= num_sms


def _as_launched(seen: dict[Key, dict[int, Ctas]], key: Key, rows: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """CTAs and clusters at each number of rows: those of the next larger one that was seen, or of the largest; under
    this partition, or else on the whole device."""
    cols, inner, _, is_piece = key
    launched = seen.get(key) or seen.get((cols, inner, 0, is_piece))
    if not launched:
        return {}
    known = sorted(launched)
    each = [launched[count] for count in known]
    ctas, clusters = zip(*(next_larger(known, each, some) for some in rows), strict=True)
    return {"ctas": ctas, "clusters": clusters if max(clusters) > 1 else ()}
