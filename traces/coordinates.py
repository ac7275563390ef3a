"""What each coordinate of a measured point must be."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

KERNELS = ("gemm", "attention", "elementwise")
# What ranks are measured to do together, alone and beside computation.
OPS, PAIRED_OPS = ("all_reduce", "all_gather", "send"), ("all_reduce", "all_gather")
HOST_NAMES = ("launch", "collective_launch", "event", "graph_launch", "graph_kernel", "synchronize",
              "synchronize_spinning", "broadcast", "plan", "issue", "issue_collective", "issue_graph",
              "issue_kernel", "event_gap")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Rule:
    """Whether a value may be, and what may be, in words."""

    words: str
    allows: Callable[[int | float | str], bool]


def _whole(least: int) -> Rule:
    return Rule(f"a whole number, {least} or more", lambda v: not isinstance(v, str) and v >= least and v == int(v))


def _one_of(values: Collection[int | str]) -> Rule:
    return Rule(f"one of {', '.join(map(str, values))}", lambda v: v in values)


_COUNT, _COUNT_OR_NONE, _RANKS = _whole(1), _whole(0), _whole(2)
_AMOUNT = Rule("a number above 0", lambda v: not isinstance(v, str) and v > 0)
_TEXT = Rule("a text", lambda v: isinstance(v, str) and bool(v.strip()))

# Wherever they stand; what is not here may be anything.
MUST_BE: dict[str, Rule] = {
    **dict.fromkeys(("name", "compute", "model", "schedule"), _TEXT),
    **dict.fromkeys(("rows", "cols", "inner", "cut", "num_sequences", "length", "num_heads", "num_kv_heads"), _COUNT),
    **dict.fromkeys(("head_dim", "bytes", "bytes_moved", "element_bytes", "num_ctas", "num_layers"), _COUNT),
    "num_ranks": _COUNT,
    **dict.fromkeys(("withheld_sms", "ctas", "context_len"), _COUNT_OR_NONE),
    "flops": _AMOUNT,
    "priority": _one_of((0, 1)),
    "kind": _one_of(KERNELS),
    "op": _one_of(OPS),
}
# Of some kinds of rows in particular.
OF_KIND: dict[str, dict[str, Rule]] = {
    "collective": {"num_ranks": _RANKS},
    "channels": {"num_ranks": _RANKS},
    "pair": {"num_ranks": _RANKS, "op": _one_of(PAIRED_OPS)},
    "host": {"name": _one_of(HOST_NAMES)},
}


def mistake_in(what: str, at: Mapping[str, int | float | str], num_sms: int) -> str:
    """The first coordinate that cannot be, in words; empty if there is none. `num_sms`: of the GPU, 0 if unknown."""
    rules = MUST_BE | OF_KIND.get(what, {})
    for name, value in at.items():
        if name in rules and not rules[name].allows(value):
            return f"{name} is {value!r}; it must be {rules[name].words}"
    withheld = at.get("withheld_sms", 0)
    if isinstance(withheld, int | float) and 0 < num_sms <= withheld:
        return f"withheld_sms is {withheld!r}; it must be below the {num_sms} SMs that the GPU has"
    return ""
