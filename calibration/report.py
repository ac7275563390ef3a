"""What a fit found, as text and as plain data: errors by class, every parameter with its standard error, what the data
could not tell."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from math import isfinite
from typing import Any

import numpy as np

from calibration.fit import CLASSES, DELAY, Fit, Residual
from calibration.solve import Estimate

WIDTH = 110


def lines_of(fit: Fit) -> list[str]:
    """The report as text."""
    held = sum(r.is_held_out for r in fit.residuals)
    lines = [f"{fit.node.name}: fitted to {len(fit.residuals) - held} values, {held} held out by whole shapes", ""]
    lines += _error_table(fit)
    for section, estimates in fit.estimates.items():
        if estimates:
            lines += ["", f"{section + ' parameter':<34}{'value':>12}{'std. error':>12}"]
            lines += [line for estimate in estimates.values() for line in _parameter(estimate)]
    lines += ["", f"{'table':<34}{'sizes':>12}{'std. error':>12}"] if fit.tables else []
    for part in fit.tables:
        table = part.table
        name = f"{table.op}, {table.ranks} ranks, {table.ctas} CTAs"
        lines += _wrapped(f"{name:<34}{len(table.bytes):>12}{100.0 * part.error:>10.1f} %  ", part.note)
    return [*lines, "", *(line for note in fit.choices.values() for line in _wrapped("note: ", note))]


def data_of(fit: Fit) -> dict[str, Any]:
    """The report as data, with every residual."""
    return {
        "node": fit.node.name,
        "digest": fit.node.digest,
        "errors": {kind: summary(fit.residuals, kind) for kind in CLASSES if _some(fit.residuals, kind)},
        "parameters": {
            section: {name: _estimate(estimate) for name, estimate in estimates.items()}
            for section, estimates in fit.estimates.items()
        },
        "tables": [
            {"op": t.table.op, "ranks": t.table.ranks, "ctas": t.table.ctas, "standard_error": t.error, "note": t.note}
            for t in fit.tables
        ],
        "notes": list(fit.choices.values()),
        "residuals": [_residual(residual) for residual in fit.residuals],
    }


def _residual(residual: Residual) -> dict[str, Any]:
    return {"kind": residual.kind, "at": residual.row.at, "measured": residual.measured,
            "predicted": residual.predicted, "held_out": residual.is_held_out}  # fmt: skip


def summary(residuals: Sequence[Residual], kind: str) -> dict[str, dict[str, float]]:
    """Count, mean absolute and worst error of a class, seen by the fit and held out; shares, or microseconds of
    delays."""
    found = {}
    for name, held in (("seen", False), ("held_out", True)):
        errors = np.array([r.error for r in residuals if r.kind == kind and r.is_held_out == held])
        if len(errors):
            worst = float(errors[np.argmax(np.abs(errors))])
            found[name] = {"count": len(errors), "mean": float(np.abs(errors).mean()), "bias": float(errors.mean()),
                           "p90": float(np.percentile(np.abs(errors), 90.0)), "worst": worst}  # fmt: skip
    return found


def _error_table(fit: Fit) -> list[str]:
    head = f"{'rows':>7}{'error':>9}{'bias':>9}{'P90':>9}{'worst':>9}"
    lines = [f"{'':<16}{'seen by the fit':>43}{'held out':>43}", f"{'class':<16}{head}{head}"]
    for kind in CLASSES:
        if not _some(fit.residuals, kind):
            lines.append(f"{kind:<16}{'no rows':>7}")
            continue
        found = summary(fit.residuals, kind)
        lines.append(f"{kind:<16}" + "".join(_cells(found.get(name), kind) for name in ("seen", "held_out")))
    return lines


def _cells(found: dict[str, float] | None, kind: str) -> str:
    if found is None:
        return f"{'none':>7}{'':>36}"
    unit, worth = (" us", 1.0) if kind == DELAY else (" %", 100.0)
    numbers = (f"{worth * found[key]:.1f}{unit}" for key in ("mean", "bias", "p90", "worst"))
    return f"{found['count']:>7.0f}" + "".join(f"{number:>9}" for number in numbers)


def _parameter(estimate: Estimate) -> list[str]:
    error = f"{estimate.error:.2g}" if isfinite(estimate.error) else "-"
    if not estimate.is_determined:
        head = f"  {estimate.name:<32}{estimate.value:>12.5g}{'':>12}  "
        return _wrapped(head, f"not determined, stays as it was: {estimate.why}")
    return _wrapped(f"  {estimate.name:<32}{estimate.value:>12.5g}{error:>12}  ", estimate.why)


def _estimate(estimate: Estimate) -> dict[str, Any]:
    error = estimate.error if isfinite(estimate.error) else None
    return {"value": estimate.value, "standard_error": error, "determined": estimate.is_determined,
            "why": estimate.why}  # fmt: skip


def _some(residuals: Sequence[Residual], kind: str) -> bool:
    return any(r.kind == kind for r in residuals)


def _wrapped(head: str, text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=head, subsequent_indent=" " * len(head)) or [head.rstrip()]
