"""The command line as a whole: mistakes are one line and exit code 2, help is there and light, pipes may close."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from weft import demo_command
from weft.cli import main

COMMANDS = ("demo", "simulate", "explore", "trace", "nodes", "run", "replay")
HEAVY = ("torch", "matplotlib", "simpy", "scipy", "joblib", "tqdm", "executor.launch")
ROOT = Path(__file__).resolve().parents[2]
GOOD = "arrival_s,prompt_tokens\n0,5\n1,5\n3,5\n"
BROKEN = "arrival_s,prompt_tokens\n0,5\n1,zero\n"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to run in; what a mistake leaves there is a mistake too."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_main(*words: str) -> int:
    try:
        return main(words)
    except SystemExit as stop:
        assert isinstance(stop.code, int)
        return stop.code


MISTAKES = [
    ([], "no command is given"),
    (["fly"], "invalid choice: 'fly'"),
    (["simulate", "--wings", "2"], "unrecognized arguments: --wings 2"),
    (["simulate", "--model", "gpt-9"], "model 'gpt-9' is neither a file nor one of: opt-30b,"),
    (["simulate", "--node", "moon"], "node 'moon' is neither a file nor one of: a100-nvlink-x4,"),
    (["simulate", "--policy", "magic"], "unknown policy 'magic'; choose from: tensor,"),
    (["simulate", "--policy", "tensor", "-pp", "2"], "policy tensor runs on one stage, but 2 pipeline stages"),
    (["simulate", "--policy", "tensor", "-tp", "3"], "cannot be divided over 3 ranks"),
    (["simulate", "--policy", "pipeline", "-tp", "8"], "TP8 x PP1 needs 8 ranks, but there are 4"),
    (["simulate", "--policy", "hybrid", "-tp", "4", "-pp", "4"], "TP4 x PP4 needs 16 ranks, but there are 4"),
    (["simulate", "-tp", "-1"], "-tp -1 is not possible"),
    (["simulate", "--request-rate", "-3"], "request rate is -3.0; it must be above 0"),
    (["simulate", "--request-rate", "nan"], "request rate is nan; it must be above 0"),
    (["simulate", "--request-rate", "0"], "--request-rate 0 asks for no requests"),
    (["simulate", "--request-rate", "fast"], "argument --request-rate: invalid float value: 'fast'"),
    (["simulate", "--num-prompts", "0"], "number of prompts is 0; it must be 1 or more"),
    (["simulate", "--burstiness", "0"], "burstiness 0 is not possible"),
    (["simulate", "--input-len", "128:16"], "length range 128:16 runs backwards; write 16:128"),
    (
        ["simulate", "--input-len", "9999"],
        "has 2048 positions; --max-input-len 2048 shortens such prompts",
    ),
    (["simulate", "--max-input-len", "-1"], "longest input is -1 tokens; it must be 1 or more, or 0 for no limit"),
    (["simulate", "--seed", "-1"], "seed -1 is negative"),
    (["simulate", "--batch-size", "0"], "policy option batch_size is 0; it must be a whole number, 1 or more"),
    (["simulate", "--batch-size", "two"], "--batch-size: batch_size is 'two'; it must be a whole number"),
    (
        ["simulate", "--partition", "99999"],
        "policy option partition (--partition) is 99999, but a GPU of a100-pcie-x4 has 108 SMs; give at most 107",
    ),
    (
        ["simulate", "--comm-ctas", "109"],
        "(--comm-ctas) is 109, but a GPU of a100-pcie-x4 has 108 SMs; give at most 108",
    ),
    (["explore", "--partition", "108"], "has 108 SMs; give at most 107"),
    (["run", "--backend", "gloo", "--partition", "8"], "--partition 8 needs GPUs"),
    (
        ["simulate", "--policy-option", "pad_to=1000000000000"],
        "policy option pad_to is 1000000000000; prompts cannot be padded beyond the 2048 positions of glm-130b",
    ),
    (["explore", "--policy-option", "pad_to=4096"], "beyond the 2048 positions of glm-130b; give at most 2048"),
    (["simulate", "--max-wait-ms", "-1"], "policy option max_wait_us is -1000.0; it must be 0.0 or more"),
    (["simulate", "--sync", "never"], "policy option sync is 'never'; choose from hybrid, cpu-gpu, inter-stream"),
    (
        ["simulate", "--policy-option", "speed=9"],
        "--policy-option 'speed=9' is not NAME=VALUE with a NAME of: batch_size",
    ),
    (["simulate", "--policy-option", "depth"], "--policy-option 'depth' is not NAME=VALUE"),
    (["simulate", "--policy-option", "adaptive=maybe"], "adaptive is 'maybe'; it must be on or off"),
    (["simulate", "--depth", "2", "--policy-option", "depth=3"], "policy option depth is given twice"),
    (["simulate", "--dataset-name", "azure"], "dataset azure needs a file: give --dataset-path"),
    (["simulate", "--dataset-path", "none.csv"], "none.csv: No such file or directory"),
    (["simulate", "--dataset-name", "random", "--dataset-path", "x.csv"], "--dataset-name random reads no file"),
    (["simulate", "--dataset-path", "x.csv", "--burstiness", "2"], "--burstiness shapes random requests"),
    (["simulate", "--start", "5"], "--start cuts or bends a trace file, but requests are random"),
    (["explore", "--duration", "5"], "--duration cuts or bends a trace file, but requests are random"),
    (["simulate", "--burstiness-scale", "2"], "--burstiness-scale cuts or bends a trace file, but requests are random"),
    (["simulate", "--dataset-path", "{good}", "--start", "-1"], "window start -1 s is not possible"),
    (["explore", "--dataset-path", "{good}", "--start", "9"], "no request arrives from 9 s to inf s"),
    (["simulate", "--dataset-path", "{good}", "--duration", "0"], "window duration 0 s is not possible"),
    (["simulate", "--dataset-path", "{good}", "--burstiness-scale", "0"], "burstiness scale 0 is not possible"),
    (["simulate", "--dataset-path", "{broken}"], "broken.csv:3: 'zero' is not a whole number of tokens"),
    (["simulate", "--metric-percentiles", "101"], "--metric-percentiles '101' is not a list of numbers from 0 to 100"),
    (["simulate", "--save-result", "--metadata", "x"], "--metadata 'x' is not KEY=VALUE"),
    (["simulate", "--timeline", "t.txt"], "--timeline t.txt: the file must be named *.json or *.json.gz"),
    (["simulate", "--timeline", "no/t.json"], "no/t.json: no is not a folder; make it first"),
    (["simulate", "--result-filename", "no/r.json"], "no/r.json: no is not a folder; make it first"),
    (["simulate", "--timeline", ".json"], "--timeline .json: the file must be named *.json or *.json.gz"),
    (["run", "--timeline", "t.txt"], "--timeline t.txt: the file must be named *.json or *.json.gz"),
    (["simulate", "--result-filename", ""], "--result-filename is empty; give the name of a file"),
    (["run", "--result-filename", ""], "--result-filename is empty; give the name of a file"),
    (["simulate", "--result-filename", "/dev/null"], "/dev/null is not a plain file"),
    (
        ["simulate", "--result-filename", "a.json", "--timeline", "./a.json"],
        "a.json and a.json would be written over each other",
    ),
    (
        ["simulate", "--result-filename", "a.rank1.json", "--timeline", "a.json"],
        "a.rank1.json and a.json would be written over each other",
    ),
    (["simulate", "--metadata", "model_id=x"], "--metadata 'model_id=x': the result has a number or name model_id"),
    (["simulate", "--metadata", "p25_e2el_ms=x"], "the result has a number or name p25_e2el_ms of its own"),
    (["simulate", "--metadata", "who=x", "who=y"], "--metadata 'who=y': who is given twice"),
    (["simulate", "--metadata", "label=x", "--label", "y"], "--metadata 'label=x': label is given twice"),
    (["simulate", "--result-dir", "{broken}", "--save-result"], "broken.csv is not a folder"),
    (["simulate", "--result-dir", ".", "--result-filename", "."], ". is a folder; give the name of a file"),
    (
        ["explore", "--policy", "tensor", "tensor"],
        "policies to explore are tensor, tensor; name one or more, each once",
    ),
    (["explore", "--policy", "magic"], "unknown policy 'magic'"),
    (["explore", "--request-rate", "5", "0"], "request rate 0 is not possible here"),
    (["explore", "--request-rate", "inf"], "request rate inf is not possible here"),
    (["explore", "--model", "opt-30b", "moon"], "model 'moon' is neither"),
    (["explore", "--input-len", "4000"], "has 4000 prompt tokens, but glm-130b has 2048 positions"),
    (["explore", "-j", "0"], "-j 0 is not possible"),
    (["explore", "--scheduler", "tcp://x:1"], "--scheduler tcp://x:1 needs --backend dask or ray"),
    (["explore", "--out", "{broken}"], "broken.csv is not a folder"),
    (["explore", "--format", "gif"], "invalid choice: 'gif'"),
    (["nodes", "mars"], "node 'mars' is neither a file nor one of"),
    (["trace", "none.csv"], "none.csv: No such file or directory"),
    (["trace", "{good}", "--plot", "no/x.png"], "no/x.png: no is not a folder; make it first"),
    (["demo", "--out", "/dev/null/x"], "/dev/null is not a folder"),
    (["run", "--backend", "gloo", "--read-output", ""], "argument --read-output: it is empty; give a name"),
    (["run", "--backend", "gloo", "--bind-address", ""], "--bind-address is empty; give an address of this machine"),
    (
        ["run", "--backend", "gloo", "--bind-address", "::1"],
        "--bind-address ::1 cannot be resolved to an IPv4 address (",
    ),
    (
        ["run", "--backend", "gloo", "--bind-address", "nosuch.host.invalid"],
        "--bind-address nosuch.host.invalid cannot be resolved to an IPv4 address (",
    ),
    (["run", "--model", ""], "--model is empty; give a model id or a JSON file"),
    (["run", "--checkpoint", ""], "argument --checkpoint: it is empty; give a name"),
    (["run", "--request-rate", "1e-9"], "request rate 1e-09 is not possible; give 1e-06 or more requests per second"),
    (
        ["simulate", "--burstiness", "1e-9"],
        "burstiness 1e-09 is not possible; give a gamma shape of 1e-06 (1: Poisson) to inf",
    ),
    (
        ["run", "--write-settings", "plain"],
        "--write-settings plain: give the name an ending, as in plain.json; plain will be the results' folder",
    ),
    (
        ["run", "--write-settings", "{good}", "--read-output", "x"],
        "--write-settings is for before the ranks run and --read-output for after; give one of them",
    ),
    (
        ["run", "--write-settings", "s.json", "--save-result", "--result-filename", "q.json"],
        "--write-settings runs nothing, so there is no result for --save-result, --result-filename; give it to --read",
    ),
    (["run", "--backend", "gloo", "--port", "99999999"], "--port 99999999 is not possible; give 1 to 65535, or 0"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES)
def test_a_mistake_is_one_line_and_writes_nothing(
    words: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = folder.parent / f"{folder.name}-broken.csv"
    broken.write_text(BROKEN)
    good = folder.parent / f"{folder.name}-good.csv"
    good.write_text(GOOD)
    assert run_main(*(word.format(broken=broken, good=good) for word in words)) == 2
    said = capsys.readouterr()
    assert said.err.startswith("weft: error: ")
    assert message in said.err
    assert said.err.count("\n") == 1
    assert "Traceback" not in said.err
    assert said.out == ""
    assert list(folder.iterdir()) == []


def test_settings_whose_folder_is_a_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "s").write_text("mine")
    assert run_main("run", "--backend", "gloo", "--write-settings", "s.json") == 2
    assert capsys.readouterr().err == (
        "weft: error: --write-settings s.json: results would go to s, which is no folder; give another name\n"
    )
    assert [path.name for path in folder.iterdir()] == ["s"]


def test_a_node_file_with_a_mistake_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "my.toml").write_text("name = 'my'\nnum_gpus = 'four'\n")
    assert run_main("simulate", "--node", "my.toml") == 2
    assert "my.toml: not a node file" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_there_and_imports_nothing_heavy(command: str) -> None:
    code = f"import sys; from weft.cli import main; main([{command!r}, '--help'])"
    check = f"import atexit, sys; atexit.register(lambda: print([m for m in {HEAVY} if m in sys.modules]))\n{code}"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True, cwd=ROOT)
    assert f"usage: weft {command}" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
    assert done.stderr == ""


def test_the_overview_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main("--help") == 0
    text = capsys.readouterr().out
    assert all(f"\n    {command} " in text for command in COMMANDS)
    assert run_main("--version") == 0


def test_a_reader_that_leaves_is_no_error() -> None:
    weft = [sys.executable, "-m", "weft.cli", "nodes", "a100-pcie-x4"]
    done = subprocess.run(
        ["bash", "-c", '"$@" | true; exit ${PIPESTATUS[0]}', "-", *weft], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode in (0, 141)
    assert done.stderr == ""


def test_an_interrupt_has_the_shells_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(args: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_command, "run", interrupt)
    assert run_main("demo") == 130
    assert capsys.readouterr().err == "weft: interrupted\n"


def test_a_termination_ends_as_an_interrupt_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def terminate(args: object) -> int:
        assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL, "the signal would end the tests"
        signal.raise_signal(signal.SIGTERM)
        return 0

    monkeypatch.setattr(demo_command, "run", terminate)
    assert run_main("demo") == 130
    assert capsys.readouterr().err == "weft: interrupted\n"
    assert signal.getsignal(signal.SIGTERM) == before


def test_an_interrupt_while_commands_are_imported_is_one_line() -> None:
    """Ctrl-C in the first second, while Python still reads the commands."""
    code = (
        "import importlib.abc, sys\n"
        "class Interrupted(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'weft.run_command':\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupted())\n"
        "from weft.cli import main\n"
        "sys.exit(main(['run']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (130, "weft: interrupted\n")


@pytest.mark.parametrize(
    ("package", "command", "extra"),
    [
        ("torch", ["run", "--num-prompts", "2"], "executor"),
        ("scipy", ["validate", "--node", "a100-pcie-x4", "--measurements", "."], "calibration"),
    ],
)
def test_what_a_plain_install_lacks_is_named_with_its_extra(package: str, command: list[str], extra: str) -> None:
    code = (
        "import importlib.abc, sys\n"
        "class Missing(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        f"        if name.partition('.')[0] == '{package}':\n"
        f"            raise ModuleNotFoundError('no', name='{package}')\n"
        "sys.meta_path.insert(0, Missing())\n"
        "from weft.cli import main\n"
        f"sys.exit(main({command}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    told = (
        f"weft: error: this needs {package}, which is not installed; install the extra: pip install -e '.[{extra}]'\n"
    )
    assert (done.returncode, done.stderr) == (2, told)


def test_nodes_show_every_number_and_mark_estimates(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main("nodes") == 0
    overview = capsys.readouterr().out
    assert "a100-pcie-x4" in overview
    assert "h200-nvlink-x4" in overview
    assert run_main("nodes", "a100-pcie-x4") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "  device.num_sms                 108" in lines
    marked = [line for line in lines if line.startswith("~ contention.gemm_by_comm")]
    assert len(marked) == 1
