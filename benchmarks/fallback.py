"""Whether interleaving is ever slower than the better of its own options: capacity of the policy against plain tensor
parallelism and against overlap throughout. Prints the cells in which it is, as Markdown; simulated.

python benchmarks/fallback.py     # 160 cells, two to three minutes on two cores
"""

from __future__ import annotations

from itertools import product

from joblib import Parallel, delayed

from policy.options import Options
from weft.runs import RunConfig, simulate

MODELS = ("llama-3-8b", "llama-2-7b", "llama-2-13b", "opt-30b")
NODES = ("h200-nvlink-x4", "a100-nvlink-x4", "v100-nvlink-x4", "h200-hoststaged-x4", "a100-pcie-x4")
# Prompt tokens, requests in a batch.
SHAPES = ((16, 1), (16, 2), (32, 2), (64, 2), (48, 4), (32, 6), (128, 2), (128, 4))
CHOICES = (("tensor", True), ("interleaved", True), ("interleaved", False))
PROMPTS, SHOWN_BELOW = 240, 0.995


def capacity(model: str, node: str, shape: tuple[int, int], policy: str, adaptive: bool) -> float:
    """Requests/s when all wait from the start."""
    tokens, batch_size = shape
    options = Options(batch_size=batch_size, adaptive=adaptive)
    config = RunConfig(model=model, node=node, policy=policy, num_prompts=PROMPTS, request_rate=float("inf"),
                       input_len=str(tokens), options=options)  # fmt: skip
    return float(simulate(config).result["request_throughput"])


def main() -> None:
    """Run all cells, print the worst."""
    cells = list(product(MODELS, NODES, SHAPES))
    found = Parallel(n_jobs=-1)(delayed(capacity)(*cell, *choice) for cell in cells for choice in CHOICES)
    rows = []
    for number, (model, node, (tokens, batch_size)) in enumerate(cells):
        tensor, chosen, overlap = found[3 * number : 3 * number + 3]
        share = chosen / max(tensor, overlap)
        rows.append((share, f"{node}, {model}, {batch_size} × {tokens} tokens", tensor, overlap, chosen))
    print("| node, model, batch | tensor | always overlapping | the policy | of the better |\n|---|---|---|---|---|")
    for share, name, tensor, overlap, chosen in sorted(rows):
        if share < SHOWN_BELOW:
            print(f"| {name} | {tensor:.1f} | {overlap:.1f} | {chosen:.1f} | {share:.1%} |")
    print(f"\n{len(rows)} cells, {sum(row[0] < SHOWN_BELOW for row in rows)} of them below {SHOWN_BELOW:.1%}")


if __name__ == "__main__":
    main()
