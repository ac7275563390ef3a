"""Small files as people would have them, and where the published tables lie."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from pathlib import Path

import pytest

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write text to a file; gzip where the name ends in .gz."""

    def write(name: str, text: str) -> Path:
        content = text.encode()
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        return tmp_path / name

    return write


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of published tables, which is not part of the repository."""
    root = Path(__file__).resolve().parents[3]
    folder = Path(os.environ.get("WEFT_DATA", root.parent / "shared" / "data"))
    if not (folder / "aiconfigurator").is_dir():
        pytest.skip(f"no reference tables at {folder}; set WEFT_DATA to the folder that holds aiconfigurator/")
    return folder
