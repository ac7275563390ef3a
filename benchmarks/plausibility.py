"""How plausible is a simulated node? The share of communication in a tensor-parallel forward, beside what is published.

A published account of Liger gives 47.1 % for GLM-130B on four A100 over PCIe. From component tables (measured GEMMs and
all-reduces, nothing else counted) 44 to 49 % follow for 128 to 2048 rows, 11 to 15 % with NVSwitch, 18 to 23 % on four
H200. Those GEMMs were measured on SXM cards with another engine than the ones that our nodes are fitted to, which are
10 % slower in large shapes; a PCIe card is taken to be 10 % slower again. Both make our share on PCIe smaller.
"""

from __future__ import annotations

import argparse
import sys

from models.config import ModelConfig, load_model
from models.kernel import Kernel, Kind
from models.transformer import BatchShape, Layout, function_vector
from sim.cost import Costs
from sim.spec import NodeSpec, load_node, node_names
from weft.runs import RunConfig, simulate

ROWS = (128, 256, 512, 1024, 2048)
LITERATURE = "47.1 %"
# Percent for ROWS, from measured GEMMs and all-reduces alone; the H200 row is of NVLink.
COMPONENTS = {
    "a100-pcie-x4": (44, 48, 49, 49, 48),
    "a100-nvlink-x4": (14, 15, 14, 12, 11),
    "h200-nvlink-x4": (21, 23, 22, 19, 18),
}
NUM_REQUESTS = 20


def layer_share(costs: Costs, layer: tuple[Kernel, ...], kinds: frozenset[Kind]) -> float:
    """Communication's share of a layer's solo times, of compute only the kernels of `kinds` counted."""
    communication = sum(costs.solo_us(k) for k in layer if k.is_communication)
    compute = sum(costs.solo_us(k) for k in layer if k.kind in kinds)
    return communication / (communication + compute)


def run_share(model: str, node: str, layout: Layout, rows: int) -> float:
    """Communication's share of the busy time when single requests of `rows` tokens run one after another."""
    config = RunConfig(
        model=model, node=node, policy="tensor", tp=layout.tp, num_prompts=NUM_REQUESTS, request_rate=0.1,
        burstiness=1.0, input_len=str(rows),
    )  # fmt: skip
    timeline = simulate(config).timeline
    return timeline.communication_us / (timeline.communication_us + timeline.compute_us)


def table_of(config: ModelConfig, model: str, node: NodeSpec, layout: Layout) -> list[str]:
    """The lines of one node."""
    costs = Costs(node)
    whole = frozenset({Kind.GEMM, Kind.ATTENTION, Kind.ELEMENTWISE})
    lines = [f"{node.name}: {node.description}", f"  {'rows':>28}" + "".join(f"{rows:>9}" for rows in ROWS)]
    layers = [function_vector(config, BatchShape(1, rows), layout).layer for rows in ROWS]
    shares = {
        "all-reduces / (GEMMs + them)": [layer_share(costs, layer, frozenset({Kind.GEMM})) for layer in layers],
        "all-reduces / whole layer": [layer_share(costs, layer, whole) for layer in layers],
        "simulated run": [run_share(model, node.name, layout, rows) for rows in ROWS],
    }
    for name, values in shares.items():
        lines.append(f"  {name:>28}" + "".join(f"{value:>9.1%}" for value in values))
    if model == "glm-130b" and layout.tp == 4 and node.name in COMPONENTS:
        estimate = "".join(f"{value:>8}%" for value in COMPONENTS[node.name])
        lines.append(f"  {'component tables':>28}{estimate}")
        if node.name == "a100-pcie-x4":
            lines.append(f"  {'literature':>28}{LITERATURE:>9} of the execution time, rows not given")
    lines.append(f"  {len(node.estimates)} of {len(node.sources)} sources of this node are estimates")
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Print the page; returns the exit code."""
    parser = argparse.ArgumentParser(
        description="Communication's share of tensor-parallel forwards on simulated nodes."
    )
    parser.add_argument("--model", default="glm-130b", help="model id or file (default: glm-130b)")
    parser.add_argument(
        "--node", action="append", help="node name or file; may be repeated (default: every shipped node)"
    )
    parser.add_argument("--tp", type=int, default=4, help="tensor-parallel ranks (default: 4)")
    given = parser.parse_args(arguments)
    try:
        config, layout = load_model(given.model), Layout(given.tp)
        layout.check(config)
        print(f"Share of communication, {config.model_id}, TP{layout.tp}, one sequence of so many rows\n")
        for name in given.node or node_names():
            print("\n".join(table_of(config, given.model, load_node(name), layout)), end="\n\n", flush=True)
    except (ValueError, OSError) as error:
        print(f"plausibility: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
