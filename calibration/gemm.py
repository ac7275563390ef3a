"""Fitting what decides how long a GEMM takes: rates, tiles, waves, splits, memory, and what a partition does to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product

import msgspec
import numpy as np

from calibration.holdout import shape_identity
from calibration.kernels import kernel_of, withheld_of
from calibration.overlap import OVERLAP, inverse_of, order_estimate, order_of
from calibration.solve import (
    Estimate,
    Floats,
    Parameter,
    Problem,
    Solution,
    bootstrapped,
    cost_of,
    searched,
    sigma_of,
    solve,
)
from calibration.vector import Gemms, gemms_us
from sim.spec import DeviceSpec
from traces.measurement import Measurement

# Tiles of which GEMM libraries have had kernels for years, whatever the GPU.
COMMON_TILES = ((64, 64), (64, 128), (128, 64), (128, 128), (64, 256), (256, 64), (128, 256), (256, 128))
# What a parameter more must gain in robust cost (about twice the log likelihood), as in Akaike's criterion.
PENALTY = 2.0
BOOTSTRAP_ROUNDS = 12
# Under a partition a GEMM is as far off as its kernel is not the one that the model takes it to be: the last wave more
# or less. Such points say how partitions come, and little about rates.
PARTITION_ERROR, STEP_ERROR = 0.2, 0.05
STEPS, STEP = (0, 2, 4, 8, 16), 8
# The start of a fit is searched for among all values where there are not too many rows for that.
FEWEST_WHOLE, MOST_FOR_SEARCH, SEARCH_SEED = 20, 400, 1
KNOWN_US = 0.25  # a time per kernel that is known so well is known, even if it is nothing
KNOWN_SHARE = 0.1
MOST_OVERLAP = 0.7  # of 1 / gemm_overlap_order
ROW_LOSS, COL_LOSS = "tile row loss", "tile column loss"
Tiles = tuple[tuple[int, int, float], ...]


@dataclass(frozen=True, slots=True)
class GemmFit:
    """The device with its GEMM parameters fitted, and the estimates behind it. `library`: which tiles were taken.
    `partition`: what was found about partitions, in words."""

    device: DeviceSpec
    estimates: dict[str, Estimate]
    library: str
    partition: str


@dataclass(frozen=True, slots=True)
class _Library:
    """A family of tiles whose shares follow from parameters."""

    name: str
    parameters: tuple[Parameter, ...]
    tiles: Callable[[dict[str, float]], Tiles]


@dataclass(frozen=True, slots=True)
class _Candidate:
    """One way to model the library, fitted."""

    spec: DeviceSpec
    library: _Library
    problem: Problem
    solution: Solution

    @property
    def cost(self) -> float:
        """The robust cost, and what its parameters must be worth."""
        return self.solution.cost + PENALTY * sum(e.is_determined for e in self.solution.estimates.values())


def fit_gemms(rows: Sequence[Measurement], base: DeviceSpec, rng: np.random.Generator) -> GemmFit:
    """Fit to these rows (none held out). Which tiles, and what a partition does, is what fits best."""
    candidates, told = [], "no rows with withheld SMs"
    whole = [row for row in rows if not withheld_of(row)]
    for library in (_base_tiles(base), _common_tiles()):
        specs, start = [base], dict[str, float]()
        if len(whole) >= FEWEST_WHOLE and len(rows) <= MOST_FOR_SEARCH:
            problem = _problem(whole, base, library, {})
            start = searched(problem, SEARCH_SEED)
        if len(whole) < len(rows):
            values = start or {p.name: p.start for p in _problem(rows, base, library, {}).parameters}
            specs = [_partitioned(rows, base, library, values, sees) for sees in (False, True)]
        for spec in specs:
            problem = _problem(rows, spec, library, start)
            candidates.append(_Candidate(spec, library, problem, solve(problem)))
    best = min(candidates, key=lambda candidate: candidate.cost)
    if len(whole) < len(rows):
        other = msgspec.structs.replace(best.spec, gemm_sees_partition=not best.spec.gemm_sees_partition)
        cost = cost_of(_problem(rows, other, best.library, {}, STEP_ERROR), best.solution.values)
        taken = cost_of(_problem(rows, best.spec, best.library, {}, STEP_ERROR), best.solution.values)
        told = f"robust cost {taken:.0f}, the other way {cost:.0f}"
    solution = bootstrapped(best.problem, best.solution, rng, BOOTSTRAP_ROUNDS)
    device = _device(best.spec, best.library, solution.values)
    return GemmFit(device, _as_spec(solution.estimates, device), best.library.name, told)


def _partitioned(
    rows: Sequence[Measurement], base: DeviceSpec, library: _Library, values: dict[str, float], sees: bool
) -> DeviceSpec:
    """What a partition does, chosen among whole numbers: in which steps it comes, where the base does not know, and
    with how many CTAs the library fills a wave, which is what decides on which partitions it needs one wave more.
    `sees`: it sees partitions."""
    sms = base.num_sms
    most = {0, base.gemm_wave_ctas, *range(sms - sms // 4 // STEP * STEP, sms, STEP), sms // STEP * STEP}
    found: list[tuple[float, int, DeviceSpec]] = []
    steps = (base.partition_step,) if base.partition_step else STEPS  # GEMMs made for their SMs do not tell
    for step, ctas in product(steps, sorted(most)):
        spec = msgspec.structs.replace(base, gemm_sees_partition=sees, partition_step=step, gemm_wave_ctas=ctas)
        changes = (step != base.partition_step) + (ctas != base.gemm_wave_ctas)
        found.append(
            (cost_of(_problem(rows, spec, library, {}, STEP_ERROR), values) + PENALTY * changes, len(found), spec)
        )
    return min(found)[2]


def _problem(
    rows: Sequence[Measurement],
    base: DeviceSpec,
    library: _Library,
    start: dict[str, float],
    partition_error: float = PARTITION_ERROR,
) -> Problem:
    points = Gemms.of([kernel_of(row) for row in rows], [withheld_of(row) for row in rows])
    measured = np.array([row.values["us"] for row in rows])

    def log_ratio(values: dict[str, float]) -> Floats:
        device = _device(base, library, values)
        found: Floats = np.log((gemms_us(points, device) + base.graph_gap_us) / measured)
        return found

    sigma = sigma_of(measured.tolist(), [row.spread.get("us", 0.0) for row in rows])
    sigma = np.where(points.withheld > 0, np.hypot(sigma, partition_error), sigma)
    groups = tuple(shape_identity(row) for row in rows)
    pieces = _piece_parameters(base) if (points.piece_bytes >= 0.0).any() else ()
    parameters = tuple(
        replace(p, start=start.get(p.name, p.start)) for p in (*_common_parameters(base), *pieces, *library.parameters)
    )
    return Problem(parameters, log_ratio, sigma, groups, is_staircase=True)


def _common_parameters(base: DeviceSpec) -> tuple[Parameter, ...]:
    even = base.hbm_gb_s / base.num_sms
    overlap = inverse_of(base.gemm_overlap_order)
    one_sm, split, balance = base.sm_bandwidth_gb_s, base.split_us, base.gemm_balance
    return (
        Parameter("gemm_efficiency", base.gemm_efficiency, 0.05, 1.0, base.gemm_efficiency),
        Parameter("hbm_efficiency", base.hbm_efficiency, 0.05, 1.0, base.hbm_efficiency),
        Parameter("cta_start_us", max(base.cta_start_us, 0.3), 0.0, 10.0, base.cta_start_us, KNOWN_US),
        Parameter("ramp_us", max(base.ramp_us, 0.5), 0.0, 20.0, base.ramp_us, KNOWN_US),
        Parameter("sm_bandwidth_gb_s", max(3.0 * even, one_sm), 0.3 * even, max(5.0 * even, one_sm), one_sm),
        Parameter(OVERLAP, overlap or 0.25, 0.0, MOST_OVERLAP, overlap, KNOWN_SHARE),
        Parameter("gemm_balance", balance or 0.5, 0.0, 1.0, balance, KNOWN_SHARE),
        Parameter("split_us", split or 0.5, 0.0, 20.0, split, KNOWN_US),
    )


def _piece_parameters(base: DeviceSpec) -> tuple[Parameter, ...]:
    return (Parameter("piece_us", base.piece_us or 3.0, 0.0, 20.0, base.piece_us, KNOWN_US),)


def _device(base: DeviceSpec, library: _Library, values: dict[str, float]) -> DeviceSpec:
    return msgspec.structs.replace(
        base,
        gemm_efficiency=values["gemm_efficiency"],
        hbm_efficiency=values["hbm_efficiency"],
        cta_start_us=values["cta_start_us"],
        ramp_us=values["ramp_us"],
        sm_bandwidth_gb_s=values["sm_bandwidth_gb_s"],
        gemm_overlap_order=order_of(values[OVERLAP]),
        gemm_balance=values["gemm_balance"],
        split_us=values["split_us"],
        gemm_tiles=library.tiles(values),
        piece_us=values.get("piece_us", base.piece_us),
    )


def _base_tiles(base: DeviceSpec) -> _Library:
    """The node's own tiles. Shares of all but the fastest are fitted, the same for both ways round of a tile."""
    keys = [f"share {max(r, c)}x{min(r, c)}" for r, c, _ in base.gemm_tiles]
    shares = {key: share for key, (_, _, share) in zip(keys, base.gemm_tiles, strict=True)}
    fastest = max(shares, key=lambda key: shares[key])
    parameters = tuple(Parameter(k, min(s, 0.99), 0.02, 1.0, s) for k, s in shares.items() if k != fastest)

    def tiles(values: dict[str, float]) -> Tiles:
        found = shares | {p.name: values[p.name] for p in parameters}
        return tuple((r, c, found[key]) for key, (r, c, _) in zip(keys, base.gemm_tiles, strict=True))

    return _Library("the base node's tiles", parameters, tiles)


