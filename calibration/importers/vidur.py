"""Profiles of the Vidur simulator as CSV: one layer's operations, attention, collectives.

Times are milliseconds in steps of 1 us with a floor of a few; of repeated calls a row has the median and the standard
deviation, which becomes an interquartile range as for a normal distribution. All are kernel times of a profiler: the
gap to the next kernel is **not** in them. What follows is what Vidur's own collection scripts do.

- mlp: one layer, called again and again with the same weights, so that small ones can be warm. The projections are
  GEMMs; norms, rotary embedding, activation and residual sum are elementwise, with the bytes that they read and write
  (a norm without the fused sum: twice its tensor). The embedding is left out: under tensor parallelism it is several
  kernels.
- collectives: sizes in bytes of one rank's buffer; eager calls back to back, the time of rank 0's kernel, which holds
  the wait for the other ranks: small messages show how far apart their hosts are. Groups that are larger than the GPUs
  they have in one node cross nodes, and are left out.
- attention: decode attends the cached tokens and the new one; prefill attends what is cached and, causally, its chunk.
  Operations are counted so. The older kernels of the published A100 profile took as long as for the whole square.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from calibration.importers.found import MS, Found, Request, Sample
from calibration.importers.points import attention_at, collective_at, elementwise_at, gemm_at
from calibration.importers.table import Row, header_of, rows_of
from traces.measurement import Coordinates

ELEMENT_BYTES = 2
QUARTILES_PER_SIGMA = 1.349
"""Interquartile range of a normal distribution, in standard deviations."""

OPS = {"all_reduce": "all_reduce", "all_gather": "all_gather", "send_recv": "send"}
STATISTICS = ("median", "std")
# As the scripts have it; how often attention was repeated is not known.
REPETITIONS = {"gemm": 20, "elementwise": 20, "collective": 3}

SHAPE = ("n_head", "n_kv_head", "n_embd", "n_expanded_embd", "use_gated_mlp", "num_tokens")
DEGREE = "num_tensor_parallel_workers"


def read_vidur(paths: Sequence[Path], request: Request) -> Found:
    """The rows of several tables of one machine. Vidur does not name the GPU in them.

    Raises ValueError for what is no such table and for broken rows.
    """
    found = Found(about={"dtype": "float16"})
    for path in paths:
        kind = _kind(path)
        needed, read, note = TABLES[kind]
        found.notes[kind] = note
        for row in rows_of(path, needed, f"a Vidur table of {kind}"):
            for entry in read(row):
                if isinstance(entry, str):
                    found.left_out[f"{kind}: {entry}"] += 1
                else:
                    found.samples.append(entry)
    return found


def _kind(path: Path) -> str:
    header = header_of(path)
    for column, kind in (("time_stats.attn_pre_proj.median", "mlp"), ("is_prefill", "attention")):
        if column in header:
            return kind
    if "collective" in header:
        return "collective"
    if "SCHEDULE_MEDIAN" in header:
        raise ValueError(
            f"{path}:1: host times of another engine's iterations say nothing of our host; see weft measure"
        )
    raise ValueError(f"{path}:1: not a table of Vidur that can be imported ({', '.join(TABLES)}); "
                     f"it has the columns {', '.join(header[:12])}")  # fmt: skip


def _sample(row: Row, operation: str, what: str, at: Coordinates) -> Sample:
    median, deviation = (f"time_stats.{operation}.{statistic}" for statistic in STATISTICS)
    us = MS * row.number_of(median)
    spread = MS * QUARTILES_PER_SIGMA * row.number_of(deviation, may_be_zero=True)
    return Sample(what, at, {"us": us}, REPETITIONS.get(what, 1), {"us": spread})


# -- a layer ----------------------------------------------------------------------------------------------------------


def _layer(row: Row) -> Iterator[Sample | str]:
    """The operations of one layer, sharded as Megatron does."""
    heads, kv_heads = row.count("n_head"), row.count("n_kv_head")
    hidden, ffn, rows, tp = (row.count(name) for name in ("n_embd", "n_expanded_embd", "num_tokens", DEGREE))
    for name, value in (("n_head", heads), ("n_kv_head", kv_heads), ("n_expanded_embd", ffn)):
        if value % tp:
            yield f"{name} {value} that {tp} ranks cannot share"
            return
    if hidden % heads:
        raise ValueError(f"{row.where}: n_embd {hidden} is not a multiple of n_head {heads}")
    width, kv_width, ffn = hidden // tp, kv_heads * (hidden // heads) // tp, ffn // tp
    up = 2 * ffn if row.flag("use_gated_mlp") else ffn
    for operation, name, cols, inner in (
        ("attn_pre_proj", "qkv_proj", width + 2 * kv_width, hidden),
        ("attn_post_proj", "out_proj", hidden, width),
        ("mlp_up_proj", "fc1", up, hidden),
        ("mlp_down_proj", "fc2", hidden, ffn),
    ):
        yield _sample(row, operation, "gemm", gemm_at(name, rows, cols, inner))
    # Without a norm between attention and MLP, their results and the residual are summed at the end: two sums.
    sums = 1 if "time_stats.post_attention_layernorm.median" in row.columns else 2
    for operation, name, elements in (
        ("input_layernorm", "norm", 2 * hidden),
        ("post_attention_layernorm", "norm", 2 * hidden),
        ("attn_rope", "rotary", 2 * (width + kv_width)),
        ("mlp_act", "activation", up + ffn),
        ("add", "add", 3 * hidden * sums),
    ):
        yield from _elementwise(row, operation, name, rows, elements * ELEMENT_BYTES)


def _elementwise(row: Row, operation: str, name: str, rows: int, bytes_per_row: int) -> Iterator[Sample | str]:
    """An operation that a model may lack, or that was too short for the profiler's clock."""
    column = f"time_stats.{operation}.median"
    if column not in row.columns:
        return
    if row.number_of(column, may_be_zero=True) == 0.0:
        yield f"{name} that took less than the clock's step"
        return
    yield _sample(row, operation, "elementwise", elementwise_at(name, rows, rows * bytes_per_row))


