"""The main loop: requests arrive, one host decides rounds, every host issues its part, devices run it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import simpy

from models.transformer import Layout
from policy.batch import TICK_US, Batch, on_grid
from policy.round import Launch, Round
from policy.scheduler import Scheduler
from sim.cost import Costs, up_to_grid
from sim.device import Device
from sim.express import Courses
from sim.link import Links
from sim.recall import Recall
from sim.spec import HostSpec, NodeSpec
from traces.request import Request
from traces.timeline import Completion, Timeline

Process = Generator[simpy.Event, Any, None]


@dataclass(frozen=True, slots=True)
class Fidelity:
    """exact: every rank is simulated. Otherwise symmetric ranks are folded and what repeats is not simulated again; the
    result is the same to the last bit. record: keep every span (switches the skipping off, not the folding)."""

    exact: bool = False
    record: bool = False


class Simulation:
    """One run on one node. `progress(n)` is told of every n finished requests."""

    def __init__(
        self,
        node: NodeSpec,
        layout: Layout,
        scheduler: Scheduler,
        fidelity: Fidelity = Fidelity(),
        progress: Callable[[int], object] = lambda finished: None,
    ) -> None:
        if layout.num_ranks > node.num_gpus:
            raise ValueError(f"{layout.num_ranks} ranks do not fit node {node.name}, which has {node.num_gpus} GPUs")
        self.env = simpy.Environment()
        self.node, self.layout, self.scheduler, self.fidelity = node, layout, scheduler, fidelity
        self.progress = progress
        self.costs = Costs(node)
        self.courses = Courses(self.costs)
        links = Links(self.env, self.costs, layout.tp, folded=not fidelity.exact)
        step = 1 if fidelity.exact else layout.tp
        self.devices = [self._device(self.env, rank, links) for rank in range(0, layout.num_ranks, step)]
        self.batches: dict[int, tuple[Batch, float]] = {}
        self.out_of_range: set[str] = set()
        self._left_on: dict[int, int] = {}
        self.timeline = Timeline(layout.num_ranks)
        self.num_requests = 0
        self._mail: list[deque[Round]] = [deque() for _ in self.devices]
        self._bell: list[simpy.Event] = [self.env.event() for _ in self.devices]

    def _device(self, env: simpy.Environment, rank: int, links: Links) -> Device:
        device = Device(env, rank, self.costs, priority=self.scheduler.options.priority, record=self.fidelity.record)
        device.join = links.join
        if not self.fidelity.exact and not self.fidelity.record:
            device.courses = self.courses
            device.foresees_collectives = self.layout.pp == 1
        device.on_progress = self._on_progress
        return device

    def run(self, requests: Sequence[Request]) -> Timeline:
        """Simulate until every request is answered. Requests must be sorted by (arrival, id)."""
        self.num_requests = len(requests)
        timeline = self.timeline
        if self._may_recall:
            recall = Recall(self)
            recall.run(requests)
            self.devices[0].sms.busy = recall.busy
        else:
            self.env.process(self._decide(requests))
            for number in range(1, len(self.devices)):
                self.env.process(self._follow(number))
            self.env.run()
        if len(timeline.completions) != len(requests):
            raise RuntimeError(f"the simulation stopped with {len(requests) - len(timeline.completions)} requests open")
        folded = self.layout.num_ranks // len(self.devices)
        for device in self.devices:
            timeline.compute_us += device.sms.busy.compute_us * folded
            timeline.communication_us += device.sms.busy.communication_us * folded
            timeline.overlap_us += device.sms.busy.overlap_us * folded
            timeline.num_kernels += device.sms.busy.kernels * folded
            timeline.spans += device.spans
        timeline.num_rounds, timeline.num_batches = self.scheduler.num_rounds, self.scheduler.num_batches
        timeline.start_us = requests[0].arrival_us if requests else 0.0
        timeline.end_us = max((c.finished_us for c in timeline.completions), default=0.0)
        return timeline

    @property
    def _may_recall(self) -> bool:
        """Deadlines make decisions depend on absolute time, spans must all be written, several devices have several
        hosts."""
        plain = not self.fidelity.exact and not self.fidelity.record
        return plain and len(self.devices) == 1 and not self.scheduler.options.has_deadline

    def fresh_device(self) -> Device:
        """A device at time zero, in a world of its own."""
        env = simpy.Environment()
        return self._device(env, 0, Links(env, self.costs, self.layout.tp, folded=True))

    # -- hosts ------------------------------------------------------------------------------------------------------

    def _decide(self, requests: Sequence[Request]) -> Process:
        """Rank 0: admit, plan, tell the others, issue, wait."""
        scheduler, arrived = self.scheduler, 0
        while True:
            now = self.env.now
            while arrived < len(requests) and on_grid(requests[arrived].arrival_us) <= now:
                scheduler.add(requests[arrived])
                arrived += 1
            admitted = scheduler.admit(now, last=arrived == len(requests))
            for batch in scheduler.enter(admitted, now):
                self.note_entry(batch, now)
            round_ = scheduler.next_round(now)
            if round_ is None:
                due = min(
                    on_grid(requests[arrived].arrival_us) if arrived < len(requests) else float("inf"),
                    scheduler.wake_up_us(),
                )
                if due == float("inf"):
                    return
                yield self.env.timeout(max(TICK_US, up_to_grid(due - now)))
                continue
            yield from self._decided(self.devices[0], round_)
            self._tell(round_)
            yield from self._issue(self.devices[0], round_)

    def host_round(self, device: Device, round_: Round) -> Process:
        """What a round costs the deciding host: the plan, telling the others, its launches, waiting for the marks."""
        yield from self._decided(device, round_)
        yield from self._issue(device, round_)

    def _decided(self, device: Device, round_: Round) -> Process:
        """Planning; and the broadcast of what was admitted, which the first round of a batch cannot start without."""
        host, enters = self.node.host, any(not launch.first for launch in round_.launches)
        cost = host.plan_us + (host.broadcast_us if enters and self.layout.num_ranks > 1 else 0.0)
        if cost:
            yield device.env.timeout(up_to_grid(cost))

    def _tell(self, round_: Round) -> None:
        for number in range(1, len(self.devices)):
            self._mail[number].append(round_)
            if not self._bell[number].triggered:
                self._bell[number].succeed()

    def _follow(self, number: int) -> Process:
        """Every other host issues its part of the same rounds in the same order."""
        while len(self.timeline.completions) < self.num_requests:
            while self._mail[number]:
                yield from self._issue(self.devices[number], self._mail[number].popleft())
            self._bell[number] = self.env.event()
            yield self._bell[number]

    def _issue(self, device: Device, round_: Round) -> Process:
        stage = self.layout.stage_of(device.rank)
        for launch in round_.launches:
            if launch.stage != stage:
                continue
            for piece in _pieces(launch):
                kernels = self._kernels(piece)
                cost = _launch_cost(piece, kernels, self.node.host)
                if cost:
                    yield device.env.timeout(up_to_grid(cost))
                device.issue(piece, kernels, round_.round_id)
        waited = False
        for mark in round_.synchronize:
            if mark.stage == stage:
                waited = True
                event = device.when(mark)
                if event is not None:
                    yield event
        if waited and self.node.host.synchronize_us:
            yield device.env.timeout(up_to_grid(self.node.host.synchronize_us))

    def _kernels(self, launch: Launch) -> tuple[Any, ...]:
        vector = self.batches[launch.batch_id][0].vectors[launch.stage]
        kernels = vector.range(launch.first, launch.last)
        return (kernels[0].fragment(launch.fragment),) if launch.fragment else kernels

    # -- results ----------------------------------------------------------------------------------------------------

    def note_entry(self, batch: Batch, now_us: float) -> None:
        """A batch is admitted. Operations beyond what the node's tables and its fit know are noted."""
        self.batches[batch.batch_id] = (batch, now_us)
        for vector in batch.vectors:
            for kernel in {*vector.prologue, *vector.layer, *vector.epilogue}:
                if beyond := self.costs.beyond(kernel):
                    self.out_of_range.add(beyond)

    def note_end(self, batch: Batch, now_us: float) -> None:
        """The result of a batch is there."""
        _, admitted_us = self.batches[batch.batch_id]
        for request in batch.requests:
            self.timeline.completions.append(Completion(request, batch.batch_id, admitted_us, now_us))
        if len(self.devices) == 1:
            del self.batches[batch.batch_id]
        self.progress(len(batch.requests))

    def _on_progress(self, device: Device, batch_id: int, point: tuple[int, float]) -> None:
        batch, _ = self.batches[batch_id]
        if point[0] < len(batch.vectors[self.layout.stage_of(device.rank)]):
            return
        device.forget(batch_id)
        if device.rank == self.layout.num_ranks - self.layout.tp:
            self.note_end(batch, self.env.now)
        if len(self.devices) > 1:
            self._left_on[batch_id] = self._left_on.get(batch_id, len(self.devices)) - 1
            if not self._left_on[batch_id]:
                del self._left_on[batch_id], self.batches[batch_id]


def _pieces(launch: Launch) -> list[Launch]:
    """What the host really issues: a captured range as one graph, anything else kernel by kernel."""
    if launch.captured or launch.last - launch.first == 1:
        return [launch]
    return [
        Launch(launch.batch_id, i, i + 1, launch.lane, launch.waits if i == launch.first else (), None, launch.stage,
               False, launch.withheld_sms, launch.max_ctas)
        for i in range(launch.first, launch.last)
    ]  # fmt: skip


def _launch_cost(launch: Launch, kernels: tuple[Any, ...], host: HostSpec) -> float:
    """Microseconds of the launching thread; a record and the waits are events."""
    events = host.event_us * (1 + len(launch.waits))
    if launch.captured:
        return events + host.graph_launch_us + host.graph_kernel_us * len(kernels)
    return events + sum(host.collective_launch_us if k.is_communication else host.launch_us for k in kernels)
