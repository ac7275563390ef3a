"""Fits recover what synthetic measurements were made from, within their stated errors, and leave the rest alone."""

from __future__ import annotations

from dataclasses import replace
from datetime import date
from itertools import product
from math import isfinite
from pathlib import Path
from statistics import fmean

import msgspec
import pytest

from calibration.collectives import fit_tables
from calibration.fit import About, Fit, fit_node
from calibration.holdout import is_held_out
from calibration.kernels import kernel_of, label_of, with_cuts, withheld_of
from calibration.node_file import beliefs, measured_models, node_text, write_node
from calibration.pairs import GPCS, fit_pairs
from calibration.report import data_of, lines_of
from models.config import MODELS
from models.kernel import Kind, collective, gemm
from models.transformer import BatchShape, layer_kernels
from policy.profile_table import profile_from
from sim.cost import Costs
from sim.fitted import fit_notes
from sim.spec import GemmTable, NodeSpec, load_node
from tests.calibration.synthetic import MODEL_IDS, NOISE, Surveyor, truth
from traces.measurement import Measurement, read_measurements

BASE = "h200-nvlink-x4"
ABOUT = About("toy", "2026-11-21", "NVIDIA H200", {"link_mode": "as-is"}, {"first": "ab" * 32})


@pytest.fixture(scope="module")
def rows() -> list[Measurement]:
    surveyor = Surveyor(truth())
    return [*surveyor.gemms(), *surveyor.others(), *surveyor.collectives(), *surveyor.host(issue=30.0, event=1.2)]


@pytest.fixture(scope="module")
def fit(rows: list[Measurement]) -> Fit:
    return fit_node(rows, load_node(BASE), ABOUT)


def assert_recovered(fit: Fit, true: dict[str, float]) -> None:
    for name, value in true.items():
        estimate = fit.estimates["device"][name]
        assert estimate.is_determined, name
        assert isfinite(estimate.error)
        assert abs(estimate.value - value) < 3.0 * estimate.error, (name, estimate, value)
        assert estimate.error < 0.5 * value


def test_gemm_parameters_are_recovered_from_a_wrong_start(fit: Fit) -> None:
    names = ("gemm_efficiency", "hbm_efficiency", "cta_start_us", "ramp_us", "gemm_overlap_order", "gemm_balance",
             "split_us")  # fmt: skip
    assert_recovered(fit, {name: getattr(truth().device, name) for name in names})


def test_attention_and_elementwise_are_recovered(fit: Fit) -> None:
    device = truth().device
    true = {name: getattr(device, name) for name in ("attention_efficiency", "attention_cta_us")}
    for operation in device.operations:
        true |= {f"{operation.name} start_us": operation.start_us, f"{operation.name} traffic": operation.traffic}
    # Traffic is counted at the fitted bandwidth, whose own error is not in the error of traffic.
    share = fit.node.device.hbm_efficiency / device.hbm_efficiency
    assert_recovered(fit, {n: v * share if n.endswith("traffic") else v for n, v in true.items()})


def test_what_was_held_out_is_predicted_as_well_as_it_was_measured(fit: Fit) -> None:
    for kind, factor in (("gemm", 1.5), ("attention", 1.5), ("elementwise", 1.5), ("collective", 2.0)):
        error = fit.held_out_error(kind)
        # The mean of |normal| is 0.8 of its standard deviation.
        assert error is not None
        assert error < factor * NOISE, kind
        assert any(r.is_held_out for r in fit.residuals if r.kind == kind)


def test_tables_have_a_knot_at_every_size_that_was_seen(fit: Fit, rows: list[Measurement]) -> None:
    costs, true = Costs(fit.node), Costs(truth())
    for ctas in (0, 8):
        for size in (4096, 1 << 16, 3 << 18, 1 << 26):
            kernel = collective("c", Kind.ALL_REDUCE, size, 4)
            assert costs.solo_us(kernel, 0, ctas) == pytest.approx(true.solo_us(kernel, 0, ctas), rel=0.09)
    table = next(t for t in fit.node.link.tables if (t.op, t.ctas) == ("all_reduce", 8))
    seen = {int(r.at["bytes"]) for r in rows if r.what == "collective" and not is_held_out(r)}
    assert seen <= set(table.bytes)
    # What was not measured is the base's.
    kept = [t for t in load_node(BASE).link.tables if t.op == "all_gather"]
    assert [t for t in fit.node.link.tables if t.op == "all_gather"] == kept


