"""Two batches through a whole forward pass: the simulator runs the plan that the hardware ran as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace

import msgspec

from calibration.compare import (
    COMM_ALONE,
    COMPUTE_ALONE,
    PLAIN,
    PLAN,
    POLICY,
    SERIAL,
    WHOLE,
    Source,
    normalised,
    partition_of,
)
from calibration.kernels import forward_pass
from calibration.validate_errors import Line, Point, Target, line_of, line_of_share
from calibration.validate_ranking import LEVEL, Cell, ranking_lines
from models.config import load_model
from models.kernel import FunctionVector
from models.transformer import Layout
from policy.batch import State
from policy.options import Options
from policy.profile import Profile
from policy.profile_table import profile_from
from policy.round import Launch, Round
from policy.scheduler import Scheduler
from sim.believe import profile_of
from sim.cost import Costs
from sim.simulate import Fidelity, Simulation
from sim.spec import HostSpec, NodeSpec
from traces.measurement import Measurement
from traces.request import Request
from traces.timeline import Timeline

MAKESPAN = Target(4.0, 10.0)
PAD_TO = 16
ALONE = (COMPUTE_ALONE, COMM_ALONE)


@dataclass(slots=True)
class TwoBatches:
    """What was compared. `left_out`: schedules that the node cannot run, how many rows by reason. `num_plans`: rows
    that come with the hardware's plan; `num_same_plans`: of those, how many plans the policy makes again word for
    word."""

    cells: dict[Cell, dict[str, Point]] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    num_plans: int = 0
    num_same_plans: int = 0


def compare_two_batches(node: NodeSpec, sources: Iterable[Source], told: Callable[[], object]) -> TwoBatches:
    """Simulate every row of two batches; `told` is called after each."""
    found = TwoBatches()
    for source in sources:
        world = GraphWorld(node, {model: profile_from(table) for model, table in source.beliefs.items()})
        for row in source.rows:
            if row.what == "two_batches":
                _compare(world, source.name, normalised(row), found)
                told()
    return found


def _compare(world: GraphWorld, source: str, row: Measurement, found: TwoBatches) -> None:
    cell, schedule = cell_of(row, world.node, source), str(row.at["schedule"])
    if why := world.why_not(cell, schedule):
        found.left_out[why] = found.left_out.get(why, 0) + 1
        return
    predicted, plan = world.makespan_us(cell, schedule)
    point = Point(LEVEL, f"{cell}, {schedule}", row.values["us"], predicted, row.spread.get("us"))
    found.cells.setdefault(cell, {})[schedule] = point
    if PLAN in row.at and plan:
        found.num_plans += 1
        found.num_same_plans += row.at[PLAN] == plan


def cell_of(row: Measurement, node: NodeSpec, source: str = "") -> Cell:
    """The cell of a row; on all of the node's GPUs where the row does not say."""
    at = row.at
    ranks = int(at.get("num_ranks", node.num_gpus))
    return Cell(str(at["model"]), int(at["num_layers"]), int(at["rows"]), int(at["length"]), ranks, source)


class GraphWorld:
    """A node whose host is free and whose kernels follow one another as in a graph. `beliefs`: what the policy believed
    when the hardware's plans were made, by model; of other models it believes the node itself."""

    def __init__(self, node: NodeSpec, beliefs: Mapping[str, Profile] | None = None) -> None:
        self.node, self.beliefs, self._own = node, dict(beliefs or {}), profile_of(node)
        self.graph_node = in_a_graph(node)
        # Computation alone takes turns; collectives alone are a series of one.
        self._in_turn, self._in_series = Costs(node), Costs(node.in_series())

    def why_not(self, cell: Cell, schedule: str) -> str:
        """Why the node cannot run a schedule; empty if it can."""
        if schedule not in (*ALONE, SERIAL) and options_of(schedule, cell) is None:
            return f"schedule {schedule!r} is not known here"
        _, ctas = partition_of(schedule) or (0, 0)
        tables = [t for t in self.node.link.tables if t.op == "all_reduce" and t.ranks == cell.num_ranks]
        if not tables:
            return f"node {self.node.name} has no all_reduce table for {cell.num_ranks} ranks"
        if ctas and all(table.ctas != ctas for table in tables):
            return f"node {self.node.name} has no all_reduce table for {ctas} CTAs"
        return ""

    def makespan_us(self, cell: Cell, schedule: str) -> tuple[float, str]:
        """Microseconds from the start to the end of both batches (of one where a part is timed alone), and the plan in
        words."""
        if schedule in ALONE:
            return self._alone_us(cell, comm=schedule == COMM_ALONE), ""
        timeline, launches = self.run(cell, schedule)
        return timeline.end_us, summary(launches)

    def run(self, cell: Cell, schedule: str) -> tuple[Timeline, list[Launch]]:
        """The simulated plan, with the spans of the first rank, and its launches."""
        options = options_of(schedule, cell)
        assert options is not None
        profile = self.beliefs.get(cell.model, self._own)
        return run_plan(self.graph_node, profile, cell, "tensor" if schedule == SERIAL else "interleaved", options)

    def _alone_us(self, cell: Cell, *, comm: bool) -> float:
        costs = self._in_series if comm else self._in_turn
        gap = costs.device.graph_gap_us
        return sum(costs.solo_us(k) + gap for k in vector_of(cell).kernels if k.is_communication == comm)


