"""Settings that no ranks could follow are refused before any starts, in one line with file and field."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import pytest

from executor.settings import Settings, decode, encode
from models.transformer import Layout
from policy.options import Options
from tests.executor.worlds import beliefs, requests, run_of

ONE = requests(1)[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"requests": (replace(ONE, num_prompt_tokens=0),)}, "request 0 has 0 prompt tokens; it must be 1 or more"),
        ({"requests": (replace(ONE, num_prompt_tokens=-5),)}, "request 0 has -5 prompt tokens"),
        ({"requests": (ONE, ONE)}, "request id 0 is there twice"),
        ({"delay_seed": -1}, "delay_seed is -1; it must be 0 or more"),
        ({"options": Options(depth=10**9)}, "options.depth is 1000000000; it must be at most 256"),
        ({"profile": beliefs() | {"ctas": [16]}}, r"the profile's ctas are \[16\], but those of the run are \[0\]"),
        ({"profile": beliefs() | {"gemms": None}}, "gemms is not a list of objects"),
        ({"profile": {}}, "a profile table lacks 'name'"),
    ],
)
def test_settings_that_no_rank_could_follow(changes: dict[str, Any], message: str) -> None:
    good = run_of("interleaved", Layout(2, 1))
    decode(encode(Settings(runs=(good,))), "run.json")
    bad = Settings(runs=(msgspec.structs.replace(good, **changes),))
    with pytest.raises(ValueError, match=f"^run.json: .*{message}") as caught:
        decode(encode(bad), "run.json")
    assert "\n" not in str(caught.value)
