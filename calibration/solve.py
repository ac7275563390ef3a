"""Robust least squares on logarithms of times, with honest errors: what the data cannot determine is left alone.

Residuals are log(model / measured) over how far off a good model may be. Rows of one shape err together, so standard
errors are those of whole shapes (clustered), or of a bootstrap over whole shapes where the model is a staircase.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import differential_evolution, least_squares, minimize
from scipy.stats import chi2

Floats = NDArray[np.float64]
# A point of a good model is off by so much even if it was measured perfectly; keeps exact points from ruling the fit.
MODEL_ERROR = 0.03
# A parameter with a larger standard error (share of its value) is not determined.
LARGEST_ERROR = 0.5
# Parameters at their bases must cost more than at their best, for the data to speak against the bases: a likelihood
# ratio beyond this quantile.
CONFIDENCE = 0.99
# Steps of the staircase are stepped over by wide differences first.
WIDE, MIDDLE, NARROW = 3e-2, 1e-2, 1e-4
POLISH = 50  # evaluations a parameter
GENERATIONS, POPULATION = 80, 4
FEW_STEPS = 12
LEAST_VARIANCE = 0.01


@dataclass(frozen=True, slots=True)
class Parameter:
    """A number to fit, between `low` and `high`, from `start`. `base`: what it stays at if the data cannot tell.
    `small`: an error of so much is small enough whatever the value, so that nothing can be known to be nothing."""

    name: str
    start: float
    low: float
    high: float
    base: float
    small: float = 0.0


@dataclass(frozen=True, slots=True)
class Estimate:
    """A fitted number with its standard error, or a number that could not be determined, which stayed as it was."""

    name: str
    value: float
    error: float
    is_determined: bool
    why: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """`log_ratio(values)`: log(model / measured) of every point for parameters by name. `sigma`: how far off each may
    be. `groups`: the shape of each. `is_staircase`: the model has steps or kinks in its parameters. `is_dear`: a look
    takes long, so that there must be few."""

    parameters: tuple[Parameter, ...]
    log_ratio: Callable[[dict[str, float]], Floats]
    sigma: Floats
    groups: tuple[Hashable, ...]
    is_staircase: bool = False
    is_dear: bool = False


@dataclass(frozen=True, slots=True)
class Solution:
    """All estimates by name, and the robust cost at them."""

    estimates: dict[str, Estimate]
    cost: float

    @property
    def values(self) -> dict[str, float]:
        """The numbers alone."""
        return {name: estimate.value for name, estimate in self.estimates.items()}


def sigma_of(values: Sequence[float], spreads: Sequence[float]) -> Floats:
    """How far off points may be, from their interquartile ranges (1.35 standard deviations of a normal one)."""
    noise: Floats = np.asarray(spreads, dtype=float) / 1.35 / np.asarray(values, dtype=float)
    found: Floats = np.sqrt(MODEL_ERROR**2 + noise**2)
    return found


def solve(problem: Problem) -> Solution:
    """Fit; what turns out not to be determined goes back to its base and the rest is fitted again. Errors are those of
    the Jacobian."""
    free = list(problem.parameters)
    settled: dict[str, Estimate] = {}
    theta = _minimum(problem, free, {})
    lowest, dropped = _cost_at(problem, free, {}, theta), 0
    while True:
        fixed = {name: estimate.value for name, estimate in settled.items()}
        errors = _clustered_errors(problem, free, fixed, theta)
        worst = _least_determined(free, theta, errors)
        if worst is None:
            break
        place, why = worst
        lost, value = free.pop(place), float(theta[place])
        rest = np.delete(theta, place)
        at_base = _minimum(problem, free, fixed | {lost.name: lost.base}, rest)
        # All that went back to their bases together must not fit worse than chance allows, or the model loses by steps.
        loss = _cost_at(problem, free, fixed | {lost.name: lost.base}, at_base) - lowest
        if loss > float(chi2.ppf(CONFIDENCE, dropped + 1)):
            told = f"only bounded on one side: {lost.base:.4g}, what it was, fits worse; values near {value:.4g} alike"
            settled[lost.name], theta = Estimate(lost.name, value, float("nan"), True, told), rest
        else:
            settled[lost.name], theta = Estimate(lost.name, lost.base, float("nan"), False, why), at_base
            dropped += 1
    for parameter, value, error in zip(free, theta.tolist(), errors.tolist(), strict=True):
        settled[parameter.name] = Estimate(parameter.name, value, error, True)
    ordered = {p.name: settled[p.name] for p in problem.parameters}
    return Solution(ordered, _cost(_scaled(problem, {name: e.value for name, e in ordered.items()})))


def searched(problem: Problem, seed: int) -> dict[str, float]:
    """Values near the lowest minimum of a rugged problem, looked for everywhere between the parameters' bounds."""
    names = [p.name for p in problem.parameters]
    bounds: Any = [(p.low, p.high) for p in problem.parameters]
    start = np.array([min(max(p.start, p.low), p.high) for p in problem.parameters])

    def cost(theta: Floats) -> float:
        return cost_of(problem, dict(zip(names, theta.tolist(), strict=True)))

    options: Any = {"maxiter": GENERATIONS, "popsize": POPULATION, "seed": seed, "x0": start, "polish": False}
    found = differential_evolution(cost, bounds, **options)
    low, high = (np.array(side) for side in zip(*bounds, strict=True))
    polished = minimize(cost, found.x, method="Nelder-Mead", bounds=bounds, options={"maxfev": POLISH * len(names)})
    best = np.clip(polished.x if polished.fun < found.fun else found.x, low, high)
    return dict(zip(names, best.tolist(), strict=True))


