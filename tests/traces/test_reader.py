"""Reading traces: the four formats, and a clear line for everything that can be wrong with a file."""

from __future__ import annotations

import gzip
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest

from traces.reader import read_trace
from traces.trace import Trace

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 23:59:59.9999999,374,44
2023-11-17 00:00:00.0000001,396,109
2023-11-17 00:00:01,879,55
"""
BURSTGPT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,ChatGPT,0,0,0,Conversation log
118.5,GPT-4,1087,230,1317,API log
"""
MOONCAKE = """{"timestamp": 3000, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1]}
{"timestamp": 3000, "input_length": 7322, "output_length": 490, "hash_ids": [0]}
{"timestamp": 6001, "input_length": 10, "output_length": 1}
"""
VIDUR = "arrived_at,num_prefill_tokens,num_decode_tokens\n1.5,10,2\n2.0,20,3\n"
ROW = "2023-11-16 18:15:46.68,1,1"


def write(folder: Path, content: str | bytes, name: str = "t.csv") -> Path:
    """A trace file with this content."""
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def columns(trace: Trace) -> list[tuple[float, int, int]]:
    """Arrival, prompt and output of every request."""
    return [(r.arrival_us, r.num_prompt_tokens, r.num_output_tokens) for r in trace.requests]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("azure", AZURE, [(0.0, 374, 44), (0.2, 396, 109), (1_000_000.1, 879, 55)]),
        ("burstgpt", BURSTGPT, [(0.0, 472, 18), (113_500_000.0, 1087, 230)]),
        ("mooncake", MOONCAKE, [(0.0, 6758, 500), (0.0, 7322, 490), (3_001_000.0, 10, 1)]),
        ("csv", VIDUR, [(0.0, 10, 2), (500_000.0, 20, 3)]),
    ],
)
def test_formats_are_read_and_detected(
    tmp_path: Path, name: str, content: str, expected: list[tuple[float, int, int]]
) -> None:
    file = write(tmp_path, content)
    trace = read_trace(file, name)
    assert columns(trace) == expected
    assert trace.num_dropped == (1 if name == "burstgpt" else 0)
    assert [request.request_id for request in trace.requests] == list(range(len(expected)))
    assert read_trace(file) == trace
    packed = write(tmp_path, gzip.compress(content.encode()), "t.csv")
    assert read_trace(packed) == trace
    windows = write(tmp_path, b"\xef\xbb\xbf" + content.replace("\n", "\r\n").encode() + b"\r\n", "t.csv")
    assert read_trace(windows) == trace


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("0.5,7\n1.5,8\n", [(0.0, 7, 0), (1_000_000.0, 8, 0)]),
        ("0,7,3\n1e-3,8,4\n", [(0.0, 7, 3), (1000.0, 8, 4)]),
        ("arrival_s,prompt_tokens\n2,7\n", [(0.0, 7, 0)]),
        ('"Timestamp", input_tokens, note, output_len\n2,7,"a, b",1\n', [(0.0, 7, 1)]),
    ],
)
def test_plain_csv_with_and_without_names(tmp_path: Path, content: str, expected: list[tuple[float, int, int]]) -> None:
    assert columns(read_trace(write(tmp_path, content))) == expected


def test_azure_times_with_zone_and_without_fraction(tmp_path: Path) -> None:
    header = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    rows = "2024-05-10 00:00:00+00:00,1,1\n2024-05-10 01:00:00.009930+01:00,1,1\n2024-05-10T00:00:01Z,1,1\n"
    assert [row[0] for row in columns(read_trace(write(tmp_path, header + rows)))] == [0.0, 9930.0, 1_000_000.0]


