"""The validation notebook runs from the committed measurements and shows what it says."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """What the cells define, with the smaller batches alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WEFT_NOTEBOOK_PROMPTS", "8")
        patch.chdir(ROOT / "notebooks")
        return runpy.run_path(str(ROOT / "notebooks" / "validation.py"))


def test_every_link_is_compared_on_every_batch_size(names: dict[str, Any]) -> None:
    found = {v.node.name: {cell.rows for cell in v.two_batches.cells} for v in names["validations"]}
    assert found == {"h200-nvlink-x4-fitted": {16, 64, 128}, "h200-hoststaged-x4-fitted": {16, 64, 128}}
    for validation in names["validations"]:
        assert validation.sources
        assert not [note for note in validation.notes if "stale" in note or "foreign" in note]


def test_the_prediction_step_by_step_is_the_one_of_the_table(names: dict[str, Any]) -> None:
    (validation,) = (v for v in names["validations"] if v.node.name == names["world"].node.name)
    points = {point.label: point for point in validation.points}
    for schedule in ("compute alone", "serial", "policy"):
        predicted, _ = names["world"].makespan_us(names["cell"], schedule)
        assert predicted == pytest.approx(points[f"{names['cell']}, {schedule}"].predicted)


def test_pictures_are_the_same_every_time(names: dict[str, Any]) -> None:
    for draw in ("draw_measured", "draw_errors", "draw_choices"):
        picture = names["show"](names[draw], names["validations"])
        assert picture == names["show"](names[draw], names["validations"])
        assert picture.png.startswith(PNG)
