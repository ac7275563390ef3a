"""Every switch of the policies, so that the worth of each mechanism can be measured."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args

Synchronisation = Literal["hybrid", "cpu-gpu", "inter-stream"]
Anticipation = Literal["pairs", "scalar", "off"]
Decomposition = Literal["auto", "rows", "cols", "off"]
WholeSegments = Literal["auto", "on", "off"]


@dataclass(frozen=True, slots=True)
class Options:
    """Switches of the policies; the defaults are what we recommend.

    batch_size, max_wait_us, pad_to: how requests become batches (`policy.batching`).
    depth: batches in flight at once. switch_points: plan at the changes between compute and communication, not kernel
    by kernel. duration_matching: fill only what fits. anticipation: price co-running by kind pair, link and size; by
    one scalar; or not. decomposition, max_parts: along which axis and into how many pieces kernels may be cut at run
    time.
    chunks: cut long collectives too. whole_segments: fills may go on to the end of their segment where that is believed
    faster; auto: if a rehearsal on the hardware saw it pay. lookahead: consider every flight as a fill, not only the
    next in line. partition: SMs withheld from compute, -1 to choose by regime. comm_ctas: CTAs of collectives, -1 to
    choose by regime.
    adaptive: fall back to plain tensor parallelism where overlap does not pay. protect: a batch that would miss its
    deadline only if it were delayed is not delayed. sync: who orders lanes (Liger section 3.4). run_ahead: rounds that
    the host may be ahead. capture: replay runs of kernels as graphs. priority: streams have priorities. slo_us:
    end-to-end deadline.
    """

    batch_size: int = 2
    max_wait_us: float = 20_000.0
    pad_to: int = 16
    depth: int = 3
    switch_points: bool = True
    duration_matching: bool = True
    anticipation: Anticipation = "pairs"
    scalar_factor: float = 1.25
    decomposition: Decomposition = "auto"
    max_parts: int = 8
    chunks: bool = True
    whole_segments: WholeSegments = "auto"
    lookahead: bool = True
    partition: int = -1
    comm_ctas: int = -1
    adaptive: bool = True
    protect: bool = True
    sync: Synchronisation = "hybrid"
    run_ahead: int = 1
    capture: bool = True
    priority: bool = True
    slo_us: float = float("inf")

    def __post_init__(self) -> None:
        for name, low in (("batch_size", 1), ("pad_to", 1), ("depth", 1), ("max_parts", 1), ("run_ahead", 0),
                          ("partition", -1), ("comm_ctas", -1)):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or value < low:
                raise ValueError(f"policy option {name} is {value!r}; it must be a whole number, {low} or more")
        for name, least in (("max_wait_us", 0.0), ("slo_us", 0.0), ("scalar_factor", 1.0)):
            if not getattr(self, name) >= least:
                raise ValueError(f"policy option {name} is {getattr(self, name)!r}; it must be {least} or more")
        choices = {name: get_args(kind) for name, kind in
                   (("sync", Synchronisation), ("anticipation", Anticipation), ("decomposition", Decomposition),
                    ("whole_segments", WholeSegments))}  # fmt: skip
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"policy option {name} is {getattr(self, name)!r}; choose from {', '.join(allowed)}")

    @property
    def has_deadline(self) -> bool:
        """Whether plans depend on the time."""
        return self.slo_us != float("inf")


OPTION_NAMES = tuple(f.name for f in fields(Options))
