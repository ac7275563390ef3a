"""Run in the simulator what a real run admitted: its log says which batch entered before which round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from policy.batch import TICK_US, on_grid
from policy.round import Round
from policy.scheduler import Admission, Scheduler
from sim.cost import up_to_grid
from sim.simulate import Process, Simulation
from traces.request import Request
from traces.timeline import Timeline


@dataclass(frozen=True, slots=True)
class Replayed:
    """The rounds that the log gives, and how the simulated node ran them."""

    rounds: tuple[Round, ...]
    timeline: Timeline


def planned(scheduler: Scheduler, requests: Sequence[Request], log: Sequence[Admission]) -> tuple[Round, ...]:
    """The rounds alone: no device, no time but the log's own. The scheduler must be fresh."""
    source = _Log(requests, log)
    rounds: list[Round] = []
    while True:
        scheduler.enter(source.due(scheduler), source.now_us)
        round_ = scheduler.next_round(source.now_us)
        if round_ is None:
            return tuple(rounds)
        rounds.append(round_)


def replay(simulation: Simulation, requests: Sequence[Request], log: Sequence[Admission]) -> Replayed:
    """Run the log on a simulated node. `simulation` must be fresh; its scheduler is told what enters, not asked.

    Raises ValueError if the log does not fit the requests or the policy.
    """
    replaying = _Replay(
        simulation.node, simulation.layout, simulation.scheduler, simulation.fidelity, simulation.progress
    )
    replaying.log = _Log(requests, log)
    timeline = replaying.run(requests)
    return Replayed(tuple(replaying.rounds), timeline)


class _Log:
    """Hands out admissions at their rounds. Raises ValueError for one that names an unknown request or cannot come."""

    def __init__(self, requests: Sequence[Request], log: Sequence[Admission]) -> None:
        self._by_id = {request.request_id: request for request in requests}
        self._entries = list(reversed(log))
        self.now_us = 0.0
        named = [number for entry in log for batch in entry.batches for number in batch]
        if sorted(named) != sorted(self._by_id):
            raise ValueError(f"the log admits {len(named)} requests, which are not the {len(self._by_id)} of the run")

    def due(self, scheduler: Scheduler) -> tuple[tuple[Request, ...], ...]:
        """The batches that enter before the scheduler's next round."""
        if not self._entries:
            return ()
        entry = self._entries[-1]
        if entry.round_id == scheduler.num_rounds:
            self._entries.pop()
            self.now_us = entry.now_us
            return tuple(tuple(self._by_id[number] for number in batch) for batch in entry.batches)
        if not scheduler.state.flights:
            raise ValueError(
                f"the log admits a batch before round {entry.round_id}, but nothing is in flight after round "
                f"{scheduler.num_rounds - 1}: it belongs to another policy, profile or layout"
            )
        return ()


class _Replay(Simulation):
    """A simulation whose first host reads a log instead of the clock."""

    log: _Log

    def run(self, requests: Sequence[Request]) -> Timeline:
        """Simulate until every request of the log is answered."""
        self.rounds: list[Round] = []
        return super().run(requests)

    @property
    def _may_recall(self) -> bool:
        return False

    def _decide(self, requests: Sequence[Request]) -> Process:
        scheduler = self.scheduler
        while True:
            admitted = self.log.due(scheduler)
            # The simulated node may be faster than the real one was: no batch enters before its requests are there.
            arrived = max((on_grid(r.arrival_us) for batch in admitted for r in batch), default=0.0)
            if arrived > self.env.now:
                yield self.env.timeout(max(TICK_US, up_to_grid(arrived - self.env.now)))
            for batch in scheduler.enter(admitted, self.log.now_us):
                self.note_entry(batch, self.env.now)
            round_ = scheduler.next_round(self.log.now_us)
            if round_ is None:
                return
            self.rounds.append(round_)
            self._tell(round_)
            yield from self.host_round(self.devices[0], round_)
