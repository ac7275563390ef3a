"""When Python's garbage collector must keep out of the way."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_collections() -> Iterator[None]:
    """Nothing is collected meanwhile. May be nested: only the outermost switches the collector on again."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextmanager
def collected() -> Iterator[None]:
    """Collect now, and nothing meanwhile: a collector that looks through all that was made, again and again, holds up
    launches (60-130 ms at a time once OPT-30B's graphs are there)."""
    gc.collect()
    with no_collections():
        yield
