"""What the times say: ratios to each peer, what P1 promises of a case and whether it holds, means over classes."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from .cases import OPS, SMALL

Record = dict[str, Any]

SLACK = 1.05
COPIES = 1.15
TWICE = 2.0
FLOOR = {"forward": 2**16, "forward+backward": 2**20}
"""Bytes of x from which P1 speaks of a case."""


def time(record: Record, name: str) -> float | None:
    """The median time of a candidate in seconds, None if it has none."""
    return record["candidates"].get(name, {}).get("median")


def failed(record: Record) -> bool:
    """Whether ours was wrong or did not run."""
    ours = record["candidates"]["normwise"]
    return bool(ours.get("wrong") or "unavailable" in ours)


def ratio(record: Record, peer: str) -> float | None:
    """How many times as long as ours a peer takes: above 1 ours is faster."""
    ours, theirs = time(record, "normwise"), time(record, peer)
    return theirs / ours if ours and theirs else None


def peers(record: Record) -> list[str]:
    """The libraries that were timed beside ours."""
    return [name for name in record["candidates"] if name not in ("normwise", "copy") and time(record, name)]


def fastest(record: Record) -> float | None:
    """The ratio to the fastest of them."""
    return min((found for name in peers(record) if (found := ratio(record, name))), default=None)


def promises(record: Record) -> dict[str, dict[str, Any]]:
    """What P1 promises of this case: a ratio, its bound, and whether it holds.

    ``eager``: at most 1.05 of eager PyTorch's time, the one peer that is called without compiling a graph. ``copies``:
    float32 layer_norm forward in at most 1.15 times the copy's. ``twice``: bfloat16, RMSNorm, Batch Norm, Instance Norm
    and fused operations in at most half of eager PyTorch's.
    """
    if record["input_bytes"] < FLOOR[record["pass"]]:
        return {}
    wanted = [("eager", "torch", 1 / SLACK)]
    if record["op"] == "layer_norm" and record["dtype"] == "float32" and record["pass"] == "forward":
        wanted.append(("copies", "copy", 1 / COPIES))
    if OPS[record["op"]].twice or record["dtype"] == "bfloat16":
        wanted.append(("twice", "torch", TWICE))
    found = {}
    for name, peer, bound in wanted:
        if (reached := ratio(record, peer)) is not None:
            found[name] = {"ratio": reached, "at_least": bound, "holds": reached >= bound}
    return found


def class_of(record: Record) -> tuple[str, str, str]:
    """Operation, type and pass: what one mean is taken over. Small calls are a class of their own."""
    op = SMALL if record["model"] == SMALL else record["op"]
    return op, record["dtype"], record["pass"]


def mean(ratios: Iterable[float | None]) -> float | None:
    """The geometric mean of those that are known."""
    known = [value for value in ratios if value]
    return statistics.geometric_mean(known) if known else None


def classes(records: list[Record]) -> list[dict[str, Any]]:
    """The geometric means of each class for each number of threads, and over everything."""
    keys = dict.fromkeys(class_of(record) for record in records)
    groups = [(key, [r for r in records if class_of(r) == key]) for key in keys]
    large = [record for record in records if record["model"] != SMALL]
    for passes in dict.fromkeys(record["pass"] for record in large):
        groups.append((("all", "all", passes), [r for r in large if r["pass"] == passes]))
    if large:
        groups.append((("all", "all", "all"), large))
    found = []
    for (op, dtype, passes), members in groups:
        for threads in dict.fromkeys(record["threads"] for record in members):
            those = [record for record in members if record["threads"] == threads]
            means = {"eager": mean(ratio(r, "torch") for r in those), "fastest": mean(fastest(r) for r in those)}
            kept = [promise["holds"] for r in those for promise in promises(r).values()]
            found.append(
                {"op": op, "dtype": dtype, "pass": passes, "threads": threads, "cases": len(those)}
                | {f"times_{name}": value for name, value in means.items()}
                | {"promises": len(kept), "promises_kept": sum(kept)}
            )
    return found
