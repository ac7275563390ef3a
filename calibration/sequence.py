"""Whole forward passes: what a kernel takes longer for following one of another kind, and a collective for following
computation.

A survey times each kernel in a series of its own. In a forward pass different kernels take turns, and each of them
starts later than in its series, by about as much for every one: code and constants have to be fetched, and what the one
before left in caches is of less use. A collective also waits for the slowest rank, as it need not in a series.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import hypot, sqrt

import numpy as np
from scipy.optimize import least_squares

from calibration.holdout import UNMIXED
from calibration.kernels import forward_pass, kernel_of, withheld_of
from calibration.solve import Estimate, Floats
from models.config import MODELS
from models.kernel import Kernel, Kind
from models.transformer import ELEMENT_BYTES
from sim.cost import Costs, Shape, alone_us, clock_of
from sim.spec import DeviceSpec, NodeSpec
from traces.measurement import Coordinates, Measurement

SWITCH, JOIN, BOOST = "switch_us", "join_us", "rested_boost"
# A sum of many kernels is off by about so much, whatever the switches; what a node says of kernels that it was not
# fitted to, by so much more (GEMMs held out: 8 %); and so is what hangs on the clock of a GPU at its power limit, which
# another series of kernels leaves at another (of GLM-130B's passes with 128 and 512 rows the kernels alone take 7 and
# 4 % longer than the whole, with 16 and 64 rows, where memory is what counts, 3 % less).
SUM_ERROR, SAID_ERROR, CLOCK_ERROR = 0.01, 0.08, 0.05


def computes_of(row: Measurement) -> list[Kernel]:
    """The compute kernels of a sequence's row; none where `why_unknown` has a reason."""
    return [kernel for kernel in _kernels_of(row.at) if not kernel.is_communication]


def why_unknown(at: Coordinates) -> str:
    """Why the kernels of a model's pass are not known; empty if they are: of models that this program knows, in half
    precision, in which models are described."""
    if str(at["model"]) not in MODELS:
        return f"no model is known as {at['model']}"
    size = int(at.get("element_bytes", ELEMENT_BYTES))
    if size != ELEMENT_BYTES:
        return f"{at['model']} with elements of {size} bytes; models are described with {ELEMENT_BYTES}"
    return ""


def fit_switch(
    sequences: Sequence[Measurement], kernels: Iterable[Measurement], node: NodeSpec, base: float
) -> Estimate:
    """What is left of the sequences beside their kernels, per kernel, in microseconds; of kernels that were measured
    themselves the measured time counts, of others that of `node`, which is one in series. `base` where the data do not
    tell: without sequences, or if it is nothing beside its error."""
    return _each(SWITCH, list(_beside_kernels(sequences, kernels, node)), base, "forward passes without collectives")


def fit_serial(
    batches: Iterable[Measurement], node: NodeSpec, switch_us: float, base: tuple[float, float]
) -> tuple[Estimate, Estimate]:
    """What one forward pass after another takes beside its computation and its collectives alone: longer per
    collective, in microseconds, less a switch (`join_us`), and less for arithmetic whose GPU rests meanwhile
    (`rested_boost`, see `sim.cost.Costs.clock`). `base`: both where the data do not tell."""
    cells = list(_cells(batches, node))
    boost = _fit_boost(cells, switch_us, base[1])
    return _each(JOIN, [cell.rest(switch_us, boost.value) for cell in cells], base[0], FORWARDS), boost


def _fit_boost(cells: Sequence[Cell], switch_us: float, base: float) -> Estimate:
    """Of both unknowns at once the second, by robust least squares."""
    if len(cells) < 3:
        return Estimate(BOOST, base, float("nan"), False, f"too few {FORWARDS} were measured")

    def off(found: Floats) -> Floats:
        return _off([cell.rest(switch_us, found[1]) for cell in cells], found[0])

    # Times are on a grid, so differences are taken over more than a tick of it.
    bounds = ([-np.inf, 0.0], [np.inf, 1.0])
    found = least_squares(off, [0.0, 0.1], bounds=bounds, loss="soft_l1", x_scale=[1.0, 0.1], diff_step=[0.02, 0.02])
    scatter = 2.0 * found.cost / (len(cells) - 2)
    slopes: Floats = np.asarray(found.jac, dtype=float)
    normal = slopes.T @ slopes
    if np.linalg.matrix_rank(normal) < 2:
        return Estimate(BOOST, base, float("nan"), False, "collectives are too short for a GPU to rest")
    error = sqrt(float(np.linalg.inv(normal)[1, 1])) * max(1.0, sqrt(scatter))
    return _told(Estimate(BOOST, float(found.x[1]), error, True, f"of {len(cells)} {FORWARDS}"), base)


# Of a whole and of its parts, how many these are, and by how much they may be off.
Rest = tuple[float, float, int, float]
FORWARDS = "cells of forward passes and their parts alone"


@dataclass(frozen=True, slots=True)
class Cell:
    """One pass of two, one after the other: what it took, what its parts take alone, its collectives, by how much the
    parts may be off, and what it saves if arithmetic goes faster where the GPU rests, by that share."""

    whole_us: float
    parts_us: float
    count: int
    unsure_us: float
    saved_us: Callable[[float], float]

    def rest(self, switch_us: float, boost: float) -> Rest:
        """The whole, and its parts with their switches, on a GPU whose arithmetic may go so much faster."""
        parts_us = self.parts_us + switch_us * self.count - self.saved_us(boost)
        return self.whole_us, parts_us, self.count, self.unsure_us


