"""Where a run's result and timeline go: checked before the work, and written whole or not at all."""

from __future__ import annotations

import re
import tempfile
from datetime import datetime
from itertools import combinations
from pathlib import Path
from typing import Any

from traces.files import write_whole

# Every key that a result file may hold: of all runs, simulated ones, real ones, and with --save-detailed.
_KEYS = (
    "backend model_id node policy tensor_parallel_size pipeline_parallel_size dataset_name num_prompts num_shortened "
    "input_len request_rate burstiness trace_start_s trace_duration_s burstiness_scale policy_options seed config_hash "
    "weights_gb_per_gpu gpu_memory_gb memory_notes estimates_used out_of_range completed failed duration "
    "total_input_tokens total_output_tokens request_throughput output_throughput total_token_throughput mean_e2el_ms "
    "median_e2el_ms std_e2el_ms comm_share overlap_fraction compute_utilization link_utilization request_goodput "
    "slo_attainment date "
    "node_digest fit_date fit_notes sim_iterations sim_kernels sim_rounds sim_wall_s "
    "num_layers dtype iterations kernels rounds host_plan_us_per_round host_issue_us_per_round "
    "host_issue_us_per_launch host_bound_fraction num_graphs output_checksum order_hash rounds_hash host wall_s "
    "input_lens output_lens start_times latencies queue_times batch_ids settings admission_log profile"
)
RESULT_KEYS = frozenset(_KEYS.split())
PERCENTILE_KEY = re.compile(r"p[\d.e+-]+_e2el_ms")


def is_result_key(key: str) -> bool:
    """Whether results use this name themselves."""
    return key in RESULT_KEYS or PERCENTILE_KEY.fullmatch(key) is not None


def parse_metadata(items: list[str], label: str | None = None) -> dict[str, str]:
    """What the user wants kept in the result: KEY=VALUE pairs, and the label. Names of the result are not free."""
    pairs = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise ValueError(f"--metadata {item!r} is not KEY=VALUE")
        if is_result_key(key):
            raise ValueError(f"--metadata {item!r}: the result has a number or name {key} of its own; use another key")
        if key in pairs or (key == "label" and label is not None):
            raise ValueError(f"--metadata {item!r}: {key} is given twice")
        pairs[key] = value
    return pairs if label is None else pairs | {"label": label}


def check_outputs(result: Path | None, timeline: Path | None, *others: Path | None, may_make_folder: bool) -> None:
    """Raises ValueError if what a run will write cannot be written, or would be written over each other. A run may take
    minutes; this should be known before. `may_make_folder`: the result's folder need not be there yet."""
    if timeline is not None:
        from traces.chrome import SUFFIXES

        if not any(timeline.name.endswith(suffix) and timeline.name != suffix for suffix in SUFFIXES):
            raise ValueError(f"--timeline {timeline}: the file must be named *.json or *.json.gz")
    files = [file for file in (result, timeline, *others) if file is not None]
    for file in files:
        check_writable(file, may_make_folder=may_make_folder and file is result)
    for one, other in combinations(files, 2):
        if _without_rank(one) == _without_rank(other):
            raise ValueError(f"{one} and {other} would be written over each other; give each a name of its own")


def _without_rank(path: Path) -> Path:
    """A timeline is a file per rank: NAME.rank0.json for NAME.json."""
    path = path.resolve()
    return path.with_name(re.sub(r"\.rank\d+(?=\.)", "", path.name))


def check_writable(path: Path, *, may_make_folder: bool = False) -> None:
    """Raises ValueError if a file of this name cannot be written."""
    folder = path.parent
    if may_make_folder:
        while not folder.exists():
            folder = folder.parent
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the name of a file")
    if not folder.is_dir():
        raise ValueError(f"{path}: {folder} is not a folder; make it first")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a plain file, which could be replaced; give another name")
    # Permissions alone do not tell of /proc, or of a disk that is read-only; this leaves nothing behind.
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError:
        raise ValueError(f"{path}: the folder {folder} cannot be written to") from None


def version_of_weft(missing: str = "(not installed)") -> str:
    """The version that is installed; `missing` where only the code is there."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("weft")
    except PackageNotFoundError:
        return missing


def given_name(name: str | None) -> str:
    """The name that --result-filename gives, "" where there is none."""
    if name == "":
        raise ValueError("--result-filename is empty; give the name of a file, or leave it out for a name by itself")
    return name or ""


def short_name(name_or_path: str) -> str:
    """A model or node as a part of file names: its id, or its file without the ending; of a config.json its folder."""
    path = Path(name_or_path)
    if path.suffix not in (".json", ".toml"):
        return path.name
    return path.resolve().parent.name if path.stem == "config" else path.stem


def rate_name(rate: float) -> str:
    """The rate as a part of file names; 0 is a trace's own."""
    return f"{rate:g}qps" if rate else "trace-rate"


def dated(result: dict[str, Any]) -> dict[str, Any]:
    """The result with the time of its writing, named and written as `vllm bench serve` does; last, as it never
    repeats."""
    return result | {"date": datetime.now().strftime("%Y%m%d-%H%M%S")}


def save(path: Path, line: bytes, *, append: bool) -> None:
    """Write the result, whole or not at all; `append` keeps the lines that are there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.read_bytes() if append and path.exists() else b""
    if before and not before.endswith(b"\n"):
        before += b"\n"
    write_whole(path, before + line + b"\n")
