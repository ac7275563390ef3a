"""`weft replay`: what a real run admitted, in the simulator: the same rounds, and the times of a simulated node."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from weft.flags import path_of

if TYPE_CHECKING:
    from sim.replay import Replayed
    from sim.spec import NodeSpec
    from weft.executed import Saved


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `weft replay` to the command line."""
    parser = subparsers.add_parser("replay", help="a saved run of weft run in the simulator", description=__doc__)
    parser.add_argument("result", type=path_of, metavar="FILE", help="result of weft run --save-result --save-detailed")
    parser.add_argument("--node", required=True, metavar="NODE", help="node name (see: weft nodes), or a TOML file")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Replay and compare. A difference is a result, not a failure."""
    from sim.spec import load_node
    from weft.executed import read_saved, replay_saved

    saved, node = read_saved(args.result), load_node(args.node)
    print(comparison(saved, node, replay_saved(saved, node, args.result)))
    return 0


def comparison(saved: Saved, node: NodeSpec, replayed: Replayed) -> str:
    """Whether the rounds are the run's, and its times beside the simulated ones."""
    from executor.order import RoundsHash
    from traces.metrics import metrics
    from weft.report import WIDTH, row, title

    rounds = RoundsHash()
    for round_ in replayed.rounds:
        rounds.add(round_)
    equal = rounds.digest() == saved.rounds_hash
    simulated = metrics(replayed.timeline)
    lines = [
        title(" Replay in the Simulator ", "="),
        row("Node (simulated):", node.name),
        row("Rounds:", f"{len(replayed.rounds)}, {'as in the run' if equal else 'not those of the run'}"),
    ]
    for name, unit, measured, key in (
        ("Makespan", "s", saved.duration, "duration"),
        ("Mean E2EL", "ms", saved.mean_e2el_ms, "mean_e2el_ms"),
    ):
        lines.append(row(f"{name}, measured / simulated ({unit}):", f"{measured:.2f} / {simulated[key]:.2f}"))
    lines.append("=" * WIDTH)
    if not equal:
        lines.append("caution: this weft plans other rounds than the run had, so its times are those of other work")
    return "\n".join(lines)
