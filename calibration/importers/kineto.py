"""Traces of the PyTorch profiler (Kineto's Chrome trace JSON): GEMMs, collectives, and what they do to each other.

What a trace tells, and what it does not:

- GEMM shapes are those of the operator that launched the kernels, if the profiler recorded shapes (`record_shapes`);
  kernels of a CUDA graph belong to no operator. All kernels of one call (split sums too) are one GEMM, without gaps.
- Attention and elementwise kernels are left out: whether attention is causal, and which bytes a fused kernel moves,
  is not in a trace.
- The kernel of a collective runs from its own rank's arrival, so it holds the wait for the others. With the traces of
  **all** ranks the shortest of a call's kernels is that of the rank that came last, which is the collective itself;
  with fewer traces collectives are left out. Sends are left out: which receive belongs to one is not written.
- A GEMM beside one collective gives a slowdown against the same GEMM alone in the same trace; a collective beside GEMMs
  of one shape gives its own. The streams' priorities are not in a trace and must be said; when a collective was ready
  to start is not either, so there is no start delay. That no SMs were withheld is taken for granted.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from calibration.importers.found import Found, Request
from calibration.importers.kineto_rows import Call, Gemm, Trace, Work, samples_of
from traces.files import GZIP_MAGIC, shown, whole_number

Event = dict[str, Any]

ELEMENT_BYTES = {"c10::BFloat16": 2, "c10::Half": 2}
# Which inputs of an operator are its two matrices; `linear` keeps its weights as (cols, inner).
OPERANDS = {"aten::mm": (0, 1), "aten::addmm": (1, 2), "aten::bmm": (0, 1), "aten::linear": (0, 1)}

COLLECTIVES = {
    "allreduce": "all_reduce", "all_reduce": "all_reduce", "allreduce_coalesced": "all_reduce",
    "_allgather_base": "all_gather", "allgather": "all_gather", "all_gather": "all_gather",
}  # fmt: skip
SHORT = "kernels shorter than the profiler's clock can tell"
DTYPE_BYTES = {"BFloat16": 2, "Half": 2, "Float": 4, "Double": 8, "Byte": 1, "Char": 1, "Int": 4, "Long": 8}


def read_kineto(paths: Sequence[Path], request: Request) -> Found:
    """The rows of the traces of one run, a file a rank.

    Raises ValueError for a file that is no such trace, and where two files are of the same rank.
    """
    found = Found()
    traces: list[Trace] = []
    for path in paths:
        trace = _trace(path, found)
        if any(trace.rank == other.rank >= 0 for other in traces):
            raise ValueError(f"{path}:1: rank {trace.rank} is in another of the files too; give one trace a rank")
        traces.append(trace)
    found.notes["gemm"] = "kernel times of the profiler, alone on the device, without the gap to the next kernel"
    found.notes["collective"] = "kernel time on the rank that came last, with nothing beside it on any rank"
    found.samples += samples_of(traces, request.priority, found.left_out)
    return found


# -- the file ---------------------------------------------------------------------------------------------------------


def _trace(path: Path, found: Found) -> Trace:
    document = _document(path)
    if isinstance(document, list):
        document = {"traceEvents": document}
    events = document.get("traceEvents") if isinstance(document, dict) else None
    if not isinstance(events, list):
        raise ValueError(f"{path}:1: not a Chrome trace (it has no list traceEvents)")
    kernels = [event for event in events if _is_kernel(event)]
    if not kernels:
        raise ValueError(f"{path}:1: none of the {len(events)} events is a kernel; was the GPU profiled?")
    _about(document, found, path)
    info = document.get("distributedInfo")
    rank = info.get("rank", -1) if isinstance(info, dict) else -1
    works = sorted((_work(event, path) for event in kernels), key=lambda work: (work.start_us, work.end_us))
    trace = Trace(path, rank if isinstance(rank, int) else -1, works)
    _launches(trace, {_id(e): e for e in events if _is_operator(e)}, found)
    return trace


def _document(path: Path) -> Any:
    content = path.read_bytes()
    try:
        if content.startswith(GZIP_MAGIC):
            content = gzip.decompress(content)
        if not content.strip():
            raise ValueError(f"{path}:1: the file is empty; expected a Chrome trace")
        return json.loads(content)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON ({error.msg}, column {error.colno})") from None
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{line}: not UTF-8 text") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}:1: the gzip data is cut off or damaged ({error}); fetch it again") from None


def _about(document: Event, found: Found, path: Path) -> None:
    """What the trace says of the machine."""
    devices = document.get("deviceProperties")
    for device in devices if isinstance(devices, list) else []:
        if isinstance(device, dict):
            found.say("gpu", str(device.get("name", "")), f"{path}:1")
            found.say("num_sms", _count(device, "numSms", path), f"{path}:1")
    info = document.get("distributedInfo")
    if isinstance(info, dict):
        found.say("num_gpus", _count(info, "world_size", path), f"{path}:1")
        found.say("nccl", str(info.get("nccl_version", "")), f"{path}:1")


def _count(about: Event, key: str, path: Path) -> str:
    """A count that the trace tells, as text; empty where it does not."""
    value = about.get(key)
    if value is None or value == "":
        return ""
    try:
        count = 0 if isinstance(value, bool) else whole_number(str(value))
    except ValueError:
        count = 0
    if count < 1:
        raise ValueError(f"{path}:1: {key} is {shown(str(value))}; expected a whole number, 1 or more")
    return str(count)


def _is_kernel(event: object) -> bool:
    return isinstance(event, dict) and event.get("ph") == "X" and str(event.get("cat")).lower() == "kernel"


def _is_operator(event: object) -> bool:
    return isinstance(event, dict) and event.get("ph") == "X" and event.get("cat") in ("cpu_op", "Operator")


def _args(event: Event) -> Event:
    args = event.get("args")
    return args if isinstance(args, dict) else {}


def _id(event: Event) -> int:
    """What ties a kernel to the operator that launched it; 0 if nothing does."""
    args = _args(event)
    value = args.get("External id", args.get("external id", 0))
    return value if isinstance(value, int) else 0


def _work(event: Event, path: Path) -> Work:
    start, duration = event.get("ts"), event.get("dur")
    for name, value in (("ts", start), ("dur", duration)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e18:
            kernel = str(event.get("name"))[:60]
            raise ValueError(f"{path}:1: {name} of the kernel {kernel!r} is {value!r}; expected microseconds")
    assert isinstance(start, int | float) and isinstance(duration, int | float)
    args = _args(event)
    place = (args.get("device", event.get("pid")), args.get("stream", event.get("tid")))
    name = str(event.get("name"))
    return Work(name, float(start), float(start + duration), str(place[0]), str(place[1]), _id(event), args)


# -- what was launched ------------------------------------------------------------------------------------------------


def _launches(trace: Trace, operators: dict[int, Event], found: Found) -> None:
    """Tie kernels to GEMMs and collectives; count the rest by why it is of no use."""
    by_launch: dict[int, list[Work]] = {}
    for work in trace.works:
        if work.is_communication:
            call = _call(work, trace)
            trace.calls += [call] if isinstance(call, Call) else []
            found.left_out.update([call] if isinstance(call, str) else [])
        elif work.launch not in operators:
            found.left_out["kernels that no recorded operator launched (CUDA graphs are such)"] += 1
        else:
            by_launch.setdefault(work.launch, []).append(work)
    for launch, works in by_launch.items():
        gemm = _gemm(operators[launch], tuple(works))
        if isinstance(gemm, Gemm):
            trace.gemms.append(gemm)
            found.also("dtype", "bfloat16" if gemm.dtype.endswith("BFloat16") else "float16")
        else:
            found.left_out[gemm] += len(works)


def _gemm(operator: Event, works: tuple[Work, ...]) -> Gemm | str:
    name = str(operator.get("name"))
    if name not in OPERANDS:
        return "kernels of operators that are no GEMM"
    args = _args(operator)
    dims, types = args.get("Input Dims"), args.get("Input type")
    if not isinstance(dims, list) or not isinstance(types, list):
        return "GEMM kernels without recorded shapes (profile with record_shapes=True)"
    matrices = [dims[i] for i in OPERANDS[name] if i < len(dims) and _is_shape(dims[i])]
    dtype = str(types[OPERANDS[name][0]]) if OPERANDS[name][0] < len(types) else ""
    if len(matrices) < 2:
        return "GEMM kernels without recorded shapes (profile with record_shapes=True)"
    if dtype not in ELEMENT_BYTES:
        return f"GEMM kernels of element type {dtype or 'unknown'}"
    return _shaped(name, matrices[0], matrices[1], dtype, works)


def _is_shape(value: object) -> bool:
    return isinstance(value, list) and len(value) >= 2 and all(isinstance(v, int) and v > 0 for v in value)


def _shaped(name: str, left: list[int], right: list[int], dtype: str, works: tuple[Work, ...]) -> Gemm | str:
    """Rows, columns and inner length of the product."""
    if name == "aten::bmm" and left[0] > 1:
        return "kernels of batched GEMMs"
    inner, cols = (right[-1], right[-2]) if name == "aten::linear" else (right[-2], right[-1])
    if left[-1] != inner:
        return "GEMM kernels whose recorded shapes do not fit each other"
    rows = 1
    for extent in left[:-1]:
        rows *= extent
    gemm = Gemm((rows, cols, inner), dtype, works)
    return gemm if gemm.us > 0.0 else SHORT


def _call(work: Work, trace: Trace) -> Call | str:
    """A collective, from what NCCL's kernels carry; or why it is none."""
    args = work.args
    name = args.get("Collective name")
    if work.us <= 0.0:
        return SHORT
    if name is None:
        return "communication kernels without a description (profiler before PyTorch 2.3)"
    if name not in COLLECTIVES:
        return f"communication kernels of {str(name)[:40]}"
    elements, ranks = args.get("In msg nelems"), args.get("Group size")
    size = DTYPE_BYTES.get(str(args.get("dtype")), 0)
    numbers = [n for n in (elements, ranks) if isinstance(n, int) and not isinstance(n, bool) and n > 0]
    if len(numbers) < 2 or not size or numbers[1] < 2:
        return "communication kernels whose size, ranks or element type is not known"
    op = COLLECTIVES[name]
    num_bytes = numbers[0] * size * (numbers[1] if op == "all_gather" else 1)
    group = f"{args.get('Process Group Name', '')} {args.get('Process Group Ranks', '')}"
    return Call(op, num_bytes, numbers[1], group, trace.rank, work)
