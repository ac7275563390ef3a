"""Warming up before the run: every shape through every slot, so that nothing is made or captured inside it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain, islice, product

from executor.device import COMM_KEY, Device
from executor.inputs import tokens_of
from executor.lanes import StreamKey
from executor.operations import Collective, Operation
from executor.order import RoundsHash
from executor.results import HostTime
from executor.slots import Slot
from executor.status import Steps
from models.kernel import FunctionVector, Kind
from models.transformer import BatchShape, function_vector
from policy.batch import Batch
from policy.round import Lane
from policy.scheduler import Scheduler
from traces.request import Request

# A graph is made when it is first asked for, and at its first launch CUDA brings it to the device, which takes the host
# some 2 us a kernel: 1.5 ms instead of 0.25 for 48 layers on an H200. Behind these, launches are as they will stay.
TURNS = 2
# Graphs that are made before a run: one or two milliseconds each, on every rank.
MOST_AHEAD = 30_000


def warm_up(device: Device, scheduler: Scheduler, shapes: tuple[BatchShape, ...]) -> None:
    """Run each shape once per slot, alone and then (where the policy overlaps) all slots together.

    The scheduler is the policy's own, so that what is captured is what the run will launch. Equal on all ranks.
    """
    depth = scheduler.options.depth
    turns = 1 if device.parts.graphs is None else TURNS
    for shape in shapes:
        for _ in range(turns * depth):
            run_through(device, scheduler, [shape])
        if scheduler.overlapping and depth > 1:
            for _ in range(depth):  # each slot in each place of the queue
                for _ in range(turns):
                    run_through(device, scheduler, [shape] * depth)
                run_through(device, scheduler, [shape])  # so that another slot comes first
    device.forget()


def capture_ranges(
    device: Device, shapes: tuple[BatchShape, ...], withheld: Sequence[int], ctas: Sequence[int]
) -> None:
    """Capture what an interleaving policy will ask for, in every slot, by worth as far as it goes: whole layers with
    their collectives, runs of compute kernels on both lanes, parts of runs; and all-reduces. Equal on all ranks:
    collectives are inside."""
    full = [shape for shape in shapes if shape.num_sequences == shapes[-1].num_sequences]
    groups = [list(product(range(len(device.parts.slots)), some))
              for some in (full, [shape for shape in shapes if shape not in full])]  # fmt: skip
    sizes = [len(level) for level in ranges_ahead(_made_up(device, shapes[-1], 0).vectors[device.stage], withheld)]
    counts = levels_that_fit(sizes, [len(places) for places in groups], MOST_AHEAD)
    for places, count in zip(groups, counts, strict=True):
        for place in places:
            _capture(device, *place, withheld, ctas, count)
    device.parts.lanes.drain()


def levels_that_fit(sizes: Sequence[int], groups: Sequence[int], most: int) -> list[int]:
    """How many levels of ranges each group of places gets, so that there are no more than `most` altogether: level by
    level, of each the groups in their order. `sizes`: ranges of a level in one place; `groups`: places of each."""
    counts = [0] * len(groups)
    for level, size in enumerate(sizes):
        for group, places in enumerate(groups):
            if counts[group] == level and size * places <= most:
                counts[group] += 1
                most -= size * places
    return counts


def _capture(
    device: Device, number: int, shape: BatchShape, withheld: Sequence[int], ctas: Sequence[int], num_levels: int
) -> None:
    """A shape's ranges in one slot, and its all-reduce."""
    batch = _made_up(device, shape, number)
    # What a larger batch left in the slot would be out of range.
    _at_once(device, StreamKey(Lane.COMPUTE), partial(Preparation(device, batch), device.parts.slots[number]))
    for key, span in chain.from_iterable(ranges_ahead(batch.vectors[device.stage], withheld)[:num_levels]):
        if not device.is_captured(batch, key, span, 0):  # by an earlier run
            for _ in range(TURNS):
                _at_once(device, key, device.replay(batch, key, span, 0))
    for operation in islice(_all_reduces(device.bound(number, shape)), 1):  # all layers sum the same buffer
        for count in [*ctas] * TURNS:
            _at_once(device, COMM_KEY, device.replay_collective(operation, None, count))


def _all_reduces(operations: Sequence[Operation]) -> Iterator[Collective]:
    for operation in operations:
        if isinstance(operation, Collective) and operation.kind is Kind.ALL_REDUCE:
            yield operation


def _at_once(device: Device, key: StreamKey, work: Callable[[], None]) -> None:
    """Nothing orders these pieces, so each is waited for."""
    Steps.add()
    device.parts.lanes.synchronize(device.parts.lanes.run(key, (), work))


