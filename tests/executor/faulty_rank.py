"""A rank of the executor with one thing broken on purpose: `faulty_rank.py FAULT RANK ...`."""

from __future__ import annotations

import os
import sys
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


FAULTS: dict[str, Callable[[], None]] = {
    "misorder": misorder,
    "out-of-memory": out_of_memory,
    "not-a-number": not_a_number,
}

if __name__ == "__main__":
    from executor.__main__ import main

    fault, rank = sys.argv[1], sys.argv[2]
    del sys.argv[1:3]
    if rank == "all" or sys.argv[sys.argv.index("--rank") + 1] == rank:
        FAULTS[fault]()
    os._exit(main())
