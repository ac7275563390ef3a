"""What a policy may believe of a simulated node: solo durations and pair slowdowns, from the node's own parameters."""

from __future__ import annotations

from models.kernel import Kernel, Kind
from policy.profile import Contention, Profile
from sim.cost import Costs, cta_shape, memory_bandwidth
from sim.spec import NodeSpec


def profile_of(node: NodeSpec, error: float = 1.0) -> Profile:
    """A profile that knows the node. `error` multiplies what it believes of communication, to study wrong beliefs."""
    costs = Costs(node)
    gap = node.device.kernel_gap_us

    def solo_us(kernel: Kernel, withheld_sms: int, max_ctas: int) -> float:
        own = costs.solo_us(kernel, 0 if kernel.is_communication else withheld_sms, max_ctas)
        return (own + gap) * (error if kernel.is_communication else 1.0)

    def contention(compute: Kernel, comm: Kernel, withheld_sms: int, max_ctas: int) -> Contention:
        return pair_contention(costs, compute, comm, withheld_sms, max_ctas)

    ctas = {t.ctas for t in node.link.tables if t.op == "all_reduce"}
    default = max(ctas, default=0)
    return Profile(
        node.name, solo_us, contention, node.link.partitions, (0, *sorted(ctas - {default})),
        launch_us=node.host.launch_us,
    )  # fmt: skip


def pair_contention(costs: Costs, compute: Kernel, comm: Kernel, withheld_sms: int, max_ctas: int) -> Contention:
    """How a compute and a communication kernel slow each other down: SMs taken, memory shared, and the rest.

    A collective that arrives in the middle of a wave waits half a wave on average, unless SMs are withheld for it.
    """
    node, device = costs.node, costs.device
    ctas = min(costs.ctas_of(comm, max_ctas), device.num_sms - 1)
    shape = cta_shape(compute, device)
    given = device.num_sms - withheld_sms
    left = min(given, device.num_sms - ctas)
    alone = costs.solo_us(compute, withheld_sms)
    squeezed = costs.solo_us(compute, device.num_sms - left)
    bandwidth = memory_bandwidth(device)
    comm_solo = costs.solo_us(comm, 0, max_ctas)
    wanted = min(node.link.hbm_per_byte * comm.message_bytes / comm_solo, bandwidth)
    drawn = min(bandwidth, min(left, shape.num_ctas) * shape.cta_bytes / shape.cta_us)
    crowded = max(1.0, (drawn + wanted) / bandwidth)
    by_kind = {
        Kind.GEMM: node.contention.gemm_by_comm,
        Kind.ATTENTION: node.contention.attention_by_comm,
        Kind.ELEMENTWISE: node.contention.elementwise_by_comm,
    }
    # Memory is shared max-min: whoever draws less than half is not slowed by the other.
    compute_share = crowded if drawn > bandwidth / 2 else 1.0
    comm_share = crowded if wanted > bandwidth / 2 else 1.0
    wait = 0.0 if withheld_sms >= ctas else min(shape.cta_us, alone) / 2
    return Contention(
        max(1.0, squeezed / alone) * compute_share * by_kind[compute.kind],
        comm_share * node.contention.comm_by_compute,
        wait,
    )