def cost_of(problem: Problem, values: dict[str, float]) -> float:
    """The robust cost of these values."""
    return _cost(_scaled(problem, values))


def bootstrapped(problem: Problem, solution: Solution, rng: np.random.Generator, rounds: int) -> Solution:
    """The same solution with the larger of two errors: the Jacobian's, and that over whole shapes drawn again."""
    fixed = {name: e.value for name, e in solution.estimates.items() if not np.isfinite(e.error)}
    free = [p for p in problem.parameters if p.name not in fixed]
    if not free:
        return solution
    theta = np.array([solution.estimates[p.name].value for p in free])
    groups = _numbers(problem.groups)
    count = int(groups.max()) + 1
    found = []
    for _ in range(rounds):
        # Drawing a shape twice is weighing it twice.
        drawn = np.bincount(rng.integers(0, count, count), minlength=count)[groups]
        sigma = problem.sigma / np.sqrt(np.maximum(drawn, 1e-12))
        found.append(_minimum(replace(problem, sigma=sigma), free, fixed, theta))
    errors = dict(zip((p.name for p in free), np.std(np.stack(found), axis=0, ddof=1).tolist(), strict=True))
    widened = {
        name: replace(e, error=max(e.error, errors[name])) if name in errors else e
        for name, e in solution.estimates.items()
    }
    return Solution(widened, solution.cost)


def _scaled(problem: Problem, values: dict[str, float]) -> Floats:
    """Residuals in units of how far off each may be."""
    return problem.log_ratio(values) / problem.sigma


def _cost(scaled: Floats) -> float:
    """The soft L1 loss: squares near nothing, straight far away, so that outliers do not rule."""
    return float((2.0 * (np.sqrt(1.0 + scaled * scaled) - 1.0)).sum())


def _cost_at(problem: Problem, free: list[Parameter], fixed: dict[str, float], theta: Floats) -> float:
    return _cost(_scaled(problem, fixed | dict(zip((p.name for p in free), theta.tolist(), strict=True))))


def _minimum(problem: Problem, free: list[Parameter], fixed: dict[str, float], start: Floats | None = None) -> Floats:
    """The free parameters at the least robust cost; from `start`, if given, in a few steps."""
    if not free:
        return np.zeros(0)
    low, high = np.array([p.low for p in free]), np.array([p.high for p in free])
    scale = np.array([max(abs(p.start), abs(p.base), p.small, 1e-6) for p in free])
    names = [p.name for p in free]

    def residuals(unit: Floats) -> Floats:
        theta = np.clip(unit * scale, low, high)
        return _scaled(problem, fixed | dict(zip(names, theta.tolist(), strict=True)))

    best = np.clip(np.array([p.start for p in free]) if start is None else start, low, high) / scale
    lowest = _cost(residuals(best))
    room = np.maximum((high - low) / scale, 1e-9)
    steps = (WIDE, MIDDLE, NARROW) if start is None and not problem.is_dear else (MIDDLE,)
    for step in steps if problem.is_staircase else (NARROW,):
        inside = np.clip(best, low / scale + 1e-6 * room, high / scale - 1e-6 * room)
        found = least_squares(
            residuals, inside, bounds=(low / scale, high / scale), loss="soft_l1", diff_step=np.full(len(free), step),
            max_nfev=FEW_STEPS if problem.is_staircase else None,
        )  # fmt: skip
        if (cost := _cost(residuals(found.x))) < lowest:
            best, lowest = found.x, cost
    if problem.is_staircase and start is None and not problem.is_dear:
        corners = best + np.diag(np.where(best * scale + 0.08 * scale < high, 0.08, -0.08))
        options: Any = {"maxfev": POLISH * len(free), "initial_simplex": np.vstack([best, corners])}

        def cost_of(unit: Any) -> float:
            return _cost(residuals(unit))

        polished = minimize(cost_of, np.asarray(best).ravel(), method="Nelder-Mead", options=options)
        best = polished.x if polished.fun < lowest else best
    clipped: Floats = np.clip(best * scale, low, high)
    return clipped


