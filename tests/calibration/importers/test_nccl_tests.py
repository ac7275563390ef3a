"""Output of nccl-tests, as old and new versions print it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from calibration.importers.found import Found, Request, repeats_of
from calibration.importers.nccl_tests import read_nccl_tests

Write = Callable[..., Path]


def ranks(count: int, host: str = "toyhost") -> str:
    lines = [
        f"#  Rank {i:2} Group  0 Pid  {900 + i} on {host} device {i:2} [0000:{i:02}:00] Toy GPU 9" for i in range(count)
    ]
    return "# Using devices\n" + "\n".join(lines) + "\n#\n"


PARAMETERS = (
    "# nThread 1 nGpus 4 minBytes 0 maxBytes 64 step: 2(factor) warmup iters: 5 iters: 20 agg iters: 1 graph: 0\n"
)
COLUMNS = """#                                                       out-of-place                       in-place
#       size         count      type   redop    root     time   algbw   busbw #wrong     time   algbw   busbw #wrong
#        (B)    (elements)                               (us)  (GB/s)  (GB/s)            (us)  (GB/s)  (GB/s)
"""
REDUCE = """\
           0             0      half     sum      -1     6.10    0.00    0.00      0     6.00    0.00    0.00      0
        4096          2048      half     sum      -1    12.50    0.33    0.49      0    99.00    0.04    0.06      0
    67108864      33554432      half     sum      -1   1000.0   67.11  100.66      0    999.0   67.18  100.77      0
"""
END = "# Out of bounds values : 0 OK\n# Avg bus bandwidth    : 12.3\n# Collective test concluded: all_reduce_perf\n"
NEW = "# nccl-tests version 2.17.1 nccl-headers=22707 nccl-library=22707\n# Collective test starting: all_reduce_perf\n"
NEW += PARAMETERS + "#\n" + ranks(4) + COLUMNS + REDUCE + END
OLD = (
    PARAMETERS + "#\n" + ranks(4) + COLUMNS + REDUCE + END.replace("# Collective test concluded: all_reduce_perf\n", "")
)


def read(*paths: Path, op: str = "") -> Found:
    return read_nccl_tests(paths, Request(op=op))


@pytest.mark.parametrize("name", ["log.txt", "log.txt.gz"])
def test_out_of_place_times(write: Write, name: str) -> None:
    found = read(write(name, NEW))
    small, large = repeats_of(found.samples)
    assert small.at == {"op": "all_reduce", "bytes": 4096, "num_ranks": 4, "ctas": 0}
    assert (small.values, small.repetitions) == ({"us": 12.5}, 20)
    assert large.values == {"us": 1000.0}
    assert found.left_out == {"messages of 0 bytes": 1}
    assert (found.about["gpu"], found.about["nccl"], found.about["dtype"]) == ("Toy GPU 9", "2.27.7", "half")


def test_an_old_version_does_not_name_the_operation(write: Write) -> None:
    path = write("log.txt", OLD)
    with pytest.raises(ValueError, match=r"log\.txt:12: the file does not name the operation; give --op all_reduce"):
        read(path)
    assert repeats_of(read(path, op="all_reduce").samples)[0].at["op"] == "all_reduce"
    quoted = "$ ./build/all_reduce_perf -b 0 -e 64M -f 2 -g 4\n"
    assert repeats_of(read(write("quoted.txt", quoted + OLD)).samples)[0].at["op"] == "all_reduce"


def test_bus_bandwidth_gives_a_wrong_operation_away(write: Write) -> None:
    with pytest.raises(ValueError, match=r"log\.txt:14: busbw is 1\.50 times algbw, but all_gather among 4 .* 0\.75"):
        read(write("log.txt", OLD), op="all_gather")


def test_several_runs_in_one_file(write: Write) -> None:
    gather = NEW.replace("all_reduce_perf", "all_gather_perf").replace("100.66", " 50.33").replace("  sum", " none")
    again = NEW.replace("1000.0   67.11", "1010.0   66.44").replace("100.66", " 99.66")
    found = read(write("log.txt", NEW + gather + again))
    rows = {(row.at["op"], row.at["bytes"]): row for row in repeats_of(found.samples)}
    assert len(rows) == 4
    assert rows["all_reduce", 67108864].values["us"] == 1005.0  # two runs of one size: their median
    assert rows["all_reduce", 67108864].repetitions == 40
    quoted = "$ all_reduce_perf -g 4\n" + OLD + "$ all_gather_perf -g 4\n" + OLD.replace("100.66", " 50.33")
    assert {s.at["op"] for s in read(write("old.txt", quoted)).samples} == {"all_reduce", "all_gather"}


def test_a_send_is_between_two_ranks(write: Write) -> None:
    text = NEW.replace("all_reduce_perf", "sendrecv_perf").replace("100.66", " 67.11")
    found = read(write("log.txt", text))
    assert {(s.at["op"], s.at["num_ranks"]) for s in found.samples} == {("send", 2)}


def test_operations_that_no_layer_uses(write: Write) -> None:
    found = read(write("log.txt", NEW.replace("all_reduce_perf", "alltoall_perf")))
    assert not found.samples and sum(found.left_out.values()) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("12.50", "N/A"), r":15: time is 'N/A'; expected a number"),
        (("12.50", "0.00"), r":15: time is '0\.00'; expected microseconds above 0"),
        (("0.49      0", "0.49      7"), r":15: 7 wrong results"),
        (("busbw", "speed"), r":12: the header has no columns time and busbw"),
        (
            ("     half     sum      -1    12.50    0.33    0.49      0    99.00    0.04    0.06      0", ""),
            r":15: the line has 2 columns",
        ),
        (("on toyhost device  3", "on elsewhere device  3"), r":9: the ranks are on several hosts \(elsewhere too\)"),
        (("Toy GPU 9\n#  Rank  1", "Other GPU\n#  Rank  1"), r":7: gpu is 'Toy GPU 9', but 'Other GPU' before"),
    ],
)
def test_broken_output(write: Write, change: tuple[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=r"log\.txt" + message) as caught:
        read(write("log.txt", NEW.replace(*change)))
    assert "\n" not in str(caught.value)


def test_files_without_results(write: Write) -> None:
    with pytest.raises(ValueError, match=r"log\.txt:1: no line of results"):
        read(write("log.txt", "all is well\n"))
    with pytest.raises(ValueError, match=r"empty\.txt:1: no line of results"):
        read(write("empty.txt", ""))
    with pytest.raises(ValueError, match=r"log\.txt:\d+: 0 ranks are listed above this line"):
        read(write("log.txt", NEW.replace("#  Rank", "#  Member")))
    with pytest.raises(ValueError, match="--op 'gossip' is not one of all_reduce"):
        read(write("log.txt", OLD), op="gossip")
