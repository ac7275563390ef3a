"""CUDA graphs: ranges of kernels captured once and replayed at the price of one launch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from executor.cuda import new_event
from executor.device import Device
from executor.garbage import no_collections
from executor.lanes import StreamKey
from executor.lanes_cuda import CudaLanes
from policy.round import Lane, Launch

Body = Callable[[], None]
# A graph of a few kernels takes some tens of kilobytes of device memory and a millisecond to make.
MAX_GRAPHS = 40_000


class GraphCache:
    """Graphs by what they run and the stream that they were captured on.

    A graph is replayed on its own stream alone: cuBLAS keeps a workspace per stream, and two graphs captured on one
    stream and replayed on two would share it. Graphs of a stream never run at the same time, so they share a memory
    pool.
    """

    def __init__(self) -> None:
        self._graphs: dict[tuple[object, ...], torch.cuda.CUDAGraph] = {}
        self.sealed = False
        self.refused: dict[StreamKey, str] = {}
        self._pools: dict[StreamKey, Any] = {}

    def __len__(self) -> int:
        return len(self._graphs)

    def holds(self, key: tuple[object, ...]) -> bool:
        """Whether this range is captured."""
        return key in self._graphs

    def replay(self, key: tuple[object, ...], stream: StreamKey, body: Body, *, collectives: bool) -> Body:
        """What replays the range, or runs it as it is and captures it behind: the first run also warms what must not
        happen in a capture."""

        def run() -> None:
            graph = self._graphs.get(key)
            if graph is not None:
                graph.replay()
                return
            if collectives:
                torch.cuda.synchronize()  # its communicator may be in a graph that runs
            body()
            if not self.sealed and len(self._graphs) < MAX_GRAPHS and stream not in self.refused:
                self._keep(key, stream, body, collectives=collectives)

        graph = self._graphs.get(key)
        return graph.replay if graph is not None else run

    def _keep(self, key: tuple[object, ...], stream: StreamKey, body: Body, *, collectives: bool) -> None:
        try:
            self._graphs[key] = self._capture(stream, body, collectives=collectives)
        except RuntimeError as error:
            if collectives or not stream.withheld_sms:
                raise
            # A driver that cannot capture on a partition's stream: kernels go one by one, and the result says so.
            self.refused[stream] = str(error)

    def _capture(self, stream: StreamKey, body: Body, *, collectives: bool) -> torch.cuda.CUDAGraph:
        if collectives:
            # A communicator must not be captured while it has work of its own in flight.
            torch.cuda.synchronize()
        if stream not in self._pools:
            self._pools[stream] = torch.cuda.graph_pool_handle()
        return capture(self._pools[stream], body)

    def clear(self) -> None:
        """Give the graphs and their memory back."""
        torch.cuda.synchronize()
        self._graphs.clear()
        self._pools.clear()


def capture(pool: Any, body: Body) -> torch.cuda.CUDAGraph:
    """Capture on the current stream. thread_local: NCCL's watchdog thread may go on asking for its events."""
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
    with _ended(graph):
        body()
    return graph


@contextmanager
def _ended(graph: torch.cuda.CUDAGraph) -> Iterator[None]:
    """End the capture in any case; if its body failed, that is the error to tell.

    Nothing is collected meanwhile: what a forgotten event or graph does when it goes is not allowed inside a capture.
    """
    with no_collections():
        try:
            yield
        except BaseException:
            with suppress(RuntimeError):
                graph.capture_end()
            raise
    graph.capture_end()


def capture_plan(device: Device, launches: list[Launch]) -> torch.cuda.CUDAGraph:
    """One graph of a whole plan: launches on all lanes, with their waits; it begins and ends on the compute lane.

    The batches must be in flight and loaded; they leave with the capture. Replaying it runs them again.
    """
    lanes = device.parts.lanes
    assert isinstance(lanes, CudaLanes)
    origin = lanes.stream(StreamKey(Lane.COMPUTE))
    # Made now if they are new: a green context cannot be made inside a capture.
    keys = sorted({_key(launch) for launch in launches} | {StreamKey(Lane.COMM)})
    streams = [stream for key in keys if (stream := lanes.stream(key)) != origin]
    lanes.drain()
    lanes.capturing = True
    before = torch.cuda.current_stream()
    torch.cuda.set_stream(origin)
    graph = torch.cuda.CUDAGraph()
    try:
        graph.capture_begin(capture_error_mode="thread_local")
        with _ended(graph):
            _fork(origin, streams)
            device.begin_capture()
            for launch in launches:
                device.issue(launch, 0)
            _join(origin, streams)
            # Launches leave their own stream current, and a capture must end where it began.
            torch.cuda.set_stream(origin)
    finally:
        lanes.capturing = False
        lanes.leave()
        torch.cuda.set_stream(before)
        device.end_capture()
    return graph


def _fork(origin: torch.cuda.Stream, streams: list[torch.cuda.Stream]) -> None:
    event = new_event()
    event.record(origin)
    for stream in streams:
        stream.wait_event(event)


def _join(origin: torch.cuda.Stream, streams: list[torch.cuda.Stream]) -> None:
    for stream in streams:
        event = new_event()
        event.record(stream)
        origin.wait_event(event)


def _key(launch: Launch) -> StreamKey:
    return StreamKey(launch.lane, launch.withheld_sms)
