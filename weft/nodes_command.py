"""`weft nodes`: the nodes that come with the program; of one node, every number and where it comes from."""

from __future__ import annotations

import argparse
import textwrap
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sim.spec import NodeSpec

ESTIMATE = "estimate"
WIDTH = 110
SECTIONS = ("device", "host", "link", "contention")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `weft nodes` to the command line."""
    parser = subparsers.add_parser("nodes", help="the nodes, and the source of every number", description=__doc__)
    parser.add_argument("name", nargs="?", help="a node, or a TOML file of the same form")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the table of nodes, or one node."""
    from sim.spec import load_node, node_names

    if args.name is None:
        print("\n".join(overview([load_node(name) for name in node_names()])))
    else:
        print("\n".join(describe(load_node(args.name))))
    return 0


def overview(nodes: list[NodeSpec]) -> list[str]:
    """One line a node."""
    lines = [f"{'node':<27}{'GPUs':>5}  {'link':<13}{'estimates':>9}  description"]
    for node in nodes:
        head = f"{node.name:<27}{node.num_gpus:>5}  {node.link.kind:<13}{len(node.estimates):>9}  "
        lines += _wrapped(head, node.description)
    return [*lines, "", "weft nodes NAME shows a node's numbers and where each comes from"]


def describe(node: NodeSpec) -> list[str]:
    """Every number of a node, its source, and a mark on what nobody measured."""
    from sim.later import ALL_LATER

    lines = [f"{node.name}: {node.description}", f"{node.num_gpus} GPUs, {node.link.kind}, contents {node.digest}", ""]
    for section in SECTIONS:
        part = getattr(node, section)
        for field in part.__struct_fields__:
            value = getattr(part, field)
            if field in ALL_LATER and not value:
                continue
            if field == "tables":
                lines += [line for table in value for line in _table(node, table)]
            else:
                lines += _entry(node, f"{section}.{field}", _shown(value))
    if node.gemms:
        shapes = {(table.cols, table.inner) for table in node.gemms}
        points = sum(len(table.rows) for table in node.gemms)
        lines += _entry(node, "gemms", f"{len(shapes)} shapes, {points} times over rows and partitions")
    if node.fit is not None:
        lines += ["", *_fitted(node)]
    return [*lines, "", f"{len(node.estimates)} sources are estimates, marked with ~: nobody measured those numbers"]


def _fitted(node: NodeSpec) -> list[str]:
    """What a fitted node was fitted to, where the fit holds, and what is wrong with it."""
    from datetime import date

    from sim.fitted import fit_notes, machine_words

    fit = node.fit
    assert fit is not None
    lines = [f"fitted to measurements of {machine_words(fit.gpu)}, {fit.date}"]
    lines += _wrapped("  conditions: ", ", ".join(f"{key} {value}" for key, value in fit.conditions.items()))
    lines += [f"  measurements: {name}, SHA-256 {digest[:16]}" for name, digest in fit.measurements.items()]
    for name, (low, high) in fit.ranges.items():
        lines.append(f"  holds for {name} from {low:.6g} to {high:.6g}")
    return lines + [f"  caution: {note}" for note in fit_notes(node, date.today())]


def _entry(node: NodeSpec, key: str, value: str) -> list[str]:
    source = _source(node, key)
    mark = "~" if source.lower().startswith(ESTIMATE) else " "
    return [*_wrapped(f"{mark} {key:<30} ", value), *(_wrapped(f"{'':<35}", source) if source else [])]


def _wrapped(head: str, text: str) -> list[str]:
    """Text behind a head, its further lines aligned."""
    return textwrap.wrap(text, WIDTH, initial_indent=head, subsequent_indent=" " * len(head)) or [head]


def _table(node: NodeSpec, table: Any) -> list[str]:
    key = f"link.tables.{table.op}.{table.ranks}.{table.ctas}{table.path}"
    what = f"{len(table.bytes)} sizes, {_size(table.bytes[0])} in {table.us[0]:g} us to {_size(table.bytes[-1])} in "
    return _entry(node, key, what + f"{table.us[-1] / 1e3:g} ms")


def _source(node: NodeSpec, key: str) -> str:
    """The source of a number: its own, or that of the group it is in."""
    while key not in node.sources and "." in key:
        key = key.rpartition(".")[0]
    return node.sources.get(key, "")


def _size(num_bytes: int) -> str:
    for unit, worth in (("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= worth:
            return f"{num_bytes / worth:.4g} {unit}"
    return f"{num_bytes} bytes"


def _shown(value: object) -> str:
    from sim.spec import OperationSpec

    if value == ():
        return "none"
    if isinstance(value, OperationSpec):
        return f"{value.label} {value.start_us:g} us, traffic x{value.traffic:g};"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return " ".join(_shown(item) if not isinstance(item, tuple) else "x".join(map(_shown, item)) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
