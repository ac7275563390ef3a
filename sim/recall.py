"""What repeats is not simulated again: transitions from one decision to the next are remembered, cycles are skipped.

A transition is what happens from one decision of the host to its next: it depends on the state of the device, on what
the policy believes, and on where in their layers the batches are, all relative. Batches whose end is far behave alike,
so a layer in the middle is simulated once. And when a state comes back while nothing can be admitted, the whole cycle
is skipped as often as it fits. Times are on a grid on which sums are exact, so the result is the same to the last bit.

For one device (one pipeline stage, symmetric ranks folded) and policies without deadlines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from models.transformer import BatchShape
from policy.batch import TICK_US, Batch, Busy, Flight, State, on_grid
from policy.interleaved import rounds_ahead
from policy.round import Mark
from policy.window import MOST_LAYERS
from sim.cost import up_to_grid
from sim.device import Device
from sim.freeze import IDLE, LOOKAHEAD_LAYERS, FrozenDevice, Place, freeze, place_of, thaw
from sim.sms import BusyTime
from traces.request import Request

if TYPE_CHECKING:
    from sim.simulate import Simulation

# What is remembered is dropped all at once when it is this much (some hundred MB); what matters is found again soon.
MAX_STATES = 20_000
MAX_TRANSITIONS = 100_000
NEVER = float("inf")
_GONE, _NO_BATCH = -1, -2
_REACHED = Mark(_GONE, 0, 0.0)
_NOBODY = Batch(_GONE, (), BatchShape(1, 1), (), 0.0)


@dataclass(frozen=True, slots=True)
class FrozenFlight:
    """A flight with its batch by number and its cursor relative to the base; `behind`: the batch whose buffers it
    takes."""

    batch: int
    cursor: int
    template: Flight
    behind: int


@dataclass(frozen=True, slots=True)
class FrozenState:
    """Everything that decides what happens next, apart from where the batches are and which shapes they have."""

    flights: tuple[FrozenFlight, ...]
    compute: Busy
    comm: Busy
    held: tuple[tuple[tuple[int, int, float], ...], ...]
    device: FrozenDevice


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a transition leads to. `survivors`: the numbers of the batches that live on, in their new order; `shifts`:
    how far their bases move; `finished`: (number, after how long) of those that end; `issued`: those of which nothing
    is left to issue, so that their buffers are the next batch's to wait for."""

    elapsed_us: float
    survivors: tuple[int, ...]
    shifts: tuple[int, ...]
    finished: tuple[tuple[int, float], ...]
    issued: tuple[int, ...]
    busy: BusyTime
    rounds: int
    state: int


@dataclass(slots=True)
class Visit:
    """When a state was met last since the set of batches changed, and the accounts then."""

    now_us: float
    bases: list[int]
    busy: BusyTime
    rounds: int


@dataclass(frozen=True, slots=True)
class Stretch:
    """Where a stretch began that is being recorded: until a batch is through or has nothing left to issue."""

    key: tuple[Any, ...]
    now_us: float
    bases: list[int]
    busy: BusyTime
    rounds: int


