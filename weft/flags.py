"""Flags that several commands share, named as in `vllm bench serve` where it has them, and what they mean to a run."""

from __future__ import annotations

import argparse
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from policy.options import OPTION_NAMES, Options
from traces.reader import DATASET_NAMES

if TYPE_CHECKING:
    from weft.runs import RunConfig

DEFAULTS = Options()
TYPES = {field.name: type(getattr(DEFAULTS, field.name)) for field in fields(Options)}
# Ten million requests take gigabytes; more is a slip of the pen.
MOST_PROMPTS = 10_000_000
BOOLEANS = {"on": True, "off": False, "true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}

# Flags for the options that people reach for most: flag, option, how many of the option's unit one is worth, help.
NAMED_OPTIONS: tuple[tuple[str, str, float, str], ...] = (
    ("--batch-size", "batch_size", 1, "requests in a batch"),
    ("--max-wait-ms", "max_wait_us", 1e3, "a part-filled batch goes when its oldest request has waited so long"),
    ("--depth", "depth", 1, "batches in flight at once"),
    ("--sync", "sync", 1, "who orders the lanes: hybrid, cpu-gpu or inter-stream"),
    ("--anticipation", "anticipation", 1, "contention priced by pairs, by one scalar, or off"),
    ("--decomposition", "decomposition", 1, "how kernels may be cut at run time: auto, rows, cols or off"),
    ("--max-parts", "max_parts", 1, "most pieces of one kernel"),
    ("--partition", "partition", 1, "SMs withheld from compute; -1: chosen by regime"),
    ("--comm-ctas", "comm_ctas", 1, "CTAs of collectives; -1: chosen by regime, 0: the library's default"),
    ("--slo-ms", "slo_us", 1e3, "end-to-end deadline, known to the policy; goodput is reported against it"),
)


def add_workload_flags(parser: argparse.ArgumentParser, *, several_rates: bool = False) -> None:
    """Requests: how many, when, how long; or a recorded trace."""
    group = parser.add_argument_group("requests")
    num_help = "how many; of a trace file the first, 0: all (default: 1000)"
    group.add_argument("--num-prompts", type=int, default=1000, metavar="N", help=num_help)
    if several_rates:
        rate_help = "requests per second (default: chosen by what each policy can sustain)"
        group.add_argument("--request-rate", type=float, nargs="+", metavar="RATE", help=rate_help)
    else:
        rate_help = "requests per second; inf: all at once (default: inf, or a trace file's own rate)"
        group.add_argument("--request-rate", type=float, metavar="RATE", help=rate_help)
    burst_help = "gamma shape of the gaps: 1 is Poisson, below 1 burstier, inf: all gaps equal (default: 1)"
    group.add_argument("--burstiness", type=float, metavar="SHAPE", help=burst_help)
    length_help = "prompt tokens: N, LOW:HIGH (uniform), or a file of lengths (default: 16:128)"
    group.add_argument("--input-len", metavar="LEN", help=length_help)
    longest_help = "shorten longer prompts to N tokens, and say how many were (default: none is)"
    group.add_argument("--max-input-len", type=int, default=0, metavar="N", help=longest_help)
    names = ("random", *DATASET_NAMES)
    group.add_argument("--dataset-name", choices=names, help="where requests come from (default: random)")
    group.add_argument("--dataset-path", metavar="FILE", help="trace file, plain or gzip")
    start_help = "skip the first S seconds of the trace file (default: 0)"
    group.add_argument("--start", type=float, metavar="S", help=start_help)
    duration_help = "keep S seconds of the trace file from there (default: all)"
    group.add_argument("--duration", type=float, metavar="S", help=duration_help)
    scale_help = "multiply the CV of the trace file's gaps by X, at the same mean rate (default: 1)"
    group.add_argument("--burstiness-scale", type=float, metavar="X", help=scale_help)
    group.add_argument("--seed", type=int, default=0, help="seed of all that is drawn (default: 0)")


def add_layout_flags(parser: argparse.ArgumentParser) -> None:
    """Degrees of parallelism, where the policy's own are not wanted."""
    group = parser.add_argument_group("layout")
    tp_help = "GPUs that share every layer (default: the policy's)"
    group.add_argument("--tensor-parallel-size", "-tp", type=int, default=0, metavar="N", help=tp_help)
    pp_help = "pipeline stages (default: the policy's)"
    group.add_argument("--pipeline-parallel-size", "-pp", type=int, default=0, metavar="N", help=pp_help)


def add_policy_flags(parser: argparse.ArgumentParser) -> None:
    """The policies' switches."""
    group = parser.add_argument_group("policy options")
    for flag, option, worth, text in NAMED_OPTIONS:
        default = getattr(DEFAULTS, option)
        shown = f"{default / worth:g}" if isinstance(default, float) else default
        text = text if default == math.inf else f"{text} (default: {shown})"
        group.add_argument(flag, dest=f"option_{option}", metavar="X", help=text)
    others = ", ".join(f"{name}={_shown(getattr(DEFAULTS, name))}" for name in OPTION_NAMES)
    text = f"set any switch of the policies; may be repeated. Names and defaults: {others}"
    group.add_argument("--policy-option", action="append", default=[], metavar="NAME=VALUE", help=text)


def config_of(args: argparse.Namespace, **fields: Any) -> RunConfig:
    """The run that the flags describe; `fields` come from elsewhere, or stand in for flags that a command lacks."""
    from weft.runs import RunConfig

    name = _dataset_name(args)
    if args.num_prompts > MOST_PROMPTS:
        raise ValueError(f"--num-prompts {args.num_prompts} is more than fits into memory; give at most {MOST_PROMPTS}")
    if "request_rate" not in fields:
        fields["request_rate"] = _request_rate(args.request_rate, name)
    for flag, field in (("-tp", "tensor_parallel_size"), ("-pp", "pipeline_parallel_size")):
        degree = getattr(args, field, 0)
        if degree < 0:
            raise ValueError(f"{flag} {degree} is not possible; give 1 or more, or 0 for the policy's own layout")
        fields[flag[1:]] = degree
    return RunConfig(
        dataset_name=name,
        dataset_path=args.dataset_path or "",
        num_prompts=args.num_prompts,
        burstiness=1.0 if args.burstiness is None else args.burstiness,
        input_len="16:128" if args.input_len is None else args.input_len,
        max_input_len=args.max_input_len,
        start_s=0.0 if args.start is None else args.start,
        duration_s=math.inf if args.duration is None else args.duration,
        burstiness_scale=1.0 if args.burstiness_scale is None else args.burstiness_scale,
        seed=args.seed,
        options=options_of(args),
        **fields,
    )


def _dataset_name(args: argparse.Namespace) -> Any:
    """Where requests come from; flags that would be ignored are mistakes."""
    if args.dataset_path == "":
        raise ValueError("--dataset-path is empty; give a trace file, or leave it out for random requests")
    name = args.dataset_name or ("auto" if args.dataset_path else "random")
    if name == "random" and args.dataset_path:
        raise ValueError(f"--dataset-path {args.dataset_path} is given, but --dataset-name random reads no file")
    for flag, value in (("--burstiness", args.burstiness), ("--input-len", args.input_len)):
        if name != "random" and value is not None:
            source = args.dataset_path or name
            raise ValueError(f"{flag} shapes random requests, but {source} is a trace that has its own; leave it out")
    for flag, value in (
        ("--start", args.start),
        ("--duration", args.duration),
        ("--burstiness-scale", args.burstiness_scale),
    ):
        if name == "random" and value is not None:
            raise ValueError(f"{flag} cuts or bends a trace file, but requests are random; give --dataset-path")
    return name


def _request_rate(rate: float | None, dataset_name: str) -> float:
    if rate is None:
        return math.inf if dataset_name == "random" else 0.0
    if rate == 0.0:
        raise ValueError("--request-rate 0 asks for no requests; give requests per second above 0, or inf")
    return rate


def options_of(args: argparse.Namespace) -> Options:
    """The policies' switches that the flags set."""
    given: dict[str, Any] = {}
    for flag, option, worth, _ in NAMED_OPTIONS:
        text = getattr(args, f"option_{option}")
        if text is not None:
            given[option] = _named(flag, option, worth, text)
    for item in args.policy_option:
        name, equals, text = item.partition("=")
        if not equals or name not in OPTION_NAMES:
            raise ValueError(f"--policy-option {item!r} is not NAME=VALUE with a NAME of: {', '.join(OPTION_NAMES)}")
        if name in given:
            raise ValueError(f"policy option {name} is given twice")
        given[name] = _parse("--policy-option", name, text, name)
    if given.get("slo_us") == 0.0:
        raise ValueError("policy option slo_us is 0; a deadline is above 0 microseconds, or inf")
    return replace(DEFAULTS, **given)


def path_of(text: str) -> Path:
    """A path that a user gives; "" would be the present folder, which nobody means by it."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty; give a name")
    return Path(text)


def _named(flag: str, option: str, worth: float, text: str) -> Any:
    """A value of the option from a flag of its own; what is wrong with it is said of the flag, as it was written."""
    value: Any = _parse(flag, option, text, flag.removeprefix("--").replace("-", "_"))
    if isinstance(value, float):
        value *= worth
    if option == "slo_us" and not value > 0.0:
        raise ValueError(f"{flag} {text} is not possible; give milliseconds above 0")
    try:
        replace(DEFAULTS, **{option: value})
    except ValueError as error:
        raise ValueError(f"{flag} {text}: {error}") from None
    return value


def _parse(flag: str, option: str, text: str, name: str) -> bool | int | float | str:
    """A value of the option's type; `name` is what the user calls it."""
    kind = TYPES[option]
    try:
        return BOOLEANS[text.lower()] if kind is bool else kind(text)
    except (ValueError, KeyError):
        wanted = {bool: "on or off", int: "a whole number", float: "a number"}[kind]
        raise ValueError(f"{flag}: {name} is {text!r}; it must be {wanted}") from None


def _shown(value: object) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)
