"""What the ranks are told: the world they form and the runs they make, one JSON file for all of them."""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from models.config import ModelConfig
from models.transformer import Layout
from policy.options import Options
from policy.profile_table import profile_from
from policy.scheduler import POLICIES
from traces.request import Request

Backend = Literal["gloo", "nccl"]
Dtype = Literal["float32", "float16", "bfloat16"]
# Longer than any pause of a healthy rank, short enough that a stuck world is gone within half a minute.
DEFAULT_TIMEOUT_S = 20.0
# Each batch in flight takes buffers, a warm-up and a set of graphs; a device is full with far fewer.
MOST_DEPTH = 256
# So many requests are compared between ranks one by one, field by field; more of them in chunks.
MOST_NAMED, CHUNK = 2000, 100


class RunSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One run of a policy over requests.

    - model, layout, policy, options, requests: what is served and how; dtype, seed, checkpoint: its numbers.
    - host_delay_us, device_delay_us: the most of uniform random pauses that every rank's host and its lanes add.
    - poison: NaN in a slot before each reuse. record: keep spans, one per launch.
    - checksum: hash the logits. keep_logits: save them too.
    - timing: measure when launches start. spin: a waiting host burns its core instead of sleeping.
    - replay: the number of an earlier run of this world whose admissions are taken over (-1: none). serial: the same
      launches, one at a time, batch after batch.
    - profile: what the policy believes (None: measured at the start). partitions, ctas: what may be withheld from
      compute and given to collectives (nccl). warm_up: run every shape first.
    """

    model: ModelConfig
    layout: Layout
    policy: str
    requests: tuple[Request, ...]
    options: Options = Options()
    dtype: Dtype = "float32"
    seed: int = 0
    checkpoint: str = ""
    host_delay_us: float = 0.0
    device_delay_us: float = 0.0
    delay_seed: int = 0
    poison: bool = False
    record: bool = False
    checksum: bool = True
    keep_logits: bool = False
    timing: bool = True
    spin: bool = False
    replay: int = -1
    serial: bool = False
    profile: dict[str, Any] | None = None
    partitions: tuple[int, ...] = (0,)
    ctas: tuple[int, ...] = (0,)
    warm_up: bool = True
    completions_path: str = ""

    def check(self) -> None:
        """Raises ValueError if no run can be made of this."""
        if self.policy not in POLICIES:
            raise ValueError(f"unknown policy {self.policy!r}; choose from: {', '.join(POLICIES)}")
        if not self.requests:
            raise ValueError("there are no requests, so there is nothing to run")
        for name in ("host_delay_us", "device_delay_us"):
            value = getattr(self, name)
            if not 0.0 <= value < math.inf:
                raise ValueError(f"{name} is {value!r}; it must be 0 or more microseconds")
        for name in ("partitions", "ctas"):
            values = getattr(self, name)
            if not values or min(values) < 0:
                raise ValueError(f"{name} is {values!r}; it must be a list of counts, 0 or more")
        if self.delay_seed < 0:
            raise ValueError(f"delay_seed is {self.delay_seed}; it must be 0 or more")
        if self.options.depth > MOST_DEPTH:
            raise ValueError(f"options.depth is {self.options.depth}; it must be at most {MOST_DEPTH}, for every batch "
                             "in flight has buffers of its own")  # fmt: skip
        self._check_requests()
        self._check_profile()
        self.layout.check(self.model)

    def _check_requests(self) -> None:
        seen: set[int] = set()
        for request in self.requests:
            number = request.request_id
            if number in seen:
                raise ValueError(f"request id {number} is there twice; every request needs its own")
            seen.add(number)
            if request.num_prompt_tokens < 1:
                raise ValueError(
                    f"request {number} has {request.num_prompt_tokens} prompt tokens; it must be 1 or more"
                )
            if not math.isfinite(request.arrival_us):
                raise ValueError(f"request {number} has arrival_us {request.arrival_us!r}; it must be a finite number")
        longest = max(self.requests, key=lambda r: r.num_prompt_tokens)
        if longest.num_prompt_tokens > self.model.max_positions:
            raise ValueError(
                f"request {longest.request_id} has {longest.num_prompt_tokens} prompt tokens, but "
                f"{self.model.model_id} has {self.model.max_positions} positions"
            )

    def _check_profile(self) -> None:
        """Also that no CTAs are believed in for which there will be no communicator."""
        if self.profile is None:
            return
        ctas = profile_from(self.profile).ctas
        unknown = sorted({*ctas} - {0, *self.ctas})
        if unknown and self.options.comm_ctas < 0:
            raise ValueError(f"the profile's ctas are {list(ctas)}, but those of the run are {list(self.ctas)}: "
                             f"{unknown[0]} is not among them")  # fmt: skip


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A world of ranks and what it does, run after run. `output` is a folder for one result file per run.

    The rendezvous listens on `bind_address` and `port` (0: a free one).
    """

    runs: tuple[RunSettings, ...]
    backend: Backend = "gloo"
    timeout_s: float = DEFAULT_TIMEOUT_S
    bind_address: str = "127.0.0.1"
    port: int = 0
    output: str = ""

    @property
    def num_ranks(self) -> int:
        """Processes that the runs need; every run uses all of them."""
        return self.runs[0].layout.num_ranks

    def check(self) -> None:
        """Raises ValueError if the ranks could not do this."""
        if not self.runs:
            raise ValueError("there are no runs in the settings")
        if not 1.0 <= self.timeout_s <= 600.0:
            raise ValueError(f"timeout is {self.timeout_s!r} s; it must be 1 to 600")
        for number, run in enumerate(self.runs):
            try:
                run.check()
            except ValueError as error:
                raise ValueError(f"runs[{number}]: {error}" if len(self.runs) > 1 else str(error)) from None
            if run.layout.num_ranks != self.num_ranks:
                raise ValueError(f"run {number} needs {run.layout.num_ranks} ranks and run 0 {self.num_ranks}; "
                                 "runs of one world need the same number")  # fmt: skip
            if run.replay >= number:
                raise ValueError(f"run {number} replays run {run.replay}, which comes not before it")
            if self.backend == "gloo" and (max(run.partitions) or max(run.ctas)):
                raise ValueError("SM partitions and CTA counts need GPUs; with gloo leave them at 0")


