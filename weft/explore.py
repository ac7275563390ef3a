"""The feasible region: which latency at which throughput each policy reaches, on the same requests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import product

import msgspec
import numpy as np
from numpy.typing import NDArray

from models.config import load_model
from sim.spec import load_node
from weft.backends import LOCAL, Backend, run_all
from weft.bound import ideal_bound
from weft.runs import RunConfig, check_lengths, check_options, config_hash, layout_of, make_requests, simulate
from weft.store import Row, Store

Floats = NDArray[np.float64]

# All policies meet at these shares of the reference policy's capacity; the table compares them there.
COMMON_LOADS = (0.1, 0.25, 0.5, 0.75, 0.9)
# And each is followed to its own saturation.
OWN_LOADS = (0.6, 0.8, 0.9, 0.95, 1.0)
REFERENCE = "tensor"
SATURATED = float("inf")
# Rates this close together are one run.
SAME = 0.05


@dataclass(frozen=True, slots=True)
class Study:
    """What is compared: `policies` on every model and node, otherwise as in `base`. No `rates`: chosen by capacity."""

    base: RunConfig
    policies: tuple[str, ...] = ("tensor", "pipeline", "hybrid", "interleaved")
    models: tuple[str, ...] = ("glm-130b",)
    nodes: tuple[str, ...] = ("a100-pcie-x4",)
    rates: tuple[float, ...] = ()

    def places(self) -> tuple[RunConfig, ...]:
        """One configuration per model and node, whose policy and rate are still open."""
        return tuple(
            msgspec.structs.replace(self.base, model=model, node=node)
            for model, node in product(self.models, self.nodes)
        )

    def runs(self, place: RunConfig, policy: str, rates: Sequence[float]) -> list[RunConfig]:
        """The runs of one policy at these rates."""
        return [msgspec.structs.replace(place, policy=policy, request_rate=rate) for rate in rates]

    def check(self) -> None:
        """Raises ValueError, before anything runs, if a combination is not possible."""
        for name, values in (("policies", self.policies), ("models", self.models), ("nodes", self.nodes)):
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} to explore are {', '.join(values) or 'none'}; name one or more, each once")
        for place, policy in product(self.places(), self.policies):
            run = self.runs(place, policy, [SATURATED])[0]
            run.check()
            shape, node = load_model(run.model), load_node(run.node)
            layout_of(policy, node.num_gpus, run.tp, run.pp).check(shape)
            check_options(run.options, shape, node)
        for rate in self.rates:
            if not 0.0 < rate < SATURATED:
                raise ValueError(f"request rate {rate:g} is not possible here; give finite requests per second above 0")
        requests = make_requests(self.base)
        for model in self.models:
            check_lengths(requests, load_model(model))


@dataclass(frozen=True, slots=True)
class Curve:
    """One policy at one place: `rows` are its runs by rising rate, `capacity` its requests per second at saturation."""

    policy: str
    capacity: float
    rows: tuple[Row, ...]

    def throughputs(self) -> Floats:
        """Requests per second that were answered, by rising rate."""
        return np.array([row["request_throughput"] for row in self.rows])

    def latencies_ms(self, percentile: int) -> Floats:
        """The percentile of the end-to-end latency, by rising rate."""
        return np.array([row[f"p{percentile}_e2el_ms"] for row in self.rows])

    def at(self, rate: float) -> Row | None:
        """The run at this rate, or None if the policy saturates before it."""
        return next((row for row in self.rows if row["request_rate"] == rate), None) if rate < self.capacity else None

    def best_under(self, slo_ms: float, percentile: int) -> float:
        """The most requests per second with the percentile within the SLO, interpolated between runs; 0 if none."""
        best = 0.0
        points = list(zip(self.throughputs(), self.latencies_ms(percentile), strict=True))
        for number, (throughput, latency) in enumerate(points):
            if latency <= slo_ms:
                best = max(best, float(throughput))
            elif number and points[number - 1][1] <= slo_ms:
                low, fast = points[number - 1]
                share = (slo_ms - fast) / (latency - fast)
                best = max(best, float(low + share * (throughput - low)))
        return best


@dataclass(frozen=True, slots=True)
class Region:
    """What is reachable at one place. `loads`: the rates at which all policies are compared; `bound`: ideal overlap."""

    place: RunConfig
    curves: tuple[Curve, ...]
    loads: tuple[float, ...]
    bound: float

    @property
    def reference(self) -> Curve:
        """The policy that the others are measured against: tensor parallelism, or else the first to saturate."""
        named = [curve for curve in self.curves if curve.policy == REFERENCE]
        return named[0] if named else min(self.curves, key=lambda curve: curve.capacity)

    @property
    def grounds(self) -> Row:
        """What the picture rests on, as in one run's result: estimates and extrapolations of any of its runs."""
        rows = [row for curve in self.curves for row in curve.rows]
        grounds: Row = {"node": rows[0]["node"]}
        for key in ("memory_notes", "estimates_used", "out_of_range", "fit_notes"):
            grounds[key] = list(dict.fromkeys(name for row in rows for name in row.get(key, [])))
        grounds["fit_date"] = rows[0].get("fit_date", "")
        return grounds


