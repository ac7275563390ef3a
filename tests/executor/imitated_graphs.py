"""A rank whose threads take part in captures: a graph is the calls that it was made of, replayed by its key.

What is captured ahead, where ranges are cut into what there is, and that a key means one thing alone are then tested
with real numbers where there is no GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from executor.lanes import StreamKey

Body = Callable[[], None]


class ImitatedGraphs:
    """The cache of `executor.graphs` without CUDA."""

    def __init__(self) -> None:
        self._kept: dict[tuple[object, ...], Body] = {}
        self._launched: set[tuple[object, ...]] = set()
        self.sealed = False
        self.refused: dict[StreamKey, str] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def holds(self, key: tuple[object, ...]) -> bool:
        """Whether this range is captured."""
        return key in self._kept

    def replay(self, key: tuple[object, ...], stream: StreamKey, body: Body, *, collectives: bool) -> Body:
        """What replays the range, or runs it and keeps it. A first launch is dear, so none is left for a run."""

        def run() -> None:
            found = self._kept.get(key)
            if found is not None:
                assert key in self._launched or not self.sealed, f"{key} is launched for the first time"
                self._launched.add(key)
            elif not self.sealed:
                self._kept[key] = body
            (found or body)()

        return run


if __name__ == "__main__":
    from executor import session
    from executor.__main__ import main
    from executor.backing import Backing, make_backing

    def imitated(device: object, *, priority: bool) -> Backing:
        """A CPU's lanes, and graphs."""
        backing = make_backing(device, priority=priority)  # type: ignore[arg-type]
        backing.lanes.can_capture = True
        return Backing(backing.lanes, ImitatedGraphs(), backing.stopwatch, backing.close)

    vars(session)["make_backing"] = imitated
    os._exit(main())
