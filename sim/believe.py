"""What a policy may believe of a simulated node: what measuring it would show, alone and in pairs."""

from __future__ import annotations

import simpy

from models.kernel import Kernel
from models.transformer import Layout
from policy.profile import Contention, Profile
from policy.round import Lane, Launch
from sim.cost import Costs
from sim.device import Device
from sim.link import Links, Transfer
from sim.sms import Running
from sim.spec import NodeSpec

# A pair is measured over as many compute kernels as the collective lasts, within reason.
MAX_PAIR_KERNELS = 12


def profile_of(node: NodeSpec, error: float = 1.0) -> Profile:
    """A profile that knows the node. `error` multiplies what it believes of communication, to study wrong beliefs."""
    costs = Costs(node)
    gap = node.device.kernel_gap_us

    def solo_us(kernel: Kernel, withheld_sms: int, max_ctas: int) -> float:
        own = costs.solo_us(kernel, 0 if kernel.is_communication else withheld_sms, max_ctas)
        return (own + gap) * (error if kernel.is_communication else 1.0)

    def contention(compute: Kernel, comm: Kernel, withheld_sms: int, max_ctas: int) -> Contention:
        return measure_pair(costs, compute, comm, withheld_sms, max_ctas)

    ctas = {t.ctas for t in node.link.tables if t.op == "all_reduce"}
    default = node.link.default_ctas or max(ctas, default=0)
    return Profile(
        node.name,
        solo_us,
        contention,
        node.link.partitions,
        (0, *sorted(ctas - {default})),
        default,
        launch_us=node.host.launch_us,
        collective_launch_us=node.host.collective_launch_us,
        graph_launch_us=node.host.graph_launch_us,
        event_us=node.host.event_us,
        round_us=node.host.plan_us + node.host.synchronize_us,
        crossing_us=node.device.event_gap_us,
    )


def measure_pair(costs: Costs, compute: Kernel, comm: Kernel, withheld_sms: int, max_ctas: int) -> Contention:
    """Run the kernel again and again on a simulated device, let the collective in during the first one, and look.

    The collective's wait is from then until all its CTAs are on SMs; slowdowns are over the time both run.
    """
    solo = costs.solo_us(compute, withheld_sms)
    comm_solo = costs.solo_us(comm, 0, max_ctas)
    comes = solo / 2
    count = min(MAX_PAIR_KERNELS, 2 + int(2 * comm_solo / solo))
    device, transfers = _bench(costs)
    device.issue(Launch(0, 0, count, Lane.COMPUTE, withheld_sms=withheld_sms), (compute,) * count, 0)
    late = Launch(1, 0, 1, Lane.COMM, max_ctas=max_ctas)
    device.env.timeout(comes).callbacks.append(lambda _: device.issue(late, (comm,), 0))
    device.env.run()
    begin, end = transfers[0].started_us, next(s.end_us for s in device.spans if s.is_communication)
    wait = max(0.0, begin - comes - costs.device.kernel_gap_us)
    # What the kernels took beyond their time alone is what the collective cost them while it ran.
    lost = sum(s.end_us - s.start_us - solo for s in device.spans if not s.is_communication)
    slowed = 1.0 / max(0.05, 1.0 - lost / (end - begin))
    return Contention(max(1.0, slowed), max(1.0, (end - begin) / comm_solo), wait)


def _bench(costs: Costs) -> tuple[Device, list[Transfer]]:
    """A device of its own, and the list that will hold its transfers."""
    env, transfers = simpy.Environment(), list[Transfer]()
    links = Links(env, costs, Layout().tp, folded=True)
    device = Device(env, 0, costs, priority=True, record=True)

    def join(device: Device, running: Running) -> Transfer:
        transfers.append(links.join(device, running))
        return transfers[-1]

    device.join = join
    return device, transfers
