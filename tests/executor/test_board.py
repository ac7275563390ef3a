"""Notes through shared memory: every reader gets every note, whole and in order, whoever is faster."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from executor.board import CELLS, LARGEST, Board

READER = """
import sys, time, zlib
from executor.board import Board
board, crc = Board(sys.argv[1], int(sys.argv[2]), 3), 0
for number in range(int(sys.argv[3])):
    if number % 97 == 0:
        time.sleep(0.002 * int(sys.argv[2]))
    content = board.read(20.0, lambda: None)
    crc = zlib.crc32(content, crc)
print(crc)
"""


def test_every_note_arrives_once_and_whole() -> None:
    import zlib

    notes = [bytes([n % 251]) * (0 if n % 11 == 0 else 1 + (n * 7919) % 3000) for n in range(8 * CELLS)]
    expected = 0
    for note in notes:
        expected = zlib.crc32(note, expected)
    path = Board.make(3)
    try:
        readers = [
            subprocess.Popen(
                [sys.executable, "-c", READER, path, str(rank), str(len(notes))], stdout=subprocess.PIPE, text=True,
                cwd=Path(__file__).parents[2],
            )
            for rank in (1, 2)
        ]  # fmt: skip
        board = Board(path, 0, 3)
        for note in notes:
            board.write(note)
        assert [int(reader.communicate(timeout=60)[0]) for reader in readers] == [expected, expected]
    finally:
        Path(path).unlink()


def test_a_reader_gives_up_and_looks_around() -> None:
    path = Board.make(2)
    board = Board(path, 1, 2)
    Path(path).unlink()
    looks: list[int] = []
    assert board.read(0.5, lambda: looks.append(1)) is None
    assert looks

    def gone() -> None:
        raise ConnectionError("rank 0 has gone")

    with pytest.raises(ConnectionError):
        board.read(5.0, gone)


def test_a_note_may_be_as_large_as_a_cell() -> None:
    path = Board.make(2)
    writer, reader = Board(path, 0, 2), Board(path, 1, 2)
    Path(path).unlink()
    writer.write(b"x" * LARGEST)
    assert reader.read(1.0, lambda: None) == b"x" * LARGEST
