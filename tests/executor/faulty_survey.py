"""A rank of a survey on which one kind of kernel cannot be measured: `faulty_survey.py KIND RANK ORDERS ...`."""

from __future__ import annotations

import os
import sys
from functools import partial

import msgspec

from executor.__main__ import main
from executor.survey import Orders, survey
from executor.survey_bed import Bed
from executor.survey_bench import Bench, Row
from executor.survey_points import Point


def break_kind(kind: str) -> None:
    """Every point of the kind fails."""
    whole = Bed.measure

    def measure(self: Bed, bench: Bench, point: Point) -> Row:
        if point.what == kind:
            raise RuntimeError(f"no kernel of {kind}\nis there")
        return whole(self, bench, point)

    Bed.measure = measure  # type: ignore[method-assign]


if __name__ == "__main__":
    kind, rank = sys.argv[1], sys.argv[2]
    del sys.argv[1:3]
    if rank == "all" or sys.argv[sys.argv.index("--rank") + 1] == rank:
        break_kind(kind)
    orders = msgspec.json.decode(sys.argv.pop(1), type=Orders)
    os._exit(main(partial(survey, orders=orders)))
