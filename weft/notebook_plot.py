"""Pictures of comparisons and of single kernels, for notebooks: legible in grey, and each says that it is simulated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from traces.timeline import Span
from weft.notebook import Case, Outcome, Picture, picture_of
from weft.region_plot import FAINT, INK, RC, STYLES, Style
from weft.runs import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS, PLAIN = STYLES["interleaved"], STYLES["tensor"]
SECOND = "#555555"
# Batches are told apart by lightness first: dark, middle, light.
BATCH_COLORS = (("#2f4b6e", "white"), ("#efa66f", INK), ("#fbe3d0", INK), ("#b8c4cf", INK))
LANE_HEIGHT = 0.8
# Where in a run to look: batches are under way, and with an even number of them none begins or ends just here.
PLACE = 0.4
# Shorter gaps between kernels are counted but cannot be seen, so they are not hatched.
VISIBLE_US = 10.0
# So many characters fit the width of the picture.
CHARACTERS = 118
# Words for kernels wide enough to hold them; the longest that fits is written.
WORDS = {
    "qkv_proj": ("QKV", "Q"), "out_proj": ("out",), "fc1": ("FFN 1", "1"), "fc2": ("FFN 2", "2"),
    "attn_all_reduce": ("all-reduce", "AR"), "ffn_all_reduce": ("all-reduce", "AR"),
}  # fmt: skip


def _figure(width: float, height: float, title: str, subtitle: str) -> Figure:
    """An empty figure with what it shows, and under which conditions."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    figure.text(0.012, 1.0 - 0.12 / height, title, va="top", fontsize=11.5, fontweight="bold", color=INK)
    figure.text(0.012, 1.0 - 0.37 / height, subtitle, va="top", fontsize=8, color=SECOND)
    return figure


def show_switches(outcomes: Mapping[str, Outcome], cases: Mapping[str, Case], rate: float) -> Picture:
    """Capacity and P90 latency of every case, against the first: a dot for each, a line for the first."""
    import matplotlib

    config = next(iter(cases.values())).config
    with matplotlib.rc_context(RC):
        height = 1.45 + 0.27 * len(outcomes)
        title = f"{config.model} on {config.node}: what each mechanism is worth, simulated"
        figure = _figure(
            8.4, height, title, f"{config.num_prompts:,} requests a run; line and shade: {next(iter(outcomes))}"
        )
        left, right = figure.subplots(1, 2, sharey=True)
        figure.subplots_adjust(left=0.265, right=0.965, top=1.0 - 0.72 / height, bottom=0.5 / height, wspace=0.1)
        styles = [STYLES.get(case.config.policy, OURS) for case in cases.values()]
        latencies = [outcome.p90_ms if outcome.is_steady_at(rate) else None for outcome in outcomes.values()]
        _dots(left, [outcome.capacity for outcome in outcomes.values()], styles, "{:.1f}")
        _dots(right, latencies, styles, "{:.0f}")
        left.set_xlabel("capacity (requests/s)")
        right.set_xlabel(f"P90 end-to-end latency at {rate:g} requests/s (ms)")
        left.set_yticks(range(len(outcomes)), list(outcomes))
        left.invert_yaxis()
        return picture_of(figure)


