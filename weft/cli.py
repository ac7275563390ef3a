"""The command `weft`: one sub-command per job. A user's mistake is one line on stderr and exit code 2."""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

MISTAKE = 2
INTERRUPTED = 130
NO_READER = 141
# What a plain install leaves out, and the extra of weft that brings it.
EXTRA_OF = {"torch": "executor", "safetensors": "executor", "scipy": "calibration"}


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every other mistake is said, and points to the help."""

    def error(self, message: str) -> NoReturn:
        """Print the line and end with exit code 2."""
        _say(f"{message} (see: {self.prog} --help)")
        sys.exit(MISTAKE)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code. WEFT_TRACEBACK=1 shows where a mistake was found."""
    for stream in (sys.stdout, sys.stderr):  # names of files may hold what a terminal cannot show
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        with _terminated_as_interrupted():
            code = _run(argv)
        sys.stdout.flush()  # here, where a reader that has gone is still ours to notice
        return code
    except BrokenPipeError:
        # The interpreter flushes once more at its end; it must find somewhere to write.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NO_READER
    except KeyboardInterrupt as interrupt:
        print(f"weft: {str(interrupt) or 'interrupted'}", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if os.environ.get("WEFT_TRACEBACK") or (isinstance(error, ImportError) and error.name not in EXTRA_OF):
            raise
        _say(_in_words(error))
        return MISTAKE


def _run(argv: Sequence[str] | None) -> int:
    args = make_parser().parse_args(argv)
    if "run" in args:
        return int(args.run(args))
    if not args.version:
        make_parser().error("no command is given")
    from weft.outputs import version_of_weft

    print(f"weft {version_of_weft()}")
    return 0


def make_parser() -> Parser:
    """The parser with all sub-commands; building it imports nothing heavy. What it imports takes long enough to be
    interrupted, so it is imported here, where `main` can say so."""
    from weft import (
        calibrate_command,
        demo_command,
        explore_command,
        import_command,
        measure_command,
        nodes_command,
        replay_command,
        run_command,
        simulate_command,
        trace_command,
        validate_command,
    )

    parser = Parser(prog="weft", description="Which latency at which throughput, for which way of sharing GPUs.")
    parser.add_argument("--version", action="store_true", help="show the version and end")
    commands: argparse._SubParsersAction[argparse.ArgumentParser]
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")  # type: ignore[assignment]
    demo_command.add_parser(commands)
    simulate_command.add_parser(commands)
    explore_command.add_parser(commands)
    trace_command.add_parser(commands)
    nodes_command.add_parser(commands)
    run_command.add_parser(commands)
    replay_command.add_parser(commands)
    measure_command.add_parser(commands)
    import_command.add_parser(commands)
    calibrate_command.add_parser(commands)
    validate_command.add_parser(commands)
    return parser


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM, which batch systems send, ends a command as Ctrl-C does: what it started is ended, and what is kept is
    told. Whoever handles or ignores the signal already keeps doing so."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _say(message: str) -> None:
    print("weft: error: " + " ".join(message.split()), file=sys.stderr)


def _in_words(error: ValueError | OSError | ModuleNotFoundError) -> str:
    if isinstance(error, ModuleNotFoundError):
        extra = EXTRA_OF[str(error.name)]
        return f"this needs {error.name}, which is not installed; install the extra: pip install -e '.[{extra}]'"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    return str(error) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
