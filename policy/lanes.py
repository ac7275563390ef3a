"""The believed course of two lanes: place compute and communication pieces of several batches, price every overlap.

`Course` places one piece after another in believed time; the same code serves to compare regimes (rollouts of a few
layers) and to emit the rounds that are really issued.
"""

from __future__ import annotations

from dataclasses import dataclass

from models.kernel import Fragment, Kernel, SplitAxis
from policy.batch import Busy, Flight, State, on_grid
from policy.options import Options
from policy.profile import Contention, Profile
from policy.round import Lane, Launch, Mark

NEVER = float("inf")


@dataclass(frozen=True, slots=True)
class Regime:
    """How to run the present mix of shapes.

    overlap: False runs one batch at a time. overrun: the share of a fill that may stick out of its window and delay an
    older batch (0: none). whole: a fill that has begun goes on to the end of its segment, so that its collective can
    run beside the next window. split: kernels that do not fit may be cut. withheld_sms, max_ctas: the SM partition.
    chunks: collectives of fills are cut into this many pieces, so that an older batch's can cut in. windows: so many
    are planned and issued as one round.
    """

    overlap: bool = True
    overrun: float = 0.5
    whole: bool = False
    split: bool = True
    withheld_sms: int = 0
    max_ctas: int = 0
    chunks: int = 1
    windows: int = 1


