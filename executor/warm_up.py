"""A rehearsal before the run: every shape through every slot, so that nothing is made or captured inside it."""

from __future__ import annotations

from executor.device import Device
from executor.inputs import tokens_of
from executor.slots import Slot
from models.transformer import BatchShape
from policy.batch import Batch
from policy.scheduler import Scheduler
from traces.request import Request


def warm_up(device: Device, scheduler: Scheduler, shapes: tuple[BatchShape, ...]) -> None:
    """Run each shape once per slot, alone and then (where the policy overlaps) all slots together.

    The scheduler is the policy's own, so that what is captured is what the run will launch. Equal on all ranks.
    """
    depth = scheduler.options.depth
    for shape in shapes:
        for _ in range(depth):
            run_through(device, scheduler, shape, 1)
        if scheduler.overlapping and depth > 1:
            for _ in range(depth):  # each slot in each place of the queue
                run_through(device, scheduler, shape, depth)
    device.forget()


def run_through(device: Device, scheduler: Scheduler, shape: BatchShape, count: int) -> None:
    """Admit so many equal batches at once and run them to their end, results and times unrecorded."""
    requests = tuple(Request(number, 0.0, shape.padded_len) for number in range(shape.num_sequences))
    for batch in scheduler.enter((requests,) * count, 0.0):
        device.enter(batch, 0.0, Preparation(device, batch))
    while (round_ := scheduler.next_round(0.0)) is not None:
        for launch in round_.launches:
            if launch.stage == device.stage:
                device.issue(launch, round_.round_id)
        for mark in round_.synchronize:
            if mark.stage == device.stage:
                device.synchronize(mark)
    device.parts.lanes.drain()
    for flight in device.take_finished():
        device.parts.outputs.discard(flight.batch.batch_id)
        for piece in flight.pieces:
            device.parts.lanes.release(piece.ticket)


class Preparation:
    """Loads a batch of made-up requests."""

    def __init__(self, device: Device, batch: Batch) -> None:
        self._loader, self._shape = device.parts.loader, batch.shape
        self._staged = self._loader.stage(*tokens_of(batch, device.parts.weights.config, 0))

    def __call__(self, slot: Slot) -> None:
        """Load them into a slot."""
        self._loader.load(slot, self._shape, *self._staged)
