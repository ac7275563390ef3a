"""The SMs of a device: CTAs in waves, never preempted; who gets free SMs, and how fast everything runs.

At one instant all arrivals and ends are taken in first and the SMs are settled once, last. Work is accounted only when
its pace changes, so that how often the device is looked at does not change a single bit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from models.kernel import Kernel, Kind
from policy.round import Lane
from sim.cost import (
    Costs,
    Shape,
    fair_share,
    lost_sms,
    memory_bandwidth,
    slowed_comm,
    slowed_compute,
    up_to_grid,
)
from sim.express import resumed_cohort

if TYPE_CHECKING:
    from sim.device import Device, Entry
    from sim.link import Transfer

# SimPy's own priorities are 0 and 1: a device is settled after everything else that happens at an instant.
SETTLE_PRIORITY = 2
# How steeply a memory's latency, which communication sees, rises with the share of its bandwidth that is drawn.
MEMORY_ORDER = 2.0
LANE_RANK = {Lane.COMM: 0, Lane.COMPUTE: 1, Lane.FILL: 2}


@dataclass(slots=True, eq=False)
class Cohort:
    """CTAs of one kernel that started together and go through `waves_left` waves in step."""

    ctas: int
    waves_left: float
    pace_us: float = 0.0
    since_us: float = 0.0
    end_us: float = 0.0


@dataclass(slots=True, eq=False)
class Running:
    """A kernel whose CTAs are on the SMs or wait for them; `limit` bounds how many SMs it may hold. `inside`: of a
    collective's SMs, how many lie in the partition that computation was confined to when it took them."""

    kernel: Kernel
    entry: Entry
    lane: Lane
    order: int
    shape: Shape | None
    limit: int
    ctas_left: int
    cohorts: list[Cohort] = field(default_factory=list)
    held: int = 0
    inside: int = 0
    transfer: Transfer | None = None
    start_us: float = -1.0


@dataclass(slots=True)
class BusyTime:
    """Accumulated microseconds with compute, communication, or both on the SMs."""

    compute_us: float = 0.0
    communication_us: float = 0.0
    overlap_us: float = 0.0
    kernels: int = 0


