"""Pictures of a validation: predicted over measured, latency over throughput, two timelines. Legible in grey."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.validate import Validation
from calibration.validate_errors import Point
from calibration.validate_kernels import COMM_SIDE, COMPUTE_SIDE
from calibration.validate_serving import Group
from calibration.validate_timeline import Stretch
from calibration.validate_two_batches import ALONE, kind_of
from traces.files import write_whole
from traces.timeline import Span

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, SECOND, FAINT = "#222222", "#555555", "#8a8a8a"
BAND = 0.1
# Told apart by marker and by lightness, and by colour where there is any.
MARKS = (("o", "#12355b"), ("^", "#c1440e"), ("s", "#7aa6c2"), ("D", "#e3a857"), ("v", "#6a3d9a"), ("P", "#3f8f5f"),
         ("X", "#8a8a8a"), ("*", "#111111"))  # fmt: skip
POLICY_MARKS = {"tensor": MARKS[0], "interleaved": MARKS[1], "pipeline": MARKS[2], "hybrid": MARKS[3]}
BATCH_TONES = ("#2f4b6e", "#efa66f", "#b8c4cf", "#7d5a3c", "#e6dccf")
LANES = ("compute", "communicate")
RC: Any = {
    "font.size": 8.5, "axes.spines.right": False, "axes.spines.top": False, "axes.linewidth": 0.8,
    "axes.edgecolor": SECOND, "axes.labelcolor": INK, "xtick.color": "#444444", "ytick.color": "#444444",
    "savefig.dpi": 160, "svg.hashsalt": "weft",
}  # fmt: skip
PERCENTILES = ("p50", "p90", "p99")
Panel = Mapping[str, Sequence[Point]]


def write_pictures(found: Validation, folder: Path) -> list[Path]:
    """Every picture that there is something for, as PNG. The same validation gives the same bytes."""
    import matplotlib

    written = []
    with matplotlib.rc_context(RC):
        for name, figure in pictures(found).items():
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", metadata={"Software": None})
            write_whole(folder / f"{name}.png", buffer.getvalue())
            written.append(folder / f"{name}.png")
    return written


def pictures(found: Validation) -> dict[str, Figure]:
    """The figures by name."""
    figures = {"predicted": draw_points(found)}
    if found.serving.groups.get("arrivals"):
        figures["latency"] = draw_latency(found.serving.groups["arrivals"], found.node.name)
    for number, stretch in enumerate(found.stretches):
        figures["timeline" if len(found.stretches) == 1 else f"timeline-{number}"] = draw_timeline(stretch)
    return figures


def new_figure(width: float, height: float, title: str, subtitle: str) -> Figure:
    """An empty figure with what it shows, and under which conditions."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    figure.text(0.012, 1.0 - 0.12 / height, title, va="top", fontsize=11.5, fontweight="bold", color=INK)
    figure.text(0.012, 1.0 - 0.37 / height, subtitle, va="top", fontsize=8, color=SECOND)
    return figure


# -- predicted over measured ----------------------------------------------------------------------------------------


def panels_of(found: Validation) -> dict[str, Panel]:
    """What is drawn together: kernels, pairs, two batches, serving latencies; each with its classes."""
    panels: dict[str, Panel] = {}
    if found.kernels.points:
        panels["single kernels (us)"] = found.kernels.points
    slowdowns = {side: found.pairs.points[side] for side in (COMPUTE_SIDE, COMM_SIDE) if side in found.pairs.points}
    if slowdowns:
        panels["pairs: slowdown"] = slowdowns
    kinds: dict[str, list[Point]] = {}
    for schedules in found.two_batches.cells.values():
        for name, point in schedules.items():
            if name not in ALONE:
                in_ms = Point(point.level, point.label, point.measured / 1e3, point.predicted / 1e3)
                kinds.setdefault(kind_of(name), []).append(in_ms)
    if kinds:
        panels["two batches: makespan (ms)"] = kinds
    served: dict[str, list[Point]] = {}
    for group in found.serving.groups.get("arrivals", ()):
        points = [group.point("", f"{p}_e2el_ms") for p in PERCENTILES]
        served.setdefault(group.runs[0].run.policy, []).extend(points)
    if served:
        panels["serving: P50, P90, P99 latency (ms)"] = served
    return panels


