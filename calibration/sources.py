"""Where every number of a fitted node comes from, in a line each."""

from __future__ import annotations

from math import isfinite
from typing import TYPE_CHECKING

from calibration.solve import Estimate
from sim.fitted import machine_words
from sim.spec import NodeSpec, Table
from traces.measurement import SEQUENCE

if TYPE_CHECKING:
    from calibration.fit import About, Fit

GEMM_FIELDS = ("gemm_efficiency", "hbm_efficiency", "sm_bandwidth_gb_s", "cta_start_us", "ramp_us", "gemm_balance",
               "gemm_overlap_order", "split_us", "piece_us")  # fmt: skip


def sources_of(fit: Fit, base: NodeSpec, about: About) -> dict[str, str]:
    """A source for each number: the fit, with its error on held-out rows and the number's standard error, or the base
    node's own source where the data could not tell."""
    where = machine_words(about.gpu)
    told = f"fitted: {where}, {about.date}"
    sources: dict[str, str] = {}
    for field in base.device.__struct_fields__:
        if isinstance(getattr(fit.node.device, field), str):
            continue
        sources[f"device.{field}"] = _device_source(fit, base, told, field)
    for section in ("host", "contention"):
        for field in getattr(base, section).__struct_fields__:
            if choice := fit.choices.get(field):
                sources[f"{section}.{field}"] = f"{told}, {choice}"
                continue
            estimate = fit.estimates[section].get(field)
            kind = "pair: comm" if field == "comm_by_compute" else "pair: compute"
            error = "" if section == "host" else _held_out(fit, kind)
            sources[f"{section}.{field}"] = _source(estimate, base, f"{section}.{field}", told, error)
    hbm = fit.estimates["link"]["hbm_per_byte"]
    sources["link.hbm_per_byte"] = _source(hbm, base, "link.hbm_per_byte", told, _held_out(fit, "pair: compute"))
    sources["link.join_us"] = _source(fit.estimates["link"]["join_us"], base, "link.join_us", told, "")
    changed = fit.node.link.partitions != base.link.partitions
    sources["link.partitions"] = f"measured: {where}, {about.date}" if changed else _base(base, "link.partitions")
    for field in ("default_ctas", "independent_ctas", "ctas_anywhere"):
        key, choice = f"link.{field}", fit.choices.get(field)
        sources[key] = f"{told}, {choice}" if choice else _base(base, key)
    if fit.node.gemms:
        num = len({(table.cols, table.inner) for table in fit.node.gemms})
        new = fit.node.gemms != base.gemms
        sources["gemms"] = f"measured: {where}, {about.date}; {num} shapes" if new else _base(base, "gemms")
    for field in ("root_gb_s", "pairs"):
        sources[f"link.{field}"] = _base(base, f"link.{field}")
    return sources | _table_sources(fit, base, told)


def _device_source(fit: Fit, base: NodeSpec, told: str, field: str) -> str:
    estimates, key = fit.estimates["device"], f"device.{field}"
    if field == "gemm_tiles":
        tiles = {name.partition(": ")[2]: e for name, e in estimates.items() if name.startswith("gemm_tiles: ")}
        if not any(e.is_determined for e in tiles.values()):
            return _kept(base, key, "" if not tiles else "the fit left them as they were")
        numbers = ", ".join(f"{name} {_number(e)}" for name, e in tiles.items())
        return f"{told}, {fit.choices['gemm_tiles']}; {numbers}{_held_out(fit, 'gemm')}"
    if field in ("gemm_sees_partition", "partition_step", "gemm_wave_ctas", "gemm_persistent", "gpcs"):
        choice = fit.choices.get(field, "")
        determined = choice and "no rows" not in choice
        why = "" if field == "partition_step" and base.device.partition_step else "no rows with withheld SMs"
        return f"{told}, {choice}" if determined else _kept(base, key, why)
    if field == "operations":
        parts = {name: e for name, e in estimates.items() if name.endswith((" start_us", " traffic", " overlap order"))}
        if not any(e.is_determined for e in parts.values()):
            return _kept(base, key, "")
        numbers = ", ".join(f"{name} {_number(e)}" for name, e in sorted(parts.items()))
        return f"{told}, {numbers}{_held_out(fit, 'elementwise')}{_held_out(fit, 'attention')}"
    if field in ("kernel_gap_us", "graph_gap_us") and fit.node.device.switch_us != base.device.switch_us:
        return f"{_base(base, key)}; changed by the fit of switch_us, which is part of it"
    kinds = dict.fromkeys(GEMM_FIELDS, "gemm") | {"switch_us": SEQUENCE}
    kind = kinds.get(field, field.partition("_")[0])
    return _source(estimates.get(field), base, key, told, _held_out(fit, kind))


def _source(estimate: Estimate | None, base: NodeSpec, key: str, told: str, error: str) -> str:
    if estimate is None or not estimate.is_determined:
        return _kept(base, key, estimate.why if estimate is not None else "")
    why = f", {estimate.why}" if estimate.why else ""
    number = f", standard error {estimate.error:.2g}" if isfinite(estimate.error) else ""
    return f"{told}{why}{number}{error}"


def _kept(base: NodeSpec, key: str, why: str) -> str:
    """The base node's source, and why it still stands."""
    return _base(base, key) + (f" (not determined by the measurements: {why})" if why else "")


def _base(base: NodeSpec, key: str) -> str:
    name = key
    while name not in base.sources and "." in name:
        name = name.rpartition(".")[0]
    return base.sources.get(name, "estimate: the model's default, which leaves this out")


def _number(estimate: Estimate) -> str:
    if not estimate.is_determined:
        return f"{estimate.value:.4g} (not determined)"
    return f"{estimate.value:.4g}" + (f" ± {estimate.error:.2g}" if isfinite(estimate.error) else "")


def _held_out(fit: Fit, kind: str) -> str:
    error = fit.held_out_error(kind)
    return f", held-out error {100.0 * error:.1f} % ({kind})" if error is not None else ""


def _table_sources(fit: Fit, base: NodeSpec, told: str) -> dict[str, str]:
    notes = {_key(t.table): t for t in fit.tables}
    found = {}
    for table in fit.node.link.tables:
        key = _key(table)
        if key not in notes:
            found[key] = _base(base, key)
            continue
        part = notes[key]
        note = f"; {part.note}" if part.note else ""
        error = f", standard error of a knot {100.0 * part.error:.1f} %"
        found[key] = f"{told}{error}{_held_out(fit, 'collective')}{note}"
    return found


def _key(table: Table) -> str:
    return f"link.tables.{table.op}.{table.ranks}.{table.ctas}{table.path}"
