"""Which ranges get a graph before a run, of models of any depth."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from executor.rehearsal import first_batches
from executor.session import shapes_ahead
from executor.warm_up import MOST_AHEAD, TURNS, levels_that_fit, made_up_requests, ranges_ahead
from models.config import MODELS
from models.transformer import BatchShape, Layout, function_vector
from policy.batch import State
from policy.options import Options
from policy.round import Lane
from policy.scheduler import Scheduler
from tests.executor.worlds import fresh_scheduler, run_of
from traces.request import Request


@pytest.mark.parametrize("name", ["opt-30b", "glm-130b", "llama-2-7b"])
@pytest.mark.parametrize("layers", [4, 48])
def test_layers_and_whole_runs_come_first_then_the_parts_that_fills_take(name: str, layers: int) -> None:
    vector = function_vector(replace(MODELS[name], num_layers=layers), BatchShape(2, 64), Layout(4, 1), 0)
    levels = ranges_ahead(vector, (8,))
    found = [item for level in levels for item in level]
    assert len(set(found)) == len(found)
    for key, (first, last) in found:
        assert 0 <= first < last <= len(vector)
        comm = [kernel.is_communication for kernel in vector.kernels[first:last]]
        # Collectives are in a layer's graph alone, which belongs on the compute lane.
        assert not any(comm) or (
            key.lane is Lane.COMPUTE and not key.withheld_sms and last - first == len(vector.layer)
        )
    begins = {first for first in range(len(vector)) if not first or vector.kernels[first - 1].is_communication}
    for lane in (Lane.COMPUTE, Lane.FILL):
        whole = {span for key, span in levels[1] if (key.lane, key.withheld_sms) == (lane, 8) and span[0] in begins}
        wanted = {(first, vector.run_end[first]) for first in begins if vector.run_end[first] - first > 1}
        assert wanted <= whole
    # Fills take parts of runs all the time, the compute lane seldom.
    assert [{key.lane for key, _ in level} for level in levels[2:]] == [{Lane.FILL}, {Lane.COMPUTE}]
    assert all(any(span[0] not in begins for _, span in level) for level in levels[2:])


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=4), st.lists(st.integers(0, 30), min_size=1, max_size=3),
    st.integers(0, 5_000),
)  # fmt: skip
def test_graphs_ahead_are_bounded_and_no_group_goes_without_what_an_earlier_level_had_room_for(
    sizes: list[int], groups: list[int], most: int
) -> None:
    counts = levels_that_fit(sizes, groups, most)
    used = [sum(sizes[:count]) * places for count, places in zip(counts, groups, strict=True)]
    assert sum(used) <= most
    for count, places in zip(counts, groups, strict=True):
        if count < len(sizes):  # what a group lacks did not fit beside all that is worth as much or more
            worthier = sum(
                sum(sizes[: min(each, count + 1)]) * other for each, other in zip(counts, groups, strict=True)
            )
            assert worthier + sizes[count] * places > most


def test_part_filled_batches_of_a_deep_model_have_graphs_of_all_that_full_ones_have() -> None:
    vector = function_vector(MODELS["opt-30b"], BatchShape(2, 64), Layout(2, 1), 0)
    sizes = [len(level) for level in ranges_ahead(vector, (0,))]
    lengths, slots = 7, 3
    assert levels_that_fit(sizes, [lengths * slots, lengths * slots], MOST_AHEAD) == [4, 4]


def test_part_filled_batches_are_prepared_for_too_unless_there_are_too_many() -> None:
    requests = [Request(number, 0.0, length) for number, length in enumerate((16, 20, 64))]
    found = shapes_ahead(requests, Options(batch_size=2, pad_to=16))
    assert set(found) == {BatchShape(count, length) for count in (1, 2) for length in (16, 32, 64)}
    assert found[-1] == BatchShape(2, 64)
    many = [Request(number, 0.0, 16 * (number + 1)) for number in range(30)]
    assert {shape.num_sequences for shape in shapes_ahead(many, Options(batch_size=2, pad_to=16))} == {2}


@given(depth=st.integers(1, 8), layers=st.sampled_from([1, 4, 24, 48, 96]), count=st.integers(2, 40))
def test_every_pass_of_a_rehearsal_finds_each_batch_in_the_slot_for_which_its_graphs_were_made(
    depth: int, layers: int, count: int
) -> None:
    """Otherwise passes that are timed would capture, which takes longer than what is rehearsed."""
    model = replace(MODELS["tiny-opt"], num_layers=layers)
    trace = tuple(Request(number, 0.0, 1 + number % 7) for number in range(count))
    run = run_of("interleaved", Layout(2, 1), model=model, requests=trace, options=Options(depth=depth, pad_to=1))
    shapes, scheduler = first_batches(run), fresh_scheduler(run, None)
    passes = [[_through_the_slots(scheduler, shape) for shape in shapes] for _ in range(TURNS + 1)]
    assert len(shapes) >= 2 * depth
    assert all(each == passes[0] for each in passes)


def _through_the_slots(scheduler: Scheduler, shape: BatchShape) -> int:
    """The slot of a batch that enters and is forgotten at once."""
    (batch,) = scheduler.enter((made_up_requests(shape),), 0.0)
    scheduler.state = State()
    return batch.slot
