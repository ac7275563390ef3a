"""`weft simulate`: one run of one policy on one node, without a GPU."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from weft.flags import add_layout_flags, add_policy_flags, add_workload_flags, config_of, path_of
from weft.outputs import check_outputs, dated, given_name, parse_metadata, rate_name, save, short_name

if TYPE_CHECKING:
    from traces.timeline import Timeline
    from weft.runs import Run, RunConfig

POLICY_HELP = "tensor, pipeline, hybrid, interleaved or liger-artifact"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `weft simulate` to the command line."""
    parser = subparsers.add_parser("simulate", help="one run of one policy on one node", description=__doc__)
    parser.add_argument(
        "--model", default="glm-130b", help="model id, or a JSON file such as a Hugging Face config.json"
    )
    parser.add_argument("--node", default="a100-pcie-x4", help="node name (see: weft nodes), or a TOML file")
    parser.add_argument("--policy", default="interleaved", help=f"{POLICY_HELP} (default: interleaved)")
    add_workload_flags(parser)
    add_layout_flags(parser)
    add_policy_flags(parser)
    add_result_flags(parser)
    group = parser.add_argument_group("simulation")
    group.add_argument("--exact", action="store_true", help="simulate every rank and every layer; slower, same result")
    timeline_help = "write a Chrome trace, one file per rank: NAME.trace.json.gz (opens in Perfetto)"
    group.add_argument("--timeline", type=Path, metavar="FILE", help=timeline_help)
    parser.set_defaults(run=run)


def add_result_flags(parser: argparse.ArgumentParser) -> None:
    """What is reported and saved, as `vllm bench serve` has it."""
    group = parser.add_argument_group("results")
    group.add_argument("--save-result", action="store_true", help="write the result as JSON; replaces an older file")
    group.add_argument("--save-detailed", action="store_true", help="also save every request's times")
    group.add_argument("--append-result", action="store_true", help="add a line to the file instead of replacing it")
    group.add_argument("--result-dir", type=path_of, metavar="DIR", help="folder for the result; made if missing")
    group.add_argument(
        "--result-filename", metavar="NAME", help="default: made from rate, model, node, policy and hash"
    )
    group.add_argument("--metadata", nargs="*", default=[], metavar="KEY=VALUE", help="kept in the result file")
    group.add_argument("--label", help="kept in the result file")
    percentile_help = "further percentiles of the latency, separated by commas (50, 90, 95 and 99 are always there)"
    group.add_argument("--metric-percentiles", default="", metavar="P,P", help=percentile_help)
    group.add_argument("--disable-tqdm", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Simulate, print the block of numbers, and save what was asked for."""
    config = config_of(args, model=args.model, node=args.node, policy=args.policy)
    percentiles = parse_percentiles(args.metric_percentiles)
    extra = parse_metadata(args.metadata, args.label)
    config.check()
    result_file = _result_file(args, config)
    check_outputs(result_file, args.timeline, may_make_folder=args.result_dir is not None)

    from weft.report import console_block, encode

    run_ = _simulate(args, config)
    result = run_.result
    result |= further_percentiles(run_.timeline, percentiles)
    print(console_block(result))
    saved: list[Path] = []
    if args.timeline is not None:
        from traces.chrome import write_chrome_trace

        saved += write_chrome_trace(run_.timeline, args.timeline)
    if result_file is not None:
        details = detailed(run_.timeline) if args.save_detailed else {}
        result["sim_wall_s"] = result.pop("sim_wall_s")  # what differs between equal runs comes last
        save(result_file, encode(dated(extra | details | result)), append=args.append_result)
        saved.append(result_file)
    for path in saved:
        print(f"wrote {path}")
    return 0


def _simulate(args: argparse.Namespace, config: RunConfig) -> Run:
    from sim.simulate import Fidelity
    from weft.progress import bar
    from weft.runs import make_requests, simulate

    fidelity = Fidelity(exact=args.exact, record=args.timeline is not None)
    with bar(len(make_requests(config)), "requests", disable=args.disable_tqdm) as progress:
        return simulate(config, fidelity, progress.update)


def parse_percentiles(text: str) -> list[float]:
    """Percentiles from `25,99.9`."""
    try:
        values = [float(word) for word in text.split(",") if word.strip()]
    except ValueError:
        values = [-1.0]
    if not all(0.0 <= value <= 100.0 for value in values):
        raise ValueError(f"--metric-percentiles {text!r} is not a list of numbers from 0 to 100 such as 25,99.9")
    return values


def further_percentiles(timeline: Timeline, percentiles: list[float]) -> dict[str, float]:
    """End-to-end latency percentiles in ms under the names of the result file, p99.9_e2el_ms."""
    if not percentiles:
        return {}
    import numpy as np

    latencies_ms = np.array([completion.latency_us for completion in timeline.completions]) / 1e3
    values = np.percentile(latencies_ms, percentiles).tolist()
    return {f"p{p:g}_e2el_ms": value for p, value in zip(percentiles, values, strict=True)}


def detailed(timeline: Timeline) -> dict[str, list[float]]:
    """Every request in the order it came: lengths in tokens, times in seconds, and the batch that it rode in. A forward
    pass generates no tokens, whatever the request's trace says."""
    done = sorted(timeline.completions, key=lambda completion: completion.request.request_id)
    return {
        "input_lens": [completion.request.num_prompt_tokens for completion in done],
        "output_lens": [0 for _ in done],
        "start_times": [completion.request.arrival_us / 1e6 for completion in done],
        "latencies": [completion.latency_us / 1e6 for completion in done],
        # Admission is on the simulator's grid of time, which may lie a nanosecond before the arrival.
        "queue_times": [max(0.0, item.admitted_us - item.request.arrival_us) / 1e6 for item in done],
        "batch_ids": [completion.batch_id for completion in done],
    }


def _result_file(args: argparse.Namespace, config: RunConfig) -> Path | None:
    """Where the result goes; saving is implied by naming the file, as there is nothing else the name could be for."""
    name = given_name(args.result_filename)
    if not (args.save_result or args.append_result or args.save_detailed or name):
        return None
    if not name:
        from weft.runs import config_hash

        parts = (rate_name(config.request_rate), short_name(config.model), short_name(config.node), config.policy)
        name = "-".join(("simulated", *parts, config_hash(config))) + ".json"
    return Path(args.result_dir or "") / name
