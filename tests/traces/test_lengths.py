"""Length distributions: what users write, what is drawn, what is refused."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from traces.lengths import Empirical, Uniform, parse_lengths, read_lengths


def draw(text: str, num: int = 20_000) -> list[int]:
    """Sample the distribution that `text` describes."""
    return [int(value) for value in parse_lengths(text).sample(num, np.random.default_rng(0))]


def test_fixed_and_uniform_lengths() -> None:
    assert set(draw("128", 100)) == {128}
    drawn = draw("16:18")
    shares = [drawn.count(length) / len(drawn) for length in (16, 17, 18)]
    assert sum(shares) == 1.0
    assert shares == pytest.approx([1 / 3] * 3, abs=0.02)


def test_empirical_lengths_are_drawn_in_the_shares_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "lengths.txt"
    file.write_text("5\n5\n5\n900\n")
    drawn = draw(str(file))
    assert set(drawn) == {5, 900}
    assert drawn.count(5) / len(drawn) == pytest.approx(0.75, abs=0.02)


def test_a_column_of_a_gzip_file(tmp_path: Path) -> None:
    file = tmp_path / "lengths.csv.gz"
    file.write_bytes(gzip.compress(b"num_prefill_tokens,num_decode_tokens\n26,5\n72,693\n"))
    assert parse_lengths(f"{file}:num_decode_tokens") == Empirical((5, 693))
    assert read_lengths(file, "num_prefill_tokens") == (26, 72)


def test_one_named_column_needs_no_name(tmp_path: Path) -> None:
    file = tmp_path / "lengths.csv"
    file.write_text("tokens\n7\n")
    assert parse_lengths(str(file)) == Empirical((7,))


def test_outputs_may_be_zero_where_prompts_may_not() -> None:
    assert parse_lengths("0", minimum=0) == Uniform(0, 0)
    with pytest.raises(ValueError, match="starts below 1"):
        parse_lengths("0:4")


@pytest.mark.parametrize("text", ["", "1.5", "-4", "1:2:3", "nowhere.csv", "12 "])
def test_what_is_no_length_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not N, LOW:HIGH, a file or FILE:COLUMN"):
        parse_lengths(text)


def test_backward_range_says_how_to_write_it() -> None:
    with pytest.raises(ValueError, match="write 16:128"):
        parse_lengths("128:16")


@pytest.mark.parametrize(
    ("content", "column", "words"),
    [
        ("", "", ":1: the file is empty"),
        ("tokens\n", "", ":2: the file has a header but no lengths"),
        ("tokens\n5\n-3\n", "", ":3: '-3' is not a whole number"),
        ("5\n\n6.5\n", "", ":3: '6.5' is not a whole number"),
        ("5\n0\n", "", ":2: length 0 is below 1"),
        ("a,b\n1,2\n", "", ":1: which column holds the lengths.*a, b"),
        ("1,2\n", "", ":1: which column holds the lengths.*2 columns without names"),
        ("a,b\n1,2\n", "c", ":1: no column 'c'; found a, b"),
        ("a,b\n1,2\n3\n", "b", ":3: the row has 1 columns"),
    ],
)
def test_broken_length_files_name_the_line(tmp_path: Path, content: str, column: str, words: str) -> None:
    file = tmp_path / "lengths.csv"
    file.write_text(content)
    with pytest.raises(ValueError, match=f"lengths.csv{words}"):
        read_lengths(file, column)