def encode(settings: Settings) -> bytes:
    """The settings as JSON, which knows no infinity: that is written as the text `inf`."""
    return msgspec.json.encode(_finite(settings))


def decode(content: bytes, source: str) -> Settings:
    """Settings from JSON; `source` names them in errors. Raises ValueError for anything else."""
    try:
        settings = msgspec.convert(msgspec.json.decode(content), Settings, strict=False)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise ValueError(f"{source}: not the settings of a run ({error})") from None
    try:
        settings.check()
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    return settings


def read_settings(path: Path) -> Settings:
    """Settings from a file."""
    return decode(path.read_bytes(), str(path))


def flags(settings: Settings) -> dict[str, str]:
    """What must be equal on every rank, by name, field by field; of many requests a hash for each CHUNK of them, so
    that few words tell which differ."""
    named: dict[str, str] = {"backend": settings.backend, "timeout_s": str(settings.timeout_s)}
    for number, run in enumerate(settings.runs):
        named |= {f"runs[{number}].{name}": text for name, text in run_flags(run).items()}
    return named


def run_flags(run: RunSettings) -> dict[str, str]:
    """One run's settings by name, short enough to compare and to keep beside its results."""
    named: dict[str, str] = {}
    for name in run.__struct_fields__:
        value = getattr(run, name)
        if name == "requests":
            named.update(_request_flags(value))
        elif is_dataclass(value) and not isinstance(value, type):
            named.update({f"{name}.{field}": repr(item) for field, item in asdict(value).items()})
        else:
            named[name] = _shortened(repr(value))
    return named


def _request_flags(requests: tuple[Request, ...]) -> dict[str, str]:
    """Few requests field by field; of many, hashes."""
    named = {"requests: their number": str(len(requests))}
    if len(requests) <= MOST_NAMED:
        for place, request in enumerate(requests):
            named.update({f"requests[{place}].{field}": repr(value) for field, value in asdict(request).items()})
        return named
    for start in range(0, len(requests), CHUNK):
        part = requests[start : start + CHUNK]
        named[f"requests[{start}:{start + len(part)}]"] = hashlib.sha256(repr(part).encode()).hexdigest()
    return named


def _shortened(text: str) -> str:
    """The beginning of a long text, and a hash of all of it."""
    return text if len(text) < 60 else f"{text[:40]}... (sha256 {hashlib.sha256(text.encode()).hexdigest()[:12]})"


def _finite(value: Any) -> Any:
    """Plain data with every infinite float as text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, msgspec.Struct):
        return {name: _finite(getattr(value, name)) for name in value.__struct_fields__}
    if is_dataclass(value) and not isinstance(value, type):
        return _finite(asdict(value))
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
