"""How GEMMs are launched, read from a profiler's trace."""

from __future__ import annotations

from typing import Any

from executor.survey_launches import SMS, Launched, kernels_of


def kernel(
    name: str, ts: float, dur: float, grid: list[int], block: int, registers: int, shared: int
) -> dict[str, Any]:
    args = {"grid": grid, "block": [block, 1, 1], "registers per thread": registers, "shared memory": shared}
    return {"ph": "X", "cat": "kernel", "name": name, "ts": ts, "dur": dur, "args": args}


def test_kernels_are_told_apart_by_the_markers_between_them_whatever_their_order_in_the_file() -> None:
    events = [
        kernel("split reduction", 32.0, 2.0, [64, 1, 1], 256, 32, 0),
        {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 1.0, "dur": 1.0},
        kernel("before", 1.0, 1.0, [1, 1, 1], 32, 16, 0),
        kernel("spin_kernel(long)", 10.0, 1.0, [1, 1, 1], 1, 16, 0),
        kernel("persistent", 12.0, 9.0, [2, 66, 1], 384, 168, 200 * 1024),
        kernel("at::cuda::spin_kernel", 30.0, 1.0, [1, 1, 1], 1, 16, 0),
        kernel("small tiles", 31.0, 8.0, [16, 4, 3], 128, 96, 48 * 1024),
        kernel("spin_kernel(long)", 40.0, 1.0, [1, 1, 1], 1, 16, 0),
    ]
    assert kernels_of({"traceEvents": events}, SMS[9, 0]) == [
        [Launched("persistent", 132, 1, 9.0)],
        # Four fit by shared memory (49 KB each), five by registers.
        [Launched("small tiles", 192, 4, 8.0), Launched("split reduction", 64, 8, 2.0)],
        [],
    ]
    # Of collectives nobody asks what an SM holds.
    assert [k.ctas for group in kernels_of({"traceEvents": events}, None) for k in group] == [132, 192, 64]
