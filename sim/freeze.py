"""The state of one device as a value: relative to now, to the layer that each batch is in, and to nothing else.

Two equal values go on in the same way, to the last bit: times are multiples of 2^-10 us, so differences of them are
exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from models.kernel import Fragment, FunctionVector
from policy.batch import Batch
from policy.round import Lane, Launch, Mark
from policy.window import MOST_LAYERS
from sim.device import LANES, Device, Entry
from sim.sms import Cohort, Running

# How many layers ahead of what a batch has done a plan looks at most, beyond those of the rounds that the host is
# ahead: the layers of a round that is planned now, of the fill that goes with it, and one for good measure.
LOOKAHEAD_LAYERS = MOST_LAYERS + 4


class Place(NamedTuple):
    """Where a batch is: the index that others are counted from, and how far its end is as far as that matters."""

    base: int
    in_prologue: bool
    layers_left: int


@dataclass(frozen=True, slots=True)
class FrozenLaunch:
    """A launch with batches by number and kernels relative to their base; a wait that is over is left out."""

    batch: int
    first: int
    last: int
    lane: Lane
    waits: tuple[tuple[int, int, float], ...]
    fragment: Fragment | None
    captured: bool
    withheld_sms: int
    max_ctas: int


class FrozenEntry(NamedTuple):
    """An entry of a stream; `arrives_in`: when its next kernel will want SMs, -1 if that is not set."""

    launch: FrozenLaunch
    gap_us: float
    position: int
    started: bool
    blocked: bool
    arrives_in: float


class FrozenRunning(NamedTuple):
    """A running kernel; cohorts as (CTAs, waves left, pace, since, until), times relative to now."""

    lane: Lane
    ctas_left: int
    held: int
    inside: int
    begun: bool
    cohorts: tuple[tuple[int, float, float, float, float], ...]
    transfer: tuple[float, ...]


class FrozenDevice(NamedTuple):
    """`progress[j]`: the point that batch j has reached, relative to its base."""

    lanes: tuple[tuple[FrozenEntry, ...], ...]
    running: tuple[FrozenRunning, ...]
    communicator: tuple[tuple[Lane, int, int], ...]
    progress: tuple[tuple[int, float] | None, ...]
    unsettled: bool

    @property
    def idle(self) -> bool:
        """Nothing on any stream."""
        return not any(self.lanes)


IDLE = FrozenDevice(((), (), ()), (), (), (), False)


def place_of(vector: FunctionVector, kernel: int, ahead: int) -> Place:
    """The place of a batch whose next unfinished kernel this is; further than `ahead` layers, the end does not
    matter."""
    layer, _ = vector.locate(kernel)
    if layer < 0:
        return Place(0, True, min(vector.num_layers, ahead))
    layer = min(layer, vector.num_layers)
    base = len(vector.prologue) + layer * len(vector.layer)
    return Place(base, False, min(vector.num_layers - layer, ahead))


def freeze(device: Device, numbers: dict[int, int], bases: list[int]) -> FrozenDevice:
    """Take the state out. `numbers` gives every living batch its number, `bases` their bases."""
    now = device.env.now
    device.cut_express()

    def entry(e: Entry) -> FrozenEntry:
        arrives = e.arrives_us - now if e.arrives_us >= 0.0 else -1.0
        return FrozenEntry(_freeze_launch(e.launch, device, numbers, bases), e.gap_us, e.position, e.started,
                           e.blocked, arrives)  # fmt: skip

    def running(r: Running) -> FrozenRunning:
        cohorts = tuple((c.ctas, c.waves_left, c.pace_us, now - c.since_us, c.end_us - now) for c in r.cohorts)
        transfer = r.transfer.freeze(now) if r.transfer is not None else ()
        return FrozenRunning(r.lane, r.ctas_left, r.held, r.inside, r.start_us >= 0.0, cohorts, transfer)

    where = {id(e): (lane, i) for lane in LANES for i, e in enumerate(device.streams[lane])}
    progress: list[tuple[int, float] | None] = [None] * len(numbers)
    for batch_id, (kernel, part) in device.progress.items():
        progress[numbers[batch_id]] = (kernel - bases[numbers[batch_id]], part)
    return FrozenDevice(
        tuple(tuple(entry(e) for e in device.streams[lane]) for lane in LANES),
        tuple(running(r) for r in device.sms.running),
        tuple((*where[id(e)], position) for e, position in device.communicator),
        tuple(progress),
        device.sms.settling,
    )


def _freeze_launch(launch: Launch, device: Device, numbers: dict[int, int], bases: list[int]) -> FrozenLaunch:
    number = numbers[launch.batch_id]
    base = bases[number]
    waits = tuple(
        (numbers[m.batch_id], m.kernel - bases[numbers[m.batch_id]], m.part)
        for m in launch.waits
        if m.batch_id in numbers and not device.reached(m)
    )
    return FrozenLaunch(number, launch.first - base, launch.last - base, launch.lane, waits, launch.fragment,
                        launch.captured, launch.withheld_sms, launch.max_ctas)  # fmt: skip


def thaw(device: Device, frozen: FrozenDevice, batches: list[Batch], bases: list[int]) -> None:
    """Put the state into a new device, at its present time."""
    now = device.env.now
    for number, point in enumerate(frozen.progress):
        if point is not None:
            device.progress[batches[number].batch_id] = (point[0] + bases[number], point[1])
    for lane, entries in zip(LANES, frozen.lanes, strict=True):
        for e in entries:
            launch = _thaw_launch(e.launch, batches, bases)
            kernels = batches[e.launch.batch].vectors[0].range(launch.first, launch.last)
            if launch.fragment is not None:
                kernels = (kernels[0].fragment(launch.fragment),)
            arrives = e.arrives_in + now if e.arrives_in >= 0.0 else -1.0
            device.streams[lane].append(Entry(launch, 0, kernels, e.gap_us, e.position, e.started, e.blocked, arrives))
    device.communicator.extend((device.streams[lane][i], position) for lane, i, position in frozen.communicator)
    for r in frozen.running:
        device.sms.running.append(_thaw_running(r, device, now))
    device.restore(unsettled=frozen.unsettled)


def _thaw_launch(frozen: FrozenLaunch, batches: list[Batch], bases: list[int]) -> Launch:
    base = bases[frozen.batch]
    waits = tuple(Mark(batches[j].batch_id, kernel + bases[j], part) for j, kernel, part in frozen.waits)
    return Launch(batches[frozen.batch].batch_id, frozen.first + base, frozen.last + base, frozen.lane, waits,
                  frozen.fragment, 0, frozen.captured, frozen.withheld_sms, frozen.max_ctas)  # fmt: skip


def _thaw_running(frozen: FrozenRunning, device: Device, now: float) -> Running:
    running = device.admit(device.streams[frozen.lane][0])
    running.ctas_left, running.held, running.inside = frozen.ctas_left, frozen.held, frozen.inside
    running.start_us = now if frozen.begun else -1.0
    running.cohorts = [
        Cohort(ctas, left, pace, now - since, now + end) for ctas, left, pace, since, end in frozen.cohorts
    ]
    if running.transfer is not None:
        running.transfer.thaw(device, frozen.transfer)
    return running
