"""Process groups: the ranks of a stage, with a communicator per number of CTAs, and the edges between stages."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store

from executor.operations import Collective
from executor.settings import Backend
from models.kernel import Fragment, Kind
from models.transformer import Layout

Group = dist.ProcessGroup
# Newer torch has another name for it and warns at the old one.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True, slots=True)
class Place:
    """Who this process is: its rank among all, the backend, its device, the timeout of the world, and who
    started it: our launcher or another."""

    rank: int
    num_ranks: int
    backend: Backend
    device: torch.device
    timeout_s: float
    launched: bool = True

    @property
    def patience(self) -> timedelta:
        """How long a collective may take: a little longer than our launcher waits, for it can tell which rank is at
        fault, and not so long that the world outlasts half a minute."""
        return timedelta(seconds=(1.2 if self.launched else 1.0) * self.timeout_s)


def device_of(backend: Backend, local_rank: int) -> torch.device:
    """The device of a rank. Raises ValueError if this machine has too few GPUs."""
    if backend == "gloo":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if local_rank >= count:
        raise ValueError(f"it needs GPU {local_rank}, but this machine has {count}; ask for fewer ranks or for gloo")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def stay_on_loopback() -> None:
    """Keep the backends' own connections on the loopback interface; for ranks of one machine."""
    names = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
    if names:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", names[0])
        os.environ.setdefault("NCCL_SOCKET_IFNAME", names[0])


def start_world(place: Place, store: Store) -> None:
    """Join the default process group; every rank must do so."""
    dist.init_process_group(
        place.backend, store=store, rank=place.rank, world_size=place.num_ranks,
        timeout=place.patience,
        device_id=place.device if place.device.type == "cuda" else None,
    )  # fmt: skip


@dataclass(slots=True)
class World:
    """All groups made so far. Making one is collective: every rank must ask for the same layouts in the same order."""

    place: Place
    _made: dict[tuple[tuple[int, ...], int, bool], Group] = field(default_factory=dict)

    def layout(self, layout: Layout, ctas: Iterable[int] = (0,)) -> Groups:
        """The groups of one layout, made where they are new."""
        rank, tp = self.place.rank, layout.tp
        by_ctas: dict[int, Group] = {}
        loose: dict[int, Group] = {}
        for stage in range(layout.pp if tp > 1 else 0):
            members = tuple(range(stage * tp, (stage + 1) * tp))
            for count in sorted({0, *ctas}):
                group = self._group(members, count)
                other = self._group(members, count, loose=True) if self.place.backend == "nccl" else group
                if rank in members:
                    by_ctas[count], loose[count] = group, other
        edges = {(low, low + tp): self._group((low, low + tp), 0) for low in range(layout.num_ranks - tp)}
        return Groups(rank, layout, by_ctas, loose, edges.get((rank - tp, rank)), edges.get((rank, rank + tp)))

    def _group(self, members: tuple[int, ...], ctas: int, *, loose: bool = False) -> Group:
        key = (members, ctas, loose)
        if key not in self._made:
            options = None
            if self.place.backend == "nccl":
                options = dist.ProcessGroupNCCL.Options()
                # In clusters, NCCL's default on some GPUs, CTAs would start only where several SMs of one part of the
                # GPU are free at once. Alone they are as fast one by one; beside GEMMs they wait for less.
                options.config.cga_cluster_size = 1
                if ctas:
                    # Exactly so many: where NCCL takes fewer by itself, more can be faster.
                    options.config.min_ctas = options.config.max_ctas = ctas
            self._made[key] = dist.new_group(list(members), backend=self.place.backend, pg_options=options,
                                             timeout=self.place.patience)  # fmt: skip
        return self._made[key]


@dataclass(frozen=True, slots=True)
class Groups:
    """One rank's groups under one layout, and the calls on them. On CUDA every call runs on the current stream.

    `loose`: for calls that no graph holds, among graphs that hold others. NCCL without NCCL_GRAPH_MIXING_SUPPORT, which
    costs every launch of a graph dear, forbids both on one communicator at a time.
    """

    rank: int
    layout: Layout
    by_ctas: dict[int, Group]
    loose: dict[int, Group]
    prev: Group | None
    next: Group | None

    def name(self, collective: Collective) -> str:
        """The group of a collective, by a word and its ranks."""
        tp = self.layout.tp
        if collective.group == "tp":
            return "tp " + ",".join(map(str, self._stage()))
        low = self.rank if collective.group == "next" else self.rank - tp
        return f"edge {low},{low + tp}"

    @property
    def stage_name(self) -> str:
        """All ranks that issue the same as this one."""
        return "stage " + ",".join(map(str, self._stage()))

    def _stage(self) -> range:
        first = self.layout.stage_of(self.rank) * self.layout.tp
        return range(first, first + self.layout.tp)

    def call(self, collective: Collective, part: Fragment | None = None, max_ctas: int = 0) -> None:
        """Run one collective, or one chunk of it."""
        self.call_of(collective, part, max_ctas)()

    def call_of(
        self, collective: Collective, part: Fragment | None = None, max_ctas: int = 0, *, loose: bool = False
    ) -> Callable[[], None]:
        """The call that runs it; an all-reduce is prepared once, since its price is paid at every layer."""
        groups = self.loose if loose else self.by_ctas
        if collective.kind is not Kind.ALL_REDUCE:
            return lambda: self._move(collective, part, groups)
        buffers, group, options = [collective.chunk(part)], groups[max_ctas], _sum_options()

        def call() -> None:
            work = group.allreduce(buffers, options)
            if work is not None:  # NCCL has none to wait for: it runs on the current stream
                work.wait()

        return call

    def _move(self, collective: Collective, part: Fragment | None, groups: dict[int, Group]) -> None:
        buffer, tp = collective.chunk(part), self.layout.tp
        if collective.kind is Kind.ALL_GATHER:
            assert collective.out is not None
            _all_gather(collective.out, buffer, group=groups[0])
        elif collective.kind is Kind.SEND:
            dist.send(buffer, self.rank + tp, group=self.next)
        else:
            dist.recv(buffer, self.rank - tp, group=self.prev)

    def warm_up(self, like: torch.Tensor) -> None:
        """Use every group and edge, in one order on all ranks: connections are made at the first use, and a library may
        want other ones for other sizes. Inside a capture they could not be made any more."""
        flat = like.clone().view(-1)
        for group in (*self.by_ctas.values(), *self.loose.values()):
            size = flat.numel()
            while size:
                dist.all_reduce(flat[:size], group=group)
                size //= 2
        small = like.view(-1)[:1].clone()
        if self.prev is not None:
            dist.recv(small, self.rank - self.layout.tp, group=self.prev)
        if self.next is not None:
            dist.send(small, self.rank + self.layout.tp, group=self.next)


def _sum_options() -> Any:
    """A sum whose caller does not go on before it; on CUDA, on the current stream."""
    options: Any = dist.AllreduceOptions()
    options.reduceOp = dist.ReduceOp.SUM
    options.asyncOp = False
    return options
