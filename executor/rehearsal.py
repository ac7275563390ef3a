"""What a run's beliefs are corrected by before it begins: the same batches, run as the policy would and timed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

from executor.device import Device
from executor.mail import Mail
from executor.plan_cache import Plan, PlanCache
from executor.settings import RunSettings
from executor.warm_up import host_prices_us, rehearsed_us
from models.transformer import BatchShape, Vectors, function_vector
from policy.interleaved import plan_under
from policy.lanes import Regime
from policy.options import Options
from policy.profile import Profile
from policy.profile_table import profile_from
from policy.regime import SERIAL, choose_regime, roll
from policy.scheduler import POLICIES, Scheduler

MAX_SHAPES_FORESEEN = 20
# SM partitions that are tried out before a run.
MOST_REHEARSED = 3


def corrected(
    run: RunSettings, device: Device, mail: Mail, table: dict[str, Any], shapes: Sequence[BatchShape]
) -> dict[str, Any]:
    """A measured profile with the host's prices and, where there are graphs, one choice of SMs and CTAs and what
    overlapping costs beyond belief. Equal on all ranks."""
    overlap = POLICIES["interleaved"]
    # Of overlap, whether or not that will pay.
    prices = host_prices_us(
        device, _scheduler(run, replace(run.options, adaptive=False), table, overlap), _middle(shapes)
    )
    launch_us, round_us = mail.share("profile/host", prices, tuple)
    table = table | {"launch_us": launch_us, "round_us": round_us}
    regimes = regimes_of(run, profile_from(table), shapes)
    if regimes is None or device.parts.graphs is None:
        return table
    return _rehearsed(run, device, mail, table, shapes, regimes)


def _rehearsed(
    run: RunSettings, device: Device, mail: Mail, table: dict[str, Any], shapes: Sequence[BatchShape],
    regimes: Sequence[Regime],
) -> dict[str, Any]:  # fmt: skip
    """Leave the policy one SM partition and one number of CTAs, for every further choice needs graphs of its own of
    everything: those that beliefs want most are rehearsed, and the fastest stays. So is one batch at a time."""
    shape, times = _middle(shapes), []
    choices = [_forced(run.options, *choice) for choice in _wanted(run.options, regimes)]
    for options in choices:
        times.append(rehearsed_us(device, _scheduler(run, options, table, POLICIES["interleaved"]), shape))
    times.append(rehearsed_us(device, _scheduler(run, run.options, table, partial(plan_under, SERIAL)), shape))
    *overlapped, serial_us = mail.share("profile/choices", times, list)
    best = choices[overlapped.index(min(overlapped))]
    rehearsed = [[o.partition, o.comm_ctas, us] for o, us in zip(choices, overlapped, strict=True)]
    return table | {
        "partitions": [best.partition], "ctas": [best.comm_ctas], "rehearsed": rehearsed, "serial_us": serial_us,
        "overlap_price": min(overlapped) / serial_us / _believed(run, best, table, shape),
    }  # fmt: skip


def _believed(run: RunSettings, options: Options, table: dict[str, Any], shape: BatchShape) -> float:
    """How long overlapping takes in belief beside one batch at a time, of what is rehearsed."""
    profile, vector = profile_from(table), function_vector(run.model, shape, run.layout, 0)
    regimes = choose_regime((vector, vector), options, profile), SERIAL
    overlapped, serial = (roll((vector,) * options.depth, regime, options, profile).total_us for regime in regimes)
    return overlapped / serial


def regimes_of(run: RunSettings, profile: Profile, shapes: Sequence[BatchShape]) -> list[Regime] | None:
    """The regimes of every pair of shapes, chosen now: in the run that would hold up every rank at each new pair. None
    if there are too many pairs to foresee."""
    if run.policy != "interleaved" or len(shapes) > MAX_SHAPES_FORESEEN:
        return None
    vectors = [function_vector(run.model, shape, run.layout, 0) for shape in shapes]
    return [choose_regime(pair, run.options, profile) for pair in product(vectors, vectors)]


def _wanted(options: Options, regimes: Sequence[Regime]) -> list[tuple[int, int]]:
    """SM partitions and CTAs that pairs of shapes want in belief, the most wanted first; and to leave both alone."""
    wanted = Counter((regime.withheld_sms, regime.max_ctas) for regime in regimes if regime.overlap)
    choices = sorted(wanted, key=lambda choice: (-wanted[choice], choice))[:MOST_REHEARSED]
    alone = max(0, options.partition), max(0, options.comm_ctas)
    return choices if alone in choices else [*choices, alone]


def _forced(options: Options, withheld: int, ctas: int) -> Options:
    """The same options, but overlapping with this partition."""
    return replace(options, adaptive=False, partition=withheld, comm_ctas=ctas)


def _middle(shapes: Sequence[BatchShape]) -> BatchShape:
    return shapes[len(shapes) // 2]


def _scheduler(run: RunSettings, options: Options, table: dict[str, Any], plan: Plan) -> Scheduler:
    """An interleaving scheduler, whatever the run's own policy is."""
    scheduler = Scheduler("interleaved", options, profile_from(table), Vectors(run.model, run.layout))
    scheduler.plan = PlanCache(plan)
    return scheduler
