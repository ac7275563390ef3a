"""SM partitions: what a stream of one asks the GEMM library for, and which are tried out before a run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch._C._distributed_c10d import HashStore

from executor import cuda
from executor.cuda import enter, on
from executor.device import Device
from executor.lanes_cuda import given_sms
from executor.mail import Mail
from executor.plan_cache import Plan
from executor.rehearsal import Choice, Rehearsal, overlap, rehearsed, worth_rehearsing
from models.transformer import Layout
from policy.options import Options, WholeSegments
from policy.profile_table import profile_from
from policy.regime import RegimeOf
from sim.cost import partition_sms
from sim.spec import load_node, node_names
from tests.executor.worlds import beliefs, run_of


class Library:
    """Torch's knobs, and what they were set to."""

    def __init__(self) -> None:
        self.carveout: int | None = None
        self.asked: list[tuple[int | None, str]] = []

    def _get_sm_carveout_experimental(self) -> int | None:
        return self.carveout

    def _set_sm_carveout_experimental(self, value: int | None) -> None:
        self.carveout = value

    def prefer(self, name: str) -> None:
        self.asked.append((self.carveout, name))


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    library = Library()
    current: list[Any] = ["the first stream"]
    monkeypatch.setattr(cuda, "_core", library)
    monkeypatch.setattr(torch.backends.cuda, "preferred_blas_library", library.prefer)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: current.__setitem__(0, stream))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current[0])
    return library


def stream_without(withheld_sms: int) -> Any:
    return SimpleNamespace(withheld_sms=withheld_sms)


def test_gemms_are_made_for_the_sms_of_their_stream_and_for_all_elsewhere(library: Library) -> None:
    whole: Any = object()
    enter(whole)
    assert library.asked == []  # the library is left as it was
    with on(stream_without(12)):
        assert library.carveout == 12
        enter(stream_without(12))  # asks no second time
        enter(stream_without(28))
    assert library.carveout is None
    assert library.asked == [(12, "cublaslt"), (28, "cublaslt"), (None, "default")]


def test_an_error_leaves_no_partition_behind(library: Library) -> None:
    with pytest.raises(ValueError, match="broken"), on(stream_without(12)):
        raise ValueError("broken")
    assert library.carveout is None


def test_without_the_knob_streams_still_serve(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_core", object())
    enter(stream_without(12))
    assert library.asked == [] and torch.cuda.current_stream().withheld_sms == 12  # type: ignore[attr-defined]


@pytest.mark.parametrize(("asked", "capability", "given"), [
    (116, (9, 0), 120), (120, (9, 0), 120), (124, (9, 0), 128), (92, (8, 0), 92), (91, (8, 0), 92), (148, (10, 0), 152),
])  # fmt: skip
def test_a_partition_has_whole_groups_of_sms(asked: int, capability: tuple[int, int], given: int) -> None:
    assert given_sms(asked, capability) == given


@pytest.mark.parametrize("name", [name for name in node_names() if name.startswith("h200")])
def test_the_nodes_of_a_gpu_leave_as_many_sms_as_it_does(name: str) -> None:
    """Where 124 SMs stood for 128, GEMMs of 128 CTAs had a second wave, in which collectives cost nothing."""
    device = load_node(name).device
    for withheld in (8, 16, 24, 32):
        assert partition_sms(device, withheld) == given_sms(device.num_sms - withheld, (9, 0))


CHOICES = st.dictionaries(st.tuples(st.sampled_from([0, 8, 16, 32]), st.sampled_from([0, 8, 16])), st.floats(1.0, 1e6),
                          min_size=1)  # fmt: skip


@hypothesis.given(CHOICES)
def test_what_is_rehearsed_are_all_partitions_and_the_best_belief_of_other_numbers_of_ctas(
    believed: dict[Choice, float],
) -> None:
    found, least = worth_rehearsing(believed), min(ctas for _, ctas in believed)
    assert len(set(found)) == len(found) and set(found) <= set(believed)
    assert {choice for choice in believed if choice[1] == least} <= set(found)
    for ctas in {ctas for _, ctas in believed} - {least}:
        (only,) = [choice for choice in found if choice[1] == ctas]
        assert believed[only] == min(us for choice, us in believed.items() if choice[1] == ctas)


Times = dict[tuple[Choice, bool], float]


class Timed(Rehearsal):
    """A rehearsal on a device that takes so long, by choice and by whether fills may be of whole segments."""

    truth: Times

    def timed_us(self, options: Options, plan: Plan) -> list[float]:
        choice = options.partition, options.comm_ctas
        return [self.truth[choice, options.whole_segments == "on"] if plan is overlap else SERIAL_US] * 2

    def believed_us(self, options: Options, regime_of: RegimeOf) -> float:
        return 1.0

    def beliefs_us(self) -> dict[Choice, float]:
        return {choice: us for (choice, whole), us in self.truth.items() if whole}


SERIAL_US = 100.0
TRUTH = st.fixed_dictionaries(
    {((withheld, 0), whole): st.floats(1.0, 1e3) for withheld in (0, 8, 16) for whole in (True, False)}
)


@hypothesis.given(TRUTH, st.sampled_from(["auto", "on", "off"]))
def test_of_what_was_rehearsed_the_fastest_is_left(truth: Times, asked: WholeSegments) -> None:
    run = run_of("interleaved", Layout(2, 1), options=Options(whole_segments=asked))
    rehearsal = Timed(run, cast(Device, None), profile_from(beliefs()), ())
    rehearsal.truth = truth
    left = rehearsed(rehearsal, Mail(HashStore(), 0, 1, 1.0))
    (withheld,), (ctas,), whole = left["partitions"], left["ctas"], left["whole_segments"]
    found_us = truth[(withheld, ctas), whole]
    # Keeping to windows is tried beside the best choice only, and nothing is that the options rule out.
    assert found_us == min(us for (_, w), us in truth.items() if w == (asked != "off")) or (asked, whole) == (
        "auto",
        False,
    )
    assert asked == "auto" or whole == (asked == "on")
    assert found_us <= truth[(withheld, ctas), True] or asked != "auto"
    assert left["overlap_price"] == pytest.approx(found_us / SERIAL_US)
    profile = profile_from(beliefs() | left)
    assert (profile.partitions, profile.ctas, profile.whole_segments) == ((withheld,), (ctas,), whole)
