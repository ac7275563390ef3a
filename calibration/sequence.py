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

import msgspec
import numpy as np
from scipy.optimize import least_squares

from calibration.holdout import UNMIXED
from calibration.kernels import forward_pass, kernel_of, withheld_of
from calibration.solve import Estimate, Floats
from models.config import MODELS
from models.kernel import Kernel, Kind
from models.transformer import ELEMENT_BYTES
from sim.cost import Costs, alone_us, clock_of
from sim.spec import NodeSpec
from traces.measurement import Coordinates, Measurement

SWITCH, JOIN, BOOST = "switch_us", "join_us", "rested_boost"
# A sum of many kernels is off by about so much, whatever the switches; what a node says of kernels that it was not
# fitted to, by so much more (GEMMs held out: 8 %); and so is what hangs on the clock of a GPU at its power limit, which
# another series of kernels leaves at another (of GLM-130B's passes with 128 and 512 rows the kernels alone take 7 and
# 4 % longer than the whole, with 16 and 64 rows, where memory is what counts, 3 % less).
SUM_ERROR, SAID_ERROR, CLOCK_ERROR = 0.01, 0.08, 0.05


def computes_of(row: Measurement) -> list[Kernel]:
    """The compute kernels of a sequence's row; none of a model that this program does not know."""
    return [kernel for kernel in _kernels_of(row.at) if not kernel.is_communication]


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
    rows = [
        (c.whole_us, c.parts_us + switch_us * c.count - c.saved_us(boost.value), c.count, c.unsure_us) for c in cells
    ]
    return _each(JOIN, rows, base[0], FORWARDS), boost


def _fit_boost(cells: Sequence[Cell], switch_us: float, base: float) -> Estimate:
    """Of both unknowns at once the second, by robust least squares."""
    if len(cells) < 3:
        return Estimate(BOOST, base, float("nan"), False, f"too few {FORWARDS} were measured")

    def off(found: Floats) -> Floats:
        said = [c.parts_us + (switch_us + found[0]) * c.count - c.saved_us(found[1]) for c in cells]
        shares: Floats = np.array([(c.whole_us - us) / c.known_up_to_us for c, us in zip(cells, said, strict=True)])
        return shares

    # Times are on a grid, so differences are taken over more than a tick of it.
    bounds = ([-np.inf, 0.0], [np.inf, 1.0])
    found = least_squares(off, [0.0, 0.1], bounds=bounds, loss="soft_l1", x_scale=[1.0, 0.1], diff_step=[0.02, 0.02])
    value, scatter = float(found.x[1]), 2.0 * found.cost / (len(cells) - 2)
    slopes: Floats = np.asarray(found.jac, dtype=float)
    normal = slopes.T @ slopes
    if np.linalg.matrix_rank(normal) < 2:
        return Estimate(BOOST, base, float("nan"), False, "collectives are too short for a GPU to rest")
    error = sqrt(float(np.linalg.inv(normal)[1, 1])) * max(1.0, sqrt(scatter))
    if value < 2.0 * error:
        why = f"{value:.2g} is within two standard errors ({error:.2g}) of nothing"
        return Estimate(BOOST, base, error, False, why)
    return Estimate(BOOST, value, error, True, f"of {len(cells)} {FORWARDS}")


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

    @property
    def known_up_to_us(self) -> float:
        """By how much whole and parts may be off together."""
        return hypot(SUM_ERROR * self.whole_us, self.unsure_us)


def _each(name: str, rows: list[Rest], base: float, what: str) -> Estimate:
    """What makes up the difference of a whole and its parts, by their count: robust least squares, a whole being known
    up to a share of itself. Wholes and parts that were measured at clocks some per cent apart are far off at once."""
    if len(rows) < 2:
        return Estimate(name, base, float("nan"), False, f"too few {what} were measured")
    total, parts, count, unsure = (np.array(column) for column in zip(*rows, strict=True))
    known_up_to = np.hypot(SUM_ERROR * total, unsure)

    def off(each: Floats) -> Floats:
        shares: Floats = (total - parts - each[0] * count) / known_up_to
        return shares

    found = least_squares(off, [0.0], loss="soft_l1")
    value, scatter = float(found.x[0]), 2.0 * found.cost / (len(rows) - 1)
    error = float(1.0 / np.linalg.norm(np.asarray(found.jac)) * max(1.0, sqrt(scatter)))
    if value < 2.0 * error:
        why = f"{value:.2g} us is within two standard errors ({error:.2g} us) of nothing"
        return Estimate(name, base, error, False, why)
    return Estimate(name, value, error, True, f"of {len(rows)} {what}")


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
                saved = partial(_saved_us, kernels, costs, (compute, comm))
                yield Cell(serial / 2.0, compute + comm, count, unsure, saved)


def _saved_us(kernels: Sequence[Kernel], costs: Costs, busy_and_rest_us: tuple[float, float], boost: float) -> float:
    """What GEMMs save at the clock that so much rest allows, if it may rise by this share."""
    device = msgspec.structs.replace(costs.device, rested_boost=boost)
    clock = clock_of(*busy_and_rest_us, device)
    saved = 0.0
    for kernel, number in Counter(kernel for kernel in kernels if kernel.kind is Kind.GEMM).items():
        before, after = (alone_us(costs.shape(kernel, 0, each), device.num_sms, device) for each in (1.0, clock))
        saved += number * (before - after)
    return saved


def _clocked_us(kernels: Iterable[Kernel], costs: Costs) -> float:
    """Microseconds of kernels that arithmetic bounds, not memory."""
    flops_per_byte = costs.device.peak_tflops * 1e3 / costs.device.hbm_gb_s
    return sum(costs.solo_us(kernel) for kernel in kernels if kernel.flops > flops_per_byte * kernel.bytes_moved)


def _kernels_of(at: Coordinates) -> tuple[Kernel, ...]:
    """Of a model that is known, in half precision, in which models are described; otherwise none."""
    if str(at["model"]) not in MODELS or int(at.get("element_bytes", ELEMENT_BYTES)) != ELEMENT_BYTES:
        return ()
    return forward_pass(MODELS[str(at["model"])], at).kernels


def _identity(kernel: Kernel) -> Hashable:
    """The same for kernels that take equally long."""
    if kernel.kind is Kind.GEMM:
        return kernel.kind, kernel.rows, kernel.cols, kernel.inner, kernel.element_bytes, kernel.is_piece
    return kernel.kind, kernel.name, kernel.variant, round(kernel.flops), round(kernel.bytes_moved)