def _dots(axes: Axes, values: Sequence[float | None], styles: Sequence[Style], form: str) -> None:
    """Values as dots joined to the first one's line; None: no steady latency."""
    known = [value for value in values if value is not None]
    first = known[0] if known else 0.0
    axes.axvline(first, color=OURS.color, linewidth=1.0, zorder=1)
    axes.set_xlim(0.0, 1.22 * max(known, default=1.0))
    axes.axvspan(0.0, first, color="#f3f1ef", zorder=0)
    for row, (value, style) in enumerate(zip(values, styles, strict=True)):
        if value is None:
            words = axes.annotate("saturated", (first, row), xytext=(7, 0), textcoords="offset points", va="center")
            words.set(fontsize=8, style="italic", color=SECOND)
            continue
        axes.plot([first, value], [row, row], color=style.color, linewidth=2.0, zorder=2)
        axes.plot(value, row, style.marker, color=style.color, markersize=6.5, markeredgecolor="white", zorder=3)
        beyond = max(value, first)
        words = axes.annotate(form.format(value), (beyond, row), xytext=(7, 0), textcoords="offset points", va="center")
        words.set(fontsize=8, color=INK)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def show_beliefs(outcomes: Mapping[float, Outcome], plain: Outcome, rate: float, title: str) -> Picture:
    """What a policy reaches that believes communication to take so many times what it does."""
    import matplotlib

    with matplotlib.rc_context(RC):
        subtitle = "the device stays as it is; only what the policy believes of its communication changes"
        figure = _figure(8.4, 3.3, f"{title}: the price of a wrong belief, simulated", subtitle)
        axes = figure.subplots(1, 2)
        figure.subplots_adjust(left=0.075, right=0.975, top=0.76, bottom=0.16, wspace=0.2)
        factors = sorted(outcomes)
        latencies = [outcomes[f].p90_ms for f in factors]
        _beliefs(axes[0], factors, [outcomes[f].capacity for f in factors], plain.capacity)
        _beliefs(axes[1], factors, latencies, plain.p90_ms if plain.is_steady_at(rate) else None)
        axes[0].set_title("capacity (requests/s)", loc="left", fontsize=9)
        axes[1].set_title(f"P90 end-to-end latency at {rate:g} requests/s (ms)", loc="left", fontsize=9)
        if not plain.is_steady_at(rate):
            axes[1].text(0.015, 0.03, "tensor is saturated", transform=axes[1].transAxes, fontsize=8,
                         color=PLAIN.color)  # fmt: skip
        return picture_of(figure)


