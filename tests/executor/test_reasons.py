"""What a rank says of an error that a library raised: one line that a user can act on."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest

from executor.__main__ import _is_peer, _peer_reason, _reason
from executor.settings import RunSettings, Settings, flags
from models.transformer import Layout
from tests.executor.worlds import run_of

GLOO = "[/__w/pytorch/third_party/gloo/gloo/transport/tcp/"
CLOSED = "Connection closed by peer [127.0.0.1]:62083. Check the logs. GLHF! 🏖️"


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (f"{GLOO}pair.cc:537] Read error [127.0.0.1]:62083: Connection reset by peer. GLHF! 🏖️", "went away: its conn"),
        (f"{GLOO}pair.cc:544] {CLOSED}", "went away: its connection was closed"),
        (f"{GLOO}unbound_buffer.cc:78] Timed out waiting 6000ms for recv operation", "did not answer within 6 s"),
    ],
)
def test_a_peer_that_is_gone(said: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError(said)
    assert _is_peer(error)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert _peer_reason(error, 0).startswith(f"rank 1 {told}")
    monkeypatch.setenv("WORLD_SIZE", "4")
    reason = _peer_reason(error, 0)
    assert reason.startswith(f"another rank {told}")
    assert not any(word in reason for word in (".cc", "GLHF", "["))


@pytest.mark.parametrize(
    "said",
    [
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 4000 bytes. Error code 12 (Cannot allocate memory)",
        "std::bad_alloc",
    ],
)
def test_out_of_memory_on_a_cpu(said: str) -> None:
    error = RuntimeError(said)
    assert not _is_peer(error)
    reason = _reason(error)
    assert reason.startswith("out of memory: ")
    assert reason.endswith("; use more ranks, fewer layers, or smaller batches")
    assert "alloc_cpu.cpp" not in reason


def _first_difference(one: RunSettings, other: RunSettings) -> tuple[str, str | None, str | None]:
    mine, theirs = flags(Settings(runs=(one,))), flags(Settings(runs=(other,)))
    name = next(name for name in sorted({*mine, *theirs}) if mine.get(name) != theirs.get(name))
    return name, mine.get(name), theirs.get(name)


def test_other_flags_are_told_by_field() -> None:
    run = run_of("tensor", Layout(2, 1))
    deeper = msgspec.structs.replace(run, options=replace(run.options, depth=4))
    assert _first_difference(run, deeper) == ("runs[0].options.depth", "3", "4")
    later = (*run.requests[:3], replace(run.requests[3], num_prompt_tokens=9), *run.requests[4:])
    named = _first_difference(run, msgspec.structs.replace(run, requests=later))
    assert named == ("runs[0].requests[3].num_prompt_tokens", "36", "9")
    wider = msgspec.structs.replace(run, model=replace(run.model, num_layers=2))
    assert _first_difference(run, wider) == ("runs[0].model.num_layers", "3", "2")
