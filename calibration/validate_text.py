"""The error table as text."""

from __future__ import annotations

from calibration.validate import Validation, some_of
from calibration.validate_errors import Line
from calibration.validate_serving import METRICS, Group

LABEL, NUMBER = 30, 8
SHOWN_ESTIMATES = 3


def table(found: Validation) -> list[str]:
    """Level by level; then serving run by run, and what a reader must know of the inputs."""
    node = found.node
    lines = [f"node {node.name}, contents {node.digest}"]
    lines += [f"  against {name}" for name in found.sources]
    lines += ["", "errors of the simulator in % of what was measured; spread: of the measurement itself", _head()]
    level = ""
    for line in found.lines:
        if line.level != level:
            level = line.level
            lines.append(level)
        lines.append(_row(line))
    met, judged = found.verdict
    lines += ["", f"{met} of {judged} targets met"]
    for groups in found.serving.groups.values():
        lines += ["", *_runs(groups)]
        break  # the same runs again would say nothing new: of same admissions the table has the errors
    return lines + _notes(found)


def _head() -> str:
    names = ("points", "mean", "P90", "worst", "bias", "spread")
    return f"{'':<{LABEL}}" + "".join(f"{name:>{NUMBER}}" for name in names) + f"  {'target':<10}{'met':<5}worst at"


def _row(line: Line) -> str:
    is_share = line.p90 is None and line.typical is not None
    numbers = [f"{line.typical:.0f} %" if is_share else _number(line.typical), _number(line.p90), _number(line.worst),
               _signed(line.bias), _number(line.spread)]  # fmt: skip
    met = {None: "", True: "yes", False: "NO"}[line.met]
    left = f"{'  ' + line.what + (' (us)' if line.unit == 'us' else ''):<{LABEL}}{line.count:>{NUMBER},}"
    right = "".join(f"{'' if is_share and number == '-' else number:>{NUMBER}}" for number in numbers)
    return f"{left}{right}  {line.target.words():<10}{met:<5}{line.worst_at}".rstrip()


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.1f}"


def _runs(groups: list[Group]) -> list[str]:
    """Measured and simulated numbers of every run, side by side."""
    names = [name.removesuffix(" latency") for _, name, _ in METRICS]
    lines = ["runs, measured / simulated with the same arrivals (req/s and ms)"]
    lines.append(f"{'runs':>4}  " + "".join(f"{name:>18}" for name in names) + "  what")
    for group in groups:
        points = [group.point("", key) for key, _, _ in METRICS]
        cells = [f"{_short(point.measured)} / {_short(point.predicted)}" for point in points]
        lines.append(f"{len(group.runs):>4}  " + "".join(f"{cell:>18}" for cell in cells) + f"  {points[0].label}")
    return lines


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 1000.0 else f"{value:.4g}"


def _notes(found: Validation) -> list[str]:
    notes, estimates = list(found.notes), found.node.estimates
    if estimates:
        numbers = f"{len(estimates)} numbers of node {found.node.name}"
        notes.append(f"{numbers} are estimates, not measurements: {some_of(estimates)}")
    return ["", *(f"note: {note}" for note in notes)] if notes else []
