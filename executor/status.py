"""What a rank tells the process that started it: that it lives, how far it is, and why it failed. No torch in here.

The channel is a pipe with one JSON line per message. Under torchrun there is none, and nothing is said.

A rank that beats may still hang. So each beat also says how much the rank has done, and whether it waits for others.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

BEAT_S = 0.5


class PeerError(RuntimeError):
    """Another rank is not there; the message says which, and that is the one that knows why."""


class Steps:
    """What a rank gets done before a run, counted (tensors made, graphs captured, batches warmed up), and whether it
    waits for another rank now. Who neither waits nor gets on holds up the others.

    Told, and not looked up on the stack: frames that another thread holds keep events and graphs alive, which then go
    in the middle of a capture."""

    count, waits = 0, False

    @classmethod
    def add(cls) -> None:
        """One more."""
        cls.count += 1

    @classmethod
    @contextmanager
    def waiting(cls) -> Iterator[None]:
        """Within this block it is another rank's turn."""
        cls.waits = True
        try:
            yield
        finally:
            cls.waits = False


class Status:
    """The rank's end of the pipe. `fd` -1: nobody listens."""

    def __init__(self, rank: int, fd: int = -1) -> None:
        self.rank, self._fd = rank, fd
        self._lock = threading.Lock()
        self.phase, self.progress, self.idle = "start", 0, False
        if fd >= 0:
            threading.Thread(target=self._beat, daemon=True).start()

    def _beat(self) -> None:
        # A stopped process stops all of its threads; a beating one whose progress stands still waits for another rank.
        while True:
            self._tell()
            threading.Event().wait(BEAT_S)

    def _tell(self) -> None:
        self.send({"phase": self.phase, "progress": self.progress, "idle": self.idle, "waits": Steps.waits,
                   "steps": Steps.count})  # fmt: skip

    def enter(self, phase: str) -> None:
        """The rank begins something else."""
        self.phase, self.idle = phase, False
        self._tell()

    def finished(self, requests: int) -> None:
        """So many more requests are answered."""
        self.send({"finished": requests})

    def fail(self, reason: str, *, peer: bool) -> None:
        """The rank cannot go on. peer: because another rank went away, which will have its own reason."""
        if self._fd >= 0:
            self.send({"error": reason, "peer": peer})
        else:
            print(f"weft: error: rank {self.rank}: {reason}", file=sys.stderr, flush=True)

    def send(self, message: dict[str, Any]) -> None:
        """One message; a listener that is gone is no reason to stop here."""
        if self._fd < 0:
            return
        with self._lock:
            try:
                os.write(self._fd, json.dumps(message).encode() + b"\n")
            except OSError:
                self._fd = -1


def watch_parent() -> None:
    """End this process when the one that started it is gone: standard input is a pipe that it never writes to."""

    def wait() -> None:
        while os.read(0, 4096):
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
