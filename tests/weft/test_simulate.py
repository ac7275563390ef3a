"""`weft simulate` as a user meets it: keys, files, equal bytes for equal seeds, and traces at the rate asked for."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import msgspec
import pytest

from policy.options import Options
from sim.simulate import Fidelity
from traces.chrome import overlap_of
from weft.cli import main
from weft.runs import RunConfig, config_hash, estimates_used, layout_of, make_requests, simulate

TINY = ["--model", "tiny-opt", "--num-prompts", "24", "--request-rate", "400"]
REQUIRED = {
    "model_id", "node", "policy", "seed", "num_prompts", "completed", "failed", "duration", "request_throughput",
    "mean_e2el_ms", "p50_e2el_ms", "p90_e2el_ms", "p99_e2el_ms", "comm_share", "overlap_fraction",
    "compute_utilization", "link_utilization", "estimates_used", "sim_iterations", "sim_kernels", "sim_wall_s",
}  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def weft_simulate(*words: str) -> None:
    assert main(["simulate", *TINY, *words]) == 0


def result_of(name: str = "r.json", *words: str) -> dict[str, Any]:
    weft_simulate("--save-result", "--result-filename", name, *words)
    result: dict[str, Any] = json.loads(Path(name).read_text())
    return result


def test_the_file_holds_every_key_and_the_block_says_simulated(capsys: pytest.CaptureFixture[str]) -> None:
    result = result_of("r.json", "--metadata", "who=me", "--label", "first", "--metric-percentiles", "25,99.9")
    assert set(result) >= REQUIRED
    assert (result["completed"], result["failed"], result["who"], result["label"]) == (24, 0, "me", "first")
    assert result["p25_e2el_ms"] <= result["p50_e2el_ms"] <= result["p99_e2el_ms"] <= result["p99.9_e2el_ms"]
    assert all(not isinstance(value, dict) for value in result.values())
    text = capsys.readouterr().out
    assert " Simulated Serving Benchmark Result " in text
    assert "Successful requests:                           24\n" in text
    assert f"{len(result['estimates_used'])} numbers of node a100-pcie-x4 are estimates" in text
    assert text.endswith("wrote r.json\n")


def test_same_seed_same_bytes_but_for_the_wall_clock() -> None:
    for name in ("a.json", "b.json"):
        weft_simulate("--save-detailed", "--result-filename", name, "--timeline", f"{name[0]}.trace.json.gz")
    before_wall = [Path(name).read_bytes().partition(b', "sim_wall_s": ')[0] for name in ("a.json", "b.json")]
    assert before_wall[0] == before_wall[1]
    assert before_wall[0].endswith(b'"out_of_range": []')  # only the wall clock was cut off
    for rank in range(4):
        assert Path(f"a.rank{rank}.trace.json.gz").read_bytes() == Path(f"b.rank{rank}.trace.json.gz").read_bytes()
    assert result_of("a.json")["mean_e2el_ms"] != result_of("c.json", "--seed", "1")["mean_e2el_ms"]


def test_default_name_is_told_by_the_configuration(folder: Path) -> None:
    weft_simulate("--save-result", "--result-dir", "new/results")
    weft_simulate("--save-result", "--result-dir", "new/results")
    weft_simulate("--save-result", "--result-dir", "new/results", "--seed", "1")
    names = sorted(file.name for file in (folder / "new" / "results").iterdir())
    assert len(names) == 2
    assert all(name.startswith("simulated-400qps-tiny-opt-a100-pcie-x4-interleaved-") for name in names)


def test_append_keeps_earlier_lines() -> None:
    for seed in ("0", "1"):
        weft_simulate("--append-result", "--result-filename", "all.jsonl", "--seed", seed)
    rows = [json.loads(line) for line in Path("all.jsonl").read_text().splitlines()]
    assert [row["seed"] for row in rows] == [0, 1]
    assert result_of("all.jsonl")["seed"] == 0  # without --append-result the file is replaced


def test_detailed_lists_agree_with_the_summary() -> None:
    result = result_of("r.json", "--save-detailed")
    assert len(result["latencies"]) == len(result["input_lens"]) == 24
    assert sum(result["input_lens"]) == result["total_input_tokens"]
    assert 1e3 * sum(result["latencies"]) / 24 == pytest.approx(result["mean_e2el_ms"], rel=1e-9)
    assert result["start_times"] == sorted(result["start_times"])
    assert all(0.0 <= wait < latency for wait, latency in zip(result["queue_times"], result["latencies"], strict=True))


def test_unlimited_rate_and_goodput() -> None:
    result = result_of("r.json", "--request-rate", "inf", "--slo-ms", "2")
    assert result["request_rate"] == "inf"
    late = result_of("l.json", "--request-rate", "inf", "--slo-ms", "0.001")
    assert 0.0 < result["slo_attainment"] <= 1.0
    assert late["slo_attainment"] == 0.0
    assert result["policy_options"] == "slo_us=2000.0"


@pytest.mark.parametrize("policy", ["tensor", "pipeline", "hybrid", "interleaved", "liger-artifact"])
def test_exact_mode_and_timeline_change_no_number(policy: str) -> None:
    config = RunConfig(model="tiny-opt", policy=policy, num_prompts=16, request_rate=500.0)
    runs = [
        simulate(config, Fidelity(exact=exact, record=record)) for exact in (False, True) for record in (False, True)
    ]
    results = [msgspec.json.encode({**run.result, "sim_wall_s": 0}) for run in runs]
    assert results[0] == results[1] == results[2] == results[3]
    folded, exact = overlap_of(runs[1].timeline.spans), overlap_of(runs[3].timeline.spans)
    assert folded == pytest.approx(exact)
    assert {span.rank for span in runs[1].timeline.spans} == {0, 1, 2, 3}


def test_timeline_files_hold_the_kernels_of_the_run() -> None:
    result = result_of("r.json", "--timeline", "t.trace.json.gz")
    events = []
    for rank in range(4):
        document = json.loads(gzip.decompress(Path(f"t.rank{rank}.trace.json.gz").read_bytes()))
        assert document["distributedInfo"]["rank"] == rank
        events += [event for event in document["traceEvents"] if event["ph"] == "X"]
    assert len(events) == result["sim_kernels"]
    assert {event["pid"] for event in events} == {0, 1, 2, 3}


def test_the_rate_asked_for_is_the_rate_of_the_run() -> None:
    for burstiness in (0.3, 1.0, 10.0):
        requests = make_requests(RunConfig(num_prompts=50, request_rate=7.0, burstiness=burstiness))
        assert requests[-1].arrival_us == pytest.approx(49 / 7.0 * 1e6)
    at_once = make_requests(RunConfig(num_prompts=50, request_rate=math.inf))
    assert {request.arrival_us for request in at_once} == {0.0}


def test_a_trace_keeps_its_rate_or_takes_another(capsys: pytest.CaptureFixture[str]) -> None:
    Path("t.csv").write_text("arrival_s,prompt_tokens\n" + "".join(f"{second},16\n" for second in range(11)))
    words = ["simulate", "--model", "tiny-opt", "--dataset-path", "t.csv", "--result-filename", "r.json"]
    durations = []
    for more in ([], ["--request-rate", "100"], ["--request-rate", "inf"], ["--num-prompts", "3"]):
        assert main([*words, *more]) == 0
        result = json.loads(Path("r.json").read_text())
        durations.append((result["completed"], round(result["duration"], 1)))
    assert durations == [(11, 10.0), (11, 0.1), (11, 0.0), (3, 2.0)]


def test_prompts_that_are_too_long_are_shortened_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    Path("t.csv").write_text("0,16\n1,5000\n2,256\n3,257\n")
    words = ["simulate", "--model", "tiny-opt", "--dataset-path", "t.csv", "--result-filename", "r.json"]
    assert main([*words, "--max-input-len", "256"]) == 0
    result = json.loads(Path("r.json").read_text())
    assert (result["num_shortened"], result["total_input_tokens"]) == (2, 16 + 3 * 256)
    assert "Prompts shortened:                             2\n" in capsys.readouterr().out


def test_the_hash_covers_all_that_decides_the_result(folder: Path) -> None:
    base = RunConfig(model="tiny-opt")
    trace = folder / "t.csv"
    others = [
        msgspec.structs.replace(base, seed=1),
        msgspec.structs.replace(base, node="h200-nvlink-x4"),
        msgspec.structs.replace(base, options=Options(depth=7)),
        msgspec.structs.replace(base, request_rate=math.inf),
        msgspec.structs.replace(base, dataset_name="csv", dataset_path=str(trace)),
    ]
    trace.write_text("0,5\n")
    hashes = {config_hash(config) for config in (base, *others)}
    assert len(hashes) == 6
    before = config_hash(others[-1])
    trace.write_text("0,6\n")
    assert config_hash(others[-1]) != before
    assert config_hash(base) == config_hash(RunConfig(model="tiny-opt"))


def test_layouts_of_the_policies() -> None:
    assert [str(layout_of(policy, 4)) for policy in ("tensor", "pipeline", "hybrid")] == [
        "Layout(tp=4, pp=1)",
        "Layout(tp=1, pp=4)",
        "Layout(tp=2, pp=2)",
    ]
    assert str(layout_of("hybrid", 8)) == "Layout(tp=2, pp=4)"
    assert str(layout_of("pipeline", 4, tp=2)) == "Layout(tp=2, pp=2)"
    assert str(layout_of("hybrid", 1)) == "Layout(tp=1, pp=1)"


def test_estimates_of_tables_that_no_kernel_uses_are_not_blamed() -> None:
    from models.config import load_model
    from sim.spec import load_node

    node, model = load_node("a100-pcie-x4"), load_model("glm-130b")
    tensor = estimates_used(node, model, layout_of("tensor", 4))
    pipeline = estimates_used(node, model, layout_of("pipeline", 4))
    assert "contention" in tensor
    assert "link.tables.send.2.2" in pipeline
    assert "link.tables.send.2.2" not in tensor
    assert set(tensor) <= set(node.estimates)
