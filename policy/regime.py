"""Choosing how to run a mix of shapes: believed rollouts of a few layers under every regime."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from models.kernel import FunctionVector
from models.transformer import BatchShape
from policy.batch import Batch, Flight, State
from policy.lanes import Course, Regime
from policy.options import Options
from policy.profile import Profile
from policy.window import fill_window, issue_alone

ROLLOUT_LAYERS = 4
# Overlap must beat one batch at a time by this much in belief, so that a tie costs nobody anything.
WORTH_IT = 1.01
# Regimes this close are equal: in throughput first, then in kindness to the oldest batch, then the first one named.
TIE = 1.005

SERIAL = Regime(overlap=False)


@dataclass(frozen=True, slots=True)
class Rollout:
    """Believed microseconds until all flights have passed a few layers, and until the oldest has."""

    total_us: float
    oldest_us: float


def choose_regime(vectors: tuple[FunctionVector, ...], options: Options, profile: Profile) -> Regime:
    """The best believed way to run these shapes together; worked out once per mix."""
    key = (vectors, options)
    regime: Regime | None = profile.memo.get(key)
    if regime is None:
        regime = profile.memo[key] = search_regime(vectors, options, profile)
    return regime


def search_regime(vectors: tuple[FunctionVector, ...], options: Options, profile: Profile) -> Regime:
    """The best believed way to run these shapes together: one batch at a time, or an overlapping regime.

    The regime's coordinates are searched one after the other, the SM partition and CTAs (which matter most) together.
    """
    if len(vectors) < 2:
        return SERIAL
    ctas = profile.ctas if options.comm_ctas < 0 else (options.comm_ctas,)
    best = Regime(overrun=1.0, split=options.decomposition != "off")
    best = _best_of(
        [replace(best, withheld_sms=p, max_ctas=c) for c in ctas for p in _partitions(c, options, profile)],
        vectors,
        options,
        profile,
    )
    best = _best_of([replace(best, overrun=share) for share in (0.0, 0.25, 0.5, 1.0)], vectors, options, profile)
    if best.split:
        best = _best_of([best, replace(best, split=False)], vectors, options, profile)
    if options.chunks:
        best = _best_of([replace(best, chunks=chunks) for chunks in (1, 2, 4)], vectors, options, profile)
    serial = roll(vectors, SERIAL, options, profile).total_us
    if options.adaptive and serial <= roll(vectors, best, options, profile).total_us * WORTH_IT:
        return SERIAL
    return best


def _partitions(ctas: int, options: Options, profile: Profile) -> list[int]:
    """Partitions to compare; of equal ones the first is taken: the smallest in which the collective finds its SMs free.

    Where withholding them costs nothing in belief, it still spares the collective waits that belief averages away.
    """
    if options.partition >= 0:
        return [options.partition]
    needed = ctas or profile.default_ctas
    return sorted(profile.partitions, key=lambda p: (p < needed, p if p >= needed else -p))


def _best_of(
    candidates: list[Regime], vectors: tuple[FunctionVector, ...], options: Options, profile: Profile
) -> Regime:
    scored = [roll(vectors, regime, options, profile) for regime in candidates]
    fastest = min(rollout.total_us for rollout in scored)
    close = [number for number, r in enumerate(scored) if r.total_us <= fastest * TIE]
    kindest = min(scored[number].oldest_us for number in close)
    return next(candidates[number] for number in close if scored[number].oldest_us <= kindest * TIE)


def roll(vectors: tuple[FunctionVector, ...], regime: Regime, options: Options, profile: Profile) -> Rollout:
    """Run the first layers of these vectors in belief, under one regime.

    A host that needs longer to issue the rounds than the device to run them decides how long they take.
    """
    host_us = 0.0
    state = State(tuple(Flight(_stand_in(number, vector)) for number, vector in enumerate(vectors)))
    elapsed, oldest_us = 0.0, 0.0
    while state.flights:
        course = Course(state, regime, options, profile)
        if len(state.flights) > 1 and regime.overlap:
            fill_window(course)
        else:
            issue_alone(course)
        host_us += profile.round_us + profile.launch_us * len(course.launches)
        if state.flights[0].batch.batch_id == 0:
            oldest_us = elapsed + course.flights[0].ready_us
        elapsed += min(course.compute.end_us, course.comm.end_us)
        last = max(course.compute.end_us, course.comm.end_us) - min(course.compute.end_us, course.comm.end_us)
        state = course.state(())
    return Rollout(max(elapsed + last, host_us), oldest_us)


def _stand_in(number: int, vector: FunctionVector) -> Batch:
    return Batch(number, (), BatchShape(1, 1), (_shortened(vector),), 0.0)


@lru_cache(maxsize=4096)
def _shortened(vector: FunctionVector) -> FunctionVector:
    """The first layers of a vector; all of it if nothing in it repeats."""
    if vector.num_layers <= ROLLOUT_LAYERS:
        return vector
    return FunctionVector((), vector.layer, ROLLOUT_LAYERS, ())
