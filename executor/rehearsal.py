"""What a run's beliefs are corrected by before it begins: the same batches, run as the policy would and timed."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, islice, pairwise, product
from operator import itemgetter
from statistics import median
from typing import Any

from executor.device import Device
from executor.garbage import collected
from executor.mail import Mail
from executor.plan_cache import Plan, PlanCache
from executor.settings import RunSettings
from executor.status import Steps
from executor.warm_up import TURNS, run_through
from models.transformer import BatchShape, Vectors, function_vector
from policy.batching import shape_of
from policy.interleaved import plan_under
from policy.lanes import Regime
from policy.options import Options
from policy.profile import Profile
from policy.profile_table import profile_from
from policy.regime import SERIAL, RegimeOf, choose_regime, roll
from policy.scheduler import POLICIES, Scheduler

MAX_SHAPES_FORESEEN = 20
# What is rehearsed, and how often: enough batches for unlike ones to meet, to their end. Eight layers of 48 stood for
# them at first; where batches come and go that often overlap gained 1 % of what it gains in the whole model, 7 %.
# Batches come in turns, one for every slot, so that each finds the slot again for which its graphs were made. As many
# turns as are so many layers are enough: two of a model of 48, two batches at a time; four of one of eight.
LEAST_TURNS, MOST_TURNS, LAYERS, REHEARSALS = 2, 4, 96, 5

# In seven runs of OPT-30B on four GPUs the slowest tenth of a rank's rounds took its host 1.7 times the median or more,
# and the slowest hundredth 3.3 times; the ranks' medians differed by 1.2-1.7; and all ranks wait for the one that
# stumbles (host-rounds.jsonl in benchmarks/data/h200-x4-2026-11-22-one-by-one).
STUMBLING_HOST = 2.0

overlap = POLICIES["interleaved"]
# SMs withheld from computation, and CTAs of collectives (0: the library's own number).
Choice = tuple[int, int]


@dataclass(slots=True)
class Rehearsal:
    """Batches as the run will have them: shapes, and what the policy believes of them."""

    run: RunSettings
    device: Device
    profile: Profile
    shapes: Sequence[BatchShape]

    def scheduler(self, options: Options, plan: Plan) -> Scheduler:
        """An interleaving scheduler, whatever the run's own policy is."""
        scheduler = Scheduler("interleaved", options, self.profile, Vectors(self.run.model, self.run.layout))
        scheduler.plan = PlanCache(plan)
        return scheduler

    def prices_us(self) -> tuple[float, float]:
        """What a launch costs this host, and a round besides, of overlap, whether or not that will pay."""
        scheduler = self.scheduler(replace(self.run.options, adaptive=False), overlap)
        for _ in range(TURNS + 1):
            spent = run_through(self.device, scheduler, self.shapes)
        self.device.forget()
        return spent.issue_s / max(1, spent.launches) * 1e6, spent.plan_s / max(1, spent.rounds) * 1e6

    def timed_us(self, options: Options, plan: Plan) -> list[float]:
        """How long all of it takes, everything captured before: every time, the fastest first."""
        scheduler, times = self.scheduler(options, plan), []
        for number in range(TURNS + REHEARSALS):
            started = time.perf_counter()
            run_through(self.device, scheduler, self.shapes)
            if number >= TURNS:
                times.append((time.perf_counter() - started) * 1e6)
        self.device.forget()
        return sorted(times)

    def believed_us(self, options: Options, regime_of: RegimeOf) -> float:
        """How long it takes in belief."""
        Steps.add()
        vectors = tuple(function_vector(self.run.model, shape, self.run.layout, 0) for shape in self.shapes)
        return roll(vectors, regime_of, options, self.profile).total_us

    def beliefs_us(self) -> dict[Choice, float]:
        """How long overlap takes in belief under every SM partition and number of CTAs that the options leave open."""
        options, profile = self.run.options, self.profile
        partitions = profile.partitions if options.partition < 0 else (options.partition,)
        ctas = profile.ctas if options.comm_ctas < 0 else (options.comm_ctas,)
        return {choice: self.believed_us(options, always(*choice)) for choice in product(partitions, ctas)}


@collected()  # as in the run
def corrected(
    run: RunSettings, device: Device, mail: Mail, table: dict[str, Any], shapes: Sequence[BatchShape]
) -> dict[str, Any]:
    """A measured profile with the host's prices and, where there are graphs, one choice of SMs and CTAs and what
    overlapping costs beyond belief. Equal on all ranks."""
    rehearsal = Rehearsal(run, device, profile_from(table), first_batches(run))
    prices = mail.gather("profile/prices", rehearsal.prices_us(), tuple)
    # Collectives bind the ranks, so the slowest host sets the pace.
    launch_us, round_us = mail.share("profile/host", tuple(map(max, zip(*prices, strict=True))), tuple)
    table = table | {"launch_us": launch_us, "round_us": round_us}
    if device.parts.graphs is None:
        return table
    rehearsal.profile = profile_from(table)
    return table | rehearsed(rehearsal, mail) if _foresees(run, shapes) else table


