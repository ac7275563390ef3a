"""Profiler traces: shapes from operators, collectives from all ranks, pairs from overlaps, and what cannot be told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from calibration.importers.found import Found, Request, repeats_of
from calibration.importers.kineto import read_kineto
from traces.chrome import write_chrome_trace
from traces.measurement import Measurement
from traces.timeline import Span, Timeline

Write = Callable[..., Path]
Event = dict[str, Any]
BF16 = "c10::BFloat16"


def operator(number: int, name: str, dims: list[Any], dtype: str = BF16) -> Event:
    args = {"External id": number, "Input Dims": dims, "Input type": [dtype] * len(dims)}
    return {"ph": "X", "cat": "cpu_op", "name": name, "pid": 7, "tid": 7, "ts": 0, "dur": 1, "args": args}


def kernel(number: int, start: float, us: float, name: str = "ampere_gemm_128x128", stream: int = 7) -> Event:
    args = {"External id": number, "device": 0, "stream": stream, "correlation": number}
    return {"ph": "X", "cat": "kernel", "name": name, "pid": 0, "tid": stream, "ts": start, "dur": us, "args": args}


def collective(start: float, us: float, nelems: int = 1024, name: str = "allreduce", **changes: Any) -> Event:
    event = kernel(0, start, us, "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)", 20)
    event["args"] |= {
        "Collective name": name, "In msg nelems": nelems, "Out msg nelems": nelems, "Group size": 2,
        "dtype": "BFloat16", "Process Group Name": "0", "Process Group Ranks": "[0, 1]", **changes,
    }  # fmt: skip
    return event


def trace(events: list[Event], rank: int = 0, size: int = 2) -> str:
    document = {
        "schemaVersion": 1,
        "deviceProperties": [{"id": 0, "name": "Toy GPU", "numSms": 48}],
        "distributedInfo": {"backend": "nccl", "rank": rank, "world_size": size, "nccl_version": "2.1"},
        "traceEvents": [{"ph": "M", "name": "process_name", "pid": 0, "args": {"name": "python"}}, *events],
    }
    return json.dumps(document, indent=1)


def read(*paths: Path, priority: int | None = None) -> Found:
    return read_kineto(paths, Request(priority=priority))


def rows(found: Found, what: str) -> list[Measurement]:
    return [row for row in repeats_of(found.samples) if row.what == what]


MM = operator(1, "aten::mm", [[64, 256], [256, 512]])


@pytest.mark.parametrize("name", ["t.json", "t.json.gz"])
def test_a_gemm_has_the_shape_of_its_operator(write: Write, name: str) -> None:
    again = operator(2, "aten::mm", [[64, 256], [256, 512]])
    found = read(write(name, trace([MM, again, kernel(1, 10.0, 5.0), kernel(2, 20.0, 7.0)])))
    (row,) = rows(found, "gemm")
    assert (row.at["rows"], row.at["cols"], row.at["inner"], row.at["withheld_sms"]) == (64, 512, 256, 0)
    assert (row.values["us"], row.spread["us"], row.repetitions) == (6.0, 1.0, 2)
    assert (found.about["gpu"], found.about["num_sms"], found.about["num_gpus"]) == ("Toy GPU", "48", "2")
    assert found.about["dtype"] == "bfloat16" and not found.left_out


@pytest.mark.parametrize(
    ("name", "dims", "shape"),
    [
        ("aten::addmm", [[512], [64, 256], [256, 512], [], []], (64, 512, 256)),
        ("aten::linear", [[2, 32, 256], [512, 256], [512]], (64, 512, 256)),
        ("aten::bmm", [[1, 64, 256], [1, 256, 512]], (64, 512, 256)),
    ],
)
def test_operators_that_are_gemms(write: Write, name: str, dims: list[Any], shape: tuple[int, int, int]) -> None:
    (row,) = rows(read(write("t.json", trace([operator(1, name, dims), kernel(1, 0.0, 5.0)]))), "gemm")
    assert (row.at["rows"], row.at["cols"], row.at["inner"]) == shape


def test_all_kernels_of_a_call_are_one_gemm_without_the_gap(write: Write) -> None:
    events = [MM, kernel(1, 10.0, 5.0), kernel(1, 17.0, 2.0, "splitKreduce_kernel")]
    (row,) = rows(read(write("t.json", trace(events))), "gemm")
    assert row.values["us"] == 7.0


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (operator(1, "aten::bmm", [[8, 64, 256], [8, 256, 512]]), "batched"),
        (operator(1, "aten::mm", []), "without recorded shapes"),
        (operator(1, "aten::mm", [[64, 256], [256, 512]], "float"), "element type float"),
        (operator(1, "aten::mm", [[64, 256], [255, 512]]), "do not fit"),
        (operator(1, "aten::add", [[64, 256], [64, 256]]), "no GEMM"),
        (operator(2, "aten::mm", [[64, 256], [256, 512]]), "no recorded operator"),
    ],
)
def test_what_no_shape_is_known_of_is_counted(write: Write, event: Event, reason: str) -> None:
    found = read(write("t.json", trace([event, kernel(1, 0.0, 5.0)])))
    assert not found.samples
    assert [count for text, count in found.left_out.items() if reason in text] == [1]


def test_a_collective_is_the_kernel_of_the_rank_that_came_last(write: Write) -> None:
    # Rank 1 comes 30 us late to the first call, rank 0 to the second.
    first = write("r0.json", trace([collective(100.0, 50.0), collective(500.0, 20.0)], 0))
    second = write("r1.json", trace([collective(9130.0, 20.0), collective(9500.0, 44.0)], 1))
    (row,) = rows(read(first, second), "collective")
    assert row.at == {"op": "all_reduce", "bytes": 2048, "num_ranks": 2, "ctas": 0}
    assert row.values["us"] == 20.0 and row.repetitions == 2


def test_an_all_gather_counts_what_is_gathered(write: Write) -> None:
    paths = [write(f"r{r}.json", trace([collective(0.0, 9.0, 512, "_allgather_base")], r)) for r in (0, 1)]
    (row,) = rows(read(*paths), "collective")
    assert row.at["op"] == "all_gather" and row.at["bytes"] == 2 * 512 * 2


def test_one_rank_alone_says_nothing_of_collectives(write: Write) -> None:
    found = read(write("r0.json", trace([MM, kernel(1, 0.0, 5.0), collective(100.0, 50.0)])))
    assert not rows(found, "collective") and len(rows(found, "gemm")) == 1
    assert any("all their ranks" in reason for reason in found.left_out)


def test_ranks_that_recorded_different_calls(write: Write) -> None:
    first = write("r0.json", trace([collective(0.0, 9.0), collective(20.0, 9.0)], 0))
    second = write("r1.json", trace([collective(0.0, 9.0)], 1))
    found = read(first, second)
    assert not found.samples and found.left_out == {"collectives of groups whose ranks recorded different calls": 3}


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (collective(0.0, 9.0, name="all_to_all"), "of all_to_all"),
        (collective(0.0, 9.0, dtype="Complex"), "not known"),
        (collective(0.0, 9.0, nelems=0), "not known"),
        (kernel(0, 0.0, 9.0, "ncclKernel_AllReduce_RING_LL_Sum_half"), "without a description"),
        (collective(0.0, 0.0), "shorter than"),
    ],
)
def test_communication_that_cannot_be_used(write: Write, event: Event, reason: str) -> None:
    found = read(write("t.json", trace([event])))
    assert not found.samples and [count for text, count in found.left_out.items() if reason in text] == [1]


# -- pairs ------------------------------------------------------------------------------------------------------------


def overlapping(write: Write, gemm_us: float = 8.0, comm_us: float = 32.0) -> list[Path]:
    """Alone a GEMM takes 5 us and the all-reduce 20; beside each other as stated."""
    paths = []
    for rank in (0, 1):
        events = [collective(100.0, 20.0), collective(200.0, comm_us)]
        events += [operator(i, "aten::mm", [[64, 256], [256, 512]]) for i in range(1, 6)]
        events += [kernel(1, 10.0, 5.0)]
        events += [kernel(2 + i, 200.0 + i * gemm_us, gemm_us) for i in range(4)]
        paths.append(write(f"r{rank}.json", trace(events, rank)))
    return paths


def test_gemms_beside_a_collective_give_slowdowns(write: Write) -> None:
    found = read(*overlapping(write), priority=1)
    (pair,) = rows(found, "pair")
    assert pair.values["compute_slowdown"] == pytest.approx(1.6)
    assert pair.values["comm_slowdown"] == pytest.approx(1.6)
    assert "start_delay_us" not in pair.values  # when the collective was ready to start is not in a trace
    assert (pair.at["priority"], pair.at["op"], pair.at["bytes"], pair.at["rows"]) == (1, "all_reduce", 2048, 64)
    assert pair.repetitions == 8
    (alone,) = rows(found, "gemm")
    (reduce,) = rows(found, "collective")
    assert (alone.values["us"], reduce.values["us"]) == (5.0, 20.0)  # what overlapped is in neither


def test_pairs_need_a_word_on_priority(write: Write) -> None:
    found = read(*overlapping(write))
    assert not rows(found, "pair")
    assert [count for reason, count in found.left_out.items() if "--priority" in reason] == [8]


def test_a_partly_covered_collective_is_no_pair(write: Write) -> None:
    found = read(*overlapping(write, gemm_us=8.0, comm_us=60.0), priority=0)  # the GEMMs cover 32 of 60 us
    assert not rows(found, "pair")


def test_overlap_on_one_rank_spoils_the_collective_alone(write: Write) -> None:
    first = write("r0.json", trace([collective(100.0, 20.0), MM, kernel(1, 110.0, 5.0)], 0))
    second = write("r1.json", trace([collective(100.0, 20.0)], 1))
    found = read(first, second, priority=0)
    assert not found.samples
    assert found.left_out == {"collectives beside other kernels": 1, "GEMMs beside other kernels": 1}


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r":1: the file is empty"),
        ('{"traceEvents": [\n1,\n}', r":3: not JSON"),
        ('{"schemaVersion": 1}', r":1: not a Chrome trace"),
        ('{"traceEvents": []}', r":1: none of the 0 events is a kernel"),
        ('{"traceEvents": [{"ph": "X", "cat": "kernel", "name": "k", "ts": 1}]}', r":1: dur of the kernel 'k' is None"),
        ('{"traceEvents": [{"ph": "X", "cat": "kernel", "name": "k", "ts": "now", "dur": 1}]}', r":1: ts of .* 'now'"),
    ],
)
def test_broken_traces(write: Write, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"t\.json" + message) as caught:
        read(write("t.json", text))
    assert "\n" not in str(caught.value)


def test_damaged_gzip_and_repeated_ranks(write: Write, tmp_path: Path) -> None:
    whole = write("t.json.gz", trace([MM, kernel(1, 0.0, 5.0)])).read_bytes()
    (tmp_path / "cut.json.gz").write_bytes(whole[:-40])
    with pytest.raises(ValueError, match=r"cut\.json\.gz:1: the gzip data is cut off or damaged"):
        read(tmp_path / "cut.json.gz")
    with pytest.raises(ValueError, match=r"again\.json:1: rank 0 is in another of the files too"):
        read(tmp_path / "t.json.gz", write("again.json", trace([kernel(1, 0.0, 5.0)])))


def test_our_own_timelines_are_traces_without_operators(tmp_path: Path) -> None:
    span = Span(0, "compute", "qkv_proj", False, 0.0, 5.0, 0, 0, 0)
    (path,) = write_chrome_trace(Timeline(1, spans=[span]), tmp_path / "t.json")
    found = read(path)
    assert not found.samples and sum(found.left_out.values()) == 1


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"numSms": 48', '"numSms": "many"', r"t.json:1: numSms is 'many'; expected a whole number, 1 or more"),
        ('"numSms": 48', '"numSms": 4.5', r"t.json:1: numSms is '4.5'"),
        ('"world_size": 2', '"world_size": "x"', r"t.json:1: world_size is 'x'"),
        ('"world_size": 2', '"world_size": -2', r"t.json:1: world_size is '-2'"),
        ('"world_size": 2', '"world_size": true', r"t.json:1: world_size is 'True'"),
    ],
)
def test_counts_that_are_none_are_named(write: Write, old: str, new: str, words: str) -> None:
    path = write("t.json", trace([MM, kernel(1, 10.0, 5.0)]).replace(old, new))
    with pytest.raises(ValueError, match=words):
        read(path)


def test_counts_that_a_trace_leaves_out_are_not_known(write: Write) -> None:
    text = (
        trace([MM, kernel(1, 10.0, 5.0)]).replace('"numSms": 48', '"numSms": null').replace('"world_size": 2', '"w": 2')
    )
    found = read(write("t.json", text))
    assert "num_sms" not in found.about and "num_gpus" not in found.about
