"""One rank's device: launches become work on lanes, marks become tickets, slots hold the batches in flight."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Protocol

from executor.groups import Groups
from executor.inputs import Loader, Outputs
from executor.kernels import bind
from executor.lanes import Clock, Lanes, StreamKey, Ticket
from executor.operations import Collective, Operation
from executor.order import OrderLog
from executor.recorder import Piece
from executor.slots import Slot
from executor.weights import Weights
from models.kernel import Fragment, FunctionVector
from models.transformer import BatchShape
from policy.batch import Batch
from policy.round import Lane, Launch, Mark

Body = Callable[[], None]
COMM_KEY = StreamKey(Lane.COMM)


class Graphs(Protocol):
    """A cache of captured ranges. `refused`: streams on which nothing can be captured, and why."""

    refused: dict[StreamKey, str]

    def __len__(self) -> int:
        """How many are captured."""

    def run(self, key: tuple[object, ...], stream: StreamKey, body: Body, *, collectives: bool) -> None:
        """Run the range on the current stream: as a graph where there is one, else as it is."""


@dataclass(slots=True)
class InFlight:
    """A batch in flight on this rank; `tickets[i]` is done when everything before `points[i]` is."""

    batch: Batch
    entered_us: float
    slot: Slot
    vector: FunctionVector
    operations: list[Operation]
    prepare: Body
    points: list[tuple[int, float]] = field(default_factory=list)
    tickets: list[Ticket] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)

    @property
    def is_issued(self) -> bool:
        """Everything of it is on the lanes."""
        return bool(self.points) and self.points[-1] >= (len(self.vector), 0.0)


@dataclass(frozen=True, slots=True)
class Parts:
    """What a device is made of."""

    weights: Weights
    slots: Sequence[Slot]
    groups: Groups
    lanes: Lanes
    loader: Loader
    outputs: Outputs
    clock: Clock
    graphs: Graphs | None
    bound: dict[tuple[int, BatchShape], list[Operation]]


class Device:
    """Issues launches.

    `poison`: NaN in a slot before a batch is loaded. `split`: ranges with collectives are not one graph, so that every
    collective has its own span. `copy_out`: copy the logits of finished batches to the host.
    """

    def __init__(self, parts: Parts, *, poison: bool = False, split: bool = False, copy_out: bool = False) -> None:
        self.parts, self.poison, self.split, self.copy_out = parts, poison, split, copy_out
        self.stage = parts.weights.stage
        self.flights: dict[int, InFlight] = {}
        self.order = OrderLog()
        self._tails: dict[Lane, Ticket] = {}
        self._bodies: dict[tuple[int, BatchShape, int, int, int], Body] = {}
        self._capturing = False

    # -- batches ----------------------------------------------------------------------------------------------------

    def enter(self, batch: Batch, entered_us: float, prepare: Callable[[Slot], None]) -> None:
        """A batch gets its slot; `prepare` loads it, on the lane of its first kernel."""
        slot = self.parts.slots[batch.slot]
        self.flights[batch.batch_id] = InFlight(
            batch,
            entered_us,
            slot,
            batch.vectors[self.stage],
            self.bound(batch.slot, batch.shape),
            lambda: prepare(slot),
        )

    def bound(self, slot: int, shape: BatchShape) -> list[Operation]:
        """The kernels of a shape, bound to a slot; made once."""
        operations = self.parts.bound.get((slot, shape))
        if operations is None:
            w = self.parts.weights
            operations = bind(w.config, w.layout, self.stage, w, self.parts.slots[slot], shape)
            self.parts.bound[slot, shape] = operations
        return operations

    def take_finished(self) -> list[InFlight]:
        """Batches that are through, oldest first; they leave."""
        lanes = self.parts.lanes
        over = [f for f in self.flights.values() if f.is_issued and lanes.is_done(f.tickets[-1])]
        for flight in over:
            del self.flights[flight.batch.batch_id]
        return over

    # -- launches ---------------------------------------------------------------------------------------------------

    def issue(self, launch: Launch, round_id: int) -> None:
        """Put one launch of this stage on its lane, behind what it waits for."""
        flight = self.flights[launch.batch_id]
        waits = [ticket for mark in launch.waits if (ticket := self.ticket(mark)) is not None]
        starts = launch.first == 0 and (launch.fragment is None or launch.fragment.start == 0)
        mark = launch.mark
        ends = mark.kernel == len(flight.vector)
        pieces = self._pieces(launch, flight.vector)
        for number, (first, last) in enumerate(pieces):
            before = flight.prepare if starts and number == 0 else None
            after = self._copy_out(flight) if ends and number == len(pieces) - 1 and self.copy_out else None
            waits = [self._issue_piece(flight, launch, (first, last), waits, (before, after), round_id)]
        flight.points.append((mark.kernel, mark.part))
        flight.tickets.append(waits[0])

    def _pieces(self, launch: Launch, vector: FunctionVector) -> list[tuple[int, int]]:
        """The range as one graph where that can be, otherwise cut where communication begins and ends."""
        mixed = vector.run_end[launch.first] < launch.last
        if not mixed or (launch.captured and self._graphs() is not None and not self.split):
            return [(launch.first, launch.last)]
        pieces, start = [], launch.first
        while start < launch.last:
            end = min(vector.run_end[start], launch.last)
            pieces.append((start, end))
            start = end
        return pieces

    def forget(self) -> None:
        """Nothing is in flight: what was issued so far was a rehearsal."""
        assert not self.flights
        self.order = OrderLog()

    def begin_capture(self) -> None:
        """What is issued from now on goes into one graph: no graphs inside it, and no waits for what was before."""
        self._capturing = True
        self._tails.clear()

    def end_capture(self) -> None:
        """Batches whose launches were captured leave; nothing of them has run."""
        self._capturing = False
        self._tails.clear()
        self.flights.clear()

    def _graphs(self) -> Graphs | None:
        return self.parts.graphs if self.parts.lanes.can_capture and not self._capturing else None

    def _copy_out(self, flight: InFlight) -> Body:
        batch = flight.batch
        return lambda: self.parts.outputs.copy(batch.batch_id, flight.slot, batch.shape)

    def _issue_piece(
        self,
        flight: InFlight,
        launch: Launch,
        span: tuple[int, int],
        waits: list[Ticket],
        around: tuple[Body | None, Body | None],
        round_id: int,
    ) -> Ticket:
        first, last = span
        vector, shape, slot = flight.vector, flight.batch.shape, flight.batch.slot
        opaque = vector.run_end[first] < last
        comm = vector.kernels[first].is_communication and not opaque
        key = COMM_KEY if comm else StreamKey(launch.lane, launch.withheld_sms)
        occupied = {launch.lane, Lane.COMM} if comm or opaque else {launch.lane}
        body, graphs = self._body(flight, launch, first, last), self._graphs()
        if launch.captured and graphs is not None and not comm and last - first > 1:
            body = partial(graphs.run, (slot, shape, first, last, launch.max_ctas, key), key, body, collectives=opaque)
        if comm or opaque:
            self._log(flight, launch, first, last)
        ticket = self._run(key, occupied, waits, _in_turn(around[0], body, around[1]))
        flight.pieces.append(
            Piece(ticket, _name(vector, first, last), str(key.lane), comm, opaque, launch.batch_id, first, round_id,
                  last - first, self.parts.clock.now_us())
        )  # fmt: skip
        return ticket

    def _body(self, flight: InFlight, launch: Launch, first: int, last: int) -> Body:
        """What the lane runs. Whole ranges recur at every batch in a slot; cuts are as many as the policy likes."""
        if launch.fragment is not None:
            return _calls(self.parts.groups, flight.operations[first:last], launch.fragment, launch.max_ctas)
        key = (flight.batch.slot, flight.batch.shape, first, last, launch.max_ctas)
        body = self._bodies.get(key)
        if body is None:
            body = _calls(self.parts.groups, flight.operations[first:last], None, launch.max_ctas)
            self._bodies[key] = body
        return body

    def _log(self, flight: InFlight, launch: Launch, first: int, last: int) -> None:
        """Note the collectives of a range now: the order in which they are issued is what ranks must agree on."""
        for index in range(first, last):
            operation = flight.operations[index]
            if isinstance(operation, Collective):
                self._note(flight, operation, index, launch.fragment)

    def _note(self, flight: InFlight, operation: Collective, index: int, part: Fragment | None) -> None:
        groups, batch_id = self.parts.groups, flight.batch.batch_id
        name, buffer = flight.vector.kernels[index].name, operation.chunk(part)
        about = (buffer.numel(), buffer.dtype)
        if operation.group == "tp":
            self.order.note((groups.name(operation), groups.stage_name), (name, index, batch_id, part), *about)
        else:  # both ends of an edge see one transfer, where each end sees a send or a receive
            self.order.note((groups.name(operation),), ("transfer", name.partition("_")[2], batch_id), *about)
            self.order.note((groups.stage_name,), (name, index, batch_id), *about)

    def _run(self, key: StreamKey, occupied: set[Lane], waits: Sequence[Ticket], work: Body) -> Ticket:
        """Behind the tickets, and behind everything on the lanes that the work occupies."""
        behind = [*waits, *(self._tails[lane] for lane in Lane if lane in occupied and lane in self._tails)]
        needed = {id(t): t for t in behind if t.key != key and not t.done}
        ticket = self.parts.lanes.run(key, tuple(needed.values()), work)
        for lane in occupied:
            self._tails[lane] = ticket
        return ticket

    # -- marks ------------------------------------------------------------------------------------------------------

    def ticket(self, mark: Mark) -> Ticket | None:
        """What is done when the mark is reached; None if it has been reached: a batch that is not known has left."""
        flight = self.flights.get(mark.batch_id)
        point = (mark.kernel, mark.part)
        if flight is None or point <= (0, 0.0):
            return None
        number = bisect_left(flight.points, point)
        if number == len(flight.points):
            raise RuntimeError(f"a launch waits for {mark}, which nobody has launched")
        return flight.tickets[number]

    def synchronize(self, mark: Mark) -> None:
        """Block the host until the mark is reached."""
        ticket = self.ticket(mark)
        if ticket is not None:
            self.parts.lanes.synchronize(ticket)


@lru_cache(maxsize=65536)
def _name(vector: FunctionVector, first: int, last: int) -> str:
    kernels = vector.kernels
    return kernels[first].name if last - first == 1 else f"{kernels[first].name}..{kernels[last - 1].name}"


def _calls(groups: Groups, operations: list[Operation], part: Fragment | None, max_ctas: int) -> Body:
    """Operations one after the other."""
    calls: list[Body] = [
        partial(groups.call, operation, part, max_ctas)
        if isinstance(operation, Collective)
        else partial(operation, part)
        for operation in operations
    ]
    if len(calls) == 1:
        return calls[0]

    def body() -> None:
        for call in calls:
            call()

    return body


def _in_turn(before: Body | None, body: Body, after: Body | None) -> Body:
    if before is None and after is None:
        return body

    def work() -> None:
        if before is not None:
            before()
        body()
        if after is not None:
            after()

    return work
