"""One simulated GPU: streams in order, CTAs on SM slots in waves and never preempted, memory bandwidth shared.

Everything is plain state, driven by SimPy timeouts. At one instant all arrivals and ends are taken in first and the device
is settled once, last (`settle`): who gets the free SM slots, how fast everything runs now, when the next thing ends. Work
is accounted only when its pace changes, so that how often the device is looked at does not change a single bit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import simpy

from models.kernel import Kernel, Kind
from policy.round import Lane, Launch, Mark
from sim.cost import Costs, Shape, cta_shape, memory_bandwidth, up_to_grid
from sim.express import Courses, Express, resumed_cohort
from traces.timeline import Span

if TYPE_CHECKING:
    from sim.link import Transfer

# SimPy's own priorities are 0 and 1: a device is settled after everything else that happens at an instant.
SETTLE_PRIORITY = 2
LANES = (Lane.COMM, Lane.COMPUTE, Lane.FILL)
LANE_RANK = {Lane.COMM: 0, Lane.COMPUTE: 1, Lane.FILL: 2}


@dataclass(slots=True, eq=False)
class Entry:
    """A launch in a stream: its kernels, how far it has come; `gap_us`: from its waits' end to its first kernel."""

    launch: Launch
    round_id: int
    kernels: tuple[Kernel, ...]
    gap_us: float
    position: int = 0
    started: bool = False
    blocked: bool = False
    arrives_us: float = -1.0


@dataclass(slots=True, eq=False)
class Cohort:
    """CTAs of one kernel that started together and go through `waves_left` waves in step."""

    ctas: int
    waves_left: float
    pace_us: float = 0.0
    since_us: float = 0.0
    end_us: float = 0.0


@dataclass(slots=True, eq=False)
class Running:
    """A kernel whose CTAs are on the SMs or wait for them; `limit` bounds how many SMs it may hold."""

    kernel: Kernel
    entry: Entry
    lane: Lane
    order: int
    shape: Shape | None
    limit: int
    ctas_left: int
    cohorts: list[Cohort] = field(default_factory=list)
    held: int = 0
    transfer: Transfer | None = None
    start_us: float = -1.0


@dataclass(slots=True)
class BusyTime:
    """Accumulated microseconds with compute, communication, or both on the SMs."""

    compute_us: float = 0.0
    communication_us: float = 0.0
    overlap_us: float = 0.0
    kernels: int = 0


