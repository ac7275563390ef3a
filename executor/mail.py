"""Small messages between ranks: what rank 0 admitted, round by round, and what every rank reports at the end.

Carried by torch's key-value store; notes, which every round waits for, by a board in memory where all ranks are on one
host. Contents are msgpack, never pickle.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from torch._C._distributed_c10d import Store
from torch.distributed import DistStoreError

from executor.board import LARGEST, Board
from executor.status import PeerError, Steps

T = TypeVar("T")
# The store takes values of at most 8 MiB.
PART_BYTES = 4 * 1024 * 1024
PATIENCE = 15.0


class Note(msgspec.Struct, frozen=True, array_like=True):
    """What rank 0 decided before a round: the batches that enter, as request ids; `closed`: no more will come.

    `alive` notes carry nothing; they only show that rank 0 waits for requests and is well.
    """

    now_us: float = 0.0
    batches: tuple[tuple[int, ...], ...] = ()
    closed: bool = False
    alive: bool = False


class Mail:
    """One rank's end. `name` keeps the runs of one world apart."""

    def __init__(self, store: Store, rank: int, num_ranks: int, timeout_s: float) -> None:
        self.rank, self.num_ranks, self._store = rank, num_ranks, store
        self._timeout = timedelta(seconds=timeout_s)
        # Ranks load and measure at their own pace; notes come without a pause.
        self._patience = timedelta(seconds=PATIENCE * timeout_s)
        self._name, self._posted, self._read = "", 0, 0
        self._board: Board | None = None

    def share_memory(self) -> None:
        """Carry notes by memory from now on, if all ranks are on rank 0's host. Every rank must call it."""
        if self.num_ranks == 1:
            return
        host, path = self.share("board", (socket.gethostname(), Board.make(self.num_ranks) if not self.rank else ""),
                                tuple)  # fmt: skip
        board = Board(path, self.rank, self.num_ranks) if host == socket.gethostname() and Path(path).exists() else None
        everyone = all(self.gather("board/seen", board is not None, bool))
        if not self.rank:
            Path(path).unlink()
        if self.share("board/used", everyone, bool):
            self._board = board

    def begin(self, name: str) -> None:
        """Start the notes of another run."""
        self._name, self._posted, self._read = name, 0, 0

    def post(self, note: Note) -> None:
        """Rank 0 tells everyone."""
        if self.num_ranks == 1:
            return
        content = msgspec.msgpack.encode(note)
        if self._board is not None:
            if len(content) <= LARGEST:
                self._board.write(content)
                return
            self._board.write(b"")  # too long for the board: it is in the store
        self._store.set(f"{self._name}/note/{self._posted}", content)  # type: ignore[arg-type]
        self._posted += 1

    def next(self, meanwhile: Callable[[], object] = lambda: None) -> Note:
        """The next note of rank 0; waits for it, and calls `meanwhile` now and then if notes come by memory."""
        content: bytes | None = b""
        if self._board is not None:
            with Steps.waiting():
                content = self._board.read(self._timeout.total_seconds(), self._look_around, meanwhile)
        if content is None:
            raise PeerError(f"rank 0 said nothing for {self._timeout.total_seconds():g} s")
        if not content:
            content = self._get(f"{self._name}/note/{self._read}", 0, self._timeout)
            self._read += 1
        return msgspec.msgpack.decode(content, type=Note)

    def _look_around(self) -> None:
        """Raises what the store raises when rank 0, which holds it, has gone."""
        self._store.check(["alive"])

    def give(self, name: str, content: Any) -> None:
        """Leave something for others under a name of this run; `content` is anything that msgspec encodes."""
        data = msgspec.msgpack.encode(content)
        parts = range(0, max(1, len(data)), PART_BYTES)
        for number, start in enumerate(parts):
            self._store.set(f"{self._name}/{name}/{number}", data[start : start + PART_BYTES])  # type: ignore[arg-type]
        self._store.set(f"{self._name}/{name}", str(len(parts)))

    def take(self, name: str, kind: type[T], sender: int = 0) -> T:
        """What a rank left under that name; waits for it."""
        parts = int(self._get(f"{self._name}/{name}", sender))
        data = b"".join(self._get(f"{self._name}/{name}/{number}", sender) for number in range(parts))
        return msgspec.msgpack.decode(data, type=kind)

    def gather(self, name: str, content: T, kind: type[T]) -> list[T]:
        """Everybody's content by rank, on rank 0; nothing on the others."""
        if self.rank:
            self.give(f"{name}/{self.rank}", content)
            return []
        return [content, *(self.take(f"{name}/{rank}", kind, rank) for rank in range(1, self.num_ranks))]

    def share(self, name: str, content: T, kind: type[T]) -> T:
        """Rank 0's content, on every rank."""
        if self.rank:
            return self.take(name, kind)
        self.give(name, content)
        return content

    def agree(self, name: str, mine: dict[str, str]) -> None:
        """Raises ValueError, on every rank, if one was started with other settings: which, and the first difference."""
        verdict = ""
        for rank, theirs in enumerate(self.gather(name, mine, dict)):
            for key in sorted({*mine, *theirs}):
                if not verdict and mine.get(key) != theirs.get(key):
                    there, here = _short(theirs.get(key)), _short(mine.get(key))
                    verdict = f"rank {rank} was started with other settings than rank 0: "
                    verdict += f"{key} is {there} there and {here} here"
        verdict = self.share(f"{name}/verdict", verdict, str)
        if verdict:
            self.gather(f"{name}/over", 0, int)  # rank 0 holds the store: the others must have read this before it goes
            raise ValueError(verdict)

    def together(self, name: str) -> None:
        """Nobody goes on before everybody is here."""
        self.gather(f"{name}/here", 0, int)
        self.share(f"{name}/go", 0, int)

    def _get(self, key: str, sender: int, timeout: timedelta | None = None) -> bytes:
        patience = timeout or self._patience
        try:
            with Steps.waiting():
                self._store.wait([key], patience)
        except DistStoreError:  # the store itself is there, or this would be a DistNetworkError
            raise PeerError(f"rank {sender} did not come to a meeting within {patience.total_seconds():g} s") from None
        return self._store.get(key)


def _short(text: str | None) -> str:
    if text is None:
        return "missing"
    return text if len(text) <= 80 else text[:77] + "..."
