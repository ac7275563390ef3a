from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from traces.measurement import (
    Conditions,
    Measurement,
    MeasurementLog,
    check_unwritten,
    point_key,
    read_measurements,
    write_measurements,
)

HERE = Conditions(
    gpu="H200", num_gpus=4, num_sms=132, driver="580", torch="2.11", nccl="2.28", link_mode="as-is", dtype="float16",
    weft="0.1.0", date="2026-11-21T12:00:00+00:00", environment={"NCCL_NVLS_ENABLE": "0"},
)  # fmt: skip

DATA = Path(__file__).resolve().parents[2] / "benchmarks" / "data"
PUBLISHED = sorted(path.parent.relative_to(DATA) for path in DATA.rglob("measurements.jsonl"))


def gemm(rows: int, us: float = 50.0) -> Measurement:
    at: dict[str, int | float | str] = {"name": "fc1", "rows": rows, "cols": 7168, "inner": 7168, "withheld_sms": 0}
    return Measurement("gemm", at, {"us": us}, {"us": 0.5}, 9)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "measurements.jsonl").read_text().splitlines()]


def rewrite(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "measurements.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@given(
    st.lists(
        st.builds(
            gemm, st.integers(1, 5000), st.floats(1e-3, 1e9, allow_nan=False)
        ), unique_by=lambda m: m.key, max_size=8,
    )
)  # fmt: skip
@settings(derandomize=True, deadline=None, max_examples=25)
def test_what_is_written_is_read(rows: list[Measurement]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_measurements(Path(folder), HERE, rows)
        conditions, found = read_measurements(Path(folder))
    assert found == rows
    assert conditions == replace(HERE, finished=True)


def test_an_unfinished_folder_is_readable_and_says_so(tmp_path: Path) -> None:
    with MeasurementLog(tmp_path, HERE) as log:
        log.append(gemm(16))
        # Readable while it is being written: every row is on disk at once.
        conditions, rows = read_measurements(tmp_path)
    assert not conditions.finished
    assert rows == [gemm(16)]
    assert read_measurements(tmp_path)[0].finished is False


def test_a_row_that_a_kill_tore_is_left_out_and_the_log_goes_on_behind_the_whole_ones(tmp_path: Path) -> None:
    with MeasurementLog(tmp_path, HERE) as log:
        log.append(gemm(16))
        log.append(gemm(32))
    path = tmp_path / "measurements.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    assert read_measurements(tmp_path)[1] == [gemm(16)]
    with MeasurementLog(tmp_path, HERE) as log:
        assert set(log.rows) == {gemm(16).key}
        log.append(gemm(64))
        log.finish("2026-11-22")
    conditions, rows = read_measurements(tmp_path)
    assert conditions.finished and rows == [gemm(16), gemm(64)]


def test_of_a_point_that_was_measured_again_the_last_row_counts(tmp_path: Path) -> None:
    write_measurements(tmp_path, HERE, [gemm(16, 50.0), gemm(32), gemm(16, 40.0)])
    assert read_measurements(tmp_path)[1] == [gemm(16, 40.0), gemm(32)]


def test_a_finished_folder_is_continued_and_is_unfinished_meanwhile(tmp_path: Path) -> None:
    write_measurements(tmp_path, HERE, [gemm(16)])
    with MeasurementLog(tmp_path, replace(HERE, date="another day")) as log:
        assert not read_measurements(tmp_path)[0].finished
        log.append(gemm(32))
        log.finish("2026-11-23", skipped={"pair": "out of memory"})
    assert [row.at["rows"] for row in read_measurements(tmp_path)[1]] == [16, 32]
    assert json.loads((tmp_path / "manifest.json").read_text())["rows"] == 2


def test_other_conditions_are_refused_in_one_line_that_names_the_difference(tmp_path: Path) -> None:
    write_measurements(tmp_path, HERE, [gemm(16)])
    with pytest.raises(ValueError, match="link_mode is 'as-is' there and 'host-staged' here"):
        MeasurementLog(tmp_path, replace(HERE, link_mode="host-staged"))
    with pytest.raises(ValueError, match="NCCL_NVLS_ENABLE is '0' there and not set here"):
        MeasurementLog(tmp_path, replace(HERE, environment={}))
    assert read_measurements(tmp_path)[0].finished, "a refusal must leave the folder as it was"


@pytest.mark.parametrize("name", ["measurements.jsonl", "conditions.json"])
def test_a_file_changed_after_the_end_is_noticed(tmp_path: Path, name: str) -> None:
    write_measurements(tmp_path, HERE, [gemm(16, 50.0)])
    path = tmp_path / name
    path.write_text(path.read_text().replace("50.0", "49.0").replace('"num_sms": 132', '"num_sms":  132'))
    with pytest.raises(ValueError, match=f"{name}: the file was changed"):
        read_measurements(tmp_path)


def test_what_lies_beside_the_rows_is_guarded_too_and_what_comes_later_is_free(tmp_path: Path) -> None:
    with MeasurementLog(tmp_path, HERE) as log:
        log.append(gemm(16))
        (tmp_path / "profile-opt.json").write_text("{}")
        log.finish("2026-11-22")
    (tmp_path / "report.json").write_text("{}")
    assert read_measurements(tmp_path)[0].finished
    (tmp_path / "profile-opt.json").write_text("{ }")
    with pytest.raises(ValueError, match=r"profile-opt.json: the file was changed"):
        read_measurements(tmp_path)


def test_a_row_of_another_machine_is_noticed(tmp_path: Path) -> None:
    for number, gpu in enumerate(("H200", "A100")):
        write_measurements(tmp_path / gpu, replace(HERE, gpu=gpu), [gemm(16 << number)])
    (tmp_path / "H200" / "manifest.json").unlink()
    rewrite(tmp_path / "H200", lines(tmp_path / "H200") + lines(tmp_path / "A100"))
    with pytest.raises(ValueError, match=r"measurements.jsonl:2: the row was measured under other conditions"):
        read_measurements(tmp_path / "H200")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"what": "gem"}, "what is 'gem'"),
        ({"at": {"name": "fc1", "rows": 16, "cols": 8}}, "needs 'inner'"),
        ({"at": [1]}, "at is"),
        ({"values": {"us": 0.0}}, "us is 0.0; it must be above 0"),
        ({"values": {"us": -3.0}}, "above 0"),
        ({"values": {"us": "5"}}, "values is"),
        ({"values": {}}, "values is"),
        ({"values": {"ms": 5.0}, "spread": {"ms": 0.1}}, "a row of gemm needs 'us' in values"),
        ({"what": "launch"}, "a row of launch needs 'ctas' in values"),
        ({"what": "launch", "values": {"ctas": 132.0}, "spread": {"ctas": 0.0}}, "needs 'ctas_per_sm' in values"),
        ({"spread": {"ms": 0.1}}, "spread has ms where values has us"),
        ({"repetitions": 0}, "repetitions is 0"),
    ],
)
def test_broken_rows_are_named_by_file_and_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with MeasurementLog(tmp_path, HERE) as log:
        log.append(gemm(16))
        log.append(gemm(32))
    rows = lines(tmp_path)
    rewrite(tmp_path, [rows[0], rows[1] | change])
    with pytest.raises(ValueError, match=f"measurements.jsonl:2: .*{message}"):
        read_measurements(tmp_path)


