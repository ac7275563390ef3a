"""What does not fit is said before it is made."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from executor.room import check_room
from models.config import MODELS
from models.transformer import Layout


def test_weights_that_do_not_fit_are_refused_and_half_of_them_may_fit(tmp_path: Path) -> None:
    told, layout = tmp_path / "meminfo", Layout(2, 1)
    told.write_text("MemTotal: 99 kB\nMemAvailable: 83886080 kB\n")  # 80 GiB
    check_room(MODELS["opt-30b"], layout, torch.float16, told=told)
    with pytest.raises(ValueError, match=r"opt-30b take 112 GiB on 2 ranks, and this machine has 80\.0 GiB free"):
        check_room(MODELS["opt-30b"], layout, torch.float32, told=told)


def test_where_nobody_says_what_is_free_nothing_is_refused(tmp_path: Path) -> None:
    check_room(MODELS["glm-130b"], Layout(), torch.float32, told=tmp_path / "nothing")
