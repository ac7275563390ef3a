"""Simulated serving beside what was measured on 4 and 2 x H200, and beside the published artifact's; of two GPUs with
the nodes of four, and with those that were fitted to two. Prints Markdown.

python benchmarks/against_hardware.py                 # fitted nodes
python benchmarks/against_hardware.py --suffix ""     # the nodes before they were fitted
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import msgspec

from benchmarks.gpu_world import arrivals, twins
from models.config import MODELS
from models.transformer import Layout, Vectors
from policy.options import Options, WholeSegments
from policy.scheduler import Scheduler
from sim.believe import profile_of
from sim.simulate import Fidelity, Simulation
from sim.spec import NodeSpec, load_node
from traces.metrics import metrics
from traces.request import Request
from weft.runs import options_for

DATA = Path(__file__).parent / "data"
SERVED = ("h200-x4-2026-11-22-later/serving.jsonl", "h200-x4-2026-11-22/deep.jsonl",
          "h200-x2-2026-11-23/serving.jsonl", "h200-x2-2026-11-23-whole-segments/serving.jsonl")  # fmt: skip
NODES = {"as-is": "h200-nvlink-x4", "host-staged": "h200-hoststaged-x4"}
OF_TWO = {"as-is": "h200-nvlink-x2-fitted", "host-staged": "h200-hoststaged-x2-fitted"}
# Requests as they come, one by one.
PLANES = ("h200-x4-2026-11-22-later/plane.jsonl", "h200-x2-2026-11-22-to-the-end/plane.jsonl",
          "h200-x2-2026-11-23/plane.jsonl", "h200-x2-2026-11-23-whole-segments/plane.jsonl")  # fmt: skip
TP4 = Layout(4, 1)
KEYS = ("request_throughput", "mean_e2el_ms", "median_e2el_ms", "p90_e2el_ms", "p99_e2el_ms")
# The repaired artifact's capacity on this kind of node, batches of two of 16 to 115 tokens, 131 of them, and its own
# tensor parallelism's: mode, model, layers, tensor, interleaved.
ARTIFACT = (
    ("host-staged", "glm-130b-plain", 4, 295.0, 461.0),
    ("as-is", "glm-130b-plain", 4, 371.0, 463.0),
    ("host-staged", "opt-30b", 48, 41.8, 59.6),
)
ARTIFACT_BATCHES = 131
# Choices that were measured instead of the policy's own.
LEVERS: dict[str, dict[str, Any]] = {
    "tensor parallelism": {}, "interleaved, as chosen": {},
    "24 SMs withheld, 8 CTAs": {"partition": 24, "comm_ctas": 8},
    "32 SMs withheld, 8 CTAs": {"partition": 32, "comm_ctas": 8},
    "no partition, 8 CTAs": {"partition": 0, "comm_ctas": 8},
    "no partition, NCCL's own CTAs": {"partition": 0, "comm_ctas": 0},
}  # fmt: skip
LEVER_BATCHES, LEVER_RATE = 300, 1500.0


def served(
    node: NodeSpec, name: str, layers: int, policy: str, requests: tuple[Request, ...], pad_to: int,
    layout: Layout = TP4, whole: WholeSegments = "off", **forced: Any,
) -> dict[str, Any]:  # fmt: skip
    """What the simulator says of a model that is cut to its first layers and has no vocabulary, as was measured."""
    model = replace(MODELS[name], num_layers=layers, vocab_size=0)
    options = options_for(policy, layout, Options(pad_to=pad_to, adaptive=not forced, whole_segments=whole, **forced))
    scheduler = Scheduler(policy, options, profile_of(node), Vectors(model, layout))
    return metrics(Simulation(node, layout, scheduler, Fidelity()).run(list(requests)))


def measured() -> Iterator[dict[str, Any]]:
    """The rows of serving that were measured last."""
    return _rows(SERVED)


def plane() -> Iterator[dict[str, Any]]:
    """The rows of the planes."""
    return _rows(PLANES)


def _rows(names: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    for name in names:
        for line in (DATA / name).read_text().splitlines():
            if "policy" in (row := json.loads(line)):
                yield row


def of_their_own(nodes_of_four: dict[str, NodeSpec]) -> None:
    """What was measured on two GPUs beside the nodes that were fitted to two, and all planes."""
    nodes = {2: {mode: load_node(name) for mode, name in OF_TWO.items()}, 4: nodes_of_four}
    head = "| mean ms | P50 | P90 | P99 |\n|---|---|---|---|---|---|---|"
    print(f"\n| link, model × layers, policy | offered | batches/s {head}")
    for row in measured():
        if _num_ranks(row) == 2:
            _print_beside(row, nodes[2][row["mode"]])
    print(f"\n| GPUs, link, model × layers, policy | offered | requests/s {head}")
    for row in plane():
        _print_beside(row, nodes[_num_ranks(row)][row["mode"]], f"{_num_ranks(row)}, ", together=1)


def _num_ranks(row: dict[str, Any]) -> int:
    return Layout(*row["layout"]).num_ranks


def _print_beside(row: dict[str, Any], node: NodeSpec, before: str = "", together: int = 2) -> None:
    """A row of a table. `together`: requests of one length that come at a time."""
    requests = arrivals(row["num_requests"] // together, row["rate"])
    requests = requests if together == 1 else twins(requests)
    pad_to, layout = row.get("pad_to", Options().pad_to), Layout(*row["layout"])
    whole: WholeSegments = "on" if (row.get("beliefs") or {}).get("whole_segments") else "off"  # as was rehearsed
    found = served(node, row["model"], row["num_layers"], row["policy"], requests, pad_to, layout, whole)
    cells = [_beside(row[key], found[key], together if key == "request_throughput" else 1.0) for key in KEYS]
    name = f"{before}{row['mode']}, {row['model']} × {row['num_layers']}, {row['policy']}"
    print(f"| {name} | {row['rate']:.0f} | {' | '.join(cells)} |")


def main() -> None:
    """All tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suffix", default="-fitted", help="of the nodes' names")
    suffix = parser.parse_args().suffix
    nodes = {mode: load_node(name + suffix) for mode, name in NODES.items()}
    print("| GPUs, link, model × layers, policy | offered | batches/s | mean ms | P50 | P90 | P99 |")
    print("|---|---|---|---|---|---|---|")
    for row in measured():
        _print_beside(row, nodes[row["mode"]], f"{_num_ranks(row)}, ")
    print("\n| link, model × layers | choice | batches/s |\n|---|---|---|")
    for line in (DATA / "h200-x4-2026-11-21" / "levers.jsonl").read_text().splitlines():
        row = json.loads(line)
        if (forced := LEVERS.get(row["variant"])) is not None:
            requests = twins(arrivals(LEVER_BATCHES, LEVER_RATE))
            policy = "tensor" if row["variant"] == "tensor parallelism" else "interleaved"
            found = served(nodes[row["mode"]], row["model"], row["num_layers"], policy, requests, 16, **forced)
            rate = _beside(2.0 * row["batch_throughput"], found["request_throughput"], 2.0)
            print(f"| {row['mode']}, {row['model']} × {row['num_layers']} | {row['variant']} | {rate} |")
    print("\n| link, model × layers | artifact's tensor parallelism | artifact, repaired |\n|---|---|---|")
    for mode, model, layers, tensor, artifact in ARTIFACT:
        requests = twins(arrivals(ARTIFACT_BATCHES, float("inf")))
        # It launches from C++, where a launch costs what the library's call costs, as the base node has it.
        node = msgspec.structs.replace(nodes[mode], host=load_node(NODES[mode]).host)
        cells = []
        for policy, known in (("tensor", tensor), ("liger-artifact", artifact)):
            found = served(node, model, layers, policy, requests, 1)["request_throughput"]
            cells.append(_beside(2.0 * known, found, 2.0))
        print(f"| {mode}, {model} × {layers} | {' | '.join(cells)} |")
    of_their_own(nodes)


def _beside(known: float, found: float, scale: float) -> str:
    change = f"{100.0 * (found / known - 1.0):+.0f} %".replace("-", "\N{MINUS SIGN}")
    return f"{known / scale:.1f} → {found / scale:.1f} ({change})"


if __name__ == "__main__":
    main()
