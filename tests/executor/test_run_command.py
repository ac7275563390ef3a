"""`weft run` on a machine without GPUs: one command, seconds, the same result file as a simulated run."""

from __future__ import annotations

import errno
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest

from executor.launch import launch
from executor.order import RoundsHash
from executor.settings import read_settings
from models.config import MODELS
from weft.cli import main
from weft.executed import SPLIT_KEYS, replay_result
from weft.outputs import is_result_key
from weft.report import gpu_rows

SHORT = ["--backend", "gloo", "--num-prompts", "12", "--disable-tqdm"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "result.json"
    trace = path.with_name("run.trace.json.gz")
    flags = ["--result-filename", str(path), "--save-detailed", "--timeline", str(trace), "--request-rate", "200"]
    assert main(["run", *SHORT, *flags, "--label", "a test", "--metric-percentiles", "99.9"]) == 0
    return path


def _result(path: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def test_the_result_has_the_keys_of_a_simulated_one(saved: Path, tmp_path: Path) -> None:
    simulated = tmp_path / "simulated.json"
    arguments = ["--num-prompts", "12", "--request-rate", "20", "--result-filename", str(simulated), "--disable-tqdm"]
    assert main(["simulate", *arguments]) == 0
    only_simulated = {key for key in _result(simulated) if key not in _result(saved)}
    assert {key for key in only_simulated if not key.startswith("sim_")} <= {"node_digest"}


def test_every_key_of_a_result_is_kept_from_metadata(saved: Path) -> None:
    assert [key for key in _result(saved) if not is_result_key(key)] == ["label"]
    assert _result(saved)["weights_gb_per_gpu"] == 4 * MODELS["tiny-opt"].num_parameters / 2 / 1e9  # float32, TP2


def test_the_result_says_what_ran(saved: Path) -> None:
    result = _result(saved)
    assert (result["backend"], result["completed"], result["failed"]) == ("gloo", 12, 0)
    assert result["model_id"] == "tiny-opt"
    assert result["host"]["gpu"] == "none"
    assert result["host"]["torch"]
    assert len(result["output_checksum"]) == 64
    assert result["label"] == "a test"
    assert result["p99_e2el_ms"] <= result["p99.9_e2el_ms"]
    assert result["host_issue_us_per_launch"] > 0.0
    assert len(result["latencies"]) == 12


def test_the_timeline_is_a_chrome_trace_per_rank(saved: Path) -> None:
    assert {path.name for path in saved.parent.glob("*.gz")} == {"run.rank0.trace.json.gz", "run.rank1.trace.json.gz"}


def test_what_graphs_hide_is_not_known() -> None:
    rows = gpu_rows(dict.fromkeys(SPLIT_KEYS))
    assert [line.endswith("not known (inside graphs)") for line in rows] == [False, True, True, True, True]


def test_no_answer_is_lost_when_writing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The disk is full for the timeline: the result is there, and what the ranks left is read by the same command."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    result, trace = tmp_path / "result.json", tmp_path / "t.json"
    command = ["run", *SHORT, "--result-filename", str(result), "--save-detailed", "--timeline", str(trace)]
    with monkeypatch.context() as full:
        full.setattr("traces.chrome.write_whole", _full_disk)
        assert main(command) == 2
    said = capsys.readouterr()
    folder = next(tmp_path.glob("weft-run-*"))
    assert said.err.count("\n") == 1
    assert f"t.rank0.json: No space left on device; the answers are in {folder}: the same command with" in said.err
    assert f"wrote {result}" in said.out
    first = _result(result)
    assert main([*command, "--read-output", str(folder)]) == 0
    assert _result(result)["latencies"] == first["latencies"]
    assert len(list(tmp_path.glob("t.rank?.json"))) == 2


def test_what_torchrun_left_is_read_with_the_flags_that_made_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = ["run", *SHORT, "--policy", "tensor", "--slo-ms", "1e6", "--max-input-len", "40"]
    assert main([*made, "--write-settings", str(tmp_path / "s.json")]) == 0
    completions = tmp_path / "s" / "completions.jsonl"
    completions.write_text("of a run before\n")
    launch(read_settings(tmp_path / "s.json"))
    assert len(completions.read_text().splitlines()) == 12
    capsys.readouterr()
    read = ["--read-output", str(tmp_path / "s")]
    assert main([*made, *read]) == 0
    said = capsys.readouterr().out
    assert "Successful requests:                           12" in said
    assert "SLO attainment (%):                            100.00" in said
    assert re.search(r"Prompts shortened: +\d+\n", said)
    assert "Communication hidden by computation (%):       0.00" in said
    for flags, difference in (
        (["--num-prompts", "9"], "(requests: their number 12, not 9)"),
        (["--model", "tiny-llama"], "(model.model_id 'tiny-opt', not 'tiny-llama', "),
        (["--seed", "3"], "(requests["),
        (["--policy", "interleaved"], "(policy 'tensor', not 'interleaved')"),
        (["--timeline", str(tmp_path / "t.json")], "(record False, not True)"),
    ):
        assert main([*made, *flags, *read]) == 2
        refused = capsys.readouterr()
        assert refused.err.count("\n") == 1
        assert f"{tmp_path / 's'}: it was made with other settings than these flags give {difference}" in refused.err
        assert refused.out == ""


def _full_disk(path: Path, content: bytes) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def test_a_saved_run_is_replayed_in_the_simulator(saved: Path) -> None:
    replayed = replay_result(saved, "a100-pcie-x4")
    rounds = RoundsHash()
    for round_ in replayed.rounds:
        rounds.add(round_)
    assert rounds.digest() == _result(saved)["rounds_hash"]
    assert len(replayed.timeline.completions) == 12


def test_a_replay_is_held_beside_the_run(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(saved), "--node", "a100-pcie-x4"]) == 0
    said = capsys.readouterr().out
    assert f"{_result(saved)['rounds']}, as in the run" in said
    measured = f"{_result(saved)['duration']:.2f} / "
    assert re.search(rf"Makespan, measured / simulated \(s\): +{re.escape(measured)}\d+\.\d\d\n", said)
    assert "caution" not in said
    other = tmp_path / "other.json"
    other.write_text(json.dumps(_result(saved) | {"rounds_hash": "0" * 16}))
    assert main(["replay", str(other), "--node", "a100-pcie-x4"]) == 0
    assert "caution: this weft plans other rounds than the run had" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{result}\n{result}\n", "2 lines; a replay takes a file with one result"),
        ("no result", "not JSON ("),
        ("", "not JSON ("),
        ('{{"backend": "simulated"}}', "it has no log of admissions; give a result of weft run --save-result --save-d"),
        ('{{"admission_log": 7}}', "not the result of a run ("),
        ("{short}", "the log admits 12 requests, which are not the 11 of the run"),
        ("{wide}", "8 ranks do not fit node a100-pcie-x4, which has 4 GPUs"),
        ("{profile}", "profile"),
    ],
)
def test_a_file_that_cannot_be_replayed_is_named(
    content: str, message: str, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = _result(saved)
    run = result["settings"]["runs"][0]
    files = {
        "result": result,
        "short": _with_run(result, run | {"requests": run["requests"][1:]}),
        "wide": _with_run(result, run | {"layout": {"tp": 8, "pp": 1}}),
        "profile": result | {"profile": {"name": "of nothing"}},
    }
    path = tmp_path / "other.json"
    path.write_text(content.format(**{name: json.dumps(file) for name, file in files.items()}))
    assert main(["replay", str(path), "--node", "a100-pcie-x4"]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"weft: error: {path}: ")
    assert message in said.err
    assert (said.err.count("\n"), said.out) == (1, "")


def _with_run(result: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    return result | {"settings": result["settings"] | {"runs": [run]}}


def test_the_checksum_is_of_the_numbers_alone(saved: Path, tmp_path: Path) -> None:
    """Same seed, requests and batches, another policy: the same logits, however they were computed."""
    path = tmp_path / "tensor.json"
    assert main(["run", *SHORT, "--policy", "tensor", "--result-filename", str(path), "--request-rate", "inf"]) == 0
    again = tmp_path / "again.json"
    assert main(["run", *SHORT, "--policy", "tensor", "--result-filename", str(again), "--request-rate", "inf"]) == 0
    assert _result(path)["output_checksum"] == _result(again)["output_checksum"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ranks", "0"], "--ranks 0 is not possible; give 1 or more"),
        (["--ranks", "3"], "tiny-opt: heads 8 cannot be divided over 3 ranks"),
        (["--layers", "5"], "--layers 5 is not possible: tiny-opt has 4 layers"),
        (["--timeout-s", "0"], "timeout is 0.0 s; it must be 1 to 600"),
        (["--host-delay-us", "-1"], "host_delay_us is -1.0; it must be 0 or more microseconds"),
        (["-tp", "1"], "the layout TP1 x PP1 needs 1 ranks, but there are 2"),
        (["--input-len", "500"], "request 0 has 500 prompt tokens, but tiny-opt has 256 positions"),
        (["--checkpoint", "/nowhere"], "model '/nowhere' is neither a file nor one of"),
    ],
)
def test_mistakes_are_one_line(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", *SHORT, *flags]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert errors[0].startswith("weft: error: ")
    assert message in errors[0]


def test_settings_for_torchrun_are_written_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.json"
    assert main(["run", *SHORT, "--write-settings", str(path)]) == 0
    assert "torchrun --nproc-per-node 2 -m executor --settings" in capsys.readouterr().out
    assert _result(path)["runs"][0]["options"]["slo_us"] == "inf"
