"""A rank of `weft measure`: rank 0 leads, all measure the same points at the same time, rank 0 keeps what it found.

Started like a rank of a run, as `python -m executor.survey ORDERS --settings ...`; ORDERS is JSON. Rows are on disk as
soon as they are known. A point that cannot be measured is noted with its reason and the others go on; what breaks a
rank or a connection ends the survey, whose rows stay and which goes on when it is started again.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from executor.__main__ import main
from executor.about import describe
from executor.backing import Backing, make_backing
from executor.session import DTYPES, Session
from executor.settings import RunSettings
from executor.survey_batches import measure_batches
from executor.survey_bed import Bed
from executor.survey_bench import Bench, CpuBench, Row, Sample
from executor.survey_host import Host
from executor.survey_lead import SHARES, Lead, Skipped, make_tasks, why_never
from executor.survey_pairs import Pairs
from executor.survey_points import COMPUTE_ALONE, CPU, GPU, Grid, Point, Shapes
from executor.survey_traffic import Traffic
from traces.coordinates import KERNELS
from traces.measurement import SEEN, SEQUENCE, Conditions, Measurement, MeasurementLog

MOST_WORDS = 300
Times = list[Sample | None]


class Orders(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the ranks are told besides the settings: seconds to measure, the version of the program, of how many
    tensor-parallel ranks the settings' models are one's part, and which kinds are wanted (none named: all)."""

    budget_s: float
    weft: str = ""
    num_shards: int = 1
    kinds: tuple[str, ...] = ()


def survey(session: Session, orders: Orders) -> None:
    """Measure until the budget is spent. Every rank must call it."""
    mail, status = session.mail, session.status
    keeper = Keeper.open(session, orders) if session.place.rank == 0 else None
    mail.begin("survey")
    status.enter("connect")
    surveyor = Surveyor.open(session, orders.num_shards)
    mail.together("ready")
    lots = keeper.start() if keeper is not None else iter(())
    number = 0
    while True:
        mail.begin(f"survey/{number}")
        number += 1
        lot = mail.share("lot", [asdict(point) for point in next(lots, [])], list)
        if not lot:
            break
        points = [Point(**each) for each in lot]
        status.enter(f"measure {points[0].what} {points[0].model}".rstrip())
        found = surveyor.measure(points)
        reasons = mail.gather("reasons", [each if isinstance(each, str) else "" for each in found], list)
        times = mail.gather("times", [lone_us(*each) for each in zip(points, found, strict=True)], Times)
        if keeper is not None:
            keeper.keep(points, found, reasons, times)
    if keeper is not None:
        keeper.finish(surveyor.bench.refused)
    mail.together("end")


# -- rank 0 -----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Keeper:
    """The file and the lead, on rank 0."""

    session: Session
    log: MeasurementLog
    lead: Lead
    started_s: float = 0.0
    _told_s: int = 0

    @classmethod
    def open(cls, session: Session, orders: Orders) -> Keeper:
        """Raises ValueError for a folder of other conditions."""
        settings, on_gpu = session.settings, session.place.device.type == "cuda"
        log = MeasurementLog(Path(settings.output), conditions_of(session, orders))
        models = {run.model.model_id: shapes_of(run, orders.num_shards) for run in settings.runs}
        grid = grid_of(session)
        tasks = [
            task
            for task in make_tasks(models, grid, settings.num_ranks, on_gpu=on_gpu)
            if task.what in (orders.kinds or SHARES)
        ]
        lead = Lead(tasks, log.rows, models, grid, orders.budget_s, time.monotonic, with_launches=on_gpu)
        never = {what: why_never(what, settings.num_ranks, on_gpu=on_gpu) for what in SHARES}
        lead.skipped |= {what: Skipped(0, why) for what, why in never.items() if why}
        return cls(session, log, lead)

    def start(self) -> Any:
        """The clock of the budget starts."""
        self.started_s = time.monotonic()
        return self.lead.lots()

    def keep(
        self,
        points: list[Point],
        found: list[Row | str | None],
        reasons: list[list[str]],
        times: list[Times],
    ) -> None:
        """Rows to the file, failures to the lead: a point that failed on any rank has failed. `reasons` and `times`: by
        rank."""
        by_point = zip(zip(*reasons, strict=True), zip(*times, strict=True), strict=True)
        for point, row, (why, each) in zip(points, found, by_point, strict=True):
            if isinstance(row, Row) and not any(why):
                self.log.append(measurement_of(point, of_the_slowest(row, each)))
                self.lead.succeed(point)
            else:
                self.lead.fail(point, next(filter(None, why), "rank 0 had no part in it"))
        self._tell()

    def _tell(self) -> None:
        """Seconds of the budget that are gone, to whoever watches."""
        gone_s = int(min(self.lead.budget_s, time.monotonic() - self.started_s))
        self.session.status.finished(gone_s - self._told_s)
        self._told_s = gone_s

    def finish(self, refused: dict[int, str]) -> None:
        """The folder is finished; its manifest says what is missing and why."""
        skipped = {what: asdict(each) for what, each in self.lead.skipped.items()}
        seconds = round(time.monotonic() - self.started_s, 1)
        self.log.finish(_now(), skipped=skipped, refused=refused, seconds=seconds)


def lone_us(point: Point, row: Row | str | None) -> Sample | None:
    """How long what a rank does without the others took it; nothing of what ranks do together."""
    is_lone = point.what in (*KERNELS, SEQUENCE) or point.at.get("schedule") == COMPUTE_ALONE
    return row.samples["us"] if is_lone and isinstance(row, Row) else None