def test_classes_without_rows_are_not_determined_and_keep_the_base(fit: Fit) -> None:
    base = load_node(BASE)
    assert fit.node.contention == base.contention
    assert not any(e.is_determined for e in fit.estimates["contention"].values())
    assert fit.node.sources["contention.gemm_by_comm"].startswith("estimate: ")
    assert not fit.estimates["host"]["broadcast_us"].is_determined
    assert fit.node.host.broadcast_us == base.host.broadcast_us
    assert fit.node.sources["host.broadcast_us"].startswith("estimate: ")
    assert "contention.gemm_by_comm" in fit.node.estimates
    assert "device.gemm_efficiency" not in fit.node.estimates
    assert "elementwise" in "\n".join(lines_of(fit))


def test_only_gemms_leave_everything_else_as_it_was() -> None:
    base = load_node("a100-nvlink-x4")
    found = fit_node(Surveyor(base).gemms((64, 512), cuts=(1,)), base, ABOUT)
    assert (found.node.link, found.node.host, found.node.contention) == (base.link, base.host, base.contention)
    assert found.node.device.attention_efficiency == base.device.attention_efficiency
    assert found.node.sources["device.attention_efficiency"].startswith("estimate: ")
    assert "no rows" in "\n".join(lines_of(found))


def test_host_costs_are_those_of_the_executors_launches(fit: Fit) -> None:
    host = fit.node.host
    assert host.event_us == pytest.approx(1.2, rel=4 * NOISE)
    assert host.launch_us == pytest.approx(30.0 - 2 * 1.2, rel=4 * NOISE)


def test_nothing_to_fit_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="nothing to fit"):
        fit_node([], load_node(BASE), ABOUT)


@pytest.mark.parametrize("sees", [False, True])
def test_whether_the_library_sees_partitions_is_found(sees: bool) -> None:
    true = truth()
    true = msgspec.structs.replace(true, device=msgspec.structs.replace(true.device, gemm_sees_partition=sees))
    found = fit_node(Surveyor(true).gemms((64, 512, 2048), (0, 24), (1,)), load_node(BASE), ABOUT)
    assert found.node.device.gemm_sees_partition is sees
    assert found.node.link.partitions == (0, 24)


def test_contention_is_recovered() -> None:
    true = truth()
    base = msgspec.structs.replace(true, contention=load_node(BASE).contention)
    found = fit_node(Surveyor(true).pairs((256, 1024))[::2], base, ABOUT)
    for name in ("gemm_by_comm", "elementwise_by_comm", "attention_by_comm", "comm_by_compute"):
        estimate = found.estimates["contention"][name]
        assert estimate.is_determined, name
        assert abs(estimate.value - getattr(true.contention, name)) < 3.5 * estimate.error + 0.01, (name, estimate)
    for kind in ("pair: compute", "pair: comm"):
        error = found.held_out_error(kind)
        assert error is not None
        assert error < 0.05


