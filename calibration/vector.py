"""The simulator's solo costs for many kernels at once: `sim.cost` said again in numpy, equal to the last bit or so.

A fit asks for thousands of kernels hundreds of times; a test holds both statements together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.kernel import Kernel, Kind
from policy.batch import TICK_US
from sim.cost import MAX_SPLIT_WAVES, MIN_SPLIT_INNER, PARTIAL_BYTES, PIECE_TRAFFIC, SPLITS, memory_bandwidth
from sim.spec import DeviceSpec

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Gemms:
    """GEMMs as columns. `piece_bytes`: the result of a piece; below 0 for whole ones."""

    rows: Ints
    cols: Ints
    inner: Ints
    bytes_moved: Floats
    withheld: Ints
    piece_bytes: Floats

    @classmethod
    def of(cls, kernels: Sequence[Kernel], withheld: Sequence[int]) -> Gemms:
        """The columns of these kernels, each under its partition."""
        shapes = np.array([(k.rows, k.cols, k.inner) for k in kernels], dtype=np.int64).reshape(-1, 3)
        moved = np.array([k.bytes_moved for k in kernels], dtype=np.float64)
        piece = [float(k.element_bytes * k.rows * k.cols) if k.is_piece else -1.0 for k in kernels]
        columns = shapes[:, 0], shapes[:, 1], shapes[:, 2]
        return cls(*columns, moved, np.array(withheld, dtype=np.int64), np.array(piece))

    def some(self, which: NDArray[np.bool_] | Ints) -> Gemms:
        """Some of them."""
        shapes = self.rows[which], self.cols[which], self.inner[which]
        return Gemms(*shapes, self.bytes_moved[which], self.withheld[which], self.piece_bytes[which])


@dataclass(frozen=True, slots=True, eq=False)
class Others:
    """Attention or elementwise kernels as columns."""

    flops: Floats
    bytes_moved: Floats
    num_ctas: Ints
    withheld: Ints
    are_attention: bool

    @classmethod
    def of(cls, kernels: Sequence[Kernel], withheld: Sequence[int]) -> Others:
        """The columns of these kernels, which are all of one kind."""
        flops = np.array([k.flops for k in kernels], dtype=np.float64)
        moved = np.array([k.bytes_moved for k in kernels], dtype=np.float64)
        ctas = np.array([k.num_ctas for k in kernels], dtype=np.int64)
        return cls(flops, moved, ctas, np.array(withheld, dtype=np.int64), kernels[0].kind is Kind.ATTENTION)


@dataclass(frozen=True, slots=True, eq=False)
class _Shapes:
    """`sim.cost.Shape` as columns."""

    num_ctas: Ints
    cta_us: Floats
    cta_bytes: Floats
    lead_us: Floats
    overlap_order: float

    def some(self, which: Ints) -> _Shapes:
        """Some of them."""
        times = self.cta_us[which], self.cta_bytes[which], self.lead_us[which]
        return _Shapes(self.num_ctas[which], *times, self.overlap_order)


def others_us(
    points: Others, device: DeviceSpec, start_us: float, traffic: float, overlap_order: float = 1.0
) -> Floats:
    """Solo microseconds of kernels of one operation that starts and moves bytes so."""
    sm_flops = device.peak_tflops * 1e6 / device.num_sms
    cta_bytes = points.bytes_moved * traffic / points.num_ctas
    busy, order = np.zeros(len(cta_bytes)), 0.0
    if points.are_attention:
        busy = points.flops / points.num_ctas / (sm_flops * device.attention_efficiency) + device.attention_cta_us
        order = device.attention_overlap_order
    lead = start_us / -(-points.num_ctas // device.num_sms)
    if overlap_order != 1.0:
        busy, order, lead = lead, overlap_order, np.zeros(len(cta_bytes))
    cta_us = np.maximum(busy, cta_bytes / (device.sm_bandwidth_gb_s * 1e3))
    shapes = _Shapes(points.num_ctas, cta_us, cta_bytes, lead, order)
    return _alone_us(shapes, _slots(points.withheld, device), device)


def gemms_us(points: Gemms, device: DeviceSpec) -> Floats:
    """Solo microseconds, each of the tile and split that the library takes."""
    slots = _slots(points.withheld, device)
    width = slots if device.gemm_sees_partition else np.full_like(slots, device.num_sms)
    ways = _ways(points, device, width)
    every = points.some(ways.point)
    shapes = _gemm_shapes(every, ways, device, width[ways.point])
    us = _alone_us(shapes, width[ways.point], device)
    taken = _least(us, shapes.num_ctas, ways.first)
    if (slots == width).all():
        found: Floats = us[taken]
        return found
    return _alone_us(shapes.some(taken), slots, device)


@dataclass(frozen=True, slots=True, eq=False)
class _Ways:
    """Every tile and split that the library considers for each point, one point's after another's: the point's number,
    the tile's elements and share of the rate, how many tiles there are, and into how many parts the inner dimension is
    split. `first`: where each point's begin."""

    point: Ints
    area: Ints
    share: Floats
    tiles: Ints
    split: Ints
    first: Ints


