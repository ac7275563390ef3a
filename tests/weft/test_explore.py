"""`weft explore`: rates up to saturation, equal bytes, going on after an interrupt, the numbers of the region."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from weft import backends, explore_command
from weft.backends import Backend
from weft.bound import ideal_bound
from weft.cli import main
from weft.explore import COMMON_LOADS, OWN_LOADS, Curve, Region, Study, envelope, explore
from weft.region_plot import conditions, spread, write_region
from weft.region_table import region_table
from weft.runs import RunConfig, simulate
from weft.store import Store

ROOT = Path(__file__).resolve().parents[2]
TINY = RunConfig(model="tiny-opt", num_prompts=30)
STUDY = Study(TINY, ("tensor", "pipeline", "interleaved"), ("tiny-opt",))
HERE = Backend(jobs=1)
WORDS = ["explore", "--model", "tiny-opt", "--num-prompts", "30", "--policy", "tensor", "pipeline", "-j", "1"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def region(tmp_path_factory: pytest.TempPathFactory) -> Region:
    return explore(STUDY, Store(tmp_path_factory.mktemp("region") / "r.jsonl"), HERE)[0]


def curve(policy: str, capacity: float, *points: tuple[float, float]) -> Curve:
    """A policy whose every percentile is the same: (throughput, latency) points."""
    rows = [
        {"request_rate": x, "request_throughput": x, **{f"p{p}_e2el_ms": y for p in (50, 90, 99)}} for x, y in points
    ]
    return Curve(policy, capacity, tuple(rows))


def test_every_policy_is_followed_from_light_load_to_saturation(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    (region,) = explore(STUDY, Store(folder / "r.jsonl"), HERE, lambda done, planned: seen.append((done, planned)))
    assert [c.policy for c in region.curves] == list(STUDY.policies)
    assert region.loads == tuple(float(f"{share * region.reference.capacity:.3g}") for share in COMMON_LOADS)
    for c in region.curves:
        alone = simulate(RunConfig(model="tiny-opt", num_prompts=30, policy=c.policy, request_rate=float("inf")))
        assert c.capacity == alone.result["request_throughput"]
        rates = [row["request_rate"] for row in c.rows]
        assert rates == sorted(set(rates))
        assert rates[-1] == pytest.approx(OWN_LOADS[-1] * c.capacity, rel=5e-3)
        assert set(rates) >= {load for load in region.loads if load < c.capacity}
        assert {row["seed"] for row in c.rows} == {0}
    assert seen[-1][0] == seen[-1][1] == len(Store(folder / "r.jsonl").rows)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_equal_runs_give_equal_csv_and_picture(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for out in ("a", "b"):
        assert main([*WORDS, "--out", out, "--format", "png", "pdf", "svg"]) == 0
    for name in ("results.csv", "region.png", "region.pdf", "region.svg"):
        assert (folder / "a" / name).read_bytes() == (folder / "b" / name).read_bytes(), name
    text = capsys.readouterr().out
    assert "tiny-opt on a100-pcie-x4, simulated" in text
    assert "wrote a/region.png" in text
    assert (folder / "a" / "region.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "a" / "region.pdf").read_bytes().startswith(b"%PDF")
    with (folder / "a" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["policy"] for row in rows} == {"tensor", "pipeline"}
    assert "sim_wall_s" not in rows[0]


def count_runs(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """Every configuration that is really simulated from now on."""
    done: list[RunConfig] = []
    original = backends.run_all

    def counted(function: Any, items: Any, backend: Backend) -> Any:
        done.extend(items)
        return original(function, items, backend)

    monkeypatch.setattr("weft.explore.run_all", counted)
    return done


def test_a_second_call_simulates_nothing_and_a_wider_one_what_is_new(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(WORDS) == 0
    csv_before = (folder / "weft-explore" / "results.csv").read_bytes()
    done = count_runs(monkeypatch)
    assert main(WORDS) == 0
    assert done == []
    assert (folder / "weft-explore" / "results.csv").read_bytes() == csv_before
    assert main([*WORDS, "--policy", "tensor", "pipeline", "hybrid"]) == 0
    assert {run.policy for run in done} == {"hybrid"}
    done.clear()
    assert main([*WORDS, "--fresh"]) == 0
    assert {run.policy for run in done} == {"tensor", "pipeline"}


def test_results_of_other_code_are_not_believed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main([*WORDS, "--request-rate", "100"]) == 0
    monkeypatch.setattr("weft.store.code_hash", lambda: "edited")
    done = count_runs(monkeypatch)
    assert main([*WORDS, "--request-rate", "100"]) == 0
    assert len(done) == 4


def test_a_line_that_a_kill_cut_off_is_run_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(WORDS) == 0
    file = folder / "weft-explore" / "results.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:-40])
    done = count_runs(monkeypatch)
    assert main(WORDS) == 0
    assert len(done) == 1
    lines = file.read_bytes().splitlines()
    assert len(lines) == len(whole.splitlines())
    assert all(json.loads(line) for line in lines)


def test_a_broken_line_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "weft-explore"
    out.mkdir()
    (out / "results.jsonl").write_text('{"config_hash": "x", "code_hash": "y"}\n{"policy": 3}\n')
    assert main(WORDS) == 2
    assert "weft-explore/results.jsonl:2: not a result of this command" in capsys.readouterr().err
    assert [file.name for file in out.iterdir()] == ["results.jsonl"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_stopped_from_outside_it_goes_on_where_it_was(folder: Path, number: signal.Signals, code: int) -> None:
    words = [sys.executable, "-m", "weft.cli", "explore", "--model", "tiny-opt", "--num-prompts", "500"]
    words += ["--policy", "tensor", "hybrid", "-j", "1", "--out", str(folder / "out")]
    file = folder / "out" / "results.jsonl"

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    with start() as process:
        deadline = time.monotonic() + 60
        while not (file.exists() and file.read_bytes().count(b"\n") >= 3) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    assert process.returncode == code
    kept = file.read_bytes()
    assert kept.count(b"\n") >= 3
    assert not (folder / "out" / "region.png").exists()
    if number == signal.SIGINT:
        assert said.count("\n") == 1
        assert "weft: interrupted;" in said
        assert "the same command goes on from there" in said
    with start() as process:
        _, said = process.communicate(timeout=120)
    assert (process.returncode, said) == (0, "")
    after = file.read_bytes()
    assert after.startswith(kept[: kept.rfind(b"\n") + 1])
    keys = [json.loads(line)["config_hash"] for line in after.splitlines()]
    assert len(keys) == len(set(keys))


def test_several_processes_give_what_one_gives(region: Region, folder: Path) -> None:
    (together,) = explore(STUDY, Store(folder / "b.jsonl"), Backend(jobs=2))

    def numbers(region: Region) -> list[dict[str, Any]]:
        return [{**row, "sim_wall_s": 0} for c in region.curves for row in c.rows]

    assert numbers(region) == numbers(together)


def test_rates_given_are_the_rates_run(folder: Path) -> None:
    (region,) = explore(Study(TINY, ("tensor",), ("tiny-opt",), rates=(300.0, 100.0)), Store(folder / "r"), HERE)
    assert sorted(row["request_rate"] for row in region.curves[0].rows) == [100.0, 300.0]
    assert region.loads == (100.0, 300.0)


def test_no_interleaving_crosses_the_ideal_bound(folder: Path) -> None:
    for node in ("a100-pcie-x4", "h200-nvlink-x4"):
        for policy in ("tensor", "interleaved"):
            config = RunConfig(model="opt-30b", node=node, policy=policy, num_prompts=40, request_rate=float("inf"))
            assert simulate(config).result["request_throughput"] < ideal_bound(config)


def test_envelope_is_the_lowest_curve_and_nothing_beyond() -> None:
    low_first = curve("tensor", 12.0, (1.0, 10.0), (10.0, 100.0))
    low_later = curve("pipeline", 22.0, (1.0, 50.0), (20.0, 50.0))
    lowest = envelope([low_first, low_later], 90, np.array([0.5, 1.0, 5.5, 10.0, 15.0, 20.0, 20.5]))
    expected = [np.nan, 10.0, 10.0**1.5, 50.0, 50.0, 50.0, np.nan]
    np.testing.assert_allclose(lowest, expected)


@pytest.mark.parametrize(("slo", "best"), [(5.0, 0.0), (10.0, 1.0), (55.0, 5.5), (100.0, 10.0), (500.0, 10.0)])
def test_the_most_within_an_slo(slo: float, best: float) -> None:
    assert curve("tensor", 12.0, (1.0, 10.0), (10.0, 100.0)).best_under(slo, 90) == pytest.approx(best)


def test_labels_keep_their_order_and_never_touch() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        num = int(rng.integers(1, 6))
        wanted, widths = sorted(rng.uniform(0, 30, num).tolist()), rng.uniform(1, 5, num).tolist()
        places = spread(wanted, widths, 0.5, 31.0)
        gaps = [b - a - (v + w) / 2 for a, b, v, w in zip(places, places[1:], widths, widths[1:], strict=False)]
        assert all(gap >= 0.5 - 1e-6 for gap in gaps)
    assert spread([5.0, 20.0], [2.0, 2.0], 0.5, 30.0) == [5.0, 20.0]


def test_the_table_shows_the_runs(region: Region) -> None:
    lines = region_table(region, 90, slo_ms=3.0)
    tensor = next(line for line in lines if line.startswith("tensor"))
    row = region.reference.at(region.loads[-1])
    assert row is not None
    assert tensor.split()[1] == f"{region.reference.capacity:.1f}"
    assert tensor.split()[-2].split("/")[1] == f"{row['p90_e2el_ms']:.1f}" or row["p90_e2el_ms"] < 2
    assert any("estimates, not measurements" in line for line in lines)
    assert any(line.startswith("pipeline: ") and "x the capacity of tensor" in line for line in lines)


@pytest.mark.parametrize("percentile", [50, 90, 99])
@pytest.mark.parametrize("slo_ms", [None, 0.001, 3.0, 1e6])
def test_any_percentile_and_slo_can_be_drawn(
    region: Region, folder: Path, percentile: int, slo_ms: float | None
) -> None:
    write_region(region, [folder / "r.png"], percentile, slo_ms)
    assert (folder / "r.png").stat().st_size > 20_000


def test_one_curve_with_one_run_can_be_drawn(region: Region, folder: Path) -> None:
    only = Curve("mine", 9.0, region.curves[0].rows[:1])
    write_region(Region(region.place, (only,), (1.0,), 1e9), [folder / "r.png"])
    assert (folder / "r.png").stat().st_size > 20_000


def test_a_cut_trace_and_a_node_that_is_too_small_are_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("t.csv").write_text("arrival_s,prompt_tokens\n" + "".join(f"{i},16\n" for i in range(30)))
    words = ["explore", "--model", "opt-66b", "--node", "v100-nvlink-x4", "--policy", "tensor", "pipeline", "-j", "1"]
    words += ["--request-rate", "4", "--dataset-path", "t.csv", "--start", "3", "--duration", "8", "--out", "o"]
    assert main(words) == 0
    assert capsys.readouterr().out.count("caution: weights of 33 GB a GPU") == 1
    with (folder / "o" / "results.csv").open() as file:
        assert {row["num_prompts"] for row in csv.DictReader(file)} == {"8"}
    place = RunConfig(dataset_name="csv", dataset_path="t.csv", start_s=3.0, duration_s=8.0, burstiness_scale=2.0)
    row = {"num_prompts": 8, "num_shortened": 0, "policy_options": ""}
    region = Region(place, (Curve("tensor", 1.0, (row,)),), (1.0,), 1.0)
    assert conditions(region).startswith("8 requests of t.csv from 3 s for 8 s, CV x 2, rate scaled")


def test_a_picture_per_model_and_node(folder: Path) -> None:
    words = ["explore", "--model", "tiny-opt", "tiny-glm", "--node", "a100-pcie-x4", "--policy", "tensor", "-j", "1"]
    assert main([*words, "--num-prompts", "10", "--request-rate", "50", "--out", "o"]) == 0
    names = {file.name for file in (folder / "o").iterdir()}
    assert names >= {"region-tiny-opt-a100-pcie-x4.png", "region-tiny-glm-a100-pcie-x4.png"}


def test_an_unreachable_dask_scheduler_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("distributed", reason="Dask is an extra: pip install 'weft[dask]'")
    assert main([*WORDS, "--backend", "dask", "--scheduler", "tcp://127.0.0.1:1"]) == 2
    assert "no Dask scheduler answers at 'tcp://127.0.0.1:1'" in capsys.readouterr().err


def test_demo_explores_the_four_policies(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Study] = []

    def note(study: Study, backend: Backend, output: explore_command.Output) -> int:
        study.check()
        asked.append(study)
        assert str(output.folder) == "weft-demo"
        return 0

    monkeypatch.setattr(explore_command, "explore_and_report", note)
    assert main(["demo"]) == 0
    assert asked[0].policies == ("tensor", "pipeline", "hybrid", "interleaved")
    assert (asked[0].models, asked[0].nodes) == (("glm-130b",), ("a100-pcie-x4",))


def test_models_of_one_file_name_get_pictures_of_their_own(tmp_path: Path) -> None:
    names = explore_command._pictures(
        [("a/config.json", "x"), ("b/config.json", "x"), ("qwen2.5-32b", "n/node.toml"), ("qwen2.5-32b", "m/node.toml")]
    )
    assert names == ["region-a-x", "region-b-x", "region-qwen2.5-32b-node", "region-qwen2.5-32b-node-2"]


def test_two_explores_do_not_write_one_file(tmp_path: Path) -> None:
    one, other = Store(tmp_path / "results.jsonl"), Store(tmp_path / "results.jsonl")
    with one.locked(), pytest.raises(ValueError, match="another weft writes there"), other.locked():
        pass
    with other.locked():
        pass


def test_what_cannot_be_written_is_known_before_the_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "region.png").mkdir()
    assert main(["explore", "--model", "llama-3-8b", "--out", str(tmp_path)]) == 2
    assert "region.png is a folder" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [tmp_path / "region.png"]
