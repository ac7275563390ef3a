"""Nodes, kernels and runs with closed-form answers, for the tests of policy and simulator."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from models.kernel import FunctionVector, Kernel, Kind, collective, gemm
from models.transformer import BatchShape, Layout
from policy.options import Options
from policy.profile import Contention, Profile
from policy.round import Round
from policy.scheduler import Scheduler
from sim.believe import profile_of
from sim.cost import Costs
from sim.simulate import Fidelity, Simulation
from sim.spec import ContentionSpec, DeviceSpec, HostSpec, LinkSpec, NodeSpec, Table
from traces.request import Request
from traces.timeline import Timeline

NUM_SMS = 100
SM_FLOPS_PER_US = 1e4
BYTES_PER_US = 1000
# One SM is enough for the ideal node's collectives, so a compute kernel of 99 CTAs never meets them.
COMM_CTAS = 1


def ideal_node(comm_ctas: int = COMM_CTAS, slowdown: float = 1.0, **host: float) -> NodeSpec:
    """Nothing costs anything but work: no gaps, a free host, memory without end, messages of 1000 bytes per us."""
    zero = dict.fromkeys(HostSpec.__struct_fields__, 0.0) | host
    device = DeviceSpec(
        name="ideal", num_sms=NUM_SMS, peak_tflops=NUM_SMS * SM_FLOPS_PER_US / 1e6, gemm_efficiency=1.0,
        attention_efficiency=1.0, hbm_gb_s=1e9, hbm_efficiency=1.0, sm_bandwidth_gb_s=1e9,
        gemm_tiles=((64, 64, 1.0),), kernel_gap_us=0.0, graph_gap_us=0.0, event_gap_us=0.0,
    )  # fmt: skip
    tables = tuple(
        Table(op=op, ranks=ranks, ctas=comm_ctas, bytes=(BYTES_PER_US, 10**9), us=(1.0, 10**9 / BYTES_PER_US))
        for op in ("all_reduce", "all_gather", "send")
        for ranks in (2, 4)
    )
    contention = ContentionSpec(
        gemm_by_comm=slowdown, attention_by_comm=slowdown, elementwise_by_comm=slowdown, comm_by_compute=slowdown
    )
    return NodeSpec(
        name="ideal", description="", num_gpus=4, device=device, host=HostSpec(**zero),
        link=LinkSpec(kind="ideal", tables=tables), contention=contention, sources={},
    )  # fmt: skip


def changed(node: NodeSpec, section: str, **values: object) -> NodeSpec:
    """The node with some numbers of one section replaced."""
    part = msgspec.structs.replace(getattr(node, section), **values)
    return msgspec.structs.replace(node, **{section: part})


def compute(us: float, name: str = "compute") -> Kernel:
    """A compute kernel of one wave on 99 SMs that takes so long, and cannot be split."""
    ctas = NUM_SMS - COMM_CTAS
    return Kernel(name, Kind.ATTENTION, flops=us * SM_FLOPS_PER_US * ctas, num_ctas=ctas)


def comm(us: float, ranks: int = 4) -> Kernel:
    """An all-reduce that takes so long on the ideal links."""
    return collective("all_reduce", Kind.ALL_REDUCE, round(us * BYTES_PER_US / 2) * 2, ranks)


def splittable(rows: int = 512, cols: int = 1024, inner: int = 1024) -> Kernel:
    """A GEMM."""
    return gemm("gemm", rows, cols, inner)


def simple_profile(node: NodeSpec, believed: Callable[[Kernel], float] = lambda kernel: 1.0) -> Profile:
    """What is true of the node, multiplied by an error per kernel."""
    costs, true = Costs(node), profile_of(node)

    def solo(kernel: Kernel, withheld: int, ctas: int) -> float:
        return costs.solo_us(kernel, withheld, ctas) * believed(kernel)

    return Profile("test", solo, lambda a, b, w, c: true.contention(a, b, w, c), (0, 8))


def no_contention(kernel: Kernel, comm: Kernel, withheld: int, ctas: int) -> Contention:
    """A belief that nothing disturbs anything."""
    return Contention()


class World:
    """A run of given function vectors: request i becomes a batch with vectors[i % len]."""

    def __init__(
        self, policy: str, node: NodeSpec, vectors: Sequence[tuple[FunctionVector, ...]], options: Options,
        *, profile: Profile | None = None, layout: Layout | None = None,
    ) -> None:  # fmt: skip
        self.node, self.vectors = node, vectors
        self.layout = layout or Layout(4, 1)
        by_length = {i + 1: vector for i, vector in enumerate(vectors)}
        self.scheduler = Scheduler(
            policy, options, profile or simple_profile(node), lambda shape: by_length[shape.padded_len]
        )
        self.rounds: list[Round] = []
        original = self.scheduler.next_round

        def watched(now_us: float = 0.0) -> Round | None:
            round_ = original(now_us)
            if round_ is not None:
                self.rounds.append(round_)
            return round_

        self.scheduler.next_round = watched  # type: ignore[method-assign]

    def run(self, arrivals_us: Sequence[float], fidelity: Fidelity = Fidelity(exact=True, record=True)) -> Timeline:
        """Simulate requests that arrive at these times; each is a batch of its own."""
        requests = [Request(i, t, i % len(self.vectors) + 1) for i, t in enumerate(arrivals_us)]
        return Simulation(self.node, self.layout, self.scheduler, fidelity).run(requests)


def alone(**options: object) -> Options:
    """Options under which every request is a batch of its own shape."""
    return Options(batch_size=1, pad_to=1, **options)  # type: ignore[arg-type]


SHAPE = BatchShape(1, 1)
