"""Everything that the executor claims, checked and measured on GPUs: correctness, speed, ablation, host time.

`python benchmarks/gpu_suite.py --out results.jsonl` runs all parts in both link modes (as the node is, and host-staged
by NCCL_P2P_DISABLE=1), each part in processes of its own with a time limit, and writes a JSON line per measurement as
it comes. `--dry-run` does the same with two CPU processes and tiny models, to see that every part works; its times mean
nothing. Needs torch, numpy and msgspec, nothing else of the simulator's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# Part, seconds it may take, whether it depends on the link mode. In order of worth: a budget that ends cuts the last.
PARTS: tuple[tuple[str, int, bool], ...] = (
    ("probe", 90, True),
    ("correct", 240, False),
    ("soak", 200, False),
    ("serving", 120, True),
    ("deep", 200, True),
    ("forward", 300, True),
    ("ablation", 200, True),
    ("plane", 240, True),
)
MODES = {"as-is": {}, "host-staged": {"NCCL_P2P_DISABLE": "1"}}


def main() -> int:
    """Run the parts that were asked for; the exit code is the number of parts that failed."""
    args = _arguments()
    if args.part:
        from benchmarks.gpu_parts import run_part

        return run_part(args.part, args.mode, args.out, args.ranks, dry_run=args.dry_run)
    deadline = time.monotonic() + args.budget_s
    failed = 0
    for name, limit_s, has_modes in PARTS:
        if name not in args.parts:
            continue
        for mode in args.modes if has_modes else args.modes[:1]:
            left_s = deadline - time.monotonic()
            if left_s < 20.0:
                print(f"[suite] no time left for {name} {mode}", flush=True)
                continue
            failed += not _run(args, name, mode, min(limit_s * args.stretch, left_s))
    return failed


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    names = [name for name, _, _ in PARTS]
    parser.add_argument("--parts", nargs="+", choices=names, default=names)
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")) / "results.jsonl")
    parser.add_argument("--budget-s", type=float, default=1500.0, help="parts that do not fit any more are left out")
    parser.add_argument("--stretch", type=float, default=1.0, help="factor on every part's time limit")
    parser.add_argument("--dry-run", action="store_true", help="gloo, two processes, tiny models")
    parser.add_argument("--part", choices=names, help=argparse.SUPPRESS)
    parser.add_argument("--mode", choices=list(MODES), default="as-is", help=argparse.SUPPRESS)
    return parser.parse_args()


def _run(args: argparse.Namespace, part: str, mode: str, limit_s: float) -> bool:
    """One part in a process of its own; whatever happens to it, the others go on."""
    print(f"[suite] {part} {mode}: at most {limit_s:.0f} s", flush=True)
    started = time.monotonic()
    command = [sys.executable, str(Path(__file__).resolve()), "--part", part, "--mode", mode, "--out", str(args.out),
               "--ranks", str(args.ranks)]  # fmt: skip
    environment = {**os.environ, **MODES[mode], "PYTHONUNBUFFERED": "1"}
    try:
        code = subprocess.run(
            [*command, *(["--dry-run"] if args.dry_run else [])], env=environment, timeout=limit_s
        ).returncode
        end = "ok" if code == 0 else f"failed with exit code {code}"
    except subprocess.TimeoutExpired:  # its ranks end by themselves when it is gone
        end = f"was ended after {limit_s:.0f} s"
    seconds = time.monotonic() - started
    print(f"[suite] {part} {mode}: {end} ({seconds:.0f} s)", flush=True)
    with args.out.open("a") as file:
        file.write(json.dumps({"part": part, "mode": mode, "end": end, "seconds": round(seconds, 1)}) + "\n")
    return end == "ok"


if __name__ == "__main__":
    sys.exit(main())