COMPUTES = {"compute": "fc1", "kind": "gemm", "rows": 32, "cols": 64, "inner": 64}
COMM = {"op": "all_reduce", "bytes": 4096, "num_ranks": 2, "ctas": 0}
POINTS: dict[str, dict[str, Any]] = {
    "gemm": {"name": "fc1", "rows": 16, "cols": 64, "inner": 64, "withheld_sms": 0, "element_bytes": 2, "cut": 1},
    "attention": {"name": "attention", "num_sequences": 2, "length": 16, "num_heads": 4, "head_dim": 64, "flops": 1e6,
                  "bytes_moved": 4096.0, "num_ctas": 8, "context_len": 0},
    "elementwise": {"name": "norm", "rows": 16, "bytes_moved": 4096, "num_ctas": 1, "variant": "layer norm"},
    "sequence": {"model": "tiny-opt", "num_layers": 2, "rows": 32, "length": 16, "num_ranks": 1},
    "two_batches": {"model": "tiny-opt", "num_layers": 2, "rows": 32, "length": 16, "schedule": "serial"},
    "collective": COMM,
    "channels": COMM,
    "pair": COMPUTES | COMM | {"withheld_sms": 16, "priority": 1},
    "host": {"name": "issue_graph"},
}  # fmt: skip


