"""One window of interleaving: the oldest batch's next segment, and the best use of the other resource meanwhile."""

from __future__ import annotations

from models.kernel import Fragment, Kernel
from policy.batch import Flight
from policy.lanes import NEVER, Course
from policy.round import Lane, Launch

# Without a partner there is nothing to interleave; how much is issued at once is how long a newcomer may have to wait.
# Those that are there and do not overlap wait in any case, and the host gets further ahead of the device.
SOLO_LAYERS, QUEUED_LAYERS = 2, 4
# A rest of one layer goes with them. What is remembered of rounds (by the simulator, and by the executor's cache of
# plans) rests on a round never passing more layers of a batch than this.
MOST_LAYERS = QUEUED_LAYERS + 1


def place_round(course: Course) -> None:
    """Windows of several flights where the regime overlaps them, or else the oldest by itself."""
    if len(course.flights) == 1 or not course.regime.overlap:
        issue_alone(course)
        return
    end = len(course.flights[0].vector)
    for _ in range(course.regime.windows):
        if course.flights[0].cursor < end:
            fill_window(course)


def issue_alone(course: Course) -> None:
    """The oldest flight by itself, several layers at once; captured, collectives and all, it is plain tensor
    parallelism."""
    flight = course.flights[0]
    vector = flight.vector
    begun = _rest_of_layer(flight)
    layers = QUEUED_LAYERS if len(course.flights) > 1 else SOLO_LAYERS
    goal = flight.cursor + begun + (layers - (begun > 0)) * max(1, len(vector.layer))
    if len(vector) - goal <= len(vector.layer) + len(vector.epilogue):
        goal = len(vector)  # a short rest would be over before the host had issued what comes behind it
    if flight.issued:
        course.place_rest(0)
    # Drivers keep graphs of ranges that begin where a layer does; what others left of one goes piece by piece.
    _place_until(course, flight.cursor + begun)
    first = len(course.launches)
    _place_until(course, goal, joined=course.options.capture)
    if course.options.capture and len(course.launches) > first + 1:
        _merge(course, first)


def _place_until(course: Course, goal: int, *, joined: bool = False) -> None:
    """The oldest flight, run by run; the runs behind the first one `joined` to it."""
    first = len(course.launches)
    while course.flights[0].cursor < goal:
        course.place(0, course.run_end(course.flights[0]), joined=joined and len(course.launches) > first)


def _rest_of_layer(flight: Flight) -> int:
    """How many kernels are left of a layer that others were in the middle of."""
    vector = flight.vector
    layer, place = vector.locate(flight.cursor)
    return len(vector.layer) - place if 0 <= layer < vector.num_layers and place else 0


def _merge(course: Course, first: int) -> None:
    """One graph for the whole range. Its collectives follow those already on the communication lane."""
    head, tail = course.launches[first], course.launches[-1]
    behind = tuple(f.mark for f in course.flights[1:] if f.lane is Lane.COMM)
    own = tuple(mark for mark in head.waits if mark not in behind)
    if head.lane is Lane.COMM:  # the range runs on the compute lane, so what the communication lane implied is said
        own = (*own, head.begins)
    course.launches[first:] = [
        Launch(head.batch_id, head.first, tail.last, Lane.COMPUTE, own + behind, captured=True,
               max_ctas=course.regime.max_ctas)
    ]  # fmt: skip
    course.settle_on_compute_lane()


def fill_window(course: Course) -> None:
    """Place pieces, earliest start first, until the oldest flight has passed its window."""
    goal = _window_end(course.flights[0])
    blocked: set[int] = set()
    while course.flights[0].cursor < goal:
        index = _next_piece(course, blocked)
        if index == 0:
            _place_whole(course, 0)
            blocked.clear()  # its next wish is known now, so there are new gaps
        elif course.wants_comm(index):
            if _place_comm(course, index):
                blocked.clear()
            else:
                blocked.add(index)
        elif not _place_fill(course, index):
            blocked.add(index)


def _window_end(flight: Flight) -> int:
    """The end of the flight's next compute segment and of the communication behind it."""
    vector, end = flight.vector, flight.vector.run_end[flight.cursor]
    if not vector.kernels[flight.cursor].is_communication and end < len(vector):
        end = vector.run_end[end]
    return end


def _next_piece(course: Course, blocked: set[int]) -> int:
    """The flight whose next piece can start first; communication before compute, older before younger."""
    candidates: list[tuple[float, bool, int]] = []
    for index in range(len(course.flights)):
        wants = course.wants_comm(index)
        if wants is None:
            continue
        if index not in blocked:
            candidates.append((course.start_us(index), not wants, index))
        if index and not course.options.lookahead:
            break  # only the next in line may fill
    return min(candidates)[2]


def _place_whole(course: Course, index: int) -> None:
    if course.flights[index].issued:
        course.place_rest(index)
    else:
        course.place(index, course.run_end(course.flights[index]))