def _ways(points: Gemms, device: DeviceSpec, width: Ints) -> _Ways:
    rows, cols, share = (np.array(column) for column in zip(*device.gemm_tiles, strict=True))
    split = np.array(SPLITS)
    tiles = -(-points.rows[:, None] // rows) * -(-points.cols[:, None] // cols)
    few = tiles[:, :, None] * split <= MAX_SPLIT_WAVES * width[:, None, None]
    long = points.inner[:, None] // split >= MIN_SPLIT_INNER
    point, tile, part = np.nonzero((few & long[:, None, :]) | (split == 1))
    first = np.searchsorted(point, np.arange(len(points.rows)))
    return _Ways(point, (rows * cols)[tile], share[tile], tiles[point, tile], split[part], first)


def _least(us: Floats, ctas: Ints, first: Ints) -> Ints:
    """Where the least of each group stands, of equal ones that with the fewest CTAs, of those the first."""
    sizes = np.diff(first, append=len(us))
    tied = us == np.repeat(np.minimum.reduceat(us, first), sizes)
    ctas = np.where(tied, ctas, np.iinfo(np.int64).max)
    tied = ctas == np.repeat(np.minimum.reduceat(ctas, first), sizes)
    found: Ints = np.minimum.reduceat(np.where(tied, np.arange(len(us)), len(us)), first)
    return found


def _slots(withheld: Ints, device: DeviceSpec) -> Ints:
    """`sim.cost.partition_sms` for many."""
    left, step = np.maximum(1, device.num_sms - withheld), device.partition_step
    if not step:
        return left
    return np.where(withheld > 0, np.minimum(device.num_sms, -(-left // step) * step), left)


def _gemm_shapes(points: Gemms, ways: _Ways, device: DeviceSpec, width: Ints) -> _Shapes:
    """Each point the way that stands beside it."""
    sm_flops = device.peak_tflops * 1e6 * device.gemm_efficiency / device.num_sms
    idle = device.ramp_us * memory_bandwidth(device)
    split, ctas = ways.split, ways.tiles * ways.split
    busy = 2.0 * ways.area * points.inner / split / (sm_flops * ways.share)
    partial = np.where(split == 1, 0.0, float(PARTIAL_BYTES) * points.rows * points.cols * split)
    moved = points.bytes_moved + partial
    alone = moved / ctas / (device.sm_bandwidth_gb_s * 1e3)
    filled = np.ones(len(ctas))
    if device.gemm_balance:
        even = np.minimum(width, device.gemm_wave_ctas or width)
        full, many = -(-ctas // even) * even, ctas > even
        filled[many] = (1.0 - device.gemm_balance + device.gemm_balance * ctas / full)[many]
        ctas = np.where(many, full, ctas)
    waves = -(-ctas // width)
    apart = device.piece_us + PIECE_TRAFFIC * points.piece_bytes / memory_bandwidth(device)
    is_dear = (points.piece_bytes >= 0.0) & bool(device.piece_us)
    lead = (np.where(is_dear, apart, 0.0) + np.where(split == 1, 0.0, device.split_us)) / waves
    cta_us = (device.cta_start_us + np.maximum(busy, alone)) * filled
    return _Shapes(ctas, cta_us, (moved + idle) / ctas, lead, device.gemm_overlap_order)


def _alone_us(shapes: _Shapes, slots: Ints, device: DeviceSpec) -> Floats:
    bandwidth = memory_bandwidth(device)
    waves, rest = np.divmod(shapes.num_ctas, slots)
    full = np.where(waves > 0, _up_to_grid(waves * _pace_us(shapes, slots, bandwidth)), 0.0)
    return full + np.where(rest > 0, _up_to_grid(_pace_us(shapes, rest, bandwidth)), 0.0)


def _pace_us(shapes: _Shapes, ctas: Ints, bandwidth: float) -> Floats:
    stream_us = ctas * shapes.cta_bytes / bandwidth
    longer = np.maximum(shapes.cta_us, stream_us)
    if shapes.overlap_order:
        ratio = np.minimum(shapes.cta_us, stream_us) / np.maximum(longer, 1e-300)
        longer = longer * (1.0 + ratio**shapes.overlap_order) ** (1.0 / shapes.overlap_order)
    return shapes.lead_us + longer


def _up_to_grid(times_us: Floats) -> Floats:
    return np.maximum(1.0, np.ceil(times_us / TICK_US)) * TICK_US
