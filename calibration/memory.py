"""Fitting attention and elementwise kernels: what they take at least, what they move, how fast attention computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

import msgspec
import numpy as np

from calibration.holdout import shape_identity
from calibration.kernels import kernel_of, label_of, withheld_of
from calibration.overlap import LEAST_OVERLAP, OVERLAP, inverse_of, order_estimate, order_of
from calibration.solve import Estimate, Floats, Parameter, Problem, sigma_of, solve
from calibration.vector import Others, others_us
from sim.spec import DeviceSpec, OperationSpec
from traces.measurement import Coordinates, Measurement

KNOWN_US, KNOWN_CTA_US, KNOWN_SHARE = 0.25, 0.1, 0.1
EFFICIENCY, PER_CTA, ORDER = "attention_efficiency", "attention_cta_us", "attention_overlap_order"
# A kernel may be many launches, or move every operand several times; beyond this something else is wrong.
MOST_START_US, LEAST_TRAFFIC, MOST_TRAFFIC = 1e4, 0.05, 50.0
# How much lower the robust cost must be for a number more: three standard errors of it.
CLEARLY = 4.5


@dataclass(frozen=True, slots=True)
class OthersFit:
    """The device with attention or elementwise kernels fitted, and the estimates behind it."""

    device: DeviceSpec
    estimates: dict[str, Estimate]


def fit_elementwise(rows: Sequence[Measurement], base: DeviceSpec) -> OthersFit:
    """Start and traffic of every name that was measured, and how they overlap where that explains its rows clearly
    better than one after the other; the start of the others is taken to be their median."""
    device, estimates = base, dict[str, Estimate]()
    names = sorted({label_of(row.at) for row in rows})
    for name in names:
        some = [row for row in rows if label_of(row.at) == name]
        in_turn, cost_in_turn = _fit_names(some, [name], device, ())
        fit, cost = _fit_names(some, [name], device, (), overlap=True)
        inverse, label = fit.estimates.pop(f"{name} {OVERLAP}"), f"{name} overlap order"
        if cost_in_turn < cost + CLEARLY or not inverse.is_determined:
            fit = in_turn
            inverse = replace(inverse, value=1.0, is_determined=False, why="one after the other fits as well")
        fit.estimates[label] = order_estimate(label, inverse, order_of(inverse.value))
        device, estimates = fit.device, estimates | fit.estimates
    device, typical = _typical_start(device, estimates, names, "elementwise_start_us")
    return OthersFit(device, estimates | typical)


def fit_attention(rows: Sequence[Measurement], base: DeviceSpec) -> OthersFit:
    """What all attention kernels share, and start and traffic of every name."""
    names = sorted({label_of(row.at) for row in rows})
    value, per_cta = base.attention_efficiency, base.attention_cta_us
    overlap = inverse_of(base.attention_overlap_order)
    shared = (
        Parameter(EFFICIENCY, value, 1e-3, 1.0, value),
        Parameter(PER_CTA, per_cta or 0.5, 0.0, MOST_START_US, per_cta, KNOWN_CTA_US),
        Parameter(OVERLAP, overlap or 0.5, 0.0, 1.0, overlap, KNOWN_SHARE),
    )
    fit, _ = _fit_names(rows, names, base, shared)
    device, typical = _typical_start(fit.device, fit.estimates, names, "attention_start_us")
    estimates, inverse = fit.estimates | typical, fit.estimates[OVERLAP]
    del estimates[OVERLAP]
    estimates[ORDER] = order_estimate(ORDER, inverse, device.attention_overlap_order)
    return OthersFit(device, estimates)


def _fit_names(
    rows: Sequence[Measurement],
    names: Sequence[str],
    base: DeviceSpec,
    shared: tuple[Parameter, ...],
    *,
    overlap: bool = False,
) -> tuple[OthersFit, float]:
    """The fit and its robust cost; `overlap`: with how start and traffic overlap."""
    known = {operation.label: operation for operation in base.operations}
    parameters = list(shared)
    for name in names:
        before = known.get(name, OperationSpec(name=name, start_us=_start_of(base, rows)))
        # The shortest of them is little more than its start.
        start = 0.8 * min(row.values["us"] for row in rows if label_of(row.at) == name)
        traffic = before.traffic
        parameters.append(Parameter(f"{name} start_us", start, 0.0, MOST_START_US, before.start_us, KNOWN_US))
        parameters.append(Parameter(f"{name} traffic", traffic, LEAST_TRAFFIC, MOST_TRAFFIC, traffic))
        if overlap:
            inverse = inverse_of(before.overlap_order)
            parameters.append(Parameter(f"{name} {OVERLAP}", 0.5, LEAST_OVERLAP, 1.0, inverse, KNOWN_SHARE))
    parts = []
    for name in names:
        some = [row for row in rows if label_of(row.at) == name]
        points = Others.of([kernel_of(row) for row in some], [withheld_of(row) for row in some])
        parts.append((name, points, np.array([row.values["us"] for row in some])))

    def log_ratio(values: dict[str, float]) -> Floats:
        device = _shared(base, values)
        found = []
        for n, p, us in parts:
            order = order_of(values.get(f"{n} {OVERLAP}", 1.0))
            said = others_us(p, device, values[f"{n} start_us"], values[f"{n} traffic"], order) + base.graph_gap_us
            found.append(np.log(said / us))
        joined: Floats = np.concatenate(found)
        return joined

    ordered = [row for name in names for row in rows if label_of(row.at) == name]
    sigma = sigma_of([row.values["us"] for row in ordered], [row.spread.get("us", 0.0) for row in ordered])
    groups = tuple(shape_identity(row) for row in ordered)
    solution = solve(Problem(tuple(parameters), log_ratio, sigma, groups, is_staircase=True))
    estimates = dict(solution.estimates)
    measured = {label_of(row.at): row.at for row in rows}
    return OthersFit(_with_operations(base, measured, estimates), estimates), solution.cost


def _with_operations(
    base: DeviceSpec, measured: Mapping[str, Coordinates], estimates: dict[str, Estimate]
) -> DeviceSpec:
    """The device with the operations of which something was determined; `measured`: where each was, by label."""
    operations = {operation.label: operation for operation in base.operations}
    for label, at in measured.items():
        start, traffic = estimates[f"{label} start_us"], estimates[f"{label} traffic"]
        inverse = estimates.get(f"{label} {OVERLAP}")
        if any(estimate.is_determined for estimate in (start, traffic, inverse) if estimate is not None):
            operations[label] = OperationSpec(
                name=str(at["name"]),
                variant=str(at.get("variant", "")),
                start_us=start.value,
                traffic=traffic.value,
                overlap_order=order_of(inverse.value) if inverse is not None else 1.0,
            )
    shared = _shared(base, {name: estimate.value for name, estimate in estimates.items()})
    return msgspec.structs.replace(shared, operations=tuple(operations.values()))


def _shared(base: DeviceSpec, values: dict[str, float]) -> DeviceSpec:
    """The device with what all attention kernels share; as it is if that is not among the values."""
    if EFFICIENCY not in values:
        return base
    order = order_of(values[OVERLAP])
    return msgspec.structs.replace(
        base, attention_efficiency=values[EFFICIENCY], attention_cta_us=values[PER_CTA], attention_overlap_order=order
    )


def _typical_start(
    device: DeviceSpec, estimates: dict[str, Estimate], names: Sequence[str], field: str
) -> tuple[DeviceSpec, dict[str, Estimate]]:
    """What kernels of other names take at least: the median of those that were measured, as uncertain as they vary."""
    starts = [e.value for name in names if (e := estimates[f"{name} start_us"]).is_determined]
    if not starts:
        return device, {field: Estimate(field, getattr(device, field), float("nan"), False, "no start was determined")}
    middle = median(starts)
    error = float(np.std(starts, ddof=1)) if len(starts) > 1 else estimates[f"{names[0]} start_us"].error
    return msgspec.structs.replace(device, **{field: middle}), {field: Estimate(field, middle, error, True)}


def _start_of(base: DeviceSpec, rows: Sequence[Measurement]) -> float:
    return base.attention_start_us if rows[0].what == "attention" else base.elementwise_start_us
