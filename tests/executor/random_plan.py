"""A policy that only a test would want: random flights, random lanes, random cuts, always a legal plan.

Run as a program it is a rank of the executor that calls this policy `interleaved`.
"""

from __future__ import annotations

import os
import random

from models.kernel import Fragment
from policy.batch import Flight, State
from policy.options import Options
from policy.profile import Profile
from policy.round import Lane, Launch, Round


def plan(state: State, options: Options, profile: Profile) -> tuple[Round, State]:
    """Up to six launches of any flights; equal states give equal rounds, on every rank."""
    # Text seeds are hashed alike in every process.
    rng = random.Random(str([(f.batch.batch_id, f.cursor, f.issued, f.parts) for f in state.flights]))
    flights, launches = list(state.flights), []
    for _ in range(rng.randint(1, 6)):
        open_ = [i for i, f in enumerate(flights) if f.cursor < len(f.vector)]
        if not open_:
            break
        index = rng.choice(open_)
        flights[index], launch = _launch(flights[index], rng)
        launches.append(launch)
    left = tuple(f for f in flights if f.cursor < len(f.vector))
    marks = (rng.choice(launches).mark,) if rng.random() < 0.7 else ()
    return Round(0, tuple(launches), marks), State(left)


def _launch(flight: Flight, rng: random.Random) -> tuple[Flight, Launch]:
    kernel = flight.vector.kernels[flight.cursor]
    lane = Lane.COMM if kernel.is_communication else rng.choice((Lane.COMPUTE, Lane.FILL))
    waits = (flight.mark,) if flight.lane not in (None, lane) else ()
    part, last = _part(flight, rng), flight.cursor + 1
    if part is None:
        last = rng.randint(last, flight.vector.run_end[flight.cursor])
    launch = Launch(flight.batch.batch_id, flight.cursor, last, lane, waits, part, captured=rng.random() < 0.5)
    if part is None or part.stop == part.of:
        return flight._replace(cursor=last, issued=0, parts=1, axis="", lane=lane), launch
    return flight._replace(issued=part.stop, parts=part.of, axis=part.axis, lane=lane), launch


def _part(flight: Flight, rng: random.Random) -> Fragment | None:
    if flight.issued:
        axis: object = flight.axis
        return Fragment(axis, flight.issued, rng.randint(flight.issued + 1, flight.parts), flight.parts)  # type: ignore[arg-type]
    kernel = flight.vector.kernels[flight.cursor]
    axes = [axis for axis in kernel.split_axes if kernel.max_parts(axis) > 1]
    if not axes or rng.random() < 0.4:
        return None
    chosen = rng.choice(axes)
    parts = rng.randint(2, min(8, kernel.max_parts(chosen)))
    return Fragment(chosen, 0, rng.randint(1, parts), parts)


if __name__ == "__main__":
    from executor.__main__ import main
    from policy.scheduler import POLICIES

    POLICIES["interleaved"] = plan
    os._exit(main())
