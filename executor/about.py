"""What a result was measured on: hardware, versions, and the environment variables that change it."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from executor.cuda import nccl_version
from executor.groups import Place

PREFIXES = ("NCCL_", "CUDA_", "CUBLAS_", "TORCH_NCCL_", "GLOO_", "OMP_")


def describe(place: Place) -> dict[str, Any]:
    """The host of this rank."""
    about: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "processor": platform.machine(),
        "num_cores": os.cpu_count() or 0,
        "environment": {key: value for key, value in sorted(os.environ.items()) if key.startswith(PREFIXES)},
    }
    return about | (_gpu(place.device) if place.device.type == "cuda" else {"gpu": "none", "link_mode": "host"})


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "num_gpus": torch.cuda.device_count(),
        "num_sms": properties.multi_processor_count,
        "gpu_memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda or "",
        "nccl": nccl_version(),
        "driver": _driver_version(),
        "link_mode": "host-staged" if os.environ.get("NCCL_P2P_DISABLE", "0") == "1" else "as-is",
        "peer_access": all(
            torch.cuda.can_device_access_peer(device, other)
            for other in range(torch.cuda.device_count()) if other != device.index
        ),
    }  # fmt: skip


def _driver_version() -> str:
    """From the driver itself, where it says so; empty elsewhere."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return ""
    words = text.split("\n", 1)[0].split()
    return next((word for word in words if word.count(".") >= 1 and word.replace(".", "").isdigit()), "")
