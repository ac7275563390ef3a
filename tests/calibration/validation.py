"""Truths for the tests of validation: what measuring and serving on a simulated node would leave behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import msgspec
import pytest

from calibration.compare import AS_IS, Source
from calibration.kernels import collective_of, kernel_of
from calibration.race import Pair, race
from calibration.validate import Inputs, Validation, validate
from calibration.validate_errors import Line
from calibration.validate_ranking import Cell
from calibration.validate_serving import METRICS, Served, read_runs, simulation_of
from calibration.validate_two_batches import GraphWorld
from models.config import load_model
from models.transformer import Layout
from policy.options import Options
from sim.cost import Costs
from sim.simulate import Fidelity
from sim.spec import NodeSpec, load_node
from tests.worlds import changed
from traces.measurement import Coordinates, Measurement
from traces.metrics import metrics
from traces.request import Request

ROOT = Path(__file__).resolve().parents[2]
FORWARD = ROOT / "benchmarks" / "data" / "h200-x4-2026-11-21" / "forward.jsonl"
TODAY = date(2026, 11, 22)
NODE = load_node("h200-nvlink-x4")
PNG = b"\x89PNG\r\n\x1a\n"
CELL = Cell("tiny-opt", 4, 32, 16, 2)
SCHEDULES = ("serial", "policy", "partition 0 ctas 0", "partition 8 ctas 0", "partition 32 ctas 0")


def measured(what: str, at: dict[str, Any], **values: float) -> Measurement:
    return Measurement(what, at, values, {name: 0.01 * value for name, value in values.items()}, 5)


def kernels_of(node: NodeSpec) -> list[Measurement]:
    """What measuring a simulated node's kernels and pairs would give, over many shapes."""
    costs, gap, rows = Costs(node), node.device.graph_gap_us, []
    for cols in range(1024, 9 * 1024, 1024):
        at = {"name": "fc1", "rows": 64, "cols": cols, "inner": 8192, "withheld_sms": 0, "element_bytes": 2}
        rows.append(measured("gemm", at, us=costs.solo_us(kernel_of(measured("gemm", at, us=1.0))) + gap))
        pair = {**at, "compute": "fc1", "kind": "gemm", "op": "all_reduce", "bytes": 2**20, "num_ranks": 4, "ctas": 0,
                "priority": 1}  # fmt: skip
        empty = measured("pair", pair, us=1.0)
        rows.append(measured("pair", pair, **asdict(race(costs, Pair(kernel_of(empty), collective_of(empty))))))
    for exponent in range(17, 27):
        at = {"op": "all_reduce", "bytes": 2**exponent, "num_ranks": 4, "ctas": 0}
        rows.append(
            measured("collective", at, us=costs.solo_us(collective_of(measured("collective", at, us=1.0))) + gap)
        )
    return rows


def batches_of(node: NodeSpec, change: Callable[[float], float] = lambda us: us, spread: float = 0.0) -> Source:
    """Schedules of two batches as a simulated node runs them; `change` makes the hardware different."""
    at: Coordinates = {"model": CELL.model, "num_layers": 4, "rows": 32, "length": 16, "num_ranks": 2}
    world, rows = GraphWorld(node), []
    for schedule in SCHEDULES:
        us = change(world.makespan_us(CELL, schedule)[0])
        rows.append(Measurement("two_batches", at | {"schedule": schedule}, {"us": us}, {"us": spread}, 5))
    return Source("synthetic", tuple(rows), AS_IS, "NVIDIA H200", "2026-11-21")


def served(node: NodeSpec, folder: Path, *, rate: float = 400.0, policy: str = "interleaved", repeats: int = 1) -> Path:
    """A result file as `weft run` saves it, of a run that a simulated node made."""
    from executor.settings import RunSettings, Settings, encode

    requests = tuple(Request(number, number * 1e6 / rate, 16 + 8 * (number % 5)) for number in range(24))
    run = RunSettings(
        model=load_model("tiny-opt"), layout=Layout(2, 1), policy=policy, requests=requests, options=Options()
    )
    path = folder / "runs.jsonl"
    for number in range(repeats):
        where = str(folder / str(number))
        run = msgspec.structs.replace(run, completions_path=f"{where}/completions.jsonl")
        settings = Settings(runs=(run,), output=where)
        about: dict[str, Any] = {
            "settings": msgspec.json.decode(encode(settings)),
            "admission_log": [],
            "profile": None,
        }
        about |= {
            "request_rate": rate,
            "latencies": [1.0] * len(requests),
            "host": {"gpu": "NVIDIA H200", "link_mode": AS_IS},
        }
        empty = dict.fromkeys((key for key, _, _ in METRICS), 1.0)
        (folder / "empty.json").write_text(json.dumps(about | empty))
        simulation = simulation_of(node, read_runs([folder / "empty.json"])[0], Fidelity(exact=True))
        numbers = metrics(simulation.run(requests))
        about["wall_s"] = float(number)  # no two runs are the same to the last digit
        about["admission_log"] = msgspec.to_builtins(simulation.scheduler.log)
        with path.open("a") as file:
            file.write(json.dumps(about | numbers) + "\n")
    return path


def check(node: NodeSpec, *sources: Source, runs: tuple[Served, ...] = (), all_rows: bool = False) -> Validation:
    return validate(node, Inputs(sources, runs, all_rows), TODAY)


def line(found: Validation, what: str, level: str = "") -> Line:
    return next(item for item in found.lines if item.what.strip() == what and item.level.startswith(level))


def slower_links(node: NodeSpec, factor: float) -> NodeSpec:
    tables = tuple(msgspec.structs.replace(t, us=tuple(factor * us for us in t.us)) for t in node.link.tables)
    return changed(node, "link", tables=tables)


def one_error(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("weft: error: ")
    assert captured.err.count("\n") == 1
    return captured.err
