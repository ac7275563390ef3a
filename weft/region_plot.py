"""The feasible region as a picture: latency over throughput, legible in print and in grey."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from traces.files import write_whole
from weft.explore import Curve, Region, envelope
from weft.runs import RunConfig

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("png", "pdf", "svg")
PERCENTILES = (50, 90, 99)
INTERLEAVING = ("interleaved", "liger-artifact")
INK = "#222222"
FAINT = "#8a8a8a"
REACHED = "#e9edf0"
GAINED = "#f6c9b0"


@dataclass(frozen=True, slots=True)
class Style:
    """How a policy is drawn: told apart by marker and dashes as well as by colour."""

    color: str
    marker: str
    dashes: Any
    width: float = 1.6


STYLES = {
    "tensor": Style("#4d4d4d", "s", (0, (5, 1.5))),
    "pipeline": Style("#0072b2", "^", (0, (5, 1.2, 1, 1.2))),
    "hybrid": Style("#8a6d00", "D", (0, (1.2, 1.0))),
    "interleaved": Style("#c1440e", "o", "-", 2.2),
    "liger-artifact": Style("#6a3d9a", "v", (0, (3, 1, 1, 1, 1, 1))),
}
OTHER = Style(INK, "X", "-")
# A bound further away than this times the highest capacity would squeeze the curves; an arrow names it then.
FAR = 1.6
NEAR_SATURATION = 0.97
RC: Any = {
    "font.size": 8.5,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.linewidth": 0.8,
    "axes.edgecolor": "#555555",
    "axes.labelcolor": INK,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "axes.axisbelow": False,
    "savefig.dpi": 200,
    "svg.hashsalt": "weft",
    "pdf.fonttype": 42,
}


def write_region(region: Region, paths: Sequence[Path], percentile: int = 90, slo_ms: float | None = None) -> None:
    """Draw a region to files named *.png, *.pdf or *.svg. The same region gives the same bytes."""
    import matplotlib

    with matplotlib.rc_context(RC):
        figure = draw_region(region, percentile, slo_ms)
        for path in paths:
            kind = path.suffix.lstrip(".").lower()
            buffer = io.BytesIO()
            # Without the date that these formats otherwise carry.
            metadata = {"png": {}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}[kind]
            figure.savefig(buffer, format=kind, metadata=metadata)
            write_whole(path, buffer.getvalue())


def draw_region(region: Region, percentile: int = 90, slo_ms: float | None = None) -> Figure:
    """A large panel with one percentile of the latency, the other two beside it on the same scale of throughput."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8.4, 4.9))
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        2, 2, width_ratios=(2.55, 1), left=0.075, right=0.985, top=0.775, bottom=0.17, wspace=0.17, hspace=0.16
    )
    main = figure.add_subplot(grid[:, 0])
    others = [p for p in PERCENTILES if p != percentile][:2]
    small = [figure.add_subplot(grid[row, 1]) for row in range(2)]
    for axes, shown in ((main, percentile), *zip(small, others, strict=True)):
        _panel(axes, region, shown, slo_ms, large=axes is main)
        axes.set_xlim(0.0, _x_limit(region))
        axes.xaxis.set_major_locator(MaxNLocator(8 if axes is main else 4, steps=(1, 2, 2.5, 5, 10)))
        axes.set_xlabel("throughput (requests/s)")
    small[0].set_xlabel("")
    small[0].tick_params(labelbottom=False)
    main.set_ylabel(f"P{percentile} end-to-end latency (ms)")
    _bound(main, region)
    _name_curves(figure, main, region, percentile)
    _words(figure, region, slo_ms)
    return figure


def _x_limit(region: Region) -> float:
    """Room for every capacity, and for the ideal bound where it is not far away."""
    highest = max(curve.capacity for curve in region.curves)
    return 1.07 * max(highest, region.bound if region.bound < FAR * highest else 0.0)


def _panel(axes: Axes, region: Region, percentile: int, slo_ms: float | None, *, large: bool) -> None:
    """Shaded region, SLO and curves of one percentile."""
    bottom, top = _y_limits(region, percentile, slo_ms)
    axes.set_yscale("log")
    axes.set_ylim(bottom, top)
    _shade(axes, region, percentile, top if slo_ms is None else min(slo_ms, top))
    for curve in region.curves:
        style = STYLES.get(curve.policy, OTHER)
        scale = 1.0 if large else 0.62
        axes.plot(
            curve.throughputs(), curve.latencies_ms(percentile), color=style.color, marker=style.marker,
            linestyle=style.dashes, linewidth=style.width * (scale + 0.1), markersize=5.2 * scale,
            markeredgecolor="white", markeredgewidth=0.6 * scale, zorder=4 if style.width > 2 else 3,
        )  # fmt: skip
    if slo_ms is not None:
        axes.axhline(slo_ms, color=INK, linewidth=0.9, linestyle=(0, (1, 1.5)), zorder=2)
        if large:
            axes.annotate(f"SLO {slo_ms:g} ms", (0.995, slo_ms), xycoords=("axes fraction", "data"), ha="right",
                          xytext=(0, 3), textcoords="offset points", fontsize=7.5, color=INK,
                          bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6})  # fmt: skip
    if not large:
        axes.set_title(f"P{percentile} (ms)", loc="left", fontsize=8, pad=3)
    _plain_ticks(axes, top / bottom)