def _clustered_errors(problem: Problem, free: list[Parameter], fixed: dict[str, float], theta: Floats) -> Floats:
    """Standard errors from the Jacobian, with whole shapes as the units that err independently (a sandwich)."""
    if not free:
        return np.zeros(0)
    step = MIDDLE if problem.is_staircase else NARROW
    columns, values = [], fixed | {p.name: float(t) for p, t in zip(free, theta, strict=True)}
    here = _scaled(problem, values)
    for place, parameter in enumerate(free):
        width = step * max(abs(theta[place]), abs(parameter.base), parameter.small, 1e-6)
        ends = [min(parameter.high, theta[place] + width), max(parameter.low, theta[place] - width)]
        sides = [_scaled(problem, values | {parameter.name: end}) for end in ends]
        columns.append((sides[0] - sides[1]) / max(ends[0] - ends[1], 1e-300))
    jacobian = np.stack(columns, axis=1)
    weight = 1.0 / np.sqrt(1.0 + here * here)
    # Columns of one size, so that a singular direction is told by its singular value.
    size = np.sqrt((weight[:, None] * jacobian**2).sum(axis=0))
    dead = size < 1e-9
    scaled = jacobian / np.where(dead, 1.0, size)
    bread = np.linalg.pinv(scaled.T @ (weight[:, None] * scaled), rcond=1e-10)
    groups = _numbers(problem.groups)
    scores = np.zeros((groups.max() + 1, len(free)))
    np.add.at(scores, groups, (weight * here)[:, None] * scaled)
    count = len(scores)
    meat = scores.T @ scores * (count / max(1, count - len(free)))
    # A few shapes may agree by chance: errors are at least those of rows that all err independently, and a perfect fit
    # is not believed to be one.
    variance = max(LEAST_VARIANCE, float((weight * here * here).sum()) / max(1, len(here) - len(free)))
    independent = np.clip(np.diag(bread), 0.0, None) * variance
    clustered = np.clip(np.diag(bread @ meat @ bread), 0.0, None)
    errors: Floats = np.sqrt(np.maximum(clustered, independent)) / np.where(dead, 1.0, size)
    errors[dead | _singular(scaled, weight)] = np.inf
    return errors


def _singular(scaled: Floats, weight: Floats) -> NDArray[np.bool_]:
    """Parameters in a direction along which nothing changes."""
    _, values, rows = np.linalg.svd(np.sqrt(weight)[:, None] * scaled, full_matrices=False)
    flat = rows[values < 1e-4 * max(values.max(), 1e-300)]
    loose: NDArray[np.bool_] = (np.abs(flat) > 0.3).any(axis=0)
    if len(weight) < scaled.shape[1]:
        loose |= True
    return loose


def _least_determined(free: list[Parameter], theta: Floats, errors: Floats) -> tuple[int, str] | None:
    """The place of the parameter that the data tell least of, if it is too little, and why it is."""
    worst, reason, most = None, "", 1.0
    for place, (parameter, value, error) in enumerate(zip(free, theta.tolist(), errors.tolist(), strict=True)):
        allowed = max(LARGEST_ERROR * abs(value), parameter.small)
        excess, why = error / max(allowed, 1e-300), f"standard error {error:.3g} of {value:.3g}"
        if not np.isfinite(error):
            excess, why = np.inf, "nothing that was measured depends on it alone"
        if excess > most:
            worst, reason, most = place, why, excess
    return None if worst is None else (worst, reason)


def _numbers(groups: Sequence[Hashable]) -> NDArray[np.int64]:
    """Groups as numbers from 0."""
    order: dict[Hashable, int] = {}
    return np.array([order.setdefault(group, len(order)) for group in groups], dtype=np.int64)