def _beliefs(axes: Axes, factors: Sequence[float], values: Sequence[float], plain: float | None) -> None:
    """One quantity over the factor, with the truth and plain tensor parallelism as lines."""
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log", base=2)
    axes.set_xticks(factors, [f"{factor:g}×" for factor in factors])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylim(0.0, 1.2 * max(*values, plain or 0.0))
    axes.axvline(1.0, color=FAINT, linewidth=1.0, linestyle=(0, (1, 1.5)))
    axes.annotate("the truth", (1.0, 0.03), xycoords=("data", "axes fraction"), xytext=(4, 0),
                  textcoords="offset points", fontsize=8, color=SECOND)  # fmt: skip
    axes.plot(
        factors, values, OURS.marker + "-", color=OURS.color, linewidth=2.0, markersize=6.5, markeredgecolor="white"
    )
    for factor, value in zip(factors, values, strict=True):
        words = axes.annotate(f"{value:.3g}", (factor, value), xytext=(0, 7), textcoords="offset points", ha="center")
        words.set(fontsize=8, bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none"})
    if plain is not None:
        axes.axhline(plain, color=PLAIN.color, linewidth=1.4, linestyle=PLAIN.dashes)
        axes.annotate(f"tensor {plain:.3g}", (0.99, plain), xycoords=("axes fraction", "data"), xytext=(0, -3),
                      textcoords="offset points", ha="right", va="top", fontsize=8, color=PLAIN.color)  # fmt: skip
    axes.set_xlabel("believed time of communication ÷ its real time")


# -- single kernels ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Window:
    """A part of a timeline, in microseconds."""

    start_us: float
    length_us: float

    def of(self, run: Run) -> list[Span]:
        """What ran on the first rank within the window."""
        spans = [s for s in run.timeline.spans if s.rank == 0 and s.end_us > self.start_us]
        return [s for s in spans if s.start_us < self.start_us + self.length_us]

    def cut(self, spans: Sequence[Span]) -> list[tuple[float, float]]:
        """When any of these runs, as disjoint intervals from the window's start."""
        merged: list[tuple[float, float]] = []
        for span in sorted(spans, key=lambda s: s.start_us):
            low, high = max(0.0, span.start_us - self.start_us), min(self.length_us, span.end_us - self.start_us)
            if merged and low <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
            else:
                merged.append((low, high))
        return merged


def show_lanes(runs: Mapping[str, Run], length_ms: float = 3.0) -> Picture:
    """The streams of one rank in the middle of each run: what computes, what communicates, and what is not hidden."""
    import matplotlib

    with matplotlib.rc_context(RC):
        lanes = {name: _lanes(run) for name, run in runs.items()}
        rows = [len(found) for found in lanes.values()]
        height = 1.3 + 0.42 * sum(rows) + 0.42 * len(rows)
        result = next(iter(runs.values())).result
        title = f"{result['model_id']} on {result['node']}: one of {result['tensor_parallel_size']} GPUs, simulated"
        figure = _figure(
            8.4, height, title, "one tone per batch; hatched: communication beside which nothing is computed"
        )
        panels = figure.subplots(len(runs), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": rows})[:, 0]
        figure.subplots_adjust(left=0.125, right=0.985, top=1 - 0.85 / height, bottom=0.45 / height, hspace=0.36)
        for axes, (name, run) in zip(panels, runs.items(), strict=True):
            _draw_lanes(axes, name, run, lanes[name], length_ms)
        panels[-1].set_xlabel("time (ms)")
        return picture_of(figure)


def _lanes(run: Run) -> dict[str, list[Span]]:
    """Spans of the first rank by what they do; a second stream for computation that fills gaps, if there is any."""
    spans = [span for span in run.timeline.spans if span.rank == 0]
    found = {
        "compute": [s for s in spans if not s.is_communication and s.lane != "fill"],
        "fill": [s for s in spans if not s.is_communication and s.lane == "fill"],
        "communicate": [s for s in spans if s.is_communication],
    }
    return {name: lane for name, lane in found.items() if lane}


def _middle(run: Run) -> float:
    """When a collective ends while batches are under way: a window that begins there cuts no transfer in two."""
    timeline = run.timeline
    place = timeline.start_us + PLACE * (timeline.end_us - timeline.start_us)
    ends = (s.end_us for s in timeline.spans if s.rank == 0 and s.is_communication and s.end_us > place)
    return min(ends, default=place)


def _draw_lanes(axes: Axes, name: str, run: Run, lanes: Mapping[str, list[Span]], length_ms: float) -> None:
    window = Window(_middle(run), length_ms * 1e3)
    shown = window.of(run)
    tones = {batch: BATCH_COLORS[n % len(BATCH_COLORS)] for n, batch in enumerate(sorted({s.batch_id for s in shown}))}
    computing = window.cut([s for s in shown if not s.is_communication])
    sending = window.cut([s for s in shown if s.is_communication])
    exposed = _without(sending, computing)
    rows = {lane: len(lanes) - 1 - number for number, lane in enumerate(lanes)}
    for row in rows.values():
        axes.axhspan(row - LANE_HEIGHT / 2, row + LANE_HEIGHT / 2, color="#f4f4f4", zorder=0)
    for lane, spans in lanes.items():
        for span in spans:
            if span in shown:
                _bar(axes, span, window, rows[lane], tones[span.batch_id])
    low = rows.get("communicate", 0) - LANE_HEIGHT / 2
    bars = [(start / 1e3, (end - start) / 1e3) for start, end in exposed if end - start > VISIBLE_US]
    axes.broken_barh(bars, (low, LANE_HEIGHT), facecolor="none", edgecolor="white", hatch="////", linewidth=0, zorder=3)
    total = sum(end - start for start, end in sending)
    hidden = 1.0 - sum(end - start for start, end in exposed) / total if total else 0.0
    axes.set_title(f"{name}: {hidden:.0%} of the communication shown is hidden", loc="left", fontsize=9, pad=4)
    axes.set_yticks(list(rows.values()), list(rows))
    axes.set_xlim(0.0, length_ms)
    axes.set_ylim(-0.5, len(rows) - 0.5)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def _bar(axes: Axes, span: Span, window: Window, row: int, tone: tuple[str, str]) -> None:
    """One kernel, named where there is room."""
    [(low, high)] = window.cut([span])
    color, ink = tone
    axes.barh(row, (high - low) / 1e3, left=low / 1e3, height=LANE_HEIGHT, color=color, edgecolor="white",
              linewidth=0.5, zorder=2)  # fmt: skip
    room = (high - low) / window.length_us * CHARACTERS
    word = next((word for word in WORDS.get(span.name, ()) if len(word) < room - 0.5), "")
    if word:
        plate = (
            {"boxstyle": "square,pad=0.12", "facecolor": color, "edgecolor": "none"} if span.is_communication else None
        )
        axes.text(
            (low + high) / 2e3, row, word, ha="center", va="center", fontsize=6.8, color=ink, zorder=4, bbox=plate
        )


def _without(
    intervals: Sequence[tuple[float, float]], taken: Sequence[tuple[float, float]]
) -> list[tuple[float, float]]:
    """The parts of disjoint intervals that no other interval covers."""
    left = []
    for low, high in intervals:
        for start, end in taken:
            if end <= low or start >= high:
                continue
            if start > low:
                left.append((low, start))
            low = max(low, end)
        if low < high:
            left.append((low, high))
    return left
