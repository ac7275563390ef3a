"""Rolling hashes: of collectives as ranks issued them (unequal orders hang or sum wrong data), and of the rounds."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from policy.round import Round

DIGEST_BYTES = 8
# Steps that are kept of a group, and launches (or rounds) that wait to be hashed: some 5 us each, so that a main loop
# that never waits is not held up for long.
KEPT, HELD_BACK = 100_000, 100
# A fifteenth of the time that a round's repr takes, which would be a third of the round's.
_encode = msgspec.msgpack.Encoder().encode


@dataclass(slots=True)
class Chain:
    """The rolling hash of one group: how many operations, the hash behind the last, and the first `KEPT` steps."""

    count: int = 0
    last: str = ""
    steps: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class OrderNote:
    """One collective as all members of its groups see it."""

    groups: tuple[str, ...]
    operation: tuple[object, ...]
    num_elements: int
    dtype: object
    text: str = field(init=False)

    def __post_init__(self) -> None:
        # Notes are made once and hashed at every launch.
        object.__setattr__(self, "text", str((*self.operation, self.num_elements, self.dtype)))


@dataclass(slots=True)
class OrderLog:
    """What one rank issued, group by group: a rolling hash after every operation.

    The hash covers (sequence, group, operation, size, type); an operation is named with its batch, kernel and chunk, so
    that two collectives of one size that trade places are told apart. Many steps are kept, so that the first difference
    can be named. A group is named by a word and its ranks: "tp 0,1".
    """

    chains: dict[str, Chain] = field(default_factory=dict)
    _noted: list[tuple[tuple[OrderNote, ...], int]] = field(default_factory=list)

    def note(self, notes: tuple[OrderNote, ...], batch_id: int) -> None:
        """Operations of one launch of a batch. They are hashed when the main loop has nothing else to do, or when there
        are many."""
        self._noted.append((notes, batch_id))
        if len(self._noted) >= HELD_BACK:
            self.settle()

    def settle(self) -> dict[str, Chain]:
        """Hash what was noted; the chains of all groups."""
        for note, batch_id in ((note, batch_id) for notes, batch_id in self._noted for note in notes):
            for group in note.groups:
                chain = self.chains.get(group)
                if chain is None:
                    chain = self.chains[group] = Chain()
                step = f"{chain.last}/{chain.count}/{group}/{batch_id}/{note.text}".encode()
                chain.last = hashlib.blake2b(step, digest_size=DIGEST_BYTES).hexdigest()
                chain.count += 1
                if chain.count <= KEPT:
                    chain.steps.append(chain.last)
        self._noted.clear()
        return self.chains


def compare(ranks: Sequence[Mapping[str, Chain]]) -> str:
    """The hash of the whole world's order, if all ranks of every group agree.

    Raises ValueError naming the ranks, the group and the first sequence number that differs.
    """
    combined = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for group in sorted({group for chains in ranks for group in chains}):
        members = [int(rank) for rank in group.split()[1].split(",")]
        first = ranks[members[0]].get(group, Chain())
        for rank in members[1:]:
            other = ranks[rank].get(group, Chain())
            if (other.count, other.last) != (first.count, first.last):
                raise ValueError(_difference(group, (members[0], first), (rank, other)))
        combined.update(f"{group}:{first.last}".encode())
    return combined.hexdigest()


def _difference(group: str, one: tuple[int, Chain], two: tuple[int, Chain]) -> str:
    pairs = zip(one[1].steps, two[1].steps, strict=False)
    shorter = min(len(one[1].steps), len(two[1].steps))
    number = next((i for i, (a, b) in enumerate(pairs) if a != b), shorter)
    return (
        f"ranks {one[0]} and {two[0]} issued collectives of group {group} in different orders: the first difference is "
        f"number {number} of {one[1].count} and {two[1].count}"
    )


class RoundsHash:
    """A hash of a list of rounds, equal for equal lists."""

    __slots__ = ("_hash", "_waiting")

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=DIGEST_BYTES)
        self._waiting: list[Round] = []

    def add(self, round_: Round) -> None:
        """The next round of the list; hashed when the main loop has nothing else to do, or when there are many."""
        self._waiting.append(round_)
        if len(self._waiting) >= HELD_BACK:
            self.settle()

    def settle(self) -> None:
        """Hash what was added."""
        for round_ in self._waiting:
            self._hash.update(_encode(round_))
        self._waiting.clear()

    def digest(self) -> str:
        """The hash of all rounds so far."""
        self.settle()
        return self._hash.copy().hexdigest()
