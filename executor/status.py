"""What a rank tells the process that started it: that it lives, how far it is, and why it failed. No torch in here.

The channel is a pipe with one JSON line per message. Under torchrun there is none, and nothing is said.

A rank that beats may still hang. So each beat also says where the main thread stands, and whether that is a wait for
others. Nothing has to be announced for that, and waiting costs nothing: the beating thread looks at the stack.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

BEAT_S = 0.5
# Functions in which a rank waits for others: for what they say, or for a collective to come about ...
MEETINGS = {"Mail._get", "Mail.next", "start_world", "Groups.warm_up", "Groups._move", "Groups.call_of.<locals>.call"}
# ... and those in which the host waits for its device, which may wait for others.
DEVICE_WAITS = {"CpuLanes.synchronize", "CudaLanes.synchronize", "Driver._await", "synchronize", "Event.synchronize"}
# Where a CPU lane is when it does no work of its own.
LANE_WAITS = MEETINGS | {"CpuTicket.wait"}
LANE = "CpuLanes._work"


class PeerError(RuntimeError):
    """Another rank is not there; the message says which, and that is the one that knows why."""


class Steps:
    """Counts what a rank gets done before a run: tensors made, graphs captured, batches warmed up. A loop over such
    things stands in the same place whenever it is looked at, but it does not stand still."""

    count = 0

    @classmethod
    def add(cls) -> None:
        """One more."""
        cls.count += 1


class Status:
    """The rank's end of the pipe. `fd` -1: nobody listens."""

    def __init__(self, rank: int, fd: int = -1) -> None:
        self.rank, self._fd = rank, fd
        self._lock = threading.Lock()
        self.phase, self.progress, self.idle = "start", 0, False
        self._main = threading.get_ident()
        if fd >= 0:
            threading.Thread(target=self._beat, daemon=True).start()

    def _beat(self) -> None:
        # A stopped process stops all of its threads; a beating one whose progress stands still waits for another rank.
        while True:
            place, waits = standing(self._main)
            self._tell(place, waits)
            threading.Event().wait(BEAT_S)

    def _tell(self, place: int, waits: bool) -> None:
        self.send({"phase": self.phase, "progress": self.progress, "idle": self.idle, "waits": waits,
                   "place": f"{Steps.count}/{place}"})  # fmt: skip

    def enter(self, phase: str) -> None:
        """The rank begins something else."""
        self.phase, self.idle = phase, False
        self._tell(0, False)

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


def standing(thread: int) -> tuple[int, bool]:
    """A number for the place where a thread stands, the same as long as it stands there, and whether it waits for other
    ranks: in a meeting, or for a device that has nothing of its own to do."""
    frames = sys._current_frames()
    path: list[tuple[str, int]] = []
    for frame in _from_outermost(frames.get(thread)):
        name = frame.f_code.co_qualname
        if name in MEETINGS:
            return hash((*path, name)), True
        if name in DEVICE_WAITS:  # it may look again and again: what is inside is one place
            return hash((*path, name)), not any(_works(other) for other in frames.values())
        path.append((name, frame.f_lasti))
    return hash(tuple(path)), False


def _works(innermost: FrameType) -> bool:
    """Whether this is a CPU lane inside a piece of work, and not in a collective."""
    names = [frame.f_code.co_qualname for frame in _from_outermost(innermost)]
    return LANE in names[:-1] and not LANE_WAITS.intersection(names)


def _from_outermost(frame: FrameType | None) -> Iterator[FrameType]:
    found = []
    while frame is not None:
        found.append(frame)
        frame = frame.f_back
    return reversed(found)


def watch_parent() -> None:
    """End this process when the one that started it is gone: standard input is a pipe that it never writes to."""

    def wait() -> None:
        while os.read(0, 4096):
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
