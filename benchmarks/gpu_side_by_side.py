"""What computation of two batches costs each other where both run side by side on one GPU, as a fill does that goes on
beyond its window. One JSON line for every pair of parts of a layer, with and without SMs withheld from both.

python benchmarks/gpu_side_by_side.py side-by-side.jsonl

The kernels are those of one of two ranks, each batch's on its own stream, each through all layers again and again.
`alone_us` and `beside_us`: microseconds of a layer's part, of one batch and of the other, under load. `gain`: what both
are through together, as a multiple of what one at a time is; 1 where nothing is gained.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from executor.cuda import elapsed_us, hold, new_event, on, settle
from executor.graphs import capture
from executor.inputs import tokens_of
from executor.kernels import bind
from executor.lanes import StreamKey
from executor.lanes_cuda import CudaLanes
from executor.operations import Collective, ComputeKernel, Operation
from executor.slots import Slot
from executor.survey_bed import batch_of
from executor.warm_up import made_up_requests
from executor.weights import Weights, make_weights
from models.config import MODELS
from models.kernel import FunctionVector
from models.transformer import BatchShape, Layout, function_vector
from policy.batch import Batch
from policy.round import Lane

LAYOUT, LARGEST = Layout(2, 1), BatchShape(8, 64)
CELLS = (("opt-30b", 8), ("glm-130b", 4))
ROWS, WITHHELD = (64, 128, 256, 512), (0, 16)
# Parts of a layer by the names of their first and last kernels.
PARTS = {
    "attention half": ("attn_norm", "out_proj"),
    "feed-forward half": ("ffn_norm", "fc2"),
    "fc1": ("fc1", "fc1"),
    "norm": ("ffn_norm", "ffn_norm"),
    "attention": ("attention", "attention"),
}
PAIRS = (
    ("attention half", "feed-forward half"), ("feed-forward half", "feed-forward half"), ("fc1", "fc1"),
    ("fc1", "norm"), ("fc1", "attention"),
)  # fmt: skip
# Both are kept busy for so long before they are timed, and as long while they are.
LOAD_US = 60e3
HEAD_START_CYCLES = 4_000_000


class Track:
    """A batch's kernels again and again on a stream of its own."""

    def __init__(self, stream: torch.cuda.Stream, kernels: Sequence[ComputeKernel], layers: int) -> None:
        self.stream, self.layers = stream, layers

        def body() -> None:
            for kernel in kernels:
                kernel(None)

        with torch.inference_mode(), on(stream):
            body()
            torch.cuda.synchronize()
            self._graph = capture(torch.cuda.graph_pool_handle(), body)

    def launch(self, count: int, behind: torch.cuda.Event) -> list[torch.cuda.Event]:
        """Replay it so many times behind an event; the end of each."""
        ends = [new_event(timing=True) for _ in range(count)]
        with on(self.stream):
            self.stream.wait_event(behind)
            for end in ends:
                self._graph.replay()
                end.record(self.stream)
        return ends


def race_us(tracks: Sequence[Track], counts: Sequence[int]) -> list[float]:
    """Microseconds of a layer's part on each track, over the time in which all of them run."""
    gate, start = torch.cuda.current_stream(), new_event(timing=True)
    torch.cuda.synchronize()
    hold(HEAD_START_CYCLES)
    start.record(gate)
    events = [track.launch(count, start) for track, count in zip(tracks, counts, strict=True)]
    torch.cuda.synchronize()
    ends = [[elapsed_us(start, event) for event in each] for each in events]
    until = min(each[-1] for each in ends)
    return [until / passed(each, until) / track.layers for each, track in zip(ends, tracks, strict=True)]


def passed(ends: Sequence[float], until: float) -> float:
    """How many replays were through by then, the one that was under way in part."""
    whole = sum(end <= until for end in ends)
    if whole == len(ends):
        return float(whole)
    before = ends[whole - 1] if whole else 0.0
    return whole + (until - before) / (ends[whole] - before)


def under_load_us(tracks: Sequence[Track], each_us: Sequence[float]) -> list[float]:
    """The same, of GPUs that have been doing it for a while. `each_us`: about what a replay takes on each track."""
    counts = [max(2, int(LOAD_US / us)) for us in each_us]
    race_us(tracks, counts)
    return race_us(tracks, counts)


def parts_of(vector: FunctionVector, operations: Sequence[Operation]) -> dict[str, list[ComputeKernel]]:
    """The kernels of every part, through all layers."""
    names = [kernel.name for kernel in vector.layer]
    parts: dict[str, list[ComputeKernel]] = {}
    for part, (first, last) in PARTS.items():
        inside = set(names[names.index(first) : names.index(last) + 1])
        found = [op for kernel, op in zip(vector.kernels, operations, strict=True) if kernel.name in inside]
        parts[part] = [op for op in found if not isinstance(op, Collective)]
    return parts


def lines(
    name: str, layers: int, rows: int, weights: Weights, slots: Sequence[Slot], lanes: CudaLanes
) -> Iterator[dict[str, Any]]:
    """The lines of one shape."""
    config, shape = replace(MODELS[name], num_layers=layers), batch_of(rows)
    vector = function_vector(config, shape, LAYOUT, 0)
    batch = Batch(0, made_up_requests(shape), shape, (vector,), 0.0, 0)
    parts = []
    for number, slot in enumerate(slots):
        slot.load(shape, slot.pack(shape, *tokens_of(batch, config, 1)))
        found = parts_of(vector, bind(config, LAYOUT, 0, weights, slot, shape))
        # The other batch is half the model ahead, so that neither finds in the cache what the other has just read.
        parts.append({part: rotated(kernels, number * len(kernels) // 2) for part, kernels in found.items()})
    for withheld in WITHHELD:
        streams = [lanes.stream(StreamKey(lane, withheld)) for lane in (Lane.COMPUTE, Lane.FILL)]
        tracks = [
            {part: Track(stream, kernels, layers) for part, kernels in each.items()}
            for stream, each in zip(streams, parts, strict=True)
        ]
        alone = [{part: _alone_us(track) for part, track in each.items()} for each in tracks]
        for one, two in PAIRS:
            pair, us = (tracks[0][one], tracks[1][two]), [alone[0][one], alone[1][two]]
            beside = under_load_us(pair, [u * layers for u in us])
            gain = sum(a / b for a, b in zip(us, beside, strict=True))
            yield {"model": name, "num_layers": layers, "rows": rows, "withheld_sms": withheld, "one": one, "two": two,
                   "alone_us": us, "beside_us": beside, "gain": gain}  # fmt: skip


def rotated(kernels: list[ComputeKernel], by: int) -> list[ComputeKernel]:
    """The same in a circle, from another one on."""
    return kernels[by:] + kernels[:by]


def _alone_us(track: Track) -> float:
    guess = race_us([track], [2])[0]
    return under_load_us([track], [guess * track.layers])[0]


def main() -> None:
    """Every cell, a line a pair."""
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    lanes = CudaLanes(device, priority=True)
    about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    with Path(sys.argv[1]).open("w") as file:
        for name, layers in CELLS:
            config = replace(MODELS[name], num_layers=layers)
            weights = make_weights(config, LAYOUT, 0, device, torch.float16, 1)
            slots = [Slot.allocate(config, LAYOUT, 0, LARGEST, device, torch.float16) for _ in range(2)]
            settle(device)
            for rows in ROWS:
                for line in lines(name, layers, rows, weights, slots, lanes):
                    file.write(json.dumps(about | line) + "\n")
                    file.flush()
                    print(line, flush=True)


if __name__ == "__main__":
    main()
