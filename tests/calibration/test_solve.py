"""The solver: known curves, honest errors, and parameters that the data cannot tell."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from calibration.solve import Floats, Parameter, Problem, bootstrapped, sigma_of, solve

SIZES = np.geomspace(1.0, 1e4, 40)
START, RATE = 5.0, 20.0


def problem(noise: float, seed: int, *, outliers: int = 0, groups: int = 40) -> Problem:
    """start + size / rate, in noise."""
    rng = np.random.default_rng(seed)
    measured = (START + SIZES / RATE) * np.exp(noise * rng.standard_normal(len(SIZES)))
    measured[:outliers] *= 3.0

    def log_ratio(values: dict[str, float]) -> Floats:
        return np.asarray(np.log((values["start"] + SIZES / values["rate"]) / measured))

    parameters = (Parameter("start", 1.0, 0.0, 100.0, 1.0, 0.2), Parameter("rate", 80.0, 0.1, 1e4, 80.0))
    return Problem(parameters, log_ratio, np.full(len(SIZES), 0.03), tuple(np.arange(len(SIZES)) % groups))


def test_errors_cover_the_truth() -> None:
    pulls = []
    for seed in range(40):
        solution = solve(problem(0.03, seed))
        for name, true in (("start", START), ("rate", RATE)):
            estimate = solution.estimates[name]
            assert estimate.is_determined
            pulls.append((estimate.value - true) / estimate.error)
    # Of a normal distribution, 0.3 % lie beyond 3; the spread is 1.
    assert np.mean(np.abs(pulls) > 3.0) < 0.05
    assert 0.7 < np.std(pulls) < 1.4


def test_outliers_do_not_rule() -> None:
    solution = solve(problem(0.01, 3, outliers=4))
    assert solution.values["rate"] == pytest.approx(RATE, rel=0.03)


def test_a_parameter_that_nothing_depends_on_stays_as_it_was() -> None:
    plain = problem(0.02, 1)
    extra = (*plain.parameters, Parameter("ghost", 7.0, 0.0, 100.0, 42.0))
    solution = solve(Problem(extra, plain.log_ratio, plain.sigma, plain.groups))
    ghost = solution.estimates["ghost"]
    assert (ghost.value, ghost.is_determined) == (42.0, False)
    assert "depends" in ghost.why
    assert solution.estimates["rate"].is_determined


def test_two_parameters_that_only_count_together() -> None:
    """Only a * b is seen, so one of them stays and the other takes the rest."""
    measured = np.full(30, 6.0) * np.exp(0.01 * np.random.default_rng(5).standard_normal(30))

    def log_ratio(values: dict[str, float]) -> Floats:
        return np.asarray(np.log(values["a"] * values["b"] / measured))

    both = (Parameter("a", 1.0, 0.1, 100.0, 2.0), Parameter("b", 1.0, 0.1, 100.0, 3.0))
    solution = solve(Problem(both, log_ratio, np.full(30, 0.03), tuple(range(30))))
    assert sum(e.is_determined for e in solution.estimates.values()) <= 1
    assert solution.values["a"] * solution.values["b"] == pytest.approx(6.0, rel=0.02)


def test_a_base_that_the_data_speak_against_is_not_kept() -> None:
    """Every cap above the largest size fits alike; the base is far below it."""
    measured = np.minimum(SIZES, 1e9)

    def log_ratio(values: dict[str, float]) -> Floats:
        return np.asarray(np.log(np.minimum(SIZES, values["cap"]) / measured))

    parameters = (Parameter("cap", 5e4, 1.0, 1e6, 10.0),)
    solution = solve(Problem(parameters, log_ratio, np.full(len(SIZES), 0.03), tuple(range(len(SIZES)))))
    estimate = solution.estimates["cap"]
    assert estimate.value > SIZES[-1]
    assert "one side" in estimate.why


def test_a_bootstrap_knows_that_rows_of_one_shape_err_together() -> None:
    """Four shapes of ten rows with an error each say less than forty rows."""
    shapes = np.arange(40) // 10
    shared = 0.1 * np.random.default_rng(7).standard_normal(4)[shapes]
    measured = 10.0 * np.exp(shared)

    def log_ratio(values: dict[str, float]) -> Floats:
        return np.asarray(np.log(values["level"] / measured))

    parameters = (Parameter("level", 5.0, 0.1, 100.0, 5.0),)
    one = Problem(parameters, log_ratio, np.full(40, 0.03), tuple(shapes))
    apart = replace(one, groups=tuple(range(40)))
    errors = [bootstrapped(p, solve(p), np.random.default_rng(0), 40).estimates["level"].error for p in (one, apart)]
    assert errors[0] > 2.0 * errors[1]


def test_noise_widens_what_is_allowed() -> None:
    still, noisy = sigma_of([10.0, 10.0], [0.0, 2.7])
    assert still == pytest.approx(0.03)
    assert noisy == pytest.approx(0.2, rel=0.02)
