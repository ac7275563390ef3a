"""One model on one rank, ready to be measured: from the coordinates of a point to calls of the executor's kernels."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from executor.backing import Backing
from executor.cuda import settle
from executor.device import Device, Graphs, Parts
from executor.groups import Groups
from executor.inputs import Loader, Outputs, load_own_tokens
from executor.lanes import Clock
from executor.measure import Choices, measure, thinned
from executor.operations import Collective
from executor.session import DTYPES, UNASKED, Opened, Session
from executor.settings import RunSettings
from executor.slots import Slot
from executor.survey_bench import Bench, Body, Row
from executor.survey_points import SEQUENCE, Grid, Point, Shapes
from executor.two_batches import only
from executor.warm_up import made_up_requests, run_through
from executor.weights import make_weights
from models.kernel import Fragment, Kernel
from models.transformer import BatchShape, Vectors, function_vector
from policy.options import Options
from policy.profile import Profile
from policy.profile_table import profile_from
from policy.scheduler import Scheduler
from traces.files import write_whole
from traces.measurement import Coordinates

# Rates for a first guess of how long a kernel takes, from which follows how often it is called.
GUESS_FLOPS_PER_US, GUESS_BYTES_PER_US, GUESS_LEAST_US = 4e8, 2.5e6, 4.0
# Batches at which the policy's beliefs are measured; it reads between them.
BELIEFS = 4
NUM_SLOTS = 2


@dataclass(slots=True)
class Bed:
    """A model's weights, buffers and device. The lanes outlive it: streams and partitions are made once."""

    session: Session
    run: RunSettings
    grid: Grid
    device: Device
    backing: Backing
    shapes: Shapes
    _beliefs: tuple[Profile, dict[str, Any]] | None = field(default=None)

    @classmethod
    def open(cls, session: Session, run: RunSettings, grid: Grid, backing: Backing, num_shards: int = 1) -> Bed:
        """Load a model. Every rank must call it."""
        place, dtype, largest = session.place, DTYPES[run.dtype], grid.largest
        groups = session.world.layout(run.layout, grid.ctas)
        weights = make_weights(run.model, run.layout, place.rank, place.device, dtype, run.seed)
        slots = tuple(
            Slot.allocate(run.model, run.layout, 0, largest, place.device, dtype) for _ in range(NUM_SLOTS)
        )  # fmt: skip
        backing.lanes.timing = False
        parts = Parts(
            weights, slots, groups, backing.lanes, Loader(run.model, place.device, dtype, largest),
            Outputs(place.device), Clock(), _graphs(place.device.type), {}, {},
        )  # fmt: skip
        settle(place.device)
        return cls(
            session, run, grid, Device(parts), backing, Shapes(run.model, run.layout, dtype.itemsize, num_shards)
        )

    @property
    def groups(self) -> Groups:
        """The groups of all ranks, by CTAs."""
        return self.device.parts.groups

    @property
    def vectors(self) -> Vectors:
        """The model's function vectors."""
        return Vectors(self.run.model, self.run.layout)

    def refresh(self) -> None:
        """A forward pass of the largest batch: kernels that were called over and over leave numbers that no model has,
        and a GPU is faster on such. Every rank must call it."""
        plain = replace(self.run.options, capture=False)
        run_through(self.device, Scheduler("tensor", plain, UNASKED, self.vectors), [self.grid.largest])
        self.device.forget()
        for slot in self.device.parts.slots:  # a batch's last rows may lie outside a smaller shape
            slot.whole.last_rows.zero_()

    def load_own_tokens(self) -> None:
        """What is timed without collectives has no rows of zeros then."""
        load_own_tokens(self.device.parts.slots, self.device.parts.weights)

    # -- compute kernels --------------------------------------------------------------------------------------------

    def measure(self, bench: Bench, point: Point) -> Row:
        """A compute kernel alone."""
        calls, guess_us = self.calls(point.what, point.at)
        return Row({"us": bench.compute(int(point.at["withheld_sms"]), calls, guess_us)})

    def calls(self, what: str, at: Coordinates) -> tuple[list[Body], float]:
        """The kernel in every layer, and of a piece every piece in every layer, so that weights come from memory as
        they do in a run; and about how long one call takes."""
        name = str(at["name"])
        if what == "attention":
            shape = BatchShape(int(at["num_sequences"]), int(at["length"]))
        else:
            shape = self.shapes.batch(name, int(at["rows"]))
        vector = function_vector(self.shapes.config, shape, self.shapes.layout)
        places = [number for number, kernel in enumerate(vector.kernels) if kernel.name == name]
        if name == "attn_norm" and len(places) > 1:
            places = places[1:]  # the first one of a model only copies, where the others add
        kernel, parts = vector.kernels[places[0]], list[Fragment | None]([None])
        if what == "gemm" and kernel.cols != int(at["cols"]):
            of = kernel.cols // int(at["cols"])
            parts = [Fragment("cols", number, number + 1, of) for number in range(of)]
        operations = self.device.bound(0, shape)
        calls: list[Body] = []
        for part in parts:
            for place in places:
                operation = operations[place]
                assert not isinstance(operation, Collective)
                calls.append(partial(operation, part))
        return calls, guess_us(kernel) / len(parts)

    def measure_sequence(self, bench: Bench, point: Point) -> Row:
        """All compute kernels of a forward pass in a row: what a kernel takes longer for following another one."""
        self.load_own_tokens()
        shape = batch_of(int(point.at["rows"]))
        vector = function_vector(self.shapes.config, shape, self.shapes.layout)
        guess = sum(guess_us(kernel) for kernel in vector.kernels if not kernel.is_communication)
        return Row({"us": bench.compute(0, [only(self.device, shape, comm=False)], guess)})

    # -- two batches ------------------------------------------------------------------------------------------------

    def two(self, rows: int, folder: Path | None) -> Opened:
        """The model for batches of so many rows, with the policy's beliefs about it. Every rank must call it."""
        shape = batch_of(rows)
        requests = made_up_requests(shape)
        run = msgspec.structs.replace(
            self.run, policy="interleaved", requests=requests,
            options=Options(batch_size=len(requests), pad_to=16, depth=NUM_SLOTS, whole_segments="off"),
            partitions=tuple(sorted(self.grid.partitions)) or (0,), ctas=self.grid.batch_ctas or (0,),
        )  # fmt: skip
        profile, table = self.beliefs(folder) if self.grid.partitions else (UNASKED, None)
        return Opened(run, self.device, self.backing, profile, table, None, (shape,))

    def beliefs(self, folder: Path | None) -> tuple[Profile, dict[str, Any]]:
        """What the policy believes, measured as at the start of a run. Rank 0 keeps it in the folder, so that a survey
        that goes on has the same plans, and so that a simulator can make them."""
        if self._beliefs is None:
            mail, model = self.session.mail, self.run.model.model_id
            path = folder / f"profile-{model}.json" if folder is not None else None
            kept = msgspec.json.decode(path.read_bytes()) if path is not None and path.exists() else {}
            kept = mail.share("beliefs", kept, dict)
            if not kept:
                partitions = tuple(sorted(self.grid.partitions))
                choices = Choices(_believed(self.grid.batch_rows), partitions, self.grid.batch_ctas)
                name = f"measured on {self.session.place.backend}"
                kept = measure(self.device, choices, self.backing.stopwatch, mail, name)
                if path is not None:
                    write_whole(path, msgspec.json.encode(kept))
            self._beliefs = profile_from(kept), kept
        return self._beliefs


def _graphs(device_type: str) -> Graphs | None:
    """A cache of this model's graphs alone: its keys do not tell models apart."""
    if device_type == "cpu":
        return None
    from executor.graphs import GraphCache

    return GraphCache()


def batch_of(rows: int) -> BatchShape:
    """Sequences of the survey's length that make so many rows; one shorter sequence for fewer."""
    length = min(rows, SEQUENCE)
    return BatchShape(rows // length, length)


def _believed(rows: tuple[int, ...]) -> tuple[BatchShape, ...]:
    """A few batches, evenly spaced from the smallest to the largest."""
    return tuple(thinned([batch_of(count) for count in sorted(rows)], BELIEFS))


def guess_us(kernel: Kernel) -> float:
    """About how long a compute kernel takes; equal on all ranks, and all that depends on it with it."""
    return GUESS_LEAST_US + max(kernel.flops / GUESS_FLOPS_PER_US, kernel.bytes_moved / GUESS_BYTES_PER_US)
