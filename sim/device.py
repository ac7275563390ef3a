"""One simulated GPU: streams whose launches run in order, marks that launches reach, a communicator that is serial.

Everything is plain state, driven by SimPy timeouts; what happens on the SMs is in `sim.sms`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import simpy

from models.kernel import Kernel
from policy.round import Lane, Launch, Mark
from sim.cost import Costs, partition_sms, up_to_grid
from sim.express import Courses, Express
from sim.sms import Running, Sms
from traces.timeline import Span

if TYPE_CHECKING:
    from sim.link import Transfer

LANES = (Lane.COMM, Lane.COMPUTE, Lane.FILL)


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

    def clock(self, costs: Costs) -> float:
        """The clock of its arithmetic, see `Costs.clock`."""
        return costs.clock(self.kernels, self.launch.max_ctas)


class Device:
    """The state of one GPU. `rank` is the first of the ranks it stands for when symmetric ranks are folded."""

    def __init__(self, env: simpy.Environment, rank: int, costs: Costs, *, priority: bool, record: bool) -> None:
        self.env, self.rank, self.costs, self.spec = env, rank, costs, costs.device
        self.record = record
        self.sms = Sms(self, costs, priority=priority)
        self.streams: dict[Lane, deque[Entry]] = {lane: deque() for lane in LANES}
        self.communicator: deque[tuple[Entry, int]] = deque()
        self.progress: dict[int, tuple[int, float]] = {}
        self.spans: list[Span] = []
        self.on_progress: Callable[[Device, int, tuple[int, float]], None] = lambda device, batch, point: None
        self.join: Callable[[Device, Running], Transfer]
        # Where collectives of one range can be foreseen: symmetric ranks folded, nothing else on the links.
        self.courses: Courses | None = None
        self.foresees_collectives = False
        self.express: Express | None = None
        self._waiters: list[tuple[Mark, simpy.Event]] = []
        self._order = 0

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
        """The entry's next kernel wants its SMs after so long."""
        entry.arrives_us = self.env.now + gap_us
        self.env.timeout(gap_us).callbacks.append(lambda _: self.arrive(entry))

    def arrive(self, entry: Entry, *, may_express: bool = True) -> None:
        """The entry's next kernel wants its SMs; a collective only when it is its turn on the communicator."""
        entry.arrives_us = -1.0
        self.cut_express()
        kernel = entry.kernels[entry.position]
        if kernel.is_communication and self.communicator[0] != (entry, entry.position):
            entry.blocked = True  # taken up again when the one before it ends
            return
        if may_express and self.courses is not None and entry.launch.captured and self._has_device_alone(entry):
            slots = min(self.sms.free, partition_sms(self.spec, entry.launch.withheld_sms))
            course = self.courses.course(entry, slots, up_to_grid(self.spec.graph_gap_us))
            self.sms.count()
            self.express = Express(self, entry, course)
        else:
            self.sms.add(self.admit(entry))

    def _has_device_alone(self, entry: Entry) -> bool:
        """Whether nothing else runs but transfers that hold their SMs and wait; of collectives, only its own come."""
        if len(entry.kernels) - entry.position < 2 or self.sms.settling or not self.sms.only_waiting_transfers:
            return False
        if not any(k.is_communication for k in entry.kernels[entry.position :]):
            return True
        if any(other.blocked for other, _ in self.communicator):
            return False  # another launch's collective goes on as soon as one of these ends
        return self.foresees_collectives and not self.sms.running and self.communicator[0][0] is entry

    def cut_express(self) -> None:
        """Something comes between: what ran as one event goes on kernel by kernel."""
        if self.express is not None:
            self.express.cut()

    def admit(self, entry: Entry) -> Running:
        """The present kernel of an entry as something that wants SMs."""
        kernel, sms = entry.kernels[entry.position], self.spec.num_sms
        self._order += 1
        if kernel.is_communication:
            running = Running(kernel, entry, entry.launch.lane, self._order, None, sms, 0)
            running.transfer = self.join(self, running)
            running.ctas_left = running.transfer.ctas
            return running
        shape = self.costs.shape(kernel, entry.launch.withheld_sms, entry.clock(self.costs))
        limit = partition_sms(self.spec, entry.launch.withheld_sms)
        return Running(kernel, entry, entry.launch.lane, self._order, shape, limit, shape.num_ctas)

    def finish(self, running: Running) -> None:
        """A kernel is through: the next one of its launch follows, or the launch's mark is reached."""
        entry = running.entry
        self.sms.remove(running)
        if running.transfer is not None:
            self.communicator.popleft()
        if self.record:
            self._write_span(running)
        entry.position += 1
        if entry.position < len(entry.kernels):
            gap = self.spec.graph_gap_us if entry.launch.captured else self.spec.kernel_gap_us
            self.arrive_after(entry, up_to_grid(gap))
        else:
            self.end_of(entry)
        if running.transfer is not None:
            self._next_collective()

    def _next_collective(self) -> None:
        """If the collective whose turn it is has been held up only by the one before it, let it go on."""
        if self.communicator:
            entry, position = self.communicator[0]
            if entry.blocked and entry.position == position:
                entry.blocked = False
                self.arrive(entry)

    def end_of(self, entry: Entry) -> None:
        """A launch is through: its mark is reached, and whatever waited for it may go on."""
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

    # -- taking the state out and putting it back (sim.recall) ---------------------------------------------------------

    def restore(self, *, unsettled: bool) -> None:
        """After streams, running kernels and communicator were put in place: set everything going again."""
        self._order = len(self.sms.running)
        for stream in self.streams.values():
            if stream and stream[0].arrives_us >= 0.0:
                self.arrive_after(stream[0], stream[0].arrives_us - self.env.now)
        self.sms.restore(unsettled=unsettled)

    def _write_span(self, running: Running) -> None:
        launch, kernel = running.entry.launch, running.kernel
        self.spans.append(
            Span(self.rank, launch.lane, kernel.name, kernel.is_communication, running.start_us, self.env.now,
                 launch.batch_id, launch.first + running.entry.position, running.entry.round_id)
        )  # fmt: skip
