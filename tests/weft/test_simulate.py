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
from weft.outputs import is_result_key
from weft.runs import RunConfig, config_hash, estimates_used, layout_of, make_requests, memory_notes, simulate

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
    assert before_wall[0].endswith(b'"out_of_range": []')  # only the wall clock and the date were cut off
    assert list(json.loads(Path("a.json").read_text()))[-2:] == ["sim_wall_s", "date"]
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
    even = make_requests(RunConfig(num_prompts=4, request_rate=10.0, burstiness=math.inf))
    assert [request.arrival_us for request in even] == pytest.approx([0.0, 1e5, 2e5, 3e5])
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


def test_a_window_of_a_trace_and_its_burstiness() -> None:
    Path("t.csv").write_text("arrival_s,prompt_tokens\n" + "".join(f"{i * i},{16 + i}\n" for i in range(11)))
    words = ["simulate", "--model", "tiny-opt", "--dataset-path", "t.csv", "--result-filename", "r.json"]
    words += ["--save-detailed", "--start", "9", "--duration", "40"]
    assert main(words) == 0
    plain = json.loads(Path("r.json").read_text())
    assert (plain["input_lens"], plain["start_times"]) == ([19, 20, 21, 22], [0.0, 7.0, 16.0, 27.0])
    assert (plain["trace_start_s"], plain["trace_duration_s"], plain["burstiness_scale"]) == (9.0, 40.0, 1.0)
    assert main([*words, "--num-prompts", "3", "--burstiness-scale", "2", "--request-rate", "1"]) == 0
    bent = json.loads(Path("r.json").read_text())
    first, second = bent["start_times"][1], bent["start_times"][2] - bent["start_times"][1]
    assert first + second == pytest.approx(2.0)  # two gaps at 1 request per second
    assert (second - first) / 2.0 == pytest.approx(2 * (9 - 7) / 16)  # the CV of two gaps, doubled


def test_a_trace_at_its_own_rate_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    Path("t.csv").write_text("0,16,7\n1,16,7\n")
    words = ["simulate", "--model", "tiny-opt", "--dataset-path", "t.csv", "--save-detailed", "--result-dir", "."]
    assert main(words) == 0
    assert "Request rate configured (RPS):                 as in the trace\n" in capsys.readouterr().out
    (file,) = Path().glob("simulated-trace-rate-tiny-opt-*.json")
    result = json.loads(file.read_text())
    assert (result["request_rate"], result["burstiness"]) == (None, None)
    assert (result["total_output_tokens"], result["output_throughput"], result["output_lens"]) == (0, 0.0, [0, 0])
    assert result["total_token_throughput"] == pytest.approx(32 / result["duration"])


def test_weights_that_do_not_fit_are_a_note(capsys: pytest.CaptureFixture[str]) -> None:
    from models.config import load_model
    from sim.spec import load_node

    note = "weights of 33 GB a GPU (opt-66b) do not fit the 16 GB of V100-16GB-SXM2"
    words = ["simulate", "--model", "opt-66b", "--num-prompts", "4", "--result-filename", "r.json"]
    assert main([*words, "--node", "v100-nvlink-x4"]) == 0
    result = json.loads(Path("r.json").read_text())
    assert result["weights_gb_per_gpu"] == pytest.approx(2 * load_model("opt-66b").num_parameters / 4e9)
    assert result["gpu_memory_gb"] == 16.0
    assert [line.startswith(note) for line in result["memory_notes"]] == [True]
    text = capsys.readouterr().out
    assert "Weights / memory of a GPU (GB):                32.8 / 16\n" in text
    assert f"caution: {note}" in text
    assert main(words) == 0
    assert json.loads(Path("r.json").read_text())["memory_notes"] == []
    assert "caution" not in capsys.readouterr().out
    node, config = load_node("v100-nvlink-x4"), load_model("opt-66b")
    silent = msgspec.structs.replace(node, device=msgspec.structs.replace(node.device, memory_gb=0.0))
    assert memory_notes(config, silent, layout_of("tensor", 4)) == []  # nobody said how much there is


def test_every_key_of_a_result_is_kept_from_metadata() -> None:
    Path("t.csv").write_text("0,16\n1,16\n")
    words = ["simulate", "--model", "tiny-opt", "--dataset-path", "t.csv", "--result-filename", "t.json"]
    assert main([*words, "--save-detailed", "--metric-percentiles", "0,99.99,0.000001"]) == 0
    keys = set(json.loads(Path("t.json").read_text())) | set(result_of("r.json", "--slo-ms", "2"))
    assert [key for key in sorted(keys) if not is_result_key(key)] == []
    assert not is_result_key("who")


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
        msgspec.structs.replace(base, start_s=1.0),
        msgspec.structs.replace(base, duration_s=1.0),
        msgspec.structs.replace(base, burstiness_scale=2.0),
        msgspec.structs.replace(base, dataset_name="csv", dataset_path=str(trace)),
    ]
    trace.write_text("0,5\n")
    hashes = {config_hash(config) for config in (base, *others)}
    assert len(hashes) == 9
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
