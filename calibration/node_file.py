"""A node as a TOML file, and beliefs about it as the JSON table that policies read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from calibration.holdout import is_held_out
from calibration.kernels import withheld_of
from calibration.race import Pair, race
from models.config import MODELS, ModelConfig
from models.kernel import Kernel, Kind, collective, gemm
from models.transformer import BatchShape, layer_kernels
from sim.cost import Costs
from sim.later import without_later
from sim.spec import NodeSpec
from traces.files import write_whole
from traces.measurement import Measurement

SECTIONS = ("device", "host", "contention", "link")
# Rows of a belief's curves, and the output features of the pieces that policies cut.
ROWS = (16, 32, 64, 128, 256, 512, 1024, 2048)
PIECES = (1, 2, 3, 4)
PAIR_BYTES = 2**20
SEQUENCE = 64


def write_node(path: Path, node: NodeSpec) -> None:
    """Write a node file, whole or not at all."""
    write_whole(path, node_text(node).encode())


def node_text(node: NodeSpec) -> str:
    """The TOML text that `sim.spec.load_node` reads back as this node."""
    raw: dict[str, Any] = msgspec.to_builtins(node)
    for name in without_later(raw):
        raw["sources"].pop(name, None)
    if not raw["link"]["pairs"]:
        del raw["link"]["pairs"]
        raw["sources"].pop("link.pairs", None)
    lines = _entries({key: raw[key] for key in ("name", "description", "num_gpus")})
    tables = raw["link"].pop("tables")
    for section in SECTIONS:
        lines += ["", f"[{section}]", *_entries(raw[section])]
    for table in tables:
        if not table["path"]:
            del table["path"]
        lines += ["", "[[link.tables]]", *_entries(table)]
    for table in raw.pop("gemms", ()):
        lines += ["", "[[gemms]]", *_entries(table)]
    lines += ["", "[sources]", *_entries(raw["sources"])]
    if node.fit is not None:
        parts = {key: raw["fit"].pop(key) for key in ("conditions", "measurements", "ranges")}
        lines += ["", "[fit]", *_entries(raw["fit"])]
        for key, part in parts.items():
            lines += ["", f"[fit.{key}]", *_entries(part)]
    return "\n".join(lines) + "\n"


def _entries(values: dict[str, Any]) -> list[str]:
    return [f"{_key(key)} = {_value(value)}" for key, value in values.items()]


def _key(key: str) -> str:
    return key if key.replace("_", "").isalnum() and key.isascii() else _text(key)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, dict):
        return "{ " + ", ".join(_entries(value)) + " }"
    return "[" + ", ".join(_value(item) for item in value) + "]"


def _text(text: str) -> str:
    """A basic string: TOML's escapes are JSON's, and characters beyond ASCII may stand as they are."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


# -- beliefs -----------------------------------------------------------------------------------------------------------