def _off(rows: Sequence[Rest], each_us: float) -> Floats:
    """By how much of what they may be off wholes are longer than their parts and so much for each."""
    total, parts, count, unsure = (np.array(column) for column in zip(*rows, strict=True))
    shares: Floats = (total - parts - each_us * count) / np.hypot(SUM_ERROR * total, unsure)
    return shares


def _each(name: str, rows: list[Rest], base: float, what: str) -> Estimate:
    """What makes up the difference of a whole and its parts, by their count: robust least squares, a whole being known
    up to a share of itself. Wholes and parts that were measured at clocks some per cent apart are far off at once."""
    if len(rows) < 2:
        return Estimate(name, base, float("nan"), False, f"too few {what} were measured")

    def off(each: Floats) -> Floats:
        return _off(rows, each[0])

    found = least_squares(off, [0.0], loss="soft_l1")
    scatter = 2.0 * found.cost / (len(rows) - 1)
    error = float(1.0 / np.linalg.norm(np.asarray(found.jac)) * max(1.0, sqrt(scatter)))
    return _told(Estimate(name, float(found.x[0]), error, True, f"of {len(rows)} {what}"), base, " us")


def _told(found: Estimate, base: float, unit: str = "") -> Estimate:
    """The estimate, or the base where it is nothing beside its error."""
    if found.value < 2.0 * found.error:
        why = f"{found.value:.2g}{unit} is within two standard errors ({found.error:.2g}{unit}) of nothing"
        return Estimate(found.name, base, found.error, False, why)
    return found


def sequence_us(costs: Costs, row: Measurement) -> float:
    """What a node says of a sequence; 0 of one whose kernels are not known."""
    gap = costs.device.graph_gap_us
    return sum(costs.solo_us(kernel) + gap for kernel in computes_of(row))


def _beside_kernels(sequences: Sequence[Measurement], kernels: Iterable[Measurement], node: NodeSpec) -> Iterator[Rest]:
    """Microseconds of a sequence and of its kernels in series of their own."""
    costs, gap = Costs(node), node.device.graph_gap_us
    known = {_identity(kernel_of(row)): row.values["us"] for row in kernels if not withheld_of(row)}
    for row in sequences:
        if not (parts := computes_of(row)):
            continue
        said = sum(costs.solo_us(kernel) + gap for kernel in parts if _identity(kernel) not in known)
        measured = sum(known.get(_identity(kernel), 0.0) for kernel in parts)
        unsure = hypot(SAID_ERROR * said, CLOCK_ERROR * _clocked_us(parts, costs))
        yield row.values["us"], measured + said, len(parts), unsure


def _cells(batches: Iterable[Measurement], node: NodeSpec) -> Iterator[Cell]:
    """Those of which everything was timed: one pass of two, what it computes alone and what it communicates."""
    costs, cells = Costs(node), dict[tuple[str, ...], dict[str, Measurement]]()
    for row in batches:
        cell = tuple(str(row.at.get(key)) for key in ("model", "num_layers", "rows", "length", "num_ranks"))
        cells.setdefault(cell, {})[str(row.at["schedule"])] = row
    for rows in cells.values():
        if all(name in rows for name in UNMIXED):
            serial, compute, comm = (rows[name].values["us"] for name in UNMIXED)
            at = {"num_ranks": node.num_gpus} | rows[UNMIXED[0]].at
            kernels = _kernels_of(at)
            if count := sum(kernel.is_communication for kernel in kernels):
                unsure = CLOCK_ERROR * _clocked_us(kernels, costs)
                gemms = Counter(costs.shape(kernel) for kernel in kernels if kernel.kind is Kind.GEMM)
                saved = partial(_saved_us, gemms, costs.device, (compute, comm))
                yield Cell(serial / 2.0, compute + comm, count, unsure, saved)


def _saved_us(gemms: Counter[Shape], device: DeviceSpec, busy_and_rest_us: tuple[float, float], boost: float) -> float:
    """What so many of each GEMM save at the clock that so much rest allows, if it may rise by this share."""
    clock, slots = clock_of(*busy_and_rest_us, boost), device.num_sms
    return sum(
        number * (alone_us(shape, slots, device) - alone_us(shape.clocked(clock), slots, device))
        for shape, number in gemms.items()
    )


def _clocked_us(kernels: Iterable[Kernel], costs: Costs) -> float:
    """Microseconds of kernels that arithmetic bounds, not memory."""
    flops_per_byte = costs.device.peak_tflops * 1e3 / costs.device.hbm_gb_s
    return sum(costs.solo_us(kernel) for kernel in kernels if kernel.flops > flops_per_byte * kernel.bytes_moved)


def _kernels_of(at: Coordinates) -> tuple[Kernel, ...]:
    """Of a pass; none where `why_unknown` has a reason."""
    return () if why_unknown(at) else forward_pass(MODELS[str(at["model"])], at).kernels


def _identity(kernel: Kernel) -> Hashable:
    """The same for kernels that take equally long."""
    if kernel.kind is Kind.GEMM:
        return kernel.kind, kernel.rows, kernel.cols, kernel.inner, kernel.element_bytes, kernel.is_piece
    return kernel.kind, kernel.name, kernel.variant, round(kernel.flops), round(kernel.bytes_moved)
