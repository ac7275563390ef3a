"""The parts of the GPU suite by name."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path

from benchmarks.gpu_checks import correct, soak
from benchmarks.gpu_speed import ablation, deep, forward, plane, probe, serving
from benchmarks.gpu_world import Suite

PARTS: dict[str, Callable[[Suite], None]] = {
    "probe": probe, "correct": correct, "soak": soak, "forward": forward, "serving": serving, "plane": plane,
    "ablation": ablation, "deep": deep,
}  # fmt: skip


def run_part(part: str, mode: str, out: Path, ranks: int, *, dry_run: bool) -> int:
    """Run one part in this process; what goes wrong is printed, and is exit code 1."""
    suite = Suite(part, mode, out, 2 if dry_run else ranks, dry_run)
    try:
        PARTS[part](suite)
    except Exception as error:
        traceback.print_exc()
        suite.emit(error=" ".join(str(error).split())[:500])
        return 1
    return 0
