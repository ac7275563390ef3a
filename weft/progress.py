"""Progress bars on stderr, shown only to a person: nothing is drawn where stderr is not a terminal."""

from __future__ import annotations

import shutil
import sys
from contextlib import AbstractContextManager
from typing import Any


def bar(total: int, unit: str, *, disable: bool = False) -> AbstractContextManager[Any]:
    """A tqdm bar; `update(n)` moves it."""
    from tqdm import tqdm

    hidden = disable or not sys.stderr.isatty()
    # A terminal that does not know its size says zero, and tqdm would then draw nothing; this falls back to 80 x 24.
    columns, lines = shutil.get_terminal_size()
    settings: dict[str, Any] = {"ncols": columns - 1, "nrows": lines, "leave": False, "smoothing": 0.1}
    bar_: AbstractContextManager[Any] = tqdm(total=total, unit=f" {unit}", disable=hidden, **settings)
    return bar_