def _common_tiles() -> _Library:
    """Common tiles. Each loses time on its edges: it loads rows + columns for rows x columns of results."""
    parameters = tuple(Parameter(name, 15.0, 0.0, 100.0, 0.0, 4.0) for name in (ROW_LOSS, COL_LOSS))

    def tiles(values: dict[str, float]) -> Tiles:
        rate = [1.0 / (1.0 + values[ROW_LOSS] / r + values[COL_LOSS] / c) for r, c in COMMON_TILES]
        return tuple((r, c, share / max(rate)) for (r, c), share in zip(COMMON_TILES, rate, strict=True))

    return _Library("common tiles, share 1 / (1 + row loss / rows + column loss / columns)", parameters, tiles)


def _as_spec(estimates: dict[str, Estimate], device: DeviceSpec) -> dict[str, Estimate]:
    """The estimates under the names of the spec; errors of tile shares go to `gemm_tiles` as a whole."""
    found, tiles = {}, []
    for name, estimate in estimates.items():
        if name == OVERLAP:
            found["gemm_overlap_order"] = order_estimate("gemm_overlap_order", estimate, device.gemm_overlap_order)
        elif name.startswith(("share ", "tile ")):
            tiles.append(estimate)
        else:
            found[name] = estimate
    for estimate in tiles:
        found[f"gemm_tiles: {estimate.name}"] = estimate
    return found