def _y_limits(region: Region, percentile: int, slo_ms: float | None) -> tuple[float, float]:
    """From below the lowest latency to above the highest that is not yet overload: curves leave through the top."""
    latencies = [
        float(latency)
        for curve in region.curves
        for latency, row in zip(curve.latencies_ms(percentile), curve.rows, strict=True)
        if row["request_rate"] < NEAR_SATURATION * curve.capacity
    ] or [float(curve.latencies_ms(percentile).min()) for curve in region.curves]
    low = min(float(curve.latencies_ms(percentile).min()) for curve in region.curves)
    high = max(1.15 * max(latencies), 2.2 * low, 1.12 * (slo_ms or 0.0))
    return 0.86 * low, high


def _shade(axes: Axes, region: Region, percentile: int, ceiling: float) -> None:
    """All that some policy reaches, and in another tint what only interleaving reaches."""
    reached = [x for curve in region.curves for x in curve.throughputs()]
    throughputs = np.linspace(min(reached), max(reached), 800)
    best = envelope(region.curves, percentile, throughputs)
    axes.fill_between(throughputs, best, ceiling, where=best < ceiling, color=REACHED, linewidth=0, zorder=0)
    plain = [curve for curve in region.curves if curve.policy not in INTERLEAVING]
    if plain and len(plain) < len(region.curves):
        without = np.nan_to_num(envelope(plain, percentile, throughputs), nan=ceiling)
        without = np.minimum(without, ceiling)
        axes.fill_between(throughputs, best, without, where=best < without, color=GAINED, linewidth=0, zorder=1)


def _bound(axes: Axes, region: Region) -> None:
    """The line that no interleaving can cross, named on the line itself."""
    words = f"ideal overlap {region.bound:.1f}"
    if region.bound < axes.get_xlim()[1]:
        axes.axvline(region.bound, color=FAINT, linewidth=1.0, linestyle=(0, (7, 3)), zorder=1)
        axes.annotate(words, (region.bound, 0.02), xycoords=("data", "axes fraction"), xytext=(-3, 0), rotation=90,
                      textcoords="offset points", ha="right", va="bottom", fontsize=7.5, color=FAINT,
                      bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.6})  # fmt: skip
    else:
        axes.annotate(f"{words} \N{RIGHTWARDS ARROW}", (0.99, 0.02), xycoords="axes fraction", ha="right", va="bottom",
                      fontsize=7.5, color=FAINT)  # fmt: skip


def _name_curves(figure: Figure, axes: Axes, region: Region, percentile: int) -> None:
    """Names above the panel where each curve leaves it, moved apart where they would touch."""
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    ends = [(_end(curve, percentile, axes.get_ylim()[1]), curve) for curve in region.curves]
    ends.sort(key=lambda end: end[0])
    above = axes.get_xaxis_transform()
    texts = [
        axes.text(0, 1.085, f"{curve.policy}\n{curve.capacity:.1f}", transform=above, ha="center", va="bottom",
                  fontsize=8, linespacing=1.15, color=STYLES.get(curve.policy, OTHER).color, fontweight="bold")
        for _, curve in ends
    ]  # fmt: skip
    per_unit = axes.get_window_extent(renderer).width / axes.get_xlim()[1]
    widths = [text.get_window_extent(renderer).width / per_unit for text in texts]
    places = spread([end for (end, _), _ in ends], widths, 12 / per_unit, axes.get_xlim()[1])
    for ((x, y), curve), text, place in zip(ends, texts, places, strict=True):
        text.set_x(place)
        _, top = axes.get_ylim()
        height = 1.0 if y >= top else axes.transAxes.inverted().transform(axes.transData.transform((x, y)))[1]
        axes.plot([x, x, place], [height + 0.012, 1.025, 1.075], color=STYLES.get(curve.policy, OTHER).color,
                  linewidth=0.8, clip_on=False, transform=above)  # fmt: skip


