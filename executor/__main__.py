"""The entry of one rank: started by `executor.launch`, or by hand with `torchrun -m executor --settings FILE`."""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path
from typing import Any

from executor.status import PeerError, Status, watch_parent

# A lost connection is reported by us, in one line; torch would add pages of its own stack, as errors too.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")

# How libraries say that the other end of a connection has gone.
GONE = ("connection closed", "connection was likely closed", "reset by peer", "broken pipe", "recv failed",
        "got 0 bytes", "failed to recv", "connection refused", "ncclremoteerror")  # fmt: skip
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
        peer = _is_peer(error)
        status.fail(_peer_reason(error, args.rank) if peer else _reason(error), peer=peer)
        return FAILED


def _reason(error: Exception) -> str:
    text = _one_line(error)
    if _is_out_of_memory(error, text):
        text = _from_library(text).removesuffix(".")
        return f"out of memory: {text or 'no more can be had'}; use more ranks, fewer layers, or smaller batches"
    return f"{type(error).__name__}: {text}"


def _is_out_of_memory(error: Exception, text: str) -> bool:
    """On a CPU torch raises nothing of its own, but what its allocator or C++ says."""
    words = ("DefaultCPUAllocator", "bad_alloc", "Cannot allocate memory", "CUDA out of memory")
    named = type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError)
    return named or (isinstance(error, RuntimeError) and any(word in text for word in words))


def _from_library(text: str) -> str:
    """What a C++ library says, without the place in its sources and the check that failed there."""
    return re.sub(r"^\[[^]]*\.(cc|cpp|h):\d+\] (err == 0\. )?", "", text)


def _peer_reason(error: Exception, rank: int) -> str:
    """One line of ours for a rank that does not answer; libraries add places in their sources, stacks and advice."""
    text, ranks = str(error), int(os.environ.get("WORLD_SIZE", "0"))
    who = f"rank {1 - rank}" if ranks == 2 else "another rank"
    if isinstance(error, PeerError):
        return _one_line(error)
    if any(word in text.lower() for word in ("timed out", "timeout")):
        patience = re.search(r"(?:out waiting|timeout after|timed out after) (\d+) ?ms", text)
        return f"{who} did not answer" + (f" within {int(patience[1]) / 1e3:g} s" if patience else " in time")
    if any(word in text.lower() for word in GONE):
        return f"{who} went away: its connection was closed"
    return _reason(error)


def _is_peer(error: Exception) -> bool:
    """Whether the failure only says that another rank has gone: then that one's reason is the one to tell."""
    from torch.distributed import DistError, DistStoreError

    if isinstance(error, DistError | DistStoreError | PeerError):
        return not _is_out_of_memory(error, str(error))
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
