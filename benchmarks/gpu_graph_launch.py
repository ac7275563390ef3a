"""What launching a CUDA graph costs the host: the first time, and after; by layers, with and without all-reduces in it.

python benchmarks/gpu_graph_launch.py [--ranks 2] [--out graph-launches.jsonl]

Layers are like a transformer's in kernels alone: six GEMMs, eight additions and two all-reduces each. In both link
modes, with and without NCCL's support for mixing graphs with other calls (NCCL_GRAPH_MIXING_SUPPORT). A JSON line for
each of three launches: the medians over rank 0's graphs of what the host spent, and of the time until the GPU was
through. Needs as many GPUs as ranks, and torch.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from itertools import product
from multiprocessing.process import BaseProcess
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

MODES = {"as-is": {}, "host-staged": {"NCCL_P2P_DISABLE": "1"}}
ROWS, WIDTH, WEIGHTS = 128, 7168, 4
LAYERS, MOST_LAYERS, LAUNCHES = (1, 2, 12, 48), 48, 3
FEW_GRAPHS = 3
LIMIT_S, FIRST_PORT = 40.0, 29910
Body = Callable[[], None]


def main() -> None:
    """Every mode in processes of its own, for NCCL reads its settings once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("graph-launches.jsonl"))
    args = parser.parse_args()
    if not 1 <= args.ranks <= (there := torch.cuda.device_count()):
        parser.error(f"--ranks {args.ranks}: this machine has {there} GPUs, and every rank needs one of its own")
    context = multiprocessing.get_context("spawn")
    for number, (mode, mixing) in enumerate(product(MODES, (True, False))):
        settings = MODES[mode] | {"NCCL_GRAPH_MIXING_SUPPORT": str(int(mixing)), "MASTER_ADDR": "127.0.0.1",
                                  "MASTER_PORT": str(FIRST_PORT + number), "WORLD_SIZE": str(args.ranks)}  # fmt: skip
        about = {"mode": mode, "mixing": mixing}
        ranks = [
            context.Process(target=rank_main, args=(rank, settings, about, args.out)) for rank in range(args.ranks)
        ]
        for rank in ranks:
            rank.start()
        _end(ranks)


def _end(ranks: Sequence[BaseProcess]) -> None:
    """Wait for all of them, and end what hangs."""
    deadline = time.monotonic() + LIMIT_S
    for rank in ranks:
        rank.join(max(0.1, deadline - time.monotonic()))
    for rank in ranks:
        if rank.is_alive():
            rank.kill()


def rank_main(rank: int, settings: dict[str, str], about: dict[str, Any], out: Path) -> None:
    """All graphs of one rank."""
    os.environ.update(settings, RANK=str(rank))
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    layer = _Layer(device)
    for collectives, num_layers in product((False, True), LAYERS):
        for launch, (host_us, total_us) in enumerate(_launched(layer, num_layers, collectives), 1):
            row = about | {"collectives": collectives, "num_layers": num_layers, "launch": launch,
                           "num_kernels": num_layers * (14 + 2 * collectives), "host_us": round(host_us, 1),
                           "total_us": round(total_us, 1)}  # fmt: skip
            if rank == 0:
                print(json.dumps(row), flush=True)
                with out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
    _together()
    os._exit(0)  # a group whose graphs are alive does not end by itself


class _Layer:
    """Kernels on buffers of their own."""

    def __init__(self, device: torch.device) -> None:
        def made(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device=device, dtype=torch.float16) * 1e-2

        self.x, self.y, self.sums = made(ROWS, WIDTH), made(ROWS, WIDTH), made(ROWS, WIDTH)
        self.weights = [made(WIDTH, WIDTH) for _ in range(WEIGHTS)]
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def run(self, *, collectives: bool) -> None:
        """Both halves."""
        for _ in range(2):
            for number in range(7):
                if number % 3 == 0:
                    torch.mm(self.x, self.weights[number % WEIGHTS], out=self.y)
                else:
                    torch.add(self.y, 1.0, out=self.y)
            if collectives:
                dist.all_reduce(self.sums)


def _launched(layer: _Layer, num_layers: int, collectives: bool) -> list[tuple[float, float]]:
    """Medians of every graph's first, second and third launch: of the host, and to the end."""
    with torch.cuda.stream(layer.stream):
        layer.run(collectives=collectives)
        graphs = [_captured(layer, num_layers, collectives) for _ in range(max(FEW_GRAPHS, MOST_LAYERS // num_layers))]
        found = []
        for _ in range(LAUNCHES):
            times = [_timed(graph.replay) for graph in graphs]
            found.append((median(host for host, _ in times), median(total for _, total in times)))
    return found


def _captured(layer: _Layer, num_layers: int, collectives: bool) -> torch.cuda.CUDAGraph:
    torch.cuda.synchronize()  # a communicator is captured while it has no work of its own
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin(capture_error_mode="thread_local")
    for _ in range(num_layers):
        layer.run(collectives=collectives)
    graph.capture_end()
    return graph


def _timed(launch: Body) -> tuple[float, float]:
    _together()
    started = time.perf_counter()
    launch()
    launched = time.perf_counter()
    torch.cuda.synchronize()
    return (launched - started) * 1e6, (time.perf_counter() - started) * 1e6


def _together() -> None:
    torch.cuda.synchronize()
    dist.barrier()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
