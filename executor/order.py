"""Rolling hashes: of the collectives as ranks issued them (unequal orders hang or sum wrong data), and of the rounds."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from policy.round import Round

DIGEST_BYTES = 8


@dataclass(slots=True)
class OrderLog:
    """What one rank issued, group by group: a rolling hash after every operation.

    The hash covers (sequence, group, operation, size, type); `operation` names kind, batch, kernel and chunk, so that
    two collectives of one size that trade places are told apart. All steps are kept, so that the first difference can
    be named. A group is named by a word and its ranks: "tp 0,1".
    """

    steps: dict[str, list[str]] = field(default_factory=dict)

    def add(self, group: str, operation: str, num_elements: int, dtype: str) -> None:
        """One more operation on a group."""
        steps = self.steps.setdefault(group, [])
        before = steps[-1] if steps else ""
        text = f"{before}/{len(steps)}/{group}/{operation}/{num_elements}/{dtype}"
        steps.append(hashlib.blake2b(text.encode(), digest_size=DIGEST_BYTES).hexdigest())

    def digests(self) -> dict[str, str]:
        """The last hash of every group."""
        return {group: steps[-1] for group, steps in self.steps.items()}


def compare(logs: Sequence[OrderLog]) -> str:
    """The hash of the whole world's order, if all ranks of every group agree.

    Raises ValueError naming the ranks, the group and the first sequence number that differs.
    """
    combined = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for group in sorted({group for log in logs for group in log.steps}):
        members = [int(rank) for rank in group.split()[1].split(",")]
        first = logs[members[0]].steps.get(group, [])
        for rank in members[1:]:
            other = logs[rank].steps.get(group, [])
            if other != first:
                raise ValueError(_difference(group, (members[0], first), (rank, other)))
        combined.update(f"{group}:{first[-1]}".encode())
    return combined.hexdigest()


def _difference(group: str, one: tuple[int, list[str]], two: tuple[int, list[str]]) -> str:
    pairs = zip(one[1], two[1], strict=False)
    number = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one[1]), len(two[1])))
    return (
        f"ranks {one[0]} and {two[0]} issued collectives of group {group} in different orders: the first difference is "
        f"number {number} of {len(one[1])} and {len(two[1])}"
    )


class RoundsHash:
    """A hash of a list of rounds, equal for equal lists. Rounds are hashed after the run, not in the main loop."""

    __slots__ = ("_hash", "_waiting")

    HELD_BACK = 20_000

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=DIGEST_BYTES)
        self._waiting: list[Round] = []

    def add(self, round_: Round) -> None:
        """The next round of the list."""
        self._waiting.append(round_)
        if len(self._waiting) >= self.HELD_BACK:
            self.digest()

    def digest(self) -> str:
        """The hash of all rounds so far."""
        for round_ in self._waiting:
            self._hash.update(repr(round_).encode())
        self._waiting.clear()
        return self._hash.copy().hexdigest()
