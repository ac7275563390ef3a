"""A recorded run's timeline, read back from its Chrome trace, and the same stretch of the simulated one beside it."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibration.validate_serving import Served, simulate
from sim.simulate import Fidelity
from sim.spec import NodeSpec
from traces.chrome import NCCL_NAMES, OTHER_NCCL_NAME
from traces.files import GZIP_MAGIC
from traces.timeline import Span

_COMMUNICATION = frozenset({*NCCL_NAMES.values(), OTHER_NCCL_NAME})
_LANE = re.compile(r"stream \d+ \((\w+)\)")


@dataclass(frozen=True, slots=True)
class Stretch:
    """Two timelines of one rank that begin with the same batch. Spans are in microseconds from its first kernel."""

    label: str
    batch_id: int
    measured: tuple[Span, ...]
    simulated: tuple[Span, ...]

    @property
    def length_us(self) -> float:
        """Until the batch has ended in both."""
        return max(s.end_us for part in (self.measured, self.simulated) for s in part if s.batch_id == self.batch_id)


def read_spans(path: Path) -> list[Span]:
    """The spans of a Chrome trace of `weft run --timeline`, one rank. Raises ValueError for anything else."""
    content = path.read_bytes()
    try:
        raw = json.loads(gzip.decompress(content) if content.startswith(GZIP_MAGIC) else content)
    except (ValueError, OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a Chrome trace ({error})") from None
    try:
        events = raw["traceEvents"]
        lanes = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == "thread_name"}
        spans = [_span(event, lanes) for event in events if event["ph"] == "X"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a timeline of weft run (an event lacks {error})") from None
    if not spans:
        raise ValueError(f"{path}: the timeline has no spans")
    return spans


def _span(event: dict[str, Any], lanes: dict[int, str]) -> Span:
    about, start = event["args"], float(event["ts"])
    lane = _LANE.fullmatch(lanes[event["tid"]])
    return Span(
        int(event["pid"]), lane[1] if lane else str(event["tid"]), str(about["kernel"]),
        event["name"] in _COMMUNICATION, start, start + float(event["dur"]), int(about["batch"]),
        int(about["kernel index"]), int(about["round"]),
    )  # fmt: skip


def stretch_of(node: NodeSpec, served: Served, spans: Sequence[Span]) -> Stretch:
    """The run's admissions on the simulated node, and both timelines from the middle batch of the run on.

    Raises ValueError if the spans are of another run.
    """
    rank = min(span.rank for span in spans)
    if rank:
        raise ValueError(f"{served.name}: the timeline is of rank {rank}; give the file of rank 0")
    batches = {span.batch_id for span in spans}
    if len(batches) != sum(len(entry.batches) for entry in served.saved.admission_log):
        raise ValueError(f"{served.name}: the timeline is of another run: it has {len(batches)} batches")
    _, timeline = simulate(node, served, "admissions", Fidelity(record=True))
    middle = sorted(batches)[len(batches) // 2]
    simulated = [span for span in timeline.spans if span.rank == 0]
    return Stretch(served.label, middle, _from_batch(spans, middle), _from_batch(simulated, middle))


def _from_batch(spans: Sequence[Span], batch_id: int) -> tuple[Span, ...]:
    """Everything that runs while the batch does, with times from its first kernel's start."""
    own = [span for span in spans if span.batch_id == batch_id]
    start, end = min(span.start_us for span in own), max(span.end_us for span in own)
    return tuple(
        Span(s.rank, s.lane, s.name, s.is_communication, s.start_us - start, s.end_us - start, s.batch_id,
             s.kernel_index, s.round_id)
        for s in spans if s.end_us > start and s.start_us < end
    )  # fmt: skip
