"""Timelines as Chrome traces in the shape of PyTorch's Kineto, for Perfetto and Holistic Trace Analysis (HTA).

HTA tells communication from computation by kernel name alone and wants one file per rank, so communication is
written under NCCL's device-kernel names; the name that weft uses is in `args.kernel`.
"""

from __future__ import annotations

import gzip
import io
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from traces.files import write_whole
from traces.timeline import Span, Timeline

SUFFIXES = (".trace.json.gz", ".trace.json", ".json.gz", ".json")

# The first word found in a span's name decides; NCCL has no all-to-all kernel, it is made of sends and receives.
NCCL_NAMES = {
    "all_reduce": "ncclDevKernel_AllReduce_Sum_f16_RING_LL",
    "reduce_scatter": "ncclDevKernel_ReduceScatter_Sum_f16_RING_LL",
    "gather": "ncclDevKernel_AllGather_RING_LL",
    "broadcast": "ncclDevKernel_Broadcast_RING_LL",
    "all_to_all": "ncclDevKernel_SendRecv",
    "send": "ncclDevKernel_SendRecv",
    "recv": "ncclDevKernel_SendRecv",
}
OTHER_NCCL_NAME = "ncclDevKernel_Generic"


@dataclass(frozen=True, slots=True)
class Overlap:
    """Microseconds summed over ranks: with a compute kernel running, with a communication kernel, with both."""

    compute_us: float
    communication_us: float
    overlap_us: float


def overlap_of(spans: Iterable[Span]) -> Overlap:
    """Busy and overlapped time of spans: per rank the length of the union of intervals, then summed."""
    by_rank: dict[int, list[Span]] = {}
    for span in spans:
        by_rank.setdefault(span.rank, []).append(span)
    compute = communication = either = 0.0
    for rank in sorted(by_rank):
        edges = np.array([(span.start_us, span.end_us) for span in by_rank[rank]], dtype=np.float64)
        is_communication = np.array([span.is_communication for span in by_rank[rank]])
        compute += _union_us(edges[~is_communication])
        communication += _union_us(edges[is_communication])
        either += _union_us(edges)
    return Overlap(compute, communication, max(0.0, compute + communication - either))


def _union_us(edges: NDArray[np.float64]) -> float:
    """Length of the union of intervals [start, end): each adds what reaches beyond all that started before it."""
    if not len(edges):
        return 0.0
    starts, ends = edges[np.argsort(edges[:, 0], kind="stable")].T
    reach = np.maximum.accumulate(ends)
    covered = np.concatenate(([starts[0]], reach[:-1]))
    return float(np.maximum(reach - np.maximum(starts, covered), 0.0).sum())


def write_chrome_trace(timeline: Timeline, path: Path | str) -> list[Path]:
    """Write the spans as Chrome trace JSON and return the files; gzip where the name ends in .gz.

    One rank is written to `path`; several to one file each, `name.rank0.trace.json.gz` for `name.trace.json.gz`.
    The same timeline gives the same bytes.
    """
    path = Path(path)
    suffix = next((known for known in SUFFIXES if path.name.endswith(known) and path.name != known), None)
    if suffix is None:
        raise ValueError(f"{path}: a timeline file must be named *.json or *.json.gz")
    if not timeline.spans:
        raise ValueError(f"{path}: the run kept no spans, so there is no timeline to write")
    streams = {lane: stream for stream, lane in enumerate(sorted({span.lane for span in timeline.spans}))}
    written = []
    for rank in range(timeline.num_ranks):
        name = path.name.removesuffix(suffix) + f".rank{rank}" + suffix
        target = path if timeline.num_ranks == 1 else path.with_name(name)
        spans = [span for span in timeline.spans if span.rank == rank]
        document = _document(spans, streams, rank, timeline.num_ranks)
        # HTA finds a file's rank by a text search for `"rank": 0`, with the space.
        text = json.dumps(document, separators=(",", ": "), allow_nan=False).encode()
        write_whole(target, _gzip(text) if suffix.endswith(".gz") else text)
        written.append(target)
    return written


def _gzip(content: bytes) -> bytes:
    """Compress without the time and file name that the gzip header otherwise carries."""
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", fileobj=buffer, mtime=0) as stream:
        stream.write(content)
    return buffer.getvalue()


def _document(spans: list[Span], streams: dict[str, int], rank: int, num_ranks: int) -> dict[str, Any]:
    ordered = sorted(spans, key=lambda span: (span.start_us, streams[span.lane], span.batch_id, span.kernel_index))
    events = list(_names(streams, rank))
    events += [_kernel_event(span, streams[span.lane]) for span in ordered]
    events += _batch_arrows(ordered, streams)
    return {
        "schemaVersion": 1,
        "distributedInfo": {"backend": "nccl", "rank": rank, "world_size": num_ranks},
        "displayTimeUnit": "ms",
        "traceEvents": events,
    }


def _names(streams: dict[str, int], rank: int) -> Iterator[dict[str, Any]]:
    yield {"ph": "M", "name": "process_name", "pid": rank, "tid": 0, "ts": 0, "args": {"name": f"rank {rank}"}}
    for lane, stream in streams.items():
        label = f"stream {stream} ({lane})"
        yield {"ph": "M", "name": "thread_name", "pid": rank, "tid": stream, "ts": 0, "args": {"name": label}}


def _kernel_event(span: Span, stream: int) -> dict[str, Any]:
    return {
        "ph": "X",
        "cat": "kernel",
        "name": kernel_name(span),
        "pid": span.rank,
        "tid": stream,
        "ts": span.start_us,
        "dur": span.end_us - span.start_us,
        "args": {
            "stream": stream,
            "device": span.rank,
            "kernel": span.name,
            "batch": span.batch_id,
            "kernel index": span.kernel_index,
            "round": span.round_id,
        },
    }


def kernel_name(span: Span) -> str:
    """The name to show: NCCL's for communication; for computation the span's own, kept clear of HTA's patterns."""
    if span.is_communication:
        return next((nccl for word, nccl in NCCL_NAMES.items() if word in span.name), OTHER_NCCL_NAME)
    name = span.name.replace("Sync", "sync")
    return f"compute_{name}" if re.match("nccl|Memcpy|Memset|dma", name) else name


def _batch_arrows(ordered: list[Span], streams: dict[str, int]) -> Iterator[dict[str, Any]]:
    """Arrows from kernel to kernel of a batch where it changes streams, the order that a viewer cannot guess."""
    by_batch: dict[int, list[Span]] = {}
    for span in ordered:
        by_batch.setdefault(span.batch_id, []).append(span)
    number = 0
    for batch in sorted(by_batch):
        for before, after in pairwise(by_batch[batch]):
            if before.lane == after.lane:
                continue
            common = {"cat": "batch", "name": f"batch {batch}", "id": number, "pid": before.rank}
            yield {"ph": "s", "tid": streams[before.lane], "ts": before.start_us, **common}
            yield {"ph": "f", "bp": "e", "tid": streams[after.lane], "ts": after.start_us, **common}
            number += 1
