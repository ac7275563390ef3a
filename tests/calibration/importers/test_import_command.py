"""`weft import` as a user meets it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from traces.measurement import read_measurements
from weft.cli import main

Write = Callable[..., Path]
NCCL = """source,framework,version,device,op_name,kernel_source,nccl_dtype,num_gpus,message_size,latency
nccl/2.1,Toy,2.1,NVIDIA A100-SXM4-80GB,all_reduce,NCCL,half,4,512,0.010
nccl/2.1,Toy,2.1,NVIDIA A100-SXM4-80GB,all_reduce,NCCL,half,4,1024,0.011
nccl/2.1,Toy,2.1,NVIDIA A100-SXM4-80GB,alltoall,NCCL,half,4,1024,0.011
"""
LOG = """# nThread 1 nGpus 2 minBytes 8 maxBytes 64 step: 2(factor) warmup iters: 5 iters: 20 agg iters: 1 graph: 0
#  Rank  0 Group  0 Pid 1 on toyhost device  0 [0x01] Toy GPU
#  Rank  1 Group  0 Pid 1 on toyhost device  1 [0x02] Toy GPU
#  size count type redop root time algbw busbw #wrong time algbw busbw #wrong
4096 2048 half sum -1 12.5 0.33 0.33 0 11.0 0.37 0.37 0
"""


def run(*words: str | Path) -> int:
    return main(["import", *map(str, words)])


def test_a_folder_of_measurements(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, out = write("nccl.csv.gz", NCCL), tmp_path / "deep" / "out"
    words = ("--licence", "CC0", "--link-mode", "as-is", "--date", "2026-01-31", "--num-gpus", "8")
    assert run("aiconfigurator", table, "--out", out, *words) == 0
    conditions, rows = read_measurements(out)
    assert conditions.finished
    assert (conditions.gpu, conditions.num_gpus, conditions.num_sms) == ("NVIDIA A100-SXM4-80GB", 8, 108)
    assert (conditions.nccl, conditions.link_mode, conditions.date) == ("2.1", "as-is", "2026-01-31")
    assert (conditions.dtype, conditions.torch, conditions.driver) == ("half", "not stated", "not stated")
    notes = conditions.environment
    assert notes["source.0"] == f"nccl.csv.gz sha256 {hashlib.sha256(table.read_bytes()).hexdigest()}"
    assert notes["licence"] == "CC0" and "no graph" in notes["timing.nccl"]
    assert str(tmp_path) not in (out / "conditions.json").read_text()  # a file's name, not somebody's folders
    assert [(row.at["bytes"], row.values["us"]) for row in rows] == [(1024, 10.0), (2048, 11.0)]
    text = capsys.readouterr().out
    assert "2 points" in text and "alltoall" in text and "not stated" not in text
    assert [path.name for path in out.parent.iterdir()] == ["out"]  # nothing half-written is left behind


def test_the_same_files_give_the_same_folder(write: Write, tmp_path: Path) -> None:
    table = write("nccl.csv", NCCL)
    for name in ("one", "two"):
        run("aiconfigurator", table, "--out", tmp_path / name)
    for name in ("conditions.json", "measurements.jsonl", "manifest.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_nobody_invents_what_the_files_do_not_say(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("nccl-tests", write("log.txt", LOG), "--op", "all_reduce", "--out", tmp_path / "out") == 0
    conditions, (row,) = read_measurements(tmp_path / "out")
    assert (conditions.gpu, conditions.num_sms, conditions.link_mode) == ("Toy GPU", 0, "not stated")
    assert row.spread == {"us": 0.0} and row.repetitions == 20
    assert "not stated by the files: --link-mode, --date, --licence" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nccl-tests", "log.txt"), "log.txt:5: the file does not name the operation"),
        (("nccl-tests", "log.txt", "--op", "alltoall"), "nothing in it can be used (1 x alltoall"),
        (("nccl-tests", "log.txt", "log.txt", "--op", "all_reduce"), "log.txt is given twice"),
        (("nccl-tests", "absent.txt"), "absent.txt: No such file or directory"),
        (("aiconfigurator", "log.txt"), "log.txt:1: not a table of aiconfigurator"),
        (("aiconfigurator", "nccl.csv", "--gpu", "H100"), "--gpu 'H100' contradicts"),
        (("aiconfigurator", "nccl.csv", "--date", "yesterday"), "--date 'yesterday' is not a date"),
        (("aiconfigurator", "nccl.csv", "--date", "2025-13-45"), "--date '2025-13-45' is not a date"),
        (("aiconfigurator", "nccl.csv", "--date", "20250131"), "--date '20250131' is not a date"),
        (("aiconfigurator", "nccl.csv", "--date", "9998-01-31"), "--date 9998-01-31 is still to come"),
        (("aiconfigurator", "nccl.csv", "--num-gpus", "-1"), "--num-gpus -1 is not possible"),
        (("vidur", "nccl.csv"), "nccl.csv:1: not a table of Vidur"),
        (("kineto", "nccl.csv"), "nccl.csv:1: not JSON"),
    ],
)
def test_mistakes(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...], message: str,
) -> None:  # fmt: skip
    write("log.txt", LOG), write("nccl.csv", NCCL)
    monkeypatch.chdir(tmp_path)
    assert run(*words, "--out", "out") == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("weft: error: ") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_link_modes_are_those_that_there_are(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run("aiconfigurator", write("nccl.csv", NCCL), "--out", tmp_path / "out", "--link-mode", "quatsch")
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1
    assert "--link-mode" in error and "'quatsch'" in error and "host-staged" in error
    assert not (tmp_path / "out").exists()


def test_a_folder_is_never_overwritten(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, out = write("nccl.csv", NCCL), tmp_path / "out"
    out.mkdir()
    assert run("aiconfigurator", table, "--out", out) == 0  # an empty folder is a place
    before = (out / "measurements.jsonl").read_bytes()
    assert run("aiconfigurator", table, "--out", out) == 2
    assert "out is there already and not empty" in capsys.readouterr().err
    assert (out / "measurements.jsonl").read_bytes() == before
    assert run("aiconfigurator", table, "--out", table) == 2


def test_a_changed_import_is_noticed(write: Write, tmp_path: Path) -> None:
    run("aiconfigurator", write("nccl.csv", NCCL), "--out", tmp_path / "out")
    file = tmp_path / "out" / "measurements.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[0]["values"]["us"] = 1.0
    file.write_text("\n".join(map(json.dumps, lines)) + "\n")
    with pytest.raises(ValueError, match=r"measurements\.jsonl: the file was changed"):
        read_measurements(tmp_path / "out")
