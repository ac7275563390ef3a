"""What the simulated hardware is: a node's device, host and links, read from a data file that names the source of
every number."""

from __future__ import annotations

import hashlib
import tomllib
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from math import exp, log
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from sim.later import without_later

Value = TypeVar("Value")

NODES = Path(__file__).parent / "nodes"

# Far beyond anything real: these keep out infinity, and what overflows or would take for ever.
SMALLEST, LARGEST = 1e-3, 1e9
Positive = Annotated[float, Meta(ge=SMALLEST, le=LARGEST)]
NonNegative = Annotated[float, Meta(ge=0, le=LARGEST)]
Slowdown = Annotated[float, Meta(ge=1, le=1e3)]
Share = Annotated[float, Meta(ge=SMALLEST, le=1)]
Count = Annotated[int, Meta(ge=1, le=10**6)]
Size = Annotated[int, Meta(ge=1, le=2**50)]
Order = Annotated[float, Meta(ge=0, le=1e3)]


class OperationSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How an attention or elementwise kernel of this `name` is really carried out, often by several launches; of this
    `variant`, or of every one that has no numbers of its own.

    `start_us`: what it takes however little there is to do. `traffic`: bytes that it moves per byte of its
    `bytes_moved`, which touches every operand once. `overlap_order`: of an elementwise kernel, how its start and its
    traffic overlap, (a^p + b^p)^(1/p); 1: one after the other. Norms of several launches are near 2.
    """

    name: str
    start_us: NonNegative
    traffic: Positive = 1.0
    variant: str = ""
    overlap_order: Annotated[float, Meta(ge=1, le=LARGEST)] = 1.0

    @property
    def label(self) -> str:
        """The name, and the variant where there is one."""
        return f"{self.name} ({self.variant})" if self.variant else self.name


class DeviceSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One GPU. Rates are dense half precision; efficiencies are achieved shares of them.

    `gemm_tiles`: CTA tiles (rows, cols) that the GEMM library chooses from, with the share of its rate each reaches.
    `kernel_gap_us`: from one kernel's end to the next one's first CTA on a stream; `graph_gap_us`: the same in a graph;
    `switch_us`: of both gaps, what is not there between kernels of one kind, so that a series of one has it not;
    `event_gap_us`: what a wait across streams adds. `sm_bandwidth_gb_s`: the most that one SM can draw from memory.
    `cta_start_us`: what a GEMM's CTA spends before and after its inner loop. `ramp_us`: how long memory stands idle
    until a GEMM's loads flow. `memory_gb`: what its data sheet says it holds; 0: not known. No time depends on it.

    What fits may add; without it the model is the plainer one. `gemm_balance`: how evenly the GEMM library fills the
    waves, 0 (whole tiles) to 1; `gemm_wave_ctas`: how many CTAs it fills them with, 0 for one on every SM;
    `gemm_persistent`: a GEMM's CTAs take tile after tile, so that its SMs are nobody else's until it has no tile left.
    `gemm_overlap_order`: how well a GEMM's computing and its memory traffic overlap, see
    `sim.cost.Shape.pace_us`; 0 is perfectly. `split_us`: what cutting the inner dimension adds. `gemm_sees_partition`:
    whether the library chooses tiles for the SMs that a partition leaves it. `gpcs`: how many SMs lie together,
    where that is known: clusters of CTAs need SMs that do, so that those that a collective has are lost to them with
    their neighbours. `partition_step`: compute that is
    confined to some SMs gets the next multiple of so many, or all there are. `piece_us`: a GEMM that is cut along its
    columns adds its bias in a launch of its own; what that takes beside moving its bytes. `attention_start_us`,
    `elementwise_start_us`: what one takes at least; `operations`: the same for kernels of one name. `attention_cta_us`:
    what a CTA of attention spends beside its operations, as on the half of a block that a causal mask throws away;
    `attention_overlap_order`: 1 where copies come before and after the arithmetic. `rested_boost`: by what share at
    most the arithmetic of GEMMs goes faster where the GPU rests while collectives run than where it never does and its
    power limit holds the clock down, see `sim.cost.Costs.clock`.
    """

    name: str
    num_sms: Count
    peak_tflops: Positive
    gemm_efficiency: Share
    attention_efficiency: Share
    hbm_gb_s: Positive
    hbm_efficiency: Share
    sm_bandwidth_gb_s: Positive
    gemm_tiles: Annotated[tuple[tuple[Count, Count, Share], ...], Meta(min_length=1)]
    memory_gb: NonNegative = 0.0
    cta_start_us: NonNegative = 0.0
    ramp_us: NonNegative = 0.0
    gemm_balance: Annotated[float, Meta(ge=0, le=1)] = 0.0
    gemm_wave_ctas: Annotated[int, Meta(ge=0, le=10**6)] = 0
    gemm_persistent: bool = False
    gemm_overlap_order: Order = 0.0
    split_us: NonNegative = 0.0
    gemm_sees_partition: bool = False
    gpcs: tuple[Count, ...] = ()
    partition_step: Annotated[int, Meta(ge=0, le=10**6)] = 0
    piece_us: NonNegative = 0.0
    attention_start_us: NonNegative = 0.0
    elementwise_start_us: NonNegative = 0.0
    attention_cta_us: NonNegative = 0.0
    attention_overlap_order: Order = 0.0
    operations: tuple[OperationSpec, ...] = ()
    rested_boost: Annotated[float, Meta(ge=0, le=1)] = 0.0
    kernel_gap_us: NonNegative
    graph_gap_us: NonNegative
    switch_us: NonNegative = 0.0
    event_gap_us: NonNegative

    def __post_init__(self) -> None:
        for kind, order in (("gemm", self.gemm_overlap_order), ("attention", self.attention_overlap_order)):
            if 0.0 < order < 1.0:
                raise ValueError(f"{kind}_overlap_order is {order}; it must be 0, or 1 and more")
        if self.switch_us > min(self.kernel_gap_us, self.graph_gap_us):
            raise ValueError(f"switch_us is {self.switch_us}; it is part of kernel_gap_us and graph_gap_us")
        names = [operation.label for operation in self.operations]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two operations named {twice[0]}; keep one")

    def with_switch(self, switch_us: float) -> DeviceSpec:
        """The same device where another kind of kernel comes so much later than one of the same kind."""
        more = switch_us - self.switch_us
        return msgspec.structs.replace(
            self, switch_us=switch_us, kernel_gap_us=self.kernel_gap_us + more, graph_gap_us=self.graph_gap_us + more
        )


class HostSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The launching thread of a rank: what each call costs it, in microseconds.

    `graph_kernel_us` is the cost of a graph replay per kernel in it, `plan_us` of deciding a round, `broadcast_us` of
    telling the other ranks.
    """

    launch_us: NonNegative
    collective_launch_us: NonNegative
    graph_launch_us: NonNegative
    graph_kernel_us: NonNegative
    event_us: NonNegative
    synchronize_us: NonNegative
    plan_us: NonNegative
    broadcast_us: NonNegative


class Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Time of one operation over its size: `op` among `ranks` with `ctas` CTAs. `path`: which links it crosses.
    `launched`: with how many CTAs messages of these sizes are launched, for small ones have fewer; none where that was
    not seen: always with `ctas`."""

    op: str
    ranks: Count
    ctas: Count
    path: str = ""
    bytes: tuple[Size, ...]
    us: tuple[Positive, ...]
    launched: tuple[Count, ...] = ()

    def __post_init__(self) -> None:
        if len(self.bytes) != len(self.us) or len(self.bytes) < 2:
            sizes, times = len(self.bytes), len(self.us)
            raise ValueError(f"table {self.op}: {sizes} sizes and {times} times; need as many, 2 or more")
        if any(a >= b for a, b in zip(self.bytes, self.bytes[1:], strict=False)):
            raise ValueError(f"table {self.op}: sizes must increase")
        if self.launched and len(self.launched) != len(self.bytes):
            sizes, counts = len(self.bytes), len(self.launched)
            raise ValueError(f"table {self.op}: {sizes} sizes and {counts} numbers of launched CTAs; need as many")

    def ctas_at(self, size: int) -> int:
        """CTAs of a message: those of the next larger size that was seen, or of the largest."""
        return next_larger(self.bytes, self.launched, size) if self.launched else self.ctas

    def stream_us(self, size: int) -> float:
        """What a message takes at the best rate of the table, without latency."""
        return size * min(us / some for us, some in zip(self.us, self.bytes, strict=True))

    def at(self, size: int) -> float:
        """Time for a message of `size` bytes: log-log between points, flat below, last bandwidth above."""
        if size <= self.bytes[0]:
            return self.us[0]
        if size >= self.bytes[-1]:
            return self.us[-1] * size / self.bytes[-1]
        return between(self.bytes, self.us, size)


def next_larger(points: Sequence[int], values: Sequence[Value], at: int) -> Value:
    """The value at the next larger one of the points, which increase, or at the largest."""
    return values[min(bisect_left(points, at), len(points) - 1)]


def between(sizes: tuple[int, ...], us: tuple[float, ...], size: int) -> float:
    """What a table says of a size inside it: between two points straight in logarithms."""
    i = bisect_right(sizes, size)
    low, high = log(sizes[i - 1]), log(sizes[i])
    share = (log(size) - low) / (high - low)
    return exp(log(us[i - 1]) * (1 - share) + log(us[i]) * share)


class GemmTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the GEMM library took for one shape (cols x inner) over its rows, alone on the SMs that are not withheld.
    `is_piece`: as a piece of a wider result. `ctas`: with how many CTAs it was launched, in units of what an SM holds
    at a time; where those are one for every SM and take tile after tile, how many tiles; none where that was not seen.
    `clusters`: how many CTAs start together on SMs side by side; none: each by itself. Half precision."""

    cols: Count
    inner: Count
    withheld_sms: Annotated[int, Meta(ge=0, le=10**6)] = 0
    is_piece: bool = False
    rows: Annotated[tuple[Count, ...], Meta(min_length=1)]
    us: tuple[Positive, ...]
    ctas: tuple[Count, ...] = ()
    clusters: tuple[Count, ...] = ()

    def __post_init__(self) -> None:
        name = f"GEMM table {self.cols} x {self.inner}"
        for what, counts in (("CTAs", self.ctas), ("clusters", self.clusters)):
            if counts and len(counts) != len(self.rows):
                raise ValueError(f"{name}: {len(self.rows)} numbers of rows and {len(counts)} of {what}; need as many")
        if len(self.rows) != len(self.us):
            raise ValueError(f"{name}: {len(self.rows)} numbers of rows and {len(self.us)} times; need as many")
        if any(a >= b for a, b in pairwise(self.rows)):
            raise ValueError(f"{name}: rows must increase")

    def at(self, rows: int) -> float:
        """Time at so many rows, which must lie within the table: between two points straight in logarithms."""
        return self.us[self.rows.index(rows)] if rows in self.rows else between(self.rows, self.us, rows)

    def ctas_at(self, rows: int) -> int:
        """CTAs at so many rows: those of the next larger number that was seen, for tiles are made to hold it; 0 if none
        was."""
        return next_larger(self.rows, self.ctas, rows) if self.ctas else 0

    def cluster_at(self, rows: int) -> int:
        """CTAs of a cluster at so many rows, in the same way; 1 if none was seen."""
        return next_larger(self.rows, self.clusters, rows) if self.clusters else 1


class LinkSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What joins the GPUs. `root_gb_s`: capacity that all flows share (PCIe root or host memory), 0 if there is none.

    `pairs`: GPUs joined by a link of their own, whose traffic does not cross the root. `hbm_per_byte`: memory traffic
    of a collective per byte of message. `partitions`: SM counts worth withholding from compute. `default_ctas`: CTAs of
    the table that holds where no bound is asked for; 0: the one with the most. `join_us`: how much longer a collective
    takes behind computation than behind another collective, for which all ranks were there. `independent_ctas`: each
    CTA of a collective moves its share as soon as it is on an SM, and the others follow where there is room; else
    nothing moves until all are. `ctas_anywhere`: they take whatever SMs are free, also of those that computation is
    confined to; else those withheld from it first.
    """

    kind: str
    tables: tuple[Table, ...]
    root_gb_s: NonNegative = 0.0
    pairs: tuple[tuple[int, int], ...] = ()
    hbm_per_byte: Positive = 4.0
    partitions: Annotated[tuple[Annotated[int, Meta(ge=0)], ...], Meta(min_length=1)] = (0,)
    default_ctas: Annotated[int, Meta(ge=0, le=10**6)] = 0
    join_us: NonNegative = 0.0
    independent_ctas: bool = False
    ctas_anywhere: bool = False

    def __post_init__(self) -> None:
        keys = [(t.op, t.ranks, t.ctas, t.path) for t in self.tables]
        if twice := [key for key in keys if keys.count(key) > 1]:
            op, ranks, ctas, path = twice[0]
            where = f" on path {path!r}" if path else ""
            raise ValueError(f"two tables of {op} among {ranks} ranks with {ctas} CTAs{where}; keep one")


class ContentionSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Slowdown beyond what SM slots, memory bandwidth and links explain: of compute beside communication and back.

    What fits may add: `comm_by_attention`, `comm_by_elementwise`: what these do to communication, if not what
    `comm_by_compute` says (0). `comm_stream_by_compute`: the same for that share of a collective which its bytes take
    at the table's best rate, where the links themselves are the limit; the others are then for what remains, the
    latency of its steps; 0: all alike. `per_ctas`: `*_by_comm` are those of a collective of so many CTAs, and in
    proportion with others; 0: the same with all. `by_traffic`: they are those of a collective that streams all the
    time, and others slow less, as the square of that share; and of attention and elementwise kernels it is what they
    spend on starting that is slowed, for what they stream shares the memory as it is. `comm_by_memory`: communication
    is slowed by computation that draws all of the memory's bandwidth, and hardly by what leaves much of it.
    """

    gemm_by_comm: Slowdown
    attention_by_comm: Slowdown
    elementwise_by_comm: Slowdown
    comm_by_compute: Slowdown
    comm_by_attention: NonNegative = 0.0
    comm_by_elementwise: NonNegative = 0.0
    comm_stream_by_compute: NonNegative = 0.0
    per_ctas: NonNegative = 0.0
    by_traffic: bool = False
    comm_by_memory: bool = False


class FitSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a node was fitted to. `measurements`: folders with the SHA-256 of their rows. `ranges`: where the fit holds,
    lowest and highest per coordinate. `digest`: of the node's numbers as the fit left them."""

    date: str
    gpu: str
    conditions: dict[str, str]
    measurements: dict[str, str]
    ranges: dict[str, tuple[float, float]]
    digest: str


class NodeSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A machine with several GPUs. `sources` names, for every number above, where it comes from.

    A source that starts with "estimate" says that nobody measured it; `estimates` lists those. `gemms`: shapes that
    were measured and take what they took; others take what the device's parameters say. `fit`: of a node that was
    fitted to measurements, which ones.
    """

    name: Annotated[str, Meta(min_length=1, max_length=100)]
    description: str
    num_gpus: Count
    device: DeviceSpec
    host: HostSpec
    link: LinkSpec
    contention: ContentionSpec
    sources: dict[str, str]
    gemms: tuple[GemmTable, ...] = ()
    fit: FitSpec | None = None

    def __post_init__(self) -> None:
        shapes = Counter((table.cols, table.inner, table.withheld_sms, table.is_piece) for table in self.gemms)
        if twice := [shape for shape, count in shapes.items() if count > 1]:
            cols, inner, withheld, _ = twice[0]
            raise ValueError(f"two GEMM tables of {cols} x {inner} with {withheld} SMs withheld; keep one")
        if (most := max(self.link.partitions)) >= self.device.num_sms:
            raise ValueError(f"a partition of {most} SMs leaves none of {self.device.num_sms} to compute")

    def in_series(self) -> NodeSpec:
        """The node as it runs one kernel or collective over and over: nothing is switched, nobody is waited for."""
        link = msgspec.structs.replace(self.link, join_us=0.0)
        return msgspec.structs.replace(self, device=self.device.with_switch(0.0), link=link)

    @property
    def estimates(self) -> tuple[str, ...]:
        """The numbers that nobody measured."""
        return tuple(key for key, source in self.sources.items() if source.lower().startswith("estimate"))

    @property
    def digest(self) -> str:
        """A hash of the contents, to tell nodes of the same name apart."""
        return hashlib.sha256(msgspec.json.encode(_without_defaults(self))).hexdigest()[:16]

    @property
    def numbers_digest(self) -> str:
        """A hash of the numbers alone: not of names, descriptions and sources."""
        contents = _without_defaults(self)
        sections = ("device", "host", "link", "contention", "gemms")
        numbers = {section: contents[section] for section in sections if section in contents}
        return hashlib.sha256(msgspec.json.encode(numbers)).hexdigest()[:16]


def _without_defaults(node: NodeSpec) -> dict[str, Any]:
    """A node's contents, without what came later and is not used."""
    contents: dict[str, Any] = msgspec.to_builtins(node)
    if node.fit is None:
        del contents["fit"]
    without_later(contents)
    return contents


def node_names() -> tuple[str, ...]:
    """The nodes that come with the program."""
    return tuple(sorted(path.stem for path in NODES.glob("*.toml")))


@lru_cache(maxsize=64)
def load_node(name_or_path: str) -> NodeSpec:
    """A node by name, or from a TOML file of the same form.

    Raises ValueError for an unknown name, a file that does not describe a node, or a number without a source.
    """
    path = NODES / f"{name_or_path}.toml"
    if not path.is_file():
        path = Path(name_or_path)
    if not path.is_file():
        raise ValueError(f"node {name_or_path!r} is neither a file nor one of: {', '.join(node_names())}")
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
        node = msgspec.convert(raw, NodeSpec)
    except (OSError, ValueError, RecursionError) as error:
        # Python's own words on a number of thousands of digits end in advice to programmers.
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error).partition("; use sys.")[0]
        raise ValueError(f"{path}: not a node file ({reason})") from None
    if missing := [key for key in _numbers(raw) if not any(key == k or key.startswith(k + ".") for k in node.sources)]:
        raise ValueError(f"{path}: no source is given for {missing[0]}; add it under [sources]")
    return node


def _numbers(raw: dict[str, Any]) -> list[str]:
    """Dotted names of everything numeric in a node file; a table of measurements is one name."""
    names = []
    for section in ("device", "host", "link", "contention"):
        for key, value in raw.get(section, {}).items():
            if key == "tables":
                names += [f"link.tables.{t['op']}.{t['ranks']}.{t['ctas']}{t.get('path', '')}" for t in value]
            elif not isinstance(value, str):
                names.append(f"{section}.{key}")
    return [*names, "gemms"] if raw.get("gemms") else names