def _place_comm(course: Course, index: int) -> bool:
    """A fill's collective, or a chunk of it, if no older batch will want the lane before it is through."""
    flight = course.flights[index]
    kernel, chunks = flight.vector.kernels[flight.cursor], course.regime.chunks
    wanted = min((course.comm_wanted_us(older) for older in range(index)), default=NEVER)
    gap = wanted - course.start_us(index)
    if not course.options.duration_matching:
        gap = NEVER
    if not flight.issued:
        vector, first = flight.vector, flight.cursor
        for last in sorted({course.run_end(flight), first + 1}, reverse=True):
            if _comm_fits(course, course.profile.range_us(vector, first, last, 0, course.regime.max_ctas)[0], gap):
                course.place(index, last)
                return True
        if chunks == 1 or kernel.max_parts("chunks") < chunks:
            return False
        part = Fragment("chunks", 0, 1, chunks)
    elif flight.axis == "chunks":
        part = Fragment("chunks", flight.issued, flight.issued + 1, flight.parts)
    else:
        raise AssertionError("only collectives are cut into chunks")
    fits = _comm_fits(course, course.profile.part_us(kernel, part, 0, course.regime.max_ctas), gap)
    if fits:
        course.place(index, flight.cursor + 1, part)
    return fits


def _comm_fits(course: Course, alone_us: float, gap_us: float) -> bool:
    return alone_us * (1.0 - _overrun(course)) <= gap_us


def _overrun(course: Course) -> float:
    """The share of a fill that may delay older batches; none while the oldest has no slack."""
    return 0.0 if course.options.protect and course.flights[0].protected else course.regime.overrun


def _place_fill(course: Course, index: int) -> bool:
    """Use the compute lane until an older flight wants it back. False if nothing worthwhile fits."""
    wanted = min((course.compute_wanted_us(older) for older in range(index)), default=NEVER)
    gap = wanted - course.start_us(index)
    if gap <= 0.0:
        return False
    flight = course.flights[index]
    if gap == NEVER or not course.options.duration_matching:
        _place_whole(course, index)
        return True
    kernel = flight.vector.kernels[flight.cursor]
    if flight.issued:
        rest = Fragment(flight.axis, flight.issued, flight.parts, flight.parts)  # type: ignore[arg-type]
        if not _fits(course, kernel, course.profile.part_us(kernel, rest, course.regime.withheld_sms), gap):
            return False
        course.place_rest(index)
        return True
    if (end := _how_far(course, flight, gap)) > flight.cursor:
        course.place(index, end)
        return True
    part = _largest_piece(course, kernel, gap)
    if part is not None:
        course.place(index, flight.cursor + 1, part)
    return part is not None


def _how_far(course: Course, flight: Flight, gap_us: float) -> int:
    """The kernels of the fill's segment that fit one after the other.

    Drivers replay units as graphs, so a segment is cut between them; within its first unit only if that does not fit
    and its GEMM can then be split.
    """
    vector, reach, limit, spent = flight.vector, flight.cursor, course.run_end(flight), 0.0
    if course.regime.whole and _overrun(course):
        return limit
    whole = flight.cursor
    while reach < limit:
        kernel = vector.kernels[reach]
        cost = course.profile.solo_us(kernel, course.regime.withheld_sms, 0)
        if not _fits(course, kernel, cost, gap_us - spent):
            break
        spent += cost * course.slowdown_of(kernel)
        reach += 1
        if reach == limit or reach == vector.unit_end[reach - 1]:
            whole = reach
    if not course.options.capture:
        return reach
    cut = whole == flight.cursor and _largest_piece(course, vector.kernels[reach], gap_us - spent) is not None
    return reach if cut else whole


def _fits(course: Course, kernel: Kernel, alone_us: float, gap_us: float) -> bool:
    """Whether a piece of this length may go into the gap: its overrun stays within what the regime allows."""
    return alone_us * course.slowdown_of(kernel) * (1.0 - _overrun(course)) <= gap_us


def _largest_piece(course: Course, kernel: Kernel, gap_us: float) -> Fragment | None:
    """The largest piece of a GEMM that fits, along the axis that saves more; none where cutting costs what it gains."""
    options, withheld = course.options, course.regime.withheld_sms
    if options.decomposition == "off" or not course.regime.split:
        return None
    slow = course.slowdown_of(kernel)
    whole = course.profile.solo_us(kernel, withheld, 0)
    best: tuple[float, Fragment] | None = None
    for axis in kernel.split_axes:
        if options.decomposition not in ("auto", axis):
            continue
        parts = min(options.max_parts, kernel.max_parts(axis))
        for piece, piece_us, rest_us in course.profile.cuts(kernel, axis, parts, withheld):
            if piece_us * slow > gap_us:
                continue
            saved = whole - rest_us
            if saved > course.profile.launch_us and (best is None or saved > best[0]):
                best = (saved, piece)
            break
    return best[1] if best else None