class Course:
    """Two lanes and the flights, as they are believed to go on; mutable, private to one plan."""

    def __init__(self, state: State, regime: Regime, options: Options, profile: Profile) -> None:
        self.flights = list(state.flights)
        self.regime, self.options, self.profile = regime, options, profile
        self.compute, self.comm = state.compute, state.comm
        self.launches: list[Launch] = []
        self._compute_tail: Mark | None = None

    def state(self, held: tuple[tuple[Mark, ...], ...]) -> State:
        """What is left: unfinished flights, on a clock that starts when the first lane is free."""
        base = min(self.compute.end_us, self.comm.end_us)
        places = [i for i, f in enumerate(self.flights) if f.cursor < len(f.vector)]
        alive = tuple(f._replace(ready_us=max(0.0, f.ready_us - base)) for f in (self.flights[i] for i in places))

        def rebased(busy: Busy) -> Busy:
            if busy.end_us <= base:
                return Busy()
            return Busy(busy.end_us - base, busy.kernel, places.index(busy.flight) if busy.flight in places else -1)

        return State(alive, rebased(self.compute), rebased(self.comm), held)

    # -- where a piece could go -------------------------------------------------------------------------------------

    def wants_comm(self, index: int) -> bool | None:
        """Whether the flight's next kernel is communication; None if everything of it is issued."""
        flight = self.flights[index]
        return flight.batch.vectors[0].communicates[flight.cursor]

    def run_end(self, flight: Flight) -> int:
        """The end of the run of kernels that are planned as one: a segment, or one kernel without switch points."""
        return flight.vector.run_end[flight.cursor] if self.options.switch_points else flight.cursor + 1

    def start_us(self, index: int) -> float:
        """When the flight's next piece could start."""
        lane = self.comm if self.wants_comm(index) else self.compute
        return max(self.flights[index].ready_us, lane.end_us)

    def compute_wanted_us(self, index: int) -> float:
        """When the flight will next want the compute lane, its pending communication alone included."""
        flight, wants = self.flights[index], self.wants_comm(index)
        if wants is None:
            return NEVER
        if not wants:
            return max(flight.ready_us, self.compute.end_us)
        end = flight.vector.run_end[flight.cursor]
        if end >= len(flight.vector):
            return NEVER
        alone_us, _ = self.profile.range_us(flight.vector, flight.cursor, end, 0, self.regime.max_ctas)
        return max(flight.ready_us, self.comm.end_us) + alone_us

    def comm_wanted_us(self, index: int) -> float:
        """When the flight will next want the communication lane, its pending computation alone included."""
        flight, wants = self.flights[index], self.wants_comm(index)
        if wants is None:
            return NEVER
        if wants:
            return max(flight.ready_us, self.comm.end_us)
        end = flight.vector.run_end[flight.cursor]
        if end >= len(flight.vector):
            return NEVER
        withheld, ctas = self.regime.withheld_sms, self.regime.max_ctas
        alone_us, _ = self.profile.range_us(flight.vector, flight.cursor, end, withheld, ctas)
        return max(flight.ready_us, self.compute.end_us) + alone_us

    # -- prices -----------------------------------------------------------------------------------------------------

    def factors(self, compute: Kernel, comm: Kernel) -> Contention:
        """How the pair slows each other down, as far as the options let the policy know."""
        if self.options.anticipation == "off":
            return Contention()
        if self.options.anticipation == "scalar":
            return Contention(self.options.scalar_factor, self.options.scalar_factor)
        return self.profile.contention(compute, comm, self.regime.withheld_sms, self.regime.max_ctas)

    def slowdown_of(self, compute: Kernel) -> float:
        """How much the communication that is under way slows a compute kernel."""
        return self.factors(compute, self.comm.kernel).compute if self.comm.kernel else 1.0

    def _stretched(self, start_us: float, alone_us: float, kernel: Kernel) -> float:
        """The end of a piece that could start at `start_us`, slowed while the other lane is busy."""
        other = self.compute if kernel.is_communication else self.comm
        if other.kernel is None or other.end_us <= start_us:
            return start_us + alone_us
        if kernel.is_communication:
            pair = self.factors(other.kernel, kernel)
            start_us, slow = start_us + pair.start_delay_us, pair.comm
        else:
            slow = self.factors(kernel, other.kernel).compute
        shared = max(0.0, other.end_us - start_us)
        if alone_us * slow <= shared:
            return start_us + alone_us * slow
        return start_us + shared + alone_us - shared / slow

    def _delay_other(self, kernel: Kernel, start_us: float, end_us: float) -> None:
        """The piece already on the other lane ends later by what this one takes from it."""
        other = self.compute if kernel.is_communication else self.comm
        if other.kernel is None or other.end_us <= start_us:
            return
        pair = self.factors(other.kernel, kernel) if kernel.is_communication else self.factors(kernel, other.kernel)
        slow = pair.compute if kernel.is_communication else pair.comm
        later = on_grid(other.end_us + (min(end_us, other.end_us) - start_us) * (1.0 - 1.0 / slow))
        if other.flight >= 0 and self.flights[other.flight].ready_us == other.end_us:
            self.flights[other.flight] = self.flights[other.flight]._replace(ready_us=later)
        self._set_busy(not kernel.is_communication, other._replace(end_us=later))

    def _set_busy(self, comm: bool, busy: Busy) -> None:
        if comm:
            self.comm = busy
        else:
            self.compute = busy

    # -- placing ----------------------------------------------------------------------------------------------------

    def place(self, index: int, last: int, part: Fragment | None = None, *, joined: bool = False) -> None:
        """Put kernels [cursor, last) of a flight, or one piece of the kernel at its cursor, on their lane. `joined`: it
        will be issued as one with the launch before it, so it waits for nothing else."""
        flight, ctas = self.flights[index], self.regime.max_ctas
        batch, first = flight.batch, flight.cursor
        vector = batch.vectors[0]
        comm = vector.communicates[first] is True
        withheld = self.regime.withheld_sms if self.regime.overlap and not comm else 0
        if part is None:
            alone_us, main = self.profile.range_us(vector, first, last, withheld, ctas)
        else:
            main = vector.kernels[first].fragment(part)
            alone_us = self.profile.solo_us(main, withheld, ctas)
        lane = Lane.COMM if comm else Lane.COMPUTE if index == 0 else Lane.FILL
        waits = self._waits(index, lane)
        start = self.start_us(index) + (self.profile.crossing_us if waits and not joined else 0.0)
        end = on_grid(self._stretched(start, alone_us, main))
        self._delay_other(main, start, end)
        self._emit(index, last, part, lane, waits, withheld)
        if part is None or part.stop == part.of:
            self.flights[index] = Flight(batch, last, 0, 1, "", end, lane, flight.protected)
        else:
            self.flights[index] = Flight(batch, first, part.stop, part.of, part.axis, end, lane, flight.protected)
        self._set_busy(comm, Busy(end, main, index))

    def place_rest(self, index: int) -> None:
        """Finish the kernel that was begun: the pieces that are left, as one."""
        flight = self.flights[index]
        axis: SplitAxis = flight.axis  # type: ignore[assignment]
        self.place(index, flight.cursor + 1, Fragment(axis, flight.issued, flight.parts, flight.parts))

    def settle_on_compute_lane(self) -> None:
        """After a range with its collectives was issued as one: both lanes are its own until it ends."""
        flight = self.flights[0]
        self.flights[0] = flight._replace(lane=Lane.COMPUTE)
        self.compute = self.compute._replace(end_us=max(self.compute.end_us, flight.ready_us))
        self.comm = self.comm._replace(end_us=max(self.comm.end_us, flight.ready_us))

    def _waits(self, index: int, lane: Lane) -> tuple[Mark, ...]:
        """What the flight's next launch, on that lane, must wait for on other lanes."""
        flight = self.flights[index]
        waits = [flight.mark] if flight.lane is not None and flight.lane is not lane else []
        if lane is Lane.FILL and (behind := self._window_start(index)) is not None:
            waits.append(behind)
        return tuple(waits)

    def _emit(
        self, index: int, last: int, part: Fragment | None, lane: Lane, waits: tuple[Mark, ...], withheld: int
    ) -> None:
        flight = self.flights[index]
        launch = Launch(
            flight.batch.batch_id, flight.cursor, last, lane, waits, part,
            captured=self.options.capture and last - flight.cursor > 1, withheld_sms=withheld,
            max_ctas=self.regime.max_ctas if lane is Lane.COMM else 0,
        )  # fmt: skip
        if lane is Lane.COMPUTE:
            self._compute_tail = launch.mark
        self.launches.append(launch)

    def _window_start(self, index: int) -> Mark | None:
        """A fill was planned for the window behind the oldest flight's last compute; it must not start before."""
        if self._compute_tail is not None:
            return self._compute_tail
        oldest = self.flights[0]
        if index == 0 or oldest.lane is not Lane.COMM:
            return None
        start = oldest.cursor if oldest.issued else oldest.cursor - 1
        while start > 0 and oldest.vector.kernels[start - 1].is_communication:
            start -= 1
        return Mark(oldest.batch.batch_id, start)
