"""The entry of one rank: started by `executor.launch`, or by hand with `torchrun -m executor --settings FILE`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from executor.status import Status, watch_parent

# A lost connection is reported by us, in one line; torch would add a page of its own stack.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

FAILED = 1
MISTAKE = 2


def main(work: Any = None) -> int:
    """Run this rank to its end and return its exit code. `work(session)` stands in for the runs of the settings."""
    parser = argparse.ArgumentParser(prog="executor", description=__doc__)
    parser.add_argument(
        "--settings", type=Path, required=True, help="JSON file, as `weft run --write-settings` makes it"
    )
    parser.add_argument("--rank", type=int, default=int(os.environ.get("RANK", "0")))
    parser.add_argument("--store-port", type=int, default=0, help="port of the rendezvous (set by the launcher)")
    parser.add_argument("--store-fd", type=int, default=-1, help="its listening socket, on rank 0")
    parser.add_argument("--status-fd", type=int, default=-1, help="pipe to the launcher")
    args = parser.parse_args()
    status = Status(args.rank, args.status_fd)
    if args.status_fd >= 0:
        watch_parent()
    return run_rank(args, status, work)


def run_rank(args: argparse.Namespace, status: Status, work: Any) -> int:
    """Everything that may fail, and what is said about it."""
    try:
        from executor.rank import serve

        status.enter("load")
        if work is None:
            serve(args, status)
        else:
            serve(args, status, work)
        return 0
    except (ValueError, OSError) as error:
        status.fail(_one_line(error), peer=isinstance(error, ConnectionError))
        return MISTAKE
    except Exception as error:  # whatever torch raises; the user gets its words, not its stack
        if os.environ.get("WEFT_TRACEBACK"):
            import traceback

            traceback.print_exc()
        status.fail(_reason(error), peer=_is_peer(error))
        return FAILED


def _reason(error: Exception) -> str:
    text = _one_line(error)
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return f"out of memory: {text or 'no more can be had'}; use more ranks, fewer layers, or smaller batches"
    return f"{type(error).__name__}: {text}"


def _is_peer(error: Exception) -> bool:
    """Whether the failure only says that another rank has gone: then that one's reason is the one to tell."""
    from torch.distributed import DistError, DistStoreError

    if isinstance(error, DistError | DistStoreError):
        return True
    words = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "recv failed", "Socket",
             "ncclRemoteError", "Timed out waiting", "timeout", "connection")  # fmt: skip
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 400 else text[:397] + "..."


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads may be inside a collective that will never end; nothing is left to be tidied up.
    os._exit(code)
