"""What notebooks need beyond the commands: regions and comparisons in one call, and pictures that show themselves."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from models.config import load_model
from sim.believe import profile_of
from sim.simulate import Fidelity, Simulation
from sim.spec import load_node
from traces.files import write_whole
from traces.metrics import metrics
from weft.backends import LOCAL, run_all
from weft.explore import SATURATED, Region, Study, explore
from weft.region_plot import RC, draw_region
from weft.runs import Run, RunConfig, check_lengths, check_options, layout_of, make_requests, make_scheduler, simulate
from weft.store import Row, Store

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DOTS_PER_INCH = 150
NUM_COLORS = 128
# The width that a page gives it: fewer pixels than it has, so that fine screens show it sharp.
SHOWN_PER_INCH = 100


@dataclass(frozen=True, slots=True)
class Picture:
    """A PNG that notebooks show as the value of a cell. `width` is that of the page, in its pixels."""

    png: bytes = field(repr=False)
    width: int

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        return self.png, {"width": self.width}

    def save(self, path: Path) -> None:
        """Keep it as a file."""
        write_whole(path, self.png)


def picture_of(figure: Figure) -> Picture:
    """The same figure gives the same bytes; a palette makes them few, as they are kept with the notebook."""
    from PIL import Image

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH)
    with Image.open(buffer) as image:
        flat = image.convert("RGB").quantize(NUM_COLORS, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    flat.save(buffer, format="png", optimize=True)
    return Picture(buffer.getvalue(), round(figure.get_size_inches()[0] * SHOWN_PER_INCH))


def region_of(study: Study) -> Region:
    """The region at the study's one place, computed on all cores; nothing is kept on disk."""
    with TemporaryDirectory() as folder:
        regions = explore(study, Store(Path(folder) / "results.jsonl"))
    if len(regions) != 1:
        raise ValueError(f"the study has {len(regions)} models and nodes; a region is of one model on one node")
    return regions[0]


def show_region(region: Region, percentile: int = 90, slo_ms: float | None = None) -> Picture:
    """The picture that `weft explore` writes."""
    import matplotlib

    with matplotlib.rc_context(RC):
        return picture_of(draw_region(region, percentile, slo_ms))


@dataclass(frozen=True, slots=True)
class Case:
    """A run to compare; `belief` multiplies what its policy believes of the time of communication (1: the truth)."""

    config: RunConfig
    belief: float = 1.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a case reaches: requests per second when all requests wait from the start, and the P90 latency at a load."""

    capacity: float
    p90_ms: float

    def is_steady_at(self, rate: float) -> bool:
        """Whether the latency at this rate means anything; beyond the capacity it only grows with the run."""
        return rate < self.capacity


def run_case(case: Case) -> Row:
    """The metrics of one run whose policy may be wrong about the node."""
    if case.belief == 1.0:
        return simulate(case.config).result
    if not 0.0 < case.belief < SATURATED:
        raise ValueError(f"belief is {case.belief:g} times the truth; give a finite factor above 0")
    config = case.config
    config.check()
    model, node = load_model(config.model), load_node(config.node)
    layout = layout_of(config.policy, node.num_gpus, config.tp, config.pp)
    layout.check(model)
    check_options(config.options, model, node)
    requests = make_requests(config)
    check_lengths(requests, model)
    scheduler = make_scheduler(config, model, layout, profile_of(node, case.belief))
    return dict(metrics(Simulation(node, layout, scheduler).run(requests), len(requests)))


def compare(cases: Mapping[str, Case], rate: float) -> dict[str, Outcome]:
    """Every case at saturation and at `rate` requests per second, on all cores."""
    from msgspec.structs import replace

    asked = [
        (name, load, Case(replace(case.config, request_rate=load), case.belief))
        for name, case in cases.items()
        for load in (SATURATED, rate)
    ]
    rows = {(name, load): row for name, load, row in run_all(_answer, asked, LOCAL)}
    return {
        name: Outcome(rows[name, SATURATED]["request_throughput"], rows[name, rate]["p90_e2el_ms"]) for name in cases
    }


def _answer(asked: tuple[str, float, Case]) -> tuple[str, float, Row]:
    """Results come in any order, so each says what it answers."""
    name, load, case = asked
    return name, load, run_case(case)


def record(configs: Sequence[RunConfig]) -> dict[str, Run]:
    """One run per policy with every kernel kept, to look into."""
    return {config.policy: simulate(config, Fidelity(record=True)) for config in configs}


def table(outcomes: Mapping[str, Outcome], rate: float) -> str:
    """Outcomes in words, against the first of them."""
    first = next(iter(outcomes.values()))
    width = max(len(name) for name in outcomes) + 2
    lines = [f"{'simulated':<{width}}{'capacity, req/s':>18}{f'P90 ms at {rate:.1f} req/s':>24}"]
    for name, outcome in outcomes.items():
        capacity = f"{outcome.capacity:.1f} ({_change(outcome.capacity, first.capacity)})"
        latency = f"{outcome.p90_ms:.0f} ({_change(outcome.p90_ms, first.p90_ms)})"
        lines.append(f"{name:<{width}}{capacity:>18}{latency if outcome.is_steady_at(rate) else 'saturated':>24}")
    return "\n".join(lines)


def _change(value: float, first: float) -> str:
    return f"{round(100.0 * (value / first - 1.0)):+d} %"
