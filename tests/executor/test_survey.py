"""`weft measure` with real ranks on a CPU, and what it measures next on a machine that is a formula."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from executor.launch import launch
from executor.survey_lead import LOTS, Lead, make_tasks
from executor.survey_points import CPU, GPU, Point, Shapes, collective_points, compute_of, kernel_points, pair_points
from executor.survey_refine import candidates
from models.config import MODELS
from models.kernel import Kind
from models.transformer import BatchShape, Layout, function_vector
from traces.measurement import (
    SEEN,
    Conditions,
    Coordinates,
    Measurement,
    MeasurementLog,
    point_key,
    read_measurements,
)
from weft.cli import main, make_parser
from weft.measure_command import settings_of, shards_of

ROOT = Path(__file__).resolve().parents[2]
FAULTY = Path(__file__).with_name("faulty_survey.py")
CONDITIONS = Conditions(
    gpu="none", num_gpus=2, num_sms=0, driver="", torch="2", nccl="", link_mode="host", dtype="float32", weft="",
    date="2026-11-23",
)  # fmt: skip
OPT, GLM = (replace(MODELS[name], num_layers=6) for name in ("opt-30b", "glm-130b"))


def measured(folder: Path) -> dict[str, Measurement]:
    return {row.key: row for row in read_measurements(folder)[1]}


def kinds(rows: dict[str, Measurement]) -> Counter[str]:
    return Counter(row.what for row in rows.values())


ALONE = {"gemm", "attention", "elementwise", "sequence", "collective", "two_batches", "host"}


def test_two_ranks_measure_everything_that_a_cpu_can_and_go_on_where_they_were(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NCCL_P2P_DISABLE", raising=False)
    folder, words = tmp_path / "rows", ["--backend", "gloo", "--models", "tiny-opt,tiny-llama"]
    assert main(["measure", "--out", str(folder), "--budget-s", "3", *words]) == 0
    first = measured(folder)
    assert set(kinds(first)) == ALONE
    conditions, _ = read_measurements(folder)
    assert conditions.finished and (conditions.num_gpus, conditions.link_mode) == (2, "host")
    printed = capsys.readouterr().out
    assert f"{len(first)} rows" in printed and "threads of one host share its cores" in printed

    assert main(["measure", "--out", str(folder), "--budget-s", "1", *words]) == 0
    lines = (folder / "measurements.jsonl").read_text().splitlines()
    second = measured(folder)
    assert len(lines) == len(second) > len(first), "a point that was there was measured again"
    assert {key: second[key] for key in first} == first

    capsys.readouterr()
    assert main(["measure", "--out", str(folder), "--budget-s", "1", *words, "--dtype", "bfloat16"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "dtype is 'float32' there and 'bfloat16' here" in told
    assert read_measurements(folder)[0].finished


def test_only_the_kinds_that_are_asked_for_are_measured(tmp_path: Path) -> None:
    words = ["--backend", "gloo", "--models", "tiny-opt", "--budget-s", "2", "--disable-tqdm"]
    assert main(["measure", "--out", str(tmp_path), "--kinds", "attention, collective", *words]) == 0
    assert set(kinds(measured(tmp_path))) == {"attention", "collective"}


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_what_was_measured_survives_an_interrupt_and_a_kill(tmp_path: Path, sign: signal.Signals) -> None:
    command = [sys.executable, "-m", "weft.cli", "measure", "--out", str(tmp_path), "--backend", "gloo",
               "--models", "tiny-opt", "--budget-s", "60"]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    path, deadline = tmp_path / "measurements.jsonl", time.monotonic() + 60.0
    while not (path.exists() and path.stat().st_size > 20_000) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(sign)
    _, told = process.communicate(timeout=20)
    size = path.stat().st_size
    time.sleep(0.3)
    assert path.stat().st_size == size, "a rank goes on without its launcher"
    conditions, rows = read_measurements(tmp_path)
    assert rows and not conditions.finished
    if sign is not signal.SIGKILL:
        assert process.returncode == 130 and f"weft: interrupted; {len(rows)} rows are in" in told


def test_a_folder_that_another_one_measures_into_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with MeasurementLog(tmp_path, CONDITIONS):
        assert main(["measure", "--out", str(tmp_path), "--backend", "gloo", "--models", "tiny-opt"]) == 2
        assert capsys.readouterr().err == (
            f"weft: error: {tmp_path}: another weft writes there; wait until it has ended, or give another folder\n"
        )
    assert not read_measurements(tmp_path)[1]


@pytest.mark.parametrize("rank", ["all", "1"])
def test_a_kind_that_fails_is_skipped_with_its_reason_and_the_others_are_there(tmp_path: Path, rank: str) -> None:
    words = ["measure", "--out", str(tmp_path), "--backend", "gloo", "--models", "tiny-opt"]
    orders = json.dumps({"budget_s": 2.0})
    launch(
        settings_of(make_parser().parse_args(words)), program=(sys.executable, str(FAULTY), "attention", rank, orders)
    )
    found = kinds(measured(tmp_path))
    assert found["attention"] == 0 and found["gemm"] > 0 and found["elementwise"] > 0 and found["two_batches"] > 0
    skipped = json.loads((tmp_path / "manifest.json").read_text())["skipped"]["attention"]
    assert skipped == {"points": skipped["points"], "why": "RuntimeError: no kernel of attention is there"}
    assert skipped["points"] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--budget-s", "0"], "--budget-s 0 is not possible"),
        (["--budget-s", "inf"], "--budget-s inf is not possible"),
        (["--models", " , "], "names no model"),
        (["--models", "gpt-9"], "'gpt-9' is neither a file nor one of"),
        (["--layers", "5"], "--layers 5 is not possible: tiny-opt has 4 layers"),
        (["--ranks", "0"], "--ranks 0 is not possible"),
        (["--kinds", "pair,gem"], "--kinds gem is not a kind; there are gemm, attention"),
        (["--ranks", "1", "--kinds", "collective"],
         "--kinds collective is not possible with --ranks 1 and gloo: they need two ranks or more"),
        (["--ranks", "1", "--kinds", "pair,two_batches"], "is not possible with --ranks 1 and gloo: they need two"),
        (["--kinds", "pair"], "--kinds pair is not possible with --ranks 2 and gloo: threads of one host share"),
        (["--ranks", "3"], "cannot be divided over 3 ranks"),
        (["--link-mode", "host-staged"], "host-staged needs nccl"),
        (["--ranks", "2", "--tp", "4"], "--tp 4 is not possible with --ranks 2"),
        (["--ranks", "1", "--tp", "0"], "--tp 0 is not possible"),
        (["--ranks", "1", "--tp", "3"], "cannot be divided over 3 ranks"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(
    tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "rows"
    assert main(["measure", "--out", str(folder), "--backend", "gloo", *words]) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1
    assert not folder.exists()


def test_an_environment_that_contradicts_the_link_mode_is_told_and_left_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    assert main(["measure", "--out", str(tmp_path / "rows"), "--backend", "gloo", "--budget-s", "1"]) == 2
    assert "NCCL_P2P_DISABLE=1 is set" in capsys.readouterr().err
    assert os.environ["NCCL_P2P_DISABLE"] == "1"


@pytest.mark.parametrize("config", [OPT, GLM, replace(MODELS["llama-3-70b"], num_layers=6)])
def test_every_kernel_of_a_model_is_measured_in_its_own_shape(config: Any) -> None:
    shapes = Shapes(config, Layout(4, 1), 2)
    points = kernel_points(shapes, GPU)
    vector = function_vector(config, BatchShape(2, 128), Layout(4, 1))
    for kernel in vector.kernels:
        if kernel.kind is Kind.GEMM:
            # 256 rows are on the grid; the head has a row per sequence.
            at: Coordinates = {"name": kernel.name, "rows": kernel.rows, "cols": kernel.cols, "inner": kernel.inner,
                  "withheld_sms": 0, "element_bytes": 2, "cut": 1}  # fmt: skip
            assert point_key("gemm", at) in {point.key for point in points["gemm"]}
        elif not kernel.is_communication:
            rows = 2 if kernel.name == "final_norm" else 256
            same = [
                p.at for p in points[kernel.kind.value] if p.at["name"] == kernel.name and p.at["withheld_sms"] == 0
            ]
            assert any(at["bytes_moved"] == kernel.bytes_moved and at.get("rows", rows) == rows for at in same), kernel


def test_points_are_unique_and_bounded_by_the_largest_batch() -> None:
    for grid in (GPU, CPU):
        models = {c.model_id: Shapes(c, Layout(4, 1), 2) for c in (OPT, GLM)}
        points = [point for task in make_tasks(models, grid, 4, on_gpu=grid is GPU) for point in task.points]
        assert len({(p.key, p.model) for p in points}) == len(points)
        for point in points:
            if point.what in ("gemm", "elementwise"):
                batch = models[point.model].batch(str(point.at["name"]), int(point.at["rows"]))
                assert batch.rows <= grid.largest.rows and batch.num_sequences <= grid.largest.num_sequences


def test_the_compute_kernel_of_a_pair_is_one_that_is_measured_alone() -> None:
    shapes = Shapes(OPT, Layout(4, 1), 2)
    alone = {point.key for points in kernel_points(shapes, GPU).values() for point in points}
    for point in pair_points(shapes, GPU):
        if int(point.at["withheld_sms"]) in GPU.withheld[: GPU.light_withheld]:
            assert point_key(str(point.at["kind"]), compute_of(point.at)) in alone


def test_collectives_are_among_all_ranks_and_among_two_of_them() -> None:
    assert {p.at["num_ranks"] for p in collective_points(4, GPU)} == {2, 4}
    assert {p.at["num_ranks"] for p in collective_points(2, GPU)} == {2}
    assert {p.at["num_ranks"] for p in collective_points(3, GPU) if p.at["op"] == "all_reduce"} == {3}
    assert collective_points(1, GPU) == []


@dataclass
class Machine:
    """A machine whose times are a formula; measuring takes seconds of a clock of its own."""

    us: Callable[[Point], float]
    cost_s: float = 0.01
    now_s: float = 0.0
    rows: dict[str, Measurement] = field(default_factory=dict)
    order: list[Point] = field(default_factory=list)
    with_launches: bool = False

    def survey(self, models: dict[str, Shapes], budget_s: float) -> Lead:
        lead = Lead(
            make_tasks(models, GPU, 4, on_gpu=True), self.rows, models, GPU, budget_s, lambda: self.now_s,
            with_launches=self.with_launches,
        )  # fmt: skip
        for lot in lead.lots():
            assert len({(point.what, point.model) for point in lot}) == 1
            assert lot[0].what in SEEN or len(lot) <= LOTS.get(lot[0].what, 20)
            for point in lot:
                assert point.key not in self.rows, "measured twice"
                self.now_s += self.cost_s
                self.order.append(point)
                us = self.us(point)
                if not math.isnan(us):
                    names = ("us",) if point.what != "pair" else ("compute_slowdown", "comm_slowdown")
                    values = dict.fromkeys(names, us)
                    row = Measurement(point.what, point.at, values, dict.fromkeys(names, 1e-4 * us), 5)
                    self.rows[row.key] = row
                    lead.succeed(point)
                else:
                    lead.fail(point, "not a number")
        return lead


MODEL_SHAPES = {config.model_id: Shapes(config, Layout(4, 1), 2) for config in (OPT, GLM)}


def straight(point: Point) -> float:
    """Straight in logarithms along every axis, so that nothing between the points is in doubt."""
    axis = {"attention": "length", "collective": "bytes", "pair": "bytes"}.get(point.what, "rows")
    return math.sqrt(float(point.at.get(axis, 1)))


def stepped(point: Point) -> float:
    """The same with a step, which is worth finer points."""
    return straight(point) * (1.0 + 0.3 * (float(point.at.get("rows", 1)) > 300))


@pytest.mark.parametrize("budget_s", [1.5, 4.0, 12.0])
def test_a_short_budget_covers_every_kind_and_is_kept(budget_s: float) -> None:
    machine = Machine(straight)
    machine.survey(MODEL_SHAPES, budget_s)
    assert set(kinds(machine.rows)) == {*ALONE, "pair"}
    # At most one lot more than the clock allows.
    assert budget_s <= machine.now_s <= budget_s + 20 * machine.cost_s


def test_the_whole_coarse_grid_comes_before_anything_finer_and_a_straight_machine_needs_little_more() -> None:
    machine = Machine(straight)
    machine.survey(MODEL_SHAPES, 1e6)
    coarse = {point.key for task in make_tasks(MODEL_SHAPES, GPU, 4, on_gpu=True) for point in task.points}
    assert {point.key for point in machine.order[: len(coarse)]} == coarse
    # A curve of two points may bend in between; it is worth a third.
    finer = machine.order[len(coarse) :]
    assert {point.what for point in finer} == {"attention"} and len(finer) < 20


def test_a_survey_of_gpus_ends_with_how_its_gemms_and_collectives_are_launched() -> None:
    machine = Machine(stepped)
    machine.with_launches = True
    machine.survey(MODEL_SHAPES, 80.0)
    kinds_in_order = [point.what for point in machine.order]
    first = kinds_in_order.index("launch")
    assert set(kinds_in_order[first:]) == set(SEEN)

    def places(what: str) -> list[str]:
        return sorted(str(row.at) for row in machine.rows.values() if row.what == what)

    coarse = {point.key for task in make_tasks(MODEL_SHAPES, GPU, 4, on_gpu=True) for point in task.points}
    assert any(row.what == "gemm" and row.key not in coarse for row in machine.rows.values())
    assert places("gemm") == places("launch") and places("collective") == places("channels")
    # A survey that was cut off before that makes up for it, finer points and all; nothing is measured twice.
    before, cut_off = len(machine.order), {key: row for key, row in machine.rows.items() if row.what not in SEEN}
    machine.survey(MODEL_SHAPES, 0.0)
    assert len(machine.order) == before
    machine.rows = cut_off
    machine.survey(MODEL_SHAPES, 0.0)
    assert places("gemm") == places("launch") and places("collective") == places("channels")


def test_what_was_measured_before_is_not_measured_again_and_finer_points_of_then_count() -> None:
    machine = Machine(stepped)
    machine.survey(MODEL_SHAPES, 40.0)
    first = set(machine.rows)
    machine.survey(MODEL_SHAPES, 40.0)
    assert len(machine.order) == len(machine.rows) > len(first)


def test_a_step_is_closed_in_on() -> None:
    machine = Machine(lambda point: 100.0 if point.what == "gemm" and int(point.at["rows"]) > 300 else 50.0)
    machine.survey(MODEL_SHAPES, 1e6)
    curve = sorted(
        int(row.at["rows"]) for row in machine.rows.values()
        if row.what == "gemm" and row.at["name"] == "fc1" and row.at["withheld_sms"] == 0 and row.at["cols"] == 7168
    )  # fmt: skip
    assert 288 in curve and 304 in curve, "the step lies between these"
    assert len([rows for rows in curve if rows >= 1024]) == 2, "nothing happens there"


def test_a_kind_of_which_everything_fails_is_given_up_soon() -> None:
    machine = Machine(lambda point: float("nan") if point.what == "pair" else straight(point))
    lead = machine.survey(MODEL_SHAPES, 1e6)
    assert lead.skipped["pair"].why == "not a number"
    assert lead.skipped["pair"].points < 40
    assert kinds(machine.rows)["gemm"] > 400


@given(
    st.lists(st.sampled_from([16, 32, 64, 96, 128, 256, 384, 512, 1024, 2048]), min_size=2, unique=True),
    st.integers(0, 9),
    st.floats(0.05, 2.0),
)
@settings(derandomize=True, deadline=None, max_examples=60)
def test_doubt_is_largest_beside_what_is_out_of_line(sizes: list[int], place: int, off: float) -> None:
    shapes = MODEL_SHAPES["opt-30b"]
    sizes, points = sorted(sizes), []
    rows: dict[str, Measurement] = {}
    odd = sizes[place % len(sizes)]
    for size in sizes:
        point = Point("gemm", shapes.gemm("fc1", size, 0), "opt-30b")
        us = 10.0 * size * (1.0 + off * (size == odd))
        rows[point.key] = Measurement("gemm", point.at, {"us": us}, {"us": 0.0}, 5)
        points.append(point)
    found = candidates(points, rows, MODEL_SHAPES.get)
    for candidate in found:
        middle = int(candidate.point.at["rows"])
        assert sizes[0] < middle < sizes[-1] and middle not in sizes
    if found and len(sizes) > 3 and odd not in (sizes[0], sizes[-1]):
        best = int(found[0].point.at["rows"])
        low, high = max(s for s in sizes if s < best), min(s for s in sizes if s > best)
        near = sizes[max(0, sizes.index(odd) - 2) : sizes.index(odd) + 3]
        assert low in near and high in near


@pytest.mark.parametrize("name", [model.model_id for model in MODELS.values() if not model.num_heads % 4])
def test_one_rank_measures_the_kernels_of_one_of_four(name: str) -> None:
    model = replace(MODELS[name], num_layers=2)
    shard = Shapes(shards_of([model], 1, 4)[0], Layout(1, 1), 2, 4)
    of_four, of_one = (
        {what: {point.key for point in points} for what, points in kernel_points(shapes, GPU).items()}
        for shapes in (Shapes(model, Layout(4, 1), 2), shard)
    )
    for what in ("gemm", "attention", "elementwise", "sequence"):
        # The first rank of four holds as much of the embedding as the others, rounded up.
        assert {k for k in of_four[what] if "lm_head" not in k} == {k for k in of_one[what] if "lm_head" not in k}
