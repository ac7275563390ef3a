"""Plans cached by key: one situation comes back at every layer, and deciding it again costs more than launching it.

A key is what a plan depends on, relative to the layer that each batch is in, but for how many layers each has left:
that matters only where an end comes in sight, so every remembered plan says how many it needs. A cached round is the
round that the policy would have made, to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from models.kernel import FunctionVector
from policy.batch import Batch, Busy, Flight, State
from policy.options import Options
from policy.profile import Profile
from policy.round import Launch, Mark, Round

Plan = Callable[[State, Options, Profile], tuple[Round, State]]
# How many layers a plan looks at beyond those that it places something in.
MARGIN_LAYERS = 2
MAX_PLANS = 100_000

# A mark as (place of its batch among the flights, kernel relative to that batch's base, part); a batch that is not in
# flight any more is counted from -1 downwards, its kernel as it is.
RelativeMark = tuple[int, int, float]


@dataclass(frozen=True, slots=True)
class _Known:
    """A round and the state behind it, relative to the bases. `flights`: (place before, cursor, a template). `left`:
    layers that each batch had left. `needs`: with as many as this, and as many then, it had made no difference."""

    launches: tuple[tuple[int, Launch, tuple[RelativeMark, ...]], ...]
    synchronize: tuple[RelativeMark, ...]
    flights: tuple[tuple[int, int, Flight], ...]
    compute: Busy
    comm: Busy
    held: tuple[tuple[RelativeMark, ...], ...]
    left: tuple[int, ...]
    needs: tuple[int, ...]

    def holds_for(self, left: tuple[int, ...]) -> bool:
        """Whether the same plan would be made with so many layers left."""
        return left == self.left or all(
            now == then or now >= need <= then for now, then, need in zip(left, self.left, self.needs, strict=True)
        )


class PlanCache:
    """A plan function that remembers another one's answers. Options and profile must stay the same."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._known: dict[tuple[Any, ...], list[_Known]] = {}
        self._num_known = 0
        self.hits = self.misses = 0

    def __call__(self, state: State, options: Options, profile: Profile) -> tuple[Round, State]:
        """What the plan function says, asked or remembered."""
        frame = _Frame(state)
        for known in self._known.get(frame.key, ()):
            if known.holds_for(frame.left):
                self.hits += 1
                return frame.rebuilt(known)
        self.misses += 1
        answer = self._plan(state, options, profile)
        if self._num_known >= MAX_PLANS:
            self._known.clear()
            self._num_known = 0
        self._known.setdefault(frame.key, []).append(frame.relative(*answer))
        self._num_known += 1
        return answer


class _Frame:
    """A state's batches by place, the index that each one's kernels are counted from, and the layers it has left."""

    __slots__ = ("bases", "batches", "key", "left", "numbers", "state", "strangers")

    def __init__(self, state: State) -> None:
        self.state = state
        self.batches: list[Batch] = [flight.batch for flight in state.flights]
        self.numbers = {batch.batch_id: place for place, batch in enumerate(self.batches)}
        self.strangers: list[int] = []
        bases, left, flights = [], [], []
        for batch, cursor, issued, parts, axis, ready_us, lane, protected in state.flights:
            vector = batch.vectors[0]
            base, where, layers = _where(vector, cursor)
            bases.append(base)
            left.append(layers)
            flights.append((vector, where, cursor - base, issued, parts, axis, ready_us, lane, protected))
        self.bases, self.left = bases, tuple(left)
        held = tuple([tuple([self.mark(mark) for mark in marks]) for marks in state.held])
        self.key = (tuple(flights), state.compute, state.comm, held)

    def mark(self, mark: Mark) -> RelativeMark:
        """Relative to its batch's base."""
        batch_id, kernel, part, _ = mark
        place = self.numbers.get(batch_id)
        if place is not None:
            return place, kernel - self.bases[place], part
        if batch_id not in self.strangers:
            self.strangers.append(batch_id)
        return -1 - self.strangers.index(batch_id), kernel, part

    def absolute(self, mark: RelativeMark) -> Mark:
        """A mark of this frame's batches."""
        place, kernel, part = mark
        if place < 0:
            return Mark(self.strangers[-1 - place], kernel, part)
        return Mark(self.batches[place].batch_id, kernel + self.bases[place], part)

    def relative(self, round_: Round, after: State) -> _Known:
        """The answer in terms of places and bases."""
        launches = tuple(
            (place, launch._replace(batch_id=-1, first=launch.first - self.bases[place],
                                    last=launch.last - self.bases[place], waits=()),
             tuple(self.mark(mark) for mark in launch.waits))
            for launch in round_.launches for place in (self.numbers[launch.batch_id],)
        )  # fmt: skip
        flights = []
        for flight in after.flights:
            place = self.numbers[flight.batch.batch_id]
            flights.append((place, flight.cursor - self.bases[place], flight))
        held = tuple(tuple(self.mark(mark) for mark in marks) for marks in after.held)
        synchronize = tuple(self.mark(mark) for mark in round_.synchronize)
        return _Known(
            launches, synchronize, tuple(flights), after.compute, after.comm, held, self.left, self._needs(after)
        )

    def _needs(self, after: State) -> tuple[int, ...]:
        """How many layers each batch must have left for its end to be out of sight of this plan."""
        behind = {flight.batch.batch_id: flight.cursor for flight in after.flights}
        needs = []
        for flight in self.state.flights:
            vector = flight.vector
            cursor = behind.get(flight.batch.batch_id, len(vector))
            passed = vector.locate(cursor)[0] - vector.locate(flight.cursor)[0]
            needs.append(passed + MARGIN_LAYERS if cursor < len(vector) else vector.num_layers + 1)
        return tuple(needs)

    def rebuilt(self, known: _Known) -> tuple[Round, State]:
        """The answer for this frame's batches."""
        batches, bases, absolute = self.batches, self.bases, self.absolute
        launches = []
        for place, (_, first, last, lane, _, part, stage, captured, withheld, ctas), marks in known.launches:
            base, waits = bases[place], tuple([absolute(mark) for mark in marks])
            launches.append(Launch(batches[place].batch_id, first + base, last + base, lane, waits,
                                   part, stage, captured, withheld, ctas))  # fmt: skip
        flights = []
        for place, cursor, (_, _, issued, parts, axis, ready_us, lane_before, _) in known.flights:
            flights.append(Flight(batches[place], cursor + bases[place], issued, parts, axis, ready_us, lane_before,
                                  self.state.flights[place].protected))  # fmt: skip
        held = tuple([tuple([absolute(mark) for mark in marks]) for marks in known.held])
        synchronize = tuple([absolute(mark) for mark in known.synchronize])
        return Round(0, tuple(launches), synchronize), State(tuple(flights), known.compute, known.comm, held)


def _where(vector: FunctionVector, cursor: int) -> tuple[int, int, int]:
    """The base of a batch; whether it is in the prologue (-1), the first layer (0) or behind (1); and how many layers
    are left, this one included."""
    layer, _ = vector.locate(cursor)
    if layer < 0:
        return 0, -1, vector.num_layers
    return len(vector.prologue) + layer * len(vector.layer), min(layer, 1), vector.num_layers - layer
