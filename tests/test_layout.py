"""The house itself: who may import whom, what runs without what, and that our folders' names are ours alone."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("models", "traces", "policy", "sim", "executor", "calibration", "weft")


def modules_after(statement: str) -> set[str]:
    """The top-level modules that a fresh interpreter holds after a statement."""
    code = f"import sys\n{statement}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_floors_are_kept() -> None:
    pytest.importorskip("importlinter")
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, "--no-cache"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"Contracts: \d+ kept, 0 broken", done.stdout)


def test_the_policy_runs_without_clock_simulator_or_gpu() -> None:
    assert not modules_after("import policy.scheduler") & {"simpy", "torch", "sim", "executor"}


def test_a_simulation_runs_without_torch() -> None:
    run = "from weft.runs import RunConfig, simulate; simulate(RunConfig(model='tiny-opt', num_prompts=4))"
    assert not modules_after(run) & {"torch", "transformers", "executor", "matplotlib"}


def test_the_executor_runs_without_the_simulator() -> None:
    pytest.importorskip("torch")
    names = [file.stem for file in (ROOT / "executor").glob("*.py") if file.stem not in ("__init__", "__main__")]
    assert not modules_after("import " + ", ".join(f"executor.{name}" for name in names)) & {"simpy", "sim"}


@pytest.mark.parametrize("room", ROOMS)
def test_no_other_distribution_has_our_names(room: str) -> None:
    """Unrelated packages of these names exist; one of them installed beside us would hide or overwrite our folder."""
    owners = set(importlib.metadata.packages_distributions().get(room, []))
    assert owners <= {"weft"}


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_is_installed_typed_and_says_what_it_is_for(room: str) -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert room in settings["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert room in settings["tool"]["importlinter"]["root_packages"]
    assert (ROOT / room / "py.typed").is_file()
    assert (ROOT / room / "__init__.py").read_text().startswith('"""')


def test_constraints_are_names_and_versions_only() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*", line) for line in lines)
    assert "torch==2.13.0" in lines
    pinned = {re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower() for line in lines}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [item for extra in project["optional-dependencies"].values() for item in extra]
    names = {re.sub(r"[-_.]+", "-", re.split(r"[<>=~! ]", item)[0]).lower() for item in wanted}
    assert names <= pinned
