"""A profile from tables of measured durations, as an executor writes them: plain data in, pure functions out."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import log
from typing import Any, TypeVar

from models.kernel import Kernel, Kind
from policy.profile import Contention, Profile

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Curve:
    """Values at growing sizes. Between two sizes the straight line; beyond the ends the nearest value, scaled by size
    where `grows` (a kernel twice as large takes twice as long)."""

    sizes: tuple[float, ...]
    values: tuple[float, ...]
    grows: bool = True

    def at(self, size: float) -> float:
        """The value at a size."""
        place = bisect_right(self.sizes, size)
        if place == 0:
            return self.values[0]  # what is smaller than anything measured costs its fixed part
        if place == len(self.sizes):
            return self.values[-1] * (size / self.sizes[-1] if self.grows else 1.0)
        low, high = self.sizes[place - 1], self.sizes[place]
        share = (size - low) / (high - low)
        return self.values[place - 1] * (1.0 - share) + self.values[place] * share


@dataclass(frozen=True, slots=True)
class Sheet:
    """Durations of one GEMM: a curve over rows for every measured number of output features."""

    cols: tuple[float, ...]
    by_cols: tuple[Curve, ...]

    def at(self, rows: float, cols: float) -> float:
        """Microseconds for rows x cols."""
        return Curve(self.cols, tuple(curve.at(rows) for curve in self.by_cols)).at(cols)


@dataclass(frozen=True, slots=True)
class Pair:
    """Slowdowns of a compute kernel and an all-reduce beside each other, by rows. `weights`: how many a GEMM has."""

    weights: float
    compute: Curve
    comm: Curve


class Table:
    """The look-ups behind a table profile. Raises ValueError naming what the data lack."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.name = str(_need(data, "name"))
        self.gemms = {(str(_need(e, "name")), _count(e, "withheld")): _sheet(e) for e in _entries(data, "gemms")}
        self.others = {
            (str(_need(e, "name")), _count(e, "withheld")): _curve(e, "bytes") for e in _entries(data, "others")
        }
        self.comms = {(str(_need(e, "kind")), _count(e, "ctas")): _curve(e, "bytes") for e in _entries(data, "comms")}
        self.pairs: dict[tuple[str, int, int], list[Pair]] = {}
        for entry in _entries(data, "pairs"):
            self.pairs.setdefault(_pair_key(entry), []).append(_pair(entry))

    def solo_us(self, kernel: Kernel, withheld_sms: int, max_ctas: int) -> float:
        """Duration alone. What was not measured under this partition or CTA count is as it is without."""
        if kernel.is_communication:
            return self._found(self.comms, kernel.kind.value, max_ctas).at(kernel.message_bytes)
        if kernel.kind is Kind.GEMM:
            return self._found(self.gemms, kernel.name, withheld_sms).at(kernel.rows, kernel.cols)
        return self._found(self.others, kernel.name, withheld_sms).at(kernel.bytes_moved)

    def contention(self, compute: Kernel, comm: Kernel, withheld_sms: int, max_ctas: int) -> Contention:
        """The pair: slowdowns by the compute kernel's kind and rows, as measured beside an all-reduce; of several GEMMs
        that were measured, the one whose weights are nearest in size. Of a kind that was not, the largest GEMM's."""
        choices = ((kind.value, withheld_sms, max_ctas) for kind in (compute.kind, Kind.GEMM))
        found = next((self.pairs[key] for key in choices if key in self.pairs), None)
        if found is None:
            return Contention()
        weights = compute.cols * compute.inner
        pair = min(found, key=lambda pair: abs(log(pair.weights / weights)) if weights else -pair.weights)
        return Contention(max(1.0, pair.compute.at(compute.rows)), max(1.0, pair.comm.at(compute.rows)))

    def _found(self, table: dict[tuple[str, int], T], name: str, variant: int) -> T:
        found = table.get((name, variant)) or table.get((name, 0))
        if found is None:
            raise ValueError(f"profile {self.name} has no durations of {name}")
        return found


def profile_from(data: Mapping[str, Any]) -> Profile:
    """A profile from its table: name, gemms, others, comms, pairs, partitions, ctas; launch_us, round_us and
    crossing_us, 0 where they were not measured; host_margin, where it is known; overlap_price, 1 where nobody tried;
    whole_segments, false where nobody tried.

    gemms: {name, withheld, rows, cols, us[cols][rows]}; others: {name, withheld, bytes, us}; comms: {kind, ctas, bytes,
    us}; pairs: {kind, withheld, ctas, rows, compute, comm}, of GEMMs of several sizes with {cols, inner}. Microseconds
    and slowdowns; sizes must grow. default_ctas: how many CTAs a collective takes by itself, 0 where nobody knows.
    """
    table = Table(data)
    return Profile(
        table.name, table.solo_us, table.contention, _counts(data, "partitions"), _counts(data, "ctas"),
        launch_us=_number(data, "launch_us", 0.0),
        round_us=_number(data, "round_us", 0.0),
        crossing_us=_number(data, "crossing_us", 0.0),
        host_margin=_number(data, "host_margin", Profile.host_margin, is_factor=True),
        overlap_price=_number(data, "overlap_price", 1.0, is_factor=True),
        whole_segments=_flag(data, "whole_segments"),
    )  # fmt: skip