def draw_points(found: Validation) -> Figure:
    """Predicted over measured, a panel a level; the line is a perfect prediction, the band 10 % around it."""
    panels = panels_of(found)
    width = 0.6 + 3.4 * max(2, len(panels))
    subtitle = "simulated over measured; line: equal, band: within 10 %"
    figure = new_figure(width, 4.4, f"{found.node.name}: simulated against hardware", subtitle)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    figure.subplots_adjust(left=0.62 / width, right=1 - 0.12 / width, top=0.8, bottom=0.125, wspace=0.24)
    for place, (name, panel) in zip(axes, panels.items(), strict=True):
        _scatter(place, name, panel)
    axes[0].set_ylabel("simulated")
    return figure


def _scatter(axes: Axes, name: str, panel: Panel) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    values = [v for points in panel.values() for p in points for v in (p.measured, p.predicted)]
    low, high = 0.85 * min(values), 1.18 * max(values)
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), aspect="equal")
    axes.fill_between([low, high], [low * (1 - BAND), high * (1 - BAND)], [low * (1 + BAND), high * (1 + BAND)],
                      color="#e7e7e7", linewidth=0, zorder=0)  # fmt: skip
    axes.plot([low, high], [low, high], color=FAINT, linewidth=0.9, zorder=1)
    for (marker, color), (label, points) in zip(_cycled(len(panel)), panel.items(), strict=True):
        x, y = [p.measured for p in points], [p.predicted for p in points]
        axes.scatter(x, y, s=17, marker=marker, color=color, edgecolor="white", linewidth=0.35, label=label, zorder=2)
    steps = (1, 1.2, 1.5, 2, 3, 5, 7) if high / low < 12 else (1, 2, 5) if high / low < 300 else (1,)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(base=10, subs=steps))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("measured")
    axes.set_title(name, loc="left", fontsize=9)
    axes.legend(fontsize=6.8, frameon=False, loc="upper left", handletextpad=0.1, borderaxespad=0.1, labelspacing=0.3)


def _cycled(count: int) -> list[tuple[str, str]]:
    return [MARKS[number % len(MARKS)] for number in range(count)]


# -- latency over throughput ----------------------------------------------------------------------------------------


def draw_latency(groups: Sequence[Group], node: str) -> Figure:
    """Measured (filled, whole line) and simulated (hollow, dashed) latency over throughput, a row per model."""
    models = list(dict.fromkeys(_model(group) for group in groups))
    height = 1.0 + 2.7 * len(models)
    subtitle = (
        "filled, whole line: measured; hollow, dashed: simulated from the same arrivals; a joint per offered rate"
    )
    figure = new_figure(9.6, height, f"{node}: latency over throughput, simulated against hardware", subtitle)
    rows = figure.subplots(len(models), len(PERCENTILES), squeeze=False)
    figure.subplots_adjust(left=0.07, right=0.985, top=1 - 0.85 / height, bottom=0.5 / height, wspace=0.22, hspace=0.4)
    for model, places in zip(models, rows, strict=True):
        own = [group for group in groups if _model(group) == model]
        for place, percentile in zip(places, PERCENTILES, strict=True):
            _latency_panel(place, own, percentile)
            place.set_title(f"{model}: {percentile.upper()} (ms)", loc="left", fontsize=8.5)
    for place in rows[-1]:
        place.set_xlabel("throughput (requests/s)")
    # A model may not be served by every policy; each is named once, above the panels.
    named = {
        label: line for place in rows[:, 0] for line, label in zip(*place.get_legend_handles_labels(), strict=True)
    }
    figure.legend(named.values(), named.keys(), fontsize=7.5, frameon=False, loc="upper right", ncols=2,
                  handlelength=2.6, bbox_to_anchor=(0.99, 1.0))  # fmt: skip
    return figure


def _model(group: Group) -> str:
    model = group.runs[0].run.model
    return f"{model.model_id} x {model.num_layers}"


