"""A rank of the GPU suite that measures inside the rank, started through the executor's launcher:
`gpu_rank.py WHAT ROWS_FILE --settings ...`; rank 0 writes a row per run of the settings."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu_forward import two_batches
from benchmarks.gpu_probe import costs
from executor.__main__ import main
from executor.session import Opened, Session

MEASURES: dict[str, Callable[[Session, Opened], dict[str, Any]]] = {"forward": two_batches, "probe": costs}


def measuring(what: str, rows: Path) -> Callable[[Session], None]:
    """What the rank does instead of serving requests."""

    def work(session: Session) -> None:
        for number, run in enumerate(session.settings.runs):
            session.mail.begin(f"{what}/{number}")
            session.status.enter(f"{what} {number}")
            opened = session.open(run)
            values = MEASURES[what](session, opened)
            if session.place.rank == 0:
                about = {
                    "model": run.model.model_id,
                    "num_layers": run.model.num_layers,
                    "rows": opened.shapes[-1].rows,
                }
                with rows.open("a") as file:
                    file.write(json.dumps(about | values, default=float) + "\n")
            session.mail.together("done")

    return work


if __name__ == "__main__":
    arguments = sys.argv[1:3]
    del sys.argv[1:3]
    os._exit(main(measuring(arguments[0], Path(arguments[1]))))
