"""Nodes as files: the shipped ones are complete and name their sources; broken ones get one clear line."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.kernel import Kind, collective
from sim.cost import Costs
from sim.spec import NODES, load_node, node_names

SHIPPED = (
    "a100-nvlink-x4", "a100-nvlink-x4-fitted", "a100-pcie-x4", "a100-pcie-x4-fitted", "h200-hoststaged-x2-fitted",
    "h200-hoststaged-x4", "h200-hoststaged-x4-fitted", "h200-nvlink-x2-fitted", "h200-nvlink-x4",
    "h200-nvlink-x4-fitted", "v100-nvlink-x4",
)  # fmt: skip
GOOD = (NODES / "a100-pcie-x4.toml").read_text(encoding="utf-8")


def write(folder: Path, text: str) -> str:
    path = folder / "node.toml"
    path.write_text(text, encoding="utf-8")
    load_node.cache_clear()
    return str(path)


def complaint(path: str) -> str:
    with pytest.raises(ValueError) as error:
        load_node(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


def test_what_is_shipped() -> None:
    assert node_names() == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_node_is_complete(name: str) -> None:
    node = load_node(name)
    gpus = int(name.removesuffix("-fitted")[-1])
    assert node.name == name and node.num_gpus == gpus
    costs = Costs(node)
    for tp in range(2, gpus + 1, 2):  # what tensor parallelism, pipelines and their hybrid need
        for kind in (Kind.ALL_REDUCE, Kind.ALL_GATHER):
            assert costs.solo_us(collective("c", kind, 1 << 20, tp)) > 0.0
    assert costs.solo_us(collective("s", Kind.SEND, 1 << 20, 2)) > 0.0
    assert all(0 <= sms < node.device.num_sms for sms in node.link.partitions)
    assert all(0 <= gpu < node.num_gpus for pair in node.link.pairs for gpu in pair)
    assert all(table.ctas < node.device.num_sms for table in node.link.tables)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_number_has_a_source_and_every_source_a_number(name: str) -> None:
    raw = tomllib.loads((NODES / f"{name}.toml").read_text(encoding="utf-8"))
    numbers = {f"{part}.{key}" for part in ("device", "host", "link", "contention") for key, value in raw[part].items()
               if not isinstance(value, str) and key != "tables"}  # fmt: skip
    numbers |= {f"link.tables.{t['op']}.{t['ranks']}.{t['ctas']}{t.get('path', '')}" for t in raw["link"]["tables"]}
    numbers |= {"gemms"} if "gemms" in raw else set()
    sources = raw["sources"]
    unexplained = [n for n in numbers if not any(n == s or n.startswith(f"{s}.") for s in sources)]
    stale = [s for s in sources if not any(n == s or n.startswith(f"{s}.") for n in numbers)]
    assert (unexplained, stale) == ([], [])
    kinds = ("data sheet", "measured", "fitted", "estimate", "no shared root")
    assert [s for s in sources.values() if not s.startswith(kinds)] == []


@pytest.mark.parametrize("name", SHIPPED)
def test_estimates_are_listed(name: str) -> None:
    node = load_node(name)
    assert set(node.estimates) == {key for key, source in node.sources.items() if source.startswith("estimate")}
    if node.fit is None:
        assert "device.attention_efficiency" in node.estimates
    assert "device.num_sms" not in node.estimates


def test_a_node_from_a_file_of_ones_own(tmp_path: Path) -> None:
    node = load_node(write(tmp_path, GOOD.replace("launch_us = 6.0", "launch_us = 3.0", 1)))
    assert node.host.launch_us == 3.0
    assert node.digest != load_node("a100-pcie-x4").digest  # the same name, another machine


def test_a_node_may_leave_its_memory_open(tmp_path: Path) -> None:
    expected = {"a100": 80.0, "h200": 141.0, "v100": 16.0}
    assert all(load_node(name).device.memory_gb == expected[name[:4]] for name in SHIPPED)
    silent = load_node(write(tmp_path, GOOD.replace("memory_gb = 80.0\n", "", 1)))
    assert silent.device.memory_gb == 0.0


# What is replaced in a good file, by what, and what the one line says.
BROKEN = [
    ("[host]", "[hosts]", "Object contains unknown field `hosts`"),
    ("[host]", "[host", "Expected ']' at the end of a table declaration (at line"),
    ("num_sms = 108", "num_sms = 0", "Expected `int` >= 1 - at `$.device.num_sms`"),
    ("num_sms = 108", "num_sms = 'many'", "Expected `int`, got `str` - at `$.device.num_sms`"),
    ("num_sms = 108\n", "", "missing required field `num_sms` - at `$.device`"),
    ("num_sms = 108", "num_sms = 108\nnum_cores = 1", "unknown field `num_cores` - at `$.device`"),
    ("peak_tflops = 312.0", "peak_tflops = -1.0", "Expected `float` >= 0.001 - at `$.device.peak_tflops`"),
    ("peak_tflops = 312.0", "peak_tflops = inf", "Expected `float` <= 1000000000.0 - at `$.device.peak_tflops`"),
    ("peak_tflops = 312.0", "peak_tflops = nan", "Expected `float` >= 0.001 - at `$.device.peak_tflops`"),
    ("peak_tflops = 312.0", "peak_tflops = 1e-300", "Expected `float` >= 0.001 - at `$.device.peak_tflops`"),
    ("num_sms = 108", f"num_sms = {'9' * 5000}", "integer string conversion: value has 5000 digits)"),
    ("memory_gb = 80.0", "memory_gb = -1.0", "Expected `float` >= 0.0 - at `$.device.memory_gb`"),
    ("attention_efficiency = 0.45", "attention_efficiency = 1.2", "<= 1.0 - at `$.device.attention_efficiency`"),
    ("launch_us = 6.0", "launch_us = -6.0", "Expected `float` >= 0.0 - at `$.host.launch_us`"),
    ("gemm_by_comm = ", "gemm_by_comm = 0.5 #", "Expected `float` >= 1.0 - at `$.contention.gemm_by_comm`"),
    ("gemm_by_comm = ", "gemm_by_comm = inf #", "Expected `float` <= 1000.0 - at `$.contention.gemm_by_comm`"),
    ("gemm_tiles = [", "gemm_tiles = [] #", "Expected `array` of length >= 1 - at `$.device.gemm_tiles`"),
    ("partitions = [", "partitions = [] #", "Expected `array` of length >= 1 - at `$.link.partitions`"),
    ("gemm_tiles = [", "gemm_tiles = [[128], ", "`$.device.gemm_tiles[0]`"),
    ("partitions = [", "partitions = [-8, ", "Expected `int` >= 0 - at `$.link.partitions[0]`"),
    ("us = [", "us = [1.0, ", "sizes and"),
    ("bytes = [", "bytes = [9999999999, ", "sizes and"),
    ('op = "all_reduce"\nranks = 2', 'op = "all_reduce"\nranks = 4', "two tables of all_reduce among 4 ranks with 4"),
    ('"host.launch_us" = ', '"host.lunch_us" = ', "no source is given for host.launch_us; add it under [sources]"),
    ("ctas = 4", "ctas = 5", "no source is given for link.tables.all_reduce.4.5; add it under [sources]"),
]


@pytest.mark.parametrize(("good", "bad", "says"), BROKEN, ids=[f"{g}-{b}".replace("\n", " ") for g, b, _ in BROKEN])
def test_broken_files_get_one_line(good: str, bad: str, says: str, tmp_path: Path) -> None:
    assert good in GOOD
    assert says in complaint(write(tmp_path, GOOD.replace(good, bad, 1)))


def test_sizes_that_do_not_increase(tmp_path: Path) -> None:
    start = GOOD.index("bytes = [") + len("bytes = [")
    first, rest = GOOD[start:].split(", ", 1)
    second, rest = rest.split(", ", 1)
    assert "sizes must increase" in complaint(write(tmp_path, f"{GOOD[:start]}{second}, {first}, {rest}"))


def test_files_that_are_no_text_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "node.toml"
    path.write_bytes(b"\xff\xfe\x00")
    load_node.cache_clear()
    assert "not a node file" in complaint(str(path))
    with pytest.raises(ValueError, match="node 'b200' is neither a file nor one of: a100-nvlink-x4, a100-"):
        load_node("b200")


@settings(derandomize=True, deadline=None, max_examples=60)
@given(line=st.integers(0, GOOD.count("\n") - 1), junk=st.text(st.characters(codec="ascii"), max_size=8))
def test_a_spoilt_line_loads_or_is_one_line(line: int, junk: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    lines = GOOD.split("\n")
    lines[line] = junk
    path = write(tmp_path_factory.mktemp("node"), "\n".join(lines))
    try:
        load_node(path)
    except ValueError as error:
        assert str(error).startswith(f"{path}: ")
        assert "\n" not in str(error)
