"""The papers' headlines beside simulated ones, untuned; and what each mechanism is worth. Prints Markdown.

python benchmarks/headlines.py             # both tables, about ten minutes on two cores
python benchmarks/headlines.py --prompts 100 --models opt-30b --only headlines
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from joblib import Parallel, delayed

from policy.options import Options
from weft.runs import RunConfig, simulate

POLICIES = ("tensor", "pipeline", "hybrid", "interleaved", "liger-artifact")
MODELS = ("opt-30b", "opt-66b", "glm-130b")
NODES = ("a100-pcie-x4", "v100-nvlink-x4")
INFINITE = float("inf")
# Loads at which latencies are compared: shares of the smaller capacity of pipeline and interleaved parallelism.
LOADS = (0.5, 0.7, 0.9)
# The ablations' load, as a share of plain tensor parallelism's capacity.
LOAD = 0.9

# Every mechanism of the interleaved policy, switched off or replaced by what the published artifact does.
ABLATIONS: dict[str, dict[str, Any]] = {
    "as recommended": {},
    "no switch points (kernel by kernel)": {"switch_points": False},
    "no duration matching (fill anything)": {"duration_matching": False},
    "contention: one scalar of 1.25": {"anticipation": "scalar"},
    "contention not anticipated": {"anticipation": "off"},
    "no decomposition": {"decomposition": "off", "chunks": False},
    "decomposition by rows only": {"decomposition": "rows"},
    "decomposition by output features only": {"decomposition": "cols"},
    "fills of whole segments": {"whole_segments": "on"},
    "collectives not cut": {"chunks": False},
    "no lookahead (next in line only)": {"lookahead": False},
    "no SM partition": {"partition": 0},
    "no stream priority": {"priority": False},
    "no graphs (eager launches)": {"capture": False},
    "no fallback to tensor parallelism": {"adaptive": False},
    "CPU-GPU synchronisation only": {"sync": "cpu-gpu"},
    "inter-stream synchronisation only": {"sync": "inter-stream"},
    "depth 2": {"depth": 2},
    "depth 6": {"depth": 6},
}


def run(config: RunConfig) -> dict[str, Any]:
    """The flat result of one simulated run."""
    return simulate(config).result


def in_parallel(configs: Iterable[RunConfig]) -> list[dict[str, Any]]:
    """All runs on all cores, in order."""
    return list(Parallel(n_jobs=-1)(delayed(run)(config) for config in configs))


def headlines(models: tuple[str, ...], nodes: tuple[str, ...], base: Callable[..., RunConfig]) -> None:
    """Capacities, and latency against pipeline's at the same throughput."""
    cells = [(node, model) for node in nodes for model in models]
    results = in_parallel(base(model=m, node=n, policy=p, request_rate=INFINITE) for n, m in cells for p in POLICIES)
    capacity = {(r["node"], r["model_id"], r["policy"]): r["request_throughput"] for r in results}
    print("| node, model | " + " | ".join(POLICIES) + " | interleaved ÷ tensor |")
    print("|---|" + "---|" * (len(POLICIES) + 1))
    for node, model in cells:
        caps = [capacity[node, model, p] for p in POLICIES]
        print(f"| {node}, {model} | {' | '.join(f'{c:.2f}' for c in caps)} | {caps[3] / caps[0]:.2f}× |")
    print("| *published, 4 devices* | | | | | | *Liger 1.34×, Liger+ 1.53×* |\n")
    pair = ("pipeline", "interleaved")
    configs = [
        base(model=m, node=n, policy=p, request_rate=load * min(capacity[n, m, q] for q in pair))
        for n, m in cells for load in LOADS for p in pair
    ]  # fmt: skip
    runs = in_parallel(configs)
    print("| node, model | load | mean ms, pipeline → interleaved | change | P90 ms, pipeline → interleaved | change |")
    print("|---|---|---|---|---|---|")
    for number, (pipe, ours) in enumerate(zip(runs[::2], runs[1::2], strict=True)):
        (node, model), load = cells[number // len(LOADS)], LOADS[number % len(LOADS)]
        columns = [
            f"{pipe[key]:.0f} → {ours[key]:.0f} | {_change(ours, pipe, key)}" for key in ("mean_e2el_ms", "p90_e2el_ms")
        ]
        print(f"| {node}, {model} | {load:.0%} | {' | '.join(columns)} |")
    print("| *published, 4 devices* | | *Liger* | *−36.0 %* | *Liger+* | *−43.8 %* |")


def _change(ours: dict[str, Any], other: dict[str, Any], key: str) -> str:
    return f"{100 * (ours[key] / other[key] - 1):+.1f} %".replace("-", "−")


def ablations(model: str, node: str, base: Callable[..., RunConfig]) -> None:
    """Capacity, and latency at 90 % of plain tensor parallelism's capacity, with each mechanism switched off."""
    tensor = run(base(model=model, node=node, policy="tensor", request_rate=INFINITE))["request_throughput"]
    configs = [
        base(model=model, node=node, policy="interleaved", request_rate=rate, options=replace(Options(), **changes))
        for changes in ABLATIONS.values()
        for rate in (INFINITE, LOAD * tensor)
    ]
    results = in_parallel(configs)
    best = results[0]["request_throughput"]
    load = f"{LOAD:.0%} of tensor's capacity"
    print(f"| {model} on {node} | capacity, requests/s | of recommended | mean ms at {load} | P90 ms |")
    print("|---|---|---|---|---|")
    for name, full, loaded in zip(ABLATIONS, results[::2], results[1::2], strict=True):
        throughput = full["request_throughput"]
        print(
            f"| {name} | {throughput:.2f} | {100 * throughput / best:.1f} % "
            f"| {loaded['mean_e2el_ms']:.0f} | {loaded['p90_e2el_ms']:.0f} |"
        )


def main() -> None:
    """Print the tables that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=400)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--nodes", nargs="+", default=list(NODES))
    parser.add_argument("--only", choices=["headlines", "ablations"])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    def base(**changes: Any) -> RunConfig:
        return RunConfig(num_prompts=args.prompts, seed=args.seed, input_len="16:128", **changes)

    if args.only != "ablations":
        headlines(tuple(args.models), tuple(args.nodes), base)
    if args.only != "headlines":
        for node in dict.fromkeys([args.nodes[0], "h200-nvlink-x4"]):
            print()
            ablations("glm-130b", node, base)


if __name__ == "__main__":
    main()
