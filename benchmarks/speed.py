"""How fast the simulator is, how it grows, and how much memory it takes. Prints Markdown.

    python benchmarks/speed.py            # about four minutes
    python benchmarks/speed.py --quick

An iteration is one batch through all layers and ranks. Kernels count every rank's, also where ranks are folded and
layers recalled: what the result stands for. Each line runs in a process of its own, so that memory is its own.
"""

from __future__ import annotations

import argparse
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

from sim.simulate import Fidelity
from weft.runs import RunConfig, simulate

NODE = "a100-nvlink-x4"
MODEL = "llama-3-70b"


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    name: str
    config: RunConfig
    exact: bool = False


def measure(case: Case) -> dict[str, Any]:
    """Run one case and look at the clock and at this process's memory."""
    started = time.perf_counter()
    result = simulate(case.config, Fidelity(exact=case.exact)).result
    return {
        "wall_s": time.perf_counter() - started,
        "iterations": result["sim_iterations"],
        "kernels": result["sim_kernels"],
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def cases(quick: bool) -> list[Case]:
    """Default and exact mode, fixed and mixed lengths, and growth with requests, layers, ranks and policies."""
    base = RunConfig(model=MODEL, node=NODE, num_prompts=1000 if quick else 8000, request_rate=40.0, input_len="512")
    exact = replace_config(base, num_prompts=16)
    mixed = replace_config(base, num_prompts=400 if quick else 2000, input_len="16:128")
    lines = []
    for policy in ("tensor", "pipeline", "hybrid", "interleaved", "liger-artifact"):
        few = {"pipeline": 400, "hybrid": 200}.get(policy, base.num_prompts)
        lines.append(Case(f"{policy}, 512 tokens", replace_config(base, policy=policy, num_prompts=few)))
        lines.append(
            Case(f"{policy}, 16 to 128 tokens", replace_config(mixed, policy=policy, num_prompts=min(few, 2000)))
        )
        lines.append(Case(f"{policy}, exact", replace_config(exact, policy=policy), exact=True))
    for num in (1000, 10_000) if quick else (1000, 10_000, 100_000):
        lines.append(Case(f"tensor, {num} requests", replace_config(base, policy="tensor", num_prompts=num)))
        lines.append(Case(f"interleaved, {num} requests", replace_config(base, policy="interleaved", num_prompts=num)))
    for model in ("llama-3-8b", "llama-3-70b"):
        lines.append(
            Case(f"interleaved, {model}, exact", replace_config(exact, policy="interleaved", model=model), True)
        )
    for tp in (2, 4):
        lines.append(Case(f"interleaved, TP{tp}, exact", replace_config(exact, policy="interleaved", tp=tp), True))
    return lines


def replace_config(config: RunConfig, **changes: Any) -> RunConfig:
    """The configuration with some fields changed."""
    fields = {name: getattr(config, name) for name in RunConfig.__struct_fields__}
    return RunConfig(**(fields | changes))


def main() -> None:
    """Measure every case and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer requests")
    args = parser.parse_args()
    print("| case | iterations | iterations/s | kernels/s | wall s | peak MB |\n|---|---|---|---|---|---|", flush=True)
    for case in cases(args.quick):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            m = pool.submit(measure, case).result()
        rate, kernels = m["iterations"] / m["wall_s"], m["kernels"] / m["wall_s"]
        columns = (
            case.name,
            m["iterations"],
            f"{rate:,.0f}",
            f"{kernels:,.0f}",
            f"{m['wall_s']:.1f}",
            f"{m['peak_mb']:.0f}",
        )
        print(f"| {' | '.join(map(str, columns))} |", flush=True)


if __name__ == "__main__":
    main()
