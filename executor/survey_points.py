"""The points of a survey: which kernels, collectives, pairs and schedules are measured, most telling ones first.

Coordinates come from the function vectors of the models, so that what is measured is what the executor runs. Where a
list below names several values, the first ones are the ones to have if time is short.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from models.config import ModelConfig
from models.kernel import Kernel, Kind
from models.transformer import ELEMENT_BYTES, BatchShape, Layout, function_vector
from traces.coordinates import HOST_NAMES
from traces.measurement import Coordinates, point_key

# Kernels that have a row per sequence instead of one per token; their sequences are as short as this.
PER_SEQUENCE = frozenset({"final_norm", "lm_head"})
SHORT = 16
# Length of the sequences of a batch of several, as in the benchmarks.
SEQUENCE = 64
SERIAL, POLICY, PLAIN = "serial", "policy", "no decomposition"
COMPUTE_ALONE, COMM_ALONE = "compute alone", "comm alone"
KIB, MIB = 2**10, 2**20


@dataclass(frozen=True, slots=True)
class Point:
    """What to measure. `model`: whose weights it needs; empty for none."""

    what: str
    at: Coordinates
    model: str = ""

    @property
    def key(self) -> str:
        """The name of the row that it becomes."""
        return point_key(self.what, self.at)


@dataclass(frozen=True, slots=True)
class Grid:
    """The coarse grid of a kind of device.

    rows: of GEMMs and elementwise kernels. few: sequences, for kernels with a row each. withheld: SMs; the first
    `cut_withheld` and `light_withheld` of them for pieces of GEMMs and for kernels bound by memory. cuts: into how many
    pieces. attention: (sequences, length). sizes: bytes of a message. pairs: (withheld, CTAs, priority). `most_rows`
    and `most_sequences` bound every batch.
    """

    rows: tuple[int, ...]
    cut_rows: tuple[int, ...]
    few: tuple[int, ...]
    withheld: tuple[int, ...]
    cut_withheld: int
    light_withheld: int
    cuts: tuple[int, ...]
    attention: tuple[tuple[int, int], ...]
    sizes: tuple[int, ...]
    ctas: tuple[int, ...]
    pair_rows: tuple[int, ...]
    pair_sizes: tuple[int, ...]
    pairs: tuple[tuple[int, int, int], ...]
    batch_rows: tuple[int, ...]
    partitions: tuple[int, ...]
    batch_ctas: tuple[int, ...]

    @property
    def largest(self) -> BatchShape:
        """A batch into whose buffers every other one fits."""
        rows = max(*self.rows, *self.batch_rows, *(n * length for n, length in self.attention))
        sequences = max(*self.few, *(n for n, _ in self.attention), *(r // SEQUENCE for r in self.batch_rows))
        return BatchShape(sequences, -(-rows // sequences))


GPU = Grid(
    rows=(256, 32, 2048, 64, 512, 128, 1024, 16),
    cut_rows=(256, 2048, 64, 1024, 16),
    few=(2, 32, 8, 1),
    withheld=(0, 16, 32, 8, 24),
    cut_withheld=2,
    light_withheld=2,
    cuts=(2, 4),
    attention=(
        (2, 64), (32, 64), (2, 1024), (8, 64), (2, 128), (2, 256), (2, 16), (16, 128), (1, 512), (2, 512), (1, 16),
        (4, 512), (8, 256), (1, 2048), (4, 64), (1, 128), (16, 64), (8, 128),
    ),
    # Between powers of two as well: NCCL changes its protocol there, and 1 MiB can take less than 768 KiB.
    sizes=tuple(
        KIB * size
        for size in (1024, 64, 65536, 4, 8192, 256, 768, 16, 16384, 384, 2048, 512, 1536, 128, 192, 4096, 32768, 32, 96,
                     3072, 8)
    ),
    ctas=(0, 8, 16),
    pair_rows=(256, 2048, 32),
    pair_sizes=(MIB, 64 * KIB, 8 * MIB),
    pairs=(
        (0, 0, 1), (16, 0, 1), (0, 8, 1), (8, 8, 1), (16, 16, 1), (32, 0, 1), (24, 0, 1), (0, 16, 1), (0, 0, 0),
        (16, 8, 1), (16, 0, 0), (8, 0, 1),
    ),
    batch_rows=(256, 2048, 64, 1024, 16, 512, 128),
    partitions=(0, 16, 8, 32, 24),
    batch_ctas=(0, 8),
)  # fmt: skip
# Small enough for a CPU, and nothing that only a GPU can do.
CPU = Grid(
    rows=(32, 8, 128),
    cut_rows=(32,),
    few=(2, 4),
    withheld=(0,),
    cut_withheld=1,
    light_withheld=1,
    cuts=(2,),
    attention=((2, 16), (1, 64), (4, 32)),
    sizes=(64 * KIB, 4 * KIB, 512 * KIB),
    ctas=(0,),
    pair_rows=(),
    pair_sizes=(),
    pairs=(),
    batch_rows=(32, 128),
    partitions=(),
    batch_ctas=(),
)


@dataclass(frozen=True, slots=True)
class Shapes:
    """The coordinates of one model's kernels on each rank. `item_bytes`: of an element, which the descriptions of the
    models take to be two. `num_shards`: the config is that of one of so many ranks already, so that one GPU can measure
    what each of several would run."""

    config: ModelConfig
    layout: Layout
    item_bytes: int
    num_shards: int = 1

    @property
    def num_ranks(self) -> int:
        """Tensor-parallel ranks, of which these are one's kernels."""
        return self.layout.tp * self.num_shards

    def batch(self, name: str, rows: int) -> BatchShape:
        """A batch in which a kernel has so many rows."""
        if name in PER_SEQUENCE:
            return BatchShape(rows, SHORT)
        sequences = next(n for n in range(1, rows + 1) if rows % n == 0 and rows // n <= self.config.max_positions)
        return BatchShape(sequences, rows // sequences)

    def kernels(self, *kinds: Kind) -> tuple[str, ...]:
        """Names of the kernels of these kinds, in the order of a forward pass."""
        vector = function_vector(self.config, BatchShape(1, SHORT), self.layout)
        return tuple(dict.fromkeys(kernel.name for kernel in vector.kernels if kernel.kind in kinds))

    def kernel(self, name: str, shape: BatchShape) -> Kernel:
        """The kernel of that name, as the models describe it."""
        vector = function_vector(self.config, shape, self.layout)
        return next(kernel for kernel in vector.kernels if kernel.name == name)

    def gemm(self, name: str, rows: int, withheld: int, cut: int = 1) -> Coordinates:
        """A GEMM, or one of the pieces that it is cut into by output features."""
        kernel = self.kernel(name, self.batch(name, rows))
        return {"name": name, "rows": rows, "cols": kernel.cols // cut, "inner": kernel.inner,
                "withheld_sms": withheld, "element_bytes": self.item_bytes, "cut": cut}  # fmt: skip

    def elementwise(self, name: str, rows: int, withheld: int) -> Coordinates:
        """A norm, activation, rotation or look-up."""
        kernel = self.kernel(name, self.batch(name, rows))
        at: Coordinates = {"name": name, "rows": rows, "bytes_moved": self._bytes(kernel),
                           "num_ctas": kernel.num_ctas, "withheld_sms": withheld}  # fmt: skip
        return at | {"variant": kernel.variant} if kernel.variant else at

    def attention(self, sequences: int, length: int, withheld: int) -> Coordinates:
        """Attention of a batch; heads are those of one rank."""
        config, tp = self.config, self.layout.tp
        kernel = self.kernel("attention", BatchShape(sequences, length))
        return {
            "name": "attention", "num_sequences": sequences, "length": length, "num_heads": config.num_heads // tp,
            "num_kv_heads": max(1, config.num_kv_heads // tp), "head_dim": config.head_dim, "flops": kernel.flops,
            "bytes_moved": self._bytes(kernel), "num_ctas": kernel.num_ctas, "withheld_sms": withheld,
        }  # fmt: skip

    def sequence(self, rows: int) -> Coordinates:
        """All compute kernels of a forward pass, one after the other."""
        config = self.config
        return {"model": config.model_id, "num_layers": config.num_layers, "rows": rows, "length": min(rows, SEQUENCE),
                "num_ranks": self.num_ranks, "element_bytes": self.item_bytes}  # fmt: skip

    def _bytes(self, kernel: Kernel) -> int:
        return round(kernel.bytes_moved * self.item_bytes / ELEMENT_BYTES)


def kernel_points(shapes: Shapes, grid: Grid) -> dict[str, list[Point]]:
    """The compute kernels of one model alone."""
    model, gemms = shapes.config.model_id, []
    names = shapes.kernels(Kind.GEMM)
    for name, rows, withheld in in_order(names, grid.rows, grid.withheld):
        if name not in PER_SEQUENCE:
            gemms.append(shapes.gemm(name, rows, withheld))
    for name, rows, withheld, cut in in_order(names, grid.cut_rows, grid.withheld[: grid.cut_withheld], grid.cuts):
        if name not in PER_SEQUENCE and shapes.kernel(name, shapes.batch(name, rows)).cols % cut == 0:
            gemms.append(shapes.gemm(name, rows, withheld, cut))
    light = grid.withheld[: grid.light_withheld]
    for name, few, withheld in in_order([n for n in names if n in PER_SEQUENCE], grid.few, light):
        gemms.append(shapes.gemm(name, few, withheld))
    others = [
        shapes.elementwise(name, grid.few[grid.rows.index(rows) % len(grid.few)] if name in PER_SEQUENCE else rows, w)
        for name, rows, w in in_order(shapes.kernels(Kind.ELEMENTWISE), grid.rows, light)
    ]
    longest = shapes.config.max_positions
    attention = [
        shapes.attention(n, length, w) for (n, length), w in in_order(grid.attention, light) if length <= longest
    ]
    sequences = [shapes.sequence(rows) for rows in grid.batch_rows]
    found = {"gemm": gemms, "attention": attention, "elementwise": others, "sequence": sequences}
    return {what: unique(Point(what, at, model) for at in points) for what, points in found.items()}


def collective_points(num_ranks: int, grid: Grid) -> list[Point]:
    """Collectives among all ranks and among two of them, and a transfer between two."""
    if num_ranks < 2:
        return []
    points: list[Coordinates] = []
    # Groups of some of the ranks come from layouts, which divide the ranks evenly.
    groups = (num_ranks, 2) if num_ranks > 2 and num_ranks % 2 == 0 else (num_ranks,)
    for size, ranks in product(grid.sizes, groups):
        for ctas in grid.ctas if ranks == num_ranks else grid.ctas[:2]:
            points.append({"op": "all_reduce", "bytes": size, "num_ranks": ranks, "ctas": ctas})
        points.append({"op": "all_gather", "bytes": size, "num_ranks": ranks, "ctas": 0})
    points += [{"op": "send", "bytes": size, "num_ranks": 2, "ctas": 0} for size in grid.sizes]
    place = {size: number for number, size in enumerate(grid.sizes)}
    return [Point("collective", at) for at in sorted(points, key=lambda at: place[int(at["bytes"])])]


def pair_points(shapes: Shapes, grid: Grid) -> list[Point]:
    """A compute kernel beside an all-reduce among all ranks; the variants of one kernel follow one another, because
    they share what is captured of it."""
    if shapes.layout.tp < 2 or not grid.pairs:
        return []
    computes: list[tuple[str, Coordinates]] = []
    for rows, name in product(grid.pair_rows, ("fc1", "out_proj")):
        computes.append(("gemm", shapes.gemm(name, rows, 0)))
    # Small ones wait for memory most of the time, large ones stream: a collective does not slow both alike.
    for rows in sorted(grid.pair_rows, reverse=True):
        length = SEQUENCE if rows > SEQUENCE else SHORT
        computes.append(("elementwise", shapes.elementwise("ffn_norm", rows, 0)))
        computes.append(("attention", shapes.attention(rows // length, length, 0)))
    half = max(1, len(grid.pairs) // 2)
    return unique(
        Point("pair", pair_at(what, at, size, shapes.layout.tp, variant), shapes.config.model_id)
        for variants in (grid.pairs[:half], grid.pairs[half:])
        for what, at in computes
        for variant, size in product(variants, grid.pair_sizes)
    )


def pair_at(
    what: str, compute: Coordinates, size: int, num_ranks: int, variant: tuple[int, int, int]
) -> Coordinates:  # fmt: skip
    """The coordinates of a pair: those of its compute kernel, and of an all-reduce."""
    rest = {name: value for name, value in compute.items() if name not in ("name", "withheld_sms")}
    withheld, ctas, priority = variant
    return {"compute": compute["name"], "kind": what, **rest, "op": "all_reduce", "bytes": size,
            "num_ranks": num_ranks, "ctas": ctas, "withheld_sms": withheld, "priority": priority}  # fmt: skip


def compute_of(pair: Coordinates) -> Coordinates:
    """The compute kernel of a pair, under its partition."""
    dropped = ("compute", "kind", "op", "bytes", "num_ranks", "ctas", "priority")
    return {"name": pair["compute"], **{name: value for name, value in pair.items() if name not in dropped}}


def batch_points(config: ModelConfig, num_ranks: int, grid: Grid) -> list[Point]:
    """Two batches under every schedule; all schedules of one batch follow one another, and are measured together."""
    return [point for rows in grid.batch_rows for point in schedules(config, num_ranks, rows, grid)]


def schedules(config: ModelConfig, num_ranks: int, rows: int, grid: Grid) -> list[Point]:
    """Every schedule of two batches of so many rows; on a CPU the serial one alone."""
    names = [SERIAL]
    if grid.partitions:
        names += [COMPUTE_ALONE, COMM_ALONE, POLICY, PLAIN]
        names += [f"partition {p} ctas {c}" for p, c in product(grid.partitions, grid.batch_ctas)]
    base: dict[str, Any] = {"model": config.model_id, "num_layers": config.num_layers, "rows": rows,
                            "length": min(rows, SEQUENCE), "num_ranks": num_ranks}  # fmt: skip
    return [Point("two_batches", base | {"schedule": name}, config.model_id) for name in names]


def host_points(*, on_gpu: bool, num_ranks: int) -> list[Point]:
    """What the launching thread's calls cost."""
    names = HOST_NAMES if on_gpu else ("launch", "synchronize", "broadcast", "plan", "issue")
    skipped = {"collective_launch", "broadcast", "issue_collective"} if num_ranks < 2 else set[str]()
    return [Point("host", {"name": name}) for name in names if name not in skipped]


def in_order(*axes: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
    """All combinations, those of the first values of every axis first."""
    numbered = product(*(list(enumerate(axis)) for axis in axes))
    for combination in sorted(numbered, key=lambda items: sum(place for place, _ in items)):
        yield tuple(value for _, value in combination)


def unique(points: Iterable[Point]) -> list[Point]:
    """Every point once: models share shapes, and several pieces of a kernel are one shape."""
    return list({point.key: point for point in points}.values())