class Recall:
    """Runs a simulation of one device by recalling transitions."""

    def __init__(self, simulation: Simulation) -> None:
        self.simulation = simulation
        self.scheduler = simulation.scheduler
        self.ahead = rounds_ahead(self.scheduler.options) * MOST_LAYERS + LOOKAHEAD_LAYERS
        self.now = 0.0
        self.batches: list[Batch] = []
        self.bases: list[int] = []
        self.busy = BusyTime()
        self.skipped_rounds = 0
        self._states: list[FrozenState] = []
        self._numbers: dict[FrozenState, int] = {}
        self._outcomes: dict[tuple[Any, ...], Outcome] = {}
        self._visits: dict[tuple[Any, ...], Visit] = {}
        self._stretches: dict[tuple[Any, ...], Outcome] = {}
        self._stretch: Stretch | None = None
        self._state = self._intern(FrozenState((), Busy(), Busy(), (), IDLE))
        self._ends: dict[int, int] = {}

    # -- the loop ---------------------------------------------------------------------------------------------------

    def run(self, requests: Sequence[Request]) -> None:
        """As `Simulation._decide`, with transitions in place of waiting for them."""
        arrived = 0
        while True:
            while arrived < len(requests) and on_grid(requests[arrived].arrival_us) <= self.now:
                self.scheduler.add(requests[arrived])
                arrived += 1
            last = arrived == len(requests)
            self._admit(last=last)
            due = self._due(requests, arrived)
            if self._states[self._state].flights:
                self._go_on(due)
            elif due < NEVER:
                self._idle_until(self.now + max(TICK_US, up_to_grid(due - self.now)))
            else:
                self._drain()
                return

    def _due(self, requests: Sequence[Request], arrived: int) -> float:
        """When, at the earliest, something could be admitted that cannot be now."""
        arrival = on_grid(requests[arrived].arrival_us) if arrived < len(requests) else NEVER
        return min(arrival, self.scheduler.wake_up_us())

    def _admit(self, *, last: bool) -> None:
        state = self._states[self._state]
        if not self.scheduler.has_room(len(state.flights)) or not self.scheduler.is_due(self.now, last=last):
            return
        self.scheduler.restore(self._thawed_state(state))
        admitted = self.scheduler.admit(self.now, last=last)
        entered = self.scheduler.enter(admitted, self.now)
        for batch in entered:
            self.simulation.note_entry(batch, self.now)
            self.batches.append(batch)
            self.bases.append(0)
            self._ends[batch.batch_id] = len(batch.vectors[0])
        device = state.device._replace(progress=state.device.progress + (None,) * len(entered))
        self._state = self._intern(self._frozen_scheduler(device))
        self._visits.clear()
        self._stretch = None

    def _go_on(self, due: float) -> None:
        """One transition, or a whole stretch of them up to the next change of the set of batches."""
        if len(self._states) > MAX_STATES or len(self._outcomes) + len(self._stretches) > MAX_TRANSITIONS:
            self._forget()
        if self._stretch is None:
            key = (
                self._state,
                *((batch.vectors[0], base) for batch, base in zip(self.batches, self.bases, strict=True)),
            )
            known = self._stretches.get(key)
            if known is not None and (known.elapsed_us <= due - self.now or self._is_full):
                self._apply(known)
                return
            self._stretch = Stretch(key, self.now, list(self.bases), replace(self.busy), self.scheduler.num_rounds)
        self._step(due)

    @property
    def _is_full(self) -> bool:
        return not self.scheduler.has_room(len(self._states[self._state].flights))

    def _step(self, due: float) -> None:
        key = self._key()
        if self._skip_cycles(key, due):
            key = self._key()
        outcome = self._outcomes.get(key)
        if outcome is None:
            outcome = self._outcomes[key] = self._live_round()
        stretch, before = self._stretch, self.now
        self._apply(outcome)
        if stretch is not None and (outcome.issued or outcome.finished):
            self._stretches[stretch.key] = self._whole(stretch, outcome, before)

    def _whole(self, stretch: Stretch, last: Outcome, before_us: float) -> Outcome:
        """All transitions of a stretch as one; only its last one changed the set of batches."""
        offset = before_us - stretch.now_us
        shifts = tuple(base - stretch.bases[j] for j, base in zip(last.survivors, self.bases, strict=True))
        finished = tuple((number, offset + after) for number, after in last.finished)
        return Outcome(
            self.now - stretch.now_us,
            last.survivors,
            shifts,
            finished,
            last.issued,
            _difference(self.busy, stretch.busy),
            self.scheduler.num_rounds - stretch.rounds,
            last.state,
        )

    def _key(self) -> tuple[Any, ...]:
        places = []
        for batch, base in zip(self.batches, self.bases, strict=True):
            vector = batch.vectors[0]
            inside = base - len(vector.prologue)
            if base == 0:
                place: tuple[Any, ...] = (vector, -1 - min(vector.num_layers, self.ahead))
            else:
                left = vector.num_layers - (inside // len(vector.layer) if vector.layer else 0)
                place = (vector, min(left, self.ahead))
            places.append(place)
        return (self._state, *places)

    def _apply(self, outcome: Outcome) -> None:
        """Take a transition: time, results, accounts, and the state behind it."""
        if outcome.issued or outcome.finished:
            self._stretch = None
        for number in outcome.issued:
            self.scheduler.note_issued(self.batches[number])
        for number, after in outcome.finished:
            self.simulation.note_end(self.batches[number], self.now + after)
        self.now += outcome.elapsed_us
        _add(self.busy, outcome.busy, 1)
        self.scheduler.num_rounds += outcome.rounds
        if outcome.finished or len(outcome.survivors) != len(self.batches):
            self._visits.clear()
        self.batches = [self.batches[j] for j in outcome.survivors]
        self.bases = [self.bases[j] + shift for j, shift in zip(outcome.survivors, outcome.shifts, strict=True)]
        self._state = outcome.state

    def _skip_cycles(self, key: tuple[Any, ...], due: float) -> bool:
        """If this state was met before and nothing can be admitted meanwhile, go round as often as the layers allow."""
        visit = self._visits.get(key)
        self._visits[key] = Visit(self.now, list(self.bases), replace(self.busy), self.scheduler.num_rounds)
        if visit is None:
            return False
        period = self.now - visit.now_us
        times = 1 << 60
        for batch, base, before in zip(self.batches, self.bases, visit.bases, strict=True):
            vector, moved = batch.vectors[0], base - before
            if moved:
                left = vector.num_layers - (base - len(vector.prologue)) // len(vector.layer) - self.ahead
                times = min(times, left // (moved // len(vector.layer)))
        if not self._is_full and due < NEVER:
            times = min(times, int((due - self.now) // period) - 1)
        if times <= 0 or times == 1 << 60:
            return False
        self.now += times * period
        self.bases = [base + times * (base - before) for base, before in zip(self.bases, visit.bases, strict=True)]
        _add(self.busy, _difference(self.busy, visit.busy), times)
        rounds = times * (self.scheduler.num_rounds - visit.rounds)
        self.scheduler.num_rounds += rounds
        self.skipped_rounds += rounds
        self._visits.clear()
        return True

    # -- transitions that are not known yet -------------------------------------------------------------------------

    def _live_round(self) -> Outcome:
        """Plan and simulate one round from here."""
        state = self._states[self._state]
        self.scheduler.restore(self._thawed_state(state))
        rounds = self.scheduler.num_rounds
        round_ = self.scheduler.next_round(self.now)
        self.scheduler.num_rounds = rounds
        assert round_ is not None
        left = {flight.batch.batch_id for flight in self.scheduler.state.flights}
        issued = tuple(f.batch for f in state.flights if self.batches[f.batch].batch_id not in left)
        device, finished = self._live_device(state.device)
        process = device.env.process(self.simulation.host_round(device, round_))
        device.env.run(until=process)
        return self._outcome(device, finished, 1, issued)

    def _idle_until(self, time: float) -> None:
        """Nothing to decide until then; what is still running goes on."""
        state = self._states[self._state]
        if not state.device.idle:
            drained = self._drained()
            if self.now + drained.elapsed_us <= time:
                self._apply(drained)
            else:
                self.scheduler.restore(self._thawed_state(state))
                device, finished = self._live_device(state.device)
                device.env.run(until=time - self.now)
                self._apply(self._outcome(device, finished, 0))
                return
        self.now = time

    def _drain(self) -> None:
        if not self._states[self._state].device.idle:
            self._apply(self._drained())

    def _drained(self) -> Outcome:
        key = ("drain", *self._key())
        outcome = self._outcomes.get(key)
        if outcome is None:
            state = self._states[self._state]
            self.scheduler.restore(self._thawed_state(state))
            device, finished = self._live_device(state.device)
            device.env.run()
            outcome = self._outcomes[key] = self._outcome(device, finished, 0)
        return outcome

    def _live_device(self, frozen: FrozenDevice) -> tuple[Device, list[tuple[int, float]]]:
        """A device in the frozen state at time zero, and the list that will hold what ends on it."""
        device = self.simulation.fresh_device()
        finished: list[tuple[int, float]] = []
        numbers = {batch.batch_id: j for j, batch in enumerate(self.batches)}

        def on_progress(device: Device, batch_id: int, point: tuple[int, float]) -> None:
            if point[0] >= self._ends[batch_id]:
                device.forget(batch_id)
                finished.append((numbers[batch_id], device.env.now))

        device.on_progress = on_progress
        thaw(device, frozen, self.batches, self.bases)
        return device, finished

    def _outcome(
        self, device: Device, finished: list[tuple[int, float]], rounds: int, issued: tuple[int, ...] = ()
    ) -> Outcome:
        device.sms.count()
        ended = {number for number, _ in finished}
        survivors = tuple(j for j in range(len(self.batches)) if j not in ended)
        numbers = {self.batches[j].batch_id: new for new, j in enumerate(survivors)}
        places = [self._place(self.batches[j], device) for j in survivors]
        frozen = freeze(device, numbers, [place.base for place in places])
        old = self.batches, self.bases
        shifts = tuple(place.base - self.bases[j] for j, place in zip(survivors, places, strict=True))
        self.batches, self.bases = [self.batches[j] for j in survivors], [place.base for place in places]
        state = self._intern(self._frozen_scheduler(frozen))
        self.batches, self.bases = old
        return Outcome(device.env.now, survivors, shifts, tuple(finished), issued, device.sms.busy, rounds, state)

    def _place(self, batch: Batch, device: Device) -> Place:
        kernel, _ = device.progress.get(batch.batch_id, (0, 0.0))
        return place_of(batch.vectors[0], kernel, self.ahead)

    # -- the policy's state -----------------------------------------------------------------------------------------

    def _forget(self) -> None:
        """Drop what is remembered, except where we are."""
        present = self._states[self._state]
        for memory in (self._numbers, self._outcomes, self._stretches, self._visits):
            memory.clear()
        self._states.clear()
        self._stretch = None
        self._state = self._intern(present)

    def _intern(self, state: FrozenState) -> int:
        number = self._numbers.get(state)
        if number is None:
            number = self._numbers[state] = len(self._states)
            self._states.append(state)
        return number

    def _frozen_scheduler(self, device: FrozenDevice) -> FrozenState:
        """The scheduler's present state, relative to the present batches."""
        numbers = {batch.batch_id: j for j, batch in enumerate(self.batches)}
        state = self.scheduler.state

        def mark(m: Mark) -> tuple[int, int, float]:
            if m.batch_id not in numbers:
                return (_GONE, 0, 0.0)
            number = numbers[m.batch_id]
            return (number, m.kernel - self.bases[number], m.part)

        flights = []
        for flight in state.flights:
            number = numbers[flight.batch.batch_id]
            before = None if flight.cursor or flight.issued else self.scheduler.occupant_before(flight.batch.slot)
            behind = _NO_BATCH if before is None else numbers.get(before, _GONE)
            template = flight._replace(batch=_NOBODY, cursor=0)
            flights.append(FrozenFlight(number, flight.cursor - self.bases[number], template, behind))
        held = tuple(tuple(mark(m) for m in marks) for marks in state.held)
        return FrozenState(tuple(flights), state.compute, state.comm, held, device)

    def _thawed_state(self, frozen: FrozenState) -> State:
        flights = tuple(
            f.template._replace(batch=self.batches[f.batch], cursor=f.cursor + self.bases[f.batch])
            for f in frozen.flights
        )
        held = tuple(
            tuple(
                Mark(self.batches[j].batch_id, kernel + self.bases[j], part) if j >= 0 else _REACHED
                for j, kernel, part in marks
            )
            for marks in frozen.held
        )
        return State(flights, frozen.compute, frozen.comm, held)


def _add(total: BusyTime, part: BusyTime, times: int) -> None:
    total.compute_us += times * part.compute_us
    total.communication_us += times * part.communication_us
    total.overlap_us += times * part.overlap_us
    total.kernels += times * part.kernels


def _difference(after: BusyTime, before: BusyTime) -> BusyTime:
    return BusyTime(after.compute_us - before.compute_us, after.communication_us - before.communication_us,
                    after.overlap_us - before.overlap_us, after.kernels - before.kernels)  # fmt: skip
