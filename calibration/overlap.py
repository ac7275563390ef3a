"""How well computing and memory traffic overlap, as fits see it: they search for the inverse of the spec's order, of
which 0 is the end where nothing changes any more."""

from __future__ import annotations

from dataclasses import replace

from calibration.solve import Estimate

OVERLAP = "inverse overlap order"
# Closer to perfect overlap than anything measured can tell; the spec says 0 for perfect.
LEAST_OVERLAP = 0.02


def inverse_of(order: float) -> float:
    """What a fit starts from."""
    return 1.0 / order if order else 0.0


def order_of(inverse: float) -> float:
    """What the spec says."""
    return 1.0 / inverse if inverse >= LEAST_OVERLAP else 0.0


def order_estimate(name: str, inverse: Estimate, order: float) -> Estimate:
    """The estimate under the name of the spec's order."""
    return replace(inverse, name=name, value=order, error=inverse.error * order**2)
