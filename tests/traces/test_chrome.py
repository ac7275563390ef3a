"""Chrome traces are what HTA reads, and overlap is what a brute-force count of microseconds finds."""

from __future__ import annotations

import gzip
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from traces.chrome import Overlap, overlap_of, write_chrome_trace
from traces.timeline import Span, Timeline

COMPUTE = Span(0, "compute", "qkv_proj", False, 0.0, 200.0, 0, 0, 0)
COMMUNICATION = Span(0, "communication", "attn_all_reduce", True, 50.0, 250.0, 1, 0, 0)


def two_ranks() -> Timeline:
    """Per rank 200 us of compute and 200 us of communication, 150 us of it shared: 75 % overlap."""
    spans = [replace(span, rank=rank) for rank in (0, 1) for span in (COMPUTE, COMMUNICATION)]
    return Timeline(2, spans=spans)


def load(path: Path) -> dict[str, Any]:
    """The JSON of a Chrome trace."""
    content = path.read_bytes()
    document: dict[str, Any] = json.loads(gzip.decompress(content) if path.suffix == ".gz" else content)
    return document


spans_of_two_ranks = st.lists(
    st.builds(
        lambda rank, communication, start, length: Span(
            rank, "x", "k", communication, float(start), float(start + length), 0, 0, 0
        ),
        st.integers(0, 1),
        st.booleans(),
        st.integers(0, 40),
        st.integers(0, 25),
    ),
    max_size=12,
)


@settings(derandomize=True, deadline=None)
@given(spans_of_two_ranks)
def test_overlap_equals_a_count_of_microseconds(spans: list[Span]) -> None:
    compute = communication = both = 0
    for rank in (0, 1):
        for tick in range(70):
            here = {s.is_communication for s in spans if s.rank == rank and s.start_us <= tick < s.end_us}
            compute += False in here
            communication += True in here
            both += len(here) == 2
    assert overlap_of(spans) == Overlap(compute, communication, both)


def test_each_rank_has_a_file_that_hta_can_tell_apart(tmp_path: Path) -> None:
    written = write_chrome_trace(two_ranks(), tmp_path / "run.trace.json.gz")
    assert [path.name for path in written] == ["run.rank0.trace.json.gz", "run.rank1.trace.json.gz"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [path.name for path in written]
    for rank, path in enumerate(written):
        document = load(path)
        assert document["distributedInfo"]["rank"] == rank
        # HTA looks for the rank in the text, with a space; without it every file counts as rank 0.
        assert re.findall(r'"rank":\s+(\d+)', gzip.decompress(path.read_bytes()).decode()) == [str(rank)]
        kernels = [event for event in document["traceEvents"] if event["ph"] == "X"]
        assert all(event["cat"] == "kernel" and isinstance(event["args"]["stream"], int) for event in kernels)
        assert {event["pid"] for event in kernels} == {rank}
        # HTA's own rule: communication is what matches this pattern.
        shown = [
            Span(rank, "x", e["name"], bool(re.match("nccl.*Kernel", e["name"])), e["ts"], e["ts"] + e["dur"], 0, 0, 0)
            for e in kernels
        ]
        assert overlap_of(shown) == Overlap(200.0, 200.0, 150.0)
        labels = {event["name"]: event["args"]["name"] for event in document["traceEvents"] if event["ph"] == "M"}
        assert labels["process_name"] == f"rank {rank}"
        assert "(compute)" in labels["thread_name"]


@pytest.mark.parametrize(
    ("name", "communicates", "shown"),
    [
        ("ffn_all_reduce", True, "ncclDevKernel_AllReduce_Sum_f16_RING_LL"),
        ("logits_gather", True, "ncclDevKernel_AllGather_RING_LL"),
        ("send_hidden", True, "ncclDevKernel_SendRecv"),
        ("recv_residual", True, "ncclDevKernel_SendRecv"),
        ("mystery", True, "ncclDevKernel_Generic"),
        ("qkv_proj", False, "qkv_proj"),
        ("ncclKernel_lookalike", False, "compute_ncclKernel_lookalike"),
        ("Memcpy DtoD", False, "compute_Memcpy DtoD"),
        ("hostSyncPoint", False, "hostsyncPoint"),
    ],
)
def test_kernel_names_decide_the_type_and_the_own_name_is_kept(
    tmp_path: Path, name: str, communicates: bool, shown: str
) -> None:
    span = replace(COMPUTE, name=name, is_communication=communicates)
    (path,) = write_chrome_trace(Timeline(1, spans=[span]), tmp_path / "one.json")
    assert path == tmp_path / "one.json"
    (kernel,) = [event for event in load(path)["traceEvents"] if event["ph"] == "X"]
    assert kernel["name"] == shown
    assert kernel["args"]["kernel"] == name


def test_arrows_follow_a_batch_from_stream_to_stream(tmp_path: Path) -> None:
    after = replace(COMMUNICATION, batch_id=0, kernel_index=1, start_us=200.0)
    (path,) = write_chrome_trace(Timeline(1, spans=[after, COMPUTE]), tmp_path / "one.json")
    start, finish = (event for event in load(path)["traceEvents"] if event["ph"] in "sf")
    assert (start["ph"], start["ts"], finish["ph"], finish["ts"]) == ("s", 0.0, "f", 200.0)
    assert start["id"] == finish["id"]
    assert start["tid"] != finish["tid"]


def test_same_timeline_same_bytes_whatever_the_name(tmp_path: Path) -> None:
    timeline = Timeline(1, spans=[COMPUTE, COMMUNICATION])
    backwards = Timeline(1, spans=[COMMUNICATION, COMPUTE])
    (first,) = write_chrome_trace(timeline, tmp_path / "a.json.gz")
    (second,) = write_chrome_trace(backwards, tmp_path / "b.trace.json.gz")
    assert first.read_bytes() == second.read_bytes()
    assert first.read_bytes()[4:8] == b"\0\0\0\0"  # the time in the gzip header


def test_nothing_is_written_for_a_bad_name_or_an_empty_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"run.html: a timeline file must be named"):
        write_chrome_trace(two_ranks(), tmp_path / "run.html")
    with pytest.raises(ValueError, match="kept no spans"):
        write_chrome_trace(Timeline(1), tmp_path / "run.json")
    broken = Timeline(1, spans=[replace(COMPUTE, end_us=float("nan"))])
    with pytest.raises(ValueError, match="JSON"):
        write_chrome_trace(broken, tmp_path / "run.json")
    assert not list(tmp_path.iterdir())
