"""From waiting requests to batches: fixed size as in the papers, with a maximum waiting time."""

from __future__ import annotations

from models.transformer import BatchShape
from policy.options import Options
from traces.request import Request


def take_batch(waiting: tuple[Request, ...], now_us: float, options: Options, *, last: bool) -> tuple[Request, ...]:
    """The requests that form the next batch at `now_us`, oldest first; empty if it is better to wait.

    A batch is full at `batch_size`; a part-filled one goes when its oldest request has waited `max_wait_us`, or when no
    more requests will come (`last`).
    """
    if len(waiting) >= options.batch_size:
        return waiting[: options.batch_size]
    if waiting and (last or now_us >= waiting[0].arrival_us + options.max_wait_us):
        return waiting
    return ()


def wake_up_us(waiting: tuple[Request, ...], options: Options) -> float:
    """When a part-filled batch will go even if nothing more arrives."""
    return waiting[0].arrival_us + options.max_wait_us if waiting else float("inf")


def shape_of(requests: tuple[Request, ...], options: Options) -> BatchShape:
    """All sequences padded to the longest prompt, and that to a multiple of `pad_to`: fewer shapes, aligned rows."""
    longest = max(request.num_prompt_tokens for request in requests)
    padded = -(-longest // options.pad_to) * options.pad_to
    return BatchShape(len(requests), padded)
