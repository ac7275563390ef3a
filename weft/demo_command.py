"""`weft demo`: a first feasible region: GLM-130B on four A100 cards, in about a minute and without a GPU."""

from __future__ import annotations

import argparse
from pathlib import Path

from weft.flags import path_of

NUM_PROMPTS = 300


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `weft demo` to the command line."""
    parser = subparsers.add_parser("demo", help="a first feasible region, in about a minute", description=__doc__)
    parser.add_argument("--out", type=path_of, default=Path("weft-demo"), metavar="DIR", help="default: weft-demo")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Explore the default: four policies from light load to saturation."""
    from weft.backends import LOCAL
    from weft.explore import Study
    from weft.explore_command import Output, check_folder, explore_and_report
    from weft.runs import RunConfig

    check_folder(args.out)
    study = Study(RunConfig(num_prompts=NUM_PROMPTS))
    names = ", ".join(study.policies)
    print(f"exploring {study.models[0]} on {study.nodes[0]}: {names}, from light load to saturation", flush=True)
    return explore_and_report(study, LOCAL, Output(args.out))
