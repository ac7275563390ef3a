"""A picture per class: what was measured, and what the fitted node says."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.fit import CLASSES, DELAY, Fit, Residual
from traces.files import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Readable in grey: what the fit saw is light and round, what it did not see dark and square.
SEEN = {"marker": "o", "facecolors": "none", "edgecolors": "0.55", "linewidths": 0.8, "s": 16}
HELD_OUT = {"marker": "s", "facecolors": "#1f4e79", "edgecolors": "none", "s": 14}
BAND = 0.1
MANY = 1000
ALONG = {"gemm": ("rows", "rows"), "gemm: partition": ("rows", "rows"), "attention": ("flops", "operations"),
         "elementwise": ("bytes_moved", "bytes"), "sequence": ("rows", "rows"),
         "collective": ("bytes", "bytes")}  # fmt: skip


def write_plots(fit: Fit, folder: Path) -> list[Path]:
    """One PNG for every class that has rows; the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for kind in CLASSES:
        some = [r for r in fit.residuals if r.kind == kind]
        if some:
            path = folder / f"{kind.replace(': ', '-')}.png"
            write_whole(path, _picture(fit, kind, some))
            written.append(path)
    return written


def _picture(fit: Fit, kind: str, residuals: Sequence[Residual]) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _against(left, kind, residuals)
    _errors(right, kind, residuals)
    count = sum(r.is_held_out for r in residuals)
    figure.suptitle(f"{fit.node.name}, {kind}: {len(residuals)} points, {count} held out", fontsize=11)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    return content.getvalue()


def _against(axes: Axes, kind: str, residuals: Sequence[Residual]) -> None:
    """Predicted over measured, with the line of equality and a band around it."""
    is_delay, is_pair = kind == DELAY, kind.startswith("pair")
    values = [value for r in residuals for value in (r.measured, r.predicted) if value > 0.0]
    low, high = (0.0, max(values, default=1.0)) if is_delay else (min(values), max(values))
    ends = np.array([low, high])
    axes.plot(ends, ends, color="black", linewidth=0.8, label="equal")
    if not is_delay:
        axes.fill_between(ends, ends * (1 - BAND), ends * (1 + BAND), color="0.9", label=f"± {BAND:.0%}")
    if not is_delay:
        axes.set_xscale("log")
        axes.set_yscale("log")
    for held, style, label in ((False, SEEN, "seen by the fit"), (True, HELD_OUT, "held out")):
        some = [r for r in residuals if r.is_held_out == held]
        x, y = [r.measured for r in some], [r.predicted for r in some]
        axes.scatter(x, y, label=label, **_style(style, len(residuals)))
    unit = "slowdown" if is_pair and not is_delay else "µs"
    axes.set_xlabel(f"measured, {unit}")
    axes.set_ylabel(f"fitted node, {unit}")
    axes.legend(frameon=False, fontsize=8)


def _errors(axes: Axes, kind: str, residuals: Sequence[Residual]) -> None:
    """Errors along what the class varies most with."""
    key, label = ALONG.get(kind, ("bytes", "bytes of the message"))
    worth = 1.0 if kind == DELAY else 100.0
    for held, style in ((False, SEEN), (True, HELD_OUT)):
        some = [r for r in residuals if r.is_held_out == held]
        along = [float(r.row.at[key]) for r in some]
        axes.scatter(along, [worth * r.error for r in some], **_style(style, len(residuals)))
    axes.axhline(0.0, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlabel(label)
    axes.set_ylabel("error, µs" if kind == DELAY else "error, %")


def _style(style: dict[str, Any], count: int) -> Any:
    """Where there are many points they are small and let others shine through."""
    return style | {"alpha": 0.4, "s": 5} if count > MANY else style
