"""Start the ranks of a world on this machine, watch them, and end all of them when one fails. Imports no torch."""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from executor.settings import Settings, encode

PROGRAM = (sys.executable, "-m", "executor")
# A rank says nothing while Python starts; after this long something is wrong.
START_S = 60.0
# When one rank goes, the others notice a lost connection; the first reason of its own within this time is the one told.
GRACE_S = 1.5
POLL_S = 0.1


class WorldError(ValueError):
    """A rank failed; the message says which and why. All ranks have been ended."""


@dataclass(slots=True)
class _Rank:
    """What the launcher knows of one rank. Times are of the launcher's monotonic clock, seconds."""

    number: int
    process: subprocess.Popen[bytes]
    status_fd: int
    errors: IO[bytes]
    heard_s: float
    moved_s: float
    phase: str = ""
    progress: int = 0
    steps: int = 0
    waits: bool = False
    reason: str = ""
    is_peer: bool = False
    rest: bytes = b""

    def hear(self, message: dict[str, Any], now_s: float) -> None:
        """A message from the rank."""
        self.heard_s = now_s
        if "error" in message:
            self.reason, self.is_peer = message["error"], message["peer"]
        elif "phase" in message:
            # Only rounds count in a run: its loop goes on and on, whatever becomes of them.
            state = message["phase"], message["progress"], 0 if self.runs else message["steps"]
            if state != (self.phase, self.progress, 0 if self.runs else self.steps) or message["idle"]:
                self.moved_s = now_s
            self.phase, self.progress, self.steps = message["phase"], message["progress"], message["steps"]
            self.waits = message["waits"]

    @property
    def runs(self) -> bool:
        """Whether it is inside a run, where rounds follow each other without a pause."""
        return self.phase.startswith("run ")

    @property
    def where(self) -> str:
        """How far it is."""
        return f"at round {self.progress}" if self.runs else f"in the phase `{self.phase}`"

    def why(self) -> str:
        """Why it is over, if it is: its own words, the signal that killed it, or its last line on stderr."""
        code = self.process.returncode
        if self.reason:
            return f"failed: {self.reason}"
        if code is not None and code < 0:
            return f"was killed by {signal.Signals(-code).name}"
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").strip().splitlines()
        return f"ended with exit code {code}" + (f": {lines[-1].strip()[:300]}" if lines else "")


@dataclass(slots=True)
class World:
    """The ranks of one launch while they run. `finished` is how many requests are answered so far."""

    settings: Settings
    ranks: list[_Rank]
    progress: Callable[[int], object]
    finished: int = 0
    _selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)

    def watch(self) -> None:
        """Return when all ranks have ended well. Raises WorldError as soon as one has not, or stands still."""
        for rank in self.ranks:
            self._selector.register(rank.status_fd, selectors.EVENT_READ, rank)
        first_sign_s: float | None = None
        while True:
            self._listen()
            now_s = time.monotonic()
            failed = [rank for rank in self.ranks if rank.reason or rank.process.poll() not in (None, 0)]
            if failed:
                first_sign_s = first_sign_s or now_s
                own = [rank for rank in failed if not rank.is_peer and (rank.reason or rank.process.poll() is not None)]
                if own or now_s - first_sign_s > GRACE_S:
                    self._drain(own or failed)
                    if not own:
                        self._tell_absent(failed[0], now_s)
                    self._fail((own or failed)[0])
            elif all(rank.process.poll() == 0 for rank in self.ranks):
                self._listen()
                return
            self._check_alive(now_s)

    def _tell_absent(self, failed: _Rank, now_s: float) -> None:
        """A rank gave up waiting for another: which has stood still, if one has?"""
        half = self.settings.timeout_s / 2
        others = [rank for rank in self.ranks if rank.process.poll() is None and not rank.reason and not rank.waits]
        still = [rank for rank in others if now_s - rank.moved_s > half]
        if still:
            late = min(still, key=lambda rank: rank.moved_s)
            why = f"made no progress for {now_s - late.moved_s:.0f} s"
            self._fail(late, f"{why} ({late.where}), and rank {failed.number} waited for it in vain")

    def _drain(self, failed: list[_Rank]) -> None:
        """Its exit code may be known before its last words are read."""
        if not failed[0].reason:
            self._listen()

    def _listen(self) -> None:
        for key, _ in self._selector.select(POLL_S):
            rank: _Rank = key.data
            data = os.read(rank.status_fd, 65536)
            if not data:
                self._selector.unregister(rank.status_fd)
                continue
            *lines, rank.rest = (rank.rest + data).split(b"\n")
            for line in lines:
                message = json.loads(line)
                if "finished" in message:
                    self.finished += message["finished"]
                    self.progress(message["finished"])
                rank.hear(message, time.monotonic())

    def _check_alive(self, now_s: float) -> None:
        limit = self.settings.timeout_s
        for rank in self.ranks:
            silent = now_s - rank.heard_s
            if rank.process.poll() is None and silent > (limit if rank.phase else max(START_S, limit)):
                self._fail(rank, f"has not responded for {silent:.0f} s: it is stopped or hangs")
        alive = [rank for rank in self.ranks if rank.process.poll() is None]
        still = [rank for rank in alive if rank.phase and now_s - rank.moved_s > limit]
        running = [rank for rank in self.ranks if rank.runs]
        if (running and all(rank in still for rank in running)) or any(rank.waits for rank in still):
            self._tell_laggard(still, all_still=len(still) == len(alive))

    def _tell_laggard(self, still: list[_Rank], *, all_still: bool) -> None:
        """Who holds up the others: the one that does not wait for any. If all wait, the one that is behind."""
        busy = [rank for rank in still if not rank.waits]
        if not busy and not all_still:
            return  # somebody else still gets things done, and these wait for it
        least = min(rank.progress for rank in still)
        late = busy or [rank for rank in still if rank.progress == least]
        why = f"made no progress for {self.settings.timeout_s:.0f} s"
        stand = ", ".join(f"rank {rank.number} {rank.where}" for rank in self.ranks)
        if len(late) == 1:
            self._fail(late[0], f"{why} ({stand})")
        self._fail(late[0], f"{why}, nor did the others, and which is at fault cannot be told ({stand})")

    def _fail(self, rank: _Rank, why: str = "") -> None:
        total = sum(len(run.requests) for run in self.settings.runs)
        after = f"; all ranks were ended after {self.finished} of {total} requests"
        raise WorldError(f"rank {rank.number} {why or rank.why()}{after}")