def point(what: str, **change: int | float | str) -> Measurement:
    """A row that is right in all but what is changed."""
    at: dict[str, Any] = {**POINTS[what], **change}
    values = {"pair": {"comm_slowdown": 1.5}, "channels": {"ctas": 16.0}}.get(what, {"us": 50.0})
    return Measurement(what, at, values, dict.fromkeys(values, 0.1), 9)


def test_rows_of_every_kind_are_read(tmp_path: Path) -> None:
    rows = [point(what) for what in POINTS]
    beside: dict[str, Any] = COMM | {"withheld_sms": 0, "priority": 0}
    for what in ("attention", "elementwise"):
        rows.append(Measurement("pair", {"compute": what, "kind": what, **POINTS[what], **beside},
                                {"comm_slowdown": 1.5}, {"comm_slowdown": 0.1}, 9))  # fmt: skip
    write_measurements(tmp_path, HERE, rows)
    assert read_measurements(tmp_path)[1] == rows


@pytest.mark.parametrize(
    ("what", "change", "message"),
    [
        ("gemm", {"rows": -5}, "rows is -5; it must be a whole number, 1 or more"),
        ("gemm", {"rows": 10**400}, "at is .*; it must be an object of numbers and texts"),
        ("gemm", {"cols": 1.5}, "cols is 1.5; it must be a whole number, 1 or more"),
        ("gemm", {"cols": "many"}, "cols is 'many'; it must be a whole number, 1 or more"),
        ("gemm", {"inner": 0}, "inner is 0; it must be a whole number, 1 or more"),
        ("gemm", {"name": 5}, "name is 5; it must be a text"),
        ("gemm", {"cut": 0}, "cut is 0; it must be a whole number, 1 or more"),
        ("gemm", {"element_bytes": 0}, "element_bytes is 0; it must be a whole number, 1 or more"),
        ("gemm", {"withheld_sms": -8}, "withheld_sms is -8; it must be a whole number, 0 or more"),
        ("gemm", {"withheld_sms": 132}, "withheld_sms is 132; it must be below the 132 SMs that the GPU has"),
        ("attention", {"length": 0}, "length is 0; it must be a whole number, 1 or more"),
        ("attention", {"num_ctas": 0}, "num_ctas is 0; it must be a whole number, 1 or more"),
        ("attention", {"flops": 0.0}, "flops is 0.0; it must be a number above 0"),
        ("elementwise", {"rows": 0}, "rows is 0; it must be a whole number, 1 or more"),
        ("elementwise", {"bytes_moved": 0}, "bytes_moved is 0; it must be a whole number, 1 or more"),
        ("sequence", {"num_layers": 0}, "num_layers is 0; it must be a whole number, 1 or more"),
        ("two_batches", {"length": -16}, "length is -16; it must be a whole number, 1 or more"),
        ("two_batches", {"schedule": 8}, "schedule is 8; it must be a text"),
        ("collective", {"bytes": 0}, "bytes is 0; it must be a whole number, 1 or more"),
        ("collective", {"bytes": -4096}, "bytes is -4096; it must be a whole number, 1 or more"),
        ("collective", {"num_ranks": 1}, "num_ranks is 1; it must be a whole number, 2 or more"),
        ("collective", {"ctas": -4}, "ctas is -4; it must be a whole number, 0 or more"),
        ("collective", {"op": "all_reduced"}, "op is 'all_reduced'; it must be one of all_reduce, all_gather, send"),
        ("channels", {"num_ranks": 1}, "num_ranks is 1; it must be a whole number, 2 or more"),
        ("pair", {"num_ranks": 1}, "num_ranks is 1; it must be a whole number, 2 or more"),
        ("pair", {"op": "send"}, "op is 'send'; it must be one of all_reduce, all_gather"),
        ("pair", {"priority": "high"}, "priority is 'high'; it must be one of 0, 1"),
        ("pair", {"kind": "foo"}, "kind is 'foo'; it must be one of gemm, attention, elementwise"),
        ("pair", {"kind": "collective"}, "kind is 'collective'; it must be one of gemm, attention, elementwise"),
        ("pair", {"kind": "attention"}, "a pair of kind attention needs 'num_sequences' in at"),
        ("pair", {"kind": "elementwise"}, "a pair of kind elementwise needs 'bytes_moved' in at"),
        ("host", {"name": "launcher"}, "name is 'launcher'; it must be one of launch, collective_launch, event"),
    ],
)
def test_what_a_coordinate_cannot_be_is_named_by_file_and_line(
    tmp_path: Path, what: str, change: dict[str, Any], message: str
) -> None:
    write_measurements(tmp_path, HERE, [gemm(16), point(what, **change)])
    with pytest.raises(ValueError, match=f"measurements.jsonl:2: {message}"):
        read_measurements(tmp_path)


