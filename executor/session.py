"""What one rank keeps from run to run: groups, weights, slots, graphs, the measured profile; and how it makes a run."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TextIO

import numpy as np
import torch

from executor.about import describe
from executor.backing import Backing, make_backing
from executor.checkpoint import load_checkpoint
from executor.cuda import settle
from executor.device import AllSteps, Device, Parts
from executor.execute import Driver, Progress
from executor.garbage import collected
from executor.groups import Groups, Place, World
from executor.inputs import Loader, Outputs
from executor.lanes import Clock
from executor.mail import Mail
from executor.measure import Choices, measure
from executor.operations import Operation
from executor.plan_cache import PlanCache
from executor.recorder import Recorder
from executor.rehearsal import MAX_SHAPES_FORESEEN, corrected, regimes_of
from executor.results import write_output
from executor.room import check_room
from executor.settings import RunSettings, Settings
from executor.slots import Slot
from executor.status import Status
from executor.summary import summarize
from executor.warm_up import capture_ranges, warm_up
from executor.weights import Weights, make_weights
from models.transformer import BatchShape, Layout, Vectors
from policy.batching import shape_of
from policy.options import Options
from policy.profile import Contention, Profile
from policy.profile_table import profile_from
from policy.scheduler import OVERLAPPING, POLICIES, Admission, Scheduler
from traces.request import Request

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MAX_SHAPES_AHEAD = 40


@dataclass(slots=True)
class Prepared:
    """What runs of the same model, numbers and buffers share."""

    weights: Weights
    slots: tuple[Slot, ...]
    loader: Loader
    bound: dict[tuple[int, BatchShape], list[Operation]] = field(default_factory=dict)
    steps: AllSteps = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Opened:
    """A run that is ready to begin."""

    run: RunSettings
    device: Device
    backing: Backing
    profile: Profile
    table: dict[str, Any] | None
    plans: PlanCache | None
    shapes: tuple[BatchShape, ...]

    def scheduler(self) -> Scheduler:
        """A fresh scheduler of the run's policy."""
        run = self.run
        scheduler = Scheduler(run.policy, run.options, self.profile, Vectors(run.model, run.layout))
        if self.plans is not None:
            scheduler.plan = self.plans
        return scheduler


