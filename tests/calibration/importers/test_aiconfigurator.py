"""Tables of aiconfigurator: units, what is left out, and what is wrong with a broken one."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from calibration.importers.aiconfigurator import read_aiconfigurator
from calibration.importers.found import Found, Request, repeats_of
from calibration.kernels import kernel_of
from models.config import MODELS
from models.kernel import Kernel, Kind
from models.transformer import BatchShape, layer_kernels

Write = Callable[..., Path]
HEAD = "source,framework,version,device,op_name,kernel_source"
TOY = "toy/1.0,Toy,1.0,Toy GPU"

GEMM = f"""{HEAD},gemm_dtype,m,n,k,latency
{TOY},gemm,toy,bfloat16,16,1024,2048,0.0125
{TOY},gemm,toy,bfloat16,32,1024,2048,0.0250
{TOY},gemm,toy,fp8,32,1024,2048,0.0150
"""
NCCL = f"""{HEAD},nccl_dtype,num_gpus,message_size,latency
nccl/2.1,Toy,2.1,Toy GPU,all_gather,NCCL,half,4,512,0.010
nccl/2.1,Toy,2.1,Toy GPU,all_reduce,NCCL,half,2,33554432,0.5
nccl/2.1,Toy,2.1,Toy GPU,alltoall,NCCL,half,2,512,0.011
nccl/2.1,Toy,2.1,Toy GPU,reduce_scatter,NCCL,half,2,512,0.012
"""
CUSTOM = f"""{HEAD},allreduce_dtype,num_gpus,message_size,latency,backend,implementation
{TOY},all_reduce,Toy_graph,bfloat16,4,8192,0.006,toy_graph,
{TOY},all_reduce,Toy_eager,bfloat16,4,8192,0.045,toy_eager,
{TOY},all_reduce,Toy,bfloat16,4,16384,0.007,,
"""
ATTENTION_COLUMNS = "batch_size,isl,num_heads,num_key_value_heads,head_dim,window_size,beam_width,"
ATTENTION_COLUMNS += "attn_dtype,kv_cache_dtype,step,latency"
CONTEXT = f"""{HEAD},{ATTENTION_COLUMNS}
{TOY},context_attention,toy,2,100,20,4,128,,1,bfloat16,bfloat16,0,0.080
{TOY},context_attention,toy,2,100,20,4,128,0,1,bfloat16,bfloat16,0,0.090
{TOY},context_attention,toy,2,100,20,4,128,64,1,bfloat16,bfloat16,0,0.050
{TOY},context_attention,toy,2,100,20,4,128,,1,bfloat16,fp8,0,0.060
"""
GENERATION = f"""{HEAD},{ATTENTION_COLUMNS}
{TOY},generation_attention,toy,8,1,20,4,128,,1,bfloat16,bfloat16,511,0.030
"""


def read(*paths: Path, source: str = "") -> Found:
    return read_aiconfigurator(paths, Request(source=source))


@pytest.mark.parametrize("name", ["gemm.csv", "gemm.csv.gz"])
def test_gemm_rows(write: Write, name: str) -> None:
    found = read(write(name, GEMM))
    assert found.about["gpu"] == "Toy GPU" and found.about["dtype"] == "bfloat16"
    assert found.left_out == {"gemm: element type fp8": 1}
    first, second = repeats_of(found.samples)
    assert first.at == {
        "name": "gemm", "rows": 16, "cols": 1024, "inner": 2048, "withheld_sms": 0, "element_bytes": 2,
    }  # fmt: skip
    assert first.values == {"us": pytest.approx(12.5)}  # the table has milliseconds
    assert second.values == {"us": pytest.approx(25.0)}
    kernel = kernel_of(second)
    assert (kernel.rows, kernel.cols, kernel.inner, kernel.flops) == (32, 1024, 2048, 2.0 * 32 * 1024 * 2048)


def test_messages_are_counted_in_elements(write: Write) -> None:
    found = read(write("nccl.csv", NCCL))
    gather, reduce = repeats_of(found.samples)
    assert gather.at == {"op": "all_gather", "bytes": 1024, "num_ranks": 4, "ctas": 0}
    assert reduce.at["bytes"] == 64 * 2**20
    assert reduce.values["us"] == pytest.approx(500.0)
    assert (gather.repetitions, reduce.repetitions) == (100, 60)
    assert kernel_of(reduce).message_bytes == 64 * 2**20
    assert found.about["nccl"] == "2.1"
    assert sum(found.left_out.values()) == 2
    assert {reason.split(",")[0] for reason in found.left_out} == {"nccl: alltoall", "nccl: reduce_scatter"}


def test_calls_from_python_are_left_out_of_the_engines_all_reduce(write: Write) -> None:
    found = read(write("custom.csv", CUSTOM))
    assert [(s.at["bytes"], s.values["us"]) for s in found.samples] == [(16384, 6.0), (32768, 7.0)]
    assert sum(found.left_out.values()) == 1 and "copy" in next(iter(found.left_out))
    assert found.about["nccl"].startswith("none")


def test_attention_counts_as_the_models_do(write: Write) -> None:
    found = read(write("context.csv", CONTEXT), write("generation.csv", GENERATION))
    assert sum(found.left_out.values()) == 2  # a window, an fp8 cache
    context, generation = repeats_of(found.samples)
    # The same point twice: an empty window and 0 mean the same. One row, with the spread of the two.
    assert context.values["us"] == pytest.approx(85.0)
    assert context.spread["us"] == pytest.approx(5.0)
    assert context.repetitions == 12
    assert (context.at["length"], context.at["context_len"]) == (100, 0)
    assert (generation.at["length"], generation.at["context_len"], generation.at["num_sequences"]) == (1, 511, 8)
    assert generation.at["flops"] == 4.0 * 8 * 512 * 20 * 128
    assert generation.at["bytes_moved"] == 8 * 128 * 2 * (2 * 20 + 2 * 512 * 4)


@pytest.mark.parametrize("model", ["llama-3-8b", "glm-130b"])
@pytest.mark.parametrize("shape", [BatchShape(2, 300), BatchShape(8, 1, "decode", 511)])
def test_rebuilt_attention_is_the_models_kernel(write: Write, model: str, shape: BatchShape) -> None:
    config = MODELS[model]
    heads = f"{config.num_heads},{config.num_kv_heads},{config.head_dim}"
    phase, isl = ("generation", 1) if shape.phase == "decode" else ("context", shape.padded_len)
    row = (
        f"{TOY},{phase}_attention,toy,{shape.num_sequences},{isl},{heads},,1,bfloat16,bfloat16,{shape.context_len},1.0"
    )
    (sample,) = repeats_of(read(write("t.csv", f"{HEAD},{ATTENTION_COLUMNS}\n{row}\n")).samples)
    expected: Kernel = next(k for k in layer_kernels(config, shape, 1) if k.kind is Kind.ATTENTION)
    assert kernel_of(sample) == expected


def test_a_table_of_several_versions_needs_a_choice(write: Write) -> None:
    path = write("gemm.csv", GEMM + GEMM.splitlines()[1].replace("toy/1.0", "toy/2.0") + "\n")
    with pytest.raises(ValueError, match=r"gemm\.csv: the table holds 2 versions.*toy/1\.0, toy/2\.0.*--source"):
        read(path)
    found = read(path, source="toy/2.0")
    assert len(found.samples) == 1 and found.about["version.gemm"] == "toy/2.0"
    with pytest.raises(ValueError, match="holds 2 versions"):
        read(path, source="toy/3")
    other = write("nccl.csv", NCCL)  # has one version alone, so there is nothing to choose
    assert {s.what for s in read(path, other, source="toy/2.0").samples} == {"gemm", "collective"}


def test_passes_of_one_version_are_repeats(write: Write) -> None:
    line = NCCL.splitlines()[1]
    again = line.replace("nccl/2.1", "nccl/2.0").replace("0.010", "0.030")
    (row,) = repeats_of(read(write("nccl.csv", f"{NCCL.splitlines()[0]}\n{line}\n{again}\n")).samples)
    assert row.values["us"] == pytest.approx(20.0)
    assert row.spread["us"] == pytest.approx(10.0)
    assert row.repetitions == 200


def test_two_libraries_are_not_mixed(write: Write) -> None:
    with pytest.raises(ValueError, match="two libraries"):
        read(write("nccl.csv", NCCL), write("custom.csv", CUSTOM))


def test_two_machines_are_not_mixed(write: Write) -> None:
    other = GEMM.replace("Toy GPU", "Other GPU")
    with pytest.raises(ValueError, match=r"b\.csv:2: gpu is 'Other GPU', but 'Toy GPU' before"):
        read(write("a.csv", GEMM), write("b.csv", other))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("0.0250", "fast"), r":3: latency is 'fast'; expected a number above 0"),
        (("0.0250", "0"), r":3: latency is '0'; expected a number above 0"),
        (("0.0250", "nan"), r":3: latency is 'nan'"),
        (("0.0250", "-1"), r":3: latency is '-1'"),
        ((",16,", ",-16,"), r":2: m is '-16'; expected a whole number, 1 or more"),
        ((",16,", ",1.5,"), r":2: m is '1\.5'"),
        ((",16,", ","), r":2: the row has 10 cells where the header has 11"),
        (("m,n,k", "m,n,o"), r":1: an aiconfigurator table of gemm needs the column k; found source"),
        (("m,n,k", "m,n,n,k"), r":1: two columns are named 'n'"),
        (("gemm_dtype", "dtype"), r":1: not a table of aiconfigurator"),
    ],
)
def test_broken_tables(write: Write, change: tuple[str, str], message: str) -> None:
    path = write("gemm.csv", GEMM.replace(*change))
    with pytest.raises(ValueError, match=re.escape(str(path)) + message) as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_empty_and_damaged_files(write: Write, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"empty\.csv:1: the file is empty"):
        read(write("empty.csv", "\n\n"))
    with pytest.raises(ValueError, match=r"head\.csv:1: the table has a header but no rows"):
        read(write("head.csv", GEMM.splitlines()[0] + "\n"))
    whole = write("whole.csv.gz", GEMM * 50).read_bytes()
    (tmp_path / "cut.csv.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut\.csv\.gz:\d+: the gzip file is cut off"):
        read(tmp_path / "cut.csv.gz")
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "absent.csv")


def test_unknown_phase_of_attention(write: Write) -> None:
    with pytest.raises(ValueError, match=r"t\.csv:2: op_name is 'mla_attention'"):
        read(write("t.csv", CONTEXT.replace("context_attention", "mla_attention")))
