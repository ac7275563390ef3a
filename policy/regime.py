"""Choosing how to run a mix of shapes: believed rollouts of a few layers under every regime."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, lru_cache

from models.kernel import FunctionVector
from models.transformer import BatchShape
from policy.batch import Batch, Flight, State
from policy.lanes import Course, Regime
from policy.options import Options
from policy.profile import HOST_MARGIN, Profile
from policy.window import place_round

ROLLOUT_LAYERS = 4
# Overlap must beat one batch at a time by this much in belief, so that a tie costs nobody anything.
WORTH_IT = 1.01
# Regimes this close are equal: in throughput first, then in kindness to the oldest batch, then the first one named.
TIE = 1.005

# So many of each batch go through a rollout, as many at a time as may be in flight: with one of each, filling and
# draining the lanes would count as much as the run between.
ROLLOUT_TURNS = 2

SERIAL = Regime(overlap=False)
RegimeOf = Callable[[tuple[FunctionVector, ...]], Regime]


@dataclass(frozen=True, slots=True)
class Rollout:
    """Believed microseconds until all flights have passed a few layers, and until the oldest has; and whether the
    device waited for the host in any round."""

    total_us: float
    oldest_us: float
    is_late: bool


def choose_regime(vectors: tuple[FunctionVector, ...], options: Options, profile: Profile) -> Regime:
    """The best believed way to run these shapes together; worked out once per mix."""
    key = (vectors, options)
    regime: Regime | None = profile.memo.get(key)
    if regime is None:
        regime = profile.memo[key] = search_regime(vectors, options, profile)
    return regime


def search_regime(vectors: tuple[FunctionVector, ...], options: Options, profile: Profile) -> Regime:
    """The best believed way to run these shapes together: one batch at a time, or an overlapping regime.

    The best is the one that is through first. What sharing costs the oldest batch decides between equals only: tried
    as half of the criterion it cost more latency in queues than it saved (simulated, 13 pairs of node and model).

    The regime's coordinates are searched one after the other, the SM partition and CTAs (which matter most) together.
    """
    if len(vectors) < 2:
        return SERIAL

    @cache
    def rolled(regime: Regime, host_margin: float) -> Rollout:  # the best so far competes at every coordinate
        turns = tuple(map(_shortened, vectors)) * ROLLOUT_TURNS
        return roll(turns, lambda oldest: regime, options, profile, host_margin)

    def best_of(candidates: list[Regime]) -> Regime:
        return candidates[_best([rolled(regime, HOST_MARGIN) for regime in candidates])]

    ctas = profile.ctas if options.comm_ctas < 0 else (options.comm_ctas,)
    best = Regime(overrun=1.0, split=options.decomposition != "off")
    best = best_of([replace(best, withheld_sms=p, max_ctas=c) for c in ctas for p in _partitions(c, options, profile)])
    best = best_of([replace(best, overrun=share) for share in (0.0, 0.25, 0.5, 1.0)])
    if options.whole_segments == "on" or (options.whole_segments == "auto" and profile.whole_segments):
        best = best_of([best, replace(best, overrun=1.0, whole=True)])
    if best.split:
        best = best_of([best, replace(best, split=False)])
    if options.chunks:
        best = best_of([replace(best, chunks=chunks) for chunks in (1, 2, 4)])
    if rolled(best, profile.host_margin).is_late:
        # Newcomers enter between rounds: no more windows than the host needs to keep up where it stumbles.
        longer = [replace(best, windows=windows) for windows in (1, 2, 4)]
        times = [rolled(regime, profile.host_margin).total_us for regime in longer]
        best = next(regime for regime, us in zip(longer, times, strict=True) if us <= min(times) * WORTH_IT)
    if not options.adaptive:
        return best
    overlapped_us = rolled(best, HOST_MARGIN).total_us * profile.overlap_price
    return SERIAL if rolled(SERIAL, HOST_MARGIN).total_us <= overlapped_us * WORTH_IT else best


def _partitions(ctas: int, options: Options, profile: Profile) -> list[int]:
    """Partitions to compare; of equal ones the first is taken: the smallest in which the collective finds its SMs free.

    Where withholding them costs nothing in belief, it still spares the collective waits that belief averages away.
    """
    if options.partition >= 0:
        return [options.partition]
    needed = ctas or profile.default_ctas
    return sorted(profile.partitions, key=lambda p: (p < needed, p if p >= needed else -p))


def _best(scored: list[Rollout]) -> int:
    """The index of the best; of equal ones, the kindest to the oldest batch, and of those the first."""
    fastest = min(rollout.total_us for rollout in scored)
    close = [number for number, rollout in enumerate(scored) if rollout.total_us <= fastest * TIE]
    kindest = min(scored[number].oldest_us for number in close)
    return next(number for number in close if scored[number].oldest_us <= kindest * TIE)


def roll(
    vectors: tuple[FunctionVector, ...], regime_of: RegimeOf, options: Options, profile: Profile,
    host_margin: float = HOST_MARGIN,
) -> Rollout:  # fmt: skip
    """Run batches with these vectors in belief, as many at a time as may be in flight; the two oldest say how.

    A round takes as long as the device needs for it, or as long as the host needs to plan and issue the next one, if
    that is longer: the host is only a round ahead.
    """
    queue = tuple(Flight(_stand_in(number, vector)) for number, vector in enumerate(vectors))
    state, queue = State(queue[: options.depth]), queue[options.depth :]
    elapsed, oldest_us, last, is_late = 0.0, 0.0, 0.0, False
    while state.flights:
        course = Course(state, regime_of(state.oldest), options, profile)
        place_round(course)
        host_us = host_margin * (profile.round_us + sum(map(profile.host_us, course.launches)))
        if state.flights[0].batch.batch_id == 0:
            oldest_us = elapsed + max(course.flights[0].ready_us, host_us)
        device_us = min(course.compute.end_us, course.comm.end_us)
        elapsed, is_late = elapsed + max(device_us, host_us), is_late or host_us > device_us
        last = max(0.0, max(course.compute.end_us, course.comm.end_us) - max(device_us, host_us))
        state = course.state(())
        free = options.depth - len(state.flights)
        state, queue = state._replace(flights=(*state.flights, *queue[:free])), queue[free:]
    return Rollout(elapsed + last, oldest_us, is_late)


def _stand_in(number: int, vector: FunctionVector) -> Batch:
    return Batch(number, (), BatchShape(1, 1), (vector,), 0.0)


@lru_cache(maxsize=4096)
def _shortened(vector: FunctionVector) -> FunctionVector:
    """The first layers of a vector; all of it if nothing in it repeats."""
    if vector.num_layers <= ROLLOUT_LAYERS:
        return vector
    return FunctionVector((), vector.layer, ROLLOUT_LAYERS, ())
