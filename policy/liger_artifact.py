"""The published Liger artifact's control flow, for comparison (reference: MachineLearningSystem/24PPOPP-Liger,
schedule.h).

One window per segment of the oldest batch; one contention factor of 0.8 in both directions; fills in FIFO order; GEMMs
cut along output features by eighths; a secondary collective always closes the window. Its launches are eager. Unlike
the artifact, data dependencies between its two streams are kept and admission is decided once: without them it computes
invalid numbers and deadlocks.
"""

from __future__ import annotations

from models.kernel import Fragment, Kernel, Kind
from policy.batch import Flight, State
from policy.options import Options
from policy.profile import Profile
from policy.round import Lane, Launch, Mark, Round

CONTENTION_FACTOR = 0.8
PARTS = 8


def plan(state: State, options: Options, profile: Profile) -> tuple[Round, State]:
    """One window: the primary's kernels up to the next switch, then what fits of the others, first come first
    served."""
    flights = list(state.flights)
    primary = flights[0]
    launches, window, wake = _primary_segment(primary, profile)
    communicating = primary.vector.kernels[launches[0].first].is_communication
    gate = primary.mark if primary.cursor or primary.issued else None
    flights[0] = primary._replace(cursor=launches[-1].last, issued=0, parts=1, axis="", lane=Lane.COMPUTE)
    window *= CONTENTION_FACTOR
    for index in range(1, len(flights)):
        flights[index], window, fills = _fill(flights[index], window, communicating, gate, profile)
        launches += fills
        if window <= 0.0:
            break
    left = tuple(f for f in flights if f.cursor < len(f.vector))
    return Round(0, tuple(launches), (wake,)), State(left)


def _primary_segment(flight: Flight, profile: Profile) -> tuple[list[Launch], float, Mark]:
    """The primary's launches, their believed length, and the mark before the last kernel, where the host wakes."""
    end = flight.vector.run_end[flight.cursor]
    waits = (flight.mark,) if flight.lane not in (None, Lane.COMPUTE) else ()
    batch, first = flight.batch.batch_id, flight.cursor
    launches: list[Launch] = []
    if flight.issued:
        rest = Fragment("cols", flight.issued, flight.parts, flight.parts)
        launches.append(Launch(batch, first, first + 1, Lane.COMPUTE, waits, rest))
        first, waits = first + 1, ()
    if end - 1 > first:
        launches.append(Launch(batch, first, end - 1, Lane.COMPUTE, waits))
        first, waits = end - 1, ()
    if end > first:
        launches.append(Launch(batch, first, end, Lane.COMPUTE, waits))
    window = sum(_estimate(flight, index, profile) for index in range(flight.cursor, end))
    wake = launches[-2].mark if len(launches) > 1 else flight.mark
    return launches, window, wake


def _estimate(flight: Flight, index: int, profile: Profile) -> float:
    """The profiled duration; of a kernel that was begun, that of the pieces that are left."""
    kernel = flight.vector.kernels[index]
    if index == flight.cursor and flight.issued:
        return profile.part_us(kernel, Fragment("cols", flight.issued, flight.parts, flight.parts))
    return profile.solo_us(kernel, 0, 0)


def _fill(
    flight: Flight, window: float, communicating: bool, gate: Mark | None, profile: Profile
) -> tuple[Flight, float, list[Launch]]:
    """Launch kernels of the opposite type while the window lasts; returns the flight, what is left, and the
    launches."""
    fills: list[Launch] = []
    while window > 0.0 and flight.cursor < len(flight.vector):
        kernel = flight.vector.kernels[flight.cursor]
        if kernel.is_communication == communicating:
            break
        cost = window if kernel.is_communication else _estimate(flight, flight.cursor, profile)
        if cost > window:
            part = _piece(kernel, flight, window, profile)
            if part is None:
                return flight, 0.0, fills
            cost = profile.part_us(kernel, part)
        else:
            part = Fragment("cols", flight.issued, flight.parts, flight.parts) if flight.issued else None
        waits = [flight.mark] if flight.lane not in (None, Lane.FILL) else []
        if not fills and gate is not None:
            waits.append(gate)
        launch = Launch(flight.batch.batch_id, flight.cursor, flight.cursor + 1, Lane.FILL, tuple(waits), part)
        fills.append(launch)
        window -= cost
        if part is None or part.stop == part.of:
            flight = flight._replace(cursor=flight.cursor + 1, issued=0, parts=1, axis="", lane=Lane.FILL)
        else:
            flight = flight._replace(issued=part.stop, parts=part.of, axis=part.axis, lane=Lane.FILL)
    return flight, window, fills


def _piece(kernel: Kernel, flight: Flight, window: float, profile: Profile) -> Fragment | None:
    """The largest run of eighths of a GEMM's output features that fits the window."""
    if kernel.kind is not Kind.GEMM or kernel.cols < PARTS:
        return None
    for stop in range(PARTS - 1, flight.issued, -1):
        part = Fragment("cols", flight.issued, stop, PARTS)
        if profile.part_us(kernel, part) <= window:
            return part
    return None