def _end(curve: Curve, percentile: int, top: float) -> tuple[float, float]:
    """Where a curve leaves the panel through its top, or its last point."""
    x, y = curve.throughputs(), curve.latencies_ms(percentile)
    if y[-1] <= top:
        return float(x[-1]), float(y[-1])
    last = max((i for i in range(len(y)) if y[i] <= top), default=len(y) - 1)
    if last == len(y) - 1:
        return float(x[-1]), top
    share = np.log(top / y[last]) / np.log(y[last + 1] / y[last])
    return float(x[last] + share * (x[last + 1] - x[last])), top


def spread(wanted: Sequence[float], widths: Sequence[float], gap: float, limit: float) -> list[float]:
    """Centres of labels in order, each near where it is wanted, none touching another, none beyond the limit."""
    places = list(wanted)
    for _ in range(200):
        moved = False
        for i in range(len(places) - 1):
            short = (widths[i] + widths[i + 1]) / 2 + gap - (places[i + 1] - places[i])
            if short > 1e-9:
                places[i] -= short / 2
                places[i + 1] += short / 2
                moved = True
        if places and places[-1] + widths[-1] / 2 > limit:
            places[-1] = limit - widths[-1] / 2
        if not moved:
            break
    return places


def _plain_ticks(axes: Axes, span: float) -> None:
    """Numbers, not powers of ten; the finer the less there is to show."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    fine, medium, coarse = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9), (1, 1.5, 2, 3, 5, 7), (1, 2, 5)
    steps = fine if span < 4 else medium if span < 15 else coarse
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=steps))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="y", color="white", linewidth=0.8, zorder=1)


def _words(figure: Figure, region: Region, slo_ms: float | None) -> None:
    """Title, conditions, the key to the shading, and what the picture rests on."""
    from matplotlib.patches import Patch

    row, place = region.curves[0].rows[0], region.place
    figure.text(0.012, 0.972, f"{row['model_id']} on {row['node']}: simulated latency and throughput", va="top",
                fontsize=11.5, fontweight="bold", color=INK)  # fmt: skip
    figure.text(0.012, 0.921, conditions(region), va="top", fontsize=8, color="#555555")
    patches = [Patch(color=REACHED, label="feasible" if slo_ms is None else "feasible within the SLO")]
    if any(curve.policy in INTERLEAVING for curve in region.curves):
        patches.append(Patch(color=GAINED, label="only with interleaving"))
    figure.legend(handles=patches, loc="upper left", bbox_to_anchor=(0.737, 0.9), fontsize=8, frameon=False,
                  handlelength=1.4, handleheight=1.0, borderaxespad=0.0, labelspacing=0.35)  # fmt: skip
    notes = [
        "Simulated, not measured. Under each name: requests/s served when all requests wait from the start. Near it, "
        "latency grows with the length of the run.",
        "Ideal overlap: one over the larger of all computation and all communication of the tensor-parallel ranks.",
    ]
    if estimates := region.grounds["estimates_used"]:
        notes[1] += f" {len(estimates)} numbers of the node are estimates (weft nodes {place.node})."
    figure.text(0.012, 0.016, "\n".join(notes), va="bottom", fontsize=6.3, color="#666666", linespacing=1.35)


def _cut(place: RunConfig) -> str:
    """The part of a trace file that was taken, and how it was bent."""
    words = [f" from {place.start_s:g} s"] if place.start_s else []
    words += [f" for {place.duration_s:g} s"] if place.duration_s < float("inf") else []
    words += [f", CV x {place.burstiness_scale:g}"] if place.burstiness_scale != 1.0 else []
    return "".join(words)


def conditions(region: Region) -> str:
    """What every run of the picture had in common."""
    place = region.place
    row = region.curves[0].rows[0]
    if place.dataset_name == "random":
        named = {1.0: "Poisson", float("inf"): "constant"}
        process = named.get(place.burstiness, f"gamma (shape {place.burstiness:g})")
        requests = (
            f"{row['num_prompts']:,} requests a run, {process} arrivals, {place.input_len} tokens, seed {place.seed}"
        )
    else:
        requests = f"{row['num_prompts']:,} requests of {Path(place.dataset_path).name}{_cut(place)}, rate scaled"
    if row["num_shortened"]:
        requests += f", {row['num_shortened']:,} of them shortened to {place.max_input_len} tokens"
    # The batch size is said anyway, and the deadline is a line in the picture.
    changed = [item for item in row["policy_options"].split() if not item.startswith(("batch_size=", "slo_us="))]
    return f"{requests}, batch {place.options.batch_size}" + (f"; {', '.join(changed)}" if changed else "")
