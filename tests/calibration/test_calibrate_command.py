"""`weft calibrate` as a user meets it: a folder in, a node file, a report and pictures out; mistakes are one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from calibration.fit import STAGES
from policy.profile_table import profile_from
from sim.spec import load_node
from tests.calibration.synthetic import Surveyor, truth
from traces.measurement import ROWS, Conditions, write_measurements
from weft.calibrate_command import on_machine
from weft.cli import main

CONDITIONS: dict[str, Any] = {
    "gpu": "NVIDIA H200", "num_gpus": 4, "num_sms": 132, "driver": "580", "torch": "2.11", "nccl": "2.28",
    "link_mode": "as-is", "dtype": "float16", "weft": "0.1.0", "date": "2026-11-21",
}  # fmt: skip


# A fit takes minutes where several share a slow core.
pytestmark = pytest.mark.timeout(900)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    surveyor = Surveyor(truth())
    rows = [*surveyor.gemms((16, 256, 1024), cuts=(1,)), *surveyor.collectives(), *surveyor.pairs((256,))[::6]]
    return survey(tmp_path / "survey", rows=[*rows, *surveyor.others()[::3]])


def survey(path: Path, rows: list[Any], **changes: Any) -> Path:
    write_measurements(path, Conditions(**(CONDITIONS | changes)), rows)
    return path


def test_a_node_a_report_and_pictures(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, report = tmp_path / "mine.toml", tmp_path / "report"
    assert main(["calibrate", str(folder), "--out", str(out), "--report", str(report)]) == 0
    said = capsys.readouterr().out
    assert "held out" in said and "gemm_efficiency" in said and "not determined" in said
    load_node.cache_clear()
    node = load_node(str(out))
    assert (node.name, node.num_gpus) == ("mine", 4)
    assert node.fit is not None
    assert node.fit.measurements.keys() == {"survey"}
    assert node.fit.conditions["link_mode"] == "as-is"
    assert json.loads((report / "report.json").read_text())["errors"]["gemm"]["held_out"]["mean"] < 0.06
    assert (report / "report.txt").read_text() in said
    for kind in ("gemm", "collective", "elementwise", "attention", "pair-compute", "pair-comm", "pair-delay"):
        assert (report / f"{kind}.png").read_bytes().startswith(b"\x89PNG")
    profiles = list(report.glob("profile-*.json"))
    assert profiles
    profile_from(json.loads(profiles[0].read_text()))
    # The node runs, and says what it does not know and that it was changed.
    text = out.read_text(encoding="utf-8")
    out.write_text(text.replace("event_gap_us = 1.0", "event_gap_us = 1.5"), encoding="utf-8")
    load_node.cache_clear()
    run = ["simulate", "--node", str(out), "--model", "opt-30b", "--num-prompts", "4", "--input-len", "1500"]
    assert main(run) == 0
    said = capsys.readouterr().out
    assert "numbers were changed after they were fitted" in said
    assert "beyond the node's tables and its fit, so extrapolated" in said
    assert main(["nodes", str(out)]) == 0
    assert "numbers were changed after they were fitted" in capsys.readouterr().out


def mistake(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["calibrate", *map(str, arguments)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("weft: error: ") and said.count("\n") == 1
    return said


def test_mistakes(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "n.toml"
    assert "conditions.json" in mistake(capsys, tmp_path, "--out", out)
    assert "*.toml" in mistake(capsys, folder, "--out", tmp_path / "n.json")
    assert "b200" in mistake(capsys, folder, "--out", out, "--base", "b200")
    assert "make it first" in mistake(capsys, folder, "--out", tmp_path / "missing" / "n.toml")
    rows = Surveyor(truth()).host(launch=9.0)
    other = survey(tmp_path / "other", rows, link_mode="host-staged")
    assert "link_mode is 'host-staged', not 'as-is'" in mistake(capsys, folder, other, "--out", out)
    empty = survey(tmp_path / "empty", [])
    assert "nothing to fit" in mistake(capsys, empty, "--out", out)
    path = folder / ROWS
    path.write_bytes(path.read_bytes().replace(b'"rows": 256', b'"rows": 255', 1))
    assert "changed after it was finished" in mistake(capsys, folder, "--out", out)
    assert not out.exists()


def test_what_cannot_be_written_is_known_before_the_fit(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit(*_: object) -> None:
        raise AssertionError("nothing should be fitted")

    monkeypatch.setattr("calibration.fit.fit_node", fit)
    kept, file = tmp_path / "keep.toml", tmp_path / "file"
    kept.write_text("kept")
    file.write_text("kept too")
    (tmp_path / "taken" / "report.txt").mkdir(parents=True)
    for report, words in (
        (file, "is a file; give the name of a folder"),
        (kept, "is a file; give the name of a folder"),
        (file / "deep", "is not a folder"),
        ("/proc/x", "cannot be written to"),
        (tmp_path / "taken", "report.txt is a folder"),
    ):
        said = mistake(capsys, folder, "--out", kept, "--report", report)
        assert str(report) in said and words in said
    new = tmp_path / "new.toml"
    assert "each a name of its own" in mistake(capsys, folder, "--out", new, "--report", new)
    assert "/proc/x.toml" in mistake(capsys, folder, "--out", "/proc/x.toml")
    assert "--seed -1 is negative" in mistake(capsys, folder, "--out", kept, "--seed", -1)
    assert (kept.read_text(), file.read_text(), new.exists()) == ("kept", "kept too", False)


def test_a_terminal_is_told_what_is_being_fitted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = survey(tmp_path / "survey", Surveyor(truth()).host(launch=9.0))
    words = ["calibrate", str(path), "--out", str(tmp_path / "n.toml")]
    assert main(words) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert main(words) == 0
    said = capsys.readouterr().err
    assert all(stage in said for stage in STAGES) and f"{len(STAGES) - 1}/{len(STAGES)}" in said
    assert main([*words, "--disable-tqdm"]) == 0
    assert capsys.readouterr().err == ""


def test_old_and_foreign_measurements_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = Surveyor(truth()).host(launch=9.0, event=1.5)
    path = survey(tmp_path / "old", rows, gpu="NVIDIA A100-SXM4-80GB", date="2024-01-02")
    (path / "manifest.json").unlink()
    assert main(["calibrate", str(path), "--out", str(tmp_path / "n.toml")]) == 0
    said = capsys.readouterr().out
    assert "foreign: the measurements are of NVIDIA A100-SXM4-80GB" in said
    assert "stale: the measurements are" in said
    assert "unfinished" in said


def test_a_base_of_another_machine_is_said_to_be_the_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, out = Surveyor(truth()).host(launch=9.0, event=1.5), tmp_path / "n.toml"
    cpus = survey(tmp_path / "cpus", rows, gpu="none", num_gpus=2, num_sms=0, link_mode="host")
    assert main(["calibrate", str(cpus), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "foreign: the measurements are of CPU processes, the base node h200-nvlink-x4 is" in said
    assert "of none" not in said
    load_node.cache_clear()
    node = load_node(str(out))
    assert node.description == (
        "fitted to measurements of CPU processes, 2026-11-21; what they do not tell is that of h200-nvlink-x4 "
        "(4 x H200 SXM behind NVSwitch)"
    )
    assert main(["nodes", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "fitted to measurements of CPU processes" in shown and "foreign measurements, of CPU processes" in shown
    # Of the base's own GPU its words stand.
    own = survey(tmp_path / "own", rows, num_gpus=2)
    assert main(["calibrate", str(own), "--out", str(out)]) == 0
    load_node.cache_clear()
    words = "2 x H200 SXM behind NVSwitch; fitted to measurements of NVIDIA H200, 2026-11-21"
    assert load_node(str(out)).description == words


def test_a_node_has_no_more_gpus_than_were_measured_together() -> None:
    base = load_node("a100-pcie-x4")
    two = on_machine(base, Conditions(**(CONDITIONS | {"num_gpus": 2, "num_sms": 100})))
    assert (two.num_gpus, two.device.num_sms) == (2, 100)
    assert {table.ranks for table in two.link.tables} == {2} and all(max(pair) < 2 for pair in two.link.pairs)
    for changes in ({"num_gpus": 1}, {"num_gpus": 4}, {"num_gpus": 2, "environment": {"imported": "a.csv"}}):
        assert on_machine(base, Conditions(**(CONDITIONS | {"num_sms": 0} | changes))) == base


def test_kernels_of_one_gpu_go_with_the_links_of_several(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    surveyor, out = Surveyor(truth()), tmp_path / "mine.toml"
    staged = {"link_mode": "host-staged", "environment": {"NCCL_P2P_DISABLE": "1"}}
    links = survey(tmp_path / "links", surveyor.collectives(), **staged)
    kernels = survey(tmp_path / "kernels", surveyor.gemms((16, 256, 1024), cuts=(1,)), num_gpus=1)
    assert main(["calibrate", str(links), str(kernels), "--out", str(out)]) == 0
    load_node.cache_clear()
    node = load_node(str(out))
    assert node.fit is not None and node.fit.measurements.keys() == {"links", "kernels"}
    assert node.fit.conditions["link_mode"] == "host-staged"
    # GEMM shapes that the fit saw are in the node, and are shown to whoever asks for it.
    assert node.gemms and main(["nodes", str(out)]) == 0
    assert f"{len({(t.cols, t.inner) for t in node.gemms})} shapes" in capsys.readouterr().out
    several = survey(tmp_path / "several", surveyor.gemms((64,), cuts=(1,)))
    assert "link_mode" in mistake(capsys, kernels, links, several, "--out", out)
    assert main(["calibrate", str(kernels), str(links), "--out", str(out)]) == 0
    load_node.cache_clear()
    assert load_node(str(out)).fit == node.fit
    assert capsys.readouterr()
    other = survey(tmp_path / "other", surveyor.gemms((64,), cuts=(1,)), num_gpus=1, gpu="NVIDIA A100")
    assert "gpu is" in mistake(capsys, links, other, "--out", out)
