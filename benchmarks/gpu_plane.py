"""The latency-throughput plane as measured: P50 and P90 over what was served, a picture per link mode.

python benchmarks/gpu_plane.py [FOLDER] [--out docs]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data" / "h200-x4-2026-11-22-later"
LOOKS = {"tensor": ("o", "#12355b"), "interleaved": ("^", "#c1440e"), "pipeline": ("s", "#7aa5c4"),
         "hybrid": ("D", "#e0a458")}  # fmt: skip


def draw(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Two panels, a line per policy in the order of what was offered."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.6, 3.7), layout="constrained")
    for axes, (key, name) in zip(
        figure.subplots(1, 2, sharey=True), (("median_e2el_ms", "P50"), ("p90_e2el_ms", "P90")), strict=True
    ):
        for policy, (marker, colour) in LOOKS.items():
            some = sorted((row for row in rows if row.get("policy") == policy), key=lambda row: row["rate"])
            if some:
                served = [row["request_throughput"] for row in some]
                axes.plot(served, [row[key] for row in some], marker=marker, color=colour, label=policy, markersize=5)
        axes.set(title=f"{name} latency", xlabel="requests served per second", yscale="log")
        axes.set_yticks([25, 50, 100, 200, 400], ["25", "50", "100", "200", "400"])
        axes.minorticks_off()
        axes.grid(color="#e3e3e3")
    figure.axes[0].set_ylabel("ms")
    figure.axes[0].legend(frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main() -> None:
    """One picture per link mode."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=DATA)
    parser.add_argument("--out", type=Path, default=Path("docs"))
    args = parser.parse_args()
    rows = [json.loads(line) for line in (args.folder / "plane.jsonl").read_text().splitlines()]
    for mode in dict.fromkeys(row["mode"] for row in rows if "policy" in row):
        some = [row for row in rows if row["mode"] == mode]
        first = next(row for row in some if "policy" in row)
        gpus = first["layout"][0] * first["layout"][1]
        path = args.out / f"plane-x{gpus}-{mode}.png"
        draw(some, f"measured: {first['model']}, {gpus} x H200, {mode}", path)
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
