"""What a device is really made of: threads on a CPU, streams and graphs on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from executor.device import Graphs
from executor.lanes import Lanes
from executor.lanes_cpu import CpuLanes
from executor.measure import Stopwatch
from executor.stopwatch import CpuStopwatch, CudaStopwatch


@dataclass(frozen=True, slots=True)
class Backing:
    """Lanes, the graph cache where there is one, and a stopwatch."""

    lanes: Lanes
    graphs: Graphs | None
    stopwatch: Stopwatch
    close: Callable[[], None]

    @property
    def num_graphs(self) -> int:
        """Graphs captured so far."""
        return 0 if self.graphs is None else len(self.graphs)

    @property
    def refused(self) -> dict[str, str]:
        """Streams on which nothing can be captured, and why."""
        refused = {} if self.graphs is None else self.graphs.refused
        return {f"{key.lane} without {key.withheld_sms} SMs": why for key, why in refused.items()}


def make_backing(device: torch.device, *, priority: bool) -> Backing:
    """Lanes of a device; with `priority`, streams have priorities."""
    if device.type == "cpu":
        threads = CpuLanes()
        return Backing(threads, None, CpuStopwatch(), threads.close)
    from executor.graphs import GraphCache
    from executor.lanes_cuda import CudaLanes

    streams = CudaLanes(device, priority=priority)
    graphs = GraphCache()
    return Backing(streams, graphs, CudaStopwatch(streams.stream), graphs.clear)