def in_a_graph(node: NodeSpec) -> NodeSpec:
    """The node without its host's costs, every kernel behind the one before it as in a graph."""
    free = HostSpec(**dict.fromkeys(HostSpec.__struct_fields__, 0.0))
    device = msgspec.structs.replace(node.device, kernel_gap_us=node.device.graph_gap_us)
    return msgspec.structs.replace(node, host=free, device=device)


def options_of(schedule: str, cell: Cell) -> Options | None:
    """The options under which a schedule's plan was made; None for a schedule that is not known."""
    base = Options(batch_size=cell.num_sequences, pad_to=PAD_TO, depth=2, whole_segments="off")
    forced = replace(base, adaptive=False)
    if schedule in (POLICY, SERIAL):
        return base
    if schedule == WHOLE:
        return replace(base, whole_segments="on")
    if schedule == PLAIN:
        return replace(forced, decomposition="off", chunks=False)
    withheld = partition_of(schedule)
    return None if withheld is None else replace(forced, partition=withheld[0], comm_ctas=withheld[1])


def vector_of(cell: Cell) -> FunctionVector:
    """What one batch of a cell runs on every rank."""
    return forward_pass(load_model(cell.model), asdict(cell))


def run_plan(
    node: NodeSpec, profile: Profile, cell: Cell, policy: str, options: Options
) -> tuple[Timeline, list[Launch]]:
    """Two equal batches that enter at time zero, all launches issued at once: a graph waits for no host."""
    vector, launches = vector_of(cell), list[Launch]()
    scheduler = Scheduler(policy, options, profile, lambda shape: (vector,))
    scheduler.plan = _without_host(scheduler.plan, launches)
    requests = [Request(number, 0.0, cell.length) for number in range(2 * cell.num_sequences)]
    simulation = Simulation(node, Layout(cell.num_ranks, 1), scheduler, Fidelity(record=True))
    return simulation.run(requests), launches


Plan = Callable[[State, Options, Profile], tuple[Round, State]]


def _without_host(plan: Plan, launches: list[Launch]) -> Plan:
    """The same launches, and no mark that a host would wait for; keeps what was launched."""

    def planned(state: State, options: Options, profile: Profile) -> tuple[Round, State]:
        round_, after = plan(state, options, profile)
        launches.extend(round_.launches)
        return round_._replace(synchronize=()), after

    return planned


def summary(launches: Iterable[Launch]) -> str:
    """A plan in the words in which the benchmark notes it."""
    launches = list(launches)
    fills = sum(1 for launch in launches if launch.lane == "fill")
    return (
        f"{len(launches)} launches, {fills} fills, {sum(1 for x in launches if x.fragment)} fragments, "
        f"withheld {sorted({x.withheld_sms for x in launches})}, CTAs {sorted({x.max_ctas for x in launches})}"
    )


# -- the table's lines ------------------------------------------------------------------------------------------------


def lines(found: TwoBatches) -> list[Line]:
    """Makespans by kind of schedule, the gain over one batch after the other, the parts alone, and the rankings."""
    points = {(cell, name): point for cell, schedules in found.cells.items() for name, point in schedules.items()}
    plans = [point for (_, name), point in points.items() if name not in ALONE]
    result = [line_of(LEVEL, "makespan", plans, MAKESPAN)] if plans else []
    groups: dict[str, list[Point]] = {}
    for (_, name), point in points.items():
        groups.setdefault(kind_of(name), []).append(point)
    result += [line_of(LEVEL, f"  {name}", members) for name, members in groups.items() if name not in ALONE]
    if gains := _gains(found):
        result.append(line_of(LEVEL, "gain over serial", gains))
    result += [line_of(LEVEL, name, groups[name]) for name in ALONE if name in groups]
    if found.num_plans:
        result.append(line_of_share(LEVEL, "plans like the hardware's", found.num_same_plans, found.num_plans))
    return result + ranking_lines(found.cells)


def kind_of(schedule: str) -> str:
    """Schedules that differ only in the CTAs of their collectives are of one kind."""
    withheld = partition_of(schedule)
    return schedule if withheld is None else f"partition {withheld[0]}"


def _gains(found: TwoBatches) -> list[Point]:
    """How many times as fast as one batch after the other: what a chooser looks at, with the kernels' errors shared."""
    gains = []
    for schedules in found.cells.values():
        serial = schedules.get(SERIAL)
        for name, point in schedules.items():
            if serial is not None and name not in (*ALONE, SERIAL):
                gains.append(
                    Point(LEVEL, point.label, serial.measured / point.measured, serial.predicted / point.predicted)
                )
    return gains