def _number(data: Mapping[str, Any], name: str, otherwise: float, *, is_factor: bool = False) -> float:
    value = data.get(name, otherwise)
    if not _is_amount(value) or (is_factor and not value):
        raise ValueError(
            f"a profile table's {name} is {value!r}; it must be a number {'above' if is_factor else 'from'} 0"
        )
    return float(value)


def _is_amount(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0.0 <= value < float("inf")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _count(entry: Mapping[str, Any], name: str) -> int:
    value = _need(entry, name)
    if not _is_count(value):
        raise ValueError(
            f"a profile table has an entry whose {name} is {value!r}; it must be a whole number, 0 or more"
        )
    return int(value)


def _counts(data: Mapping[str, Any], name: str) -> tuple[int, ...]:
    values = _need(data, name)
    if not isinstance(values, list | tuple) or not values or not all(map(_is_count, values)):
        raise ValueError(f"a profile table's {name} is {values!r}; it must be a list of counts, 0 or more")
    return tuple(values)


def _entries(data: Mapping[str, Any], name: str) -> Sequence[Mapping[str, Any]]:
    entries = _need(data, name)
    if not isinstance(entries, list | tuple) or not all(isinstance(entry, Mapping) for entry in entries):
        raise ValueError(f"a profile table's {name} is not a list of objects")
    return entries


def _flag(data: Mapping[str, Any], name: str) -> bool:
    value = data.get(name, False)
    if not isinstance(value, bool):
        raise ValueError(f"a profile table's {name} is {value!r}; it must be true or false")
    return value


def _need(data: Mapping[str, Any], key: str) -> Any:
    if not isinstance(data, Mapping) or key not in data:
        raise ValueError(f"a profile table lacks {key!r}")
    return data[key]


def _pair_key(entry: Mapping[str, Any]) -> tuple[str, int, int]:
    return str(_need(entry, "kind")), _count(entry, "withheld"), _count(entry, "ctas")


def _pair(entry: Mapping[str, Any]) -> Pair:
    cols, inner = entry.get("cols", 1), entry.get("inner", 1)
    if not all(isinstance(size, int) and size >= 1 for size in (cols, inner)):
        sizes = f"{cols!r} x {inner!r}"
        raise ValueError(f"a profile table has a pair of {sizes}; cols and inner must be whole numbers, 1 or more")
    return Pair(cols * inner, *(_curve(entry, "rows", side, grows=False) for side in ("compute", "comm")))


def _curve(entry: Mapping[str, Any], sizes: str, values: str = "us", *, grows: bool = True) -> Curve:
    return _checked(_need(entry, sizes), _need(entry, values), str(entry.get("name", entry.get("kind"))), grows)


def _sheet(entry: Mapping[str, Any]) -> Sheet:
    cols, by_cols = _need(entry, "cols"), _need(entry, "us")
    name = str(_need(entry, "name"))
    if not isinstance(by_cols, list | tuple):
        raise ValueError(f"profile table of {name}: us is {by_cols!r}; it must be a list for each number of cols")
    _checked(cols, [1.0] * len(by_cols), name, True)
    return Sheet(tuple(cols), tuple(_checked(_need(entry, "rows"), values, name, True) for values in by_cols))


def _checked(sizes: Sequence[float], values: Sequence[float], name: str, grows: bool) -> Curve:
    for numbers in (sizes, values):
        if not isinstance(numbers, list | tuple):
            raise ValueError(f"profile table of {name}: {numbers!r} is where a list of numbers must be")
        if wrong := [number for number in numbers if not _is_amount(number)]:
            raise ValueError(f"profile table of {name}: {wrong[0]!r} is among its numbers; sizes and "
                             "values must not be negative")  # fmt: skip
    if not sizes or len(sizes) != len(values):
        raise ValueError(
            f"profile table of {name}: {len(sizes)} sizes and {len(values)} values; they must be equally many"
        )
    if any(a >= b for a, b in pairwise(sizes)):
        raise ValueError(f"profile table of {name}: sizes must grow")
    return Curve(tuple(map(float, sizes)), tuple(map(float, values)), grows)
