"""A node from measurements: every part is fitted to its own rows, one after the other; what is held out is not seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

import msgspec
import numpy as np

from calibration.collectives import AS_FAST, SEEN_CTAS, TableFit, fit_tables
from calibration.gemm import fit_gemms
from calibration.gemm_tables import are_persistent, gemm_tables
from calibration.holdout import is_held_out
from calibration.host import fit_event_gap, fit_host
from calibration.kernels import (
    collective_of,
    ctas_of,
    has_priority,
    kernel_of,
    with_cuts,
    withheld_of,
)
from calibration.memory import fit_attention, fit_elementwise
from calibration.pairs import DEFAULT_CTAS, fit_pairs, is_simulated, race_row
from calibration.sequence import BOOST, JOIN, SWITCH, fit_serial, fit_switch, sequence_us
from calibration.solve import Estimate
from calibration.sources import sources_of
from sim.cost import Costs, coordinates
from sim.fitted import machine_words, same_gpu
from sim.spec import FitSpec, LinkSpec, NodeSpec
from traces.coordinates import KERNELS
from traces.measurement import CHANNELS, LAUNCH, SEQUENCE, Measurement, is_kept_out

DELAY = "pair: delay"
PARTITIONED = "gemm: partition"
STARVED = "pair: starved"
CLASSES = (
    "gemm",
    PARTITIONED,
    "attention",
    "elementwise",
    SEQUENCE,
    "collective",
    "pair: compute",
    "pair: comm",
    STARVED,
    DELAY,
)
# What is fitted one after the other, and last the errors of the fit.
STAGES = ("gemm", "elementwise", "attention", "collective", "pair", "sequence and two_batches", "errors")
# Is told the stage that begins, and how many rows it has.
Told = Callable[[str, int], object]
# Fewer rows than this in a class say nothing of its parameters.
FEWEST_ROWS = 4
DIGITS = 5


@dataclass(frozen=True, slots=True)
class About:
    """What was measured: when, on which GPU, under which conditions, in which folders (with the hash of their rows)."""

    name: str
    date: str
    gpu: str
    conditions: dict[str, str] = field(default_factory=dict)
    measurements: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Residual:
    """One measured value and what the fitted node says of it."""

    kind: str
    row: Measurement
    measured: float
    predicted: float
    is_held_out: bool

    @property
    def error(self) -> float:
        """Signed, as a share of what was measured; of a delay, which may be nothing, in microseconds."""
        return self.predicted - self.measured if self.kind == DELAY else self.predicted / self.measured - 1.0


@dataclass(frozen=True, slots=True)
class Fit:
    """A fitted node. `estimates` by section and name, the undetermined ones among them; `choices`: what was chosen
    among whole numbers or models instead of estimated, in words, by the device's field."""

    node: NodeSpec
    estimates: dict[str, dict[str, Estimate]]
    tables: tuple[TableFit, ...]
    residuals: tuple[Residual, ...]
    choices: dict[str, str]

    def held_out_error(self, kind: str) -> float | None:
        """Mean absolute error (share) of a class on what the fit did not see; None if nothing of it was held out."""
        errors = [abs(r.error) for r in self.residuals if r.kind == kind and r.is_held_out]
        return fmean(errors) if errors else None


