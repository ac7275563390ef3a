"""`weft import`: other people's measurements as a folder of ours: public tables, profiler traces, nccl-tests output."""

from __future__ import annotations

import argparse
import re
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

from weft.flags import path_of
from weft.outputs import version_of_weft

if TYPE_CHECKING:
    from calibration.importers.folder import Imported

FORMATS = ("aiconfigurator", "vidur", "kineto", "nccl-tests")
# Those of GPUs; `weft measure` has the same two.
LINK_MODES = ("as-is", "host-staged")
SHOWN_REASONS = 12


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `weft import` to the command line."""
    help_text = "turn public tables and traces into a folder of measurements"
    parser = subparsers.add_parser("import", help=help_text, description=__doc__)
    parser.add_argument("format", choices=FORMATS, metavar="FORMAT", help=f"one of {', '.join(FORMATS)}")
    files_help = "files of one machine, plain or gzip; traces: one a rank"
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help=files_help)
    out_help = "the folder to write; must not be there"
    parser.add_argument("--out", type=path_of, required=True, metavar="DIR", help=out_help)
    parser.add_argument("--licence", default="", metavar="TEXT", help="licence of the files, kept with them")
    group = parser.add_argument_group("what the files do not say")
    group.add_argument("--gpu", default="", metavar="NAME", help="name of the GPU")
    group.add_argument("--num-gpus", type=int, default=0, metavar="N", help="GPUs of the node (default: largest group)")
    group.add_argument("--num-sms", type=int, default=0, metavar="N", help="SMs of the GPU (default: its data sheet)")
    mode_help = "as-is or host-staged (default: not stated)"
    group.add_argument("--link-mode", choices=LINK_MODES, default="", metavar="MODE", help=mode_help)
    group.add_argument("--date", default="", metavar="YYYY-MM-DD", help="when it was measured (default: not stated)")
    group = parser.add_argument_group("what to take")
    source_help = "aiconfigurator: the version to take of tables that hold several"
    group.add_argument("--source", default="", metavar="VERSION", help=source_help)
    op_help = "nccl-tests: the operation, where the text does not name it (all_reduce, all_gather, sendrecv)"
    group.add_argument("--op", default="", metavar="OP", help=op_help)
    priority_help = "kineto: whether communication ran on a stream of higher priority; pairs need it"
    group.add_argument("--priority", type=int, choices=(0, 1), help=priority_help)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Read the files, write the folder, and say what became of them."""
    from calibration.importers.folder import Stated, import_files, write_folder
    from calibration.importers.found import Request

    for flag, count in (("--num-gpus", args.num_gpus), ("--num-sms", args.num_sms)):
        if count < 0:
            raise ValueError(f"{flag} {count} is not possible; give 1 or more")
    if args.date:
        _check_date(args.date)
    stated = Stated(
        gpu=args.gpu, num_gpus=args.num_gpus, num_sms=args.num_sms, link_mode=args.link_mode, licence=args.licence,
        date=args.date, weft=version_of_weft(),
    )  # fmt: skip
    request = Request(source=args.source, op=args.op, priority=args.priority)
    imported = import_files(args.format, args.files, request, stated)
    write_folder(imported, args.out)
    print("\n".join(summary(imported, args.out)))
    return 0


def _check_date(text: str) -> None:
    """Raises ValueError for what is no day, or one that is still to come."""
    try:
        if not re.fullmatch(r"\d{4}-\d\d-\d\d", text):
            raise ValueError
        day = date.fromisoformat(text)
    except ValueError:
        raise ValueError(f"--date {text!r} is not a date such as 2026-01-31") from None
    if day > date.today():
        raise ValueError(f"--date {text} is still to come; give the day of the measurements")


def summary(imported: Imported, out: Path) -> list[str]:
    """What was written, what was not, and what nobody said."""
    counts: dict[str, int] = {}
    for row in imported.rows:
        counts[row.what] = counts.get(row.what, 0) + 1
    about = imported.conditions
    lines = [f"{out}: {len(imported.rows)} points of {about.gpu}, {about.num_gpus} GPUs"]
    lines += [f"  {count:>8,} {what}" for what, count in counts.items()]
    reasons = list(imported.left_out.items())
    if reasons:
        lines.append("left out:")
        lines += [f"  {count:>8,} {reason}" for reason, count in reasons[:SHOWN_REASONS]]
        if rest := reasons[SHOWN_REASONS:]:
            lines.append(f"  {sum(count for _, count in rest):>8,} for {len(rest)} other reasons")
    flags = {"gpu": "--gpu", "link_mode": "--link-mode", "date": "--date"}
    missing = [flag for name, flag in flags.items() if getattr(about, name) == "not stated"]
    if about.environment.get("licence") == "not stated":
        missing.append("--licence")
    return [*lines, f"not stated by the files: {', '.join(missing)}"] if missing else lines