class Device:
    """The state of one GPU. `rank` is the first of the ranks it stands for when symmetric ranks are folded."""

    def __init__(self, env: simpy.Environment, rank: int, costs: Costs, *, priority: bool, record: bool) -> None:
        self.env, self.rank, self.costs, self.spec = env, rank, costs, costs.device
        self.priority, self.record = priority, record
        self.streams: dict[Lane, deque[Entry]] = {lane: deque() for lane in LANES}
        self.running: list[Running] = []
        self.communicator: deque[tuple[Entry, int]] = deque()
        self.progress: dict[int, tuple[int, float]] = {}
        self.busy = BusyTime()
        self.spans: list[Span] = []
        self.on_progress: Callable[[Device, int, tuple[int, float]], None] = lambda device, batch, point: None
        self.join: Callable[[Device, Running], Transfer]
        # Where collectives of one range can be foreseen: symmetric ranks folded, nothing else on the links.
        self.courses: Courses | None = None
        self.foresees_collectives = False
        self.express: Express | None = None
        self.span_offset_us = 0.0
        self._waiters: list[tuple[Mark, simpy.Event]] = []
        self._order = self._generation = 0
        self._settling = False
        self._free = self.spec.num_sms
        self._counted_us = 0.0
        self._computing = self._communicating = 0
        self._bandwidth = memory_bandwidth(self.spec)
        contention = costs.node.contention
        self._beside_comm = {
            Kind.GEMM: contention.gemm_by_comm,
            Kind.ATTENTION: contention.attention_by_comm,
            Kind.ELEMENTWISE: contention.elementwise_by_comm,
        }
        self._comm_beside = contention.comm_by_compute

    # -- what the host does -----------------------------------------------------------------------------------------

    def issue(self, launch: Launch, kernels: tuple[Kernel, ...], round_id: int) -> None:
        """Put a launch behind what is already on its stream."""
        gap = up_to_grid(self.spec.kernel_gap_us + (self.spec.event_gap_us if launch.waits else 0.0))
        entry = Entry(launch, round_id, kernels, gap)
        self.progress.setdefault(launch.batch_id, (0, 0.0))
        self.streams[launch.lane].append(entry)
        self.communicator.extend((entry, i) for i, k in enumerate(kernels) if k.is_communication)
        self._look_at(launch.lane)

    def reached(self, mark: Mark) -> bool:
        """Whether everything that the mark stands for is done. Marks are of launches issued before, so a batch that is
        not known any more has left."""
        point = self.progress.get(mark.batch_id)
        return point is None or point >= (mark.kernel, mark.part)

    def when(self, mark: Mark) -> simpy.Event | None:
        """An event for the mark, or None if it has been reached."""
        if self.reached(mark):
            return None
        event = self.env.event()
        self._waiters.append((mark, event))
        return event

    @property
    def idle(self) -> bool:
        """Nothing on any stream."""
        return not any(self.streams.values())

    # -- streams ----------------------------------------------------------------------------------------------------

    def _look_at(self, lane: Lane) -> None:
        """Start the head of a stream if its waits are over; the first kernel arrives after the gap."""
        stream = self.streams[lane]
        if not stream or stream[0].started:
            return
        entry = stream[0]
        if not all(self.reached(mark) for mark in entry.launch.waits):
            return
        entry.started = True
        self.arrive_after(entry, entry.gap_us)

    def arrive_after(self, entry: Entry, gap_us: float) -> None:
        entry.arrives_us = self.env.now + gap_us
        self.env.timeout(gap_us).callbacks.append(lambda _: self._arrive(entry))

    def _arrive(self, entry: Entry) -> None:
        """The entry's next kernel wants its SMs; a collective only when it is its turn on the communicator."""
        entry.arrives_us = -1.0
        if self.express is not None:
            self.express.cut()
        kernel = entry.kernels[entry.position]
        if kernel.is_communication and self.communicator[0] != (entry, entry.position):
            entry.blocked = True  # taken up again when the one before it ends
            return
        if self.courses is not None and entry.launch.captured and self._has_device_alone(entry):
            slots = min(self._free, max(1, self.spec.num_sms - entry.launch.withheld_sms))
            course = self.courses.course(entry, slots, up_to_grid(self.spec.graph_gap_us))
            self._count(self.env.now)
            self.express = Express(self, entry, course, slots)
            return
        self.running.append(self.admit(entry))
        self.unsettle()

    def _has_device_alone(self, entry: Entry) -> bool:
        """Whether nothing else runs but transfers that hold their SMs and wait; of collectives, only its own come."""
        if len(entry.kernels) - entry.position < 2 or self._settling:
            return False
        if any(r.transfer is None or r.transfer.started or r.ctas_left for r in self.running):
            return False
        if not any(k.is_communication for k in entry.kernels):
            return True
        return self.foresees_collectives and not self.running and self.communicator[0][0] is entry

    def admit(self, entry: Entry) -> Running:
        """The present kernel of an entry as something that wants SMs."""
        kernel, sms = entry.kernels[entry.position], self.spec.num_sms
        self._order += 1
        if kernel.is_communication:
            running = Running(kernel, entry, entry.launch.lane, self._order, None, sms, 0)
            running.transfer = self.join(self, running)
            running.ctas_left = running.transfer.ctas
            return running
        shape = cta_shape(kernel, self.spec)
        limit = max(1, sms - entry.launch.withheld_sms)
        return Running(kernel, entry, entry.launch.lane, self._order, shape, limit, shape.num_ctas)

    def finish(self, running: Running) -> None:
        """A kernel is through: the next one of its launch follows, or the launch's mark is reached."""
        now, entry = self.env.now, running.entry
        self._count(now)
        self.running.remove(running)
        self._free += running.held
        if running.transfer is None:
            self._computing -= 1
        else:
            self._communicating -= 1
            self.communicator.popleft()
        self.busy.kernels += 1
        if self.record:
            self._write_span(running, now)
        entry.position += 1
        if entry.position < len(entry.kernels):
            gap = self.spec.graph_gap_us if entry.launch.captured else self.spec.kernel_gap_us
            self.arrive_after(entry, up_to_grid(gap))
        else:
            self.end_of(entry)
        if running.transfer is not None:
            self._next_collective()
        self.unsettle()

    def _next_collective(self) -> None:
        """If the collective whose turn it is has been held up only by the one before it, let it go on."""
        if self.communicator:
            entry, position = self.communicator[0]
            if entry.blocked and entry.position == position:
                entry.blocked = False
                self._arrive(entry)

    def end_of(self, entry: Entry) -> None:
        self.streams[entry.launch.lane].popleft()
        mark = entry.launch.mark
        self.progress[mark.batch_id] = (mark.kernel, mark.part)
        self.on_progress(self, mark.batch_id, (mark.kernel, mark.part))
        still = []
        for waited, event in self._waiters:
            if self.reached(waited):
                event.succeed()
            else:
                still.append((waited, event))
        self._waiters = still
        for lane in LANES:
            self._look_at(lane)

    def forget(self, batch_id: int) -> None:
        """A batch has left."""
        del self.progress[batch_id]

    # -- who runs, and how fast -------------------------------------------------------------------------------------

    def unsettle(self) -> None:
        """Something changed: settle the device once, after everything else at this instant."""
        if self.express is not None:
            self.express.cut()
        if not self._settling:
            self._settling = True
            event = self.env.event()
            event._ok, event._value = True, None
            event.callbacks.append(lambda _: self._settle())
            self.env.schedule(event, priority=SETTLE_PRIORITY)  # type: ignore[arg-type]

    def _settle(self) -> None:
        self._settling = False
        now = self.env.now
        self._count(now)
        waiting = [r for r in self.running if r.ctas_left]
        self._break_up(waiting, now)
        self._hand_out(now)
        self._set_paces(now)
        self._await_next_end()

    def _await_next_end(self) -> None:
        ends = [c.end_us for r in self.running for c in r.cohorts]
        self._generation += 1
        if ends:
            generation = self._generation
            self.env.timeout(min(ends) - self.env.now).callbacks.append(lambda _: self._tick(generation))

    def _tick(self, generation: int) -> None:
        """The next cohort has ended, unless the device was settled since this was planned."""
        if generation != self._generation:
            return
        now = self.env.now
        self._count(now)
        for running in list(self.running):
            for cohort in [c for c in running.cohorts if c.end_us <= now]:
                running.cohorts.remove(cohort)
                running.held -= cohort.ctas
                self._free += cohort.ctas
            if running.transfer is None and running.start_us >= 0.0 and not running.cohorts and not running.ctas_left:
                self.finish(running)
        self.unsettle()

    def _break_up(self, waiting: list[Running], now: float) -> None:
        """A cohort that was to go through many waves keeps only the present one when others wait or SMs lie free."""
        for running in self.running:
            others = any(r is not running for r in waiting)
            spare = self._free and running.held < running.limit
            for cohort in running.cohorts if others or spare else ():
                left = cohort.waves_left - (now - cohort.since_us) / cohort.pace_us if cohort.pace_us else 1.0
                whole = int(left) if left > int(left) else int(left) - 1
                if whole > 0:
                    running.ctas_left += whole * cohort.ctas
                    self._retime(cohort, left - whole, cohort.pace_us, now)

    def _hand_out(self, now: float) -> None:
        """Free SMs go to waiting CTAs: by stream priority, then by arrival. CTAs on an SM stay until they end."""
        if self.priority:
            queue = sorted((r for r in self.running if r.ctas_left), key=lambda r: (LANE_RANK[r.lane], r.order))
        else:
            queue = sorted((r for r in self.running if r.ctas_left), key=lambda r: r.order)
        for running in queue:
            room = running.limit
            if running.limit < self.spec.num_sms:  # the partition is shared by everything that is confined to it
                room -= sum(r.held for r in self.running if r.limit < self.spec.num_sms)
            take = min(self._free, running.ctas_left, room)
            if take <= 0:
                continue
            self._free -= take
            running.held += take
            if running.start_us < 0.0:
                self._begin(running, now)
            if running.transfer is not None:
                running.ctas_left -= take
                if not running.ctas_left:
                    running.transfer.resident(self)
                continue
            # Alone, the kernel keeps its SMs for all its full waves; these are then one event.
            alone = len(queue) == 1 and not running.cohorts
            waves = running.ctas_left // take if alone else 1
            running.ctas_left -= waves * take
            running.cohorts.append(Cohort(take, float(waves), 0.0, now))

    def _begin(self, running: Running, now: float) -> None:
        running.start_us = now
        if running.transfer is None:
            self._computing += 1
        else:
            self._communicating += 1

    def _set_paces(self, now: float) -> None:
        """How fast everything goes: SMs, the fair share of memory bandwidth, and what the pair costs beyond that."""
        moving = [r for r in self.running if r.transfer is not None and r.transfer.started]
        wants: list[float] = [r.transfer.bandwidth for r in moving if r.transfer is not None]
        cohorts = [(r, c) for r in self.running if r.shape is not None for c in r.cohorts]
        wants += [c.ctas * r.shape.cta_bytes / r.shape.cta_us for r, c in cohorts if r.shape is not None]
        fair = _fair_share(wants, self._bandwidth)
        for running, cohort in cohorts:
            shape = running.shape
            assert shape is not None
            slow = self._beside_comm[running.kernel.kind] if moving else 1.0
            pace = max(shape.cta_us, cohort.ctas * shape.cta_bytes / fair) * slow
            if pace != cohort.pace_us:
                left = cohort.waves_left
                if cohort.pace_us:
                    left = max(0.0, left - (now - cohort.since_us) / cohort.pace_us)
                self._retime(cohort, left, pace, now)
        for running in moving:
            assert running.transfer is not None
            slow = self._comm_beside if cohorts else 1.0
            running.transfer.set_pace(self, max(1.0, running.transfer.bandwidth / fair) * slow)

    def _retime(self, cohort: Cohort, left: float, pace_us: float, now: float) -> None:
        cohort.waves_left, cohort.pace_us, cohort.since_us = left, pace_us, now
        cohort.end_us = now + up_to_grid(left * pace_us)

    # -- taking the state out and putting it back (sim.recall) ---------------------------------------------------------

    @property
    def unsettled(self) -> bool:
        """Whether something has changed at this instant that is not yet taken into account."""
        return self._settling

    def account(self, elapsed_us: float, compute_us: float, comm_us: float, kernels: int) -> None:
        """What an express range did: beside waiting transfers, which count as communication all the time."""
        if self._communicating:
            self.busy.communication_us += elapsed_us
            self.busy.overlap_us += compute_us
        self.busy.compute_us += compute_us
        self.busy.communication_us += comm_us
        self.busy.kernels += kernels
        self._counted_us = self.env.now

    def resume(self, running: Running, elapsed_us: float) -> None:
        """A kernel that has run alone since `elapsed_us` ago, put on the SMs it has."""
        now = self.env.now
        running.start_us = now - elapsed_us
        if running.transfer is not None:
            running.held, running.ctas_left = running.transfer.ctas, 0
            self._communicating += 1
            running.transfer.thaw(self, running.transfer.alone_since(elapsed_us))
        else:
            slots = min(self._free, running.limit)
            ctas, waves, pace, since = resumed_cohort(running, elapsed_us, slots, self.costs)
            running.held = ctas
            cohort = Cohort(ctas, waves, pace, now - elapsed_us + since)
            cohort.end_us = cohort.since_us + up_to_grid(waves * pace)
            running.cohorts.append(cohort)
            self._computing += 1
        self._free -= running.held
        self._await_next_end()

    def count(self) -> None:
        """Bring the busy times up to now."""
        self._count(self.env.now)

    def restore(self, *, unsettled: bool) -> None:
        """After streams, running kernels and communicator were put in place: set everything going again."""
        self._order = len(self.running)
        self._free = self.spec.num_sms - sum(r.held for r in self.running)
        begun = [r for r in self.running if r.start_us >= 0.0]
        self._communicating = sum(r.transfer is not None for r in begun)
        self._computing = len(begun) - self._communicating
        for stream in self.streams.values():
            if stream and stream[0].arrives_us >= 0.0:
                entry = stream[0]
                self.arrive_after(entry, entry.arrives_us - self.env.now)
        self._await_next_end()
        if unsettled:
            self.unsettle()

    # -- accounts ---------------------------------------------------------------------------------------------------

    def _count(self, now: float) -> None:
        elapsed = now - self._counted_us
        self._counted_us = now
        if self._computing:
            self.busy.compute_us += elapsed
        if self._communicating:
            self.busy.communication_us += elapsed
            if self._computing:
                self.busy.overlap_us += elapsed

    def _write_span(self, running: Running, now: float) -> None:
        entry, kernel, shift = running.entry, running.kernel, self.span_offset_us
        launch = entry.launch
        self.spans.append(
            Span(self.rank, launch.lane, kernel.name, kernel.is_communication, running.start_us + shift, now + shift,
                 launch.batch_id, launch.first + entry.position, entry.round_id)
        )  # fmt: skip


def _fair_share(wants: list[float], capacity: float) -> float:
    """The max-min fair share: who wants less gets what he wants, the others this much each."""
    if sum(wants) <= capacity:
        return float("inf") if len(wants) != 1 else capacity
    left, remaining = capacity, len(wants)
    for want in sorted(wants):
        share = left / remaining
        if want > share:
            return share
        left, remaining = left - want, remaining - 1
    return capacity
