"""Pictures that tell where errors of two batches come from: what was measured, errors by size, what a choice costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from calibration.compare import COMM_ALONE, COMPUTE_ALONE, POLICY, SERIAL
from calibration.validate import Validation
from calibration.validate_errors import Point
from calibration.validate_plots import FAINT, MARKS, new_figure
from calibration.validate_ranking import Cell, rankings
from calibration.validate_two_batches import ALONE, MAKESPAN

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Schedules = Mapping[str, Point]
Cells = Mapping[Cell, Schedules]
Series = Callable[[Schedules], float]
DRAWN = (COMPUTE_ALONE, COMM_ALONE, SERIAL, POLICY)


def draw_measured(validations: Sequence[Validation]) -> Figure:
    """What the hardware took, over the rows of a batch: what there is to hide, and how much of it was hidden."""
    figure, panels = _panels(validations, "Two batches on hardware, measured", "milliseconds for both batches")
    series: dict[str, Series] = {
        "one after the other": lambda s: s[SERIAL].measured / 1e3,
        "best schedule": lambda s: min(p.measured for name, p in s.items() if name not in ALONE) / 1e3,
        "all computation": lambda s: 2.0 * s[COMPUTE_ALONE].measured / 1e3,
        "all communication": lambda s: 2.0 * s[COMM_ALONE].measured / 1e3,
    }
    for axes, cells in panels:
        _curves(axes, cells, series)
        axes.set_yscale("log")
    return _finished(figure, panels[0][0])


def draw_errors(validations: Sequence[Validation]) -> Figure:
    """Signed error over the rows of a batch: of the parts alone, of one batch after the other, of the policy's plan."""
    target = MAKESPAN.typical or 0.0
    words = f"simulated time in % of the measured one, less 100; band: the aim for plans, {target:g} %"
    figure, panels = _panels(validations, "Where the error comes from", words)
    for axes, cells in panels:
        axes.axhspan(-target, target, color="#e7e7e7", linewidth=0, zorder=0)
        axes.axhline(0.0, color=FAINT, linewidth=0.9, zorder=1)
        _curves(axes, cells, {name: _error_of(name) for name in DRAWN})
    return _finished(figure, panels[0][0])


def draw_choices(validations: Sequence[Validation]) -> Figure:
    """How many times as fast as one batch after the other: the best schedule, and the one that the simulator takes."""
    figure, panels = _panels(
        validations, "Does it choose right?", "times as fast as one batch after the other; dashed: simulated"
    )
    for axes, cells in panels:
        chosen = {r.cell: r.chosen for r in rankings(cells)}
        best = {r.cell: r.best for r in rankings(cells)}
        axes.axhline(1.0, color=FAINT, linewidth=0.9)
        rows = [cell.rows for cell in cells]
        for number, (label, of) in enumerate({"best schedule": best, "the simulator's choice": chosen}.items()):
            marker, color = MARKS[number]
            gains = [s[SERIAL].measured / s[of[cell]].measured for cell, s in cells.items()]
            axes.plot(rows, gains, marker + "-", color=color, linewidth=1.4, markersize=5.5 - number, label=label)
        marker, color = MARKS[1]
        gains = [s[SERIAL].predicted / s[chosen[cell]].predicted for cell, s in cells.items()]
        axes.plot(rows, gains, marker, linestyle=(0, (4, 2)), color=color, markerfacecolor="none", markersize=5.5,
                  linewidth=1.1, label="the same, as simulated")  # fmt: skip
    return _finished(figure, panels[0][0])


def _error_of(name: str) -> Series:
    return lambda schedules: 100.0 * schedules[name].error


def _panels(
    validations: Sequence[Validation], title: str, subtitle: str
) -> tuple[Figure, list[tuple[Axes, dict[Cell, Schedules]]]]:
    """A panel per node and model, with the cells that have everything that is drawn."""
    parts = [
        (found.node.name, model, cells)
        for found in validations
        for model in dict.fromkeys(cell.model for cell in found.two_batches.cells)
        if (cells := _whole(found.two_batches.cells, model))
    ]
    if not parts:
        raise ValueError("no batches were timed both in parts and as a whole, so there is nothing to draw")
    width = 0.7 + 3.1 * len(parts)
    figure = new_figure(width, 3.6, title, subtitle)
    places = figure.subplots(1, len(parts), squeeze=False)[0]
    figure.subplots_adjust(left=0.52 / width, right=1 - 0.1 / width, top=0.74, bottom=0.13, wspace=0.2)
    for axes, (node, model, cells) in zip(places, parts, strict=True):
        axes.set_xscale("log", base=2)
        rows = [cell.rows for cell in cells]
        axes.set_xticks(rows, [str(number) for number in rows])
        axes.set_xlabel("rows of a batch")
        layers = next(iter(cells)).num_layers
        axes.set_title(f"{node}: {model} x {layers}", loc="left", fontsize=8.5)
    return figure, [(axes, cells) for axes, (_, _, cells) in zip(places, parts, strict=True)]


def _whole(cells: Cells, model: str) -> dict[Cell, Schedules]:
    """A model's cells of one source and depth, of those that have the most: points of two would make no curve."""
    groups: dict[tuple[str, int], list[Cell]] = {}
    for cell, found in cells.items():
        if cell.model == model and all(name in found for name in DRAWN):
            groups.setdefault((cell.source, cell.num_layers), []).append(cell)
    most = max(groups.values(), key=len, default=[])
    return {cell: cells[cell] for cell in sorted(most, key=lambda cell: cell.rows)}


def _curves(axes: Axes, cells: Cells, series: Mapping[str, Series]) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    for (marker, color), (label, value) in zip(MARKS, series.items(), strict=False):
        axes.plot([cell.rows for cell in cells], [value(schedules) for schedules in cells.values()], marker + "-",
                  color=color, linewidth=1.3, markersize=4.5, label=label)  # fmt: skip
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _finished(figure: Figure, first: Axes) -> Figure:
    from matplotlib.ticker import FuncFormatter

    for axes in figure.axes:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    handles, labels = first.get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=7.5, frameon=False, loc="upper right", ncols=2, bbox_to_anchor=(0.995, 1.0))
    return figure