def of_the_slowest(row: Row, times: Sequence[Sample | None]) -> Row:
    """A row with the slowest rank's time, for which the others would wait at the next collective; and the fastest's."""
    known = sorted(time for time in times if time is not None)
    if len(known) < 2:
        return row
    return replace(row, samples=row.samples | {"us": known[-1], "fastest_us": known[0]})


def measurement_of(point: Point, row: Row) -> Measurement:
    """The row of a point."""
    values = {name: sample.value for name, sample in row.samples.items()}
    spread = {name: sample.spread for name, sample in row.samples.items()}
    repetitions = min(sample.repetitions for sample in row.samples.values())
    return Measurement(point.what, {**point.at, **(row.notes or {})}, values, spread, repetitions)


def conditions_of(session: Session, orders: Orders) -> Conditions:
    """This machine, as rank 0 sees it."""
    about = describe(session.place)
    return Conditions(
        gpu=about["gpu"], num_gpus=session.place.num_ranks,  # of a CPU, processes
        num_sms=about.get("num_sms", 0), driver=about.get("driver", ""), torch=about["torch"],
        nccl=about.get("nccl", ""), link_mode=about["link_mode"], dtype=session.settings.runs[0].dtype,
        weft=orders.weft, date=about["date"], environment=about["environment"],
    )  # fmt: skip


# -- every rank -------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Surveyor:
    """Measures points on one rank; keeps the model that was used last."""

    session: Session
    runs: dict[str, RunSettings]
    grid: Grid
    backing: Backing
    bench: Bench
    traffic: Traffic
    num_shards: int = 1
    _bed: Bed | None = None
    _users: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, session: Session, num_shards: int) -> Surveyor:
        """Connections and streams. Every rank must call it."""
        settings, place, grid = session.settings, session.place, grid_of(session)
        runs = {run.model.model_id: run for run in settings.runs}
        backing = make_backing(place.device, priority=True)
        traffic = Traffic.open(session, grid, DTYPES[settings.runs[0].dtype])
        return cls(session, runs, grid, backing, _bench(backing), traffic, num_shards)

    def measure(self, points: list[Point]) -> list[Row | str | None]:
        """A row for each point, or the reason why there is none; nothing on ranks that have no part in it."""
        what = points[0].what
        bed = self._use(points[0].model) if points[0].model else None
        if bed is not None and what != "host":
            bed.refresh()
        if what in SEEN:
            return self._launches(bed, points)
        if what == "two_batches":
            assert bed is not None
            folder = Path(self.session.settings.output) if self.session.place.rank == 0 else None
            return list(measure_batches(bed, self.bench, points, folder, self._guard))
        found: list[Row | str | None] = []
        for point in points:
            try:
                found.append(self._one(bed, point))
            except Exception as error:
                found.append(self._guard(error))
        return found

    def _one(self, bed: Bed | None, point: Point) -> Row | None:
        if bed is None:
            return self.traffic.measure(self.bench, point)
        if point.what in KERNELS:
            return bed.measure(self.bench, point)
        if point.what == SEQUENCE:
            return bed.measure_sequence(self.bench, point)
        row: Row = self._users[point.what].measure(point)
        return row

    def _launches(self, bed: Bed | None, points: list[Point]) -> list[Row | str | None]:
        from executor.survey_cuda import CudaBench
        from executor.survey_launches import channels, launches

        assert isinstance(self.bench, CudaBench)
        try:
            return channels(self.traffic, self.bench, points) if bed is None else launches(bed, self.bench, points)
        except Exception as error:
            return [self._guard(error)] * len(points)

    def _use(self, model: str) -> Bed:
        """The model's bed; another one's makes room first."""
        if self._bed is None or self._bed.run.model.model_id != model:
            self._bed = None
            self._users.clear()
            gc.collect()
            run = self.runs[model]
            bed = self._bed = Bed.open(self.session, run, self.grid, self.backing, self.num_shards)
            self._users["host"] = Host(bed, self.bench)
            if self.session.place.device.type == "cuda":
                self._users["pair"] = _pairs(self.bench, bed, self.traffic)
            bed.refresh()
        return self._bed

    def _guard(self, error: Exception) -> str:
        """The reason of a failure that leaves the rank whole; what does not is raised."""
        import torch
        from torch.distributed import DistError

        if isinstance(error, DistError):
            raise error
        if self.session.place.device.type == "cuda":
            torch.cuda.synchronize()  # raises what broke the device
        return f"{type(error).__name__}: {' '.join(str(error).split())}"[:MOST_WORDS]


def _bench(backing: Backing) -> Bench:
    from executor.lanes_cuda import CudaLanes
    from executor.survey_cuda import CudaBench

    if isinstance(backing.lanes, CudaLanes):
        return CudaBench(backing.lanes, backing.stopwatch)
    return CpuBench()


def _pairs(bench: Bench, bed: Bed, traffic: Traffic) -> Pairs:
    from executor.survey_cuda import CudaBench

    assert isinstance(bench, CudaBench)
    return Pairs(bench, bed, traffic)


def grid_of(session: Session) -> Grid:
    """The coarse grid of this kind of device."""
    return GPU if session.place.device.type == "cuda" else CPU


def shapes_of(run: RunSettings, num_shards: int) -> Shapes:
    """The coordinates of a run's model."""
    return Shapes(run.model, run.layout, DTYPES[run.dtype].itemsize, num_shards)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


if __name__ == "__main__":
    code = main(partial(survey, orders=msgspec.json.decode(sys.argv.pop(1), type=Orders)))
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads may be inside a collective that will never end; nothing is left to be tidied up.
    os._exit(code)
