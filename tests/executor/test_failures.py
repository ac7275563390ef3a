"""When a rank dies, hangs or was told something else: every process ends in time, with one line that says which."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from executor.launch import PROGRAM, WorldError, launch
from executor.settings import RunSettings, Settings, encode
from models.transformer import Layout
from tests.executor import faulty_rank
from tests.executor.worlds import requests, run_of

LIMIT_S = 30.0
ROOT = Path(__file__).resolve().parents[2]


def _long_run(folder: Path) -> RunSettings:
    """Half a minute of arrivals: it does not end by itself while a test breaks it."""
    return run_of("interleaved", Layout(2, 1), requests=requests(600, 50_000.0),
                  completions_path=str(folder / "completions.jsonl"))  # fmt: skip


class Broken:
    """A world that a test breaks: its error, how long that took, and which processes there were."""

    def __init__(
        self, settings: Settings, breaking: Callable[[list[int]], object], program: tuple[str, ...] = PROGRAM
    ) -> None:
        self.pids: list[int] = []
        self._done = False

        def progress(finished: int) -> None:
            if not self._done:
                self._done = True
                self.broken_s = time.monotonic()
                breaking(self.pids)

        self.broken_s = time.monotonic()
        with pytest.raises(WorldError) as caught:
            launch(settings, progress, program, self.pids.extend)
        self.took_s = time.monotonic() - self.broken_s
        self.message = str(caught.value)

    def check(self, pattern: str) -> None:
        assert re.search(pattern, self.message), self.message
        assert "\n" not in self.message
        assert self.took_s < LIMIT_S
        assert len(self.pids) == 2
        assert not any(map(_is_alive, self.pids))


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _nothing(pids: list[int]) -> None:
    """The rank breaks by itself."""


def test_a_killed_rank(tmp_path: Path) -> None:
    settings = Settings(runs=(_long_run(tmp_path),), output=str(tmp_path))
    broken = Broken(settings, lambda pids: os.kill(pids[1], signal.SIGKILL))
    broken.check(r"^rank 1 was killed by SIGKILL; all ranks were ended after \d+ of 600 requests$")
    # What was answered before is kept, line by line.
    rows = [msgspec.json.decode(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    assert rows
    assert all(row["arrival_us"] < row["finished_us"] for row in rows)


def test_a_stuck_rank(tmp_path: Path) -> None:
    settings = Settings(runs=(_long_run(tmp_path),), output=str(tmp_path), timeout_s=4.0)
    broken = Broken(settings, lambda pids: os.kill(pids[1], signal.SIGSTOP))
    broken.check(r"^rank 1 has not responded for \d+ s: it is stopped or hangs")
    assert broken.took_s < 3 * 4.0


@pytest.mark.parametrize(
    ("fault", "where"),
    [
        ("hang-loading", "in the phase `prepare run 0`"),
        ("hang-planning", r"at round \d+"),
    ],
)
def test_a_rank_that_beats_but_hangs(fault: str, where: str, tmp_path: Path) -> None:
    """The others wait for it; that is what tells it from them."""
    settings = Settings(runs=(run_of("tensor", Layout(2, 1)),), output=str(tmp_path), timeout_s=4.0)
    broken = Broken(settings, _nothing, (sys.executable, faulty_rank.__file__, fault, "1"))
    broken.check(rf"^rank 1 made no progress for 4 s \(rank 0 {where}, rank 1 {where}\); all ranks were ended")


def test_a_device_that_hangs_is_not_told_from_those_that_wait_for_it(tmp_path: Path) -> None:
    settings = Settings(runs=(run_of("tensor", Layout(2, 1)),), output=str(tmp_path), timeout_s=4.0)
    broken = Broken(settings, _nothing, (sys.executable, faulty_rank.__file__, "hang-computing", "1"))
    broken.check(
        r"^rank 0 made no progress for 4 s, nor did the others, and which is at fault cannot be told \(rank 0 at"
    )


def test_a_rank_that_is_slow_is_waited_for(tmp_path: Path) -> None:
    settings = Settings(runs=(run_of("tensor", Layout(2, 1)),), output=str(tmp_path), timeout_s=3.0)
    launch(settings, program=(sys.executable, faulty_rank.__file__, "load-slowly", "1"))


@pytest.mark.parametrize(
    ("fault", "rank", "pattern"),
    [
        (
            "out-of-memory",
            "1",
            r"^rank 1 failed: out of memory: Tried to allocate 20.00 GiB.*use more ranks, fewer layers",
        ),
        ("not-a-number", "all", r"^rank 0 failed: rank \d computed \d+ logits that are not finite numbers"),
    ],
)
def test_a_rank_that_fails_by_itself(fault: str, rank: str, pattern: str, tmp_path: Path) -> None:
    settings = Settings(runs=(run_of("interleaved", Layout(2, 1)),), output=str(tmp_path))
    Broken(settings, _nothing, (sys.executable, faulty_rank.__file__, fault, rank)).check(pattern)


def test_too_few_gpus(tmp_path: Path) -> None:
    import torch

    count = torch.cuda.device_count()
    layout = Layout(1, count + 1) if count else Layout(2, 1)
    run = run_of("pipeline" if count else "tensor", layout, model=run_of("tensor", Layout(1, 1)).model)
    with pytest.raises(WorldError, match=rf"failed: it needs GPU \d, but this machine has {count}"):
        launch(Settings(runs=(run,), backend="nccl", output=str(tmp_path)))


def test_a_checkpoint_that_is_none(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "opt"}')
    (folder / "pytorch_model.bin").write_bytes(b"pickled")
    run = run_of("interleaved", Layout(2, 1), checkpoint=str(folder))
    settings = Settings(runs=(run,), output=str(tmp_path))
    Broken(settings, _nothing).check(r"^rank \d failed: .*checkpoint: only pickled weights")


def test_an_occupied_port(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        settings = Settings(runs=(run_of("tensor", Layout(1, 1)),), port=port, output=str(tmp_path))
        with pytest.raises(OSError, match=rf"cannot listen on 127.0.0.1:{port} \(Address already in use\)"):
            launch(settings)


def test_the_rendezvous_listens_on_loopback_alone(tmp_path: Path) -> None:
    """No socket of the ranks is open to other machines."""
    listening: list[str] = []

    def look(pids: list[int]) -> None:
        listening.extend(_listening_addresses(pids))
        os.kill(pids[0], signal.SIGKILL)

    Broken(Settings(runs=(_long_run(tmp_path),), output=str(tmp_path)), look).check("^rank 0 was killed")
    assert listening
    assert set(listening) <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}


def _listening_addresses(pids: list[int]) -> Iterator[str]:
    """Local addresses of the listening TCP sockets that these processes hold, from /proc."""
    inodes = set()
    for pid in pids:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            target = os.readlink(entry)
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and words[9] in inodes:
                raw = bytes.fromhex(words[1].split(":")[0])
                swapped = b"".join(raw[i : i + 4][::-1] for i in range(0, len(raw), 4))
                yield socket.inet_ntop(family, swapped)


def test_ranks_that_were_told_different_things(tmp_path: Path) -> None:
    """Started by hand, as on several machines, with two files of settings."""
    run = run_of("interleaved", Layout(2, 1))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ranks = []
    for rank in (0, 1):
        path = tmp_path / f"settings-{rank}.json"
        path.write_bytes(encode(Settings(runs=(msgspec.structs.replace(run, seed=rank),))))
        environment = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}  # fmt: skip
        command = [sys.executable, "-m", "executor", "--settings", str(path)]
        ranks.append(subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True))
    for number, process in enumerate(ranks):
        _, errors = process.communicate(timeout=LIMIT_S)
        told = "rank 1 was started with other settings than rank 0: runs[0].seed is 1 there and 0 here"
        assert errors.strip().splitlines() == [f"weft: error: rank {number}: {told}"]
        assert process.returncode == 2


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_a_termination_end_all(tmp_path: Path, sign: signal.Signals) -> None:
    before = set(_ranks_running())
    command = [sys.executable, "-m", "weft.cli", "run", "--num-prompts", "500", "--request-rate", "10"]
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "TMPDIR": str(tmp_path)}, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    _wait_for(lambda: len(set(_ranks_running()) - before) >= 2)
    time.sleep(1.0)
    process.send_signal(sign)
    _, errors = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 130
    assert re.fullmatch(r"weft: (error: )?interrupted; all ranks were ended.*", errors.strip())
    _wait_for(lambda: not set(_ranks_running()) - before)


def test_ranks_do_not_outlive_their_launcher(tmp_path: Path) -> None:
    before = set(_ranks_running())
    command = [sys.executable, "-m", "weft.cli", "run", "--num-prompts", "500", "--request-rate", "10"]
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "TMPDIR": str(tmp_path)}, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    _wait_for(lambda: len(set(_ranks_running()) - before) >= 2)
    process.kill()
    process.wait()
    _wait_for(lambda: not set(_ranks_running()) - before)


def _ranks_running() -> Iterator[int]:
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                words = (folder / "cmdline").read_bytes().split(b"\0")
                state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if b"executor" in words and b"--status-fd" in words and state != "Z":
                yield int(folder.name)


def _wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
