from __future__ import annotations

import json
import re
import runpy
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from traces.timeline import Span
from weft.notebook import Case, Outcome, Picture, compare, record, region_of, run_case, show_region, table
from weft.notebook_plot import Window, show_beliefs, show_lanes, show_switches
from weft.runs import RunConfig, simulate

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
SOURCES = sorted(path for path in NOTEBOOKS.glob("*.py") if path.name != "build.py")
PNG = b"\x89PNG\r\n\x1a\n"
SMALL = RunConfig(num_prompts=8)
# A path of one machine, whatever its folders are called: from the root, or from a drive.
ABSOLUTE_PATH = re.compile(r"(?<![\w./])/[\w.-]+/|\b[A-Z]:\\")


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """What the notebook's cells define, with a small workload."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WEFT_NOTEBOOK_PROMPTS", "8")
        return runpy.run_path(str(NOTEBOOKS / "feasible_region.py"))


def test_source_runs_and_shows_what_its_text_says(names: dict[str, Any]) -> None:
    assert names["BASE"].num_prompts == 8
    regions = names["region"], names["other"]
    gains = []
    for region in regions:
        capacity = {curve.policy: curve.capacity for curve in region.curves}
        assert tuple(capacity) == ("tensor", "pipeline", "hybrid", "interleaved")
        gains.append(capacity["interleaved"] / capacity["tensor"])
    assert gains[0] > gains[1] > 1.0
    assert [region.place.node for region in regions] == ["a100-pcie-x4", "h200-nvlink-x4"]


def test_mechanisms_and_beliefs_are_compared_at_one_load(names: dict[str, Any]) -> None:
    outcomes = names["outcomes"]
    ours, plain = outcomes["as set above"], outcomes["tensor parallelism"]
    assert plain.capacity < names["rate"] < ours.capacity
    assert outcomes["host waits for every round"].capacity < ours.capacity
    assert sorted(names["beliefs"]) == [0.25, 0.5, 1.0, 2.0, 4.0]
    assert names["beliefs"][1.0] is ours
    assert all(outcome.capacity > plain.capacity for outcome in names["beliefs"].values())


def test_overlap_is_in_the_recorded_runs(names: dict[str, Any]) -> None:
    shares = {policy: run.result["overlap_fraction"] for policy, run in names["runs"].items()}
    assert shares["tensor"] == 0.0
    assert shares["interleaved"] > 0.5


def test_pictures_are_the_same_every_time(names: dict[str, Any]) -> None:
    outcomes, beliefs, rate = names["outcomes"], names["beliefs"], names["rate"]
    draws: tuple[Callable[[], Picture], ...] = (
        lambda: show_region(names["region"]),
        lambda: show_switches(outcomes, names["cases"], rate),
        lambda: show_beliefs(beliefs, outcomes["tensor parallelism"], rate, "a model"),
        lambda: show_lanes(names["runs"]),
    )
    for draw in draws:
        picture = draw()
        assert picture == draw()
        png, size = picture._repr_png_()
        assert png.startswith(PNG)
        assert size["width"] > 400


def built_from(source: Path) -> Any:
    return json.loads(source.with_suffix(".ipynb").read_text(encoding="utf-8"))


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_built_notebook_is_of_its_source(source: Path) -> None:
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in built_from(source)["cells"]]
    asked = [(cell["cell_type"], cell["source"]) for cell in import_module("jupytext").read(source).cells]
    assert cells == asked, f"{source.name} has changed since its .ipynb was built: make notebooks"


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_built_notebook_is_whole_and_of_no_one_machine(source: Path) -> None:
    built = built_from(source)
    cells = built["cells"]
    assert [cell["id"] for cell in cells] == [f"cell-{number:03d}" for number in range(len(cells))]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 5
    assert {output["output_type"] for output in outputs} <= {"execute_result", "stream"}
    assert {output["name"] for output in outputs if output["output_type"] == "stream"} <= {"stdout"}
    # Pictures are base64, in which anything may occur.
    words = "".join(line for output in outputs if output["output_type"] == "stream" for line in output["text"])
    assert words
    assert not ABSOLUTE_PATH.search(words)
    assert "execution" not in json.dumps([cell["metadata"] for cell in code])
    assert "language_info" not in built["metadata"]


def test_a_case_that_knows_the_truth_is_the_plain_run() -> None:
    result, plain = run_case(Case(SMALL)), simulate(SMALL).result
    assert {**result, "sim_wall_s": 0.0} == {**plain, "sim_wall_s": 0.0}


def test_tensor_parallelism_does_not_depend_on_beliefs() -> None:
    config = RunConfig(num_prompts=8, policy="tensor")
    true, wrong = run_case(Case(config)), run_case(Case(config, belief=3.0))
    for key in ("request_throughput", "p90_e2el_ms", "comm_share"):
        assert wrong[key] == true[key]


@pytest.mark.parametrize("belief", [0.0, -1.0, float("inf"), float("nan")])
def test_impossible_belief_is_refused(belief: float) -> None:
    with pytest.raises(ValueError, match="above 0"):
        run_case(Case(SMALL, belief))


def test_region_is_of_one_place() -> None:
    from weft.explore import Study

    study = Study(RunConfig(num_prompts=2), ("tensor",), nodes=("a100-pcie-x4", "a100-nvlink-x4"), rates=(5.0,))
    with pytest.raises(ValueError, match="2 models and nodes"):
        region_of(study)


def test_comparison_keeps_its_order_and_its_table_names_saturation() -> None:
    cases = {name: Case(RunConfig(num_prompts=4, policy=name)) for name in ("tensor", "pipeline")}
    assert list(compare(cases, 5.0)) == ["tensor", "pipeline"]
    words = table({"a": Outcome(10.0, 100.0), "b": Outcome(8.0, 300.0), "c": Outcome(5.0, 900.0)}, 7.5).splitlines()
    assert words[2].split() == ["b", "8.0", "(-20", "%)", "300", "(+200", "%)"]
    assert words[3].split() == ["c", "5.0", "(-50", "%)", "saturated"]


def test_record_keeps_every_kernel_of_every_rank() -> None:
    config = RunConfig(num_prompts=2, policy="tensor", request_rate=float("inf"))
    run = record([config])["tensor"]
    assert len(run.timeline.spans) == run.result["sim_kernels"]


def test_window_cuts_and_merges() -> None:
    spans = [Span(0, "compute", "a", False, start, end, 0, 0, 0) for start, end in ((5, 15), (12, 20), (25, 90))]
    assert Window(10.0, 30.0).cut(spans) == [(0.0, 10.0), (15.0, 30.0)]


def test_picture_is_saved_whole_and_has_a_short_name(tmp_path: Path) -> None:
    picture = Picture(PNG + b"rest", 800)
    picture.save(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == PNG + b"rest"
    assert repr(picture) == "Picture(width=800)"