@pytest.mark.parametrize(("independent", "by_memory"), [(True, True), (False, True), (False, False)])
def test_how_collectives_start_and_what_slows_them_is_found(independent: bool, by_memory: bool) -> None:
    """Beside GEMMs that are bound by memory and GEMMs that are not, on SMs that do not hold all CTAs and that do."""
    true = truth()
    contention = msgspec.structs.replace(true.contention, comm_by_compute=2.2, comm_by_memory=by_memory)
    link = msgspec.structs.replace(true.link, independent_ctas=independent)
    surveyor, rows = Surveyor(msgspec.structs.replace(true, contention=contention, link=link)), list[Measurement]()
    for count in (16, 512):
        layer = layer_kernels(MODELS[MODEL_IDS[0]], BatchShape(max(1, count // 64), min(count, 64)), 4)
        for kernel in (k for k in layer if k.name == "fc1"):
            variants = product((2**15, 2**21), (0, 8), (8, 16))
            rows += [surveyor.pair(MODELS[MODEL_IDS[0]].num_heads // 4, kernel, count, each) for each in variants]
    found = fit_pairs(rows, true).node
    assert found.link.independent_ctas is independent
    assert found.contention.comm_by_memory is by_memory
    assert found.contention.comm_by_compute == pytest.approx(2.2, rel=0.1)


@pytest.mark.parametrize("by_traffic", [True, False])
def test_slowdowns_that_go_with_traffic_are_told_from_those_that_do_not(by_traffic: bool) -> None:
    """Light kernels that wait and that stream, beside messages that mostly wait and that mostly stream."""
    true = truth()
    slow = msgspec.structs.replace(
        true.contention, elementwise_by_comm=2.2, attention_by_comm=2.5, by_traffic=by_traffic
    )
    true = msgspec.structs.replace(true, contention=slow)
    surveyor, rows = Surveyor(true), list[Measurement]()
    for model, count in product(MODEL_IDS[:1], (64, 1024)):
        layer = layer_kernels(MODELS[model], BatchShape(count // 64, 64), 4)
        for kernel in (k for k in layer if k.name in ("ffn_norm", "attention")):
            variants = [(size, 0, 8) for size in (2**15, 2**22)]
            rows += [surveyor.pair(MODELS[model].num_heads // 4, kernel, count, each) for each in variants]
    found = fit_pairs(rows, msgspec.structs.replace(true, contention=load_node(BASE).contention))
    assert found.node.contention.by_traffic is by_traffic
    assert "robust cost" in found.choices["by_traffic"]
    # The truth's are beside 16 CTAs, and all pairs are beside 8.
    beside_8 = 1.0 + (slow.elementwise_by_comm - 1.0) * 8 / 16
    assert found.node.contention.elementwise_by_comm == pytest.approx(beside_8, rel=0.1)
    few = fit_pairs(rows[:2], true)
    assert "by_traffic" not in few.choices  # small ones alone do not tell


def test_launched_ctas_are_taken_over_of_gemms_and_of_collectives() -> None:
    true = truth()
    surveyor = Surveyor(true)
    gemms = surveyor.gemms((2048,), cuts=(1,))[:3]  # too few for a fit of anything else
    launches = [Measurement("launch", row.at, {"ctas": 248.0, "ctas_per_sm": 2.0}, {}, 1) for row in gemms]
    collectives = surveyor.collectives()
    channels = [
        Measurement("channels", row.at, {"ctas": float(min(16 if not row.at["ctas"] else 8, seen_ctas(row)))}, {}, 1)
        for row in collectives
    ]
    found = fit_node([*gemms, *launches, *collectives, *channels], load_node(BASE), ABOUT).node
    assert {ctas for table in found.gemms for ctas in table.ctas} == {124}
    # Never more CTAs than SMs, however large the GEMM: those that there are take tile after tile.
    assert found.device.gemm_persistent and "none had more" in found.sources["device.gemm_persistent"]
    assert found.link.default_ctas == 16 and "seen to be launched" in found.sources["link.default_ctas"]
    costs = Costs(found)
    for size, asked, ctas in ((2**12, 0, 1), (2**15, 0, 4), (2**22, 0, 16), (2**22, 8, 8), (2**14, 8, 2)):
        assert costs.ctas_of(collective("all_reduce", Kind.ALL_REDUCE, size, 4), asked) == ctas
    # Without them nothing is said of either.
    silent = fit_node([*gemms, *collectives], load_node(BASE), ABOUT).node
    assert not silent.device.gemm_persistent and not any(table.ctas for table in silent.gemms)
    assert not any(table.launched for table in silent.link.tables)
    many = [Measurement("launch", row.at, {"ctas": 500.0, "ctas_per_sm": 2.0}, {}, 1) for row in gemms]
    assert not fit_node([*gemms, *many], load_node(BASE), ABOUT).node.device.gemm_persistent


def test_a_wave_of_the_library_is_asked_of_pairs_where_only_collectives_were_seen_to_be_launched() -> None:
    """Whether a GEMM and a collective fit beside each other is a matter of both, and only one of them is known."""
    true = load_node("h200-hoststaged-x4-fitted")
    assert true.device.gemm_wave_ctas == 128 and any(table.launched for table in true.link.tables)
    surveyor, layer = Surveyor(true), layer_kernels(MODELS["opt-30b"], BatchShape(4, 64), 4)
    gemms = [kernel for kernel in layer if kernel.kind is Kind.GEMM]
    rows = [surveyor.pair(14, kernel, 256, (2**23, 0, ctas)) for kernel in gemms for ctas in (0, 8)]
    base = msgspec.structs.replace(true, device=msgspec.structs.replace(true.device, gemm_wave_ctas=124))
    assert fit_pairs(rows, base).node.device.gemm_wave_ctas == 128
    seen = msgspec.structs.replace(base, device=msgspec.structs.replace(base.device, gemm_persistent=True))
    assert fit_pairs(rows, seen).node.device.gemm_wave_ctas == 124  # no wave but that of the SMs


@pytest.mark.parametrize("together", [True, False])
def test_whether_clusters_lose_the_neighbours_of_a_collectives_sms_is_found(together: bool) -> None:
    base = truth()
    layer = layer_kernels(MODELS["opt-30b"], BatchShape(4, 64), 4)
    gemms = [kernel for kernel in layer if kernel.name in ("qkv_proj", "out_proj", "fc1")]
    tables = [
        GemmTable(cols=kernel.cols, inner=kernel.inner, rows=(256,), us=(us,), ctas=(112,), clusters=(2,))
        for kernel, us in zip(gemms, (40.0, 25.0, 60.0), strict=True)
    ]
    launched = [msgspec.structs.replace(table, launched=(table.ctas,) * len(table.us)) for table in base.link.tables]
    base = msgspec.structs.replace(
        base, gemms=tuple(tables), device=msgspec.structs.replace(base.device, gemm_persistent=True),
        link=msgspec.structs.replace(base.link, tables=tuple(launched)),
    )  # fmt: skip
    gpcs = GPCS[base.device.num_sms] if together else ()
    surveyor = Surveyor(msgspec.structs.replace(base, device=msgspec.structs.replace(base.device, gpcs=gpcs)))
    variants = product((2**20, 2**23), (0,), (0, 8))
    found = fit_pairs([surveyor.pair(14, k, 256, variant) for variant in variants for k in gemms], base)
    assert found.node.device.gpcs == gpcs and "assumed" in found.choices["gpcs"]


def seen_ctas(row: Measurement) -> int:
    """One CTA for every 8 KiB, as NCCL has it for small messages."""
    return max(1, int(row.at["bytes"]) // 2**13)


def test_a_default_that_was_seen_to_be_what_was_asked_for_is_one_table() -> None:
    surveyor = Surveyor(truth())
    rows = surveyor.collectives()
    default = [row for row in rows if row.at["op"] == "all_reduce" and not row.at["ctas"]]
    asked = [moved(row, {"ctas": 16}, 2.0) for row in default]  # whatever the times say
    channels = [Measurement("channels", row.at, {"ctas": 16.0}, {}, 1) for row in [*default, *asked]]
    tables = fit_tables([*rows, *asked], channels, load_node(BASE).link, 1.0)
    assert sorted(f.table.ctas for f in tables if f.table.op == "all_reduce") == [8, 16]


def test_each_protocol_goes_on_as_it_was_until_halfway_to_where_another_is_seen() -> None:
    """Up to 768 KiB 100 us a MiB, from 1 MiB on 40 us and as the root of the size: 850 KiB take longer than 1 MiB."""
    kib = 1024
    sizes = [64 * kib, 256 * kib, 768 * kib, 1024 * kib, 2048 * kib, 8192 * kib]

    def us(size: int) -> float:
        return 100.0 * size / 2**20 if size <= 887 * kib else 40.0 * (size / 2**20) ** 0.5

    rows = [
        Measurement("collective", {"op": "all_reduce", "bytes": size, "num_ranks": 4, "ctas": 0}, {"us": us(size)},
                    {"us": 0.0}, 9)
        for size in sizes
    ]  # fmt: skip
    table = next(f.table for f in fit_tables(rows, [], load_node(BASE).link, 0.0))
    for size in (320 * kib, 700 * kib, 850 * kib, 900 * kib, 3000 * kib):
        assert table.at(size) == pytest.approx(us(size), rel=0.03)
    flat = [replace(row, values={"us": us(8192 * kib)}) if int(row.at["bytes"]) > 887 * kib else row for row in rows]
    assert len(next(f.table for f in fit_tables(flat, [], load_node(BASE).link, 0.0)).bytes) < len(table.bytes)


def test_what_waits_across_streams_and_graphs_of_many_kernels_cost_is_measured() -> None:
    rows = Surveyor(truth()).host(issue=30.0, event=1.2)
    rows += [Measurement("host", {"name": n}, {"us": v}, {"us": 0.1}, 9) for n, v in HOST_ROWS.items()]
    found = fit_node(rows, load_node(BASE), ABOUT)
    assert found.node.device.event_gap_us == pytest.approx(2.8)
    assert "event_gap" in found.node.sources["device.event_gap_us"]
    assert found.node.host.graph_kernel_us == pytest.approx(1.1)  # of a whole forward pass, if that was measured
    assert found.estimates["device"]["event_gap_us"].is_determined


HOST_ROWS = {"event_gap": 2.8, "issue_kernel": 1.1, "graph_kernel": 0.02}


def test_the_default_number_of_ctas_is_more_than_any_that_was_slower() -> None:
    surveyor = Surveyor(truth())
    base = load_node(BASE).link
    rows = surveyor.collectives()
    default = [row for row in rows if row.at["op"] == "all_reduce" and not row.at["ctas"]]
    slower = [moved(row, {"ctas": 16}, 1.5) for row in default]
    tables = {f.table.ctas: f for f in fit_tables([*rows, *slower], [], base, 1.0) if f.table.op == "all_reduce"}
    assert set(tables) == {8, 16, 24}
    assert "estimate" in tables[24].note
    equal = [moved(row, {"ctas": 16}, 1.0) for row in default]
    assert {f.table.ctas for f in fit_tables([*rows, *equal], [], base, 1.0) if f.table.op == "all_reduce"} == {8, 16}


def moved(row: Measurement, at: dict[str, int], factor: float) -> Measurement:
    """The row at another place, so many times as long."""
    values = {name: factor * value for name, value in row.values.items()}
    return Measurement(row.what, row.at | at, values, row.spread, row.repetitions)


# -- the file ----------------------------------------------------------------------------------------------------------


def written(tmp_path: Path, node: NodeSpec, *changes: tuple[str, str]) -> NodeSpec:
    path = tmp_path / "toy.toml"
    write_node(path, node)
    text = path.read_text(encoding="utf-8")
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    path.write_text(text, encoding="utf-8")
    load_node.cache_clear()
    return load_node(str(path))


def test_a_node_file_is_read_back_as_it_was(fit: Fit, tmp_path: Path) -> None:
    node = written(tmp_path, fit.node)
    assert node.numbers_digest == fit.node.numbers_digest
    for part in ("device", "host", "link", "contention", "fit"):
        assert getattr(node, part) == getattr(fit.node, part)
    assert fit_notes(node) == ()
    assert "[fit.ranges]" in node_text(node)
    for key, source in node.sources.items():
        assert source, key
    gemms = node.sources["device.gemm_efficiency"]
    assert gemms.startswith("fitted: NVIDIA H200, 2026-11-21")
    assert "held-out error" in gemms and "standard error" in gemms


def test_changed_stale_and_foreign_files_are_noticed(fit: Fit, tmp_path: Path) -> None:
    efficiency = f"gemm_efficiency = {fit.node.device.gemm_efficiency}"
    (changed,) = fit_notes(written(tmp_path, fit.node, (efficiency, "gemm_efficiency = 0.99")))
    assert "changed after they were fitted" in changed
    # Words are not numbers.
    assert fit_notes(written(tmp_path, fit.node, ("description = ", 'description = "mine" # '))) == ()
    assert fit_notes(fit.node, date(2027, 1, 1)) == ()
    (stale,) = fit_notes(fit.node, date(2027, 9, 1))
    assert "stale" in stale
    (foreign,) = fit_notes(written(tmp_path, fit.node, ('gpu = "NVIDIA H200"', 'gpu = "NVIDIA A100-SXM4-80GB"')))
    assert "foreign" in foreign


def test_questions_beyond_the_fit_are_noticed(fit: Fit) -> None:
    costs = Costs(fit.node)
    assert not costs.beyond(gemm("fc1", 256, 7168, 7168))
    assert costs.beyond(gemm("fc1", 8192, 7168, 7168)) == "fc1 of 8192 rows (fitted from 16 to 2048)"
    assert "inner" in costs.beyond(gemm("fc1", 256, 7168, 70000))
    assert costs.beyond(collective("c", Kind.ALL_REDUCE, 512, 4))
    assert costs.beyond(collective("c", Kind.ALL_REDUCE, 1 << 30, 4))
    assert not costs.beyond(collective("c", Kind.ALL_REDUCE, 1 << 20, 4))
    assert not Costs(load_node(BASE)).beyond(gemm("fc1", 8192, 7168, 7168))


def test_the_report_as_data_has_everything(fit: Fit, rows: list[Measurement]) -> None:
    data = data_of(fit)
    assert len(data["residuals"]) == sum(r.what != "host" for r in rows)
    assert data["errors"]["gemm"]["held_out"]["count"] == sum(r.what == "gemm" and is_held_out(r) for r in rows)
    assert data["parameters"]["contention"]["gemm_by_comm"] | {"why": ""} == {
        "value": 1.1, "standard_error": None, "determined": False, "why": "",
    }  # fmt: skip


def test_beliefs_are_a_profile(fit: Fit, rows: list[Measurement]) -> None:
    models = measured_models(rows, fit.node)
    assert {config.model_id for config, _ in models} >= set(MODEL_IDS)
    config, tp = next((config, tp) for config, tp in models if config.model_id == "opt-30b")
    assert tp == 4
    profile = profile_from(beliefs(fit.node, config, tp, rows))
    true = Costs(truth())
    width = config.hidden_size
    for size in (16, 256, 2048):
        for kernel in (gemm("fc1", size, 7168, width), collective("c", Kind.ALL_REDUCE, size * width * 2, 4)):
            expected = true.solo_us(kernel) + fit.node.device.graph_gap_us
            assert profile.solo_us(kernel, 0, 0) == pytest.approx(expected, rel=0.15)
    assert profile.partitions == fit.node.link.partitions
    pair = gemm("fc1", 256, 7168, width), collective("c", Kind.ALL_REDUCE, 1 << 20, 4)
    assert 1.0 < profile.contention(*pair, 0, 0).compute < 2.0


def test_pieces_are_told_by_their_columns_and_cost_a_launch() -> None:
    true = msgspec.structs.replace(truth().device, piece_us=5.0)
    node = msgspec.structs.replace(truth(), device=true)
    whole = Surveyor(node).gemms((64, 512), cuts=(1, 2))
    rows = [replace(row, at={k: v for k, v in row.at.items() if k != "cut"}) for row in whole]
    cut = {row.at["cut"] for row in with_cuts(rows) if "cut" in row.at}
    assert cut == {2}
    kernel = kernel_of(next(row for row in with_cuts(rows) if "cut" in row.at))
    assert kernel.is_piece
    extra = Costs(node).solo_us(kernel) - Costs(truth()).solo_us(kernel)
    result = 2 * kernel.rows * kernel.cols * kernel.element_bytes
    assert extra == pytest.approx(5.0 + result / (true.hbm_gb_s * true.hbm_efficiency * 1e3), abs=0.05)


SIZED = Path(__file__).resolve().parents[2] / "benchmarks" / "data" / "h200-x2-2026-11-22-sized-gemms"


@pytest.mark.parametrize("name", ["h200-nvlink-x2-fitted", "h200-hoststaged-x2-fitted"])
def test_shipped_nodes_know_every_kernel_that_their_fit_saw(name: str) -> None:
    """A kernel of which no number alone was determined once fell back to what kernels of other names take at least:
    five times as long as it takes."""
    costs = Costs(load_node(name).in_series())
    errors: dict[str, list[float]] = {}
    for row in read_measurements(SIZED / "survey-kernels")[1]:
        if row.what == "elementwise" and not is_held_out(row):
            us = costs.solo_us(kernel_of(row), withheld_of(row)) + costs.device.graph_gap_us
            errors.setdefault(label_of(row.at), []).append(abs(us / row.values["us"] - 1.0))
    assert {label: fmean(each) for label, each in errors.items() if fmean(each) > 0.4} == {}
