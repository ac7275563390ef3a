"""`weft trace` as a user meets it."""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

import pytest

from weft import trace_command


@pytest.fixture
def trace_file(tmp_path: Path) -> Path:
    """Eleven requests, one a second, of 100 prompt tokens; the last has 1000."""
    rows = [f"{second},{1000 if second == 10 else 100},{second}" for second in range(11)]
    file = tmp_path / "été.csv"
    file.write_text("arrival_s,prompt_tokens,output_tokens\n" + "\n".join(rows))
    return file


def run(*words: str | Path) -> int:
    """Parse the words after `weft` and run."""
    parser = argparse.ArgumentParser(prog="weft")
    trace_command.add_parser(parser.add_subparsers())
    args = parser.parse_args(["trace", *map(str, words)])
    return trace_command.run(args)


def row(text: str, label: str) -> list[str]:
    """The words after a label of the table."""
    (line,) = [line for line in text.splitlines() if line.strip().startswith(label)]
    return line.strip().removeprefix(label).split()


def test_table_and_plots(trace_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(trace_file) == 0
    text = capsys.readouterr().out
    assert row(text, "requests") == ["11"]
    assert row(text, "rate") == ["1.000", "/s"]
    assert row(text, "inter-arrival CV")[0] == "0.00"
    assert row(text, "prompt  ") == ["182", "100", "100", "910", "1,000"]
    assert row(text, "64 - 127")[:2] == ["90.9", "%"]
    (sparkline,) = [line for line in text.splitlines() if line.startswith("  |")]
    assert sparkline.count("█") == 11  # one column per arrival, none lost
    assert len(sparkline) == 64 + 4


def test_window_comes_before_the_rate_scale(trace_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(trace_file, "--start", "2", "--duration", "5", "--rate-scale", "4")
    text = capsys.readouterr().out
    assert row(text, "requests") == ["5"]
    assert row(text, "rate") == ["4.000", "/s"]


def test_a_terminal_without_blocks_gets_plain_characters(trace_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert run(trace_file) == 0
    sys.stdout.flush()
    text = raw.getvalue().decode("ascii")
    assert "\\xe9t\\xe9.csv" in text
    assert text.count("@") == 11
    assert "####" in text


def test_all_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "t.csv"
    file.write_text("0,5\n0,6\n")
    run(file, "--plot", tmp_path / "t.png")
    text = capsys.readouterr().out
    assert row(text, "rate") == ["all", "at", "once"]
    assert "arrivals over time" not in text
    assert "output" not in text


def test_a_lone_request_beside_a_crowd_still_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "t.csv"
    file.write_text("0,5\n" * 500 + "64,5\n")
    run(file)
    (sparkline,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  |")]
    assert sparkline.strip() == "|█" + " " * 62 + "▁|"


def test_plot_is_a_whole_png_and_refuses_other_names(trace_file: Path, tmp_path: Path) -> None:
    picture = tmp_path / "t.png"
    run(trace_file, "--plot", picture)
    content = picture.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert content.endswith(b"IEND\xaeB`\x82")
    with pytest.raises(ValueError, match=r"--plot t\.pdf: the picture is a PNG file"):
        run(trace_file, "--plot", "t.pdf")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["t.png", trace_file.name]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--start", "99"], "no request arrives from 99 s to inf s; the trace runs from 0 to 10.000 s"),
        (["--rate-scale", "0"], "rate scale 0 is not possible"),
        (["--duration", "nan"], "window duration nan s"),
        (["--spread-seed", "-1"], "--spread-seed -1 is negative"),
        (["--dataset-name", "azure"], ":1: azure needs the columns"),
    ],
)
def test_mistakes_are_one_clear_line(trace_file: Path, words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        run(trace_file, *words)
    assert "\n" not in str(caught.value)
