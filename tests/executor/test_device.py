"""How launches become work on queues."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from executor.device import Device
from executor.lanes import Clock, StreamKey, Ticket, Work
from executor.operations import Collective
from models.config import MODELS
from models.kernel import FunctionVector
from models.transformer import BatchShape, Layout, function_vector
from policy.batch import Batch
from policy.round import Lane, Launch

SHAPE = BatchShape(2, 16)


@dataclass(slots=True, eq=False)
class Put:
    """Work that was put on a queue."""

    key: StreamKey
    done: bool = False


class Queues:
    """Queues that only remember."""

    can_capture = True

    def __init__(self) -> None:
        self.put: list[StreamKey] = []

    def run(self, key: StreamKey, waits: Sequence[Ticket], work: Work) -> Put:
        self.put.append(key)
        work()
        return Put(key)


def device_of(vector: FunctionVector, calls: list[str]) -> Device:
    """A device whose kernels and collectives say their names."""
    buffer = torch.zeros(64)

    def operation(name: str, is_communication: bool, kind: Any) -> Any:
        return Collective(kind, buffer, "tp") if is_communication else lambda part: calls.append(name)

    operations = [operation(k.name, k.is_communication, k.kind) for k in vector.kernels]
    groups = SimpleNamespace(
        stage_name="stage 0,1",
        name=lambda collective: "tp 0,1",
        call_of=lambda collective, part, ctas, loose: lambda: calls.append("loose" if loose else "kept"),
    )
    parts = SimpleNamespace(
        weights=SimpleNamespace(stage=0), slots=[SimpleNamespace()], groups=groups, lanes=Queues(), clock=Clock(),
        graphs=SimpleNamespace(), bound={(0, SHAPE): operations}, steps={},
    )  # fmt: skip
    return Device(parts)  # type: ignore[arg-type]


@pytest.mark.parametrize("captured", [False, True])
def test_a_range_that_would_be_a_graph_is_one_branch_of_the_graph_that_holds_a_whole_plan(captured: bool) -> None:
    model = replace(MODELS["opt-30b"], num_layers=2, vocab_size=0)
    vector, calls = function_vector(model, SHAPE, Layout(2, 1), 0), list[str]()
    device = device_of(vector, calls)
    device.enter(Batch(0, (), SHAPE, (vector,), 0.0), 0.0, lambda slot: None)
    device.begin_capture()
    device.issue(Launch(0, 0, len(vector), Lane.COMPUTE, captured=captured), 0)
    queues: Any = device.parts.lanes
    lanes = [key.lane for key in queues.put]
    assert lanes == [Lane.COMPUTE] if captured else lanes == [Lane.COMPUTE, Lane.COMM] * 4
    expected = ["kept" if kernel.is_communication else kernel.name for kernel in vector.kernels]
    assert calls == expected
