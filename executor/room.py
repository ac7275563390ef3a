"""Whether a model's weights fit before they are made: a host that runs out of memory kills without a word."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from models.config import ModelConfig
from models.transformer import ELEMENT_BYTES, Layout, weight_bytes

MEMORY = Path("/proc/meminfo")


def check_room(config: ModelConfig, layout: Layout, dtype: torch.dtype, *, told: Path = MEMORY) -> None:
    """Raises ValueError where the weights of this host's ranks need more memory than it has to give. Of ranks on CPUs:
    a GPU says itself that it is full."""
    free = _free_bytes(told)
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", layout.num_ranks))
    needed = ranks * weight_bytes(config, layout) * dtype.itemsize // ELEMENT_BYTES
    if free is not None and needed > free:
        raise ValueError(
            f"the weights of {config.model_id} take {needed / 2**30:.0f} GiB on {ranks} ranks, and this machine has "
            f"{free / 2**30:.1f} GiB free; take a smaller model, or fewer layers (--layers)"
        )


def _free_bytes(told: Path) -> int | None:
    """What the host can give without swapping, as Linux says it; None where nobody says."""
    try:
        lines = told.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
