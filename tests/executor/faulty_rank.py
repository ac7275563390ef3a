"""A rank of the executor with one thing broken on purpose: `faulty_rank.py FAULT RANK ...`."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any


def misorder() -> None:
    """Collectives of different batches trade places inside a round, on this rank alone."""
    from executor.execute import Driver
    from policy.round import Lane, Round

    honest = Driver._issue

    def issue(self: Driver, round_: Round) -> None:
        launches = list(round_.launches)
        comms = [i for i, launch in enumerate(launches) if launch.lane is Lane.COMM]
        for one, two in pairwise(comms):
            if launches[one].batch_id != launches[two].batch_id and two == one + 1:
                launches[one], launches[two] = launches[two], launches[one]
                break
        honest(self, round_._replace(launches=tuple(launches)))

    Driver._issue = issue  # type: ignore[method-assign]


def out_of_memory() -> None:
    """As if the weights did not fit."""
    import torch

    from executor import session

    def make_weights(*_: Any) -> Any:
        raise torch.OutOfMemoryError("Tried to allocate 20.00 GiB. GPU 1 has 10.00 GiB free")

    setattr(session, "make_weights", make_weights)  # noqa: B010 (not among its public names)


def not_a_number() -> None:
    """A kernel that leaves part of its output unwritten."""
    from executor.operations import Gemm

    def call(self: Gemm, fragment: Any = None) -> None:
        return None

    Gemm.__call__ = call  # type: ignore[method-assign]


def _hang(*_: Any) -> Any:
    time.sleep(1e6)


def hang_loading() -> None:
    """It beats, but never has its weights."""
    from executor import session

    setattr(session, "make_weights", _hang)  # noqa: B010 (not among its public names)


def hang_planning() -> None:
    """The host never ends the third round's plan."""
    from executor.execute import Driver

    honest = Driver._plan

    def plan(self: Driver, note: Any) -> Any:
        return honest(self, note) if self.host.rounds < 2 else _hang()

    Driver._plan = plan  # type: ignore[method-assign]


def hang_computing() -> None:
    """A kernel never ends."""
    from executor.operations import Gemm

    Gemm.__call__ = _hang  # type: ignore[assignment, method-assign]


def load_slowly() -> None:
    """Much longer than others wait for one that stands still, but step by step."""
    from executor import session
    from executor.status import Steps

    honest: Callable[..., Any] = vars(session)["make_weights"]

    def make_weights(*arguments: Any) -> Any:
        for _ in range(60):
            Steps.add()
            time.sleep(0.1)
        return honest(*arguments)

    setattr(session, "make_weights", make_weights)  # noqa: B010 (not among its public names)


FAULTS: dict[str, Callable[[], None]] = {
    "misorder": misorder,
    "out-of-memory": out_of_memory,
    "not-a-number": not_a_number,
    "hang-loading": hang_loading,
    "hang-planning": hang_planning,
    "hang-computing": hang_computing,
    "load-slowly": load_slowly,
}

if __name__ == "__main__":
    from executor.__main__ import main

    fault, rank = sys.argv[1], sys.argv[2]
    del sys.argv[1:3]
    if rank == "all" or sys.argv[sys.argv.index("--rank") + 1] == rank:
        FAULTS[fault]()
    os._exit(main())
