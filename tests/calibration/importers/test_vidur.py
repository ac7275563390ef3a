"""Tables of Vidur: which operation of a layer is which kernel, sizes in bytes, nodes kept apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from calibration.importers.found import Found, Request, repeats_of
from calibration.importers.vidur import QUARTILES_PER_SIGMA, read_vidur
from calibration.kernels import kernel_of
from models.config import MODELS
from models.kernel import Kind
from models.transformer import BatchShape, layer_kernels

Write = Callable[..., Path]
GEMMS = ("attn_pre_proj", "attn_post_proj", "mlp_up_proj", "mlp_down_proj")
OTHERS = ("emb", "input_layernorm", "post_attention_layernorm", "attn_rope", "mlp_act", "add")
SHAPE = "n_head,n_kv_head,n_embd,n_expanded_embd,vocab_size,use_gated_mlp,num_tokens,num_tensor_parallel_workers"


def layer_table(
    shape: str, medians: dict[str, float] | None = None, operations: tuple[str, ...] = GEMMS + OTHERS
) -> str:
    """One row; every operation takes 10 us with a standard deviation of 1 us, unless stated (in ms)."""
    header = ",".join(f"time_stats.{op}.{s}" for op in operations for s in ("min", "max", "mean", "median", "std"))
    cells = []
    for op in operations:
        median = (medians or {}).get(op, 0.010)
        cells += [0.0, 9.0, 5.0, median, 0.001]
    return f"{header},{SHAPE}\n{','.join(map(str, cells))},{shape}\n"


def read(*paths: Path) -> Found:
    return read_vidur(paths, Request())


@pytest.mark.parametrize("tp", [1, 2, 8])
def test_a_layers_gemms_are_the_models(write: Write, tp: int) -> None:
    config = MODELS["llama-3-8b"]
    shape = f"{config.num_heads},{config.num_kv_heads},{config.hidden_size},{config.ffn_size},1,True,640,{tp}"
    found = read(write("mlp.csv.gz", layer_table(shape)))
    rows = {str(row.at["name"]): row for row in repeats_of(found.samples) if row.what == "gemm"}
    expected = {k.name: k for k in layer_kernels(config, BatchShape(1, 640), tp) if k.kind is Kind.GEMM}
    assert {name: kernel_of(row) for name, row in rows.items()} == expected
    assert rows["fc1"].values["us"] == pytest.approx(10.0)
    assert rows["fc1"].spread["us"] == pytest.approx(QUARTILES_PER_SIGMA)


def test_elementwise_bytes(write: Write) -> None:
    found = read(write("mlp.csv", layer_table("8,4,1024,3072,1,True,10,2", {"attn_rope": 0.0})))
    bytes_of = {str(s.at["name"]): s.at["bytes_moved"] for s in found.samples if s.what == "elementwise"}
    # 10 tokens of 2 bytes: a norm reads and writes 1024, an activation reads gate and up (3072) and writes 1536,
    # a residual sum reads two tensors and writes one. The rotation was shorter than the clock's step.
    assert bytes_of == {"norm": 20 * 2048, "activation": 20 * (3072 + 1536), "add": 20 * 3072}
    assert found.left_out == {"mlp: rotary that took less than the clock's step": 1}
    norms = [row for row in repeats_of(found.samples) if row.at["name"] == "norm"]
    assert len(norms) == 1 and norms[0].repetitions == 40  # both norms of the layer are one point


def test_a_plain_mlp_and_absent_operations(write: Write) -> None:
    found = read(write("mlp.csv", layer_table("8,8,1024,4096,1,False,10,1", operations=(*GEMMS, "add"))))
    shapes = {str(s.at["name"]): (s.at["cols"], s.at["inner"]) for s in found.samples if s.what == "gemm"}
    assert shapes == {"qkv_proj": (3072, 1024), "out_proj": (1024, 1024), "fc1": (4096, 1024), "fc2": (1024, 4096)}
    sums = [s.at["bytes_moved"] for s in found.samples if s.what == "elementwise"]
    assert sums == [10 * 6 * 1024 * 2]  # no second norm: attention, MLP and residual are summed in two steps


def test_heads_that_cannot_be_shared(write: Write) -> None:
    found = read(write("mlp.csv", layer_table("8,4,1024,4096,1,True,10,8")))
    assert not found.samples and found.left_out == {"mlp: n_kv_head 4 that 8 ranks cannot share": 1}


NETWORK = """time_stats.{op}.median,time_stats.{op}.std,rank,num_workers,size,collective,devices_per_node
0.020,0.002,0,2,4096,{op},2
0.030,0.0,0,2,4096,{op},2
0.500,0.1,0,4,4096,{op},2
"""


@pytest.mark.parametrize(
    ("name", "op", "size"),
    [("all_reduce", "all_reduce", 4096), ("send_recv", "send", 4096), ("all_gather", "all_gather", 8192)],
)
def test_collectives_within_a_node(write: Write, name: str, op: str, size: int) -> None:
    found = read(write("network.csv", NETWORK.format(op=name)))
    (row,) = repeats_of(found.samples)
    assert row.at == {"op": op, "bytes": size, "num_ranks": 2, "ctas": 0}
    assert row.values["us"] == pytest.approx(25.0) and row.spread["us"] == pytest.approx(5.0)
    assert found.left_out == {"collective: across nodes": 1}
    assert kernel_of(row).message_bytes == size and row.repetitions == 6


ATTENTION = (
    ",".join(f"time_stats.{op}.{s}" for op in ("attn_decode", "attn_prefill") for s in ("median", "std"))
    + ",n_embd,n_q_head,n_kv_head,num_tensor_parallel_workers,batch_size,prefill_chunk_size,kv_cache_size,is_prefill\n"
    + "0.015,0.0,,,8192,64,8,2,3,0,32,False\n,,0.150,0.01,8192,64,8,2,1,128,256,True\n"
)


def test_attention(write: Write) -> None:
    decode, prefill = repeats_of(read(write("attention.csv", ATTENTION)).samples)
    assert (decode.at["num_heads"], decode.at["num_kv_heads"], decode.at["head_dim"]) == (32, 4, 128)
    assert (decode.at["num_sequences"], decode.at["length"], decode.at["context_len"]) == (3, 1, 32)
    assert decode.values["us"] == pytest.approx(15.0) and prefill.values["us"] == pytest.approx(150.0)
    assert prefill.at["flops"] == 4.0 * (128 * 256 + 128 * 129 // 2) * 32 * 128


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            NETWORK.format(op="all_reduce").replace("0,2,4096,all_reduce", "0,2,4096,gossip", 1),
            ":2: collective is 'gossip'",
        ),
        (NETWORK.format(op="all_reduce").replace("4096", "4k", 1), ":2: size is '4k'; expected a whole number"),
        (NETWORK.format(op="all_reduce").replace("0.030", "", 1), r":3: time_stats\.all_reduce\.median is ''"),
        (NETWORK.format(op="x").replace(",size", ",length"), ":1: a Vidur table of collective needs the column size"),
        (ATTENTION.replace("False", "no"), ":2: is_prefill is 'no'; expected True or False"),
        (ATTENTION.replace("64,8,2,3", "63,8,2,3"), ":2: 63 query and 8 key-value heads"),
        ("SCHEDULE_MEAN,SCHEDULE_MEDIAN\n1,1\n", ":1: host times of another engine"),
        ("a,b\n1,2\n", ":1: not a table of Vidur"),
        ("", ":1: the file is empty"),
        (layer_table("8,4,1024,4096,1,Perhaps,10,2"), ":2: use_gated_mlp is 'Perhaps'"),
        (layer_table("8,4,1020,4096,1,True,10,2"), ":2: n_embd 1020 is not a multiple of n_head 8"),
        (
            layer_table("8,4,1024,4096,1,True,10,2", {"mlp_up_proj": 0.0}),
            r":2: time_stats\.mlp_up_proj\.median is '0\.0'",
        ),
    ],
)
def test_broken_tables(write: Write, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"t\.csv" + message) as caught:
        read(write("t.csv", text))
    assert "\n" not in str(caught.value)
