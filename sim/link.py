"""Links and what moves over them: collectives that meet across ranks, sends that meet their receives, shared roots."""

from __future__ import annotations

from collections import Counter
from math import fsum

import simpy

from models.kernel import Kernel, Kind
from sim.cost import DEFAULT_PATH, Costs, memory_bandwidth, up_to_grid
from sim.device import Device
from sim.sms import Running

PAIR_PATH = "pair"
# Bytes that one rank puts on the wires, per byte of message and per (n-1)/n of it (ring algorithms).
_WIRE = {Kind.ALL_REDUCE: 2.0, Kind.ALL_GATHER: 1.0}


class Transfer:
    """One collective, or one send with its receive. Starts when every side's CTAs are resident, or the first of them
    where CTAs are independent; all sides end together."""

    def __init__(self, links: Links, kernel: Kernel, sides: int, path: str, max_ctas: int) -> None:
        self.links, self.kernel, self.sides, self.path, self.max_ctas = links, kernel, sides, path, max_ctas
        table = links.costs.table(kernel, max_ctas, path)
        self.ctas = min(links.costs.ctas_of(kernel, max_ctas, path), links.costs.device.num_sms)
        self.solo_us = links.costs.solo_us(kernel, 0, max_ctas, path)
        link = links.costs.node.link
        self.bandwidth = min(
            link.hbm_per_byte * kernel.message_bytes / self.solo_us, memory_bandwidth(links.costs.device)
        )
        self.stream_share = min(1.0, table.stream_us(kernel.message_bytes) / self.solo_us)
        self.root_load = 0.0 if path == PAIR_PATH else links.root_load(kernel, self.solo_us)
        self.joined: list[tuple[Device, Running]] = []
        self.started = False
        self.started_us = 0.0
        self._resident = 0
        self._paces: dict[int, float] = {}
        self._share = 1.0
        self._left, self._pace, self._since, self._end_us, self._generation = 1.0, 0.0, 0.0, 0.0, 0

    def short_of(self, held: int) -> float:
        """How much longer than alone it takes with so many of its CTAs on SMs."""
        return 1.0 if held >= self.ctas else self.links.costs.with_fewer(self.kernel, self.max_ctas, self.path, held)

    def resident(self, device: Device) -> None:
        """One side's CTAs are on its SMs."""
        self._resident += 1
        if self._resident == self.sides:
            self.started = True
            self.started_us = self._since = device.env.now
            self.links.add(self)
            for other, _ in self.joined:
                if other is not device:
                    other.sms.unsettle()

    def set_pace(self, device: Device, pace: float) -> None:
        """How much slower than alone one side's device lets it go."""
        if self._paces.get(device.rank) != pace:
            self._paces[device.rank] = pace
            self.retime(device.env)

    def set_share(self, env: simpy.Environment, share: float) -> None:
        """The share of its bandwidth that the links leave it."""
        if share != self._share:
            self._share = share
            self.retime(env)

    def retime(self, env: simpy.Environment) -> None:
        """The slowest side and the links decide; what was done so far stays done."""
        if not self._paces:
            return
        pace = self.solo_us * max(self._paces.values()) / self._share
        if pace == self._pace:
            return
        now = env.now
        if self._pace:
            self._left = max(0.0, self._left - (now - self._since) / self._pace)
        self._pace, self._since = pace, now
        self._end_us = now + up_to_grid(self._left * pace)
        self._await_end(env)

    def _await_end(self, env: simpy.Environment) -> None:
        self._generation += 1
        generation = self._generation
        env.timeout(self._end_us - env.now).callbacks.append(lambda _: self._end(generation))

    def freeze(self, now: float) -> tuple[float, ...]:
        """What it takes to go on from here at another time; only for a transfer that has one side."""
        if not self.started or not self._pace:
            return (float(self.started),)
        (pace,) = self._paces.values()
        return (1.0, self._left, self._pace, now - self._since, self._end_us - now, pace)

    def alone_since(self, elapsed_us: float) -> tuple[float, ...]:
        """The frozen state of a transfer that has moved alone for so long."""
        return (1.0, 1.0, self.solo_us, elapsed_us, self.solo_us - elapsed_us, 1.0)

    def thaw(self, device: Device, frozen: tuple[float, ...]) -> None:
        """Go on from a frozen state, at the device's present time."""
        self.started = bool(frozen[0])
        self._resident = int(self.started)
        if not self.started:
            return
        self.links.add(self)
        now = self._since = device.env.now
        if len(frozen) > 1:
            _, self._left, self._pace, since, end, pace = frozen
            self._since, self._end_us, self._paces[device.rank] = now - since, now + end, pace
            self._await_end(device.env)

    def _end(self, generation: int) -> None:
        if generation == self._generation:
            self.links.remove(self)
            for device, running in self.joined:
                device.finish(running)


