"""How the held-out error of a fit grows when only a half, a quarter or a tenth of the measuring was done: a fit to the
first rows of a survey, in the order in which they were measured, held against all rows that no fit may see.

Run: python benchmarks/error_over_budget.py [--out docs] [--without-pairs]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import fmean

from joblib import Parallel, delayed

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.refit import DATA, SURVEYS, parts_of
from calibration.fit import CLASSES, DELAY, fit_node, residuals_of
from traces.files import write_whole

SHARES = (0.1, 0.25, 0.5, 1.0)
COLOURS = ("#1b6ca8", "#d1495b", "#66a182", "#edae49", "#7b4b94", "#8d96a3", "#2e4057", "#00798c")
Curves = dict[str, dict[str, list[float | None]]]


def held_out_errors(survey: str, base: str, share: float, *, pairs: bool) -> dict[str, float]:
    """Mean absolute error (per cent) by class on all held-out rows, of a fit to the first rows."""
    parts, known, about = parts_of(DATA / survey, base)
    parts = [[row for row in part if pairs or row.what != "pair"] for part in parts]
    first = [row for part in parts for row in part[: max(1, round(share * len(part)))]]
    node = fit_node(first, known, about).node
    errors: dict[str, list[float]] = {}
    for residual in residuals_of(node, [row for part in parts for row in part]):
        if residual.is_held_out and residual.kind != DELAY:
            errors.setdefault(residual.kind, []).append(100.0 * abs(residual.error))
    return {kind: fmean(found) for kind, found in errors.items()}


def draw(curves: Curves, path: Path) -> None:
    """One panel a survey, one line a class."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(curves), figsize=(9.0, 3.8), sharey=True, layout="constrained")
    for axes, (survey, lines) in zip(panels, curves.items(), strict=True):
        for colour, (kind, errors) in zip(COLOURS, lines.items(), strict=False):
            axes.plot([100.0 * share for share in SHARES], errors, marker="o", color=colour, label=kind)
        axes.set(title=survey, xscale="log", yscale="log", xlabel="share of the rows measured, %")
        axes.set_xticks([100.0 * share for share in SHARES], [f"{100.0 * share:g}" for share in SHARES])
        axes.set_yticks([2, 5, 10, 20, 50], ["2", "5", "10", "20", "50"])
        axes.minorticks_off()
        axes.grid(color="#e3e3e3")
    panels[0].set_ylabel("held-out error, %")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def main() -> None:
    """Fit, print a table, write a picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--without-pairs", action="store_true", help="leave out pairs, whose fit takes longest")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    args = parser.parse_args()
    curves: Curves = {}
    points = [(survey, base, share) for survey, base in SURVEYS.items() for share in SHARES]
    pairs = not args.without_pairs
    all_found = Parallel(n_jobs=args.jobs)(delayed(held_out_errors)(*point, pairs=pairs) for point in points)
    for number, survey in enumerate(SURVEYS):
        found = all_found[number * len(SHARES) : (number + 1) * len(SHARES)]
        kinds = [kind for kind in CLASSES if any(kind in errors for errors in found)]
        curves[survey] = {kind: [errors.get(kind) for errors in found] for kind in kinds}
        print(f"\n{survey:<20}" + "".join(f"{100.0 * share:>8g} %" for share in SHARES))
        for kind, errors in curves[survey].items():
            print(f"{kind:<20}" + "".join(f"{'':>10}" if e is None else f"{e:>9.1f} " for e in errors), flush=True)
    draw(curves, args.out / "error-over-budget.png")
    write_whole(args.out / "error-over-budget.json", json.dumps(curves, indent=1).encode() + b"\n")


if __name__ == "__main__":
    main()
