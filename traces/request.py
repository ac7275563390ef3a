"""A request: when it came and how long it is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Request:
    """One request of a trace. A discriminative request has no output tokens: one forward pass answers it."""

    request_id: int
    arrival_us: float
    num_prompt_tokens: int
    num_output_tokens: int = 0