def fit_node(
    measurements: Sequence[Measurement],
    base: NodeSpec,
    about: About,
    seed: int = 0,
    told: Told = lambda stage, num_rows: None,
) -> Fit:
    """Fit what the rows can tell; everything else stays as it is in `base`, with its source. `told` is called when one
    of `STAGES` begins.

    Raises ValueError if there is nothing to fit to.
    """
    if not any(row.what in (*KERNELS, "collective", "pair", "host") for row in measurements):
        raise ValueError("there is nothing to fit: no row of kernels, collectives, pairs or host costs")
    rng = np.random.default_rng(seed)
    # All but sequences are measured in series of one kernel.
    known, base = base, base.in_series()
    measurements = with_cuts(measurements)
    seen: dict[str, list[Measurement]] = {}
    for row in measurements:
        if not is_held_out(row):
            seen.setdefault(row.what, []).append(row)
    node, estimates, choices = _fit_device(seen, base, rng, told)
    node = msgspec.structs.replace(node, gemms=gemm_tables(seen.get("gemm", []), seen.get(LAUNCH, []), base))
    told("collective", len(seen.get("collective", [])))
    tables = fit_tables(seen.get("collective", []), seen.get(CHANNELS, []), base.link, base.device.graph_gap_us)
    node = msgspec.structs.replace(node, link=_with_tables(node.link, tables, measurements))
    host, estimates["host"] = fit_host(seen.get("host", []), base.host)
    gap = estimates["device"]["event_gap_us"] = fit_event_gap(seen.get("host", []), base.device)
    node = msgspec.structs.replace(node, device=msgspec.structs.replace(node.device, event_gap_us=gap.value))
    node = _rounded(msgspec.structs.replace(node, host=host))
    told("pair", len(seen.get("pair", [])))
    before, pairs = node.device, fit_pairs(seen.get("pair", []), node)
    tables = [
        replace(fit, table=table, note=fit.note if table.ctas == fit.table.ctas else DEFAULT_CTAS)
        for fit, table in zip(tables, pairs.node.link.tables, strict=False)
    ]
    choices |= _default_ctas(tables, pairs.node.link, base.link)
    traffic = pairs.estimates.pop("hbm_per_byte")
    estimates["contention"], estimates["link"] = pairs.estimates, {"hbm_per_byte": traffic}
    choices |= pairs.choices
    told("sequence and two_batches", sum(len(seen.get(what, [])) for what in (SEQUENCE, "two_batches")))
    switch = fit_switch(
        seen.get(SEQUENCE, []),
        [row for what in KERNELS for row in seen.get(what, [])],
        pairs.node,
        known.device.switch_us,
    )
    estimates["device"][SWITCH] = switch
    serial_base = known.link.join_us, known.device.rested_boost
    join, boost = fit_serial(seen.get("two_batches", []), pairs.node, switch.value, serial_base)
    estimates["link"][JOIN], estimates["device"][BOOST] = join, boost
    device = msgspec.structs.replace(pairs.node.device.with_switch(switch.value), rested_boost=boost.value)
    link = msgspec.structs.replace(pairs.node.link, join_us=join.value)
    node = _rounded(msgspec.structs.replace(pairs.node, name=about.name, fit=None, device=device, link=link))
    told("errors", len(measurements))
    residuals = tuple(residuals_of(node, measurements))
    if wave := node.device.gemm_wave_ctas:
        by_pairs = ", for pairs are explained best so" if wave != before.gemm_wave_ctas else ""
        choices["gemm_wave_ctas"] = f"the GEMM library fills a wave with {wave} CTAs{by_pairs}"
    fit = Fit(node, estimates, tuple(tables), residuals, choices)
    node = msgspec.structs.replace(
        node,
        description=_described(known, about),
        sources=sources_of(fit, known, about),
        fit=FitSpec(
            date=about.date, gpu=about.gpu, conditions=about.conditions, measurements=about.measurements,
            ranges=_ranges(seen, tables), digest=node.numbers_digest,
        ),
    )  # fmt: skip
    return Fit(node, estimates, tuple(tables), residuals, choices)


def _default_ctas(tables: Sequence[TableFit], link: LinkSpec, base: LinkSpec) -> dict[str, str]:
    """Where the default CTAs come from, if not from the base: they were seen, asked for, or fitted to pairs."""
    notes = {fit.note for fit in tables if fit.table.op == "all_reduce" and fit.table.ctas == link.default_ctas}
    if SEEN_CTAS in notes:
        return {"default_ctas": SEEN_CTAS}
    if link.default_ctas == base.default_ctas:
        return {}
    return {"default_ctas": next((note for note in sorted(notes) if note.startswith(AS_FAST)), DEFAULT_CTAS)}


def _fit_device(
    seen: dict[str, list[Measurement]], base: NodeSpec, rng: np.random.Generator, told: Told
) -> tuple[NodeSpec, dict[str, dict[str, Estimate]], dict[str, str]]:
    device, estimates, choices = base.device, dict[str, Estimate](), dict[str, str]()
    if launches := seen.get(LAUNCH):
        persistent = are_persistent(launches, device.num_sms)
        device = msgspec.structs.replace(device, gemm_persistent=persistent)
        many = "none" if persistent else "some"
        choices["gemm_persistent"] = f"of {len(launches)} launches of GEMMs {many} had more CTAs than the SMs hold"
    told("gemm", len(seen.get("gemm", [])))
    if len(rows := seen.get("gemm", [])) >= FEWEST_ROWS:
        gemms = fit_gemms(rows, device, rng)
        device, estimates = gemms.device, dict(gemms.estimates)
        choices["gemm_tiles"] = f"GEMM tiles: {gemms.library}"
        sees = "for the SMs that a partition leaves" if device.gemm_sees_partition else "for the whole device"
        choices["gemm_sees_partition"] = f"GEMM tiles are chosen {sees} ({gemms.partition})"
        if device.partition_step != base.device.partition_step:
            choices["partition_step"] = f"partitions come in steps of {device.partition_step} SMs"
    for what, fitted in (("elementwise", fit_elementwise), ("attention", fit_attention)):
        told(what, len(seen.get(what, [])))
        if len(rows := seen.get(what, [])) >= FEWEST_ROWS:
            others = fitted(rows, device)
            device, estimates = others.device, estimates | others.estimates
    return msgspec.structs.replace(base, device=device), {"device": estimates}, choices


