"""What the policy believes about the hardware: how long kernels take alone, and how they slow each other down."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from models.kernel import Fragment, FunctionVector, Kernel, SplitAxis
from policy.batch import on_grid
from policy.round import Lane, Launch


@dataclass(frozen=True, slots=True)
class Contention:
    """Slowdowns (1 or more) of a compute kernel and a communication kernel that run side by side.

    `start_delay_us`: how long the communication kernel waits for SMs when it arrives during the compute kernel.
    """

    compute: float = 1.0
    comm: float = 1.0
    start_delay_us: float = 0.0


# A host whose prices never vary needs this much longer for a round than they add up to, where it is the limit
# (simulated).
HOST_MARGIN = 1.065


@dataclass(frozen=True, eq=False)
class Profile:
    """Beliefs; a study may make them differ from the hardware on purpose.

    `solo_us(kernel, withheld_sms, max_ctas)`: duration alone, microseconds. `contention(compute, comm, withheld_sms,
    max_ctas)`: the pair. Both must be pure. `partitions` and `ctas` are the choices a policy has for SMs withheld from
    compute and for the CTAs of collectives (0: the library's default, `default_ctas`). The host's prices:
    `launch_us` of a launch, `collective_launch_us` of a collective's and `graph_launch_us` of a graph's (0: the same),
    `event_us` of each event that it records or waits for, `round_us` of a round besides: deciding, telling, waking up.
    `crossing_us`: how much later the device starts a launch that waits for one on another lane than one behind its own.
    `host_margin`: how much longer than these prices add up to a round should last, so that a host that stumbles is
    seldom late. `overlap_price`: how much longer than believed overlapping takes, beside one batch at a time; as seen
    where both were tried. `whole_segments`: fills that go on to the end of their segment were seen to pay.
    """

    name: str
    solo_us: Callable[[Kernel, int, int], float]
    contention: Callable[[Kernel, Kernel, int, int], Contention]
    partitions: tuple[int, ...] = (0,)
    ctas: tuple[int, ...] = (0,)
    default_ctas: int = 0
    launch_us: float = 0.0
    collective_launch_us: float = 0.0
    graph_launch_us: float = 0.0
    event_us: float = 0.0
    round_us: float = 0.0
    crossing_us: float = 0.0
    host_margin: float = HOST_MARGIN
    overlap_price: float = 1.0
    whole_segments: bool = False
    # What policies have worked out from this profile; it goes when the profile goes.
    memo: dict[Any, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        # Kernels recur at every layer and every round; the same question must not be computed again.
        solo, pair = self.solo_us, self.contention
        object.__setattr__(self, "solo_us", lru_cache(maxsize=None)(lambda k, w, c: on_grid(solo(k, w, c))))
        object.__setattr__(self, "contention", lru_cache(maxsize=None)(pair))

    def of_free_host(self) -> Profile:
        """The same, but launches and rounds cost nothing."""
        prices = dict.fromkeys(("launch_us", "collective_launch_us", "graph_launch_us", "event_us", "round_us"), 0.0)
        return replace(self, **prices, memo={})  # type: ignore[arg-type]

    def host_us(self, launch: Launch) -> float:
        """The host's price of a launch."""
        own = self.collective_launch_us if launch.lane is Lane.COMM else launch.captured and self.graph_launch_us
        return (own or self.launch_us) + self.event_us * (1 + len(launch.waits))

    def run_us(self, kernels: tuple[Kernel, ...], withheld_sms: int = 0, max_ctas: int = 0) -> float:
        """Kernels one after the other, alone."""
        return sum(self.solo_us(k, withheld_sms, max_ctas) for k in kernels)

    def range_us(
        self, vector: FunctionVector, first: int, last: int, withheld_sms: int, max_ctas: int
    ) -> tuple[float, Kernel]:
        """Kernels [first, last) of a vector one after the other, alone; and the longest of them, which stands for all
        where they share the device."""
        key = (vector, first, last, withheld_sms, max_ctas)
        known: tuple[float, Kernel] | None = self.memo.get(key)
        if known is None:
            kernels = vector.kernels[first:last]
            longest = max(kernels, key=lambda kernel: self.solo_us(kernel, withheld_sms, max_ctas))
            known = self.memo[key] = self.run_us(kernels, withheld_sms, max_ctas), longest
        return known

    def cuts(
        self, kernel: Kernel, axis: SplitAxis, parts: int, withheld_sms: int
    ) -> tuple[tuple[Fragment, float, float], ...]:
        """Every first piece of a kernel that is cut into so many parts, the largest first; how long it takes alone, and
        how long the rest does."""
        key = (kernel, axis, parts, withheld_sms)
        known: tuple[tuple[Fragment, float, float], ...] | None = self.memo.get(key)
        if known is None:
            both = ((Fragment(axis, 0, at, parts), Fragment(axis, at, parts, parts)) for at in range(parts - 1, 0, -1))
            known = self.memo[key] = tuple(
                (piece, self.part_us(kernel, piece, withheld_sms), self.part_us(kernel, rest, withheld_sms))
                for piece, rest in both
            )
        return known

    def part_us(self, kernel: Kernel, part: Fragment, withheld_sms: int = 0, max_ctas: int = 0) -> float:
        """One piece of a kernel, alone."""
        return self.solo_us(kernel.fragment(part), withheld_sms, max_ctas)
