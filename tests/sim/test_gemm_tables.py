"""GEMM shapes that were measured: the node says what was measured, and the model's word elsewhere."""

from __future__ import annotations

from dataclasses import replace
from math import sqrt

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibration.gemm_tables import gemm_tables
from calibration.node_file import node_text
from calibration.race import Pair, race
from models.kernel import Kernel, Kind, collective, gemm
from policy.batch import TICK_US
from sim.cost import Costs, lost_sms
from sim.spec import GemmTable, NodeSpec, load_node
from traces.measurement import Coordinates, Measurement

BASE = load_node("h200-nvlink-x4")
COLS, INNER = 7168, 1792
ROWS, US = (16, 64, 256, 1024), (9.0, 11.0, 14.0, 40.0)


def node(*tables: GemmTable) -> NodeSpec:
    return msgspec.structs.replace(BASE, gemms=tables, sources=BASE.sources | {"gemms": "measured"})


def table(**changes: object) -> GemmTable:
    known = {"cols": COLS, "inner": INNER, "rows": ROWS, "us": US}
    return msgspec.convert(known | changes, GemmTable)


def us(of: NodeSpec, kernel: Kernel, withheld: int = 0) -> float:
    return Costs(of).solo_us(kernel, withheld)


@given(place=st.integers(0, len(ROWS) - 1))
def test_a_measured_point_takes_what_it_took(place: int) -> None:
    assert us(node(table()), gemm("fc1", ROWS[place], COLS, INNER)) == pytest.approx(US[place], abs=3 * TICK_US)


def test_between_points_it_reads_and_beyond_them_it_keeps_the_ratio() -> None:
    of = node(table())
    assert us(of, gemm("fc1", 32, COLS, INNER)) == pytest.approx(sqrt(US[0] * US[1]), abs=3 * TICK_US)
    last, beyond = gemm("fc1", ROWS[-1], COLS, INNER), gemm("fc1", 4096, COLS, INNER)
    assert us(of, beyond) / us(BASE, beyond) == pytest.approx(US[-1] / us(BASE, last), rel=1e-3)


def test_a_partition_has_its_own_table_or_the_whole_devices_ratio() -> None:
    kernel = gemm("fc1", 256, COLS, INNER)
    both = node(table(), table(withheld_sms=16, us=(10.0, 12.0, 25.0, 60.0)))
    assert us(both, kernel, 16) == pytest.approx(25.0, abs=3 * TICK_US)
    ratio = US[2] / us(BASE, kernel)
    assert us(both, kernel, 32) == pytest.approx(ratio * us(BASE, kernel, 32), rel=1e-3)


def test_other_shapes_pieces_and_precisions_are_the_models() -> None:
    of = node(table())
    piece = replace(gemm("fc1", 256, COLS, INNER), is_piece=True)
    for kernel in (gemm("x", 256, COLS + 8, INNER), piece, gemm("fc1", 256, COLS, INNER, 4)):
        assert us(of, kernel) == us(BASE, kernel)


@given(st.lists(st.integers(1, 400), min_size=len(ROWS), max_size=len(ROWS)), st.sampled_from(ROWS))
def test_a_gemm_takes_what_it_took_whatever_its_ctas(ctas: list[int], rows: int) -> None:
    kernel = gemm("fc1", rows, COLS, INNER)
    assert us(node(table(ctas=tuple(ctas))), kernel) == pytest.approx(us(node(table()), kernel), abs=3 * TICK_US)


def test_a_collective_starts_at_once_beside_a_gemm_that_leaves_it_sms_and_waits_for_one_that_does_not() -> None:
    """BASE has 132 SMs, and its default all-reduce more CTAs than 4 and fewer than 32."""
    comm = collective("attn_all_reduce", Kind.ALL_REDUCE, 2**20, 4)
    needed = Costs(BASE).ctas_of(comm, 0)
    assert 4 < needed < 32
    for ctas, waits in ((100, False), (128, True), (132, True)):
        of = node(table(ctas=(ctas,) * len(ROWS)))
        compute = gemm("fc1", 1024, COLS, INNER)
        delay_us = race(Costs(of), Pair(compute, comm)).start_delay_us
        # What is alone on its SMs is slowed, but never waits for half a GEMM on average.
        assert (delay_us > 0.4 * us(of, compute)) == waits


