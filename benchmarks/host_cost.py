"""What a round costs the host that plans and issues it, without a GPU: the driver's own code on lanes that do nothing.

Run: python benchmarks/host_cost.py [--batches 300] [--profile]
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import pstats
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from executor.device import Body, Device
from executor.garbage import no_collections
from executor.lanes import Clock, StreamKey, Ticket, Work
from executor.operations import Collective
from executor.plan_cache import PlanCache
from executor.results import HostTime
from models.config import MODELS
from models.kernel import Fragment
from models.transformer import Layout, Vectors
from policy import interleaved
from policy.options import Options
from policy.scheduler import Scheduler
from sim.believe import profile_of
from sim.spec import load_node
from traces.request import Request

NODE, MODEL, LAYOUT = "h200-hoststaged-x2-fitted", "opt-30b", Layout(2, 1)


@dataclass(slots=True, eq=False)
class NoTicket:
    """Work that is over as soon as somebody asks."""

    key: StreamKey
    done: bool = False


class NoLanes:
    """Queues of a device that takes no time."""

    can_capture, timing, spin = True, False, True

    def run(self, key: StreamKey, waits: Sequence[Ticket], work: Work) -> NoTicket:
        """Nothing but the call."""
        work()
        return NoTicket(key)

    def is_done(self, ticket: Ticket) -> bool:
        """It is."""
        return True

    def synchronize(self, ticket: Ticket) -> None:
        """Nothing to wait for."""


@dataclass(slots=True)
class NoGraphs:
    """Graphs of whatever is asked for, and nothing in them."""

    sealed: bool = True
    refused: dict[StreamKey, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return 0

    def holds(self, key: tuple[object, ...]) -> bool:
        """All of it."""
        return True

    def replay(self, key: tuple[object, ...], stream: StreamKey, body: Body, *, collectives: bool) -> Body:
        """A call that does nothing."""
        return _nothing


class NoGroups:
    """Groups whose collectives move nothing."""

    stage_name = "stage 0,1"

    def name(self, collective: Collective) -> str:
        """All of them are tensor parallelism's."""
        return "tp 0,1"

    def call_of(
        self, collective: Collective, part: Fragment | None = None, max_ctas: int = 0, *, loose: bool = False
    ) -> Body:
        """A call that does nothing."""
        return _nothing


class Operations(dict[Any, list[Any]]):
    """Kernels of a shape that do nothing; all layers sum one buffer."""

    def __init__(self, vectors: Vectors) -> None:
        super().__init__()
        self._vectors, self._buffer = vectors, torch.zeros(4096)

    def get(self, key: Any, default: Any = None) -> Any:
        """The operations of (slot, shape)."""
        if key not in self:
            kernels = self._vectors(key[1])[0].kernels
            self[key] = [Collective(k.kind, self._buffer, "tp") if k.is_communication else _nothing for k in kernels]
        return self[key]


def _nothing(fragment: Fragment | None = None) -> None:
    return None


def device_of(vectors: Vectors, num_slots: int) -> Device:
    """The driver's device, with nothing behind it."""
    slots = [SimpleNamespace(number=number) for number in range(num_slots)]
    parts = SimpleNamespace(
        weights=SimpleNamespace(stage=0), slots=slots, groups=NoGroups(), lanes=NoLanes(), clock=Clock(),
        graphs=NoGraphs(), bound=Operations(vectors), steps={},
    )  # fmt: skip
    return Device(parts)  # type: ignore[arg-type]


def serve(scheduler: Scheduler, device: Device, lengths: Sequence[int]) -> HostTime:
    """Single requests of these lengths, as many in flight as may be."""
    spent, waiting = HostTime(), [Request(number, 0.0, length) for number, length in enumerate(lengths)]
    waiting.reverse()
    gc.collect()
    with no_collections():  # as in runs
        while waiting or scheduler.state.flights:
            while waiting and scheduler.has_room(len(scheduler.state.flights)):
                for batch in scheduler.enter(((waiting.pop(),),), 0.0):
                    device.enter(batch, 0.0, lambda slot: None)
            begun = time.perf_counter()
            round_ = scheduler.next_round()
            assert round_ is not None
            planned = time.perf_counter()
            for launch in round_.launches:
                device.issue(launch, round_.round_id)
            issued = time.perf_counter()
            device.take_finished()
            spent.plan_s, spent.issue_s = spent.plan_s + planned - begun, spent.issue_s + issued - planned
            spent.rounds, spent.launches = spent.rounds + 1, spent.launches + len(round_.launches)
    return spent


def main() -> None:
    """Print the cost of a round, first with a fresh cache of plans, then with what that run left in it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=300)
    parser.add_argument("--profile", action="store_true", help="where the time goes, function by function")
    args = parser.parse_args()
    vectors = Vectors(replace(MODELS[MODEL], vocab_size=0), LAYOUT)
    options, profile = Options(batch_size=1), profile_of(load_node(NODE))
    cache = PlanCache(interleaved.plan)
    rng = np.random.default_rng(0)
    device = device_of(vectors, options.depth)
    lengths = rng.integers(16, 116, args.batches).tolist()
    serve(Scheduler("interleaved", options, profile, vectors), device, lengths)  # regimes are chosen, vectors made
    profiler = cProfile.Profile()
    print("| plans | rounds | launches | plan us/round | issue us/launch | together us/launch | known |")
    print("|---|---|---|---|---|---|---|")
    for name in ("new", "known"):
        scheduler, before = Scheduler("interleaved", options, profile, vectors), cache.hits
        scheduler.plan = cache
        if args.profile:
            profiler.enable()
        spent = serve(scheduler, device, lengths)
        profiler.disable()
        plan_us, issue_us = spent.plan_s * 1e6, spent.issue_s * 1e6
        print(f"| {name} | {spent.rounds} | {spent.launches} | {plan_us / spent.rounds:.1f} "
              f"| {issue_us / spent.launches:.1f} | {(plan_us + issue_us) / spent.launches:.1f} "
              f"| {(cache.hits - before) / spent.rounds:.0%} |")  # fmt: skip
    if args.profile:
        pstats.Stats(profiler).sort_stats("tottime").print_stats(30)


if __name__ == "__main__":
    main()
