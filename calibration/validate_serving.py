"""Serving: the simulator gets the arrivals of a real run, its policy, options, layout and what it believed."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

import msgspec

from calibration.validate_errors import NO_TARGET, Line, Point, Target, line_of
from models.config import ModelConfig
from models.transformer import Layout, Vectors
from policy.options import Options
from policy.profile_table import profile_from
from policy.scheduler import Admission, Scheduler
from sim.believe import profile_of
from sim.fitted import NO_GPU
from sim.replay import replay
from sim.simulate import Fidelity, Simulation
from sim.spec import NodeSpec
from traces.files import text_lines
from traces.metrics import metrics
from traces.request import Request
from traces.timeline import Timeline

Mode = Literal["arrivals", "admissions"]
LEVELS: dict[Mode, str] = {"arrivals": "serving, same arrivals", "admissions": "serving, same admissions"}
# Names in a result file, in the table, and what the error must not exceed.
METRICS: tuple[tuple[str, str, Target], ...] = (
    ("request_throughput", "throughput", Target(3.0)),
    ("mean_e2el_ms", "mean latency", Target(5.0)),
    ("p50_e2el_ms", "P50 latency", Target(5.0)),
    ("p90_e2el_ms", "P90 latency", Target(5.0)),
    ("p95_e2el_ms", "P95 latency", NO_TARGET),
    ("p99_e2el_ms", "P99 latency", Target(10.0)),
)


class _RunSettings(msgspec.Struct, frozen=True):
    """Of a run's settings, what decides its course."""

    model: ModelConfig
    layout: Layout
    policy: str
    requests: tuple[Request, ...]
    options: Options
    record: bool = False


class _Saved(msgspec.Struct, frozen=True):
    """A result of `weft run --save-result --save-detailed`, as far as it is needed here."""

    settings: dict[str, Any]
    admission_log: list[Admission]
    latencies: list[float]
    request_rate: float
    request_throughput: float
    mean_e2el_ms: float
    p50_e2el_ms: float
    p90_e2el_ms: float
    p95_e2el_ms: float
    p99_e2el_ms: float
    failed: int = 0
    profile: dict[str, Any] | None = None
    host: dict[str, Any] = {}
    backend: str = ""


@dataclass(frozen=True, slots=True)
class Served:
    """One real run. `key`: a hash of its settings, equal for repeats."""

    name: str
    key: str
    run: _RunSettings
    saved: _Saved

    @property
    def label(self) -> str:
        """What was served, how, and how fast it came."""
        layout, model = self.run.layout, self.run.model
        where = f"{model.model_id} x {model.num_layers}, {self.run.policy} (TP{layout.tp} x PP{layout.pp})"
        return f"{where}, {self.saved.request_rate:g} req/s"

    @property
    def gpu(self) -> str:
        """What it ran on."""
        return str(self.saved.host.get("gpu", NO_GPU))

    @property
    def link_mode(self) -> str:
        """How its ranks reached each other; empty where that is not known."""
        return str(self.saved.host.get("link_mode", ""))


@dataclass(frozen=True, slots=True)
class Group:
    """Repeats of one run, and what the simulator makes of each."""

    runs: tuple[Served, ...]
    simulated: tuple[dict[str, float], ...]

    def point(self, level: str, metric: str) -> Point:
        """Medians over the repeats; the spread is from the lowest to the highest, and unknown of a single run."""
        values = [getattr(run.saved, metric) for run in self.runs]
        spread = max(values) - min(values) if len(values) > 1 else None
        predicted = median(simulated[metric] for simulated in self.simulated)
        return Point(level, self.runs[0].label, median(values), predicted, spread)


@dataclass(slots=True)
class Serving:
    """What was compared. `out_of_range`: what the node's tables do not reach; `left_out`: runs that the simulator
    cannot make, with the reason."""

    groups: dict[Mode, list[Group]] = field(default_factory=dict)
    out_of_range: set[str] = field(default_factory=set)
    left_out: list[str] = field(default_factory=list)


# -- reading ----------------------------------------------------------------------------------------------------------


def read_runs(paths: Iterable[Path]) -> list[Served]:
    """The real runs of result files, one JSON object a line.

    Raises ValueError with file and line for anything else, and for a run that is there twice: a copy is no repeat.
    """
    found: list[Served] = []
    places: dict[bytes, str] = {}
    for path in paths:
        for number, line in text_lines(path):
            where = f"{path}:{number}"
            content = hashlib.sha256(line.encode()).digest()
            if content in places:
                raise ValueError(f"{where}: the same run as {places[content]}; a copy is no repeat, give it once")
            places[content] = where
            found.append(_served(line, where))
    return found