def envelope(curves: Sequence[Curve], percentile: int, throughputs: Floats) -> Floats:
    """The lowest latency (ms) of any policy at each throughput, between runs on a logarithmic scale; NaN beyond all."""
    lowest = np.full(len(throughputs), np.nan)
    for curve in curves:
        order = np.argsort(curve.throughputs(), kind="stable")
        x, y = curve.throughputs()[order], np.log(curve.latencies_ms(percentile)[order])
        latency = np.exp(np.interp(throughputs, x, y, left=np.nan, right=np.nan))
        lowest = np.fmin(lowest, latency)
    return lowest


def explore(
    study: Study,
    store: Store,
    backend: Backend = LOCAL,
    progress: Callable[[int, int], object] = lambda finished, planned: None,
) -> list[Region]:
    """Run what is not in the store yet, and return a region per model and node. `progress(finished, planned)`.

    First every policy's capacity, with all requests at once; then the rates that follow from it. An interrupt leaves
    the finished runs in the store, and the same study goes on from there.
    """
    study.check()
    backend.check()
    places = study.places()
    saturated = [run for place in places for policy in study.policies for run in study.runs(place, policy, [SATURATED])]
    per_policy = len(study.rates or COMMON_LOADS + OWN_LOADS)
    _finish(saturated, store, backend, lambda done: progress(done, len(saturated) * (1 + per_policy)))
    chosen = [(place, capacities, _loads(study, capacities)) for place, capacities in _capacities(study, store)]
    runs = {
        (place, policy): study.runs(place, policy, study.rates or _rates(capacities[policy], loads))
        for place, capacities, loads in chosen
        for policy in study.policies
    }
    flat = [run for group in runs.values() for run in group]
    done_before = len(saturated)
    _finish(flat, store, backend, lambda done: progress(done_before + done, done_before + len(flat)))
    regions = []
    for place, capacities, loads in chosen:
        curves = tuple(
            Curve(policy, capacities[policy], tuple(store.rows[config_hash(run)] for run in runs[place, policy]))
            for policy in study.policies
        )
        regions.append(Region(place, curves, loads, ideal_bound(place)))
    return regions


def run_one(config: RunConfig) -> Row:
    """One run, as the store keeps it."""
    return simulate(config).result


def _finish(runs: list[RunConfig], store: Store, backend: Backend, progress: Callable[[int], object]) -> None:
    """Run what the store does not have; the policies that take longest to simulate go first."""
    todo = {key: run for run in runs if (key := config_hash(run)) not in store.rows}
    done = len(runs) - len(todo)
    progress(done)
    if not todo:
        return
    ordered = sorted(todo.values(), key=lambda run: run.policy in ("tensor", "pipeline", "hybrid"))
    with closing(run_all(run_one, ordered, backend)) as results:
        for row in results:
            store.add(row)
            done += 1
            progress(done)


def _capacities(study: Study, store: Store) -> Iterator[tuple[RunConfig, dict[str, float]]]:
    for place in study.places():
        yield (
            place,
            {
                policy: store.rows[config_hash(study.runs(place, policy, [SATURATED])[0])]["request_throughput"]
                for policy in study.policies
            },
        )


def _loads(study: Study, capacities: dict[str, float]) -> tuple[float, ...]:
    """The rates at which all policies are compared."""
    if study.rates:
        return tuple(sorted(study.rates))
    reference = capacities.get(REFERENCE, min(capacities.values()))
    return tuple(_rounded(share * reference) for share in COMMON_LOADS)


def _rates(capacity: float, loads: tuple[float, ...]) -> list[float]:
    """The common loads below a policy's capacity, and its own way to saturation."""
    common = [load for load in loads if load < capacity]
    own = [_rounded(share * capacity) for share in OWN_LOADS]
    return sorted([*common, *(rate for rate in own if all(abs(rate - load) > SAME * rate for load in common))])


def _rounded(rate: float) -> float:
    """Three digits: as exact as a rate need be, and readable."""
    return float(f"{rate:.3g}")
