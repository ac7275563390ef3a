"""Tensor, pipeline and hybrid parallelism: one batch after another through every stage, no overlap between batches."""

from __future__ import annotations

from itertools import pairwise

from models.kernel import FunctionVector, Kind
from policy.batch import Batch, State
from policy.options import Options
from policy.profile import Profile
from policy.round import Lane, Launch, Mark, Round

# The host wakes when this part of the layers is left; of a stage among several, so many: a batch that is chosen early
# is chosen among fewer requests.
WAKE_UP_SHARE, LAYERS_TO_WAKE = 4, 2


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
    """One stage's forward: receives, computation and sends, each on its lane."""
    vector, launches = batch.vectors[stage], list[Launch]()
    for first, last in pairwise(_cuts(vector, stage) if capture else _run_by_run(vector)):
        comm = vector.kernels[first].is_communication and vector.run_end[first] == last
        lane = Lane.COMM if comm else Lane.COMPUTE
        waits = (Mark(batch.batch_id, first, 0.0, stage),) if launches and launches[-1].lane is not lane else ()
        launches.append(
            Launch(batch.batch_id, first, last, lane, waits, stage=stage,
                   captured=capture and not comm and last - first > 1)
        )  # fmt: skip
    return launches


def _run_by_run(vector: FunctionVector) -> list[int]:
    cuts = [0]
    while cuts[-1] < len(vector):
        cuts.append(vector.run_end[cuts[-1]])
    return cuts


def _cuts(vector: FunctionVector, stage: int) -> list[int]:
    """What lies between receiving and sending is one graph, collectives and all. On the first stage its last layers are
    another: the mark between them is where the host wakes. A pipeline's wakes when that stage has been computed."""
    begin = vector.run_end[0] if vector.kernels[0].kind is Kind.RECV else 0
    end = len(vector)
    while vector.kernels[end - 1].kind is Kind.SEND:
        end -= 1
    is_single = stage == 0 and end == len(vector)
    layers = max(1, vector.num_layers // WAKE_UP_SHARE) if is_single else LAYERS_TO_WAKE
    tail = len(vector.prologue) + (vector.num_layers - layers) * len(vector.layer)
    is_cut = stage == 0 and begin < tail < end and (is_single or vector.run_end[begin] < end)
    return sorted({0, begin, end, len(vector)} | ({tail} if is_cut else set()))
