"""Forward passes without their collectives: what a kernel takes longer for following one of another kind.

A survey times each kernel in a series of its own. In a forward pass different kernels take turns, and each of them
starts later than in its series, by about as much for every one: code and constants have to be fetched, and what the one
before left in caches is of less use.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import replace
from math import sqrt

import numpy as np

from calibration.kernels import kernel_of, withheld_of
from calibration.solve import Estimate
from models.config import MODELS
from models.kernel import Kernel, Kind
from models.transformer import BatchShape, Layout, function_vector
from sim.cost import Costs
from sim.spec import NodeSpec
from traces.measurement import Measurement

NAME = "switch_us"
# A sum of many kernels is off by about so much, whatever the switches.
SUM_ERROR = 0.02
KERNELS = ("gemm", "attention", "elementwise")


def computes_of(row: Measurement) -> list[Kernel]:
    """The compute kernels of a sequence's row; none of a model that this program does not know."""
    at = row.at
    if str(at["model"]) not in MODELS:
        return []
    model = replace(MODELS[str(at["model"])], num_layers=int(at["num_layers"]))
    shape = BatchShape(int(at["rows"]) // int(at["length"]), int(at["length"]))
    vector = function_vector(model, shape, Layout(int(at["num_ranks"]), 1))
    return [kernel for kernel in vector.kernels if not kernel.is_communication]


def fit_switch(
    sequences: Sequence[Measurement], kernels: Iterable[Measurement], node: NodeSpec, base: float
) -> Estimate:
    """What is left of the sequences beside their kernels, per kernel, in microseconds; of kernels that were measured
    themselves the measured time counts, of others that of `node`, which is one in series. `base` where the data do not
    tell: without sequences, or if it is nothing beside its error."""
    rows = list(_beside_kernels(sequences, kernels, node))
    if len(rows) < 2:
        return Estimate(NAME, base, float("nan"), False, "too few forward passes were measured")
    total, parts, count = (np.array(column) for column in zip(*rows, strict=True))
    weight = count / (SUM_ERROR * total) ** 2
    value = float((weight * (total - parts)).sum() / (weight * count).sum())
    scatter = (total - parts - value * count) / (SUM_ERROR * total)
    expected = 1.0 / sqrt((weight * count).sum())
    error = expected * max(1.0, sqrt(float((scatter**2).sum()) / (len(rows) - 1)))
    if value < 2.0 * error:
        why = f"{value:.2g} us is within two standard errors ({error:.2g} us) of nothing"
        return Estimate(NAME, base, error, False, why)
    return Estimate(NAME, value, error, True, f"of {len(rows)} forward passes without collectives")


def sequence_us(costs: Costs, row: Measurement) -> float:
    """What a node says of a sequence; nothing of an unknown model."""
    gap = costs.device.graph_gap_us
    return sum(costs.solo_us(kernel) + gap for kernel in computes_of(row))


def _beside_kernels(
    sequences: Sequence[Measurement], kernels: Iterable[Measurement], node: NodeSpec
) -> Iterator[tuple[float, float, int]]:
    """Microseconds of a sequence, of its kernels in series of their own, and how many there are."""
    costs, gap = Costs(node), node.device.graph_gap_us
    known = {_identity(kernel_of(row)): row.values["us"] for row in kernels if _is_whole_device(row)}
    for row in sequences:
        if not (parts := computes_of(row)):
            continue
        each = [known.get(_identity(kernel)) or costs.solo_us(kernel) + gap for kernel in parts]
        yield row.values["us"], sum(each), len(parts)


def _is_whole_device(row: Measurement) -> bool:
    return row.what in KERNELS and not withheld_of(row)


def _identity(kernel: Kernel) -> Hashable:
    """The same for kernels that take equally long."""
    if kernel.kind is Kind.GEMM:
        return kernel.kind, kernel.rows, kernel.cols, kernel.inner
    return kernel.kind, kernel.name, kernel.variant, round(kernel.flops), round(kernel.bytes_moved)
