"""Validation of kernels, pairs and two batches where the truth is known: own measurements, nodes off by so much."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from calibration.compare import AS_IS, HOST_STAGED, Source, forward_rows, read_sources, schedule_name
from calibration.holdout import is_held_out
from calibration.validate_errors import Point, Target, line_of
from calibration.validate_ranking import rankings
from calibration.validate_two_batches import GraphWorld, run_plan, vector_of
from policy.batch import TICK_US
from policy.options import Options
from sim.believe import profile_of
from sim.cost import Costs
from sim.spec import FitSpec, NodeSpec, load_node, node_names
from tests.calibration.validation import (
    CELL,
    FORWARD,
    NODE,
    SCHEDULES,
    TODAY,
    batches_of,
    check,
    kernels_of,
    line,
    measured,
    one_error,
    slower_links,
)
from tests.worlds import changed, ideal_node
from traces.measurement import Conditions, file_hash, write_measurements
from weft.cli import main

DATA = FORWARD.parent.parent

# -- single kernels and pairs ---------------------------------------------------------------------------------------


def test_a_node_meets_its_own_measurements() -> None:
    found = check(NODE, Source("own", tuple(kernels_of(NODE)), AS_IS))
    for name in ("gemm", "collective", "compute slowdown", "comm slowdown", "start delay"):
        assert line(found, name).count > 0
        assert line(found, name).worst == pytest.approx(0.0, abs=1e-9)
    assert found.verdict == (4, 4)
    assert line(found, "gemm").spread == pytest.approx(1.0)
    assert not found.notes


def test_an_error_of_ten_per_cent_is_found_and_told_apart() -> None:
    source = Source("own", tuple(kernels_of(NODE)), AS_IS)
    found = check(slower_links(NODE, 1.1), source)
    collective = line(found, "collective")
    # The gap is not slower, so it is a little less than 10 % of what is measured.
    assert collective.typical == pytest.approx(10.0, rel=0.08)
    assert collective.bias == pytest.approx(collective.typical, rel=0.05)
    assert collective.met is False
    assert line(found, "gemm").worst == pytest.approx(0.0, abs=1e-9)
    slow = changed(NODE, "device", peak_tflops=NODE.device.peak_tflops / 1.1, hbm_gb_s=NODE.device.hbm_gb_s / 1.1,
                   sm_bandwidth_gb_s=NODE.device.sm_bandwidth_gb_s / 1.1)  # fmt: skip
    gemm = line(check(slow, source), "gemm")
    assert gemm.typical == pytest.approx(10.0, rel=0.2)
    assert gemm.met is False


def test_only_held_out_shapes_count_unless_all_are_asked_for() -> None:
    rows = kernels_of(NODE)
    held_out = [row for row in rows if row.what == "gemm" and is_held_out(row)]
    source = Source("own", tuple(rows), AS_IS)
    assert 0 < len(held_out) < 8
    assert line(check(NODE, source), "gemm").count == len(held_out)
    assert line(check(NODE, source, all_rows=True), "gemm").count == 8


def test_what_the_node_cannot_say_is_left_out_and_said() -> None:
    rows = [
        measured("collective", {"op": "all_reduce", "bytes": 2**22, "num_ranks": 3, "ctas": 0}, us=30.0),
        measured("collective", {"op": "all_reduce", "bytes": 2**22, "num_ranks": 4, "ctas": 5}, us=30.0),
    ]
    found = check(NODE, Source("own", (*rows, *kernels_of(NODE)), AS_IS), all_rows=True)
    assert line(found, "collective").count == 10
    assert "left out: 1 rows: node h200-nvlink-x4 has no all_reduce table for 3 ranks" in found.notes
    assert "left out: 1 rows: node h200-nvlink-x4 has no all_reduce table for 5 CTAs" in found.notes


def test_a_pass_is_left_out_for_its_model_or_for_its_elements() -> None:
    at = {"model": "tiny-llama", "num_layers": 2, "rows": 32, "length": 16, "num_ranks": 2}
    rows = [
        measured("sequence", at | {"element_bytes": 4}, us=30.0),
        measured("sequence", at | {"model": "gpt-9"}, us=30.0),
        measured("sequence", at | {"element_bytes": 2}, us=30.0),
    ]
    found = check(NODE, Source("own", tuple(rows), AS_IS), all_rows=True)
    assert line(found, "sequence").count == 1
    assert "left out: 1 rows: tiny-llama with elements of 4 bytes; models are described with 2" in found.notes
    assert "left out: 1 rows: no model is known as gpt-9" in found.notes


def test_pairs_without_priorities_are_told_apart() -> None:
    rows = kernels_of(NODE)
    plain = [replace(row, at=row.at | {"priority": 0}) for row in rows if row.what == "pair"]
    found = check(NODE, Source("own", (*rows, *plain), AS_IS), all_rows=True)
    assert line(found, "compute slowdown").count == line(found, "without priority").count == 8
    assert line(found, "without priority").target.typical is None


def test_what_lies_beyond_the_tables_is_said_briefly() -> None:
    rows = [
        measured("collective", {"op": "all_reduce", "bytes": 2**size, "num_ranks": 4, "ctas": 0}, us=1e4)
        for size in range(27, 32)
    ]
    [note] = check(NODE, Source("own", tuple(rows), AS_IS), all_rows=True).notes
    assert note.startswith("beyond what the node knows, so extrapolated: all_reduce of 1073741824 bytes, ")
    assert note.endswith("and 2 more")


def test_a_node_that_was_fitted_to_a_machine_describes_it() -> None:
    fit = FitSpec(date="2026-11-21", gpu="none", conditions={"link_mode": "host"}, measurements={}, ranges={},
                  digest=NODE.numbers_digest)  # fmt: skip
    source = replace(batches_of(NODE), gpu="none", link_mode="host")
    assert any("CPU processes" in note for note in check(NODE, source).notes)
    fitted = msgspec.structs.replace(NODE, fit=fit)
    assert not [note for note in check(fitted, source).notes if note.startswith("synthetic: foreign")]


def test_worst_and_percentile_are_of_the_points() -> None:
    points = [Point("", str(n), 100.0, 100.0 + n, 2.0) for n in range(11)]
    found = line_of("", "x", points, Target(4.0, 10.0))
    assert [found.typical, found.p90, found.worst] == pytest.approx([5.0, 9.0, 10.0])
    assert found.worst_at == "10"
    assert found.bias == pytest.approx(5.0)
    assert found.spread == pytest.approx(2.0)
    assert found.met is False
    # The mean may be fine where a single point is not.
    assert line_of("", "x", points, Target(6.0, 9.0)).met is False
    assert line_of("", "x", points, Target(6.0, 10.1)).met is True


# -- two batches ----------------------------------------------------------------------------------------------------


def test_one_batch_after_the_other_takes_what_its_kernels_take() -> None:
    node = ideal_node()
    cell = replace(CELL, num_ranks=4)
    alone = sum(Costs(node).solo_us(kernel) for kernel in vector_of(cell).kernels)
    world = GraphWorld(node)
    ticks = 2 * len(vector_of(cell).kernels) * TICK_US  # no gap is shorter than a tick
    assert world.makespan_us(cell, "serial")[0] == pytest.approx(2.0 * alone, rel=0.0, abs=ticks)
    parts = [world.makespan_us(cell, part)[0] for part in ("compute alone", "comm alone")]
    assert sum(parts) == pytest.approx(alone)
    # Small kernels of two batches share the SMs, so that even less than twice the computation of one is possible.
    assert alone < world.makespan_us(cell, "partition 0 ctas 0")[0] < 2.0 * alone


def test_no_host_is_in_a_graph() -> None:
    slow_host = changed(NODE, "host", launch_us=500.0, synchronize_us=500.0, graph_launch_us=500.0, plan_us=500.0)
    beliefs = {CELL.model: profile_of(NODE)}
    for schedule in ("serial", "policy", "partition 8 ctas 0"):
        fast, slow = (GraphWorld(node, beliefs).makespan_us(CELL, schedule) for node in (NODE, slow_host))
        assert fast == slow


def test_kernels_follow_one_another_as_in_a_graph() -> None:
    slow = changed(NODE, "device", kernel_gap_us=50.0)
    beliefs = {CELL.model: profile_of(NODE)}
    for schedule in ("serial", "partition 8 ctas 0"):
        near, far = (GraphWorld(node, beliefs).makespan_us(CELL, schedule) for node in (NODE, slow))
        assert near == far


def test_a_graph_waits_for_no_mark() -> None:
    """Who orders the lanes decides what a host waits for, which a graph does not."""
    world, options = GraphWorld(NODE), Options(batch_size=2, depth=2, adaptive=False, partition=8, comm_ctas=0)
    profile = profile_of(NODE)
    ends = set()
    for sync in ("hybrid", "cpu-gpu", "inter-stream"):
        chosen: Any = replace(options, sync=sync)
        ends.add(run_plan(world.graph_node, profile, CELL, "interleaved", chosen)[0].end_us)
    assert len(ends) == 1


def test_a_node_ranks_its_own_schedules_right() -> None:
    found = check(NODE, batches_of(NODE))
    assert line(found, "makespan").worst == pytest.approx(0.0, abs=1e-9)
    assert line(found, "gain over serial").worst == pytest.approx(0.0, abs=1e-9)
    for what in ("cells ranked right", "cells with the best chosen", "pairs in the right order"):
        assert line(found, what).typical == 100.0
    assert line(found, "cost of the choice").worst == 0.0
    assert found.verdict == (2, 2)


def test_a_node_that_is_off_by_ten_per_cent_still_ranks_right() -> None:
    found = check(NODE, batches_of(NODE, lambda us: us / 1.1))
    assert line(found, "makespan").typical == pytest.approx(10.0)
    assert line(found, "makespan").met is False
    assert line(found, "cells ranked right").met is True


def test_an_upside_down_world_is_ranked_wrong() -> None:
    times = [GraphWorld(NODE).makespan_us(CELL, schedule)[0] for schedule in SCHEDULES]
    assert len(set(times)) > 2
    top = max(times) + min(times)
    found = check(NODE, batches_of(NODE, lambda us: top - us))
    [ranking] = rankings(found.two_batches.cells)
    assert ranking.decided > 0
    assert ranking.right == 0
    assert not ranking.is_best
    assert ranking.regret == pytest.approx(max(times) / min(times) - 1.0)
    assert line(found, "cells ranked right").met is False
    assert line(found, "pairs in the right order").typical == 0.0


def test_what_the_hardware_cannot_tell_apart_is_not_held_against_the_simulator() -> None:
    times = [GraphWorld(NODE).makespan_us(CELL, schedule)[0] for schedule in SCHEDULES]
    top = max(times) + min(times)
    [ranking] = rankings(check(NODE, batches_of(NODE, lambda us: top - us, spread=top)).two_batches.cells)
    assert ranking.decided == 0
    assert ranking.is_best


def test_beliefs_beside_the_rows_make_the_plans(tmp_path: Path) -> None:
    table = {
        "name": "test", "partitions": [0, 32], "ctas": [0], "launch_us": 0.0, "pairs": [],
        "gemms": [{"name": name, "withheld": 0, "cols": [64], "rows": [32], "us": [[us]]}
                  for name, us in (("qkv_proj", 9.0), ("out_proj", 9.0), ("fc1", 9.0), ("fc2", 9.0), ("lm_head", 9.0))],
        "others": [{"name": name, "withheld": 0, "bytes": [1000], "us": [1.0]}
                   for name in ("attn_norm", "attention", "ffn_norm", "activation", "embedding", "final_norm")],
        "comms": [{"kind": kind, "ctas": 0, "bytes": [1000], "us": [1e-3]} for kind in ("all_reduce", "all_gather")],
    }  # fmt: skip
    conditions = Conditions("NVIDIA H200", 4, 132, "580", "2.11", "2.28", AS_IS, "float16", "0.1.0", "2026-11-21")
    write_measurements(tmp_path, conditions, batches_of(NODE).rows)
    (tmp_path / "profile-tiny-opt.json").write_text(json.dumps(table))
    [source] = read_sources(tmp_path, NODE)
    assert list(source.beliefs) == ["tiny-opt"]
    # Communication costs next to nothing in these beliefs, so overlap is not worth it: the policy runs serially.
    found = check(NODE, source)
    policy, serial = (found.two_batches.cells[replace(CELL, source=source.name)][name] for name in ("policy", "serial"))
    assert policy.predicted == pytest.approx(serial.predicted, rel=0.02)
    (tmp_path / "profile-tiny-opt.json").write_text("{}")
    with pytest.raises(ValueError, match=r"profile-tiny-opt\.json: not a profile table \(a profile table lacks 'name'"):
        read_sources(tmp_path, NODE)


# -- where rows come from -------------------------------------------------------------------------------------------


def test_committed_forward_rows_are_read_as_they_are() -> None:
    modes = forward_rows(FORWARD)
    first = json.loads(FORWARD.read_text().splitlines()[0])
    assert {mode: len(rows) for mode, rows in modes.items()} == {AS_IS: 14 * 15, HOST_STAGED: 7 * 15}
    us = {row.at["schedule"]: row.values["us"] for row in modes[AS_IS][:15]}
    assert us["partition 32 ctas 8"] == 1e3 * first["plans_ms"]["partition 32, CTAs 8"]
    assert us["partition 8 ctas 0"] == 1e3 * first["plans_ms"]["partition 8, CTAs default"]
    assert us["compute alone"] == 1e3 * first["compute_ms"]
    assert modes[AS_IS][0].at["length"] == 16
    [source] = read_sources(FORWARD.parent, NODE)
    assert (source.link_mode, source.gpu, source.measured_on) == (AS_IS, "NVIDIA H200", "2026-11-21")
    [other] = read_sources(FORWARD, load_node("h200-hoststaged-x4"))
    assert other.link_mode == HOST_STAGED


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", r"rows.jsonl:1: not JSON"),
        ('{"a": 1}\n', r"rows.jsonl:1: not a row of the GPU suite"),
        ('{"part": "probe"}\n', r"rows.jsonl: it has no forward rows"),
        ('\n{"part": "forward", "mode": "as-is", "serial_ms": 1}\n', r"rows.jsonl:2: not a forward row .*'model'"),
    ],
)
def test_broken_forward_rows_are_one_clear_line(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=words):
        read_sources(path, NODE)


def test_spelling_of_schedules() -> None:
    assert schedule_name("partition 8, CTAs default") == schedule_name("partition 8 ctas 0") == "partition 8 ctas 0"
    assert schedule_name("policy") == "policy"


def test_stale_foreign_and_unfinished_measurements_are_said() -> None:
    source = replace(batches_of(NODE), gpu="NVIDIA A100-SXM4-80GB", measured_on="2026-01-01", finished=False)
    notes = check(NODE, replace(source, link_mode=HOST_STAGED)).notes
    assert [note.split(": ")[1].split(";")[0] for note in notes] == ["unfinished", "foreign", "foreign",
                                                                     "stale"]  # fmt: skip
    assert "NVIDIA A100-SXM4-80GB" in notes[1]
    assert "host-staged" in notes[2]
    assert "325 days" in notes[3]


def fitted_to(measurements: dict[str, str]) -> NodeSpec:
    fit = FitSpec(date="2026-11-21", gpu="NVIDIA H200", conditions={"link_mode": AS_IS}, measurements=measurements,
                  ranges={}, digest=NODE.numbers_digest)  # fmt: skip
    return msgspec.structs.replace(NODE, fit=fit)


def test_measurements_that_changed_since_the_fit_are_said(tmp_path: Path) -> None:
    conditions = Conditions("NVIDIA H200", 4, 132, "580", "2.11", "2.28", AS_IS, "float16", "0.1.0", "2026-11-21")
    folder, file = tmp_path / "day" / "mine", tmp_path / "day" / "forward.jsonl"
    write_measurements(folder, conditions, batches_of(NODE).rows)
    file.write_bytes(FORWARD.read_bytes())

    def notes(path: Path, name: str, digest: str) -> list[str]:
        node = fitted_to({"before": "0", name: digest})
        return [note for source in read_sources(path, node) for note in source.notes(node, TODAY)]

    for path, rows, names in (
        (folder, folder / "measurements.jsonl", ("mine", "day/mine/measurements.jsonl")),
        (file, file, ("day/forward.jsonl",)),
    ):
        for name in names:
            [note] = notes(path, name, "1")
            assert note.startswith(f"{path}: changed since the fit") and note.endswith(f"under the name {name}")
            assert not notes(path, name, file_hash(rows))
            # Moved, or one of several of that name: what the node was fitted to all the same.
            assert not notes(path, "elsewhere", "1") and not notes(path, "elsewhere", file_hash(rows))


def test_shipped_nodes_know_the_measurements_that_they_were_fitted_to() -> None:
    for name in (name for name in node_names() if name.startswith("h200") and name.endswith("-fitted")):
        node = load_node(name)
        assert node.fit is not None
        paths = [DATA / key for key in node.fit.measurements if "/" in key]
        assert paths
        for path in paths:
            assert node.fit.measurements[str(path.relative_to(DATA))] == file_hash(path)
            for source in read_sources(path.parent if path.name == "measurements.jsonl" else path, node):
                assert not [note for note in source.notes(node, TODAY) if "changed since" in note]


def test_changed_measurements_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    conditions = Conditions("NVIDIA H200", 4, 132, "580", "2.11", "2.28", AS_IS, "float16", "0.1.0", "2026-11-21")
    write_measurements(tmp_path, conditions, kernels_of(NODE))
    rows = tmp_path / "measurements.jsonl"
    rows.write_text(rows.read_text().replace('"rows": 64', '"rows": 65'))
    found = tmp_path / "found"
    options = ["--node", "h200-nvlink-x4", "--measurements", str(tmp_path), "--out", str(found)]
    assert main(["validate", *options]) == 2
    assert "changed" in one_error(capsys) and not found.exists()