class Sms:
    """The SMs of one device. `owner.finish` is told of every compute kernel that is through."""

    def __init__(self, owner: Device, costs: Costs, *, priority: bool) -> None:
        self.owner, self.env, self.costs, self.spec, self.priority = owner, owner.env, costs, costs.device, priority
        self.running: list[Running] = []
        self.busy = BusyTime()
        self.free = self.spec.num_sms
        self.settling = False
        self._persistent, self._gpcs = costs.device.gemm_persistent, costs.device.gpcs
        # Whether it matters on which SMs a collective's CTAs are.
        self._lands = bool(self._gpcs) or costs.node.link.ctas_anywhere
        self._generation = 0
        self._counted_us = 0.0
        self._computing = self._communicating = 0
        self._bandwidth = memory_bandwidth(self.spec)
        contention = costs.node.contention
        self._beside_comm, self._comm_beside = slowed_compute(contention), slowed_comm(contention)
        self._stream_beside, self._per_ctas = contention.comm_stream_by_compute, contention.per_ctas
        self._by_traffic, self._by_memory = contention.by_traffic, contention.comm_by_memory
        self._independent, self._anywhere = costs.node.link.independent_ctas, costs.node.link.ctas_anywhere

    @property
    def only_waiting_transfers(self) -> bool:
        """Whether nothing runs but transfers that hold all their SMs and wait for their other side."""
        if self.running and self._lands:
            return False
        return all(r.transfer is not None and not r.transfer.started and not r.ctas_left for r in self.running)

    def add(self, running: Running) -> None:
        """A kernel wants SMs."""
        self.running.append(running)
        self.unsettle()

    def remove(self, running: Running) -> None:
        """A kernel is through."""
        self.count()
        self.running.remove(running)
        self.free += running.held
        if running.transfer is None:
            self._computing -= 1
        else:
            self._communicating -= 1
        self.busy.kernels += 1
        self.unsettle()

    def unsettle(self) -> None:
        """Something changed: settle the device once, after everything else at this instant."""
        self.owner.cut_express()
        if not self.settling:
            self.settling = True
            event = self.env.event()
            event._ok, event._value = True, None
            event.callbacks.append(lambda _: self._settle())
            self.env.schedule(event, priority=SETTLE_PRIORITY)  # type: ignore[arg-type]

    def _settle(self) -> None:
        self.settling = False
        now = self.env.now
        self.count()
        waiting = [r for r in self.running if r.ctas_left]
        self._break_up(waiting, now)
        self._hand_out(now)
        self._set_paces(now)
        self._await_next_end()

    def _await_next_end(self) -> None:
        ends = [c.end_us for r in self.running for c in r.cohorts]
        self._generation += 1
        if ends:
            generation = self._generation
            self.env.timeout(min(ends) - self.env.now).callbacks.append(lambda _: self._tick(generation))

    def _tick(self, generation: int) -> None:
        """The next cohort has ended, unless the device was settled since this was planned."""
        if generation != self._generation:
            return
        now = self.env.now
        self.count()
        for running in list(self.running):
            for cohort in [c for c in running.cohorts if c.end_us <= now]:
                running.cohorts.remove(cohort)
                left = cohort.ctas - self._take_again(running, cohort, now)
                running.held -= left
                self.free += left
            if running.transfer is None and running.start_us >= 0.0 and not running.cohorts and not running.ctas_left:
                self.owner.finish(running)
        self.unsettle()

    def _take_again(self, running: Running, cohort: Cohort, now: float) -> int:
        """On how many of its SMs a cohort that has ended is followed by the next tiles of the same CTAs."""
        if not self._persistent or running.kernel.kind is not Kind.GEMM:
            return 0
        again = min(cohort.ctas, running.ctas_left)
        if again:
            running.ctas_left -= again
            running.cohorts.append(Cohort(again, 1.0, 0.0, now))
        return again

    def _break_up(self, waiting: list[Running], now: float) -> None:
        """A cohort that was to go through many waves keeps only the present one when others wait or SMs lie free."""
        for running in self.running:
            others = any(r is not running for r in waiting)
            spare = self.free and running.held < running.limit
            for cohort in running.cohorts if others or spare else ():
                left = cohort.waves_left - (now - cohort.since_us) / cohort.pace_us if cohort.pace_us else 1.0
                whole = int(left) if left > int(left) else int(left) - 1
                if whole > 0:
                    running.ctas_left += whole * cohort.ctas
                    self._retime(cohort, left - whole, cohort.pace_us, now)

    def _hand_out(self, now: float) -> None:
        """Free SMs go to waiting CTAs: by stream priority, then by arrival. CTAs on an SM stay until they end."""
        if self.priority:
            queue = sorted((r for r in self.running if r.ctas_left), key=lambda r: (LANE_RANK[r.lane], r.order))
        else:
            queue = sorted((r for r in self.running if r.ctas_left), key=lambda r: r.order)
        for running in queue:
            take = min(self._room(running), running.ctas_left)
            if take <= 0:
                continue
            if self._lands and running.transfer is not None:
                running.inside += self._landed_inside(take)
            self.free -= take
            running.held += take
            if running.start_us < 0.0:
                self._begin(running, now)
            if running.transfer is not None:
                running.ctas_left -= take
                if running.held == take if self._independent else not running.ctas_left:
                    running.transfer.resident(self.owner)
                continue
            # Alone, the kernel keeps its SMs for all its full waves; these are then one event.
            alone = len(queue) == 1 and not running.cohorts
            waves = running.ctas_left // take if alone else 1
            running.ctas_left -= waves * take
            running.cohorts.append(Cohort(take, float(waves), 0.0, now))

    def _room(self, running: Running) -> int:
        """How many CTAs of a kernel find an SM now, of those that it may hold."""
        confined = running.limit < self.spec.num_sms
        if not confined and (running.shape is None or not self._lands):
            return self.free
        # A partition is shared by everything that is confined to it.
        rivals = [r for r in self.running if r.transfer is None and (r.limit < self.spec.num_sms or not confined)]
        room, lost = running.limit - sum(r.held for r in rivals), 0
        if self._lands and running.shape is not None:
            inside = sum(r.inside if confined else r.held for r in self.running if r.transfer is not None)
            lost = lost_sms(self._gpcs, inside, running.shape.cluster)
        return max(0, min(self.free, room - lost))

    def _landed_inside(self, take: int) -> int:
        """Of so many SMs that a collective takes now, those of the partition in use: those outside it first, or, where
        CTAs land anywhere, its share of what is free."""
        limit = min((r.limit for r in self.running if r.transfer is None), default=self.spec.num_sms)
        taken = sum(r.held - r.inside for r in self.running if r.transfer is not None)
        outside = min(self.free, max(0, self.spec.num_sms - limit - taken))
        if self._anywhere:
            return take - round(take * outside / self.free)
        return max(0, take - outside)

    def _begin(self, running: Running, now: float) -> None:
        running.start_us = now
        if running.transfer is None:
            self._computing += 1
        else:
            self._communicating += 1

    def _set_paces(self, now: float) -> None:
        """How fast everything goes: SMs, the fair share of memory bandwidth, and what the pair costs beyond that."""
        moving = [
            (r.transfer, r.transfer.short_of(r.held))
            for r in self.running
            if r.transfer is not None and r.transfer.started
        ]
        wants = [transfer.bandwidth / short for transfer, short in moving]
        cohorts = [(r, c) for r in self.running if r.shape is not None for c in r.cohorts]
        drawn = [self._wanted(r.shape, c.ctas) for r, c in cohorts if r.shape is not None]
        wants += drawn
        fair = fair_share(wants, self._bandwidth)
        for running, cohort in cohorts:
            shape = running.shape
            assert shape is not None
            slow = self._slowed(running.kernel.kind, moving)
            bandwidth = fair
            if not shape.is_plain and fair == float("inf"):
                # There is enough for all on average; in those phases in which this one streams, it gets what is left.
                bandwidth = self._bandwidth - sum(wants) + self._wanted(shape, cohort.ctas)
            pace = self._pace_us(running.kernel.kind, shape, cohort.ctas, bandwidth, slow)
            if pace != cohort.pace_us:
                left = cohort.waves_left
                if cohort.pace_us:
                    left = max(0.0, left - (now - cohort.since_us) / cohort.pace_us)
                self._retime(cohort, left, pace, now)
        for transfer, short in moving:
            pace = max(1.0, transfer.bandwidth / fair)
            if cohorts:
                pace = self._comm_pace(transfer, cohorts, pace, sum(drawn))
            transfer.set_pace(self.owner, pace * short)

    def _pace_us(self, kind: Kind, shape: Shape, ctas: int, bandwidth: float, slow: float) -> float:
        """A wave of so many CTAs, slowed as a whole or in what it spends on starting."""
        if not self._by_traffic or kind is Kind.GEMM:
            return shape.pace_us(ctas, bandwidth) * slow
        return shape.slower_to_start(slow).pace_us(ctas, bandwidth)

    def _comm_pace(self, transfer: Transfer, cohorts: list[tuple[Running, Cohort]], pace: float, drawn: float) -> float:
        """How much slower than alone a collective moves beside compute that draws so many bytes per microsecond,
        `pace` of which memory's share explains."""
        slow = max(self._comm_beside[running.kernel.kind] for running, _ in cohorts)
        if self._stream_beside:
            slow += (self._stream_beside - slow) * transfer.stream_share
        if self._by_memory:
            slow = 1.0 + (slow - 1.0) * min(1.0, drawn / self._bandwidth) ** MEMORY_ORDER
        return pace * slow

    def _slowed(self, kind: Kind, moving: list[tuple[Transfer, float]]) -> float:
        """What collectives under way cost a kernel beyond SMs and memory; of one whose CTAs are not all on SMs, as much
        as it moves."""
        if not moving:
            return 1.0
        slow = self._beside_comm[kind]
        if not (self._per_ctas or self._by_traffic):
            return slow
        if self._by_traffic:
            per = self._per_ctas or max(t.ctas for t, _ in moving)
            return 1.0 + (slow - 1.0) * sum(t.ctas / short * t.stream_share**2 for t, short in moving) / per
        return 1.0 + (slow - 1.0) * sum(t.ctas / short for t, short in moving) / self._per_ctas

    def _wanted(self, shape: Shape, ctas: int) -> float:
        """Bytes per microsecond that so many CTAs draw when nothing holds them up."""
        return ctas * shape.cta_bytes / (shape.cta_us if shape.is_plain else shape.pace_us(ctas, self._bandwidth))

    def _retime(self, cohort: Cohort, left: float, pace_us: float, now: float) -> None:
        cohort.waves_left, cohort.pace_us, cohort.since_us = left, pace_us, now
        cohort.end_us = now + up_to_grid(left * pace_us)

    # -- accounts, and going on from a given state ---------------------------------------------------------------------

    def count(self) -> None:
        """Bring the busy times up to now."""
        now = self.env.now
        elapsed = now - self._counted_us
        self._counted_us = now
        if self._computing:
            self.busy.compute_us += elapsed
        if self._communicating:
            self.busy.communication_us += elapsed
            if self._computing:
                self.busy.overlap_us += elapsed

    def account(self, elapsed_us: float, compute_us: float, comm_us: float, kernels: int) -> None:
        """What an express range did: beside waiting transfers, which count as communication all the time."""
        if self._communicating:
            self.busy.communication_us += elapsed_us
            self.busy.overlap_us += compute_us
        self.busy.compute_us += compute_us
        self.busy.communication_us += comm_us
        self.busy.kernels += kernels
        self._counted_us = self.env.now

    def resume(self, running: Running, elapsed_us: float) -> None:
        """A kernel that has run alone since `elapsed_us` ago, put on the SMs it has."""
        now = self.env.now
        self.running.append(running)
        running.start_us = now - elapsed_us
        if running.transfer is not None:
            running.held, running.ctas_left = running.transfer.ctas, 0
            running.inside = self._landed_inside(running.held) if self._lands else 0
            self._communicating += 1
            running.transfer.thaw(self.owner, running.transfer.alone_since(elapsed_us))
        else:
            slots = min(self.free, running.limit)
            ctas, waves, pace, since = resumed_cohort(running, elapsed_us, slots, self.costs)
            running.held = ctas
            cohort = Cohort(ctas, waves, pace, now - elapsed_us + since)
            cohort.end_us = cohort.since_us + up_to_grid(waves * pace)
            running.cohorts.append(cohort)
            self._computing += 1
        self.free -= running.held
        self._await_next_end()

    def restore(self, *, unsettled: bool) -> None:
        """After the running kernels were put in place: set everything going again."""
        self.free = self.spec.num_sms - sum(r.held for r in self.running)
        begun = [r for r in self.running if r.start_us >= 0.0]
        self._communicating = sum(r.transfer is not None for r in begun)
        self._computing = len(begun) - self._communicating
        self._await_next_end()
        if unsettled:
            self.unsettle()
