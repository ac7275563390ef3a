"""What a run says on the console, in the block of `vllm bench serve`, and how a result is written down."""

from __future__ import annotations

import json
import math
import re
from datetime import date
from typing import Any

from sim.fitted import STALE_DAYS, age_days

WIDTH = 58
LABEL = 46
MAX_SHOWN = 3


def console_block(result: dict[str, Any]) -> str:
    """The numbers of one run. It says in its title that they are simulated, and names what they rest on."""
    lines = [
        title(" Simulated Serving Benchmark Result ", "="),
        row("Model:", result["model_id"]),
        row("Node (simulated):", result["node"]),
        row("Policy:", policy_text(result)),
        *request_rows(result),
        *latency_rows(result),
        *gpu_rows(result),
        row("Weights / memory of a GPU (GB):", _memory(result)),
        title("Simulation", "-"),
        row("Batches / kernels:", f"{result['sim_iterations']:,} / {result['sim_kernels']:,}"),
        row("Wall time (s):", result["sim_wall_s"]),
    ]
    return "\n".join([*lines, "=" * WIDTH, *caveats(result)])


def request_rows(result: dict[str, Any]) -> list[str]:
    """What was asked for and answered, of simulated and real runs."""
    lines = [
        row("Successful requests:", result["completed"]),
        row("Failed requests:", result["failed"]),
        row("Request rate configured (RPS):", rate_text(result["request_rate"] or None)),
        row("Benchmark duration (s):", result["duration"]),
        row("Total input tokens:", result["total_input_tokens"]),
        *([row("Prompts shortened:", result["num_shortened"])] if result["num_shortened"] else []),
        row("Request throughput (req/s):", result["request_throughput"]),
    ]
    if "request_goodput" in result:
        lines += [
            row("Request goodput (req/s):", result["request_goodput"]),
            row("SLO attainment (%):", 100.0 * result["slo_attainment"]),
        ]
    return [*lines, row("Total Token throughput (tok/s):", result["total_token_throughput"])]


def latency_rows(result: dict[str, Any]) -> list[str]:
    """Mean, median and every percentile that the result has."""
    # P50 is the median, which vLLM names so; the file has both.
    percentiles = [key for key in result if re.fullmatch(r"p[\d.]+_e2el_ms", key) and key != "p50_e2el_ms"]
    return [
        title("End-to-end Latency", "-"),
        row("Mean E2EL (ms):", result["mean_e2el_ms"]),
        row("Median E2EL (ms):", result["median_e2el_ms"]),
        *(
            row(f"P{key[1:-8]} E2EL (ms):", result[key])
            for key in sorted(percentiles, key=lambda key: float(key[1:-8]))
        ),
    ]


def gpu_rows(result: dict[str, Any]) -> list[str]:
    """What the GPUs did. Graphs that hold collectives hide it from a real run, which has null there."""
    return [
        title("GPUs", "-"),
        *(
            row(label, "not known (inside graphs)" if result[key] is None else 100.0 * result[key])
            for label, key in (
                ("Communication share of busy time (%):", "comm_share"),
                ("Communication hidden by computation (%):", "overlap_fraction"),
                ("Compute utilization (%):", "compute_utilization"),
                ("Link utilization (%):", "link_utilization"),
            )
        ),
    ]


def caveats(result: dict[str, Any]) -> list[str]:
    """What the numbers rest on: weights that would not fit, estimates that nobody measured, fits that do not hold any
    more, and kernels beyond what the node's tables and its fit know."""
    lines = [f"caution: {note}" for key in ("memory_notes", "fit_notes") for note in result.get(key, [])]
    measured = result.get("fit_date", "")
    if measured and (age := age_days(measured, date.today())) is not None and age > STALE_DAYS:
        lines.append(f"caution: the measurements of node {result['node']} are stale, {age} days old ({measured})")
    estimates = result["estimates_used"]
    if estimates:
        lines.append(
            f"{len(estimates)} numbers of node {result['node']} are estimates, not measurements: "
            f"{_some(estimates)} (see: weft nodes {result['node']})"
        )
    if result["out_of_range"]:
        known = "tables and its fit" if measured else "tables"
        lines.append(f"beyond the node's {known}, so extrapolated: {_some(result['out_of_range'])}")
    return lines


def _some(names: list[str]) -> str:
    rest = len(names) - MAX_SHOWN
    return ", ".join(names[:MAX_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def encode(result: dict[str, Any]) -> bytes:
    """One line of JSON. Infinity is written "inf", as `vllm bench serve` writes an unlimited rate."""
    return json.dumps({key: _finite(value) for key, value in result.items()}, allow_nan=False).encode()


def _finite(value: Any) -> Any:
    return "inf" if isinstance(value, float) and math.isinf(value) else value


def rate_text(rate: float | None) -> str:
    """The rate that was asked for, in requests per second; None is a trace at its own."""
    return "as in the trace" if rate is None else f"{rate:.2f}"


def _memory(result: dict[str, Any]) -> str:
    memory = result["gpu_memory_gb"]
    return f"{result['weights_gb_per_gpu']:.1f} / {'not known' if memory is None else format(memory, 'g')}"


def policy_text(result: dict[str, Any]) -> str:
    """The policy, its layout, and the switches that were changed."""
    layout = f"TP{result['tensor_parallel_size']} x PP{result['pipeline_parallel_size']}"
    return f"{result['policy']} ({layout})" + (f" {result['policy_options']}" if result["policy_options"] else "")


def title(text: str, fill: str) -> str:
    """A line of the block that names what follows."""
    return text.center(WIDTH, fill)


def row(label: str, value: Any) -> str:
    """A line of the block: a number or a word, and what it is."""
    return f"{label:<{LABEL}} {_number(value)}"


def _number(value: Any) -> str:
    return f"{value:<.2f}" if isinstance(value, float) else str(value)
