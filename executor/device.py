"""One rank's device: launches become work on lanes, marks become tickets, slots hold the batches in flight."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import pairwise
from typing import Protocol

from executor.groups import Groups
from executor.inputs import Loader, Outputs
from executor.kernels import bind
from executor.lanes import Clock, Lanes, StreamKey, Ticket
from executor.operations import Collective, Operation
from executor.order import OrderLog, OrderNote
from executor.recorder import Piece
from executor.slots import Slot
from executor.weights import Weights
from models.kernel import Fragment, FunctionVector, Kind
from models.transformer import BatchShape
from policy.batch import Batch
from policy.round import Lane, Launch, Mark

Body = Callable[[], None]
COMM_KEY = StreamKey(Lane.COMM)


class Graphs(Protocol):
    """A cache of captured ranges. `sealed`: no more are made. `refused`: streams on which nothing can be captured, and
    why."""

    sealed: bool
    refused: dict[StreamKey, str]

    def __len__(self) -> int:
        """How many are captured."""

    def holds(self, key: tuple[object, ...]) -> bool:
        """Whether this range is captured."""

    def replay(self, key: tuple[object, ...], stream: StreamKey, body: Body, *, collectives: bool) -> Body:
        """What runs the range on the current stream: as a graph where there is one, else as it is."""


@dataclass(frozen=True, slots=True)
class Ready:
    """Kernels [first, last) of one shape in one slot, ready to be run on one queue.

    `notes`: what the order log is told of its collectives. `opaque`: a graph with collectives inside.
    """

    work: Body
    key: StreamKey
    occupied: tuple[Lane, ...]
    is_communication: bool
    opaque: bool
    name: str
    notes: tuple[OrderNote, ...]
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Steps:
    """What a launch of one vector in one slot comes to; made once, at its first use. A rehearsal's vectors are shorter
    than a run's of the same shape, and end elsewhere.

    `point`: what is done behind it. `begins`, `ends`: it is the first, the last of its batch on this stage.
    """

    pieces: tuple[Ready, ...]
    point: tuple[int, float]
    begins: bool
    ends: bool


AllSteps = dict[tuple[object, ...], dict[tuple[object, ...], Steps]]


@dataclass(slots=True)
class InFlight:
    """A batch in flight on this rank; `tickets[i]` is done when everything before `points[i]` is."""

    batch: Batch
    entered_us: float
    slot: Slot
    vector: FunctionVector
    steps: dict[tuple[object, ...], Steps]
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
    steps: AllSteps


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
        self._capturing = False

    # -- batches ----------------------------------------------------------------------------------------------------

    def enter(self, batch: Batch, entered_us: float, prepare: Callable[[Slot], None]) -> None:
        """A batch gets its slot; `prepare` loads it, on the lane of its first kernel."""
        slot, vector = self.parts.slots[batch.slot], batch.vectors[self.stage]
        self.flights[batch.batch_id] = InFlight(
            batch,
            entered_us,
            slot,
            vector,
            self.parts.steps.setdefault((batch.slot, vector, self.split, self.parts.graphs is not None), {}),
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
        # All of a launch but whose it is and what it waits for.
        geometry = launch[1:4] + launch[5:]
        steps = flight.steps.get(geometry)
        if steps is None or self._capturing:
            steps = self._steps_of(flight.batch, launch)
            if not self._capturing:
                flight.steps[geometry] = steps
        waits = [ticket for mark in launch.waits if (ticket := self.ticket(mark)) is not None]
        pieces = steps.pieces
        for ready in pieces:
            before = flight.prepare if steps.begins and ready is pieces[0] else None
            # Not inside a capture: pinned memory that a capture has used is of no use to anybody behind it.
            copies = steps.ends and self.copy_out and not self._capturing and ready is pieces[-1]
            after = self._copy_out(flight) if copies else None
            waits = [self._issue_piece(flight, ready, waits, _around(before, ready.work, after), round_id)]
        flight.points.append(steps.point)
        flight.tickets.append(waits[0])

    def _steps_of(self, batch: Batch, launch: Launch) -> Steps:
        vector, mark = batch.vectors[self.stage], launch.mark
        pieces = tuple(self._ready(batch, launch, first, last) for first, last in self._pieces(launch, vector))
        begins = launch.first == 0 and (launch.fragment is None or launch.fragment.start == 0)
        return Steps(pieces, (mark.kernel, mark.part), begins, mark.kernel == len(vector))

    def _pieces(self, launch: Launch, vector: FunctionVector) -> list[tuple[int, int]]:
        """The range as one graph where that can be, or as one branch of the graph that is being captured; otherwise cut
        where communication begins and ends."""
        mixed, holds = vector.run_end[launch.first] < launch.last, self._capturing or self._graphs() is not None
        if not mixed or (launch.captured and holds and not self.split):
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

    def seal(self, *, sealed: bool) -> None:
        """From now on (or not any more), what is not captured yet runs as it is: a capture would hold up a run."""
        if self.parts.graphs is not None:
            self.parts.graphs.sealed = sealed
        self.parts.steps.clear()

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
        self, flight: InFlight, ready: Ready, waits: Sequence[Ticket], work: Body, round_id: int
    ) -> Ticket:
        batch_id = flight.batch.batch_id
        if ready.notes:
            self.order.note(ready.notes, batch_id)
        ticket = self._run(ready.key, ready.occupied, waits, work)
        flight.pieces.append(
            Piece(ticket, ready.name, ready.key.lane, ready.is_communication, ready.opaque, batch_id, ready.first,
                  round_id, ready.last - ready.first, self.parts.clock.now_us())
        )  # fmt: skip
        return ticket

    def _ready(self, batch: Batch, launch: Launch, first: int, last: int) -> Ready:
        vector = batch.vectors[self.stage]
        opaque = vector.run_end[first] < last
        comm = vector.kernels[first].is_communication and not opaque
        key = COMM_KEY if comm else StreamKey(launch.lane, launch.withheld_sms)
        occupied = tuple(lane for lane in Lane if lane is launch.lane or (lane is Lane.COMM and (comm or opaque)))
        span = (first, last)
        if launch.captured and not comm and last - first > 1 and self._graphs() is not None:
            calls = self._replays(batch, key, span, launch.max_ctas)
        elif comm and last - first == 1 and self._graphs() is not None:
            calls = [
                self.replay_collective(self.bound(batch.slot, batch.shape)[first], launch.fragment, launch.max_ctas)
            ]
        else:
            calls = self._calls(batch, span, launch.fragment, launch.max_ctas, loose=not self._capturing)
        notes = tuple(self._notes(batch, first, last, launch.fragment)) if comm or opaque else ()
        return Ready(in_turn(calls), key, occupied, comm, opaque, _name(vector, first, last), notes, first, last)

    # -- bodies -----------------------------------------------------------------------------------------------------

    def _calls(
        self, batch: Batch, span: tuple[int, int], part: Fragment | None, max_ctas: int, *, loose: bool = False
    ) -> list[Body]:
        """Operations one after the other. `loose`: they will not be captured."""
        groups = self.parts.groups
        return [
            groups.call_of(operation, part, max_ctas, loose=loose)
            if isinstance(operation, Collective)
            else partial(operation, part)
            for operation in self.bound(batch.slot, batch.shape)[span[0] : span[1]]
        ]

    def _replays(self, batch: Batch, key: StreamKey, span: tuple[int, int], max_ctas: int) -> list[Body]:
        """A range as the graphs that there are: of all of it, or else of its layers, runs and units."""
        cuts = self.cuts(batch, key, span, max_ctas)
        calls: list[Body] = []
        for first, last in pairwise(cuts):
            collective = batch.vectors[self.stage].kernels[first].is_communication and last - first == 1
            if collective:
                operation = self.bound(batch.slot, batch.shape)[first]
                calls.append(self.replay_collective(operation, None, max_ctas, key))
            else:
                calls.append(self.replay(batch, key, (first, last), max_ctas))
        return calls

    def cuts(self, batch: Batch, key: StreamKey, span: tuple[int, int], max_ctas: int) -> list[int]:
        """Where a range is cut into graphs. As long as graphs may still be made, a range is one graph."""
        graphs = self.parts.graphs
        assert graphs is not None
        vector, found = batch.vectors[self.stage], [span[0]]
        if not graphs.sealed or self.is_captured(batch, key, span, max_ctas):
            return list(span)
        while (first := found[-1]) < span[1]:
            ends = (_layer_end(vector, first), vector.run_end[first], vector.unit_end[first])
            known = (e for e in ends if e <= span[1] and self.is_captured(batch, key, (first, e), max_ctas))
            found.append(next(known, min(vector.unit_end[first], span[1])))
        return found

    def replay(self, batch: Batch, key: StreamKey, span: tuple[int, int], max_ctas: int) -> Body:
        """A range as one graph, made when it first runs."""
        graphs = self.parts.graphs
        assert graphs is not None
        body = in_turn(self._calls(batch, span, None, max_ctas))
        if span[1] - span[0] == 1:
            return body
        opaque = batch.vectors[self.stage].run_end[span[0]] < span[1]
        return graphs.replay(_graph_key(batch, key, span, max_ctas), key, body, collectives=opaque)

    def is_captured(self, batch: Batch, key: StreamKey, span: tuple[int, int], max_ctas: int) -> bool:
        """Whether the range is a graph by now."""
        graphs = self.parts.graphs
        return graphs is not None and graphs.holds(_graph_key(batch, key, span, max_ctas))

    def replay_collective(
        self, operation: Operation, part: Fragment | None, max_ctas: int, stream: StreamKey = COMM_KEY
    ) -> Body:
        """A collective as a graph of its own, which costs the host less than half of its call. All layers of a batch
        sum the same buffer, so one graph is enough for all of them."""
        graphs, groups = self.parts.graphs, self.parts.groups
        assert graphs is not None
        assert isinstance(operation, Collective)
        buffer = operation.chunk(part)
        key = ("all_reduce", buffer.data_ptr(), buffer.numel(), max_ctas, stream)
        if operation.kind is not Kind.ALL_REDUCE or (graphs.sealed and not graphs.holds(key)):
            return groups.call_of(operation, part, max_ctas, loose=True)
        return graphs.replay(key, stream, groups.call_of(operation, part, max_ctas), collectives=True)

    def _notes(self, batch: Batch, first: int, last: int, part: Fragment | None) -> Iterator[OrderNote]:
        """What the order log is told of a range: the order in which collectives are issued is what ranks must agree
        on."""
        operations, kernels = self.bound(batch.slot, batch.shape), batch.vectors[self.stage].kernels
        groups = self.parts.groups
        for index in range(first, last):
            operation, name = operations[index], kernels[index].name
            if not isinstance(operation, Collective):
                continue
            buffer = operation.chunk(part)
            about = (buffer.numel(), buffer.dtype)
            if operation.group == "tp":
                yield OrderNote((groups.name(operation), groups.stage_name), (name, index, part), *about)
            else:  # both ends of an edge see one transfer, where each end sees a send or a receive
                yield OrderNote((groups.name(operation),), ("transfer", name.partition("_")[2]), *about)
                yield OrderNote((groups.stage_name,), (name, index), *about)

    def _run(self, key: StreamKey, occupied: tuple[Lane, ...], waits: Sequence[Ticket], work: Body) -> Ticket:
        """Behind the tickets, and behind everything on the lanes that the work occupies."""
        tails = self._tails
        needed: list[Ticket] = []
        for ticket in (*waits, *[tails.get(lane) for lane in occupied]):
            if ticket is not None and not ticket.done and ticket.key != key and ticket not in needed:
                needed.append(ticket)
        new = self.parts.lanes.run(key, needed, work)
        for lane in occupied:
            tails[lane] = new
        return new

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


def _graph_key(batch: Batch, key: StreamKey, span: tuple[int, int], max_ctas: int) -> tuple[object, ...]:
    return batch.slot, batch.shape, span, max_ctas, key


def _layer_end(vector: FunctionVector, first: int) -> int:
    """Where the layer that begins here ends; nowhere if none begins."""
    layer, place = vector.locate(first)
    if 0 <= layer < vector.num_layers and place == 0:
        return first + len(vector.layer)
    return len(vector) + 1


def in_turn(calls: Sequence[Body]) -> Body:
    """Calls as one."""
    if len(calls) == 1:
        return calls[0]

    def body() -> None:
        for call in calls:
            call()

    return body


def _around(before: Body | None, body: Body, after: Body | None) -> Body:
    if before is None and after is None:
        return body

    def work() -> None:
        if before is not None:
            before()
        body()
        if after is not None:
            after()

    return work
