"""Tensor, pipeline and hybrid parallelism: one batch after another through every stage, no overlap between batches."""

from __future__ import annotations

from itertools import pairwise

from policy.batch import Batch, State
from policy.options import Options
from policy.profile import Profile
from policy.round import Lane, Launch, Mark, Round

# The host wakes when this part of the layers is left.
WAKE_UP_SHARE = 4


def plan(state: State, options: Options, profile: Profile) -> tuple[Round, State]:
    """Issue the whole forward of the oldest batch on every stage.

    Stages follow one another through their sends and receives. The host wakes before the first stage is through, so
    that the next batch is launched behind this one without a gap.
    """
    batch = state.flights[0].batch
    launches = [
        launch for stage in range(len(batch.vectors)) for launch in _forward(batch, stage, capture=options.capture)
    ]
    marks = _wake_up(launches, options)
    held = (*state.held, marks)
    ahead = {"hybrid": 0, "cpu-gpu": 0, "inter-stream": 1 + options.run_ahead}[options.sync]
    synchronize, held = (held[0], held[1:]) if len(held) > ahead else ((), held)
    return Round(0, tuple(launches), synchronize), State(state.flights[1:], held=held)


def _wake_up(launches: list[Launch], options: Options) -> tuple[Mark, ...]:
    """Hybrid: when the last launch of the first stage's computation begins. Otherwise: when its computation has ended.

    A send is not waited for: the next batch computes while it is under way.
    """
    own = [launch for launch in launches if launch.stage == 0]
    first = [launch for launch in own if launch.lane is Lane.COMPUTE] or own
    if options.sync == "hybrid" and len(first) > 1:
        return (first[-2].mark,)
    return (first[-1].mark,)


def _forward(batch: Batch, stage: int, *, capture: bool) -> list[Launch]:
    """One stage's forward: receives, computation and sends, each run on its lane.

    With a single stage and capture, the layers with their collectives are one graph, and the last quarter of them
    another: the mark between them is where the host wakes. Launching a graph takes its time per kernel (about a tenth
    of the time that the graph runs, on 4 x H200), which a single layer is too short to hide.
    """
    vector = batch.vectors[stage]
    if len(batch.vectors) == 1 and capture:
        layers = max(1, vector.num_layers // WAKE_UP_SHARE)
        tail = len(vector) - len(vector.epilogue) - layers * len(vector.layer)
        cuts = [0, tail, len(vector)] if 0 < tail < len(vector) else [0, len(vector)]
        return [Launch(batch.batch_id, a, b, Lane.COMPUTE, stage=stage, captured=True) for a, b in pairwise(cuts)]
    launches: list[Launch] = []
    start = 0
    while start < len(vector):
        end = vector.run_end[start]
        comm = vector.kernels[start].is_communication
        waits = (Mark(batch.batch_id, start, 0.0, stage),) if start else ()
        launches.append(
            Launch(batch.batch_id, start, end, Lane.COMM if comm else Lane.COMPUTE, waits, stage=stage,
                   captured=capture and not comm and end - start > 1)
        )  # fmt: skip
        start = end
    return launches
