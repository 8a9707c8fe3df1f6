"""The results as tables for people and as one file of JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from . import verdict
from .verdict import Record

TITLES = {"torch": "torch eager", "compile": "torch.compile", "onnxruntime": "ONNX Runtime", "jax": "JAX jit"}

LEGEND = {
    "time": "median; +- is half the distance of the quartiles, in percent of it",
    "x": "the peer's time divided by ours: above 1 ours is faster; below 1 it is marked with <",
    "copies": "our time divided by that of copying the same bytes into memory that is there already",
    "bytes": "x read and y written in forward; with backward dy and x read and dx written besides: 2 and 5 times the"
    " bytes of x. fused_add_*: x, residual, y, h, then dy, dh, h, dx: 4 and 8. batch_norm_relu with a residual: x,"
    " residual, y, then dy, x, y, dx, dresidual: 3 and 8. Parameters and statistics are not counted. GB/s are these"
    " bytes divided by our time, copies those bytes, half read and half written",
    "error": "the largest relative L2 error among y, dx, dresidual, dweight and dbias against the float64 reference on"
    " the same rounded inputs; ! marks one that rounding does not explain",
    "P1": "forward from 64 kB of x, forward+backward from 1 MB: at most 1.05 of eager PyTorch's time; float32"
    " layer_norm forward in at most 1.15 copies; bfloat16, RMSNorm, Batch Norm, Instance Norm and fused operations at"
    " least twice as fast as eager PyTorch. Where it fails: the ratio reached, and the one promised",
    "P1 kept": "of the parts of P1 that speak of the cases of the class, those that hold",
    "peers": "torch eager: torch.nn.functional as its users write it, the only peer called without compiling a graph."
    " torch.compile: the same, dynamic=False. ONNX Runtime: forward, CPU provider. JAX: jit, jax.nn.standardize",
    "fresh": "random inputs, x and cotangents of non-zero mean; candidates take turns; each allocates its own outputs",
}


def write(path: Path, machine: dict[str, Any], settings: dict[str, Any], records: list[Record]) -> None:
    """Write everything that was measured, and what it says; a case is one line."""
    head = machine | {"settings": settings, "legend": LEGEND, "classes": verdict.classes(records)}
    judged = [r | {"promises": verdict.promises(r), "times_fastest": verdict.fastest(r)} for r in records]
    lines = ",\n".join("  " + json.dumps(record, allow_nan=False) for record in judged)
    text = json.dumps(head, indent=1, allow_nan=False).removesuffix("\n}") + ',\n "cases": [\n' + lines + "\n ]\n}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def show(console: Console, records: list[Record]) -> None:
    """Print the cases, the means of each class, what P1 promises, and how to read it."""
    names = list(dict.fromkeys(name for record in records for name in record["candidates"]))
    console.print(cases_table(records, [name for name in names if name in TITLES], "copy" in names))
    console.print(classes_table(records))
    show_promises(console, records)
    for term, text in LEGEND.items():
        console.print(f"{term}: {text}.", markup=False, highlight=False)


def arranged(records: list[Record]) -> list[Record]:
    """In the order of the grid, a case with one thread beside the same case with more."""
    order = dict.fromkeys(map(identity, records))
    return [record for key in order for record in records if identity(record) == key]


def identity(record: Record) -> tuple[str, ...]:
    """What tells a case apart, but for the threads."""
    return tuple(str(record[name]) for name in ("op", "model", "shape", "layout", "dtype", "pass"))


def cases_table(records: list[Record], peers: list[str], copied: bool) -> Table:
    """One line a case; the lost ones are there like the won ones."""
    table = Table(title="Time of a call, and error", title_justify="left", pad_edge=False, box=None)
    for title in ("case", "shape", "type", "pass"):
        table.add_column(title, no_wrap=True)
    for title in ("threads", "normwise", "+-", "GB/s", "error", *(["copies"] if copied else [])):
        table.add_column(title, justify="right", no_wrap=True)
    for name in peers:
        table.add_column(f"{TITLES[name]}: time  x  error", justify="right", no_wrap=True)
    table.add_column("P1", no_wrap=True)
    group = None
    for record in records:
        if group != (group := verdict.class_of(record)[0]):
            table.add_row(group)
        table.add_row(*case_row(record, peers, copied))
    return table


def case_row(record: Record, peers: list[str], copied: bool) -> list[str]:
    """The cells of one case."""
    ours = record["candidates"]["normwise"]
    passes = {"forward": "f", "forward+backward": "f+b"}[record["pass"]]
    model = record["op"] if verdict.class_of(record)[0] == record["model"] else record["model"]
    case = f"  {model} {record['layout']}".rstrip()
    row = [case, "x".join(map(str, record["shape"])), record["dtype"], passes, str(record["threads"]), duration(ours)]
    if "median" in ours:
        spread = (ours["third_quartile"] - ours["first_quartile"]) / 2 / ours["median"]
        row += [f"{100 * spread:.0f}%", f"{record['moved_bytes'] / ours['median'] / 1e9:.1f}"]
    else:
        row += ["–", "–"]
    row.append(largest_error(ours))
    if copied:
        times = verdict.ratio(record, "copy")
        row.append(f"{1 / times:.2f}" if times else "–")
    for name in peers:
        peer = record["candidates"].get(name, {})
        cells = duration(peer), multiple(verdict.ratio(record, name)), largest_error(peer)
        row.append("{:>9} {:>6} {:>6}".format(*cells) if "median" in peer else "–")
    return [*row, promise(record)]


def duration(candidate: Record) -> str:
    """A time in the unit that suits it."""
    seconds = candidate.get("median")
    if seconds is None:
        return "WRONG" if candidate.get("wrong") else "–"
    return f"{1e6 * seconds:.2f} us" if seconds < 1e-4 else f"{1e3 * seconds:.2f} ms"


def multiple(value: float | None) -> str:
    """A ratio; below 1, where the peer is faster, it is marked."""
    return "–" if value is None else f"{'<' if value < 1 else ''}{value:.2f}"


def largest_error(candidate: Record) -> str:
    """The error of the output or gradient that is furthest off."""
    errors = candidate.get("errors")
    if not errors:
        return "–"
    values = list(errors.values())
    text = "nan" if None in values else f"{max(values):.0e}"
    return text + ("!" if candidate.get("wrong") else " ")


def promise(record: Record) -> str:
    """Whether P1 holds for the case, and if not which part of it and by how much."""
    found = verdict.promises(record)
    missed = {name: p for name, p in found.items() if not p["holds"]}
    if missed:
        return "FAIL " + ", ".join(f"{name} {p['ratio']:.2f}<{p['at_least']:.2f}" for name, p in missed.items())
    return f"pass {' '.join(found)}" if found else "–"


def classes_table(records: list[Record]) -> Table:
    """The geometric means; aims: 2 against the fastest peer, 3 against eager PyTorch."""
    found = verdict.classes(records)
    threads = list(dict.fromkeys(line["threads"] for line in found))
    table = Table(
        title="\nGeometric means: how many times faster (aims: torch eager 3, the fastest peer 2)",
        title_justify="left",
        pad_edge=False,
        box=None,
    )
    for title in ("class", "type", "pass"):
        table.add_column(title, no_wrap=True)
    for count in threads:
        of = f"{count} thread{'s' if count > 1 else ''}"
        for title in (f"cases, {of}", "torch eager", "fastest peer", "P1 kept"):
            table.add_column(title, justify="right", no_wrap=True)
    for key in dict.fromkeys((line["op"], line["dtype"], line["pass"]) for line in found):
        row = list(key)
        for count in threads:
            line = next((c for c in found if (c["op"], c["dtype"], c["pass"], c["threads"]) == (*key, count)), None)
            row += (
                ["–"] * 4
                if line is None
                else [
                    str(line["cases"]),
                    multiple(line["times_eager"]),
                    multiple(line["times_fastest"]),
                    f"{line['promises_kept']}/{line['promises']}",
                ]
            )
        table.add_row(*row)
    return table


def show_promises(console: Console, records: list[Record]) -> None:
    """Print how many cases keep each part of P1, and which of ours were wrong or did not run."""
    console.print()
    for part in ("eager", "copies", "twice"):
        held = [found[part]["holds"] for record in records if part in (found := verdict.promises(record))]
        console.print(f"P1 {part}: {sum(held)} of {len(held)} cases hold.", highlight=False)
    for record in filter(verdict.failed, records):
        ours = record["candidates"]["normwise"]
        why = ours.get("unavailable") or f"WRONG, {ours['errors']}"
        what = (record["op"], tuple(record["shape"]), record["layout"], record["dtype"], record["pass"])
        console.print("not timed:", *what, why, markup=False, highlight=False)
    console.print()