Ranges = list[tuple[StreamKey, tuple[int, int]]]


def ranges_ahead(vector: FunctionVector, withheld: Sequence[int]) -> list[Ranges]:
    """Ranges that are worth a graph, the worthiest first: layers, whole runs, what fills take of them, what the compute
    lane does. A range without a graph is launched kernel by kernel."""
    size, begin = len(vector.layer), len(vector.prologue)
    layers = ((begin + layer * size, begin + (layer + 1) * size) for layer in range(vector.num_layers))
    levels: list[Ranges] = [[(StreamKey(Lane.COMPUTE), span) for span in layers]]
    compute, fill = ([StreamKey(lane, sms) for sms in withheld] for lane in (Lane.COMPUTE, Lane.FILL))
    for keys, spans in ((compute + fill, _runs(vector)), (fill, _parts(vector)), (compute, _parts(vector))):
        levels.append([(key, span) for key in keys for span in spans if span[1] - span[0] > 1])
    return levels


def _runs(vector: FunctionVector) -> list[tuple[int, int]]:
    """Compute kernels from one collective to the next."""
    return [(first, last) for first, last in _chain(vector.run_end) if not vector.kernels[first].is_communication]


def _parts(vector: FunctionVector) -> list[tuple[int, int]]:
    """Of every run, its units, and from each unit after the first on what is left."""
    found: list[tuple[int, int]] = []
    for begin, end in _runs(vector):
        units = [(first, last) for first, last in _chain(vector.unit_end) if begin <= first < end]
        found += [(first, last) for first, last in units if (first, last) != (begin, end)]
        found += [(first, end) for first, last in units[1:] if last != end]
    return found


def _chain(ends: Sequence[int]) -> Iterator[tuple[int, int]]:
    first = 0
    while first < len(ends):
        yield first, ends[first]
        first = ends[first]


def run_through(device: Device, scheduler: Scheduler, shapes: Sequence[BatchShape]) -> HostTime:
    """Run made-up batches of these shapes to their end, each as soon as there is room, results and times unrecorded;
    the host's time, all that is not issuing or waiting as planning."""
    spent, rounds, waiting = HostTime(), RoundsHash(), list(reversed(shapes))
    while waiting or scheduler.state.flights:
        while waiting and scheduler.has_room(len(scheduler.state.flights)):
            for batch in scheduler.enter((made_up_requests(waiting.pop()),), 0.0):
                device.enter(batch, 0.0, Preparation(device, batch))
        Steps.add()
        started = time.perf_counter()
        round_ = scheduler.next_round(0.0)
        assert round_ is not None
        planned = time.perf_counter()
        own = [launch for launch in round_.launches if launch.stage == device.stage]
        for launch in own:
            device.issue(launch, round_.round_id)
        issued = time.perf_counter()
        for mark in round_.synchronize:
            if mark.stage == device.stage:
                device.synchronize(mark)
        synchronized = time.perf_counter()
        # What else the main loop does of a round.
        rounds.add(round_)
        rounds.settle()
        device.order.settle()
        spent.plan_s += planned - started + time.perf_counter() - synchronized
        spent.issue_s += issued - planned
        spent.rounds, spent.launches = spent.rounds + 1, spent.launches + len(own)
    let_go(device)
    return spent


def let_go(device: Device) -> None:
    """Wait for all that is in flight; it leaves without results or times."""
    device.parts.lanes.drain()
    for flight in device.take_finished():
        device.parts.outputs.discard(flight.batch.batch_id)
        for piece in flight.pieces:
            device.parts.lanes.release(piece.ticket)


def made_up_requests(shape: BatchShape) -> tuple[Request, ...]:
    """Requests that nobody made, which fill a batch of this shape."""
    return tuple(Request(number, 0.0, shape.padded_len) for number in range(shape.num_sequences))


def _made_up(device: Device, shape: BatchShape, slot: int) -> Batch:
    """A batch that nobody asked for, in its slot."""
    weights = device.parts.weights
    vector = function_vector(weights.config, shape, weights.layout, device.stage)
    return Batch(-1, made_up_requests(shape), shape, (vector,) * (device.stage + 1), 0.0, slot)


class Preparation:
    """Loads a batch of made-up requests."""

    def __init__(self, device: Device, batch: Batch) -> None:
        self._loader, self._shape = device.parts.loader, batch.shape
        tokens = tokens_of(batch, device.parts.weights.config, 0)
        self._packed = self._loader.stage(device.parts.slots[batch.slot], batch.shape, *tokens)

    def __call__(self, slot: Slot) -> None:
        """Load them into a slot."""
        self._loader.load(slot, self._shape, self._packed)