# -- attention and collectives ----------------------------------------------------------------------------------------


def _attention(row: Row) -> Iterator[Sample | str]:
    tp = row.count(DEGREE)
    heads, kv_heads, hidden = row.count("n_q_head"), row.count("n_kv_head"), row.count("n_embd")
    if heads % tp or kv_heads % tp or hidden % heads:
        raise ValueError(f"{row.where}: {heads} query and {kv_heads} key-value heads of {hidden} over {tp} ranks")
    shape = (heads // tp, kv_heads // tp, hidden // heads)
    prefill = row.flag("is_prefill")
    length = row.count("prefill_chunk_size") if prefill else 1
    at = attention_at(row.count("batch_size"), length, row.count("kv_cache_size", 0), shape)
    yield _sample(row, "attn_prefill" if prefill else "attn_decode", "attention", at)


def _collective(row: Row) -> Iterator[Sample | str]:
    name = row.text("collective")
    if name not in OPS:
        raise ValueError(f"{row.where}: collective is {name!r}; it must be one of {', '.join(OPS)}")
    ranks = row.count("num_workers", 2)
    if ranks > row.count("devices_per_node"):
        yield "across nodes"
        return
    # Our sizes are those of nccl-tests: of an all-gather, the gathered output.
    size = row.count("size") * (ranks if name == "all_gather" else 1)
    yield _sample(row, name, "collective", collective_at(OPS[name], size, ranks))


KERNEL = "kernel times of a profiler in steps of 1 us, without the gap to the next kernel"
TABLES: dict[str, tuple[tuple[str, ...], Callable[[Row], Iterator[Sample | str]], str]] = {
    "mlp": (
        (*SHAPE, DEGREE, *(f"time_stats.{op}.{statistic}" for op in
                           ("attn_pre_proj", "attn_post_proj", "mlp_up_proj", "mlp_down_proj")
                           for statistic in STATISTICS)),
        _layer, KERNEL,
    ),
    "attention": (
        ("n_embd", "n_q_head", "n_kv_head", DEGREE, "batch_size", "prefill_chunk_size", "kv_cache_size", "is_prefill",
         *(f"time_stats.{op}.{statistic}" for op in ("attn_prefill", "attn_decode") for statistic in STATISTICS)),
        _attention, KERNEL,
    ),
    "collective": (
        ("collective", "num_workers", "devices_per_node", "size"),
        _collective, "time of rank 0's kernel, back to back: small messages hold the wait for the other ranks' hosts",
    ),
}  # fmt: skip
