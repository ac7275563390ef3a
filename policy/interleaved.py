"""Interleaved parallelism: the computation of one batch beside the communication of another (Liger, sections 3.2-3.6).

A round is a window: the oldest batch's next compute segment and the communication behind it, and whatever the other
batches can do beside them. Differences to the published schedule, all switchable: every flight is a candidate, not only
the next in line; a fill is judged by the price of the pair; waits go both ways; the SM partition is chosen by regime;
and where overlap does not pay, batches run one after the other.
"""

from __future__ import annotations

from policy.batch import State
from policy.lanes import Course, Regime
from policy.options import Options
from policy.profile import Profile
from policy.regime import choose_regime
from policy.round import Mark, Round
from policy.window import place_round

# How many rounds the host may run ahead where only the lanes order themselves.
UNSYNCHRONISED_AHEAD = 8


def plan(state: State, options: Options, profile: Profile) -> tuple[Round, State]:
    """The next round and the state behind it. Pure: equal arguments, equal answer."""
    return plan_under(choose_regime(state.oldest, options, profile), state, options, profile)


def plan_under(regime: Regime, state: State, options: Options, profile: Profile) -> tuple[Round, State]:
    """The next round under a regime, whatever would be chosen."""
    course = Course(state, regime, options, profile)
    place_round(course)
    synchronize, held = _synchronise(course, state, options)
    return Round(0, tuple(course.launches), synchronize), course.state(held)


def _synchronise(
    course: Course, state: State, options: Options
) -> tuple[tuple[Mark, ...], tuple[tuple[Mark, ...], ...]]:
    """What the host waits for before it plans again (Liger section 3.4).

    Hybrid: an earlier round's mark, so that the next launches are issued while kernels still run. CPU-GPU: all of this
    round. Inter-stream: lanes order themselves; the host only keeps from running away.
    """
    if options.sync == "cpu-gpu":
        last: dict[int, Mark] = {launch.batch_id: launch.mark for launch in course.launches}
        return tuple(last.values()), ()
    own = [launch for launch in course.launches if launch.batch_id == state.flights[0].batch.batch_id]
    # The mark before the oldest batch's last launch: the host wakes while that one still runs.
    mark = own[-2].mark if len(own) > 1 else own[-1].mark
    held = (*state.held, (mark,))
    return ((), held) if len(held) <= rounds_ahead(options) else (held[0], held[1:])


def rounds_ahead(options: Options) -> int:
    """How many rounds the host may have issued that the device has not reached."""
    return {"cpu-gpu": 0, "hybrid": options.run_ahead, "inter-stream": UNSYNCHRONISED_AHEAD + options.run_ahead}[
        options.sync
    ]