def test_a_small_message_has_the_ctas_that_it_was_seen_with() -> None:
    seen = tuple(min(8, 1 + place) for place in range(len(BASE.link.tables[0].bytes)))
    first, *rest = BASE.link.tables
    link = msgspec.structs.replace(BASE.link, tables=(msgspec.structs.replace(first, launched=seen), *rest))
    assert first.op == "all_reduce"
    costs = Costs(msgspec.structs.replace(BASE, link=link))
    for place, size in enumerate(first.bytes):
        comm = collective("attn_all_reduce", Kind.ALL_REDUCE, size, first.ranks)
        assert costs.ctas_of(comm, first.ctas) == seen[place]
        assert costs.ctas_of(replace(comm, message_bytes=size - 1), first.ctas) == seen[place]
    assert costs.ctas_of(replace(comm, message_bytes=2 * first.bytes[-1]), first.ctas) == seen[-1]
    with pytest.raises(ValueError, match="launched CTAs"):
        msgspec.structs.replace(first, launched=seen[1:])


def test_ctas_that_take_tile_after_tile_leave_their_sms_when_no_tile_is_left() -> None:
    """Four waves of tiles: the SMs are free for a collective that comes first after a wave, or after all of them."""
    compute, comm = gemm("fc1", 1024, COLS, INNER), collective("attn_all_reduce", Kind.ALL_REDUCE, 2**16, 4)
    waits = {}
    for persistent in (False, True):
        of = node(table(ctas=(4 * BASE.device.num_sms,) * len(ROWS), us=(9.0, 11.0, 14.0, 400.0)))
        of = msgspec.structs.replace(of, device=msgspec.structs.replace(of.device, gemm_persistent=persistent))
        waits[persistent] = race(Costs(of), Pair(compute, comm)).start_delay_us
        assert us(of, compute) == pytest.approx(400.0, abs=10 * TICK_US)
    assert waits[False] < 110.0  # a wave at most
    assert 150.0 < waits[True] < 300.0  # half of the GEMM on average


def test_sms_for_which_there_is_no_tile_in_the_last_turn_are_free_for_a_collective() -> None:
    """Of two turns of 100 us the second has tiles for all SMs, or for all but 40."""
    num, comm = BASE.device.num_sms, collective("attn_all_reduce", Kind.ALL_REDUCE, 2**16, 4)
    device = msgspec.structs.replace(BASE.device, gemm_persistent=True)
    waits = {}
    for idle in (0, 40):
        of = node(table(ctas=(2 * num - idle,) * len(ROWS), us=(9.0, 11.0, 14.0, 200.0)))
        of = msgspec.structs.replace(of, device=device)
        waits[idle] = race(Costs(of), Pair(gemm("fc1", 1024, COLS, INNER), comm)).start_delay_us
    assert waits[0] > 90.0  # half of both turns
    assert waits[40] < 40.0  # half of the first, where it comes in that


def test_tiles_that_find_fewer_sms_are_taken_by_those_that_there_are() -> None:
    """Beside a collective that stays, eight tiles for each SM take nine turns, and not sixteen."""
    num, comm = BASE.device.num_sms, collective("attn_all_reduce", Kind.ALL_REDUCE, 2**26, 4)
    contention = msgspec.structs.replace(BASE.contention, gemm_by_comm=1.0, comm_by_compute=1.0)
    of = msgspec.structs.replace(
        node(table(ctas=(8 * num,) * len(ROWS), us=(9.0, 11.0, 14.0, 100.0))), contention=contention,
        device=msgspec.structs.replace(BASE.device, gemm_persistent=True),
        link=msgspec.structs.replace(BASE.link, hbm_per_byte=0.1),
    )  # fmt: skip
    slow = race(Costs(of), Pair(gemm("fc1", 1024, COLS, INNER), comm)).compute_slowdown
    assert 1.0 < slow < 1.3