def launch(
    settings: Settings,
    progress: Callable[[int], object] = lambda finished: None,
    program: tuple[str, ...] = PROGRAM,
    started: Callable[[list[int]], object] = lambda pids: None,
) -> None:
    """Run a world to its end; the results are in the settings' output folder.

    `progress(n)` is told of every n answered requests, `started` of the process ids. `program` is what a rank runs.
    Raises ValueError for impossible settings, OSError for an occupied port, WorldError when a rank fails, and
    ModuleNotFoundError without torch, which every rank would need.
    """
    settings.check()
    if find_spec("torch") is None:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")
    with _listener(settings) as listener, tempfile.TemporaryDirectory(prefix="weft-") as folder:
        path = Path(folder) / "settings.json"
        path.write_bytes(encode(settings))
        ranks: list[_Rank] = []
        try:
            for number in range(settings.num_ranks):
                ranks.append(_start(number, listener, path, program))
            started([rank.process.pid for rank in ranks])
            World(settings, ranks, progress).watch()
        finally:
            _end(ranks)


@contextmanager
def _listener(settings: Settings) -> Iterator[socket.socket]:
    """The rendezvous' socket, on the asked address alone."""
    try:
        listener = socket.create_server((settings.bind_address, settings.port), backlog=128)
    except OSError as error:
        where = f"{settings.bind_address}:{settings.port}"
        raise OSError(
            f"cannot listen on {where} ({os.strerror(error.errno or 0)}); give another port or address"
        ) from None
    with listener:
        yield listener


def _start(number: int, listener: socket.socket, path: Path, program: tuple[str, ...]) -> _Rank:
    ours, theirs = os.pipe()
    arguments = ["--settings", str(path), "--rank", str(number), "--status-fd", str(theirs),
                 "--store-port", str(listener.getsockname()[1])]  # fmt: skip
    inherited = [theirs]
    if number == 0:
        arguments += ["--store-fd", str(listener.fileno())]
        inherited.append(listener.fileno())
    errors = tempfile.TemporaryFile()  # noqa: SIM115 (read and closed when the rank has ended)
    said = None if os.environ.get("WEFT_TRACEBACK") else errors
    try:
        # A session of its own: the terminal's interrupt reaches the launcher alone, which ends the ranks.
        process = subprocess.Popen(
            [*program, *arguments], stdin=subprocess.PIPE, stdout=errors, stderr=said, pass_fds=inherited,
            env=_environment(), start_new_session=True,
        )  # fmt: skip
    finally:
        os.close(theirs)
    now_s = time.monotonic()
    return _Rank(number, process, ours, errors, now_s, now_s)


def _environment() -> dict[str, str]:
    """One CPU thread a rank; a cuBLAS workspace per stream, so that results repeat; this code, not an installed one.

    NCCL need not expect a communicator to be in several graphs at a time, or in a graph and outside: `Groups` keeps
    those apart, and lanes order graphs.
    """
    here = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH", ""))))
    fixed = {"OMP_NUM_THREADS": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_GRAPH_MIXING_SUPPORT": "0"}
    return {**fixed, **os.environ, "PYTHONPATH": path}


def _end(ranks: list[_Rank]) -> None:
    """Kill what still runs; SIGKILL also ends a stopped process."""
    for rank in ranks:
        if rank.process.poll() is None:
            rank.process.kill()
    for rank in ranks:
        rank.process.wait()
        os.close(rank.status_fd)
        rank.errors.close()
        if rank.process.stdin is not None:
            rank.process.stdin.close()
