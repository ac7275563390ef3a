"""A captured range that has the device to itself is one event: its course is known until something else comes.

Transfers that only wait for their other side do not disturb it: they hold SMs, but move nothing. When anything else
happens, the course is cut there and the device goes on kernel by kernel, from exactly the state it would have had.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING

from models.kernel import Kernel
from sim.cost import Costs, alone_us, memory_bandwidth, up_to_grid

if TYPE_CHECKING:
    from sim.device import Device, Entry
    from sim.sms import Running


@dataclass(frozen=True, slots=True)
class Course:
    """When each kernel of a range arrives and ends, from the first one's arrival; and busy times up to each."""

    arrives_us: tuple[float, ...]
    ends_us: tuple[float, ...]
    compute_us: tuple[float, ...]
    comm_us: tuple[float, ...]


class Courses:
    """The courses of ranges, computed once per range, SMs and gap. Ranges are known by identity: they are cached
    slices."""

    def __init__(self, costs: Costs) -> None:
        self.costs = costs
        self._known: dict[tuple[int, int, int, int, int, float], tuple[tuple[Kernel, ...], Course]] = {}

    def course(self, entry: Entry, slots: int, gap_us: float) -> Course:
        """The course of an entry's kernels from its present position on, `slots` SMs wide."""
        launch = entry.launch
        key = (id(entry.kernels), entry.position, slots, launch.withheld_sms, launch.max_ctas, gap_us)
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = (entry.kernels, self._trace(entry, slots, gap_us))
        return known[1]

    def _trace(self, entry: Entry, slots: int, gap_us: float) -> Course:
        arrives, ends, compute, comm = [], [], [0.0], [0.0]
        now, clock = 0.0, entry.clock(self.costs)
        for kernel in entry.kernels[entry.position :]:
            arrives.append(now)
            if kernel.is_communication:
                cost = self.costs.solo_us(kernel, 0, entry.launch.max_ctas)
            else:
                shape = self.costs.shape(kernel, entry.launch.withheld_sms, clock)
                cost = alone_us(shape, slots, self.costs.device)
            now += cost
            ends.append(now)
            compute.append(compute[-1] + (0.0 if kernel.is_communication else cost))
            comm.append(comm[-1] + (cost if kernel.is_communication else 0.0))
            now += gap_us
        return Course(tuple(arrives), tuple(ends), tuple(compute), tuple(comm))


class Express:
    """One range under way as one event."""

    def __init__(self, device: Device, entry: Entry, course: Course) -> None:
        self.device, self.entry, self.course = device, entry, course
        self.start_us = device.env.now
        self.done = False
        device.env.timeout(course.ends_us[-1]).callbacks.append(lambda _: self.cut())

    def cut(self) -> None:
        """Put the device into the state that it has at this moment; no more than accounts if the range is through."""
        if self.done:
            return
        self.done = True
        device, course, entry = self.device, self.course, self.entry
        device.express = None
        elapsed = device.env.now - self.start_us
        through = bisect_right(course.ends_us, elapsed)
        inside = through < len(course.ends_us) and elapsed > course.arrives_us[through]
        partial = elapsed - course.arrives_us[through] if inside else 0.0
        first = entry.position
        entry.position += through
        comm_now = inside and entry.kernels[entry.position].is_communication
        device.sms.account(
            elapsed,
            course.compute_us[through] + (0.0 if comm_now else partial),
            course.comm_us[through] + (partial if comm_now else 0.0),
            through,
        )
        for kernel in entry.kernels[first : entry.position]:
            if kernel.is_communication:
                device.communicator.popleft()
        if entry.position == len(entry.kernels):
            device.end_of(entry)
        elif inside:
            device.sms.resume(device.admit(entry), partial)
        elif elapsed == course.arrives_us[through]:
            device.arrive(entry, may_express=False)  # it meets whatever comes at the same instant
        else:
            device.arrive_after(entry, course.arrives_us[through] - elapsed)


def resumed_cohort(running: Running, elapsed: float, slots: int, costs: Costs) -> tuple[int, float, float, float]:
    """Of a compute kernel alone for `elapsed` us: (CTAs on SMs, their waves left at the start, pace, since when)."""
    shape, device = running.shape, costs.device
    assert shape is not None
    take = min(slots, shape.num_ctas)
    waves, rest = divmod(shape.num_ctas, take)
    pace = shape.pace_us(take, memory_bandwidth(device))
    full = up_to_grid(waves * pace)
    if elapsed < full or not rest:
        running.ctas_left = rest
        return take, float(waves), pace, 0.0
    running.ctas_left = 0
    return rest, 1.0, shape.pace_us(rest, memory_bandwidth(device)), full