GPCS = (18, 18, 16, 16, 16, 16, 16, 16)


@pytest.mark.parametrize(("taken", "cluster", "lost"), [
    (4, 1, 4),
    (4, 2, 8),  # a TPC each
    (4, 8, 16),  # two each of the GPCs of 18, which then have room for one cluster instead of two
    (8, 8, 32),  # and one each of two others
    (0, 8, 0),
])  # fmt: skip
def test_collectives_take_their_neighbours_from_clusters(taken: int, cluster: int, lost: int) -> None:
    assert lost_sms(GPCS, taken, cluster) == lost
    assert lost_sms((), taken, cluster) == taken  # nobody knows what lies together


@given(st.integers(0, 60), st.sampled_from([1, 2, 4, 8]))
def test_the_more_sms_a_collective_has_the_more_are_lost(taken: int, cluster: int) -> None:
    assert 0 <= lost_sms(GPCS, taken, cluster) <= lost_sms(GPCS, taken + 1, cluster) <= sum(GPCS)


def beside_a_collective_that_stays(
    withheld: int, gpcs: tuple[int, ...], *, anywhere: bool, **launched: object
) -> float:
    comm = collective("attn_all_reduce", Kind.ALL_REDUCE, 2**26, 4)
    contention = msgspec.structs.replace(BASE.contention, gemm_by_comm=1.0, comm_by_compute=1.0)
    of = msgspec.structs.replace(
        node(table(withheld_sms=withheld, us=(9.0, 11.0, 14.0, 100.0), **launched)), contention=contention,
        device=msgspec.structs.replace(BASE.device, gpcs=gpcs),
        link=msgspec.structs.replace(BASE.link, hbm_per_byte=0.1, ctas_anywhere=anywhere),
    )  # fmt: skip
    return race(Costs(of), Pair(gemm("fc1", 1024, COLS, INNER), comm, withheld)).compute_slowdown


@pytest.mark.parametrize(("cluster", "gpcs", "fits"), [(1, GPCS, True), (2, GPCS, False), (2, (), True)])
def test_a_gemm_in_clusters_needs_a_wave_more_beside_a_collective(
    cluster: int, gpcs: tuple[int, ...], fits: bool
) -> None:
    """112 CTAs of 132 SMs, of which a collective has 16: 116 are left, but of pairs of them 50."""
    many = len(ROWS)
    slow = beside_a_collective_that_stays(0, gpcs, anywhere=False, ctas=(112,) * many, clusters=(cluster,) * many)
    assert slow == pytest.approx(1.0, abs=0.05) if fits else slow > 1.3


@pytest.mark.parametrize("anywhere", [False, True])
def test_a_collective_that_lands_anywhere_disturbs_a_partition(anywhere: bool) -> None:
    """Of 120 SMs 116 have room for 104 CTAs, and the 12 that are withheld for most of a collective; where it takes of
    those first."""
    many = (104,) * len(ROWS), (8,) * len(ROWS)
    slow = beside_a_collective_that_stays(16, GPCS, anywhere=anywhere, ctas=many[0], clusters=many[1])
    assert slow > 1.2 if anywhere else slow == pytest.approx(1.0, abs=0.05)


