"""What a run leaves behind: each rank's report, and rank 0's summary of them as one file. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from executor.order import Chain
from policy.scheduler import Admission
from traces.files import write_whole
from traces.timeline import Completion, Span, Timeline


class Busy(msgspec.Struct, frozen=True):
    """Microseconds of one rank: with compute running, with communication, with both, and waiting for the host.

    `opaque`: some graphs held collectives, which count as compute, for nothing outside can tell.
    """

    compute_us: float
    communication_us: float
    overlap_us: float
    host_bound_us: float
    opaque: bool
    num_kernels: int


class HostTime(msgspec.Struct):
    """Seconds that one rank's host spent, and what on."""

    rounds: int = 0
    launches: int = 0
    plan_s: float = 0.0
    issue_s: float = 0.0
    synchronize_s: float = 0.0
    mail_s: float = 0.0


class Report(msgspec.Struct):
    """One rank's side of a run. Only the rank with the results has completions and hashes."""

    busy: Busy
    host: HostTime
    order: dict[str, Chain]
    rounds_hash: str
    spans: list[Span]
    completions: list[Completion]
    hashes: dict[int, str]
    checksum: str
    num_wrong: int


class Output(msgspec.Struct):
    """A finished run, as rank 0 writes it. `busy` and `host_times` are by rank; times are on rank 0's clock. `flags`
    are the run's settings by name, as `executor.settings.run_flags` has them."""

    timeline: Timeline
    log: list[Admission]
    num_ranks: int
    rounds_hash: str
    order_hash: str
    checksum: str
    hashes: dict[int, str]
    busy: list[Busy]
    host_times: list[HostTime]
    host: dict[str, Any]
    profile: dict[str, Any] | None
    wall_s: float
    num_graphs: int = 0
    flags: dict[str, str] = {}

    @property
    def opaque(self) -> bool:
        """Whether some graphs held collectives."""
        return any(busy.opaque for busy in self.busy)


def output_path(folder: str, number: int) -> Path:
    """The file of one run."""
    return Path(folder) / f"run-{number}.msgpack"


def write_output(folder: str, number: int, output: Output) -> None:
    """One file per run, whole or not at all."""
    write_whole(output_path(folder, number), msgspec.msgpack.encode(output))


def read_output(folder: str, number: int) -> Output:
    """What a finished run left."""
    path = output_path(folder, number)
    try:
        return msgspec.msgpack.decode(path.read_bytes(), type=Output)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise ValueError(f"{path}: not the result of a run ({error})") from None
