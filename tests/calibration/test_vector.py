"""The numpy statement of the solo costs says what the simulator says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest

from calibration.vector import Gemms, Others, gemms_us, others_us
from models.kernel import Kernel, Kind, elementwise, gemm
from sim.cost import Costs
from sim.spec import OperationSpec, load_node

CHANGES: list[dict[str, Any]] = [
    {},
    {"gemm_balance": 0.9, "gemm_overlap_order": 3.7, "split_us": 1.1},
    {"gemm_balance": 1.0, "gemm_sees_partition": True, "split_us": 2.0},
    {"gemm_overlap_order": 2.0, "gemm_sees_partition": True, "ramp_us": 0.0, "cta_start_us": 5.0},
    {"gemm_balance": 1.0, "gemm_wave_ctas": 104, "partition_step": 8, "piece_us": 4.0, "split_us": 1.0},
]


@pytest.mark.parametrize("node", ["a100-nvlink-x4", "h200-nvlink-x4"])
@pytest.mark.parametrize("changes", CHANGES, ids=lambda c: ", ".join(c) or "as shipped")
def test_gemms(node: str, changes: dict[str, Any]) -> None:
    base = load_node(node)
    spec = msgspec.structs.replace(base, device=msgspec.structs.replace(base.device, **changes))
    rng, costs = np.random.default_rng(0), Costs(spec)
    logs = rng.uniform((0, 4, 6), (12, 15, 15), (800, 3))
    kernels = [gemm("g", *(int(2.0**x) for x in row)) for row in logs]
    kernels[::3] = [replace(kernel, is_piece=True) for kernel in kernels[::3]]
    withheld = rng.choice([0, 0, 8, 24, spec.device.num_sms - 1], len(kernels)).tolist()
    expected = [costs.solo_us(kernel, sms) for kernel, sms in zip(kernels, withheld, strict=True)]
    assert gemms_us(Gemms.of(kernels, withheld), spec.device) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("kind", "order"), [(Kind.ATTENTION, 1.0), (Kind.ELEMENTWISE, 1.0), (Kind.ELEMENTWISE, 1.9)])
def test_attention_and_elementwise(kind: Kind, order: float) -> None:
    base = load_node("h200-nvlink-x4")
    operation = OperationSpec(name="some", start_us=6.5, traffic=1.7, overlap_order=order)
    device = msgspec.structs.replace(
        base.device, operations=(operation,), attention_cta_us=0.7, attention_overlap_order=1.5
    )
    spec = msgspec.structs.replace(base, device=device)
    rng, costs = np.random.default_rng(1), Costs(spec)
    kernels = []
    for moved, flops, ctas in 2.0 ** rng.uniform((8, 10, 0), (30, 42, 13), (500, 3)):
        attention = Kernel("some", kind, flops=flops, bytes_moved=moved, num_ctas=int(ctas))
        kernels.append(elementwise("some", int(moved)) if kind is Kind.ELEMENTWISE else attention)
    withheld = rng.choice([0, 8, 131], len(kernels)).tolist()
    expected = [costs.solo_us(kernel, sms) for kernel, sms in zip(kernels, withheld, strict=True)]
    found = others_us(Others.of(kernels, withheld), spec.device, operation.start_us, operation.traffic, order)
    assert found == pytest.approx(expected, rel=1e-12)
