"""Which points no fit may see: about a third, whole shapes at a time (of pairs, whole cells as well), the same ones in
every run on every machine."""

from __future__ import annotations

import hashlib
from math import log2
from typing import TYPE_CHECKING

from calibration.compare import COMM_ALONE, COMPUTE_ALONE, SERIAL
from calibration.kernels import label_of
from traces.measurement import CHANNELS, LAUNCH, SEQUENCE

if TYPE_CHECKING:
    from traces.measurement import Measurement

PARTS = 3
# Schedules of two batches in which nothing runs beside anything else.
UNMIXED = (SERIAL, COMPUTE_ALONE, COMM_ALONE)
# Sizes of messages alternate: of 4 KiB, 8 KiB, 16 KiB, ... every third is held out. Residue 1 spares the usual ends
# (512 bytes, 4 KiB, 64 MiB, 512 MiB), without which held-out points would lie outside the table that is fitted.
HELD_OUT_OCTAVE = 1


def is_held_out(measurement: Measurement) -> bool:
    """Whether a point is for checking alone. Host costs are never held out; schedules of two batches always are, except
    that two thirds of the cells tell of one batch after the other and of its parts alone."""
    if measurement.what == "host":
        return False
    if measurement.what == "two_batches":
        cell = tuple(str(measurement.at[key]) for key in ("model", "num_layers", "rows", "length"))
        return measurement.at["schedule"] not in UNMIXED or _falls_out(("two_batches", *cell))
    if measurement.what in ("collective", CHANNELS):
        return round(log2(max(1.0, float(measurement.at["bytes"])))) % PARTS == HELD_OUT_OCTAVE
    if measurement.what == SEQUENCE:
        return _falls_out((SEQUENCE, str(measurement.at["model"]), int(measurement.at["rows"])))
    if measurement.what == "pair" and _falls_out((*shape_identity(measurement), *_pair_identity(measurement))):
        return True
    return _falls_out(shape_identity(measurement))


def _pair_identity(measurement: Measurement) -> tuple[str | int, ...]:
    """What makes two pairs of one compute shape the same cell: few shapes are measured in pairs, so that cells are held
    out as well, with all their partitions and CTAs."""
    at = measurement.at
    return "pair", int(at.get("rows", at.get("num_sequences", 0))), str(at["op"]), int(at["bytes"])


def _falls_out(parts: tuple[str | int, ...]) -> bool:
    identity = "|".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(identity.encode()).digest()[:8], "big") % PARTS == 0


def shape_identity(measurement: Measurement) -> tuple[str | int, ...]:
    """What makes two points the same shape, whatever their rows, partition and CTAs. A pair's is its compute kernel's,
    so that a GEMM that is held out alone is held out in pairs too."""
    at = measurement.at
    kind = str(at["kind"]) if measurement.what == "pair" else measurement.what
    if kind in ("gemm", LAUNCH):
        return ("gemm", int(at["cols"]), int(at["inner"]))
    if kind == "attention":
        return ("attention", *(int(at.get(key, 0)) for key in ("num_heads", "head_dim", "length")))
    # A kernel of another name or variant is another program, of which nothing could be told: sizes are held out.
    return (kind, label_of(at), round(float(at["bytes_moved"])))
