"""Whether graphs can be captured on a partition's stream, and the host's price of every kind of call."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

from executor.about import describe
from executor.cuda import new_event, new_stream
from executor.lanes import StreamKey
from executor.operations import Collective
from executor.session import Opened, Session
from executor.survey_cuda import host_us
from executor.survey_host import wake_up_us
from executor.two_batches import captured, only
from policy.round import Lane

Body = Callable[[], None]


def costs(session: Session, opened: Opened) -> dict[str, Any]:
    """What works, and what it costs the host."""
    values: dict[str, Any] = {"profile": opened.table, "num_graphs": opened.backing.num_graphs,
                              "refused": opened.backing.refused, "note_us": _note_us(session),
                              "host": describe(session.place)}  # fmt: skip
    if session.place.device.type == "cuda":
        values |= _call_costs(opened)
        values["gemm_us_by_withheld"] = _partitions(opened)
    return values


def _note_us(session: Session) -> float:
    """From a post of rank 0 to its receipt, there and back, halved."""
    mail, times = session.mail, []
    for number in range(100):
        mail.together(f"start/{number}")
        started = time.perf_counter()
        if mail.rank == 0:
            mail.give(f"ping/{number}", 0)
            mail.take(f"pong/{number}", int)
        elif mail.rank == 1:
            mail.take(f"ping/{number}", int)
            mail.give(f"pong/{number}", 0)
        times.append((time.perf_counter() - started) * 5e5)
    return median(times)


def _call_costs(opened: Opened) -> dict[str, float]:
    device = opened.device
    operations = device.bound(0, opened.shapes[-1])
    gemm = _kernel(opened, "fc1")
    reduce = next(op for op in operations if isinstance(op, Collective))
    side = new_stream(device.parts.weights.layers[0].qkv.weight.device, 0)
    event = new_event()

    def hop() -> None:
        event.record()
        side.wait_event(event)

    graph = captured(only(device, opened.shapes[-1], comm=False), opened, StreamKey(Lane.COMPUTE))
    calls: dict[str, Body] = {"launch_us": lambda: gemm(None), "record_and_wait_us": hop,
                              "all_reduce_us": lambda: device.parts.groups.call(reduce)}  # fmt: skip
    found = {name: median(host_us(call)) for name, call in calls.items()}
    found["graph_replay_us"] = median(host_us(graph.replay, count=5))
    found["sleeping_wake_up_us"] = median(wake_up_us(spin=False) for _ in range(30))
    found["spinning_wake_up_us"] = median(wake_up_us(spin=True) for _ in range(30))
    return found


def _kernel(opened: Opened, name: str) -> Callable[[None], None]:
    operations = opened.device.bound(0, opened.shapes[-1])
    vector = opened.scheduler().vectors_of(opened.shapes[-1])[0]
    found = next(op for op, kernel in zip(operations, vector.kernels, strict=True) if kernel.name == name)
    assert not isinstance(found, Collective)
    return found


def _partitions(opened: Opened) -> dict[str, float]:
    """The widest GEMM under every partition: that they bind at all."""
    gemm = _kernel(opened, "fc1")
    watch, calls = opened.backing.stopwatch, [lambda: gemm(None)] * 20
    return {str(p): watch.alone_us(StreamKey(Lane.COMPUTE, p), calls) for p in opened.run.partitions}
