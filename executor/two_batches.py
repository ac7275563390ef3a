"""Two batches through a whole forward pass, each way of running them as one CUDA graph: no host cost is in its time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch

from executor.cuda import on
from executor.device import Device, in_turn
from executor.groups import Groups
from executor.lanes import StreamKey
from executor.operations import Collective, Operation
from executor.session import Opened
from models.transformer import BatchShape
from policy.options import Options
from policy.round import Lane, Launch
from policy.scheduler import Scheduler

Body = Callable[[], None]


def only(device: Device, shape: BatchShape, *, comm: bool) -> Body:
    """The collectives of one forward pass, or everything else."""
    operations = [op for op in device.bound(0, shape) if isinstance(op, Collective) == comm]
    run = one_by_one(device.parts.groups, operations)
    return run if comm else in_turn([_renewal(device, shape, 0), run])


def serially(device: Device, shape: BatchShape) -> Body:
    """Both batches, one after the other on one stream: plain tensor parallelism."""
    calls: list[Body] = []
    for slot in (0, 1):
        calls += [_renewal(device, shape, slot), one_by_one(device.parts.groups, device.bound(slot, shape))]
    return in_turn(calls)


def _renewal(device: Device, shape: BatchShape, slot: int) -> Body:
    """What a forward pass starts from, as loading a batch would leave it."""
    return partial(device.parts.loader.renew, device.parts.slots[slot], shape)


def one_by_one(groups: Groups, operations: Sequence[Operation]) -> Body:
    """Operations in their order, on the current stream."""

    def body() -> None:
        for operation in operations:
            if isinstance(operation, Collective):
                groups.call(operation)
            else:
                operation(None)

    return body


def captured(body: Body, opened: Opened, key: StreamKey) -> torch.cuda.CUDAGraph:
    """A graph of what the body does, captured on the stream of a lane."""
    from executor.graphs import capture
    from executor.lanes_cuda import CudaLanes

    lanes = opened.device.parts.lanes
    assert isinstance(lanes, CudaLanes)
    with on(lanes.stream(key)):
        body()
        torch.cuda.synchronize()
        graph = capture(torch.cuda.graph_pool_handle(), body)
    torch.cuda.synchronize()
    return graph


def undivided(options: Options) -> Options:
    """Overlap of whole kernels, whether it pays or not."""
    return replace(options, adaptive=False, decomposition="off", chunks=False)


def plan(opened: Opened, options: Options) -> list[Launch]:
    """All launches of the policy for two batches that enter together; they are in flight on the device from then on.

    They will be one graph, so the policy is told that launches and rounds cost nothing.
    """
    scheduler = Scheduler("interleaved", options, opened.profile.of_free_host(), opened.scheduler().vectors_of)
    requests = tuple(replace(r, arrival_us=0.0) for r in opened.run.requests)
    for batch in scheduler.enter((requests, requests), 0.0):
        opened.device.enter(batch, 0.0, lambda slot: opened.device.parts.loader.renew(slot, opened.shapes[-1]))
    launches: list[Launch] = []
    while (round_ := scheduler.next_round(0.0)) is not None:
        launches += round_.launches
    return launches


def in_words(launches: list[Launch]) -> str:
    """A plan in a line."""
    fills = sum(1 for launch in launches if launch.lane is Lane.FILL)
    return (
        f"{len(launches)} launches, {fills} fills, {sum(1 for x in launches if x.fragment)} fragments, "
        f"withheld {sorted({x.withheld_sms for x in launches})}, CTAs {sorted({x.max_ctas for x in launches})}"
    )