class Links:
    """All transfers of a node. `folded`: every device stands for the `tp` symmetric ranks of its stage."""

    def __init__(self, env: simpy.Environment, costs: Costs, tp: int, *, folded: bool) -> None:
        self.env, self.costs, self.tp, self.folded = env, costs, tp, folded
        self.capacity = costs.node.link.root_gb_s * 1e3
        self._open: dict[tuple[object, ...], Transfer] = {}
        self._sequence: Counter[tuple[object, ...]] = Counter()
        self._active: list[Transfer] = []

    def root_load(self, kernel: Kernel, solo_us: float) -> float:
        """Bytes per microsecond that the transfer puts on the root, all its ranks together; alone it always fits."""
        if not self.capacity:
            return 0.0
        wire = float(kernel.message_bytes)
        if kernel.kind in _WIRE:
            wire *= _WIRE[kernel.kind] * (kernel.num_ranks - 1)
        return min(wire / solo_us, self.capacity)

    def join(self, device: Device, running: Running) -> Transfer:
        """The transfer that a kernel of this device is one side of: the n-th of its group on every rank is the same."""
        kernel = running.kernel
        stage, place = divmod(device.rank, self.tp)
        point_to_point = kernel.kind in (Kind.SEND, Kind.RECV)
        if point_to_point:
            group: tuple[object, ...] = ("pp", stage - (kernel.kind is Kind.RECV), place)
        else:
            group = ("tp", stage)
        number = self._sequence[(device.rank, *group)]
        self._sequence[(device.rank, *group)] += 1
        transfer = self._open.get((*group, number))
        if transfer is None:
            sides = 2 if point_to_point else 1 if self.folded else self.tp
            path = self._path(group) if point_to_point else DEFAULT_PATH
            transfer = Transfer(self, kernel, sides, path, running.entry.launch.max_ctas)
            self._open[(*group, number)] = transfer
        transfer.joined.append((device, running))
        if len(transfer.joined) == transfer.sides:
            del self._open[(*group, number)]
        assert transfer.kernel.message_bytes == kernel.message_bytes, "ranks disagree on the message of a collective"
        return transfer

    def _path(self, group: tuple[object, ...]) -> str:
        _, stage, place = group
        assert isinstance(stage, int) and isinstance(place, int)
        ends = (stage * self.tp + place, (stage + 1) * self.tp + place)
        return PAIR_PATH if ends in self.costs.node.link.pairs else DEFAULT_PATH

    def add(self, transfer: Transfer) -> None:
        """A transfer starts to move."""
        self._active.append(transfer)
        self._share_out()

    def remove(self, transfer: Transfer) -> None:
        """A transfer is through."""
        self._active.remove(transfer)
        self._share_out()

    def _share_out(self) -> None:
        """Flows that cross the root share it in proportion to what they could use."""
        if not self.capacity:
            return
        crossing = [t for t in self._active if t.root_load]
        # A folded point-to-point transfer stands for one flow per tensor-parallel rank.
        loads = [t.root_load for t in crossing for _ in range(self._flows(t))]
        share = min(1.0, self.capacity / fsum(loads)) if loads else 1.0
        for transfer in crossing:
            transfer.set_share(self.env, share)

    def _flows(self, transfer: Transfer) -> int:
        return self.tp if self.folded and transfer.kernel.kind in (Kind.SEND, Kind.RECV) else 1
