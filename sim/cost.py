"""How long a kernel takes on the simulated hardware when it is alone: CTAs, waves, bytes, collective tables."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

from models.kernel import Kernel, Kind, gemm
from policy.batch import TICK_US, on_grid
from sim.spec import ContentionSpec, DeviceSpec, GemmTable, NodeSpec, Table, between

DEFAULT_PATH = ""
# Tables of GEMMs are of half precision.
TABLE_BYTES = 2
# For which a rank waits until all are there.
COLLECTIVES = (Kind.ALL_REDUCE, Kind.ALL_GATHER)

# Into how many parts a GEMM's inner dimension may be cut, as long as a part keeps MIN_SPLIT_INNER and the CTAs are few.
SPLITS = (1, 2, 3, 4, 6, 8)
MIN_SPLIT_INNER = 256
MAX_SPLIT_WAVES = 4
# Memory traffic of partial sums, per element of the result and part. Writing and reading in single precision makes 8;
# 16 fits the measured GEMM tables better (see the nodes' source of gemm_tiles) and stands for the reduction as well.
PARTIAL_BYTES = 16
# Dynamic power goes with the cube of the clock: with the frequency, and the square of a voltage in proportion to it.
POWER_ORDER = 3.0
# The result of a piece is written once more and read once more than that of a whole GEMM, see `_apart_us`.
PIECE_TRAFFIC = 2


@dataclass(frozen=True, slots=True)
class Shape:
    """A compute kernel as CTAs: how many, how long one takes with memory to itself, and how many bytes it moves.

    `lead_us`: what every wave spends besides, neither computing nor moving bytes. `overlap_order`: see `pace_us`.
    `cluster`: how many CTAs need SMs side by side.
    """

    num_ctas: int
    cta_us: float
    cta_bytes: float
    lead_us: float = 0.0
    overlap_order: float = 0.0
    cluster: int = 1

    @property
    def is_plain(self) -> bool:
        """Whether a CTA streams all the time, and computes all the time beside it."""
        return not self.lead_us and not self.overlap_order

    def launched_as(self, ctas: int, sms: int, cluster: int = 1) -> Shape:
        """The same work in so many CTAs, on so many SMs."""
        each = -(-self.num_ctas // sms) / -(-ctas // sms)
        moved = self.num_ctas * self.cta_bytes / ctas
        return Shape(ctas, self.cta_us * each, moved, self.lead_us * each, self.overlap_order, cluster)

    def slower_to_start(self, factor: float) -> Shape:
        """The same CTAs, of an elementwise kernel or attention, whose start takes so many times as long."""
        if self.lead_us or not self.overlap_order:
            return Shape(self.num_ctas, self.cta_us, self.cta_bytes, self.lead_us * factor, self.overlap_order)
        return Shape(self.num_ctas, self.cta_us * factor, self.cta_bytes, 0.0, self.overlap_order)

    def slower(self, factor: float) -> Shape:
        """The same CTAs, every one of which takes so many times as long, whatever bounds it."""
        times = self.cta_us * factor, self.cta_bytes * factor, self.lead_us * factor
        return Shape(self.num_ctas, *times, self.overlap_order, self.cluster)

    def clocked(self, factor: float) -> Shape:
        """The same CTAs, whose arithmetic goes so many times as fast."""
        times = self.cta_us / factor, self.cta_bytes, self.lead_us
        return Shape(self.num_ctas, *times, self.overlap_order, self.cluster)

    def pace_us(self, ctas: int, bandwidth: float) -> float:
        """One wave of `ctas` CTAs that share `bandwidth` (bytes per microsecond): bound by their SMs or by memory.

        Of order p the two overlap imperfectly, (a^p + b^p)^(1/p); of order 0 perfectly, max(a, b).
        """
        stream_us = ctas * self.cta_bytes / bandwidth
        if not self.overlap_order:
            return self.lead_us + max(self.cta_us, stream_us)
        longer, shorter = max(self.cta_us, stream_us), min(self.cta_us, stream_us)
        together = longer * float((1.0 + (shorter / longer) ** self.overlap_order) ** (1.0 / self.overlap_order))
        return self.lead_us + together


def up_to_grid(time_us: float) -> float:
    """The first time on the grid that is not earlier; never nothing, so that time moves on."""
    ticks = -int(-time_us // TICK_US)
    return max(1, ticks) * TICK_US


def partition_sms(device: DeviceSpec, withheld_sms: int) -> int:
    """SMs that compute has where so many are withheld from it: partitions come in steps, rounded up."""
    left = max(1, device.num_sms - withheld_sms)
    step = device.partition_step
    return left if not step or not withheld_sms else min(device.num_sms, -(-left // step) * step)


def cta_shape(kernel: Kernel, device: DeviceSpec, withheld_sms: int = 0) -> Shape:
    """The CTAs of a compute kernel; for a GEMM, of the tile and split that finish first on the whole device, or on the
    SMs that it may use if the library knows of them."""
    return _cta_shape(kernel, device, withheld_sms if device.gemm_sees_partition else 0)


@cache
def _cta_shape(kernel: Kernel, device: DeviceSpec, withheld_sms: int) -> Shape:
    if kernel.kind is Kind.GEMM:
        width = partition_sms(device, withheld_sms)
        return min(_gemm_shapes(kernel, device, width), key=lambda s: (alone_us(s, width, device), s.num_ctas))
    start_us, traffic, overlap_order = _operation(kernel, device)
    sm_flops = device.peak_tflops * 1e6 / device.num_sms  # per microsecond
    per_cta_bytes = kernel.bytes_moved * traffic / kernel.num_ctas
    busy = kernel.flops / kernel.num_ctas / (sm_flops * device.attention_efficiency) + device.attention_cta_us
    order = device.attention_overlap_order
    lead = start_us / -(-kernel.num_ctas // device.num_sms)
    if kernel.kind is Kind.ELEMENTWISE:
        busy, order, lead = (0.0, 0.0, lead) if overlap_order == 1.0 else (lead, overlap_order, 0.0)
    cta_us = max(busy, per_cta_bytes / (device.sm_bandwidth_gb_s * 1e3))
    return Shape(kernel.num_ctas, cta_us, per_cta_bytes, lead, order)


def _operation(kernel: Kernel, device: DeviceSpec) -> tuple[float, float, float]:
    """Of attention or an elementwise kernel: start (us), bytes it really moves per byte of `bytes_moved`, and the order
    in which the two overlap."""
    named = [operation for operation in device.operations if operation.name == kernel.name]
    for variant in (kernel.variant, ""):
        for operation in named:
            if operation.variant == variant:
                return operation.start_us, operation.traffic, operation.overlap_order
    return device.attention_start_us if kernel.kind is Kind.ATTENTION else device.elementwise_start_us, 1.0, 1.0


def _gemm_shapes(kernel: Kernel, device: DeviceSpec, width: int) -> list[Shape]:
    """Every tile of the library, with the inner dimension split as far as it may help to fill `width` SMs."""
    sm_flops = device.peak_tflops * 1e6 * device.gemm_efficiency / device.num_sms
    # Until the first tiles have come, memory stands idle. That is charged as traffic: a wave that is bound by memory
    # would hide it otherwise, and it is what small GEMMs spend most of their time on.
    idle = device.ramp_us * memory_bandwidth(device)
    apart = _apart_us(kernel, device)
    shapes = []
    for tile_rows, tile_cols, share in device.gemm_tiles:
        tiles = -(-kernel.rows // tile_rows) * -(-kernel.cols // tile_cols)
        for split in SPLITS:
            ctas = tiles * split
            if split > 1 and (ctas > MAX_SPLIT_WAVES * width or kernel.inner // split < MIN_SPLIT_INNER):
                break
            busy = 2.0 * tile_rows * tile_cols * kernel.inner / split / (sm_flops * share)
            partial = 0.0 if split == 1 else float(PARTIAL_BYTES) * kernel.rows * kernel.cols * split
            moved = kernel.bytes_moved + partial
            alone = moved / ctas / (device.sm_bandwidth_gb_s * 1e3)
            ctas, filled = _evened(ctas, min(width, device.gemm_wave_ctas or width), device.gemm_balance)
            lead = (apart + (0.0 if split == 1 else device.split_us)) / -(-ctas // width)
            cta_us = (device.cta_start_us + max(busy, alone)) * filled
            shapes.append(Shape(ctas, cta_us, (moved + idle) / ctas, lead, device.gemm_overlap_order))
    return shapes


def _apart_us(kernel: Kernel, device: DeviceSpec) -> float:
    """What a piece of a GEMM takes before it starts: its bias is put into the result by a launch of its own, and read
    again by the GEMM."""
    if not kernel.is_piece or not device.piece_us:
        return 0.0
    result = float(PIECE_TRAFFIC * kernel.element_bytes * kernel.rows * kernel.cols)
    return device.piece_us + result / memory_bandwidth(device)


def _evened(ctas: int, width: int, balance: float) -> tuple[int, float]:
    """CTAs after the library has evened out the waves, and the share of a whole tile's time that each then takes.

    A library with tiles of many sizes, or one that cuts the last tiles, fills every wave: of 1.2 waves it makes two of
    0.6 tiles each (balance 1), not one and a fifth that lasts as long as two (balance 0).
    """
    if not balance or ctas <= width:
        return ctas, 1.0
    waves = -(-ctas // width)
    return waves * width, 1.0 - balance + balance * ctas / (waves * width)


def wave_us(shape: Shape, ctas: int, device: DeviceSpec) -> float:
    """One wave of `ctas` CTAs alone: bound by their SMs or by memory."""
    return up_to_grid(shape.pace_us(ctas, memory_bandwidth(device)))


def memory_bandwidth(device: DeviceSpec) -> float:
    """Achieved bytes per microsecond of the whole device."""
    return device.hbm_gb_s * device.hbm_efficiency * 1e3


def alone_us(shape: Shape, slots: int, device: DeviceSpec) -> float:
    """All waves of a compute kernel that has `slots` SMs to itself."""
    waves, rest = divmod(shape.num_ctas, slots)
    full = up_to_grid(waves * shape.pace_us(slots, memory_bandwidth(device))) if waves else 0.0
    return full + (wave_us(shape, rest, device) if rest else 0.0)


def clock_of(busy_us: float, rest_us: float, boost: float) -> float:
    """The clock where a GPU computes and rests for so long, over and over, as a multiple of that without rest; higher
    by the share `boost` at most."""
    if not busy_us or not rest_us:
        return 1.0
    return min(1.0 + boost, float(((busy_us + rest_us) / busy_us) ** (1.0 / POWER_ORDER)))


def slowed_compute(contention: ContentionSpec) -> dict[Kind, float]:
    """What communication costs compute of each kind, beyond SMs and memory."""
    return {
        Kind.GEMM: contention.gemm_by_comm,
        Kind.ATTENTION: contention.attention_by_comm,
        Kind.ELEMENTWISE: contention.elementwise_by_comm,
    }


def slowed_comm(contention: ContentionSpec) -> dict[Kind, float]:
    """What compute of each kind costs communication, beyond SMs and memory."""
    return {
        Kind.GEMM: contention.comm_by_compute,
        Kind.ATTENTION: contention.comm_by_attention or contention.comm_by_compute,
        Kind.ELEMENTWISE: contention.comm_by_elementwise or contention.comm_by_compute,
    }


def fair_share(wants: list[float], capacity: float) -> float:
    """The max-min fair share: who wants less gets what he wants, the others this much each."""
    if sum(wants) <= capacity:
        return float("inf") if len(wants) != 1 else capacity
    left, remaining = capacity, len(wants)
    for want in sorted(wants):
        share = left / remaining
        if want > share:
            return share
        left, remaining = left - want, remaining - 1
    return capacity


@cache
def lost_sms(gpcs: tuple[int, ...], taken: int, cluster: int) -> int:
    """SMs that clusters of so many CTAs cannot use where a collective's CTAs have taken some: each takes one of the GPC
    that has the most left, on a TPC (two SMs) of its own while there is one, and clusters lie within a GPC."""
    if cluster == 1 or not gpcs:
        return taken
    left = list(gpcs)
    for _ in range(taken):
        left[left.index(max(left))] -= 1
    whole = [max(0, size - 2 * (size - some)) for size, some in zip(gpcs, left, strict=True)]
    return sum(size // cluster * cluster for size in gpcs) - sum(size // cluster * cluster for size in whole)


class Costs:
    """Solo costs on one node, each computed once. Compute kernels never see more than the SMs that are not withheld."""

    def __init__(self, node: NodeSpec) -> None:
        self.node, self.device = node, node.device
        self._tables: dict[tuple[str, int, int, str], Table] = {
            (t.op, t.ranks, t.ctas, t.path): t for t in node.link.tables
        }
        self._alone: dict[tuple[Kernel, int, int, str], float] = {}
        self._gemms = {(t.cols, t.inner, t.withheld_sms, t.is_piece): t for t in node.gemms}
        self._shapes: dict[tuple[Kernel, int, float], Shape] = {}
        self._clocks: dict[tuple[int, int], tuple[tuple[Kernel, ...], float]] = {}
        self._fewer: dict[tuple[Kernel, int, str, int], float] = {}

    def shape(self, kernel: Kernel, withheld_sms: int = 0, clock: float = 1.0) -> Shape:
        """The CTAs of a compute kernel. Of a GEMM whose shape was measured they take together what it took, and are as
        many as were launched where that was seen; what share of them is memory the device's parameters say. `clock`: as
        a multiple of that of a series of the kernel."""
        key = (kernel, withheld_sms, clock)
        shape = self._shapes.get(key)
        if shape is None:
            shape = cta_shape(kernel, self.device, withheld_sms)
            if self._gemms and kernel.kind is Kind.GEMM and kernel.element_bytes == TABLE_BYTES:
                shape = self._measured(shape, kernel, withheld_sms)
            if kernel.kind is Kind.GEMM and clock != 1.0:
                shape = shape.clocked(clock)
            self._shapes[key] = shape
        return shape

    def clock(self, kernels: tuple[Kernel, ...], max_ctas: int = 0) -> float:
        """The clock in a range of kernels that has the device to itself, as a multiple of that of computation without
        rest: while its own collectives run the GPU rests, and what power that saves a higher clock may draw. `kernels`:
        known by identity, a slice that is kept."""
        if not self.device.rested_boost or len(kernels) == 1:
            return 1.0
        known = self._clocks.get((id(kernels), max_ctas))
        if known is None:
            us = [(self.solo_us(k, 0, max_ctas), k.kind in COLLECTIVES) for k in kernels]
            busy_us, rest_us = (sum(t for t, rests in us if rests is which) for which in (False, True))
            known = self._clocks[id(kernels), max_ctas] = kernels, clock_of(busy_us, rest_us, self.device.rested_boost)
        return known[1]

    def _measured(self, modelled: Shape, kernel: Kernel, withheld_sms: int) -> Shape:
        """A GEMM as it was launched and as long as it took: under this partition, or else on the whole device; at the
        nearest number of rows that the table reaches."""
        shape = kernel.cols, kernel.inner
        for withheld in dict.fromkeys((withheld_sms, 0)):
            if (table := self._gemms.get((*shape, withheld, kernel.is_piece))) is not None:
                rows = min(max(kernel.rows, table.rows[0]), table.rows[-1])
                like = kernel if rows == kernel.rows else replace(gemm("", rows, *shape), is_piece=kernel.is_piece)
                slots = partition_sms(self.device, withheld)
                there = self._launched(cta_shape(like, self.device, withheld), table, rows, slots)
                here = self._launched(modelled, table, rows, partition_sms(self.device, withheld_sms))
                return here.slower(table.at(rows) / alone_us(there, slots, self.device))
        return modelled

    def _launched(self, shape: Shape, table: GemmTable, rows: int, slots: int) -> Shape:
        """In the CTAs that the library launched, or the tiles that those take in turn. One for every SM and no more are
        not one a tile but as many as there are SMs, for all of it."""
        ctas = table.ctas_at(rows)
        if not ctas:
            return shape
        return shape.launched_as(slots if ctas == self.device.num_sms else ctas, slots, table.cluster_at(rows))

    def ctas_of(self, kernel: Kernel, max_ctas: int, path: str = DEFAULT_PATH) -> int:
        """SMs that a collective occupies."""
        return self.table(kernel, max_ctas, path).ctas_at(kernel.message_bytes)

    def table(self, kernel: Kernel, max_ctas: int, path: str) -> Table:
        """The table of an operation: the one with the most CTAs allowed (the usual one, if the node says
        which that is and no bound is given), on this path or else the default one.

        Raises ValueError if the node has none for the operation and number of ranks.
        """
        op = "send" if kernel.kind is Kind.RECV else kernel.kind.value
        for where in (path, DEFAULT_PATH):
            fitting = self._fitting(op, kernel.num_ranks, where)
            allowed = [t for t in fitting if not max_ctas or t.ctas <= max_ctas]
            usual = [t for t in allowed if t.ctas == self.node.link.default_ctas] if not max_ctas else []
            if allowed:
                return max(usual or allowed, key=lambda t: t.ctas)
            if fitting:
                return min(fitting, key=lambda t: t.ctas)
        raise ValueError(f"node {self.node.name} has no table for {op} among {kernel.num_ranks} ranks")

    def _fitting(self, op: str, ranks: int, path: str) -> list[Table]:
        """The tables of an operation, one for every number of CTAs."""
        return [t for t in self._tables.values() if (t.op, t.ranks, t.path) == (op, ranks, path)]

    def with_fewer(self, kernel: Kernel, max_ctas: int, path: str, held: int) -> float:
        """How much longer a collective takes whose CTAs are so few on SMs at a time, and the others follow them: as
        long as one of so many CTAs, read between the tables; of fewer than any table has, in proportion."""
        key = (kernel, max_ctas, path, held)
        factor = self._fewer.get(key)
        if factor is None:
            size, usual = kernel.message_bytes, self.table(kernel, max_ctas, path)
            known = {usual.ctas_at(size): usual.at(size)}
            for table in self._fitting(usual.op, usual.ranks, usual.path):
                known.setdefault(table.ctas_at(size), table.at(size))
            counts = sorted(count for count in known if count <= usual.ctas_at(size))
            if held < counts[0]:
                us = known[counts[0]] * counts[0] / held
            else:
                us = between(tuple(counts), tuple(known[count] for count in counts), held)
            factor = self._fewer[key] = max(1.0, us / usual.at(size))
        return factor

    def solo_us(self, kernel: Kernel, withheld_sms: int = 0, max_ctas: int = 0, path: str = DEFAULT_PATH) -> float:
        """Microseconds from the first CTA to the end, alone on the device and the links."""
        key = (kernel, withheld_sms, max_ctas, path)
        if (cost := self._alone.get(key)) is None:
            if kernel.is_communication:
                us = self.table(kernel, max_ctas, path).at(kernel.message_bytes)
                joins = kernel.kind in COLLECTIVES and not kernel.is_piece
                cost = up_to_grid(on_grid(us + self.node.link.join_us * joins))
            else:
                slots = partition_sms(self.device, withheld_sms)
                cost = alone_us(self.shape(kernel, withheld_sms), slots, self.device)
            self._alone[key] = cost
        return cost

    def beyond(self, kernel: Kernel) -> str:
        """What about a kernel lies outside of the node's tables and its fit, in words; empty if nothing does."""
        if kernel.is_communication and kernel.message_bytes > self.table(kernel, 0, DEFAULT_PATH).bytes[-1]:
            return f"{kernel.kind} of {kernel.message_bytes} bytes"
        ranges = self.node.fit.ranges if self.node.fit else {}
        for name, value in coordinates(kernel).items():
            low, high = ranges.get(name, (value, value))
            if not low <= value <= high:
                what = name.rpartition(".")[2]
                return f"{kernel.name} of {value:.6g} {what} (fitted from {low:.6g} to {high:.6g})"
        return ""


def coordinates(kernel: Kernel) -> dict[str, float]:
    """The coordinates of a kernel that a fit has ranges of, under the names that they have there."""
    if kernel.is_communication:
        op = Kind.SEND if kernel.kind is Kind.RECV else kernel.kind
        return {f"{op.value}.{kernel.num_ranks}.bytes": float(kernel.message_bytes)}
    if kernel.kind is Kind.GEMM:
        return {"gemm.rows": float(kernel.rows), "gemm.cols": float(kernel.cols), "gemm.inner": float(kernel.inner)}
    return {f"{kernel.kind.value}.bytes": kernel.bytes_moved}
