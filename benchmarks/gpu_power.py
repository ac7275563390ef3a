"""Kernels of a forward pass on one GPU: each alone and all in a row, on a GPU that was idle and on one under load, with
the clock and the power that its driver tells. A JSON line each, times in microseconds per call (of a row: per layer).

python benchmarks/gpu_power.py row.jsonl
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from executor.cuda import new_stream, replay_us, settle
from executor.graphs import capture
from executor.inputs import tokens_of
from executor.kernels import bind
from executor.operations import Collective, ComputeKernel, Operation
from executor.slots import Slot
from executor.survey_bed import batch_of
from executor.warm_up import made_up_requests
from executor.weights import make_weights
from models.config import MODELS
from models.kernel import FunctionVector
from models.transformer import BatchShape, Layout, function_vector
from policy.batch import Batch

# One of four ranks' kernels: no collective is called.
LAYOUT, LARGEST = Layout(4, 1), BatchShape(32, 64)
CELLS = (("opt-30b", 48, (16, 64, 128, 256, 512, 1024, 2048)), ("glm-130b", 24, (16, 128, 512, 2048)))
GEMMS = frozenset({"gemm"})
OTHERS = frozenset({"elementwise", "attention"})
# What holds several kernels of each layer.
ROWS = ("whole", "gemms", "others")
ROW_MS, KERNEL_MS, IDLE_S = 250.0, 100.0, 0.05


class Driver:
    """The driver's word on the first GPU."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libnvidia-ml.so.1")
        self._library.nvmlInit_v2()
        self._gpu = ctypes.c_void_p()
        self._library.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(self._gpu))

    def state(self) -> dict[str, Any]:
        """Clocks of SMs and memory (MHz), power (W), temperature, why the clock is held back (0x4: power)."""
        sm, memory, power, heat = (ctypes.c_uint() for _ in range(4))
        why = ctypes.c_ulonglong()
        nvml, gpu = self._library, self._gpu
        nvml.nvmlDeviceGetClockInfo(gpu, 1, ctypes.byref(sm))
        nvml.nvmlDeviceGetClockInfo(gpu, 2, ctypes.byref(memory))
        nvml.nvmlDeviceGetPowerUsage(gpu, ctypes.byref(power))
        nvml.nvmlDeviceGetTemperature(gpu, 0, ctypes.byref(heat))
        nvml.nvmlDeviceGetCurrentClocksThrottleReasons(gpu, ctypes.byref(why))
        return {"sm": sm.value, "mem": memory.value, "w": power.value / 1e3, "why": hex(why.value), "t": heat.value}


class Bench:
    """Graphs on one stream, timed."""

    def __init__(self, device: torch.device, driver: Driver) -> None:
        self.stream, self.driver = new_stream(device, 0), driver

    def times(self, kernels: Sequence[ComputeKernel], load_ms: float) -> dict[str, Any]:
        """Of all these kernels as one graph: after a pause, under load, and the driver's word under load."""

        def body() -> None:
            for kernel in kernels:
                kernel(None)

        graph = self._graph(body)
        torch.cuda.synchronize()
        time.sleep(IDLE_S)
        self._replays(graph, 1)
        idle_us = sorted(self._replays(graph, 2) for _ in range(3))[1]
        with torch.cuda.stream(self.stream):
            for _ in range(max(1, int(load_ms * 1e3 / idle_us))):
                graph.replay()
        time.sleep(0.8 * load_ms / 1e3)
        state = self.driver.state()
        return {"burst": idle_us, "sustained": self._replays(graph, max(2, int(20e3 / idle_us)))} | state

    def _graph(self, body: Callable[[], None]) -> torch.cuda.CUDAGraph:
        with torch.cuda.stream(self.stream):
            body()
            torch.cuda.synchronize()
            graph = capture(torch.cuda.graph_pool_handle(), body)
        torch.cuda.synchronize()
        return graph

    def _replays(self, graph: torch.cuda.CUDAGraph, count: int) -> float:
        with torch.cuda.stream(self.stream):
            return replay_us(graph, count)


def parts_of(vector: FunctionVector, operations: Sequence[Operation]) -> dict[str, list[ComputeKernel]]:
    """The compute kernels of a forward pass by what is timed together: all, each name of a layer, GEMMs and others."""
    found = [(k, op) for k, op in zip(vector.kernels, operations, strict=True) if not isinstance(op, Collective)]
    parts = {"whole": [op for _, op in found]}
    for name in dict.fromkeys(k.name for k in vector.layer if not k.is_communication):
        parts[name] = [op for k, op in found if k.name == name]
    for part, kinds in (("gemms", GEMMS), ("others", OTHERS)):
        parts[part] = [op for k, op in found if k.kind.value in kinds]
    return parts


def cells(bench: Bench, device: torch.device, name: str, layers: int, many_rows: Sequence[int]) -> Iterator[Any]:
    """The lines of one model."""
    config = replace(MODELS[name], num_layers=layers)
    weights = make_weights(config, LAYOUT, 0, device, torch.float16, 1)
    slot = Slot.allocate(config, LAYOUT, 0, LARGEST, device, torch.float16)
    settle(device)
    for rows in many_rows:
        shape = batch_of(rows)
        vector = function_vector(config, shape, LAYOUT, 0)
        batch = Batch(0, made_up_requests(shape), shape, (vector,), 0.0, 0)
        slot.load(shape, slot.pack(shape, *tokens_of(batch, config, 1)))
        for part, kernels in parts_of(vector, bind(config, LAYOUT, 0, weights, slot, shape)).items():
            times = bench.times(kernels, ROW_MS if part == "whole" else KERNEL_MS)
            each = layers if part in ROWS else len(kernels)
            per_call = {key: times[key] / each for key in ("burst", "sustained")}
            yield {"model": name, "rows": rows, "what": part, "n": len(kernels) / layers} | times | per_call


def main() -> None:
    """Every cell, a line a kernel."""
    device = torch.device("cuda", 0)
    bench = Bench(device, Driver())
    with Path(sys.argv[1]).open("w") as file:
        for name, layers, many_rows in CELLS:
            for line in cells(bench, device, name, layers, many_rows):
                file.write(json.dumps(line) + "\n")
                print(line, flush=True)


if __name__ == "__main__":
    main()
