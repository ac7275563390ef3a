"""A board in memory that ranks of one host share: rank 0 writes notes, the others read every one, in order.

The key-value store takes 30 to 170 us to carry a note, the board a few: time in which a device may stand idle.
"""

from __future__ import annotations

import mmap
import os
import struct
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

CELL_BYTES, CELLS = 16 * 1024, 256
# Each cell: number of the note, its length, its checksum. In front of all cells: how many notes each rank has read.
_HEAD, _COUNT = struct.Struct("<QII"), struct.Struct("<Q")
LARGEST = CELL_BYTES - _HEAD.size
# A reader looks this often without a pause, then with pauses that grow to the longest, and then also looks whether the
# writer still lives.
EAGER_LOOKS, PAUSE_S, LONGEST_PAUSE_S, LOOK_AROUND_S = 200, 20e-6, 200e-6, 0.2


class Board:
    """One rank's view. The file has no name any more once everybody has it, so nothing is left behind."""

    def __init__(self, path: str, rank: int, num_ranks: int) -> None:
        self._rank, self._num_ranks, self._next = rank, num_ranks, 0
        with Path(path).open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), _size(num_ranks))

    @staticmethod
    def make(num_ranks: int) -> str:
        """A file for a board, in memory where there is a place for that."""
        folder = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        handle, path = tempfile.mkstemp(prefix="weft-", dir=folder)
        with os.fdopen(handle, "wb") as file:
            file.truncate(_size(num_ranks))
        return path

    def write(self, content: bytes) -> None:
        """The next note, at most `LARGEST` bytes; waits for readers that are a whole board behind."""
        number = self._next
        while min(self._have_read(rank) for rank in range(1, self._num_ranks)) + CELLS <= number:
            time.sleep(PAUSE_S)
        start = self._cell(number)
        self._memory[start + _HEAD.size : start + _HEAD.size + len(content)] = content
        _HEAD.pack_into(self._memory, start, number + 1, len(content), _checksum(number + 1, content))
        self._next += 1

    def read(
        self, timeout_s: float, look_around: Callable[[], object], meanwhile: Callable[[], object] = lambda: None
    ) -> bytes | None:
        """The next note; None if none has come in time. `meanwhile` is called at every pause, `look_around` now and
        then; both may raise."""
        looks, pause_s, started = 0, PAUSE_S, time.monotonic()
        looked_s = started
        while (content := self._look()) is None:
            looks += 1
            if looks <= EAGER_LOOKS:
                continue
            meanwhile()
            time.sleep(pause_s)
            pause_s = min(LONGEST_PAUSE_S, 1.2 * pause_s)
            now = time.monotonic()
            if now - looked_s > LOOK_AROUND_S:
                looked_s = now
                look_around()
            if now - started > timeout_s:
                return None
        self._next += 1
        _COUNT.pack_into(self._memory, self._rank * _COUNT.size, self._next)
        return content

    def _look(self) -> bytes | None:
        start = self._cell(self._next)
        number, length, checksum = _HEAD.unpack_from(self._memory, start)
        if number != self._next + 1 or length > LARGEST:
            return None
        content = self._memory[start + _HEAD.size : start + _HEAD.size + length]
        return content if _checksum(number, content) == checksum else None

    def _have_read(self, rank: int) -> int:
        count: int = _COUNT.unpack_from(self._memory, rank * _COUNT.size)[0]
        return count

    def _cell(self, number: int) -> int:
        return self._num_ranks * _COUNT.size + (number % CELLS) * CELL_BYTES


def _size(num_ranks: int) -> int:
    return num_ranks * _COUNT.size + CELLS * CELL_BYTES


def _checksum(number: int, content: bytes) -> int:
    """Covers the head too: nothing here is written at once, so a reader may see any part of a note before the rest."""
    return zlib.crc32(content, zlib.crc32(_HEAD.pack(number, len(content), 0)))
