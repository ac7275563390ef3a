"""A compute kernel and a collective side by side in the simulator, raced as the survey races them on hardware: both
called over and over from the same moment, the slowdown of each counted while both run."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import repeat

import simpy

from models.kernel import Kernel
from models.transformer import Layout
from policy.round import Lane, Launch
from sim.cost import Costs, up_to_grid
from sim.device import Device
from sim.link import Links

# Each side alone takes about this long; longer races change little.
RACE_US = 300.0
LEAST_CALLS, MOST_CALLS = 4, 16
# Nothing on hardware is as regular as a simulated loop, which may meet the same wave's end every time: a race is run
# with the collectives beginning so far into the first compute kernel, and its outcome is the mean.
OFFSETS = (0.1, 0.45, 0.8)
# A lone collective arrives so far into the second compute kernel.
PHASES = (0.15, 0.4, 0.65, 0.9)


@dataclass(frozen=True, slots=True)
class Pair:
    """A compute kernel under its partition, beside a collective with at most so many CTAs (0: the default).
    `priority`: CTAs of the collective go first."""

    compute: Kernel
    comm: Kernel
    withheld_sms: int = 0
    max_ctas: int = 0
    priority: bool = True


@dataclass(frozen=True, slots=True)
class Outcome:
    """Slowdowns of each side, with its waits; how long a lone collective is held up."""

    compute_slowdown: float
    comm_slowdown: float
    start_delay_us: float


def race(costs: Costs, pair: Pair, *, with_delay: bool = True) -> Outcome:
    """What measuring this pair on the simulated node would show."""
    gap = costs.device.graph_gap_us
    compute_us = costs.solo_us(pair.compute, pair.withheld_sms) + gap
    comm_us = costs.solo_us(pair.comm, 0, pair.max_ctas) + gap
    calls = tuple(min(MOST_CALLS, max(LEAST_CALLS, round(RACE_US / us))) for us in (compute_us, comm_us))
    slow = []
    for offset_us in (offset * compute_us for offset in OFFSETS):
        # Until the collectives begin, the computation runs at its own pace.
        ends = [end - offset_us for end in _ends(costs, pair, calls, offset_us)]
        alone = calls[0] * compute_us - gap - offset_us, calls[1] * comm_us - gap
        both = min(ends)
        slow.append([both / max(1e-3, us - (end - both)) for end, us in zip(ends, alone, strict=True)])
    delay = 0.0
    if with_delay:
        few = 3 + round(2.0 * comm_us / compute_us)
        late = [_ends(costs, pair, (few, 1), compute_us * (1.0 + phase)) for phase in PHASES]
        waits = [end - compute_us * (1.0 + phase) for (_, end), phase in zip(late, PHASES, strict=True)]
        delay = max(0.0, sum(waits) / len(waits) - (comm_us - gap))
    means = [sum(each) / len(each) for each in zip(*slow, strict=True)]
    return Outcome(means[0], means[1], delay)


def _ends(costs: Costs, pair: Pair, calls: tuple[int, ...], comm_at_us: float) -> tuple[float, float]:
    """When each side is through, counted from the start of the computation: graphs of so many calls, the collectives
    issued at `comm_at_us`."""
    env, ends = simpy.Environment(), dict[int, float]()
    device = Device(env, 0, costs, priority=pair.priority, record=False)
    device.join = Links(env, costs, Layout().tp, folded=True).join
    device.on_progress = lambda _, batch_id, __: ends.__setitem__(batch_id, env.now)
    compute = Launch(0, 0, calls[0], Lane.COMPUTE, withheld_sms=pair.withheld_sms, captured=True)
    comm = Launch(1, 0, calls[1], Lane.COMM, max_ctas=pair.max_ctas, captured=True)

    device.issue(compute, tuple(repeat(pair.compute, calls[0])), 0)
    event = env.timeout(up_to_grid(comm_at_us))
    assert event.callbacks is not None
    event.callbacks.append(lambda _: device.issue(comm, tuple(repeat(pair.comm, calls[1])), 0))
    env.run()
    # The gap before the first kernel of either side, which is equally long, belongs to neither.
    return ends[0] - costs.device.kernel_gap_us, ends[1] - costs.device.kernel_gap_us
