"""What a rank tells the process that started it: that it lives, how far it is, and why it failed. No torch in here.

The channel is a pipe with one JSON line per message. Under torchrun there is none, and nothing is said.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import Any

BEAT_S = 0.5


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
            self.send({"phase": self.phase, "progress": self.progress, "idle": self.idle})
            threading.Event().wait(BEAT_S)

    def enter(self, phase: str) -> None:
        """The rank begins something else."""
        self.phase = phase
        self.send({"phase": phase, "progress": self.progress, "idle": self.idle})

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
