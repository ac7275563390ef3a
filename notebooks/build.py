"""Builds the .ipynb beside every notebook source: run, with its pictures, and the same bytes every time."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import jupytext
import matplotlib.font_manager  # noqa: F401  # builds its cache now rather than with a warning in a cell
import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent
CELL_TIMEOUT_S = 1800


def read(source: Path) -> Any:
    """The notebook of a source, not run, with cell ids that only depend on a cell's place."""
    notebook = jupytext.read(source)
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number:03d}"
    # Versions of tools would change the file without a change of the notebook.
    notebook.metadata["jupytext"] = {"formats": "ipynb,py:percent"}
    return notebook


def check(notebook: Any) -> None:
    """Raises ValueError if a cell warned: a page to be read shows results only."""
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if output.get("name") == "stderr":
                raise ValueError(f"{cell['id']} writes to stderr: {output['text'].strip()}")


def build(source: Path) -> Path:
    """Run a source from the top of the checkout and write what it shows."""
    notebook = read(source)
    where = {"metadata": {"path": str(HERE.parent)}}
    client = NotebookClient(
        notebook, timeout=CELL_TIMEOUT_S, kernel_name="python3", record_timing=False, resources=where
    )
    client.execute()
    notebook.metadata.pop("language_info", None)
    check(notebook)
    target = source.with_suffix(".ipynb")
    partial = target.with_suffix(".partial")
    nbformat.write(notebook, partial)
    partial.replace(target)
    return target


def main() -> None:
    """Build all notebooks, or those named, at their full size."""
    os.environ.pop("WEFT_NOTEBOOK_PROMPTS", None)
    named = [Path(name) for name in sys.argv[1:]]
    for source in named or sorted(path for path in HERE.glob("*.py") if path.name != Path(__file__).name):
        started = time.perf_counter()
        print(f"wrote {build(source).name} in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