def test_a_fit_makes_tables_of_what_it_sees_and_they_survive_a_file() -> None:
    gap = BASE.device.graph_gap_us
    at: Coordinates = {"name": "fc1", "cols": COLS, "inner": INNER, "withheld_sms": 0, "element_bytes": 2}
    rows = [Measurement("gemm", at | {"rows": r}, {"us": t + gap}, {}, 5) for r, t in zip(ROWS, US, strict=True)]
    rows.append(Measurement("gemm", at | {"name": "fc2", "rows": ROWS[0]}, {"us": 2.0 + US[0] + gap}, {}, 5))
    launches = [
        Measurement("launch", at | {"rows": r, "cut": 1}, {"ctas": c, "ctas_per_sm": 2.0}, {}, 1)
        for r, c in zip(ROWS[1:], (100.0, 131.0), strict=False)
    ]
    [found] = gemm_tables(rows, launches, BASE)
    assert found.rows == ROWS and found.us == pytest.approx((US[0] + 1.0, *US[1:]))
    # Two fit on an SM; what was not seen has the CTAs of the next larger number of rows, or of the largest.
    assert found.ctas[:3] == (50, 50, 66) and set(found.ctas[3:]) <= {66}
    of = node(found)
    import tomllib

    again = msgspec.convert(tomllib.loads(node_text(of)), NodeSpec)
    assert again == of and again.digest == of.digest != BASE.digest
    assert again.numbers_digest != BASE.numbers_digest


def test_tiles_come_from_the_names_of_kernels_that_have_one_cta_for_every_sm() -> None:
    at: Coordinates = {"name": "fc1", "cols": COLS, "inner": INNER, "withheld_sms": 0, "element_bytes": 2, "rows": 1024}
    rows = [Measurement("gemm", at, {"us": 50.0}, {}, 5)]

    def ctas(count: float, kernel: str) -> tuple[int, ...]:
        launch = Measurement("launch", at | {"kernel": kernel}, {"ctas": count, "ctas_per_sm": 1.0}, {}, 1)
        return gemm_tables(rows, [launch], BASE)[0].ctas

    # 7168 x 1024 in tiles of 256 x 128: 224, two for some of 132 SMs and one for the others.
    assert ctas(132.0, "nvjet_sm90_hsh_256x128_64x4_1x2_h_bz_coopA_bias_TNT") == (224,)
    assert ctas(128.0, "nvjet_sm90_hsh_256x128_64x4_1x2_h_bz_coopA_bias_TNT") == (128,)
    assert ctas(132.0, "another_library_256x128") == (132,)


def test_a_partition_has_the_ctas_and_clusters_that_were_seen_under_it() -> None:
    """One for every SM of the 120 that a partition leaves takes tile after tile, as one for each of 132 does."""
    at: Coordinates = {"name": "fc1", "cols": COLS, "inner": INNER, "element_bytes": 2, "rows": 1024}
    seen = {0: (128.0, "128x128_64x4_1x2"), 16: (120.0, "256x128_64x4_2x4"), 32: (96.0, "256x128_64x4_4x2")}
    launches = [
        Measurement("launch", at | {"withheld_sms": withheld, "kernel": f"nvjet_sm90_hsh_{name}_h_bz_TNT"},
                    {"ctas": ctas, "ctas_per_sm": 1.0}, {}, 1)
        for withheld, (ctas, name) in seen.items()
    ]  # fmt: skip
    rows = [Measurement("gemm", at | {"withheld_sms": withheld}, {"us": 50.0}, {}, 5) for withheld in (0, 8, 16, 32)]
    tables = {found.withheld_sms: found for found in gemm_tables(rows, launches, BASE)}
    assert {withheld: (*found.ctas, *found.clusters) for withheld, found in tables.items()} == {
        0: (128, 2), 8: (128, 2), 16: (224, 8), 32: (96, 8),
    }  # fmt: skip


@pytest.mark.parametrize(("change", "words"), [({"rows": (16, 64)}, "times"), ({"rows": (16, 64, 64, 70)}, "increase")])
def test_a_wrong_table_is_told(change: dict[str, object], words: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=words):
        table(**change)


def test_two_tables_of_one_shape_are_told() -> None:
    raw = msgspec.to_builtins(node(table()))
    raw["gemms"] = [*raw["gemms"], *raw["gemms"]]
    with pytest.raises(msgspec.ValidationError, match="two GEMM tables"):
        msgspec.convert(raw, NodeSpec)
