"""The scheduler that both drivers import: add requests, admit batches, plan rounds. No clock: time is an argument."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from models.kernel import FunctionVector
from models.transformer import BatchShape
from policy import interleaved, liger_artifact, sequential
from policy.batch import Batch, Flight, State
from policy.batching import shape_of, take_batch, wake_up_us
from policy.options import Options
from policy.profile import Profile
from policy.round import Launch, Mark, Round
from traces.request import Request

PlanFunction = Callable[[State, Options, Profile], tuple[Round, State]]

POLICIES: dict[str, PlanFunction] = {
    "tensor": sequential.plan,
    "pipeline": sequential.plan,
    "hybrid": sequential.plan,
    "interleaved": interleaved.plan,
    "liger-artifact": liger_artifact.plan,
}
# Which policies keep several batches in flight on the same GPUs at once.
OVERLAPPING = frozenset({"interleaved", "liger-artifact"})


@dataclass(frozen=True, slots=True)
class Admission:
    """One line of the admission log: which batches (as tuples of request ids) entered before which round, and when."""

    round_id: int
    now_us: float
    batches: tuple[tuple[int, ...], ...]


# How much longer than alone a batch may take beside others: contention, and fills that stick out of their windows.
SHARED = 1.5


class Scheduler:
    """Holds what is waiting and what is in flight; decides nothing itself, but asks the pure plan function.

    Rank 0 calls `add` and `admit`; every rank calls `enter` with what rank 0 admitted and then `next_round`. Equal
    admissions give equal rounds.
    """

    def __init__(
        self,
        policy: str,
        options: Options,
        profile: Profile,
        vectors_of: Callable[[BatchShape], tuple[FunctionVector, ...]],
    ) -> None:
        if policy not in POLICIES:
            raise ValueError(f"unknown policy {policy!r}; choose from: {', '.join(POLICIES)}")
        self.options, self.profile, self.vectors_of = options, profile, vectors_of
        self.overlapping = policy in OVERLAPPING
        self.plan = POLICIES[policy]
        self.state = State()
        self.num_rounds = 0
        self.num_batches = 0
        self.log: list[Admission] = []
        self._waiting: list[Request] = []
        self._slot_ends: dict[int, tuple[Mark, ...]] = {}
        self._last_slot = -1
        self._foreseen: tuple[State, tuple[Round, State]] | None = None

    @property
    def num_slots(self) -> int:
        """How many batches need buffers at the same time."""
        return self.options.depth

    @property
    def waiting(self) -> int:
        """Requests that no batch has taken yet."""
        return len(self._waiting)

    def add(self, request: Request) -> None:
        """A request has arrived. Requests are taken in the order of (arrival, request id)."""
        self._waiting.append(request)

    def admit(self, now_us: float, *, last: bool = False) -> tuple[tuple[Request, ...], ...]:
        """The batches that enter now, as tuples of requests; `last`: no more requests will come."""
        admitted: list[tuple[Request, ...]] = []
        while self.has_room(len(self.state.flights) + len(admitted)):
            head = tuple(self._waiting[: self.options.batch_size])
            batch = take_batch(head, now_us, self.options, last=last)
            if not batch:
                break
            del self._waiting[: len(batch)]
            admitted.append(batch)
        return tuple(admitted)

    def has_room(self, num_flights: int) -> bool:
        """Whether another batch may enter beside so many that are not fully issued."""
        return num_flights < (self.options.depth if self.overlapping else 1)

    def is_due(self, now_us: float, *, last: bool = False) -> bool:
        """Whether the requests that wait would make a batch now."""
        return bool(take_batch(tuple(self._waiting[: self.options.batch_size]), now_us, self.options, last=last))

    def wake_up_us(self) -> float:
        """When a part-filled batch is due if nothing else happens."""
        return wake_up_us(tuple(self._waiting[:1]), self.options)

    def enter(self, admitted: tuple[tuple[Request, ...], ...], now_us: float) -> tuple[Batch, ...]:
        """Put admitted requests in flight, on every rank alike."""
        if admitted:
            ids = tuple(tuple(r.request_id for r in requests) for requests in admitted)
            self.log.append(Admission(self.num_rounds, now_us, ids))
        return tuple(self._batch(requests) for requests in admitted)

    def _batch(self, requests: tuple[Request, ...]) -> Batch:
        shape = shape_of(requests, self.options)
        arrival = min(r.arrival_us for r in requests)
        batch = Batch(self.num_batches, requests, shape, self.vectors_of(shape), arrival, self._free_slot(),
                      arrival + self.options.slo_us)  # fmt: skip
        self.num_batches += 1
        self.state = self.state._replace(flights=(*self.state.flights, Flight(batch)))
        return batch

    def _free_slot(self) -> int:
        """The free slot that was freed longest ago: the next in turn that no flight holds."""
        taken = {flight.batch.slot for flight in self.state.flights}
        slot = self._last_slot
        for _ in range(self.num_slots):
            slot = (slot + 1) % self.num_slots
            if slot not in taken:
                break
        self._last_slot = slot
        return slot

    def next_round(self, now_us: float = 0.0) -> Round | None:
        """The next round, or None if nothing is in flight. `now_us` matters only where requests have deadlines."""
        if not self.state.flights:
            return None
        state = self._with_slack(now_us)
        foreseen, self._foreseen = self._foreseen, None
        if foreseen is not None and foreseen[0] is state:
            round_, after = foreseen[1]
        else:
            round_, after = self.plan(state, self.options, self.profile)
        launches = tuple(self._behind_slot(launch, state) for launch in round_.launches)
        for flight in state.flights:
            batch = flight.batch
            if all(left.batch is not batch for left in after.flights):
                self.note_issued(batch)
        self.state = after
        self.num_rounds += 1
        return Round(self.num_rounds - 1, launches, round_.synchronize)

    def foresee(self) -> None:
        """Plan what comes if nobody enters, while there is time: `next_round` will not have to. Changes no round."""
        if self.state.flights and not self.options.has_deadline:
            self._foreseen = self.state, self.plan(self.state, self.options, self.profile)

    def note_issued(self, batch: Batch) -> None:
        """All of a batch is issued: whoever gets its buffers next waits for its end."""
        self._slot_ends[batch.slot] = tuple(batch.end_mark(s) for s in range(len(batch.vectors)))

    def occupant_before(self, slot: int) -> int | None:
        """The batch whose end the next user of these buffers waits for."""
        ends = self._slot_ends.get(slot)
        return ends[0].batch_id if ends else None

    def restore(self, state: State) -> None:
        """Continue from another state (a simulator that knows how a stretch of rounds ends goes there at once)."""
        self.state = state

    def _behind_slot(self, launch: Launch, state: State) -> Launch:
        """The first launch of a batch waits until the batch that had its buffers before is through (write after
        read)."""
        if launch.first or (launch.fragment and launch.fragment.start):
            return launch
        slot = next(f.batch.slot for f in state.flights if f.batch.batch_id == launch.batch_id)
        ends = self._slot_ends.get(slot)
        return launch._replace(waits=(*launch.waits, ends[launch.stage])) if ends else launch

    def _with_slack(self, now_us: float) -> State:
        """Mark the flights whose deadlines hold if nothing delays them, and may not if something does.

        A batch that is late in any case is not protected: that would cost the batches behind it time, and win nothing.
        """
        if not self.options.has_deadline:
            return self.state
        flights = []
        for flight in self.state.flights:
            alone_us = self.profile.run_us(flight.vector.kernels[flight.cursor :])
            left_us = flight.batch.deadline_us - now_us
            flights.append(flight._replace(protected=alone_us <= left_us < alone_us * SHARED))
        return self.state._replace(flights=tuple(flights))
