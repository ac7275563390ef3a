"""Rank 0's summary of a run: every rank's report, and whether they agree."""

from __future__ import annotations

from typing import Any

import numpy as np

from executor.execute import Driver
from executor.mail import Mail
from executor.order import compare
from executor.results import Output, Report
from executor.settings import run_flags
from traces.timeline import Timeline


def report_of(driver: Driver) -> Report:
    """What this rank has to say."""
    outputs = driver.device.parts.outputs
    return Report(
        driver.recorder.busy(np.array(driver.entered_idle_us)), driver.host, driver.device.order.settle(),
        driver.rounds.digest(), driver.recorder.spans, driver.recorder.completions, outputs.hashes,
        outputs.checksum() if outputs.hashes else "", outputs.num_wrong,
    )  # fmt: skip


def summarize(driver: Driver, mail: Mail, wall_s: float, about: dict[str, Any]) -> Output | None:
    """Rank 0's summary of everybody's reports; None on the others.

    Raises ValueError if ranks planned or issued different things, or computed numbers that are not finite.
    """
    reports = mail.gather("report", report_of(driver), Report)
    if not reports:
        return None
    for rank, report in enumerate(reports):
        if report.rounds_hash != reports[0].rounds_hash:
            raise ValueError(f"ranks 0 and {rank} planned different rounds from the same admissions")
        if report.num_wrong:
            raise ValueError(f"rank {rank} computed {report.num_wrong} logits that are not finite numbers")
    order_hash = compare([report.order for report in reports])
    output = next((report for report in reports if report.completions), reports[0])
    return Output(
        timeline=_timeline(driver, reports), log=driver.log, num_ranks=len(reports), rounds_hash=output.rounds_hash,
        order_hash=order_hash, checksum=output.checksum, hashes=output.hashes, busy=[r.busy for r in reports],
        host_times=[r.host for r in reports], wall_s=wall_s,
        flags=run_flags(driver.run), **about,
    )  # fmt: skip


def _timeline(driver: Driver, reports: list[Report]) -> Timeline:
    completions = [completion for report in reports for completion in report.completions]
    return Timeline(
        len(reports), completions, [span for report in reports for span in report.spans],
        start_us=min((c.request.arrival_us for c in completions), default=0.0),
        end_us=max((c.finished_us for c in completions), default=0.0),
        compute_us=sum(r.busy.compute_us for r in reports),
        communication_us=sum(r.busy.communication_us for r in reports),
        overlap_us=sum(r.busy.overlap_us for r in reports),
        num_kernels=sum(r.busy.num_kernels for r in reports),
        num_batches=driver.scheduler.num_batches, num_rounds=driver.scheduler.num_rounds,
    )  # fmt: skip
