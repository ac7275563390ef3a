"""`weft trace`: what a request trace looks like, as a table, a plot in the terminal and a picture."""

from __future__ import annotations

import argparse
import io
import math
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from traces.arrivals import US_PER_S
from traces.files import write_whole
from traces.reader import DATASET_NAMES, read_trace
from traces.summary import LengthSummary, TraceSummary, summarize
from traces.trace import Trace
from traces.transform import scale_rate, window
from weft.outputs import check_writable

BLOCKS = " ▁▂▃▄▅▆▇█"
ASCII_BLOCKS = " .:-=+*#@"
PLOT_COLUMNS = 64
BAR_COLUMNS = 40


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `weft trace` to the command line."""
    parser = subparsers.add_parser("trace", help="show a request trace: rate, burstiness, lengths", description=__doc__)
    parser.add_argument("file", type=Path, help="trace, plain or gzip; sorted by time")
    parser.add_argument("--dataset-name", choices=DATASET_NAMES, default="auto", help="format (default: by first line)")
    parser.add_argument("--start", type=float, default=0.0, metavar="S", help="skip the first S seconds of the file")
    parser.add_argument("--duration", type=float, default=math.inf, metavar="S", help="keep S seconds from the start")
    parser.add_argument("--rate-scale", type=float, default=1.0, metavar="X", help="then speed up arrivals X times")
    spread_help = "spread requests with equal time stamps over their step (Mooncake: 3 s); seed of the draws"
    parser.add_argument("--spread-seed", type=int, metavar="N", help=spread_help)
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw the plot to a PNG file")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Read the trace, print the table and the plot, and draw the picture where asked for."""
    if args.plot is not None and args.plot.suffix.lower() != ".png":
        raise ValueError(f"--plot {args.plot}: the picture is a PNG file; give a name that ends in .png")
    if args.plot is not None:
        check_writable(args.plot)
    trace = load(args)
    text = "\n".join([*table(trace), "", *plots(trace, _can_draw_blocks())])
    encoding = sys.stdout.encoding or "ascii"
    # A file name may hold letters that the terminal cannot show; they must not stop the table.
    print(text.encode(encoding, "backslashreplace").decode(encoding))
    if args.plot is not None:
        write_png(trace, args.plot)
        print(f"wrote {args.plot}".encode(encoding, "backslashreplace").decode(encoding))
    return 0


def load(args: argparse.Namespace) -> Trace:
    """The trace that the options describe: first cut out of the file's own time, then sped up."""
    if args.spread_seed is not None and args.spread_seed < 0:
        raise ValueError(f"--spread-seed {args.spread_seed} is negative; give 0 or more")
    spread_rng = None if args.spread_seed is None else np.random.default_rng(args.spread_seed)
    trace = window(read_trace(args.file, args.dataset_name, spread_rng), args.start, args.duration)
    return scale_rate(trace, args.rate_scale)


def table(trace: Trace) -> list[str]:
    """The summary as lines of text."""
    summary = summarize(trace)
    dropped = f" ({summary.num_dropped} failed in the file, dropped)" if summary.num_dropped else ""
    lines = [
        f"{trace.source}",
        f"  requests        {summary.num_requests:>12,}{dropped}",
        f"  span            {summary.span_s:>12,.1f} s",
        f"  rate            {_rate(summary)}",
        f"  inter-arrival CV{_cv(summary)}",
        f"  peak in 1 s     {summary.peak_per_second:>12,} requests",
        "",
        f"  tokens          {'mean':>9}{'p50':>9}{'p90':>9}{'p99':>9}{'max':>9}",
        _length_row("prompt", summary.prompt),
    ]
    return [*lines, _length_row("output", summary.output)] if summary.output.max else lines


def _rate(summary: TraceSummary) -> str:
    return " all at once" if math.isinf(summary.rate) else f"{summary.rate:>12,.3f} /s"


def _cv(summary: TraceSummary) -> str:
    return f"{'-':>12}" if math.isnan(summary.cv) else f"{summary.cv:>12.2f} (Poisson: 1)"


def _length_row(name: str, lengths: LengthSummary) -> str:
    numbers = (lengths.mean, lengths.p50, lengths.p90, lengths.p99, lengths.max)
    return f"  {name:<16}" + "".join(f"{number:>9,.0f}" for number in numbers)


def _can_draw_blocks() -> bool:
    try:
        BLOCKS.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def plots(trace: Trace, use_blocks: bool = True) -> list[str]:
    """Arrivals over time and length histograms, in block characters or in plain ASCII."""
    span_s = trace.requests[-1].arrival_us / US_PER_S
    lines = []
    if span_s > 0.0:
        counts, _ = np.histogram(trace.arrivals_us(), bins=PLOT_COLUMNS)
        peak = counts.max() * PLOT_COLUMNS / span_s
        lines += [
            f"  arrivals over time, one column = {span_s / PLOT_COLUMNS:,.3g} s, highest = {peak:,.3g} /s",
            "  |" + _sparkline(counts, BLOCKS if use_blocks else ASCII_BLOCKS) + "|",
            "",
        ]
    outputs = [request.num_output_tokens for request in trace.requests]
    lines += _histogram("prompt tokens", [request.num_prompt_tokens for request in trace.requests], use_blocks)
    return [*lines, "", *_histogram("output tokens", outputs, use_blocks)] if any(outputs) else lines


def _sparkline(counts: NDArray[np.int64], blocks: str) -> str:
    """One character per count; only an empty bin is blank, so a lone request still shows."""
    levels = np.ceil(counts * (len(blocks) - 1) / max(1, int(counts.max()))).astype(int)
    return "".join(blocks[level] for level in levels)


def _histogram(title: str, lengths: list[int], use_blocks: bool) -> list[str]:
    """Shares of requests by powers of two, from the shortest to the longest."""
    powers, counts = np.unique([length.bit_length() for length in lengths], return_counts=True)
    shares = dict(zip(powers.tolist(), (counts / len(lengths)).tolist(), strict=True))
    lines = [f"  {title}, share of requests"]
    for power in range(min(shares), max(shares) + 1):
        share = shares.get(power, 0.0)
        label = str(power) if power < 2 else f"{2 ** (power - 1):,} - {2**power - 1:,}"
        bar = ("█" if use_blocks else "#") * math.ceil(round(share / max(shares.values()) * BAR_COLUMNS, 6))
        lines.append(f"  {label:>21} {100 * share:5.1f} % {bar}".rstrip())
    return lines


def write_png(trace: Trace, path: Path) -> None:
    """Draw arrivals per bin and the length distributions to a PNG file."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("--plot needs matplotlib; install it with: pip install matplotlib") from error
    figure = Figure(figsize=(9.0, 6.0), layout="constrained")
    over_time, over_length = figure.subplots(2, 1)
    arrivals_s = trace.arrivals_us() / US_PER_S
    span_s = float(arrivals_s[-1]) or 1.0  # all at once: one second, so that there is a rate to draw
    weights = np.full(len(arrivals_s), 200 / span_s)
    over_time.hist(arrivals_s, bins=200, range=(0.0, span_s), weights=weights, histtype="stepfilled")
    over_time.set(xlabel="time (s)", ylabel="requests per second", title=Path(trace.source).name)
    columns = {
        "prompt": [request.num_prompt_tokens for request in trace.requests],
        "output": [request.num_output_tokens for request in trace.requests],
    }
    for name, lengths in columns.items():
        if any(lengths):
            over_length.ecdf(lengths, label=name)
    over_length.set(xscale="log", xlabel="tokens", ylabel="share no longer")
    over_length.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_whole(path, buffer.getvalue())
