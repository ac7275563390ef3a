"""Host costs from measured ones. The simulated host issues launches as the executor does, so where the executor's whole
way of one launch was measured, that counts, and the bare call of the library where it was not."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from statistics import median

from calibration.solve import Estimate
from sim.spec import DeviceSpec, HostSpec
from traces.measurement import Measurement

# Rows that a cost may come from, the best first; a cost of the executor's launches has the events that belong to it.
SOURCES: dict[str, tuple[str, ...]] = {
    "launch_us": ("issue", "launch"),
    "collective_launch_us": ("issue_collective", "collective_launch"),
    "graph_launch_us": ("issue_graph", "graph_launch"),
    "graph_kernel_us": ("issue_kernel", "graph_kernel"),
    "event_us": ("event",),
    "synchronize_us": ("synchronize_spinning", "synchronize"),
    "plan_us": ("plan",),
    "broadcast_us": ("broadcast",),
}
WITH_EVENTS = ("issue", "issue_collective", "issue_graph")
# The simulator adds one event for a launch's mark and one for every wait; the launches that were measured wait once.
EVENTS_OF_A_LAUNCH = 2
EVENT_GAP = "event_gap"


def fit_host(rows: Sequence[Measurement], base: HostSpec) -> tuple[HostSpec, dict[str, Estimate]]:
    """Medians of what was measured; everything else stays as it is."""
    by_name: dict[str, list[Measurement]] = {}
    for row in rows:
        by_name.setdefault(str(row.at["name"]), []).append(row)
    event = _cost(by_name["event"])[0] if "event" in by_name else base.event_us
    estimates, values = {}, {}
    for field, names in SOURCES.items():
        name = next((name for name in names if name in by_name), None)
        if name is None:
            estimates[field] = Estimate(field, getattr(base, field), float("nan"), False, "not measured")
            continue
        value, error = _cost(by_name[name])
        if name in WITH_EVENTS:
            value = max(0.0, value - EVENTS_OF_A_LAUNCH * event)
        values[field] = value
        estimates[field] = Estimate(field, value, error, True, f"measured as {name}")
    fields = {field: values.get(field, getattr(base, field)) for field in base.__struct_fields__}
    return HostSpec(**fields), estimates


def fit_event_gap(rows: Sequence[Measurement], base: DeviceSpec) -> Estimate:
    """How much later a launch starts that waits for one on another stream, in microseconds."""
    if not (some := [row for row in rows if row.at["name"] == EVENT_GAP]):
        return Estimate("event_gap_us", base.event_gap_us, float("nan"), False, "not measured")
    value, error = _cost(some)
    return Estimate("event_gap_us", value, error, True, f"measured as {EVENT_GAP}")


def _cost(rows: Sequence[Measurement]) -> tuple[float, float]:
    """Median and its standard error: of rows that repeat, or else from the spread within one."""
    value = median(row.values["us"] for row in rows)
    within = median(row.spread.get("us", 0.0) / 1.35 * 1.25 / sqrt(row.repetitions) for row in rows)
    return value, within / sqrt(len(rows))
