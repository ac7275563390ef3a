"""Validation of serving: runs that a simulated node made; timelines, pictures, the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from calibration.compare import AS_IS, Source
from calibration.validate import as_json
from calibration.validate_plots import write_pictures
from calibration.validate_serving import METRICS, read_runs, simulate
from calibration.validate_timeline import read_spans, stretch_of
from sim.simulate import Fidelity
from tests.calibration.validation import (
    FORWARD,
    NODE,
    PNG,
    batches_of,
    check,
    kernels_of,
    line,
    one_error,
    served,
    slower_links,
)
from tests.worlds import changed
from traces.chrome import write_chrome_trace
from weft.cli import main

# -- serving --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["tensor", "interleaved"])
def test_a_node_serves_as_it_served(tmp_path: Path, policy: str) -> None:
    runs = tuple(read_runs([served(NODE, tmp_path, policy=policy, repeats=2)]))
    assert runs[0].key == runs[1].key
    found = check(NODE, runs=runs)
    for _, name, target in METRICS:
        same = line(found, name, "serving, same arrivals")
        assert same.count == 1
        assert same.worst == pytest.approx(0.0, abs=1e-9)
        assert same.met is (True if target.typical else None)
        assert same.spread == 0.0
        # Taking over admissions leaves the host out that decided them.
        worst = line(found, name, "serving, same admissions").worst
        assert worst is not None and worst < 5.0
    assert found.verdict == (5, 5)


def test_a_slower_node_is_late_by_what_it_is_slower(tmp_path: Path) -> None:
    """At a light load a batch of two takes what its kernels and its host take; twice that is 100 % more."""
    runs = tuple(read_runs([served(NODE, tmp_path, rate=50.0, policy="tensor")]))
    device = NODE.device
    slow_device = changed(NODE, "device", peak_tflops=device.peak_tflops / 2, hbm_gb_s=device.hbm_gb_s / 2,
                          sm_bandwidth_gb_s=device.sm_bandwidth_gb_s / 2, cta_start_us=2 * device.cta_start_us,
                          ramp_us=2 * device.ramp_us)  # fmt: skip
    slower = slower_links(slow_device, 2.0)
    timelines = [simulate(node, runs[0], "arrivals")[1] for node in (NODE, slower)]
    alone = [min(c.latency_us for c in timeline.completions) for timeline in timelines]
    found = check(slower, runs=runs)
    groups = found.serving.groups["arrivals"]
    assert len(groups) == 1
    assert alone[1] > 1.3 * alone[0]
    late_ms = (sum(c.latency_us for c in timelines[1].completions) / 24 - sum(
        c.latency_us for c in timelines[0].completions) / 24) / 1e3  # fmt: skip
    point = groups[0].point("", "mean_e2el_ms")
    assert point.predicted - point.measured == pytest.approx(late_ms)
    assert late_ms > 0.0


def test_runs_of_other_settings_are_no_repeats(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    paths = [served(NODE, tmp_path / "a", rate=100.0), served(NODE, tmp_path / "b", rate=200.0)]
    found = check(NODE, runs=tuple(read_runs(paths)))
    assert [len(group.runs) for group in found.serving.groups["arrivals"]] == [1, 1]
    assert line(found, "mean latency").spread is None


def test_a_run_that_the_node_cannot_hold_is_left_out_and_said(tmp_path: Path) -> None:
    runs = tuple(read_runs([served(NODE, tmp_path)]))
    one_gpu = msgspec.structs.replace(NODE, num_gpus=1)
    with pytest.raises(ValueError, match=r"nothing to compare.*2 ranks do not fit node h200-nvlink-x4, which has 1"):
        check(one_gpu, runs=runs)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("nonsense\n", r"r.json:1: not JSON"),
        ('{"backend": "simulated"}\n', r"r.json:1: a simulated result"),
        ('{"backend": "gloo"}\n', r"r.json:1: no result of a real run with its details; save it with --save-detailed"),
        ('{"settings": {}, "admission_log": []}\n', r"r.json:1: not the result of a run"),
    ],
)
def test_broken_runs_are_one_clear_line(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=words):
        read_runs([path])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"request_throughput": float("nan")}, "request_throughput is nan; it must be a finite number above 0"),
        ({"request_throughput": -3.0}, "request_throughput is -3.0"),
        ({"request_throughput": None}, "request_throughput"),
        ({"request_throughput": ...}, "request_throughput"),
        ({"p99_e2el_ms": float("inf")}, "p99_e2el_ms is inf"),
        ({"mean_e2el_ms": -1.0}, "mean_e2el_ms is -1.0"),
        ({"request_rate": float("nan")}, "request_rate is nan"),
        ({"latencies": [1.0] * 23 + [-0.5]}, "latencies has -0.5; it must hold finite seconds"),
        ({"latencies": [float("nan")] * 24}, "latencies has nan"),
        ({"latencies": [1.0] * 7}, "latencies has 7 entries, but 24 of 24 requests were answered"),
        ({"failed": 1}, "latencies has 24 entries, but 23 of 24 requests were answered"),
        ({"failed": 25}, "failed is 25; the run has 24 requests"),
    ],
)
def test_numbers_that_no_run_has_are_one_clear_line(
    changes: dict[str, Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = served(NODE, tmp_path, repeats=2), tmp_path / "out"
    first, second = path.read_text().splitlines()
    raw = {key: value for key, value in (json.loads(second) | changes).items() if value is not ...}
    path.write_text(f"{first}\n{json.dumps(raw)}\n")
    assert main(["validate", "--node", "h200-nvlink-x4", "--runs", str(path), "--out", str(out)]) == 2
    said = one_error(capsys)
    assert f"{path}:2: " in said and words in said
    assert not out.exists()


def test_a_copy_of_a_run_is_no_repeat(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, copy = served(NODE, tmp_path, repeats=2), tmp_path / "copy.jsonl"
    copy.write_bytes(path.read_bytes())
    for other in (path, copy):
        assert main(["validate", "--node", "h200-nvlink-x4", "--runs", str(path), str(other)]) == 2
        assert f"{other}:1: the same run as {path}:1" in one_error(capsys)


# -- timelines and pictures -----------------------------------------------------------------------------------------


def test_a_chrome_trace_is_read_back_and_begins_with_the_same_batch(tmp_path: Path) -> None:
    [run] = read_runs([served(NODE, tmp_path)])
    _, timeline = simulate(NODE, run, "admissions", Fidelity(record=True))
    timeline.num_ranks = 1
    [file] = write_chrome_trace(timeline, tmp_path / "t.trace.json.gz")
    spans = read_spans(file)

    def order(span: Any) -> Any:
        return span.start_us, span.lane, span.batch_id, span.kernel_index

    times = [
        (s.name, s.lane, s.is_communication, s.batch_id, s.kernel_index, s.round_id) for s in sorted(spans, key=order)
    ]
    wanted = [(s.name, s.lane, s.is_communication, s.batch_id, s.kernel_index, s.round_id)
              for s in sorted(timeline.spans, key=order)]  # fmt: skip
    assert times == wanted
    stretch = stretch_of(NODE, run, spans)
    assert min(s.start_us for s in stretch.measured if s.batch_id == stretch.batch_id) == 0.0
    assert len(stretch.measured) == len(stretch.simulated)
    assert all(
        one.end_us == pytest.approx(two.end_us)
        for one, two in zip(sorted(stretch.measured, key=order), sorted(stretch.simulated, key=order), strict=True)
    )
    with pytest.raises(ValueError, match="another run"):
        stretch_of(NODE, run, [s for s in spans if s.batch_id < 3])
    (tmp_path / "t.json").write_text('{"traceEvents": [{"ph": "X"}]}')
    with pytest.raises(ValueError, match=r"t.json: not a timeline of weft run"):
        read_spans(tmp_path / "t.json")


def test_pictures_are_the_same_every_time(tmp_path: Path) -> None:
    [run] = read_runs([served(NODE, tmp_path)])
    _, timeline = simulate(NODE, run, "admissions", Fidelity(record=True))
    found = check(NODE, Source("own", tuple(kernels_of(NODE)), AS_IS), batches_of(NODE), runs=(run,))
    found.stretches = [stretch_of(NODE, run, timeline.spans)]
    drawn = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        drawn.append({path.name: path.read_bytes() for path in write_pictures(found, tmp_path / name)})
    assert drawn[0] == drawn[1]
    assert sorted(drawn[0]) == ["latency.png", "predicted.png", "timeline.png"]
    assert all(content.startswith(PNG) for content in drawn[0].values())


# -- the command ----------------------------------------------------------------------------------------------------


def test_committed_data_against_todays_node(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = ["validate", "--node", "h200-hoststaged-x4", "--measurements", str(FORWARD), "--out", str(out)]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    written = json.loads((out / "validation.json").read_text())
    assert (out / "predicted.png").read_bytes().startswith(PNG)
    assert written["node"] == "h200-hoststaged-x4"
    table = {row["what"].strip(): row for row in written["table"]}
    assert table["makespan"]["count"] == 91
    assert f"{table['makespan']['typical']:.1f}" in shown
    assert table["makespan"]["met"] is (table["makespan"]["typical"] <= 4.0 and table["makespan"]["worst"] <= 10.0)
    assert len(written["rankings"]) == 7
    assert len(written["points"]) == 7 * 15
    assert "of 2 targets met" in shown
    assert "are estimates, not measurements" in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "nothing to compare with"),
        (["--measurements", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--measurements", "."], "neither a folder of measurements"),
        (["--runs", "/nowhere/run.json"], "/nowhere/run.json"),
        (["--measurements", str(FORWARD), "--timeline", "t.json"], "give their results with --runs"),
        (["--live", "--backend", "gloo", "--repeats", "0"], "--repeats 0"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["validate", "--node", "h200-nvlink-x4", *arguments]) == 2
    assert words in one_error(capsys)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--num-prompts", "0"], "--num-prompts 0"),
        (["--policy", "tensor", "foo"], "unknown policy 'foo'"),
        (["--request-rate", "nan"], "request rate is nan"),
        (["--input-len", "many"], "many"),
        (["--model", "moon"], "'moon'"),
        (["--ranks", "0"], "--ranks 0"),
        (["--layers", "99"], "--layers 99"),
    ],
)
def test_live_runs_that_cannot_be_made_leave_the_old_ones(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    before = tmp_path / "live-runs.jsonl"
    before.write_text("kept\n")
    live = ["--live", "--backend", "gloo", *arguments]
    assert main(["validate", "--node", "h200-nvlink-x4", *live, "--out", str(tmp_path)]) == 2
    assert words in one_error(capsys)
    assert before.read_text() == "kept\n" and list(tmp_path.iterdir()) == [before]
    assert main(["validate", "--node", "h200-nvlink-x4", *live, "--out", str(tmp_path / "new")]) == 2
    assert not (tmp_path / "new").exists()


def test_live_runs_that_fail_leave_the_old_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    before = tmp_path / "live-runs.jsonl"
    before.write_text("kept\n")

    def fail(*_: object, **__: object) -> None:
        raise ValueError("rank 1 stands still")

    monkeypatch.setattr("weft.executed.execute", fail)
    live = ["--live", "--backend", "gloo", "--num-prompts", "2", "--out", str(tmp_path)]
    assert main(["validate", "--node", "h200-nvlink-x4", *live]) == 2
    assert "stands still" in one_error(capsys)
    assert before.read_text() == "kept\n"


def test_live_runs_on_cpu_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    arguments = [
        "--live",
        "--backend",
        "gloo",
        "--policy",
        "interleaved",
        "--request-rate",
        "inf",
        "--num-prompts",
        "6",
        "--repeats",
        "1",
    ]
    (tmp_path / "live-runs.jsonl").write_text("of an earlier time\n")
    assert main(["validate", "--node", "h200-nvlink-x4", *arguments, "--out", str(tmp_path)]) == 0
    assert "foreign: 2 runs were made on CPU processes" in capsys.readouterr().out
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["latency.png", "live-runs.jsonl", "predicted.png", "timeline.png", "validation.json"]
    # What was made can be read again.
    runs = read_runs([tmp_path / "live-runs.jsonl"])
    assert [(run.run.policy, run.run.record) for run in runs] == [("interleaved", False), ("interleaved", True)]


def test_everything_is_plain_data() -> None:
    found = check(NODE, Source("own", tuple(kernels_of(NODE)), AS_IS), batches_of(NODE))
    assert json.loads(json.dumps(as_json(found), allow_nan=False))["targets_met"] == 6
