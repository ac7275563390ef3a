"""Measurements made from a node that is known, so that a fit can be held against the truth."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp

import msgspec
import numpy as np

from calibration.race import Pair, race
from models.config import MODELS
from models.kernel import Kernel, Kind, collective, gemm
from models.transformer import BatchShape, layer_kernels
from sim.cost import Costs
from sim.spec import NodeSpec, OperationSpec, Table, load_node
from traces.measurement import Coordinates, Measurement

ROWS = (16, 32, 64, 128, 256, 512, 1024, 2048)
REPETITIONS = 9
MODEL_IDS = ("opt-30b", "glm-130b", "llama-3-70b", "opt-66b")
NOISE = 0.02


def truth() -> NodeSpec:
    """A node unlike any that is shipped, with everything that a fit may find."""
    base = load_node("h200-nvlink-x4")
    device = msgspec.structs.replace(
        base.device, gemm_efficiency=0.72, hbm_efficiency=0.7, cta_start_us=1.4, ramp_us=3.5, attention_efficiency=0.3,
        attention_cta_us=1.2, attention_overlap_order=1.5,
        gemm_overlap_order=4.0, gemm_balance=0.6, split_us=1.8, sm_bandwidth_gb_s=70.0,
        operations=(
            OperationSpec(name="activation", start_us=2.5, traffic=1.0),
            OperationSpec(name="attention", start_us=9.0, traffic=1.5),
            OperationSpec(name="attn_norm", start_us=6.0, traffic=1.8),
            OperationSpec(name="ffn_norm", start_us=6.0, traffic=1.8, overlap_order=2.0),
        ),
    )  # fmt: skip
    sizes = tuple(4096 << step for step in range(15))
    tables = tuple(
        Table(op=op, ranks=ranks, ctas=ctas, bytes=sizes, us=tuple(start + size / speed for size in sizes))
        for op, ranks, ctas, start, speed in (
            ("all_reduce", 4, 16, 12.0, 2.0e5), ("all_reduce", 4, 8, 15.0, 1.0e5), ("send", 2, 4, 8.0, 3.0e5),
        )
    )  # fmt: skip
    contention = msgspec.structs.replace(
        base.contention,
        gemm_by_comm=1.25,
        attention_by_comm=1.1,
        elementwise_by_comm=1.4,
        comm_by_compute=1.3,
        comm_stream_by_compute=1.3,
        per_ctas=16.0,
    )
    link = msgspec.structs.replace(base.link, tables=tables)
    return msgspec.structs.replace(base, device=device, link=link, contention=contention)


class Surveyor:
    """Measures a node that it knows, with noise that multiplies."""

    def __init__(self, node: NodeSpec, noise: float = NOISE, seed: int = 1) -> None:
        self.costs, self.noise, self.rng = Costs(node), noise, np.random.default_rng(seed)

    def row(self, what: str, at: Coordinates, **values: float) -> Measurement:
        """A row whose values are off by the noise."""
        noisy = {name: value * exp(self.noise * self.rng.standard_normal()) for name, value in values.items()}
        spread = {name: 1.35 * self.noise * value for name, value in noisy.items()}
        return Measurement(what, at, noisy, spread, REPETITIONS)

    def alone(self, kernel: Kernel, at: Coordinates) -> Measurement:
        """A kernel over and over in a graph, so with the gap to the next one."""
        us = self.costs.solo_us(kernel, int(at.get("withheld_sms", 0)), int(at.get("ctas", 0)))
        return self.row("collective" if kernel.is_communication else kernel.kind.value, at,
                        us=us + self.costs.device.graph_gap_us)  # fmt: skip

    def gemms(
        self, rows: Sequence[int] = ROWS, withheld: Sequence[int] = (0,), cuts: Sequence[int] = (1, 2, 4)
    ) -> list[Measurement]:
        """The GEMMs of some models, whole and in pieces."""
        found = {}
        for config in (MODELS[model_id] for model_id in MODEL_IDS):
            for kernel in layer_kernels(config, BatchShape(1, 16), 4):
                for cut, size, sms in ((c, m, w) for c in cuts for m in rows for w in withheld):
                    if kernel.kind is Kind.GEMM:
                        whole = gemm(kernel.name, size, kernel.cols // cut, kernel.inner)
                        at: Coordinates = {"name": whole.name, "rows": size, "cols": whole.cols, "inner": whole.inner,
                                           "withheld_sms": sms, "element_bytes": 2, "cut": 1}  # fmt: skip
                        found[whole.cols, whole.inner, size, sms] = self.alone(whole, at)
        return list(found.values())

    def others(self) -> list[Measurement]:
        """Attention, norms and activations of the same models."""
        found = []
        for config in (MODELS[model_id] for model_id in MODEL_IDS):
            for sequences, length in ((2, 16), (2, 64), (32, 64), (4, 512), (2, 1024), (1, 2048), (8, 128), (16, 1024)):
                shape = BatchShape(sequences, length)
                for kernel in layer_kernels(config, shape, 4):
                    common: Coordinates = {"name": kernel.name, "rows": shape.rows, "bytes_moved": kernel.bytes_moved,
                                           "num_ctas": kernel.num_ctas, "withheld_sms": 0}  # fmt: skip
                    if kernel.kind is Kind.ATTENTION:
                        found.append(self.alone(kernel, {
                            **common, "num_sequences": sequences, "length": length, "flops": kernel.flops,
                            "num_heads": config.num_heads // 4, "head_dim": config.head_dim,
                        }))  # fmt: skip
                    elif kernel.kind is Kind.ELEMENTWISE and kernel.name != "rotary":
                        found.append(self.alone(kernel, common))
        return found

    def collectives(self) -> list[Measurement]:
        """Every table at all its sizes, by the CTAs that one asks for: none for the most."""
        found = []
        for table in self.costs.node.link.tables:
            most = max(t.ctas for t in self.costs.node.link.tables if (t.op, t.ranks) == (table.op, table.ranks))
            for size in table.bytes:
                at: Coordinates = {"op": table.op, "bytes": size, "num_ranks": table.ranks,
                                   "ctas": 0 if table.ctas == most else table.ctas}  # fmt: skip
                found.append(self.alone(collective(table.op, Kind(table.op), size, table.ranks), at))
        return found

    def pairs(self, sizes: Sequence[int] = (64, 256, 1024)) -> list[Measurement]:
        """Kernels of several kinds and rows beside all-reduces."""
        found = []
        for model_id in MODEL_IDS:
            for rows in sizes:
                layer = layer_kernels(MODELS[model_id], BatchShape(rows // 64, 64), 4)
                for name in ("out_proj", "fc1", "ffn_norm", "attention"):
                    kernel = next(k for k in layer if k.name == name)
                    for size, withheld, ctas in ((1 << 20, 0, 0), (1 << 23, 16, 0), (1 << 22, 8, 8)):
                        found.append(self.pair(MODELS[model_id].num_heads // 4, kernel, rows, (size, withheld, ctas)))
        return found

    def pair(self, num_heads: int, kernel: Kernel, rows: int, variant: tuple[int, int, int]) -> Measurement:
        """One pair, raced."""
        size, withheld, ctas = variant
        comm = collective("all_reduce", Kind.ALL_REDUCE, size, 4)
        outcome = race(self.costs, Pair(kernel, comm, withheld, ctas))
        at: Coordinates = {
            "compute": kernel.name, "kind": kernel.kind.value, "rows": rows, "op": "all_reduce", "bytes": size,
            "num_ranks": 4, "ctas": ctas, "withheld_sms": withheld, "priority": 1,
        }  # fmt: skip
        if kernel.kind is Kind.GEMM:
            at |= {"cols": kernel.cols, "inner": kernel.inner}
        else:
            at |= {"bytes_moved": kernel.bytes_moved, "flops": kernel.flops, "num_ctas": kernel.num_ctas,
                   "num_heads": num_heads, "head_dim": 128, "length": 64}  # fmt: skip
        return self.row("pair", at, compute_slowdown=outcome.compute_slowdown, comm_slowdown=outcome.comm_slowdown,
                        start_delay_us=outcome.start_delay_us)  # fmt: skip

    def host(self, **costs_us: float) -> list[Measurement]:
        """Host costs by name."""
        return [self.row("host", {"name": name}, us=us) for name, us in costs_us.items()]