def _with_tables(link: LinkSpec, fits: Sequence[TableFit], measurements: Sequence[Measurement]) -> LinkSpec:
    """Fitted tables instead of the base's for the same operation and ranks; partitions are those that were measured."""
    tables = [fit.table for fit in fits]
    fitted = {(table.op, table.ranks) for table in tables}
    kept = [table for table in link.tables if (table.op, table.ranks) not in fitted or table.path]
    withheld = {withheld_of(row) for row in measurements if row.what in ("gemm", "pair")}
    partitions = tuple(sorted(withheld | {0})) if len(withheld) > 1 else link.partitions
    sums = [fit.table for fit in fits if fit.note == SEEN_CTAS and fit.table.op == "all_reduce"]
    default = max(sums, key=lambda table: table.ranks).ctas if sums else link.default_ctas
    return msgspec.structs.replace(link, tables=(*tables, *kept), partitions=partitions, default_ctas=default)


def residuals_of(node: NodeSpec, measurements: Sequence[Measurement]) -> list[Residual]:
    """What the node says of every row that it can say something of. Measured times of kernels and collectives have the
    gap to the next one of their graph in them."""
    series, measurements = node.in_series(), with_cuts(measurements)
    costs, gap, in_turn = Costs(series), series.device.graph_gap_us, Costs(node)
    found = []
    for row in measurements:
        held = is_held_out(row)
        if row.what in KERNELS:
            us = costs.solo_us(kernel_of(row), withheld_of(row)) + gap
            kind = PARTITIONED if row.what == "gemm" and withheld_of(row) else row.what
            found.append(Residual(kind, row, row.values["us"], us, held))
        elif row.what == SEQUENCE:
            if us := sequence_us(in_turn, row):
                found.append(Residual(row.what, row, row.values["us"], us, held))
        elif row.what == "collective" and is_simulated(row, node):
            us = costs.solo_us(collective_of(row), 0, ctas_of(row)) + gap
            found.append(Residual(row.what, row, row.values["us"], us, held))
        elif row.what == "pair" and is_simulated(row, node) and has_priority(row):
            outcome = race_row(costs, row)
            sides = {"compute": outcome.compute_slowdown, "comm": outcome.comm_slowdown}
            for side, value in sides.items():
                if f"{side}_slowdown" in row.values:
                    kind = STARVED if side == "comm" and is_kept_out(row) else f"pair: {side}"
                    found.append(Residual(kind, row, row.values[f"{side}_slowdown"], value, held))
            if "start_delay_us" in row.values:
                found.append(Residual(DELAY, row, row.values["start_delay_us"], outcome.start_delay_us, held))
    return found


def _ranges(seen: dict[str, list[Measurement]], tables: Sequence[TableFit]) -> dict[str, tuple[float, float]]:
    """Lowest and highest of every coordinate that the fit saw."""
    ranges: dict[str, tuple[float, float]] = {}
    for what in KERNELS:
        for row in seen.get(what, []) if len(seen.get(what, [])) >= FEWEST_ROWS else ():
            for name, value in coordinates(kernel_of(row)).items():
                low, high = ranges.get(name, (value, value))
                ranges[name] = (min(low, value), max(high, value))
    for fit in tables:
        name, sizes = f"{fit.table.op}.{fit.table.ranks}.bytes", fit.table.bytes
        low, high = ranges.get(name, (float(sizes[0]), float(sizes[-1])))
        ranges[name] = (min(low, sizes[0]), max(high, sizes[-1]))
    return ranges


def _rounded(node: NodeSpec) -> NodeSpec:
    """The node as its file has it: nobody reads more digits, and the errors are theirs."""
    raw = msgspec.to_builtins(node)
    return msgspec.convert(_round(raw), NodeSpec)


def _round(value: object) -> object:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: _round(item) for key, item in value.items()}
    return [_round(item) for item in value] if isinstance(value, list | tuple) else value


def _described(base: NodeSpec, about: About) -> str:
    """The base's words stand for the node where both are of the same GPU."""
    fitted = f"fitted to measurements of {machine_words(about.gpu)}, {about.date}"
    if same_gpu(about.gpu, base.device.name):
        return f"{base.description}; {fitted}"
    return f"{fitted}; what they do not tell is that of {base.name} ({base.description})"
