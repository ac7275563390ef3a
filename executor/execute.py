"""The main loop of one rank, the mirror of the simulator's: admit, plan, launch, wait, complete."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from executor.device import Device, InFlight
from executor.inputs import tokens_of
from executor.lanes import Clock
from executor.mail import Mail, Note
from executor.order import RoundsHash
from executor.recorder import Recorder
from executor.results import HostTime
from executor.settings import RunSettings
from executor.slots import Slot
from executor.status import Steps
from policy.batch import Batch
from policy.round import Launch, Mark, Round
from policy.scheduler import Admission, Scheduler
from traces.request import Request

# An idle rank 0 shows this often that it is well.
ALIVE_S = 0.5
# A sleep overshoots by about this much; the rest of the wait is polled.
SLEEP_MARGIN_S = 100e-6
# How often a host that must not spin looks for batches that are through.
POLL_S = 50e-6


@dataclass(slots=True)
class Progress:
    """Told how far the loop is; the default tells nobody."""

    at_round: Callable[[int, bool], object] = lambda number, idle: None
    finished: Callable[[int], object] = lambda requests: None


@dataclass(slots=True)
class Driver:
    """One run on one rank. Only the rank that has the results (`is_output`) writes completions."""

    run: RunSettings
    scheduler: Scheduler
    device: Device
    recorder: Recorder
    mail: Mail
    clock: Clock
    is_output: bool
    progress: Progress = field(default_factory=Progress)
    log: list[Admission] = field(default_factory=list)
    rounds: RoundsHash = field(default_factory=RoundsHash)
    host: HostTime = field(default_factory=HostTime)
    entered_idle_us: list[float] = field(default_factory=list)
    _by_id: dict[int, Request] = field(init=False)
    _rng: np.random.Generator = field(init=False)
    _closed: bool = False

    def __post_init__(self) -> None:
        self._by_id = {request.request_id: request for request in self.run.requests}
        self._rng = np.random.default_rng((self.run.delay_seed, self.mail.rank, 1))

    # -- three ways to run ------------------------------------------------------------------------------------------

    def live(self) -> None:
        """Serve the requests as they come: rank 0 decides who enters, everybody plans."""
        for note in self._lead() if self.mail.rank == 0 else self._follow():
            self._turn(note)
        self._finish()

    def replay(self, log: Sequence[Admission]) -> None:
        """The rounds that a log of admissions gives, as fast as the device goes."""
        for note in self._recorded(log):
            self._turn(note)
        self._finish()

    def serially(self, log: Sequence[Admission]) -> None:
        """The launches that a log gives, but batch after batch and one at a time: nothing can overlap."""
        launches: dict[int, list[tuple[int, Launch]]] = {}
        batches: list[tuple[Batch, float]] = []
        for note in self._recorded(log):
            batches += [(batch, note.now_us) for batch in self._take_in(note)]
            round_ = self._plan(note)
            for launch in round_.launches:
                launches.setdefault(launch.batch_id, []).append((round_.round_id, launch))
        for batch, now_us in batches:
            self._enter(batch, now_us)
            for round_id, launch in launches[batch.batch_id]:
                if launch.stage == self.device.stage:
                    # Waits for other batches are pointless here, and some name launches that are still to come.
                    self.device.issue(launch._replace(waits=()), round_id)
                    self.device.synchronize(launch.mark)
            self.progress.at_round(batch.batch_id, False)
            self._complete()
        self._finish()

    # -- where notes come from --------------------------------------------------------------------------------------

    def _expects_note(self) -> bool:
        """Whether rank 0 has something to say before the next round: the same answer on every rank."""
        if self.run.options.has_deadline:
            return True
        return not self._closed and self.scheduler.has_room(len(self.scheduler.state.flights))

    def _lead(self) -> Iterator[Note]:
        requests, scheduler, arrived, now = self.run.requests, self.scheduler, 0, 0.0
        while not (self._closed and not scheduler.state.flights):
            if not self._expects_note():
                yield Note(now)
                continue
            now = self.clock.now_us()
            while arrived < len(requests) and requests[arrived].arrival_us <= now:
                scheduler.add(requests[arrived])
                arrived += 1
            last = arrived == len(requests)
            admitted = scheduler.admit(now, last=last)
            if not admitted and not scheduler.state.flights:
                due = scheduler.wake_up_us() if last else min(requests[arrived].arrival_us, scheduler.wake_up_us())
                self._idle(due)
                continue
            ids = tuple(tuple(request.request_id for request in batch) for batch in admitted)
            note = Note(now, ids, last and not scheduler.waiting)
            started = time.perf_counter()
            self.mail.post(note)
            self.host.mail_s += time.perf_counter() - started
            yield note

    def _idle(self, due_us: float) -> None:
        """Sleep until something is due; tell the others now and then that all is well."""
        self._answer_running(due_us)
        wait_s = (due_us - self.clock.now_us()) / 1e6 - SLEEP_MARGIN_S
        if wait_s <= 0.0:
            return
        if wait_s > ALIVE_S:
            self.mail.post(Note(alive=True))
            self.progress.at_round(self.scheduler.num_rounds, True)
        time.sleep(min(wait_s, ALIVE_S))

    def _answer_running(self, due_us: float) -> None:
        """What runs is answered when it ends, not when the next request wakes this rank."""
        self._complete()
        while self.device.flights and self.clock.now_us() < due_us:
            if not self.device.parts.lanes.spin:
                time.sleep(SLEEP_MARGIN_S)
            self._complete()

    def _follow(self) -> Iterator[Note]:
        now = 0.0
        while not (self._closed and not self.scheduler.state.flights):
            note = Note(now)
            if self._expects_note():
                started = time.perf_counter()
                note = self.mail.next(self._complete)
                self.host.mail_s += time.perf_counter() - started
                if note.alive:
                    self._complete()
                    self.progress.at_round(self.scheduler.num_rounds, True)
                    continue
                now = note.now_us
            yield note

    def _recorded(self, log: Sequence[Admission]) -> Iterator[Note]:
        """A note before every round, from the log of a run that was."""
        waiting, now = list(reversed(log)), 0.0
        while waiting or self.scheduler.state.flights:
            if waiting and waiting[-1].round_id == self.scheduler.num_rounds:
                entry = waiting.pop()
                now = entry.now_us
                yield Note(now, entry.batches, not waiting)
            elif self.scheduler.state.flights:
                yield Note(now)
            else:
                late, last = waiting[-1].round_id, self.scheduler.num_rounds - 1
                raise ValueError(f"the log admits a batch before round {late}, but nothing is in flight after {last}")

    # -- one turn ---------------------------------------------------------------------------------------------------

    def _turn(self, note: Note) -> None:
        for batch in self._take_in(note):
            self._enter(batch, note.now_us)
        self._issue(self._plan(note))
        self._complete()

    def _take_in(self, note: Note) -> tuple[Batch, ...]:
        """Batches enter the scheduler. With deadlines the log keeps every round, for the time is part of the plan."""
        self._closed = note.closed or self._closed
        if note.batches or self.run.options.has_deadline:
            self.log.append(Admission(self.scheduler.num_rounds, note.now_us, note.batches))
        requests = tuple(tuple(self._by_id[number] for number in ids) for ids in note.batches)
        return self.scheduler.enter(requests, note.now_us)

    def _plan(self, note: Note) -> Round:
        started = time.perf_counter()
        round_ = self.scheduler.next_round(note.now_us)
        assert round_ is not None  # a note comes only when something is in flight or enters
        self.rounds.add(round_)
        self.host.plan_s += time.perf_counter() - started
        self.host.rounds += 1
        return round_

    def _enter(self, batch: Batch, now_us: float) -> None:
        loader, slot = self.device.parts.loader, self.device.parts.slots[batch.slot]
        packed = loader.stage(slot, batch.shape, *tokens_of(batch, self.run.model, self.run.seed))

        def prepare(slot: Slot) -> None:
            if self.device.poison:
                slot.poison()
            loader.load(slot, batch.shape, packed)

        if not self.device.flights:
            self.entered_idle_us.append(now_us)
        self.device.enter(batch, now_us, prepare)

    def _issue(self, round_: Round) -> None:
        started = time.perf_counter()
        for launch in round_.launches:
            if launch.stage != self.device.stage:
                continue
            if self.run.host_delay_us:
                time.sleep(self._rng.uniform(0.0, self.run.host_delay_us) / 1e6)
            self.device.issue(launch, round_.round_id)
            self.host.launches += 1
        issued = time.perf_counter()
        marks = [mark for mark in round_.synchronize if mark.stage == self.device.stage]
        would_wait = not all(map(self._is_reached, marks))  # so that what follows costs nothing
        if would_wait:
            self.scheduler.foresee()
        foreseen = time.perf_counter()
        if would_wait:
            self.device.order.settle()
            self.rounds.settle()
        with Steps.waiting():  # for its device, which may wait for others'
            for mark in marks:
                self._await(mark)
        self.host.issue_s += issued - started
        self.host.plan_s += foreseen - issued
        self.host.synchronize_s += time.perf_counter() - foreseen
        self.progress.at_round(round_.round_id, False)

    def _is_reached(self, mark: Mark) -> bool:
        ticket = self.device.ticket(mark)
        return ticket is None or self.device.parts.lanes.is_done(ticket)

    def _await(self, mark: Mark) -> None:
        """Wait for a mark. A batch that is through before is answered then, and not when the mark is reached: in a
        sequence of batches that would be half a batch later."""
        device, lanes = self.device, self.device.parts.lanes
        while any(flight.is_issued for flight in device.flights.values()):
            if self._is_reached(mark):
                break
            self._complete()
            if not lanes.spin:
                time.sleep(POLL_S)
        device.synchronize(mark)

    def _complete(self) -> None:
        """Batches that are through leave, and their requests are answered."""
        for flight in self.device.take_finished():
            self._answer(flight)

    def _answer(self, flight: InFlight) -> None:
        lanes, batch = self.device.parts.lanes, flight.batch
        for piece in flight.pieces:
            self.recorder.keep(piece, lanes)
        finished_us = lanes.times_us(flight.tickets[-1])[1]
        for piece in flight.pieces:
            lanes.release(piece.ticket)
        self.device.parts.outputs.finish(batch.batch_id)
        if self.is_output:
            self.recorder.complete(batch, flight.entered_us, finished_us)
            self.progress.finished(len(batch.requests))

    def _finish(self) -> None:
        self.device.parts.lanes.drain()
        self._complete()
        if self.device.flights:
            raise RuntimeError(f"the run stopped with {len(self.device.flights)} batches in flight")
