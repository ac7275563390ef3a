"""How times are taken on GPUs, on a pretended one whose clock is arithmetic: what is put in must come out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from executor import stopwatch, survey_cuda, survey_pairs
from executor.lanes import StreamKey
from executor.survey_cuda import REPLAYS, CudaBench
from executor.survey_pairs import PHASES, Comm, Pairs, shares
from traces.measurement import NEEDED, read_measurements
from weft.cli import main

REPLAY_US, CYCLES_PER_US = 3.5, 1980.0


@dataclass
class Stream:
    """Work ends at `us` so far; `busy` are the ends of the kernels on it."""

    us: float = 0.0
    busy: list[float] = field(default_factory=list)

    def wait_event(self, event: Event) -> None:
        self.us = max(self.us, event.us)


@dataclass
class Event:
    gpu: Gpu
    us: float = 0.0

    def record(self, stream: Stream | None = None) -> None:
        self.us = (stream or self.gpu.current).us


@dataclass
class Graph:
    """Kernels captured: (microseconds, the stream whose kernel's end each waits for)."""

    gpu: Gpu
    kernels: list[tuple[float, Stream | None]]

    def replay(self) -> None:
        stream = self.gpu.current
        stream.us += REPLAY_US
        for us, blocker in self.kernels:
            self.gpu.run(stream, us, blocker)


@dataclass
class Gpu:
    current: Stream = field(default_factory=Stream)
    streams: dict[Any, Stream] = field(default_factory=dict)
    capturing: list[tuple[float, Stream | None]] | None = None

    def call(self, us: float, blocker: Stream | None = None) -> Callable[[], None]:
        """A kernel. With a blocker it starts when that stream's running kernel ends."""

        def call() -> None:
            if self.capturing is not None:
                self.capturing.append((us, blocker))
            else:
                self.run(self.current, us, blocker)

        return call

    def run(self, stream: Stream, us: float, blocker: Stream | None) -> None:
        if blocker is not None:
            stream.us = min((end for end in blocker.busy if end >= stream.us), default=stream.us)
        stream.us += us
        stream.busy.append(stream.us)

    def synchronize(self) -> None:
        now = max(stream.us for stream in (*self.streams.values(), self.current))
        for stream in (*self.streams.values(), self.current):
            stream.us, stream.busy = now, []

    def capture(self, pool: object, body: Callable[[], None]) -> Graph:
        self.capturing = []
        body()
        kernels, self.capturing = self.capturing, None
        return Graph(self, kernels)

    def hold(self, cycles: int) -> None:
        self.current.us += cycles / CYCLES_PER_US

    def stream(self, key: StreamKey) -> Stream:
        return self.streams.setdefault(key, Stream())

    @contextmanager
    def using(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    gpu = Gpu()
    fakes: dict[str, Any] = {
        "capture": gpu.capture, "hold": gpu.hold, "elapsed_us": lambda one, two: two.us - one.us,
        "new_event": lambda **_: Event(gpu), "new_stream": lambda device, level: gpu.stream(level),
        "priorities": lambda: (0, -5), "on": gpu.using,
    }  # fmt: skip
    for module in (stopwatch, survey_cuda, survey_pairs):
        for name, fake in fakes.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, fake)
    monkeypatch.setattr(torch.cuda, "synchronize", gpu.synchronize)
    monkeypatch.setattr(torch.cuda, "stream", gpu.using)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    return gpu


def bench_on(gpu: Gpu) -> CudaBench:
    lanes: Any = SimpleNamespace(stream=gpu.stream, device=torch.device("cpu"))
    stopwatch: Any = SimpleNamespace(alone_us=lambda key, calls: 42.0)
    return CudaBench(lanes, stopwatch)


def test_the_price_of_a_replay_is_found_and_is_in_no_time(gpu: Gpu) -> None:
    bench = bench_on(gpu)
    assert bench.replay_us == pytest.approx(REPLAY_US)
    assert bench.cycles_per_us == pytest.approx(CYCLES_PER_US)
    found = bench.compute(0, [gpu.call(10.0)], 10.0)
    assert (found.value, found.spread) == pytest.approx((10.0, 0.0), abs=1e-6)
    assert found.repetitions == REPLAYS
    assert bench.comm(gpu.call(200.0), 3).value == pytest.approx(200.0)


def test_calls_are_taken_in_turn(gpu: Gpu) -> None:
    calls = [gpu.call(us) for us in (10.0, 20.0, 60.0)]
    assert bench_on(gpu).compute(16, calls, 130.0).value == pytest.approx(30.0)


def test_where_a_partition_refuses_capture_the_stopwatch_is_used_and_elsewhere_the_error_is_told(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = bench_on(gpu)

    def refuse(pool: object, body: object) -> Graph:
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(survey_cuda, "capture", refuse)
    assert bench.compute(8, [gpu.call(10.0)], 10.0).value == 42.0
    assert bench.refused == {8: "operation not permitted when stream is capturing"}
    with pytest.raises(RuntimeError, match="not permitted"):
        bench.compute(0, [gpu.call(10.0)], 10.0)


def pairs_on(gpu: Gpu, bench: CudaBench) -> Pairs:
    nothing: Any = None
    return Pairs(bench, nothing, nothing)


def test_without_contention_nothing_is_slowed_and_a_collective_starts_at_once(gpu: Gpu) -> None:
    bench = bench_on(gpu)
    pairs = pairs_on(gpu, bench)
    compute = bench.captured(bench.compute_stream(0), [gpu.call(50.0)], 40, "pair")
    single = bench.captured(bench.comm_stream(), [gpu.call(30.0)], 1, "comm")
    many = bench.captured(bench.comm_stream(), [gpu.call(30.0)], 90, "comm")
    comm = Comm(many, single, REPLAY_US + 30.0)
    alone = bench.alone_us(compute), bench.alone_us(many)
    assert alone == pytest.approx((2000.0, 2700.0))
    assert shares(pairs._race(compute, comm), alone, (50.0, 30.0)) == pytest.approx((1.0, 1.0))
    assert pairs._delays_us(compute, comm, 50.0) == pytest.approx([0.0] * len(PHASES), abs=1e-6)


def test_a_collective_that_waits_for_the_running_kernel_is_delayed_by_what_is_left_of_it(gpu: Gpu) -> None:
    bench = bench_on(gpu)
    pairs = pairs_on(gpu, bench)
    stream: Any = bench.compute_stream(0)
    compute = bench.captured(stream, [gpu.call(300.0)], 8, "pair")
    single = bench.captured(bench.comm_stream(), [gpu.call(20.0, stream)], 1, "comm")
    comm = Comm(single, single, REPLAY_US + 20.0)
    delays = pairs._delays_us(compute, comm, 300.0)
    assert len(delays) == len(PHASES)
    assert all(0.0 <= us <= 300.0 + REPLAY_US for us in delays)
    assert max(delays) - min(delays) > 50.0, "arrivals must fall into different phases of the kernel"


def test_priority_decides_the_streams(gpu: Gpu) -> None:
    bench = bench_on(gpu)
    assert bench.comm_stream() is not bench.comm_stream(priority=False)
    assert bench.comm_stream(priority=False) is bench.comm_stream(priority=False)
    assert bench.compute_stream(0) is not bench.compute_stream(0, priority=False)
    # A partition's streams have the least priority either way.
    assert bench.compute_stream(8) is bench.compute_stream(8, priority=False)


@given(
    st.floats(100.0, 1e4), st.floats(100.0, 1e4), st.floats(1.0, 4.0), st.floats(1.0, 4.0)
)  # fmt: skip
@settings(derandomize=True, deadline=None)
def test_slowdowns_are_recovered_whichever_side_ends_first(
    compute_us: float, comm_us: float, compute_slow: float, comm_slow: float
) -> None:
    """While both run each is slowed by its factor; when one has ended, the other goes on at its own pace."""
    both = min(compute_us * compute_slow, comm_us * comm_slow)
    ends = (
        both + max(0.0, compute_us - both / compute_slow),
        both + max(0.0, comm_us - both / comm_slow),
    )  # fmt: skip
    assert shares(ends, (compute_us, comm_us), (1.0, 1.0)) == pytest.approx((compute_slow, comm_slow))


def test_a_side_that_is_kept_out_altogether_has_a_slowdown_with_an_end() -> None:
    compute, comm = shares((1000.0, 1400.0), (1000.0, 400.0), (50.0, 20.0))
    assert compute == pytest.approx(1.0)
    assert comm == pytest.approx(1000.0 / 20.0)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two or more CUDA devices")
def test_gpus_measure_every_kind(tmp_path: Path) -> None:
    words = ["--models", "llama-2-7b", "--layers", "2", "--budget-s", "40", "--ranks", "2", "--backend", "nccl"]
    assert main(["measure", "--out", str(tmp_path), *words]) == 0
    conditions, rows = read_measurements(tmp_path)
    assert conditions.finished and conditions.num_sms > 0
    assert {row.what for row in rows} == set(NEEDED)
    assert json.loads((tmp_path / "manifest.json").read_text())["skipped"] == {}
    slow = [value for row in rows if row.what == "pair" for name, value in row.values.items() if "slowdown" in name]
    assert min(slow) > 0.8, "nothing becomes faster by company"
