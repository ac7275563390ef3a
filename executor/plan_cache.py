"""Plans cached by key: one situation comes back at every layer, and deciding it again costs more than launching it.

A key is what a plan depends on, relative to the layer that each batch is in. How far the end of a batch is matters only
within `AHEAD_LAYERS`; a round that reached further than that is not kept. A cached round is the round that the policy
would have made, to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from models.kernel import FunctionVector
from policy.batch import Batch, Busy, Flight, State
from policy.options import Options
from policy.profile import Profile
from policy.round import Launch, Mark, Round

Plan = Callable[[State, Options, Profile], tuple[Round, State]]
# Layers of a batch that a round may pass and still be kept, and what a plan looks at beyond what it places.
AHEAD_LAYERS = 12
MARGIN_LAYERS = 3
MAX_PLANS = 100_000

# A mark as (place of its batch among the flights, kernel relative to that batch's base, part); a batch that is not in
# flight any more is counted from -1 downwards, its kernel as it is.
RelativeMark = tuple[int, int, float]


@dataclass(frozen=True, slots=True)
class _Known:
    """A round and the state behind it, relative to the bases. `flights`: (place before, cursor, a template)."""

    launches: tuple[tuple[int, Launch, tuple[RelativeMark, ...]], ...]
    synchronize: tuple[RelativeMark, ...]
    flights: tuple[tuple[int, int, Flight], ...]
    compute: Busy
    comm: Busy
    held: tuple[tuple[RelativeMark, ...], ...]


class PlanCache:
    """A plan function that remembers another one's answers. Options and profile must stay the same."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._known: dict[tuple[Any, ...], _Known] = {}
        self.hits = self.misses = 0

    def __call__(self, state: State, options: Options, profile: Profile) -> tuple[Round, State]:
        """What the plan function says, asked or remembered."""
        frame = _Frame(state)
        known = self._known.get(frame.key)
        if known is not None:
            self.hits += 1
            return frame.rebuilt(known)
        self.misses += 1
        answer = self._plan(state, options, profile)
        if frame.may_keep(answer[1]):
            if len(self._known) >= MAX_PLANS:
                self._known.clear()
            self._known[frame.key] = frame.relative(*answer)
        return answer


class _Frame:
    """A state's batches by place, and the index that each one's kernels are counted from."""

    __slots__ = ("bases", "batches", "key", "numbers", "state", "strangers")

    def __init__(self, state: State) -> None:
        self.state = state
        self.batches: list[Batch] = [flight.batch for flight in state.flights]
        self.numbers = {batch.batch_id: place for place, batch in enumerate(self.batches)}
        self.bases: list[int] = []
        self.strangers: list[int] = []
        flights = []
        for f in state.flights:
            base, where = _where(f.vector, f.cursor)
            self.bases.append(base)
            flights.append(
                (f.vector, where, f.cursor - base, f.issued, f.parts, f.axis, f.ready_us, f.lane, f.protected)
            )
        held = tuple(tuple(self.mark(mark) for mark in marks) for marks in state.held)
        self.key = (tuple(flights), state.compute, state.comm, held)

    def mark(self, mark: Mark) -> RelativeMark:
        """Relative to its batch's base."""
        place = self.numbers.get(mark.batch_id)
        if place is not None:
            return place, mark.kernel - self.bases[place], mark.part
        if mark.batch_id not in self.strangers:
            self.strangers.append(mark.batch_id)
        return -1 - self.strangers.index(mark.batch_id), mark.kernel, mark.part

    def absolute(self, mark: RelativeMark) -> Mark:
        """A mark of this frame's batches."""
        place, kernel, part = mark
        if place < 0:
            return Mark(self.strangers[-1 - place], kernel, part)
        return Mark(self.batches[place].batch_id, kernel + self.bases[place], part)

    def may_keep(self, after: State) -> bool:
        """Whether no batch came so far in this round that the cut-off of its remaining layers could have mattered."""
        left = {flight.batch.batch_id: flight for flight in after.flights}
        for flight, base in zip(self.state.flights, self.bases, strict=True):
            vector = flight.vector
            if _layers_left(vector, base) <= AHEAD_LAYERS:
                continue  # the key says exactly where its end is
            behind = left.get(flight.batch.batch_id)
            if behind is None or behind.cursor - base > (AHEAD_LAYERS - MARGIN_LAYERS) * len(vector.layer):
                return False
        return True

    def relative(self, round_: Round, after: State) -> _Known:
        """The answer in terms of places and bases."""
        launches = tuple(
            (place, replace(launch, batch_id=-1, first=launch.first - self.bases[place],
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
        return _Known(launches, synchronize, tuple(flights), after.compute, after.comm, held)

    def rebuilt(self, known: _Known) -> tuple[Round, State]:
        """The answer for this frame's batches."""
        launches = []
        for place, cut, marks in known.launches:
            base, waits = self.bases[place], tuple(self.absolute(mark) for mark in marks)
            launches.append(Launch(self.batches[place].batch_id, cut.first + base, cut.last + base, cut.lane, waits,
                                   cut.fragment, cut.stage, cut.captured, cut.withheld_sms, cut.max_ctas))  # fmt: skip
        flights = []
        for place, cursor, old in known.flights:
            flights.append(Flight(self.batches[place], cursor + self.bases[place], old.issued, old.parts, old.axis,
                                  old.ready_us, old.lane, self.state.flights[place].protected))  # fmt: skip
        held = tuple(tuple(self.absolute(mark) for mark in marks) for marks in known.held)
        synchronize = tuple(self.absolute(mark) for mark in known.synchronize)
        return Round(0, tuple(launches), synchronize), State(tuple(flights), known.compute, known.comm, held)


def _where(vector: FunctionVector, cursor: int) -> tuple[int, tuple[int, int]]:
    """The base of a batch, and what is known of the place: whether it is in the prologue (-1), the first layer (0) or
    behind (1); and how many layers are left, as far as that matters."""
    layer, _ = vector.locate(cursor)
    if layer < 0:
        return 0, (-1, min(vector.num_layers, AHEAD_LAYERS + 1))
    layer = min(layer, vector.num_layers)
    base = len(vector.prologue) + layer * len(vector.layer)
    return base, (min(layer, 1), min(vector.num_layers - layer, AHEAD_LAYERS + 1))


def _layers_left(vector: FunctionVector, base: int) -> int:
    if not base or not vector.layer:
        return vector.num_layers
    return vector.num_layers - (base - len(vector.prologue)) // len(vector.layer)