def beliefs(node: NodeSpec, config: ModelConfig, tp: int, rows: Sequence[Measurement]) -> dict[str, Any]:
    """A table for `policy.profile_table.profile_from`: measured where a kernel was measured, the fitted node's word
    elsewhere. Times have the gap to the next kernel in them."""
    believer = _Believer(node, rows)
    partitions = node.link.partitions
    shapes = [BatchShape(max(1, size // SEQUENCE), min(size, SEQUENCE)) for size in ROWS]
    layers = [layer_kernels(config, shape, tp) for shape in shapes]
    gemms, others = [], []
    for withheld in partitions:
        for place, kernel in enumerate(layers[-1]):
            curve = [layer[place] for layer in layers]
            if kernel.kind is Kind.GEMM:
                gemms.append(believer.sheet(kernel, withheld))
            elif not kernel.is_communication:
                us, moved = [believer.us(k, withheld) for k in curve], [k.bytes_moved for k in curve]
                others.append({"name": kernel.name, "withheld": withheld, "bytes": moved, "us": us})
    known = {table.ctas for table in node.link.tables if (table.op, table.ranks) == ("all_reduce", tp)}
    ctas = [0, *sorted(known - {max(known, default=0)})]
    return {
        "name": f"{node.name}, {config.model_id}", "partitions": list(partitions), "ctas": ctas,
        "launch_us": node.host.graph_launch_us + 2 * node.host.event_us,  # most launches are graphs
        "round_us": node.host.plan_us + node.host.synchronize_us, "crossing_us": node.device.event_gap_us,
        "gemms": gemms, "others": others, "comms": believer.comms(tp, ctas),
        "pairs": [entry for w in partitions for c in ctas for entry in believer.pairs(layers, tp, w, c)],
    }  # fmt: skip


class _Believer:
    """Looks a kernel up among the rows, and asks the node for what is not there."""

    def __init__(self, node: NodeSpec, rows: Sequence[Measurement]) -> None:
        series = node.in_series()
        self.costs, self.gap_us = Costs(series), series.device.graph_gap_us
        self._measured = {
            (int(r.at["rows"]), int(r.at["cols"]), int(r.at["inner"]), withheld_of(r)): r.values["us"]
            for r in rows if r.what == "gemm" and not is_held_out(r)
        }  # fmt: skip

    def us(self, kernel: Kernel, withheld: int, ctas: int = 0) -> float:
        """One kernel alone."""
        measured = self._measured.get((kernel.rows, kernel.cols, kernel.inner, withheld))
        return measured if measured is not None else self.costs.solo_us(kernel, withheld, ctas) + self.gap_us

    def sheet(self, kernel: Kernel, withheld: int) -> dict[str, Any]:
        """A GEMM over rows, and over the output features of its pieces."""
        cols = sorted({kernel.cols * part // PIECES[-1] for part in PIECES})
        us = [[self.us(gemm(kernel.name, r, c, kernel.inner), withheld) for r in ROWS] for c in cols]
        return {"name": kernel.name, "withheld": withheld, "rows": list(ROWS), "cols": cols, "us": us}

    def comms(self, tp: int, ctas: Iterable[int]) -> list[dict[str, Any]]:
        """The node's own tables."""
        found = []
        for table in self.costs.node.link.tables:
            ranks = 2 if table.op == "send" else tp
            if table.ranks == ranks and not table.path:
                known = table.ctas if table.ctas in ctas else 0
                us = [value + self.gap_us for value in table.us]
                found.append({"kind": table.op, "ctas": known, "bytes": list(table.bytes), "us": us})
        return found

    def pairs(self, layers: Sequence[Sequence[Kernel]], tp: int, withheld: int, ctas: int) -> list[dict[str, Any]]:
        """Slowdowns beside an all-reduce, by kind, over rows: those of the kind's kernel that takes longest."""
        found = []
        for kind in (Kind.GEMM, Kind.ATTENTION, Kind.ELEMENTWISE):
            compute, comm = [], []
            for layer in layers:
                kernel = max((k for k in layer if k.kind is kind), key=lambda k: self.costs.solo_us(k))
                message = next((k.message_bytes for k in layer if k.kind is Kind.ALL_REDUCE), PAIR_BYTES)
                other = collective("all_reduce", Kind.ALL_REDUCE, message, tp)
                outcome = race(self.costs, Pair(kernel, other, withheld, ctas), with_delay=False)
                compute.append(max(1.0, outcome.compute_slowdown))
                comm.append(max(1.0, outcome.comm_slowdown))
            key = {"kind": kind.value, "withheld": withheld, "ctas": ctas}
            found.append({**key, "rows": list(ROWS), "compute": compute, "comm": comm})
        return found


def measured_models(rows: Sequence[Measurement], node: NodeSpec) -> list[tuple[ModelConfig, int]]:
    """Models all of whose GEMMs were measured, with the tensor parallelism at which they were."""
    known = {(int(row.at["cols"]), int(row.at["inner"])) for row in rows if row.what == "gemm"}
    found = []
    for config in MODELS.values():
        for tp in (node.num_gpus, 2):
            if config.num_heads % tp or config.ffn_size % tp:
                continue
            layer = layer_kernels(config, BatchShape(1, 16), tp)
            has_table = any(t.op == "all_reduce" and t.ranks == tp for t in node.link.tables)
            if has_table and {(k.cols, k.inner) for k in layer if k.kind is Kind.GEMM} <= known:
                found.append((config, tp))
                break
    return found
