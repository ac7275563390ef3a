"""Two batches through a whole forward pass, timed inside a rank: the parts alone, one after the other, interleaved."""

from __future__ import annotations

import time
from dataclasses import replace
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.gpu_world import BELIEFS
from calibration.compare import WHOLE
from executor.cuda import replay_us
from executor.inputs import load_own_tokens, tokens_of
from executor.lanes import StreamKey
from executor.rehearsal import forced
from executor.session import Opened, Session
from executor.settings import RunSettings
from executor.two_batches import captured, in_words, only, plan, serially, undivided
from executor.warm_up import run_through
from models.transformer import Vectors
from policy.options import Options
from policy.round import Lane
from policy.scheduler import Scheduler

# Every variant is timed in turn, several times over, so that a drift of the clock hits all alike. Before it is timed it
# runs for long enough that the GPU's power, and the clock with it, are its own and not the last variant's.
PASSES, PASS_US, RUN_IN = 3, 150_000.0, 4
# SM partitions and CTAs that are tried besides the policy's choice.
FORCED = ((0, 0), (0, 8), (16, 0), (16, 8), (32, 8))


def two_batches(session: Session, opened: Opened) -> dict[str, Any]:
    """A run's shape, two batches of it: driven by the host, and as graphs of everything."""
    values = _lives(opened)
    if session.place.device.type == "cuda":
        values |= _graphs(session, opened)
    return values


def _lives(opened: Opened) -> dict[str, Any]:
    """Both batches admitted at once and driven by the host, as in serving: until everything has ended."""
    always = replace(opened.run.options, adaptive=False)
    found = {}
    for name, scheduler in (
        ("tensor", _scheduler(opened, "tensor", opened.run.options)),
        ("interleaved", opened.scheduler()),
        ("overlapped", _scheduler(opened, "interleaved", always)),
    ):
        count = 2 if scheduler.overlapping else 1
        times = []
        for number in range(8):
            opened.device.parts.lanes.drain()
            started = time.perf_counter()
            for _ in range(2 // count):
                run_through(opened.device, scheduler, [opened.shapes[-1]] * count)
            if number >= 3:
                times.append((time.perf_counter() - started) * 1e3)
        found[f"live_{name}_ms"] = median(times)
    return found


def _graphs(session: Session, opened: Opened) -> dict[str, Any]:
    """Everything as one graph: the parts alone, tensor parallelism, the policy's plan, and forced partitions."""
    device, shape = opened.device, opened.shapes[-1]
    load_own_tokens(device.parts.slots, device.parts.weights)
    variants: dict[str, Any] = {}
    notes: dict[str, str] = {}
    for name, body in (
        ("compute", only(device, shape, comm=False)),
        ("comm", only(device, shape, comm=True)),
        ("serial", serially(device, shape)),
    ):
        variants[name] = captured(body, opened, StreamKey(Lane.COMM if name == "comm" else Lane.COMPUTE))
    for name, options in _choices(opened.run):
        try:
            variants[name] = _planned(opened, options, notes if name == "policy" else {})
        except RuntimeError as error:
            notes[f"{name}_error"] = " ".join(str(error).split())[:200]
    times = _timed(session, variants)
    # Without collectives nothing binds the ranks, and the slowest GPU is the one that others would wait for.
    by_rank = session.mail.share("computes", session.mail.gather("compute", times["compute"], float), list)
    compute, comm, serial = max(by_rank), times["comm"], times["serial"]
    ideal = 2.0 * max(compute, comm)
    plans = {name: t for name, t in times.items() if name not in ("compute", "comm", "serial")}
    best = min(plans, key=lambda name: plans[name]) if plans else ""
    chosen = WHOLE if opened.profile.whole_segments else "policy"
    return {
        "compute_ms": compute, "compute_ms_by_rank": by_rank, "comm_ms": comm, "serial_ms": serial, "ideal_ms": ideal,
        "plans_ms": plans, "best": best, "policy_efficiency": ideal / plans[chosen] if chosen in plans else None,
        "policy_gain": serial / plans[chosen] if chosen in plans else None, "chosen": chosen,
        "best_efficiency": ideal / plans[best] if best else None, "best_gain": serial / plans[best] if best else None,
        "ideal_gain": serial / ideal, "notes": notes, "difference": _difference(opened, variants, chosen),
        "beliefs": {key: opened.table.get(key) for key in BELIEFS} if opened.table else None,
    }  # fmt: skip


def _choices(run: RunSettings) -> list[tuple[str, Options]]:
    options = replace(run.options, whole_segments="off")
    found = [
        ("policy", options),
        (WHOLE, replace(options, whole_segments="on")),
        ("no decomposition", undivided(options)),
    ]
    found += [(f"partition {p}, CTAs {c or 'default'}", forced(options, p, c))
              for p, c in FORCED if p in run.partitions and c in run.ctas]  # fmt: skip
    return found


def _planned(opened: Opened, options: Options, notes: dict[str, str]) -> torch.cuda.CUDAGraph:
    """The policy's plan for two batches that enter together, captured over all lanes."""
    from executor.graphs import capture_plan

    launches = plan(opened, options)
    notes["plan"] = in_words(launches)
    return capture_plan(opened.device, launches)


def _timed(session: Session, variants: dict[str, Any]) -> dict[str, float]:
    """Milliseconds of every variant: the median over passes of the mean of a few replays."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for name, graph in variants.items():
        graph.replay()
        times[name].append(_replays(graph, 1))
    # All ranks must replay equally often; rank 0 says how often.
    counts = {name: max(2, min(50, int(PASS_US / PASSES / max(1.0, t[0])))) for name, t in times.items()}
    counts = session.mail.share("counts", counts, dict)
    times = {name: [] for name in variants}
    for _ in range(PASSES):
        for name, graph in variants.items():
            times[name].append(_replays(graph, counts[name]) / 1e3)
    return {name: median(found) for name, found in times.items()}


def _replays(graph: torch.cuda.CUDAGraph, count: int) -> float:
    """Microseconds a replay, all ranks at once."""
    torch.cuda.synchronize()
    dist.barrier()
    torch.cuda.synchronize()
    for _ in range(RUN_IN * count):
        graph.replay()
    return replay_us(graph, count)


def _difference(opened: Opened, variants: dict[str, Any], chosen: str) -> float | None:
    """Largest difference of the two batches' logits between the policy's graph and the serial one, relative."""
    if chosen not in variants or not opened.run.model.vocab_size:
        return None
    shape, slots = opened.shapes[-1], opened.device.parts.slots
    found = []
    for name in ("serial", chosen):
        for number in (0, 1):
            slots[number].poison()
            _load(opened, number)
        torch.cuda.synchronize()
        variants[name].replay()
        torch.cuda.synchronize()
        found.append(torch.stack([slots[number].result(shape).float() for number in (0, 1)]))
    return float((found[0] - found[1]).abs().max() / found[0].abs().max())


def _load(opened: Opened, number: int) -> None:
    batch, slot = _batch(opened), opened.device.parts.slots[number]
    slot.load(batch.shape, slot.pack(batch.shape, *tokens_of(batch, opened.run.model, opened.run.seed)))


def _batch(opened: Opened) -> Any:
    return _scheduler(opened, "tensor", opened.run.options).enter((opened.run.requests,), 0.0)[0]


def _scheduler(opened: Opened, policy: str, options: Options) -> Scheduler:
    """One of another policy or other options, without the run's graphs of whole plans."""
    return Scheduler(policy, options, opened.profile, Vectors(opened.run.model, opened.run.layout))