def test_mooncake_spread_is_seeded_and_keeps_order_inside_each_step(tmp_path: Path) -> None:
    lines = [{"timestamp": 3000 * (i // 50), "input_length": i + 1, "output_length": 1} for i in range(200)]
    file = write(tmp_path, "\n".join(map(json.dumps, lines)))
    spread = read_trace(file, spread_rng=np.random.default_rng(3))
    assert spread == read_trace(file, spread_rng=np.random.default_rng(3))
    assert spread != read_trace(file, spread_rng=np.random.default_rng(4))
    assert [r.num_prompt_tokens for r in spread.requests] == list(range(1, 201))
    arrivals = spread.arrivals_us()
    assert len(np.unique(arrivals)) == 200
    # Each step of 3 s keeps its 50 requests; the first arrival moved to 0, by less than one step.
    starts = arrivals.reshape(4, 50)
    assert np.all(starts[1:, 0] > starts[:-1, -1])
    assert np.all(np.abs(starts.mean(axis=1) - np.arange(4) * 3e6 - 1.5e6) < 0.5e6)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("auto", "", ":1: the file is empty"),
        ("auto", "\n \n", ":1: the file is empty"),
        ("auto", "a,b,c\n1,2,3\n", ":1: cannot tell the format from the first line"),
        ("azure", BURSTGPT, ":1: azure needs the columns timestamp, contexttokens, generatedtokens; found"),
        ("csv", "arrival_s,tokens\n", r":1: csv needs the columns arrival_s\|"),
        ("azure", "TIMESTAMP,ContextTokens,GeneratedTokens\n", ":1: no requests in the file"),
        ("azure", AZURE + "2023-11-16 18:15:46.68,1\n", ":5: the row has 2 columns where the first row has 3"),
        ("azure", AZURE + "yesterday,1,1\n", ":5: time 'yesterday' is not a date"),
        ("azure", AZURE + "2023-13-16 18:15:46,1,1\n", ":5: "),
        ("azure", AZURE + ROW + "\n", ":5: this request comes .* s before the one above it; sort"),
        ("azure", AZURE + "2023-11-18 00:00:00,1.5,1\n", ":5: '1.5' is not a whole number"),
        ("azure", AZURE + "2023-11-18 00:00:00,-1,1\n", ":5: '-1' is not a whole number"),
        ("azure", AZURE + "2023-11-18 00:00:00,0,1\n", ":5: the request has 0 prompt tokens"),
        ("azure", AZURE + "2023-11-18 00:00:00,99999999999,1\n", ":5: '99999999999' is not a whole number"),
        ("azure", AZURE + "2023-11-18 00:00:00,1,\n", ":5: '' is not a whole number"),
        ("burstgpt", BURSTGPT + "9,ChatGPT,0,5,5,x\n", ":5: this request comes 109.5 s before"),
        ("burstgpt", BURSTGPT + "119,ChatGPT,0,5,5,x\n", ":5: the request has 0 prompt tokens"),
        ("burstgpt", BURSTGPT.splitlines()[0] + "\n1,m,5,0,5,x\n", r":2: no requests in the file \(1 failed"),
        ("csv", VIDUR + "-1,5,5\n", ":4: time -1 is negative"),
        ("csv", VIDUR + "nan,5,5\n", ":4: time 'nan' is not a number of seconds"),
        ("csv", VIDUR + "1e400,5,5\n", ":4: time '1e400' is not a number of seconds"),
        ("csv", VIDUR + "1_0,5,5\n", ":4: time '1_0' is not a number of seconds"),
        ("csv", VIDUR + "\n\n1.9,5,5\n", ":6: this request comes 0.1 s before"),
        ("csv", VIDUR + '3,"5,5\n', ":4: not a CSV row"),
        ("mooncake", MOONCAKE + "{broken\n", ":4: not one JSON object"),
        ("mooncake", MOONCAKE + '{"timestamp": ' + 5000 * "9" + "}\n", ":4: Exceeds the limit"),
        ("mooncake", MOONCAKE + "[1]\n", ":4: not one JSON object"),
        ("mooncake", MOONCAKE + "[" * 100_000, ":4: not one JSON object"),
        ("mooncake", MOONCAKE + '{"timestamp": 7000, "input_length": 3}', ":4: output_length is missing"),
        ("mooncake", '{"timestamp": -1, "input_length": 3, "output_length": 1}', ":1: timestamp -1 is negative"),
        ("mooncake", '{"timestamp": "1", "input_length": 3, "output_length": 1}', ":1: timestamp '1' is not"),
        ("mooncake", '{"timestamp": NaN, "input_length": 3, "output_length": 1}', ":1: timestamp 'nan' is not"),
        ("mooncake", '{"timestamp": 1, "input_length": true, "output_length": 1}', ":1: 'True' is not a whole"),
        ("mooncake", '{"timestamp": 1, "input_length": 0, "output_length": 1}', ":1: the request has 0 prompt"),
        ("mooncake", MOONCAKE + '{"timestamp": 1, "input_length": 3, "output_length": 1}', ":4: this request comes 6"),
    ],
)
def test_broken_files_name_the_line(tmp_path: Path, name: str, content: str, words: str) -> None:
    with pytest.raises(ValueError, match=f"t.csv{words}") as caught:
        read_trace(write(tmp_path, content), name)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_not_text_name_the_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"t.csv:3: byte 3 of the line is not UTF-8"):
        read_trace(write(tmp_path, b"0,7\n1,8\n2,\xff\n"))


def test_damaged_gzip_says_so(tmp_path: Path) -> None:
    rows = "arrival_s,prompt_tokens\n" + "".join(f"{i},{i % 97 + 1}\n" for i in range(20_000))
    packed = gzip.compress(rows.encode())
    with pytest.raises(ValueError, match=r"t.csv:\d{4,}: the gzip file is cut off here"):
        read_trace(write(tmp_path, packed[: len(packed) // 2]))
    flipped = packed[:-8] + bytes([packed[-8] ^ 1]) + packed[-7:]
    with pytest.raises(ValueError, match=r"t.csv:20002: the gzip data is damaged here .*CRC"):
        read_trace(write(tmp_path, flipped))
    garbage = packed[:1000] + b"\xff" * 200 + packed[1200:]
    with pytest.raises(ValueError, match=r"t.csv:\d+: "):
        read_trace(write(tmp_path, garbage))


def test_a_missing_file_and_an_unknown_format(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_trace(tmp_path / "nowhere.csv")
    with pytest.raises(ValueError, match="dataset name 'sharegpt' is not known; use one of auto, azure"):
        read_trace(write(tmp_path, VIDUR), "sharegpt")


def test_reads_a_hundred_thousand_rows_in_seconds(tmp_path: Path) -> None:
    clock = [f"{s // 3600:02}:{s // 60 % 60:02}:{s % 60:02}" for s in range(25_000)]
    rows = [f"2023-11-16 {clock[i // 4]}.{i % 4}000000,{i % 999 + 1},5" for i in range(100_000)]
    file = write(tmp_path, "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(rows))
    start = time.process_time()
    assert len(read_trace(file).requests) == 100_000
    assert time.process_time() - start < 10.0  # takes well under 1 s; a slip to quadratic time takes minutes


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe is a pipe or a device"):
        read_trace(tmp_path / "pipe", "csv")
