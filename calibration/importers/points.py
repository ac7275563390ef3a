"""Coordinates of points that importers share, counted as the model descriptions count them."""

from __future__ import annotations

from models.kernel import ATTENTION_ROWS_PER_CTA, elementwise, gemm
from traces.measurement import Coordinates


def gemm_at(name: str, rows: int, cols: int, inner: int, element_bytes: int = 2) -> Coordinates:
    """A GEMM on the whole device."""
    kernel = gemm(name, rows, cols, inner, element_bytes)
    return {
        "name": name, "rows": kernel.rows, "cols": kernel.cols, "inner": kernel.inner, "withheld_sms": 0,
        "element_bytes": element_bytes,
    }  # fmt: skip


def attention_at(
    num_sequences: int, length: int, context_len: int, heads: tuple[int, int, int], element_bytes: int = 2
) -> Coordinates:
    """Causal attention of `length` new tokens a sequence behind `context_len` cached ones.

    `heads`: query heads, key-value heads, head dimension, all on this GPU. Operations, bytes and CTAs are those of
    `models.transformer`: query i sees context + i + 1 keys, and every operand is touched once.
    """
    num_heads, num_kv_heads, head_dim = heads
    total = context_len + length
    pairs = num_sequences * (length * context_len + length * (length + 1) // 2)
    moved = num_sequences * head_dim * element_bytes * (2 * length * num_heads + 2 * total * num_kv_heads)
    return {
        "name": "attention", "num_sequences": num_sequences, "length": length, "context_len": context_len,
        "rows": num_sequences * length, "num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim,
        "flops": 4.0 * pairs * num_heads * head_dim, "bytes_moved": float(moved),
        "num_ctas": num_sequences * num_heads * -(-length // ATTENTION_ROWS_PER_CTA), "withheld_sms": 0,
    }  # fmt: skip


def elementwise_at(name: str, rows: int, bytes_moved: int) -> Coordinates:
    """A norm, activation, rotation or sum over `rows` tokens."""
    kernel = elementwise(name, bytes_moved)
    return {
        "name": name, "rows": rows, "bytes_moved": kernel.bytes_moved, "num_ctas": kernel.num_ctas, "withheld_sms": 0,
    }  # fmt: skip


def collective_at(op: str, num_bytes: int, num_ranks: int) -> Coordinates:
    """A collective or a send with as many CTAs as the library chooses. Sizes are those of nccl-tests: the whole
    buffer of an all-reduce, the gathered output of an all-gather."""
    return {"op": op, "bytes": num_bytes, "num_ranks": num_ranks, "ctas": 0}