def test_a_pair_without_its_kernels_shape_is_named_by_file_and_line(tmp_path: Path) -> None:
    row = point("pair")
    del row.at["cols"]
    write_measurements(tmp_path, HERE, [row])
    with pytest.raises(ValueError, match=r"measurements.jsonl:1: a pair of kind gemm needs 'cols' in at"):
        read_measurements(tmp_path)


def test_sms_that_nobody_counted_bound_nothing(tmp_path: Path) -> None:
    write_measurements(tmp_path, replace(HERE, num_sms=0), [point("gemm", withheld_sms=200)])
    assert read_measurements(tmp_path)[1]


@pytest.mark.parametrize("folder", PUBLISHED, ids=str)
def test_all_that_was_published_is_read(folder: Path) -> None:
    assert read_measurements(DATA / folder)[1]


def test_a_line_that_is_no_json_and_a_number_that_is_none_are_broken(tmp_path: Path) -> None:
    with MeasurementLog(tmp_path, HERE) as log:
        log.append(gemm(16))
    path = tmp_path / "measurements.jsonl"
    whole = path.read_text()
    path.write_text("{\n" + whole)
    with pytest.raises(ValueError, match=r"measurements.jsonl:1: not JSON"):
        read_measurements(tmp_path)
    path.write_text(whole.replace("50.0", "NaN"))
    with pytest.raises(ValueError, match=r"measurements.jsonl:1: values is"):
        read_measurements(tmp_path)


def test_a_folder_without_conditions_or_with_foreign_ones_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"it has no conditions.json"):
        read_measurements(tmp_path)
    (tmp_path / "conditions.json").write_text('{"gpu": "H200"}')
    with pytest.raises(ValueError, match="'num_gpus' is missing or unknown"):
        read_measurements(tmp_path)


def test_rows_whose_conditions_are_gone_are_nobodys(tmp_path: Path) -> None:
    write_measurements(tmp_path, HERE, [gemm(16)])
    (tmp_path / "conditions.json").unlink()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"it has measurements.jsonl but no conditions.json"):
        MeasurementLog(tmp_path, HERE)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_has_one_log_at_a_time(tmp_path: Path) -> None:
    with MeasurementLog(tmp_path, HERE) as log:
        log.append(gemm(16))
        for refused in (lambda: MeasurementLog(tmp_path, HERE), lambda: check_unwritten(tmp_path)):
            with pytest.raises(ValueError, match=f"{tmp_path}: another weft writes there"):
                refused()
        log.append(gemm(32))
        log.finish("2026-11-22")
    check_unwritten(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "conditions.json", "manifest.json", "measurements.jsonl"
    ]  # fmt: skip
    with pytest.raises(ValueError, match="link_mode"):
        MeasurementLog(tmp_path, replace(HERE, link_mode="host-staged"))
    with MeasurementLog(tmp_path, HERE) as log:  # neither the first nor the refused one holds it any more
        assert len(log.rows) == 2


def test_a_killed_log_holds_nothing(tmp_path: Path) -> None:
    code = (
        "import os, sys, pathlib; from tests.traces.test_measurement import HERE, MeasurementLog, gemm\n"
        "log = MeasurementLog(pathlib.Path(sys.argv[1]), HERE); log.append(gemm(16)); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=DATA.parents[1])
    with MeasurementLog(tmp_path, HERE) as log:
        assert list(log.rows.values()) == [gemm(16)]


def test_a_point_is_known_by_its_coordinates_in_any_order() -> None:
    assert point_key("gemm", {"rows": 1, "cols": 2}) == point_key("gemm", {"cols": 2, "rows": 1})
    assert point_key("gemm", {"rows": 1, "cols": 2}) != point_key("gemm", {"rows": 2, "cols": 1})
