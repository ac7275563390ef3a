"""Our overlap of communication with computation against Holistic Trace Analysis (HTA), from the same timelines.

Makes timelines of a few policies and nodes as `weft simulate --timeline` does, asks HTA (in an environment of its own,
as it is large) for the overlap of every rank, and compares them: `make hta-check`.
Exit code 1 where they differ by more than 1 %.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

TOLERANCE = 0.01
RUNS = (
    ("a100-pcie-x4", "interleaved", "20", ""),
    ("a100-pcie-x4", "interleaved", "20", "--exact"),
    ("a100-pcie-x4", "liger-artifact", "20", ""),
    ("a100-pcie-x4", "hybrid", "20", ""),
    ("a100-pcie-x4", "tensor", "20", ""),
    ("h200-nvlink-x4", "interleaved", "200", ""),
)


def main() -> int:
    """Make the timelines, let HTA read them, print both numbers per rank."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hta", type=Path, default=Path(sys.executable), help="python of an environment with HTA")
    parser.add_argument("--out", type=Path, default=Path("weft-hta"), help="folder for the timelines")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.read is not None:
        print(json.dumps(hta_overlap(args.read)))
        return 0
    print(f"{'node':<18}{'policy':<16}{'':<9}{'rank':>5}{'ours %':>10}{'HTA %':>10}{'difference':>12}")
    worst = max(compare(number, args.hta, args.out) for number in range(len(RUNS)))
    print(f"largest difference {worst:.3%} of communication time; allowed {TOLERANCE:.0%}")
    return 0 if worst <= TOLERANCE else 1


def compare(number: int, hta: Path, out: Path) -> float:
    """The largest difference of one run, as a share of communication time."""
    from traces.chrome import overlap_of, write_chrome_trace

    folder = out / str(number)
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.json.gz"):
        old.unlink()
    node, policy, rate, exact = RUNS[number]
    timeline = _timeline(node, policy, float(rate), exact=bool(exact))
    write_chrome_trace(timeline, folder / "run.trace.json.gz")
    command = [str(hta), str(Path(__file__).resolve()), "--read", str(folder.resolve())]
    # Without this HTA rounds every time to whole microseconds.
    environment = {**os.environ, "HTA_DISABLE_NS_ROUNDING": "1"}
    answer = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    theirs = json.loads(answer.splitlines()[-1])
    worst = 0.0
    for rank in range(timeline.num_ranks):
        own = overlap_of(span for span in timeline.spans if span.rank == rank)
        ours = own.overlap_us / own.communication_us
        hta_share = theirs[str(rank)] / 100.0
        worst = max(worst, abs(ours - hta_share))
        print(
            f"{node:<18}{policy:<16}{exact:<9}{rank:>5}{ours:>10.2%}{hta_share:>10.2%}{ours - hta_share:>12.3%}",
            flush=True,
        )
    return worst


def _timeline(node: str, policy: str, rate: float, *, exact: bool):  # type: ignore[no-untyped-def]
    from sim.simulate import Fidelity
    from weft.runs import RunConfig, simulate

    config = RunConfig(node=node, policy=policy, request_rate=rate, num_prompts=24)
    return simulate(config, Fidelity(exact=exact, record=True)).timeline


def hta_overlap(folder: Path) -> dict[str, float]:
    """HTA's percentage of communication time that overlaps computation, per rank."""
    from hta.trace_analysis import TraceAnalysis

    frame = TraceAnalysis(trace_dir=str(folder)).get_comm_comp_overlap(visualize=False)
    return {
        str(int(rank)): float(share) for rank, share in zip(frame["rank"], frame["comp_comm_overlap_pctg"], strict=True)
    }


if __name__ == "__main__":
    sys.exit(main())
