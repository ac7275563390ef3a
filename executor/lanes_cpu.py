"""Lanes made of threads: the twin of a GPU's streams.

Only the COMM thread talks to other ranks, in issue order, which is the order that NCCL keeps inside one communicator.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from queue import SimpleQueue

import torch

from executor.lanes import Clock, StreamKey, Ticket, Work, random_delays
from policy.round import Lane

CHECK_EVERY_S = 0.5


class CpuTicket:
    """Work on a thread's queue, and when it ran (perf_counter nanoseconds)."""

    __slots__ = ("_over", "end_ns", "key", "start_ns")

    def __init__(self, key: StreamKey) -> None:
        self.key = key
        self.start_ns = self.end_ns = 0
        self._over = threading.Event()

    @property
    def done(self) -> bool:
        """Whether the work has ended."""
        return self._over.is_set()

    def finish(self, start_ns: int, end_ns: int) -> None:
        """The work has run."""
        self.start_ns, self.end_ns = start_ns, end_ns
        self._over.set()

    def wait(self, timeout_s: float) -> bool:
        """Whether it ended within the time."""
        return self._over.wait(timeout_s)


Item = tuple[CpuTicket, tuple[CpuTicket, ...], Work]


class CpuLanes:
    """Three threads with a queue each. A failure on any of them is raised on the host's next call."""

    can_capture = False

    def __init__(self) -> None:
        self.timing, self.spin = True, False
        self._failure: BaseException | None = None
        self._queues: dict[Lane, SimpleQueue[Item | None]] = {lane: SimpleQueue() for lane in Lane}
        self._clock = Clock()
        self._delays_us = {lane: random_delays(0.0, (0,)) for lane in Lane}
        self._tails: dict[Lane, CpuTicket] = {}
        self._threads = [
            threading.Thread(target=self._work, args=(lane,), daemon=True, name=f"lane-{lane}") for lane in Lane
        ]
        for thread in self._threads:
            thread.start()

    def _work(self, lane: Lane) -> None:
        torch.set_num_threads(1)
        with torch.inference_mode():
            while (item := self._queues[lane].get()) is not None:
                ticket, waits, work = item
                start_ns = time.perf_counter_ns()
                try:
                    for wait in waits:
                        while not wait.wait(CHECK_EVERY_S):
                            if self._failure is not None:
                                return
                    if self._failure is None:
                        if delay_us := next(self._delays_us[lane]):
                            time.sleep(delay_us / 1e6)
                        start_ns = time.perf_counter_ns()
                        work()
                except BaseException as error:  # handed to the host thread, which raises it
                    self._failure = self._failure or error
                ticket.finish(start_ns, time.perf_counter_ns())

    def run(self, key: StreamKey, waits: Sequence[Ticket], work: Work) -> CpuTicket:
        """Put work on a lane's queue."""
        self._check()
        ticket = CpuTicket(key)
        self._tails[key.lane] = ticket
        self._queues[key.lane].put((ticket, tuple(w for w in waits if isinstance(w, CpuTicket)), work))
        return ticket

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def synchronize(self, ticket: Ticket) -> None:
        """Wait for the work, or for a failure anywhere."""
        assert isinstance(ticket, CpuTicket)
        while not ticket.wait(CHECK_EVERY_S):
            self._check()
        self._check()

    def is_done(self, ticket: Ticket) -> bool:
        """Whether the work has ended."""
        self._check()
        return ticket.done

    def times_us(self, ticket: Ticket) -> tuple[float, float]:
        """Start and end on the clock of the run."""
        assert isinstance(ticket, CpuTicket)
        origin = self._clock.origin_ns
        return (ticket.start_ns - origin) / 1e3, (ticket.end_ns - origin) / 1e3

    def release(self, ticket: Ticket) -> None:
        """Nothing is kept."""

    def begin_run(self, clock: Clock, delay_us: float, seed: tuple[int, ...]) -> None:
        """Times are on this clock from now on, and every piece of work waits up to `delay_us` first, at random."""
        self._clock = clock
        self._delays_us = {lane: random_delays(delay_us, (*seed, number)) for number, lane in enumerate(Lane)}

    def drain(self) -> None:
        """Wait for all three threads."""
        for ticket in self._tails.values():
            self.synchronize(ticket)

    def close(self) -> None:
        """End the threads."""
        for queue in self._queues.values():
            queue.put(None)
        for thread in self._threads:
            thread.join(timeout=1.0)