def rehearsed(rehearsal: Rehearsal, mail: Mail) -> dict[str, Any]:
    """Leave the policy one SM partition and one number of CTAs, for every further choice needs graphs of its own of
    everything: the fastest of several. One batch at a time is rehearsed, too, and fills that keep to their windows."""
    options, profile = rehearsal.run.options, rehearsal.profile
    is_open = options.whole_segments == "auto"
    tried = replace(options, whole_segments="on") if is_open else options
    choices = [forced(tried, *choice) for choice in worth_rehearsing(rehearsal.beliefs_us())]
    # Overlapping asks more of the host, which stumbles more in a run than here: the second slowest time counts.
    times = [rehearsal.timed_us(choice, overlap)[-2] for choice in choices]
    times.append(median(rehearsal.timed_us(options, partial(plan_under, SERIAL))))
    *overlapped, serial_us = mail.share("profile/choices", times, list)
    best, best_us = min(zip(choices, overlapped, strict=True), key=itemgetter(1))
    kept_us = None
    if is_open:
        kept = replace(best, whole_segments="off")
        kept_us = mail.share("profile/kept", rehearsal.timed_us(kept, overlap)[-2], float)
        best, best_us = (kept, kept_us) if kept_us <= best_us else (best, best_us)
    believed_us = rehearsal.believed_us(best, lambda oldest: choose_regime(oldest, best, profile))
    believed_serial_us = rehearsal.believed_us(options, lambda oldest: SERIAL)
    return {
        "partitions": [best.partition], "ctas": [best.comm_ctas],
        "whole_segments": best.whole_segments == "on",
        "overlap_price": (best_us / serial_us) / (believed_us / believed_serial_us),
        "host_margin": STUMBLING_HOST,
        "rehearsed": [[o.partition, o.comm_ctas, us] for o, us in zip(choices, overlapped, strict=True)],
        "serial_us": serial_us, "kept_to_windows_us": kept_us,
    }  # fmt: skip


def regimes_of(
    run: RunSettings, profile: Profile, shapes: Sequence[BatchShape], *, all_pairs: bool
) -> list[Regime] | None:
    """The regimes of every pair of shapes, or of those that meet where batches are full, chosen now: in the run that
    would hold up every rank at each new pair. None if there are too many pairs to foresee."""
    if not _foresees(run, shapes):
        return None
    pairs = list(product(shapes, shapes)) if all_pairs else neighbours(run)
    vectors = {shape: function_vector(run.model, shape, run.layout, 0) for pair in pairs for shape in pair}
    regimes = []
    for one, two in pairs:
        regimes.append(choose_regime((vectors[one], vectors[two]), run.options, profile))
        Steps.add()
    return regimes


def neighbours(run: RunSettings) -> list[tuple[BatchShape, BatchShape]]:
    """Every pair of a run's full batches that follow one another, in either order and once."""
    full = _full_batches(run)
    ways = [pair for one, two in pairwise(full) for pair in ((one, two), (two, one))]
    return list(dict.fromkeys(ways))


def _foresees(run: RunSettings, shapes: Sequence[BatchShape]) -> bool:
    return run.policy == "interleaved" and len(shapes) <= MAX_SHAPES_FORESEEN


def worth_rehearsing(believed_us: Mapping[Choice, float]) -> list[Choice]:
    """Every SM partition with the library's own number of CTAs, and with every other number the one believed fastest.
    Beliefs are as good as their pairs of kernels: of OPT-30B at 256 rows, host-staged, two GPUs, eight CTAs were
    believed best and took 7 % longer than the library's own, and of partitions the one that withholds 8 SMs, which took
    11 % longer than 16."""
    counts = sorted({ctas for _, ctas in believed_us})
    found = sorted(choice for choice in believed_us if choice[1] == counts[0])
    for count in counts[1:]:
        found.append(min((c for c in believed_us if c[1] == count), key=lambda choice: believed_us[choice]))
    return found


def always(withheld_sms: int, max_ctas: int) -> RegimeOf:
    """Overlap, under this partition."""
    regime = Regime(overrun=1.0, withheld_sms=withheld_sms, max_ctas=max_ctas)
    return lambda oldest: regime


def forced(options: Options, withheld_sms: int, ctas: int) -> Options:
    """Overlap whether it pays or not, under one partition and number of CTAs."""
    return replace(options, adaptive=False, partition=withheld_sms, comm_ctas=ctas)


def first_batches(run: RunSettings) -> list[BatchShape]:
    """The shapes of a run's first full batches, over and over if it has few; the deeper the model, the fewer."""
    depth = run.options.depth
    turns = min(MOST_TURNS, max(LEAST_TURNS, LAYERS // (depth * run.model.num_layers)))
    return list(islice(cycle(_full_batches(run)), turns * depth))


def _full_batches(run: RunSettings) -> list[BatchShape]:
    size = min(run.options.batch_size, len(run.requests))
    return [shape_of(run.requests[at : at + size], run.options) for at in range(0, len(run.requests) - size + 1, size)]
