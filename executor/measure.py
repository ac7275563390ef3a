"""A profile measured at the start of a run: this run's own kernels alone, its collectives, and both side by side.

Every rank measures, so that collectives meet; rank 0's numbers are given to all, for equal beliefs give equal rounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Protocol

import torch

from executor.device import Device
from executor.lanes import StreamKey
from executor.mail import Mail
from executor.operations import Collective
from models.kernel import Fragment, Kernel, Kind
from models.transformer import BatchShape, function_vector
from policy.round import Lane

Body = Callable[[], None]
COMM = StreamKey(Lane.COMM)
# Shapes that are measured; others are read between them.
MAX_SHAPES = 10
EIGHTHS = (2, 4, 6)
# GEMMs that are measured beside an all-reduce, at fewer shapes: a large one, and one of few CTAs, which is slowed more.
PAIRED, MAX_PAIR_SHAPES = ("fc1", "out_proj"), 6
# A series that is through before the other has begun says nothing of how much slower it could be than this.
MOST_SLOWDOWN = 8.0
PAIR_US = 4000.0


class Stopwatch(Protocol):
    """Times work on the queues of one kind of device."""

    reps: int

    def alone_us(self, key: StreamKey, calls: Sequence[Body]) -> float:
        """Microseconds a call, when the calls follow one another on one queue."""

    def together_us(self, one: tuple[StreamKey, list[Body]], two: tuple[StreamKey, list[Body]]) -> tuple[float, float]:
        """When the last call of each list ended, both lists having begun together on two queues."""

    def crossing_us(self) -> float:
        """How much later work starts that waits for another queue than behind its own."""


@dataclass(frozen=True, slots=True)
class Choices:
    """What the policy may choose between, and the shapes that will come."""

    shapes: tuple[BatchShape, ...]
    partitions: tuple[int, ...]
    ctas: tuple[int, ...]


def measure(device: Device, choices: Choices, watch: Stopwatch, mail: Mail, name: str) -> dict[str, Any]:
    """The table that `policy.profile_table.profile_from` reads, but for the host's prices. Collective: every rank must
    call it."""
    bench = _Bench(device, choices, watch)
    solo = mail.share("profile/solo", bench.solo(), dict)
    pairs = mail.share("profile/pairs", bench.pairs(solo), list)
    crossing_us = mail.share("profile/crossing", watch.crossing_us(), float)
    return {
        "name": name, "partitions": choices.partitions, "ctas": choices.ctas, "crossing_us": crossing_us,
        **solo, "pairs": pairs,
    }  # fmt: skip


class _Bench:
    """One rank's measurements."""

    def __init__(self, device: Device, choices: Choices, watch: Stopwatch) -> None:
        self.device, self.watch = device, watch
        self.partitions = choices.partitions
        self.ctas = choices.ctas
        by_rows = {shape.rows: shape for shape in sorted(choices.shapes, key=lambda s: (s.rows, s.num_sequences))}
        self.shapes = thinned([by_rows[rows] for rows in sorted(by_rows)], MAX_SHAPES)
        weights = device.parts.weights
        self.vectors = [function_vector(weights.config, s, weights.layout, device.stage) for s in self.shapes]
        # A batch's last rows may lie outside a smaller shape.
        device.parts.slots[0].whole.last_rows.zero_()
        self.dtype = weights.layers[0].qkv.weight.dtype

    def solo(self) -> dict[str, Any]:
        """Everything alone."""
        for shape in self.shapes:  # nothing is timed at its first use
            for name in self._names(lambda k: not k.is_communication):
                self._time(shape, name, self.partitions[0])
        gemms = [self._sheet(name, p) for name in self._names(lambda k: k.kind is Kind.GEMM) for p in self.partitions]
        others = [self._curve(name, p) for name in self._names(lambda k: k.kind in (Kind.ATTENTION, Kind.ELEMENTWISE))
                  for p in self.partitions]  # fmt: skip
        return {"gemms": gemms, "others": others, "comms": self._comms()}

    def _names(self, wanted: Callable[[Kernel], bool]) -> list[str]:
        return list(dict.fromkeys(kernel.name for kernel in self.vectors[0].kernels if wanted(kernel)))

    def _kernels(self, shape: BatchShape) -> tuple[Kernel, ...]:
        return self.vectors[self.shapes.index(shape)].kernels

    def _places(self, shape: BatchShape, name: str) -> list[int]:
        """Where kernels of that name are, one in every layer."""
        return [place for place, kernel in enumerate(self._kernels(shape)) if kernel.name == name]

    def _time(self, shape: BatchShape, name: str, withheld: int, part: Fragment | None = None) -> float:
        """One kernel; a different layer's every time, as in a run, so that its weights are not in a cache."""
        operations, places = self.device.bound(0, shape), self._places(shape, name)
        calls: list[Body] = []
        for number in range(self.watch.reps):
            operation = operations[places[number % len(places)]]
            assert not isinstance(operation, Collective)
            calls.append(operation if part is None else _cut(operation, part))
        return self.watch.alone_us(StreamKey(Lane.COMPUTE, withheld), calls)

    def _sheet(self, name: str, withheld: int) -> dict[str, Any]:
        """Durations by output features and rows. The head has as many rows as sequences: one shape of each will do."""
        kernel_of = {
            shape: next(k for k in v.kernels if k.name == name)
            for shape, v in zip(self.shapes, self.vectors, strict=True)
        }
        shapes = list({kernel.rows: shape for shape, kernel in kernel_of.items()}.values())
        rows, cols = [kernel_of[shape].rows for shape in shapes], kernel_of[shapes[0]].cols
        cuts = EIGHTHS if cols >= 8 else ()
        us = [[self._time(shape, name, withheld, Fragment("cols", 0, e, 8)) for shape in shapes] for e in cuts]
        whole = [self._time(shape, name, withheld) for shape in shapes]
        us.append(whole)
        # Fewer rows than any batch has: pieces of the smallest batch, of whole width; other widths in proportion.
        few = (1, 2, 4) if rows[0] >= 8 else ()
        pieces = [self._time(shapes[0], name, withheld, Fragment("rows", 0, e, 8)) for e in few]
        us = [[piece * row[0] / whole[0] for piece in pieces] + row for row in us]
        return {
            "name": name, "withheld": withheld, "us": us,
            "cols": [cols * e // 8 for e in cuts] + [cols],
            "rows": [rows[0] * e // 8 for e in few] + rows,
        }  # fmt: skip

    def _curve(self, name: str, withheld: int) -> dict[str, Any]:
        """Durations by bytes moved; of two shapes that move equally much the slower counts."""
        by_bytes: dict[float, float] = {}
        for shape, vector in zip(self.shapes, self.vectors, strict=True):
            moved = next(k for k in vector.kernels if k.name == name).bytes_moved
            by_bytes[moved] = max(by_bytes.get(moved, 0.0), self._time(shape, name, withheld))
        sizes = sorted(by_bytes)
        return {"name": name, "withheld": withheld, "bytes": sizes, "us": [by_bytes[size] for size in sizes]}

    # -- communication ----------------------------------------------------------------------------------------------

    def _comms(self) -> list[dict[str, Any]]:
        found: dict[Kind, set[int]] = {}
        for vector in self.vectors:
            for kernel in vector.kernels:
                if kernel.is_communication:
                    found.setdefault(kernel.kind, set()).add(kernel.message_bytes)
        rows = []
        for kind, sizes in sorted(found.items()):
            if kind is Kind.ALL_REDUCE:
                sizes |= {max(64, size // parts // 64 * 64) for size in tuple(sizes) for parts in (2, 4)}
            for ctas in self.ctas if kind is Kind.ALL_REDUCE else (0,):
                us = [
                    self.watch.alone_us(COMM, [self._collective(kind, size, ctas)] * self.watch.reps)
                    for size in sorted(sizes)
                ]
                rows.append({"kind": kind.value, "ctas": ctas, "bytes": sorted(sizes), "us": us})
        return rows

    def _collective(self, kind: Kind, message_bytes: int, ctas: int) -> Body:
        """A collective of this size on zeros; sizes are what the models say, two bytes an element."""
        groups, elements = self.device.parts.groups, message_bytes // 2
        place = self.device.parts.weights.layers[0].qkv.weight.device
        whole = torch.zeros(elements, dtype=self.dtype, device=place)
        part = whole if kind is Kind.ALL_REDUCE else whole[: elements // groups.layout.tp]
        collective = Collective(kind, part.clone(), "tp", None if kind is Kind.ALL_REDUCE else whole)
        groups.call(collective, None, ctas)
        return lambda: groups.call(collective, None, ctas)

    # -- side by side -----------------------------------------------------------------------------------------------

    def pairs(self, solo: dict[str, Any]) -> list[dict[str, Any]]:
        """Slowdowns of GEMMs and of an all-reduce beside each other, by rows, partition and CTAs."""
        if self.device.parts.lanes.can_capture is False or not solo["comms"]:
            return []  # threads of one host share its cores, which no table describes
        return [self._pair(name, solo, *regime) for name in PAIRED for regime in product(self.partitions, self.ctas)]

    def _pair(self, name: str, solo: dict[str, Any], withheld: int, ctas: int) -> dict[str, Any]:
        sheet = next(e for e in solo["gemms"] if e["name"] == name and e["withheld"] == withheld)
        comms = next(e for e in solo["comms"] if e["kind"] == Kind.ALL_REDUCE.value and e["ctas"] == ctas)
        gemm = next(k for k in self.vectors[0].kernels if k.name == name)
        entry: dict[str, Any] = {
            "kind": Kind.GEMM.value, "cols": gemm.cols, "inner": gemm.inner, "withheld": withheld, "ctas": ctas,
            "rows": [], "compute": [], "comm": [],
        }  # fmt: skip
        for shape in thinned(self.shapes, MAX_PAIR_SHAPES):
            size = next(k.message_bytes for k in self._kernels(shape) if k.kind is Kind.ALL_REDUCE)
            gemm_us = sheet["us"][-1][sheet["rows"].index(shape.rows)]
            comm_us = comms["us"][comms["bytes"].index(size)]
            slow = self._side_by_side(name, shape, (withheld, gemm_us), (ctas, size, comm_us))
            for key, value in (("rows", shape.rows), ("compute", slow[0]), ("comm", slow[1])):
                entry[key].append(value)
        return entry

    def _side_by_side(
        self, name: str, shape: BatchShape, gemm: tuple[int, float], comm: tuple[int, int, float]
    ) -> tuple[float, float]:
        withheld, gemm_us = gemm
        ctas, size, comm_us = comm
        operations, places = self.device.bound(0, shape), self._places(shape, name)
        calls = [operations[places[n % len(places)]] for n in range(max(2, math.ceil(PAIR_US / gemm_us)))]
        computes: list[Body] = [call for call in calls if not isinstance(call, Collective)]
        comms = [self._collective(Kind.ALL_REDUCE, size, ctas)] * max(2, math.ceil(PAIR_US / comm_us))
        key = StreamKey(Lane.COMPUTE, withheld)
        ends = self.watch.together_us((key, computes), (COMM, comms))
        return slowdowns(ends, (gemm_us * len(computes), comm_us * len(comms)))


def slowdowns(ends_us: tuple[float, float], alone_us: tuple[float, float]) -> tuple[float, float]:
    """Slowdowns while both ran, from when each ended and how long each takes alone; the later one ran alone at last."""
    both = min(ends_us)
    shares = [max(alone / MOST_SLOWDOWN, alone - (end - both)) for end, alone in zip(ends_us, alone_us, strict=True)]
    first, second = (min(MOST_SLOWDOWN, max(1.0, both / share)) for share in shares)
    return first, second


def _cut(operation: Callable[[Fragment | None], None], part: Fragment) -> Body:
    return lambda: operation(part)


def thinned(shapes: list[BatchShape], most: int) -> list[BatchShape]:
    """At most so many, the first and the last among them, evenly spaced."""
    if len(shapes) <= most:
        return shapes
    return [shapes[round(i * (len(shapes) - 1) / (most - 1))] for i in range(most)]
