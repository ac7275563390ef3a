"""Where the reference traces lie, for the tests that read real ones."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_traces() -> Path:
    """The folder of published traces, which is not part of the repository."""
    root = Path(__file__).resolve().parents[2]
    folder = Path(os.environ.get("WEFT_DATA", root.parent / "shared" / "data")) / "traces"
    if not folder.is_dir():
        pytest.skip(f"no reference traces at {folder}; set WEFT_DATA to the folder that holds traces/")
    return folder