def _served(line: str, where: str) -> Served:
    try:
        raw = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error})") from None
    if isinstance(raw, dict) and raw.get("backend") == "simulated":
        raise ValueError(f"{where}: a simulated result; validation needs results of weft run")
    if not isinstance(raw, dict) or "settings" not in raw or "admission_log" not in raw:
        raise ValueError(f"{where}: no result of a real run with its details; save it with --save-detailed")
    try:
        saved = msgspec.convert(raw, _Saved, strict=False)
        run = msgspec.convert(saved.settings["runs"][0], _RunSettings, strict=False)
    except (msgspec.ValidationError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{where}: not the result of a run ({error})") from None
    if not saved.latencies:
        raise ValueError(f"{where}: no request of the run was answered")
    _check_numbers(saved, len(run.requests), where)
    return Served(where, _key(saved), run, saved)


def _check_numbers(saved: _Saved, num_requests: int, where: str) -> None:
    """Raises ValueError for what no run can have measured."""
    if not saved.request_rate >= 0.0:
        raise ValueError(f"{where}: request_rate is {saved.request_rate!r}; it must be 0 or more requests per second")
    for name, _, _ in METRICS:
        if not 0.0 < (value := getattr(saved, name)) < math.inf:
            raise ValueError(f"{where}: {name} is {value!r}; it must be a finite number above 0")
    if wrong := [value for value in saved.latencies if not 0.0 <= value < math.inf]:
        raise ValueError(f"{where}: latencies has {wrong[0]!r}; it must hold finite seconds, 0 or more")
    if not 0 <= saved.failed <= num_requests:
        raise ValueError(f"{where}: failed is {saved.failed}; the run has {num_requests} requests")
    answered = num_requests - saved.failed
    if len(saved.latencies) != answered:
        why = f"{answered} of {num_requests} requests were answered"
        raise ValueError(
            f"{where}: latencies has {len(saved.latencies)} entries, but {why}; the file was cut or changed"
        )


def _key(saved: _Saved) -> str:
    """A hash of the settings without the folders that a run was given, and of the machine."""
    settings = {name: value for name, value in saved.settings.items() if name not in ("output", "port")}
    runs = [{k: v for k, v in run.items() if k != "completions_path"} for run in settings.pop("runs")]
    machine = [saved.host.get("gpu"), saved.host.get("link_mode")]
    return hashlib.sha256(json.dumps([settings, runs, machine], sort_keys=True).encode()).hexdigest()[:16]


def without_recorded(runs: Sequence[Served]) -> tuple[list[Served], int]:
    """The runs to compare, and how many are left to timelines: a recorded run launches ranges with collectives piece by
    piece, so that its times are not those of a plain one. Where there is no plain run, recorded ones are compared."""
    plain = [served for served in runs if not served.run.record]
    return (plain, len(runs) - len(plain)) if plain else (list(runs), 0)


# -- simulating -------------------------------------------------------------------------------------------------------


def simulation_of(node: NodeSpec, served: Served, fidelity: Fidelity = Fidelity()) -> Simulation:
    """The run's model, layout, policy, options and measured beliefs on a simulated node. Raises ValueError if the node
    cannot hold it."""
    run = served.run
    profile = profile_from(served.saved.profile) if served.saved.profile else profile_of(node)
    scheduler = Scheduler(run.policy, run.options, profile, Vectors(run.model, run.layout))
    return Simulation(node, run.layout, scheduler, fidelity)


def simulate(
    node: NodeSpec, served: Served, mode: Mode, fidelity: Fidelity = Fidelity()
) -> tuple[Simulation, Timeline]:
    """The run with its arrivals, the simulated scheduler admitting; or with its admissions, the log deciding."""
    simulation = simulation_of(node, served, fidelity)
    requests = sorted(served.run.requests, key=lambda r: (r.arrival_us, r.request_id))
    if mode == "admissions":
        return simulation, replay(simulation, requests, served.saved.admission_log).timeline
    return simulation, simulation.run(requests)


def compare_runs(node: NodeSpec, runs: Sequence[Served], told: Callable[[], object]) -> Serving:
    """Every run both ways, repeats together; `told` is called after each of the two."""
    found = Serving()
    repeats: dict[str, list[Served]] = {}
    for served in runs:
        repeats.setdefault(served.key, []).append(served)
    for mode in LEVELS:
        for group in repeats.values():
            simulated = []
            for served in group:
                if (numbers := _numbers(node, served, mode, found)) is not None:
                    simulated.append(numbers)
                told()
            if len(simulated) == len(group):
                found.groups.setdefault(mode, []).append(Group(tuple(group), tuple(simulated)))
    return found


def _numbers(node: NodeSpec, served: Served, mode: Mode, found: Serving) -> dict[str, float] | None:
    try:
        simulation, timeline = simulate(node, served, mode)
    except ValueError as error:
        found.left_out.append(f"{served.name}: {LEVELS[mode]}: {error}")
        return None
    found.out_of_range |= simulation.out_of_range
    return metrics(timeline, len(served.run.requests))


def lines(found: Serving) -> list[Line]:
    """A line per way and metric; with several policies also one per policy, of all latencies together."""
    result = []
    for mode, groups in found.groups.items():
        level = LEVELS[mode]
        for key, name, goal in METRICS:
            # Targets are for predictions; with a run's own admissions some of its timing is given.
            target = goal if mode == "arrivals" else NO_TARGET
            result.append(line_of(level, name, [group.point(level, key) for group in groups], target))
        policies = list(dict.fromkeys(group.runs[0].run.policy for group in groups))
        for policy in policies if len(policies) > 1 else ():
            own = [group for group in groups if group.runs[0].run.policy == policy]
            points = [group.point(level, key) for group in own for key, _, _ in METRICS]
            result.append(line_of(level, f"  {policy}, all of these", points))
    return result
