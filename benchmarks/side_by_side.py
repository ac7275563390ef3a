"""What the simulator says of computation beside computation, next to what was measured of it.

python benchmarks/side_by_side.py benchmarks/data/h200-x1-2026-11-23/side-by-side.jsonl [--node h200-nvlink-x2-fitted]

A line for every pair of parts: what both are through together, as a multiple of one at a time, from the least to the
most of all models and partitions, by rows; measured, and simulated on the node. Needs torch, for the list of parts.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import simpy

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.gpu_side_by_side import LAYOUT, PAIRS, PARTS, ROWS, passed
from calibration.validate_two_batches import in_a_graph
from executor.survey_bed import batch_of
from models.config import MODELS
from models.kernel import Kernel
from models.transformer import function_vector
from policy.round import Lane, Launch
from sim.cost import Costs
from sim.device import Device
from sim.spec import load_node

LANES = (Lane.COMPUTE, Lane.FILL)
# The longer part is called so often at least, alone and beside the other, and the shorter as long.
CALLS = 8


def part_of(model: str, rows: int, part: str) -> tuple[Kernel, ...]:
    """The compute kernels of a part of a layer."""
    layer = function_vector(MODELS[model], batch_of(rows), LAYOUT, 0).layer
    names = [kernel.name for kernel in layer]
    first, last = (names.index(name) for name in PARTS[part])
    return tuple(kernel for kernel in layer[first : last + 1] if not kernel.is_communication)


def race_us(costs: Costs, parts: Sequence[tuple[Kernel, ...]], counts: Sequence[int], withheld: int) -> list[float]:
    """Microseconds of each part over the time in which all of them run, one on each lane."""
    env = simpy.Environment()
    device = Device(env, 0, costs, priority=True, record=True)
    for number, (part, count, lane) in enumerate(zip(parts, counts, LANES, strict=False)):
        device.issue(Launch(number, 0, count * len(part), lane, withheld_sms=withheld), part * count, 0)
    env.run()
    ends = [
        [span.end_us for span in device.spans if span.batch_id == number][len(part) - 1 :: len(part)]
        for number, part in enumerate(parts)
    ]
    until = min(each[-1] for each in ends)
    return [until / passed(each, until) for each in ends]


def gain_of(costs: Costs, row: dict[str, Any]) -> float:
    """What both are through together, as a multiple of what one at a time is."""
    parts = [part_of(row["model"], row["rows"], row[side]) for side in ("one", "two")]
    withheld = row["withheld_sms"]
    alone = [race_us(costs, [part], [CALLS], withheld)[0] for part in parts]
    counts = [round(CALLS * max(alone) / us) for us in alone]
    return sum(us / both for us, both in zip(alone, race_us(costs, parts, counts, withheld), strict=True))


def main() -> None:
    """A table, rows as they were measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--node", default="h200-nvlink-x2-fitted")
    args = parser.parse_args()
    costs = Costs(in_a_graph(load_node(args.node)))
    rows = [json.loads(line) for line in args.data.read_text().splitlines()]
    gains = [(row, gain_of(costs, row)) for row in rows]
    print("| measured → simulated | " + " | ".join(f"{count} rows" for count in ROWS) + " | simulated over measured |")
    print("|---" * (len(ROWS) + 2) + "|")
    for one, two in PAIRS:
        found = [(row, gain) for row, gain in gains if (row["one"], row["two"]) == (one, two)]
        cells = [[(row["gain"], gain) for row, gain in found if row["rows"] == count] for count in ROWS]
        words = [" → ".join(f"{min(each):.2f}–{max(each):.2f}" for each in zip(*cell, strict=True)) for cell in cells]
        off = 100.0 * (fmean(gain / row["gain"] for row, gain in found) - 1.0)
        print(f"| {one} beside {two} | " + " | ".join(words) + f" | {off:+.0f} % |")


if __name__ == "__main__":
    main()
