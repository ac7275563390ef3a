"""Operator tables of NVIDIA's aiconfigurator as CSV: GEMMs, attention, NCCL and the engines' own all-reduces.

All latencies are milliseconds of one device or rank. What the tables hold, as their collection scripts say:

- GEMM: C[m, n] = A[m, k] B[k, n], mean of a few replays of a CUDA graph, several weights in turn. Weights that fit the
  L2 together can be warm.
- attention: mean of a few graph replays; a call includes writing the new keys and values into the paged cache. The same
  buffers are replayed, so a cache that fits the L2 is warm, and everything small sits on a floor of about 10 us.
- nccl: nccl-tests, out of place, calls back to back **without** a graph, so small sizes have the host in them.
  `message_size` counts elements; in nccl-tests' sense (gathered output, whole buffer of an all-reduce).
- custom_allreduce: `message_size` counts elements. `*_eager` rows launch from Python and include a copy of the input:
  they sit on the host's floor and are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from calibration.importers.found import MS, Found, Request, Sample
from calibration.importers.points import attention_at, collective_at, gemm_at
from calibration.importers.table import Row, header_of, rows_of
from traces.measurement import Coordinates

KNOWN_OPS = ("all_reduce", "all_gather")
GRAPH_REPLAYS = 6
NCCL_CALLS = 100
# nccl-tests' small number of calls for messages above 16 MiB.
NCCL_CALLS_LARGE, NCCL_LARGE_BYTES = 60, 16 * 2**20
CUSTOM_CALLS = 100  # five in a graph, 20 replays
ELEMENT_BYTES = {"bfloat16": 2, "half": 2, "float16": 2}

Entry = tuple[str, Coordinates, int] | str
"""A point (kind, coordinates, repetitions), or the reason why a row is none."""


def read_aiconfigurator(paths: Sequence[Path], request: Request) -> Found:
    """The rows of several tables of one system. Of a table that holds several versions, `request.source` is taken.

    Raises ValueError for what is no such table, broken rows, several systems, a table of several versions of which none
    is chosen, and for NCCL beside another library's collectives.
    """
    found = Found()
    for path in paths:
        kind = _kind(path)
        needed, read, found.notes[kind] = TABLES[kind]
        rows = list(rows_of(path, (*COMMON, *needed), f"an aiconfigurator table of {kind}"))
        taken = _of_one_version(path, rows, kind, request.source)
        for row in taken:
            _take(found, kind, row, read(row))
        found.say(f"version.{kind}", _version(taken[0], kind), str(path))
        if len(taken) < len(rows):
            found.left_out[f"{kind}: of other versions than {request.source}"] += len(rows) - len(taken)
    if {"nccl", "custom_allreduce"} <= found.notes.keys():
        raise ValueError("nccl and custom_allreduce tables measure two libraries; import each into a folder of its own")
    return found


def _of_one_version(path: Path, rows: list[Row], kind: str, source: str) -> list[Row]:
    versions = sorted({_version(row, kind) for row in rows})
    if len(versions) == 1:
        return rows
    taken = [row for row in rows if source and source in (_version(row, kind), row.text("source"))]
    if len({_version(row, kind) for row in taken}) != 1:
        raise ValueError(
            f"{path}: the table holds {len(versions)} versions, which differ in their kernels "
            f"({', '.join(versions)}); choose one of them with --source"
        )
    return taken


def _version(row: Row, kind: str) -> str:
    """What was measured. Passes over one version of NCCL came from several folders: they are repeats."""
    return row.text("version") if kind == "nccl" and row.text("version") else row.text("source")


def _take(found: Found, kind: str, row: Row, entry: Entry) -> None:
    if isinstance(entry, str):
        found.left_out[f"{kind}: {entry}"] += 1
        return
    what, at, repetitions = entry
    found.say("gpu", row.text("device"), row.where)
    found.samples.append(Sample(what, at, {"us": MS * row.number_of("latency")}, repetitions))
    found.also("dtype", next(dtype for column in DTYPES if (dtype := row.text(column))))
    if what == "collective":
        found.about["nccl"] = row.text("version") if kind == "nccl" else f"none: {row.text('kernel_source')}"


def _kind(path: Path) -> str:
    """Which table a file is, by a column that only it has."""
    header = header_of(path)
    if "attn_dtype" in header:
        for row in rows_of(path, ("op_name",), "an aiconfigurator table of attention"):
            if row.text("op_name") in TABLES:
                return row.text("op_name")
            raise ValueError(
                f"{row.where}: op_name is {row.text('op_name')!r}; it must be context_attention or generation_attention"
            )
    for column, kind in (("gemm_dtype", "gemm"), ("nccl_dtype", "nccl"), ("allreduce_dtype", "custom_allreduce")):
        if column in header:
            return kind
    raise ValueError(f"{path}:1: not a table of aiconfigurator that can be imported ({', '.join(TABLES)}); "
                     f"it has the columns {', '.join(header[:12])}")  # fmt: skip


def _gemm(row: Row) -> Entry:
    if row.text("gemm_dtype") not in ELEMENT_BYTES:
        return f"element type {row.text('gemm_dtype')}"
    shape = (row.count("m"), row.count("n"), row.count("k"))
    return "gemm", gemm_at("gemm", *shape), GRAPH_REPLAYS


def _context(row: Row) -> Entry:
    return _attention(row, row.count("isl"), row.count("step", 0))


def _generation(row: Row) -> Entry:
    # One new token, which attends to itself beside the cached ones.
    return _attention(row, 1, row.count("step", 0))


def _attention(row: Row, length: int, context_len: int) -> Entry:
    for column in ("attn_dtype", "kv_cache_dtype"):
        if row.text(column) not in ELEMENT_BYTES:
            return f"{column} {row.text(column)}"
    if row.text("window_size") not in ("", "0"):
        return "sliding windows"
    if row.text("beam_width") not in ("", "1"):
        return "beams"
    heads = (row.count("num_heads"), row.count("num_key_value_heads"), row.count("head_dim"))
    return "attention", attention_at(row.count("batch_size"), length, context_len, heads), GRAPH_REPLAYS


def _nccl(row: Row) -> Entry:
    return _collective(row, "nccl_dtype")


def _custom(row: Row) -> Entry:
    if row.text("backend").endswith("_eager"):
        return "launched from Python, with a copy of the input in the time"
    entry = _collective(row, "allreduce_dtype")
    return entry if isinstance(entry, str) else (*entry[:2], CUSTOM_CALLS)


def _collective(row: Row, dtype_column: str) -> Entry:
    op, dtype = row.text("op_name"), row.text(dtype_column)
    if op not in KNOWN_OPS:
        return f"{op}, which no layer of ours uses"
    if dtype not in ELEMENT_BYTES:
        return f"element type {dtype}"
    size, ranks = ELEMENT_BYTES[dtype] * row.count("message_size"), row.count("num_gpus", 2)
    return "collective", collective_at(op, size, ranks), NCCL_CALLS_LARGE if size > NCCL_LARGE_BYTES else NCCL_CALLS


COMMON = ("source", "version", "device", "op_name", "kernel_source", "latency")
_HEADS = ("num_heads", "num_key_value_heads", "head_dim")
_ATTENTION = ("batch_size", "isl", "step", *_HEADS, "attn_dtype", "kv_cache_dtype")
DTYPES = ("gemm_dtype", "attn_dtype", "nccl_dtype", "allreduce_dtype")
_COLLECTIVE = ("num_gpus", "message_size")
_GRAPH = "mean of a few CUDA graph replays, the gap to the next kernel included"
_CACHE = f"{_GRAPH}, as is the write to the KV cache; floor of about 10 us"
_NO_GRAPH = "nccl-tests out of place, no graph: small sizes hold the host's cost"

TABLES: dict[str, tuple[tuple[str, ...], Callable[[Row], Entry], str]] = {
    "gemm": (("gemm_dtype", "m", "n", "k"), _gemm, f"{_GRAPH}; weights that fit the L2 can be warm"),
    "context_attention": (_ATTENTION, _context, _CACHE),
    "generation_attention": (_ATTENTION, _generation, _CACHE),
    "nccl": (("nccl_dtype", *_COLLECTIVE), _nccl, _NO_GRAPH),
    "custom_allreduce": (("allreduce_dtype", *_COLLECTIVE, "backend"), _custom, "five calls in a CUDA graph, mean"),
}
