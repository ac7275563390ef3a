"""Lanes made of CUDA streams: one per lane, and one more per lane for every SM partition that is asked for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from executor.cuda import elapsed_us, enter, has_ended, hold, new_event, new_stream, partition_stream, priorities
from executor.lanes import Clock, StreamKey, Ticket, Work, random_delays
from policy.round import Lane

# Place in the range of priorities: communication first, then the oldest batch, then fills.
URGENCY = {Lane.COMM: 1.0, Lane.COMPUTE: 0.5, Lane.FILL: 0.0}
CYCLES_PER_US = 1_500.0


def given_sms(asked: int, capability: tuple[int, int]) -> int:
    """SMs of a green context that was asked for so many: they come by the eight from compute capability 9.0 on, by the
    two before (CUDA programming guide, green contexts)."""
    together = 8 if capability >= (9, 0) else 2
    return math.ceil(asked / together) * together


class CudaTicket:
    """Work on a stream. `end` is recorded behind it, `start` before it where times are wanted."""

    __slots__ = ("done", "end", "key", "start")

    def __init__(self, key: StreamKey, start: torch.cuda.Event | None, end: torch.cuda.Event) -> None:
        self.key, self.start, self.end, self.done = key, start, end, False


class CudaLanes:
    """Streams of one GPU, made once: torch deals streams from a pool, and the thirty-third would be the first again.

    `timing`: events carry times (at a microsecond or so each). Partitions are green contexts: what runs on their
    streams gets no more than the SMs that are not withheld. Collectives stay outside, on the COMM stream.
    """

    can_capture = True

    def __init__(self, device: torch.device, *, priority: bool, timing: bool = True) -> None:
        self.device, self.timing, self.spin = device, timing, False
        least, greatest = priorities()
        self._streams: dict[StreamKey, torch.cuda.Stream] = {}
        for lane in Lane:
            level = round(least + URGENCY[lane] * (greatest - least)) if priority else 0
            self._streams[StreamKey(lane)] = new_stream(device, level)
        self._contexts: dict[int, Any] = {}
        self._free: dict[bool, list[torch.cuda.Event]] = {True: [], False: []}
        self._base = new_event(timing=True)
        self._base_us = 0.0
        self._clock = Clock()
        self._delays_us: Iterator[float] = random_delays(0.0, (0,))
        self._delayed = False
        self.capturing = False
        self._current: torch.cuda.Stream | None = None

    # -- streams ----------------------------------------------------------------------------------------------------

    def stream(self, key: StreamKey) -> torch.cuda.Stream:
        """The stream of a lane under a partition."""
        stream = self._streams.get(key)
        if stream is None:
            stream = self._streams[key] = self._partition_stream(key.withheld_sms)
        return stream

    def _partition_stream(self, withheld_sms: int) -> torch.cuda.Stream:
        """Of the green context of all SMs but these. Both compute lanes share it, as they share the SMs."""
        total = torch.cuda.get_device_properties(self.device).multi_processor_count
        if not 0 < withheld_sms < total:
            raise ValueError(f"{withheld_sms} SMs cannot be withheld from compute: the GPU has {total}")
        if withheld_sms not in self._contexts:
            from torch.cuda.green_contexts import GreenContext

            context = GreenContext.create(num_sms=total - withheld_sms, device_id=self.device.index)
            self._contexts[withheld_sms] = context
        given = given_sms(total - withheld_sms, torch.cuda.get_device_capability(self.device))
        return partition_stream(self._contexts[withheld_sms], max(0, total - given))

    # -- work -------------------------------------------------------------------------------------------------------

    def run(self, key: StreamKey, waits: Sequence[Ticket], work: Work) -> CudaTicket:
        """Issue work on a stream, behind the tickets."""
        stream = self.stream(key)
        for wait in waits:
            if not wait.done:
                stream.wait_event(wait.end)  # type: ignore[attr-defined]
        if stream is not self._current:
            # Not set back afterwards: the next piece sets its own, and nothing else here depends on it.
            enter(stream)
            self._current = stream
        if self._delayed:
            hold(int(next(self._delays_us) * CYCLES_PER_US))
        start = None
        if self.timing and not self.capturing:
            start = self._event()
            start.record(stream)
        work()
        end = self._event()
        end.record(stream)
        return CudaTicket(key, start, end)

    def leave(self) -> None:
        """Make the default stream current again."""
        enter(torch.cuda.default_stream(self.device))
        self._current = None

    def _event(self) -> torch.cuda.Event:
        """A free event. Events that a capture recorded belong to its graph and are not used again."""
        timing = self.timing and not self.capturing
        free = self._free[timing]
        if free and not self.capturing:
            return free.pop()
        return new_event(timing=timing)

    def synchronize(self, ticket: Ticket) -> None:
        """Sleep (or spin) until the work has ended."""
        assert isinstance(ticket, CudaTicket)
        if self.spin:
            while not self.is_done(ticket):
                pass
        elif not ticket.done:
            ticket.end.synchronize()

    def is_done(self, ticket: Ticket) -> bool:
        """Whether the work has ended."""
        assert isinstance(ticket, CudaTicket)
        return ticket.done or has_ended(ticket.end)

    def times_us(self, ticket: Ticket) -> tuple[float, float]:
        """Start and end on the clock of the run, by the device's own time stamps; without timing the host's present."""
        assert isinstance(ticket, CudaTicket)
        if ticket.start is None:
            now = self._clock.now_us()
            return now, now
        start_us = self._base_us + elapsed_us(self._base, ticket.start)
        return start_us, start_us + elapsed_us(ticket.start, ticket.end)

    def release(self, ticket: Ticket) -> None:
        """The events of finished work serve again; nobody will wait for it, since it is done."""
        assert isinstance(ticket, CudaTicket)
        if ticket.done:
            return
        ticket.done = True
        self._free[ticket.start is not None].append(ticket.end)
        if ticket.start is not None:
            self._free[True].append(ticket.start)

    def begin_run(self, clock: Clock, delay_us: float, seed: tuple[int, ...]) -> None:
        """Times are on this clock from now on; every piece of work is held up to `delay_us` on its stream."""
        self._clock, self._delayed = clock, delay_us > 0.0
        self._delays_us = random_delays(delay_us, seed)
        self.rebase()

    def rebase(self) -> None:
        """Tie the device's clock to the host's. Event times are 32-bit milliseconds: a base too old costs precision."""
        torch.cuda.synchronize(self.device)
        # Not a blocking event: the time that a sleeping host takes to wake up would be an error of the clock.
        self._base = new_event(timing=True, blocking=False)
        self._base.record(self.stream(StreamKey(Lane.COMPUTE)))
        self._base.synchronize()
        self._base_us = self._clock.now_us()

    def drain(self) -> None:
        """Wait for everything."""
        torch.cuda.synchronize(self.device)
        self.leave()
