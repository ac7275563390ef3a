"""The feasible region in words: a table that can be read without the picture."""

from __future__ import annotations

from weft.explore import Curve, Region
from weft.report import caveats

PERCENTILES = (50, 90, 99)
CELL = 17
MAX_LOADS = 4


def region_table(region: Region, percentile: int, slo_ms: float | None = None) -> list[str]:
    """Every policy's capacity, its latencies at the same loads, and the most it serves within an SLO."""
    place, reference = region.place, region.reference
    loads = region.loads[-MAX_LOADS:]
    latencies = "/".join(f"P{p}" for p in PERCENTILES)
    lines = [
        f"{place.model} on {place.node}, simulated: {latencies} end-to-end latency in ms",
        "",
        f"{'':<16}{'capacity':>10}" + "".join(f"{f'{load:g} req/s':>{CELL}}" for load in loads) + _slo_head(slo_ms),
        f"{'policy':<16}{'req/s':>10}"
        + "".join(f"{f'{load / reference.capacity:.0%} of {reference.policy}':>{CELL}}" for load in loads)
        + (f"{f'P{percentile}, req/s':>16}" if slo_ms else ""),
    ]
    for curve in region.curves:
        cells = "".join(f"{_cell(curve, load):>{CELL}}" for load in loads)
        slo = f"{curve.best_under(slo_ms, percentile):>16.1f}" if slo_ms else ""
        lines.append(f"{curve.policy:<16}{curve.capacity:>10.1f}{cells}{slo}")
    lines += [f"{'ideal overlap':<16}{region.bound:>10.1f}", ""]
    lines += _ratios(region)
    return [*lines, *caveats(region.grounds)]


def _slo_head(slo_ms: float | None) -> str:
    return f"{f'under {slo_ms:g} ms':>16}" if slo_ms else ""


def _cell(curve: Curve, load: float) -> str:
    row = curve.at(load)
    return "/".join(_ms(row[f"p{p}_e2el_ms"]) for p in PERCENTILES) if row else "saturated"


def _ms(latency: float) -> str:
    return f"{latency:.0f}" if latency >= 20 else f"{latency:.1f}" if latency >= 2 else f"{latency:.2f}"


def _ratios(region: Region) -> list[str]:
    """Each policy against the reference, at the highest load that both sustain."""
    reference, load = region.reference, region.loads[-1]
    lines = []
    for curve in region.curves:
        ours, theirs = curve.at(load), reference.at(load)
        if curve is reference:
            continue
        line = f"{curve.policy}: {curve.capacity / reference.capacity:.2f}x the capacity of {reference.policy}"
        if ours and theirs:
            change = ours["p90_e2el_ms"] / theirs["p90_e2el_ms"] - 1.0
            line += f", {change:+.0%} P90 latency at {load:g} req/s"
        lines.append(line)
    return lines
