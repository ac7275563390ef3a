"""Pauses of the garbage collector."""

from __future__ import annotations

import gc

import pytest

from executor.garbage import no_collections


def test_a_capture_inside_a_run_does_not_let_the_collector_in() -> None:
    assert gc.isenabled()
    with no_collections():
        with pytest.raises(RuntimeError), no_collections():
            raise RuntimeError("a capture that fails")
        assert not gc.isenabled()
    assert gc.isenabled()
