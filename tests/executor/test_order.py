"""The order of collectives: a rolling hash that all ranks must share, and what happens when one does not."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from executor.launch import WorldError
from executor.order import Chain, OrderLog, OrderNote, compare
from models.transformer import Layout
from policy.options import Options
from tests.executor import faulty_rank
from tests.executor.worlds import requests, run_of, run_world

STEPS = st.lists(st.tuples(st.sampled_from(["a", "b", "c"]), st.integers(1, 3)), min_size=1, max_size=12)


def _log(steps: list[tuple[str, int]], group: str = "tp 0,1") -> dict[str, Chain]:
    log = OrderLog()
    for operation, size in steps:
        log.note((OrderNote((group,), (operation,), size, "torch.float16"),), 0)
    return log.settle()


@settings(derandomize=True, deadline=None)
@given(STEPS)
def test_equal_orders_have_one_hash(steps: list[tuple[str, int]]) -> None:
    assert compare([_log(steps), _log(steps)]) == compare([_log(steps), _log(steps)])


@settings(derandomize=True, deadline=None)
@given(STEPS, st.data())
def test_the_first_difference_is_named(steps: list[tuple[str, int]], data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(steps) - 1))
    other = list(steps)
    other[place] = ("d", other[place][1])
    with pytest.raises(ValueError, match=rf"ranks 0 and 1 .* group tp 0,1 .* number {place} of"):
        compare([_log(steps), _log(other)])


def test_two_collectives_of_one_size_that_trade_places_are_told_apart() -> None:
    first, second = ("all_reduce of batch 1", 64), ("all_reduce of batch 2", 64)
    with pytest.raises(ValueError, match="number 0 of 2 and 2"):
        compare([_log([first, second]), _log([second, first])])


def test_a_rank_that_issued_nothing_differs() -> None:
    with pytest.raises(ValueError, match="number 0 of 1 and 0"):
        compare([_log([("a", 1)]), {}])


def test_groups_are_compared_among_their_own_ranks() -> None:
    logs = [_log([("a", 1)]), _log([("a", 1)]), _log([("b", 2)], "tp 2,3"), _log([("b", 2)], "tp 2,3")]
    assert compare(logs)
    logs[3] = _log([("b", 3)], "tp 2,3")
    with pytest.raises(ValueError, match="ranks 2 and 3"):
        compare(logs)


def test_a_misordered_plan_is_caught(tmp_path: Path) -> None:
    """Equal sizes, so that gloo notices nothing: it sums two batches' activations into each other."""
    same = tuple(replace(request, num_prompt_tokens=16) for request in requests(10))
    options = Options(pad_to=16, adaptive=False)
    run = run_of("interleaved", Layout(2, 1), requests=same, options=options)
    program = (sys.executable, faulty_rank.__file__, "misorder", "1")
    with pytest.raises(WorldError, match=r"rank 0 failed: ranks 0 and 1 issued collectives of group .* in different"):
        run_world(tmp_path, [run], program=program)
