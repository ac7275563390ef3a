"""The tables of docs/hardware.md, from the committed measurements. Prints Markdown.

python benchmarks/gpu_tables.py [FOLDER]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data" / "h200-x4-2026-11-21"


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of one part; none if it was not measured."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def forward(rows: list[dict[str, Any]]) -> None:
    """Two batches through a whole forward: replayed serial tensor parallelism against the policy's plan."""
    print("| link, model × layers, rows | compute | comm. | serial | interleaved | over serial | ideal | efficiency |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        if "serial_ms" not in row:
            continue
        name = f"{row['mode']}, {row['model']} × {row['num_layers']}, {row['rows']}"
        taken = row["plans_ms"][row.get("chosen", "policy")]
        times = [row["compute_ms"], row["comm_ms"], row["serial_ms"], taken]
        print(f"| {name} | {' | '.join(f'{t:.1f}' for t in times)} | {row['serial_ms'] / taken:.2f}× "
              f"| {row['ideal_gain']:.2f}× | {row['ideal_ms'] / taken:.2f} |")  # fmt: skip


def serving(rows: list[dict[str, Any]]) -> None:
    """Capacity and latency under Poisson arrivals of batches of two."""
    print("| link, model × layers, policy | offered | batches/s | P50 | P90 | P95 | P99 ms | host µs/round | rounds |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        if "policy" not in row:
            continue
        name = f"{row['mode']}, {row['model']} × {row['num_layers']}, {row['policy']}"
        tail = [row[f"{p}_e2el_ms"] for p in ("median", "p90", "p95", "p99")]
        print(f"| {name} | {row['rate']:.0f} | {row['batch_throughput']:.1f} | {' | '.join(f'{t:.1f}' for t in tail)} "
              f"| {row['host_issue_us_per_round']:.0f} | {row['num_rounds']} |")  # fmt: skip


def correct(rows: list[dict[str, Any]]) -> None:
    """How many checks of which kind passed."""
    checks: dict[str, list[bool]] = {}
    for row in rows:
        if "check" in row:
            checks.setdefault(row["check"], []).extend([bool(row["ok"])] * row.get("runs", 1))
    print("| check | passed | of |\n|---|---|---|")
    for check, passed in checks.items():
        print(f"| {check} | {sum(passed)} | {len(passed)} |")


def levers(rows: list[dict[str, Any]]) -> None:
    """Capacity under other choices than the policy's own."""
    print("| link, model × layers | choice | batches/s | P99 ms | rounds | host waits for the GPU |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        name = f"{row['mode']}, {row['model']} × {row['num_layers']}"
        print(f"| {name} | {row['variant']} | {row['batch_throughput']:.1f} | {row['p99_e2el_ms']:.0f} "
              f"| {row['num_rounds']} | {row['host_synchronize_fraction']:.0%} |")  # fmt: skip


def plane(rows: list[dict[str, Any]]) -> None:
    """P50 and P90 of every policy over the rates, and what it serves at the highest."""
    rates = sorted({row["rate"] for row in rows if "policy" in row})
    print(f"| link, policy | {' | '.join(f'{rate:.0f}/s' for rate in rates)} | served at {rates[-1]:.0f}/s |")
    print("|---" * (2 + len(rates)) + "|")
    for mode, policy in dict.fromkeys((row["mode"], row["policy"]) for row in rows if "policy" in row):
        by_rate = {row["rate"]: row for row in rows if (row["mode"], row.get("policy")) == (mode, policy)}
        cells = [f"{by_rate[r]['median_e2el_ms']:.0f}, {by_rate[r]['p90_e2el_ms']:.0f}" for r in rates]
        print(f"| {mode}, {policy} | {' | '.join(cells)} | {by_rate[rates[-1]]['request_throughput']:.0f} |")


def ablation(rows: list[dict[str, Any]]) -> None:
    """What each lever is worth."""
    rows = [row for row in rows if "lever" in row]
    everything = next((row["batch_throughput"] for row in rows if row["lever"] == "all"), 0.0)
    print("| without | batches/s | of all | P99 ms | rounds | host waits for the GPU |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        rate, waits = row["batch_throughput"], row["host_synchronize_fraction"]
        print(f"| {row['lever']} | {rate:.1f} | {rate / everything:.1%} | {row['p99_e2el_ms']:.0f} "
              f"| {row['num_rounds']} | {waits:.0%} |")  # fmt: skip


TABLES = {
    "correct": correct,
    "forward": forward,
    "second-forward": forward,
    "serving": serving,
    "second-serving": serving,
    "deep": serving,
    "levers": levers,
    "ablation": ablation,
    "plane": plane,
}


def main() -> None:
    """Print every table there is data for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=DATA)
    folder = parser.parse_args().folder
    for name, table in TABLES.items():
        if rows := [row for path in sorted(folder.glob(f"{name}*.jsonl")) for row in rows_of(path)]:
            print(f"\n## {name}\n")
            table(rows)


if __name__ == "__main__":
    main()