def _latency_panel(axes: Axes, groups: Sequence[Group], percentile: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    curves: dict[str, list[tuple[Point, Point]]] = {}
    for group in sorted(groups, key=lambda g: g.runs[0].saved.request_rate):
        pair = group.point("", "request_throughput"), group.point("", f"{percentile}_e2el_ms")
        curves.setdefault(_policy(group), []).append(pair)
    others = iter(MARKS[4:] * len(curves))
    for label, pairs in curves.items():
        marker, color = POLICY_MARKS.get(label.partition(" ")[0]) or next(others)
        axes.plot([x.measured for x, _ in pairs], [y.measured for _, y in pairs], marker + "-", color=color,
                  linewidth=1.5, markersize=5, label=label)  # fmt: skip
        axes.plot([x.predicted for x, _ in pairs], [y.predicted for _, y in pairs], marker, color=color, markersize=6.5,
                  linestyle=(0, (4, 2)), linewidth=1.1, markerfacecolor="none")  # fmt: skip
    axes.set_yscale("log")
    bottom, top = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 1.5, 2, 3, 5, 7) if top / bottom < 30 else (1, 3)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(0.0, 1.06 * max(x for pairs in curves.values() for p, _ in pairs for x in (p.measured, p.predicted)))


def _policy(group: Group) -> str:
    run = group.runs[0].run
    return f"{run.policy} (TP{run.layout.tp} x PP{run.layout.pp})"


# -- timelines ------------------------------------------------------------------------------------------------------


def draw_timeline(stretch: Stretch) -> Figure:
    """A batch in the middle of a run and what ran beside it: measured above, simulated below, per lane."""
    figure = new_figure(9.6, 3.5, f"{stretch.label}: one batch, measured and simulated",
                     "the same batches admitted; one tone per batch, hatched: communication; from the batch's first "
                     "kernel to its end")  # fmt: skip
    axes = figure.subplots()
    figure.subplots_adjust(left=0.19, right=0.985, top=0.8, bottom=0.14)
    ids = sorted({s.batch_id for part in (stretch.measured, stretch.simulated) for s in part})
    tones = {batch: BATCH_TONES[(batch - stretch.batch_id) % len(BATCH_TONES)] for batch in ids}
    rows = [(lane, who) for lane in LANES for who in ("measured", "simulated")]
    for row, (lane, who) in enumerate(rows):
        spans = stretch.measured if who == "measured" else stretch.simulated
        height = row + (0.35 if row >= len(rows) // 2 else 0.0)
        axes.axhspan(height - 0.42, height + 0.42, color="#f4f4f4", zorder=0)
        _bars(
            axes, [s for s in spans if s.is_communication == (lane == "communicate")], height, tones, stretch.length_us
        )
    heights = [row + (0.35 if row >= len(rows) // 2 else 0.0) for row in range(len(rows))]
    for who, spans, dashes in (("measured", stretch.measured, "-"), ("simulated", stretch.simulated, (0, (4, 2)))):
        end = max(s.end_us for s in spans if s.batch_id == stretch.batch_id) / 1e3
        axes.axvline(end, color=INK, linewidth=1.1, linestyle=dashes, zorder=4)
        axes.annotate(f"{who} {end:.3g} ms", (end, -0.62), ha="right", va="bottom" if who == "measured" else "top",
                      xytext=(-3, 0), textcoords="offset points", fontsize=7.5, color=INK, zorder=5,
                      bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.4})  # fmt: skip
    axes.set_yticks(heights, [f"{who}: {lane}" for lane, who in rows])
    axes.set_ylim(heights[-1] + 0.6, -1.05)
    axes.set_xlim(0.0, 1.02 * stretch.length_us / 1e3)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("time (ms)")
    return figure


def _bars(axes: Axes, spans: Sequence[Span], height: float, tones: Mapping[int, str], length_us: float) -> None:
    for span in spans:
        start = max(0.0, span.start_us)
        hatch = "////" if span.is_communication else ""
        # White edges part neighbours, but would hide a bar that is thinner than they are.
        edge = "white" if span.end_us - start > 0.003 * length_us else tones[span.batch_id]
        axes.barh(height, (span.end_us - start) / 1e3, left=start / 1e3, height=0.78, color=tones[span.batch_id],
                  edgecolor=edge, linewidth=0.3, hatch=hatch, zorder=2)  # fmt: skip
