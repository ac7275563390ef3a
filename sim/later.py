"""Numbers of a node that came after others were published: where they stand at their default, they are not there."""

from __future__ import annotations

from typing import Any

# Numbers that came later: where they stand at their default, a node is the node that it was before they came.
LATER = ("gemm_balance", "gemm_overlap_order", "split_us", "gemm_sees_partition", "attention_start_us",
         "elementwise_start_us", "attention_cta_us", "attention_overlap_order", "operations",
         "memory_gb", "partition_step", "gemm_wave_ctas", "gemm_persistent", "piece_us",
         "switch_us", "gpcs", "rested_boost")  # fmt: skip
LATER_OF_LINK = ("default_ctas", "join_us", "independent_ctas", "ctas_anywhere")
LATER_OF_CONTENTION = ("comm_by_attention", "comm_by_elementwise", "comm_stream_by_compute", "per_ctas", "by_traffic",
                       "comm_by_memory")  # fmt: skip
ALL_LATER = (*LATER, *LATER_OF_LINK, *LATER_OF_CONTENTION)


def without_later(contents: dict[str, Any]) -> list[str]:
    """Take out of a node's contents what came later and stands at its default; returns the dotted names of it."""
    found = []
    if not contents["gemms"]:
        del contents["gemms"]
        found.append("gemms")
    for table in contents.get("gemms", ()):
        for counts in ("ctas", "clusters"):
            if not table[counts]:
                del table[counts]
    for table in contents["link"]["tables"]:
        if not table["launched"]:
            del table["launched"]
    for operation in contents["device"]["operations"]:
        if not operation["variant"]:
            del operation["variant"]
        if operation["overlap_order"] == 1.0:
            del operation["overlap_order"]
    for section, names in (("device", LATER), ("link", LATER_OF_LINK), ("contention", LATER_OF_CONTENTION)):
        for name in names:
            if not contents[section][name]:
                del contents[section][name]
                found.append(f"{section}.{name}")
    return found
