"""Collectives of any size on one rank: among all ranks, among two of them, and from one to another."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from executor.groups import Groups
from executor.operations import Collective
from executor.session import Session
from executor.survey_bench import Bench, Body, Row
from executor.survey_points import Grid, Point
from models.kernel import Kind
from models.transformer import Layout

# Calls in a graph by the size of the message, so that graphs are about as long.
SMALL_BYTES, MEDIUM_BYTES = 2**18, 2**22
SMALL_CALLS, MEDIUM_CALLS, LARGE_CALLS = 24, 10, 3


@dataclass(slots=True)
class Traffic:
    """Groups by their number of ranks, and the edge from rank 0 to another. What is sent is zeros.

    Making it is collective: every rank must.
    """

    session: Session
    dtype: torch.dtype
    groups: dict[int, Groups]
    edges: Groups | None
    _whole: torch.Tensor

    @classmethod
    def open(cls, session: Session, grid: Grid, dtype: torch.dtype) -> Traffic:
        """Connect everything that will be measured."""
        world, ranks = session.world, session.place.num_ranks
        groups, edges = {ranks: world.layout(Layout(ranks, 1), grid.ctas)}, None
        if ranks > 2 and ranks % 2 == 0:
            edges = groups[2] = world.layout(Layout(2, ranks // 2), grid.ctas[:2])
        elif ranks > 1:
            edges = world.layout(Layout(1, ranks))
        whole = torch.zeros(max(grid.sizes) // dtype.itemsize, dtype=dtype, device=session.place.device)
        for made in {id(g): g for g in (*groups.values(), edges) if g is not None}.values():
            made.warm_up(whole[:64])
        return cls(session, dtype, groups, edges, whole)

    def measure(self, bench: Bench, point: Point) -> Row | None:
        """A collective alone; nothing on ranks that have no part in it."""
        call, size = self.call(point), int(point.at["bytes"])
        if call is None:
            return None
        count = SMALL_CALLS if size <= SMALL_BYTES else MEDIUM_CALLS if size <= MEDIUM_BYTES else LARGE_CALLS
        return Row({"us": bench.comm(call, count)})

    def call(self, point: Point) -> Body | None:
        """What a point stands for, once; nothing on ranks that have no part in it."""
        op, size, ranks = str(point.at["op"]), int(point.at["bytes"]), int(point.at["num_ranks"])
        return self.transfer(size) if op == "send" else self.collective(Kind(op), size, ranks, int(point.at["ctas"]))

    def collective(self, kind: Kind, size: int, ranks: int, ctas: int) -> Body | None:
        """A collective of `size` bytes among the first ranks; of an all-gather that is the result."""
        if self.session.place.rank >= ranks:
            return None
        groups, whole = self.groups[ranks], self._whole[: size // self.dtype.itemsize]
        if kind is Kind.ALL_REDUCE:
            return partial(groups.call, Collective(kind, whole, "tp"), None, ctas)
        part = torch.zeros(len(whole) // ranks, dtype=self.dtype, device=whole.device)
        return partial(groups.call, Collective(kind, part, "tp", whole[: len(part) * ranks]))

    def transfer(self, size: int) -> Body | None:
        """A send of rank 0 to the rank that its edge leads to, or that rank's receive."""
        assert self.edges is not None
        rank, other = self.session.place.rank, self.edges.layout.tp
        buffer = self._whole[: size // self.dtype.itemsize]
        if rank == 0:
            return partial(self.edges.call, Collective(Kind.SEND, buffer, "next"))
        return partial(self.edges.call, Collective(Kind.RECV, buffer, "prev")) if rank == other else None