class Session:
    """One rank of a world, run after run."""

    def __init__(self, settings: Settings, place: Place, mail: Mail, status: Status) -> None:
        self.settings, self.place, self.mail, self.status = settings, place, mail, status
        self.world = World(place)
        self.logs: list[list[Admission]] = []
        self._kept: tuple[tuple[object, ...], Prepared, Backing] | None = None
        self._profiles: dict[object, tuple[Profile, dict[str, Any]]] = {}
        self._plans: dict[object, PlanCache] = {}

    def run_all(self) -> None:
        """Every run of the settings. Raises ValueError for what a user can mend."""
        for number, run in enumerate(self.settings.runs):
            self.mail.begin(f"run/{number}")
            self.status.enter(f"prepare run {number}")
            self._run(number, run)

    # -- one run ----------------------------------------------------------------------------------------------------

    def open(self, run: RunSettings) -> Opened:
        """Load, connect, measure and rehearse: everything before the first request. Every rank must call it."""
        shapes = shapes_of(run.requests, run.options)
        groups = self.world.layout(run.layout, {*run.ctas, max(0, run.options.comm_ctas)})
        prepared, backing = self._prepare(run, shapes[-1])
        backing.lanes.timing, backing.lanes.spin = run.timing, run.spin
        self.mail.together("loaded")
        rows, dtype = shapes[-1].rows, DTYPES[run.dtype]
        groups.warm_up(torch.zeros(rows, run.model.hidden_size, dtype=dtype, device=self.place.device))
        device = self._device(run, groups, prepared, backing)
        profile, table = self._profile(run, device, backing, shapes)
        opened = Opened(run, device, backing, profile, table, self._plans_of(run, profile), shapes)
        if run.warm_up:
            self.status.enter("warm up")
            device.seal(sealed=False)
            self._rehearse(opened)
        return opened

    def _rehearse(self, opened: Opened) -> None:
        """Make and capture what the run will want, as far as that can be known."""
        run, device, shapes = opened.run, opened.device, shapes_ahead(opened.run.requests, opened.run.options)
        captures = device.parts.graphs is not None
        foreseen = shapes if len(shapes) <= MAX_SHAPES_FORESEEN else opened.shapes
        # Of pairs that nothing is captured for, those that will meet: all would take a CPU longer than a short run.
        regimes = regimes_of(run, opened.profile, foreseen, all_pairs=captures)
        if regimes is not None and captures:
            used = [regime for regime in regimes if regime.overlap]
            capture_ranges(device, shapes, sorted({r.withheld_sms for r in used}), sorted({r.max_ctas for r in used}))
            device.seal(sealed=True)
            shapes = shapes[-1:]
        warm_up(device, opened.scheduler(), shapes if captures else shapes[-1:])

    def _run(self, number: int, run: RunSettings) -> None:
        opened = self.open(run)
        device, backing = opened.device, opened.backing
        with ExitStack() as stack:
            driver = self._driver(run, device, opened.scheduler(), stack)
            # The main loop makes no cycles. Before time zero: the last collection takes longer than many a batch.
            stack.enter_context(collected())
            self.start_together(device)
            backing.lanes.begin_run(device.parts.clock, run.device_delay_us, (run.delay_seed, self.place.rank))
            self._go(driver, run, number)
            wall_s = device.parts.clock.now_us() / 1e6
        self.logs.append(driver.log)
        host = describe(self.place) | {"graphs_refused": backing.refused}
        about = {"host": host, "profile": opened.table, "num_graphs": backing.num_graphs}
        output = summarize(driver, self.mail, wall_s, about)
        if output is not None and self.settings.output:
            write_output(self.settings.output, number, output)
        self._keep_logits(device.parts.outputs, number)
        # Nobody goes on, or away, before everybody's files are there.
        self.mail.together("end")

    def _keep_logits(self, outputs: Outputs, number: int) -> None:
        if outputs.kept and self.settings.output:
            named = {str(batch_id): tensor.numpy() for batch_id, tensor in outputs.kept.items()}
            np.savez(Path(self.settings.output) / f"logits-{number}.npz", allow_pickle=False, **named)

    def start_together(self, device: Device) -> None:
        """Time zero is rank 0's; ranks of its host read the same clock, others take the moment they hear of it."""
        mine = (socket.gethostname(), time.perf_counter_ns())
        self.mail.gather("ready", 0, int)
        host, origin_ns = self.mail.share(
            "start", mine if self.place.rank else (mine[0], time.perf_counter_ns()), tuple
        )
        device.parts.clock.origin_ns = int(origin_ns) if host == mine[0] else time.perf_counter_ns()

    def _go(self, driver: Driver, run: RunSettings, number: int) -> None:
        self.status.enter(f"run {number}")
        self._drive(driver, run)
        self.status.enter(f"finish run {number}")

    def _drive(self, driver: Driver, run: RunSettings) -> None:
        if run.replay < 0:
            driver.live()
        elif run.serial:
            driver.serially(self.logs[run.replay])
        else:
            driver.replay(self.logs[run.replay])

    # -- what a run needs -------------------------------------------------------------------------------------------

    def _prepare(self, run: RunSettings, largest: BatchShape) -> tuple[Prepared, Backing]:
        """Weights, slots and lanes; what the run before left, where it fits."""
        key = (
            run.model,
            run.layout,
            run.dtype,
            run.seed,
            run.checkpoint,
            run.options.depth,
            run.options.priority,
            largest,
        )
        if self._kept is None or self._kept[0] != key:
            if self._kept is not None:
                self._kept[2].close()
                self._kept = None  # the old weights make room for the new
            self._kept = key, self._load(run, largest), make_backing(self.place.device, priority=run.options.priority)
        return self._kept[1], self._kept[2]

    def _load(self, run: RunSettings, largest: BatchShape) -> Prepared:
        rank, device, dtype = self.place.rank, self.place.device, DTYPES[run.dtype]
        if device.type == "cpu":
            check_room(run.model, run.layout, dtype)
            self.mail.together("room")  # what another rank has taken already would count twice
        if run.checkpoint:
            weights = load_checkpoint(Path(run.checkpoint), run.model, run.layout, rank, device, dtype)
        else:
            weights = make_weights(run.model, run.layout, rank, device, dtype, run.seed)
        stage = run.layout.stage_of(rank)
        slots = tuple(
            Slot.allocate(run.model, run.layout, stage, largest, device, dtype) for _ in range(run.options.depth)
        )
        prepared = Prepared(weights, slots, Loader(run.model, device, dtype, largest))
        settle(device)
        return prepared

    def _device(self, run: RunSettings, groups: Groups, prepared: Prepared, backing: Backing) -> Device:
        is_output = _is_output(self.place.rank, run.layout)
        parts = Parts(
            prepared.weights, prepared.slots, groups, backing.lanes, prepared.loader,
            Outputs(self.place.device, run.keep_logits), Clock(), backing.graphs if run.options.capture else None,
            prepared.bound, prepared.steps,
        )  # fmt: skip
        return Device(parts, poison=run.poison, split=run.record, copy_out=run.checksum and is_output)

    def _driver(self, run: RunSettings, device: Device, scheduler: Scheduler, stack: ExitStack) -> Driver:
        is_output = _is_output(self.place.rank, run.layout)
        file: TextIO | None = None
        if is_output and run.completions_path:
            earlier = {other.completions_path for other in self.settings.runs[: len(self.logs)]}
            # What another world left there is not of this one.
            mode: Literal["a", "w"] = "a" if run.completions_path in earlier else "w"
            file = stack.enter_context(Path(run.completions_path).open(mode, encoding="utf-8"))  # noqa: SIM115 (the stack closes it)
        recorder = Recorder(self.place.rank, run.record, run.timing, file)
        progress = Progress(self._at_round, self.status.finished)
        return Driver(run, scheduler, device, recorder, self.mail, device.parts.clock, is_output, progress)

    def _at_round(self, number: int, idle: bool) -> None:
        self.status.progress, self.status.idle = number, idle

    def _plans_of(self, run: RunSettings, profile: Profile) -> PlanCache | None:
        """Plans that were made once serve every run of the same policy, options and beliefs."""
        if run.policy not in OVERLAPPING:
            return None
        key = (run.policy, run.options, profile)
        if key not in self._plans:
            self._plans[key] = PlanCache(POLICIES[run.policy])
        return self._plans[key]

    def _profile(
        self, run: RunSettings, device: Device, backing: Backing, shapes: tuple[BatchShape, ...]
    ) -> tuple[Profile, dict[str, Any] | None]:
        """What the policy believes: given, or measured once per model and choices; nothing where no policy asks."""
        if run.policy not in OVERLAPPING:
            return UNASKED, None
        given = run.profile
        key = (
            json.dumps(given)
            if given is not None
            else (run.model, run.layout, run.dtype, run.partitions, run.ctas, shapes)
        )
        if key not in self._profiles:
            table = given if given is not None else self._measured(run, device, backing, shapes)
            self._profiles[key] = profile_from(table), table
        return self._profiles[key]

    def _measured(
        self, run: RunSettings, device: Device, backing: Backing, shapes: tuple[BatchShape, ...]
    ) -> dict[str, Any]:
        self.status.enter("measure the profile")
        device.seal(sealed=False)
        # One real forward pass first: a GPU is faster on zeros than on numbers, and nothing is timed at its first use.
        plain = replace(run.options, capture=False)
        warm_up(device, Scheduler("tensor", plain, UNASKED, Vectors(run.model, run.layout)), shapes[-1:])
        choices = Choices(shapes, run.partitions, run.ctas)
        table = measure(device, choices, backing.stopwatch, self.mail, f"measured on {self.place.backend}")
        return corrected(run, device, self.mail, table, shapes)


UNASKED = Profile("none", lambda kernel, withheld, ctas: 0.0, lambda compute, comm, withheld, ctas: Contention())


def _is_output(rank: int, layout: Layout) -> bool:
    """The rank that copies results out: the first of the last stage."""
    return rank == layout.num_ranks - layout.tp


def shapes_of(requests: Sequence[Request], options: Options) -> tuple[BatchShape, ...]:
    """The shapes of full batches of these requests, smallest first; part-filled ones have fewer rows than these."""
    count = min(options.batch_size, len(requests))
    shapes = {shape_of((request,), options).padded_len for request in requests}
    return tuple(BatchShape(count, length) for length in sorted(shapes))


def shapes_ahead(requests: Sequence[Request], options: Options) -> tuple[BatchShape, ...]:
    """The shapes to prepare for: part-filled batches too, unless there are too many; the largest last."""
    full = shapes_of(requests, options)
    every = [BatchShape(count, shape.padded_len) for count in range(1, full[-1].num_sequences + 1) for shape in full]
    return tuple(every) if len(every) <= MAX_SHAPES_AHEAD else full
