"""Which ranges get a graph before a run, of models of any depth."""

from __future__ import annotations

from dataclasses import replace

import pytest

from executor.session import shapes_ahead
from executor.warm_up import ranges_ahead
from models.config import MODELS
from models.transformer import BatchShape, Layout, function_vector
from policy.options import Options
from policy.round import Lane
from traces.request import Request

MOST = 450


@pytest.mark.parametrize("name", ["opt-30b", "glm-130b", "llama-2-7b"])
@pytest.mark.parametrize("layers", [4, 48])
def test_deep_models_get_whole_runs_and_shallow_ones_their_parts(name: str, layers: int) -> None:
    vector = function_vector(replace(MODELS[name], num_layers=layers), BatchShape(2, 64), Layout(4, 1), 0)
    found = ranges_ahead(vector, (8,), MOST)
    assert len(set(found)) == len(found) <= MOST
    for key, (first, last) in found:
        assert 0 <= first < last <= len(vector)
        comm = [kernel.is_communication for kernel in vector.kernels[first:last]]
        # Collectives are in a layer's graph alone, which belongs on the compute lane.
        assert not any(comm) or (
            key.lane is Lane.COMPUTE and not key.withheld_sms and last - first == len(vector.layer)
        )
    begins = {first for first in range(len(vector)) if not first or vector.kernels[first - 1].is_communication}
    for lane in (Lane.COMPUTE, Lane.FILL):
        whole = {span for key, span in found if (key.lane, key.withheld_sms) == (lane, 8) and span[0] in begins}
        wanted = {(first, vector.run_end[first]) for first in begins if vector.run_end[first] - first > 1}
        assert wanted <= whole
    # Fills take parts of runs all the time, the compute lane seldom.
    assert any(span[0] not in begins for key, span in found if key.lane is Lane.FILL)
    assert any(span[0] not in begins for key, span in found if key.lane is Lane.COMPUTE and key.withheld_sms) == (
        layers == 4
    )


def test_part_filled_batches_are_prepared_for_too_unless_there_are_too_many() -> None:
    requests = [Request(number, 0.0, length) for number, length in enumerate((16, 20, 64))]
    found = shapes_ahead(requests, Options(batch_size=2, pad_to=16))
    assert set(found) == {BatchShape(count, length) for count in (1, 2) for length in (16, 32, 64)}
    assert found[-1] == BatchShape(2, 64)
    many = [Request(number, 0.0, 16 * (number + 1)) for number in range(30)]
    assert {shape.num_sequences for shape in shapes_ahead(many, Options(batch_size=2, pad_to=16))} == {2}
