"""A comparison as text: what the terminal shows."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from . import cell, header, labels, table
from .facts_table import property_rows, summary_rows
from .trace import Array

if TYPE_CHECKING:
    from .comparison import Comparison

HEADING = "bold"


@np.errstate(all="ignore")
def render(c: Comparison, *, width: int, precision: int, color: bool, summary: bool) -> str:
    """The comparison in at most ``width`` columns."""
    width = max(width, 40) - 2
    lines = _summary(c, width) if summary else _screen(c, width, precision)
    out = io.StringIO()
    console = Console(
        file=out,
        width=width,
        color_system="standard" if color else None,
        force_terminal=color,
        force_jupyter=False,
        legacy_windows=False,
    )
    for line in lines:
        console.print(line, soft_wrap=not isinstance(line, Table), highlight=False, markup=False, emoji=False)
    return "".join(f"{line.rstrip()}\n" for line in out.getvalue().splitlines())


def _screen(c: Comparison, width: int, precision: int) -> Iterator[table.Renderable]:
    yield from _header(c, width)
    arrays = [(t, None if t.refused else t.y) for t in c.traces]
    sides = table.Sides(c, "input", c.x, arrays, width, precision)
    plan = table.plan(sides)
    yield from table.side_by_side(sides, plan)
    if not plan.inline:
        yield from _statistics(c, width)
    if plan.rows * plan.columns < c.x.size:
        yield from _distributions(c, width, precision)
    yield from _headed(_offering(c, width), width)
    yield from cell.steps(c, width)
    yield from _gradient(c, width, precision)
    if c.notices:
        yield from _headed("What to notice (computed from this batch)", width)
        for notice in c.notices:
            yield from labels.wrap(notice.text(precision), width, "  * ", "    ")
    yield from _properties(c, width)
    yield from _peers(c, width)
    yield _next(width)


def _headed(line: str, width: int) -> Iterator[Text]:
    for part in [line] if len(line) <= width else labels.wrap(line, width, rest="    "):
        yield Text(part, HEADING)


def _header(c: Comparison, width: int) -> Iterator[table.Renderable]:
    parts = header.parts(c)
    ways = [
        ["normwise compare   " + "   ".join(parts)],
        ["normwise compare  " + "  ".join(parts)],
        ["normwise compare   " + parts[0], "    " + "   ".join(parts[1:])],
        labels.wrap("   ".join(["normwise compare", parts[0], *map(labels.tied, parts[1:])]), width, rest="    "),
    ]
    for line in next(lines for lines in ways if max(map(len, lines)) <= width or lines is ways[-1]):
        yield Text(line, HEADING)
    for note in header.notes(c):
        yield from labels.wrap(f"({note})", width, rest=" ")


def _offering(c: Comparison, width: int) -> str:
    """The heading of the worked number, with another one to try."""
    line = cell.heading(c)
    last = tuple(n - 1 for n in c.x.shape)
    other = last if last != c.cell else (0,) * c.x.ndim
    offer = f"{line:56}another: --cell {','.join(map(str, other))}"
    return offer if len(offer) <= width and c.x.size > 1 else line


def _next(width: int) -> str:
    """What to try next: as much as fits."""
    parts = ["next:  normwise compare your.npy", "--summary", "--html page.html", "--help"]
    while len(parts) > 1 and len("     ".join(parts)) > width:
        parts.pop()
    return "     ".join(parts)


def _statistics(c: Comparison, width: int) -> Iterator[table.Renderable]:
    """Whose mean and variance, for each norm on a line; ranges if all of them do not fit."""
    found = [t for t in c.traces if not t.refused]
    for most in (4, 1):
        rows = [("", "one mean for each", "mean", "variance")]
        rows += [(t.norm.title, labels.unit(t.norm.pattern, c.layout), *table.statistics(t, most)) for t in found]
        wide = [max(len(row[i]) for row in rows) + 2 for i in range(3)]
        lines = ["    " + "".join(text.ljust(w) for text, w in zip(row, wide, strict=False)) + row[3] for row in rows]
        if max(map(len, lines)) <= width:
            yield Text(lines[0], HEADING)
            yield from lines[1:]
            return
    for title, unit, mean, var in rows[1:]:
        yield from labels.wrap(f"{title}, each {unit}: mean {mean}; variance {var}", width, "    ", " " * 8)


def _distributions(c: Comparison, width: int, precision: int) -> Iterator[table.Renderable]:
    """The range, mean, spread and histogram of all values, in a table or, on a narrow screen, in sentences."""
    rows: list[tuple[str, list[str], Array]] = []
    for name, values in [("input", c.x), *((t.norm.title, t.y) for t in c.traces if not t.refused)]:
        finite = values if np.isfinite(values).all() else values[np.isfinite(values)]
        if finite.size:
            low, high, mean, sd = (float(v) for v in (finite.min(), finite.max(), finite.mean(), finite.std()))
            numbers = (low, high, 0.0 if abs(mean) < 1e-6 * sd else mean, sd)
            rows.append((name, [labels.short(v, precision) for v in numbers], finite))
    first = max(len(name) for name, _, _ in rows) + 5
    wide = max(10, *(len(text) + 2 for _, texts, _ in rows for text in texts))
    room = min(16, width - first - 4 * wide - 3)
    if room >= 9:
        heads = "".join(head.rjust(wide) for head in ("min", "max", "mean", "sd"))
        yield Text("All values".ljust(first) + f"{heads}   histogram", HEADING)
        for name, texts, finite in rows:
            line = f"    {name}".ljust(first) + "".join(text.rjust(wide) for text in texts)
            yield f"{line}   {table.sparkline(finite, room)}"
        return
    yield Text("All values", HEADING)
    for name, texts, finite in rows:
        yield from labels.wrap("{}: {} to {}, mean {}, sd {}".format(name, *texts), width, "    ", " " * 8)
        yield f"        {table.sparkline(finite, 16)}"


def _gradient(c: Comparison, width: int, precision: int) -> Iterator[table.Renderable]:
    done = [(t, t.backward) for t in c.traces if t.backward is not None]
    if not done:
        return
    yield from _headed("Backward: dL/dx for this dL/dy", width)
    dy = done[0][1].dy
    arrays = [(t, None if t.backward is None else t.backward.dx) for t in c.traces]
    sides = table.Sides(c, "dy", dy, arrays, width, precision)
    yield from table.side_by_side(sides, table.plan(sides, inline=False))
    yield from cell.backward_steps(c, width)


def _properties(c: Comparison, width: int) -> Iterator[table.Renderable]:
    titles, rows = property_rows(c)
    averaged = any(t.facts.depends_on_other_examples for t in c.traces)
    heading = "Because n is averaged away:" if averaged else "Because n is not averaged away:"
    yield from table.grid(heading, titles, rows, width)


def _summary(c: Comparison, width: int) -> Iterator[table.Renderable]:
    yield from _header(c, width)
    yield from table.grid("Summary (derived from the patterns)", *summary_rows(c), width)


def _peers(c: Comparison, width: int) -> Iterator[table.Renderable]:
    """The torch layers that compute the same, and those that are further away than rounding explains."""
    close = [p for p in c.peers if p.close]
    if close:
        worst = labels.tidy(f"{max(p.difference for p in close):.0e}").replace("0e+0", "0")
        same = ", ".join(_tied(p.layer) for p in close)
        yield from labels.wrap(f"= {same}: largest difference from torch {worst}", width, rest="  ")
    for p in c.peers:
        if not p.close:
            gives = f"is up to {labels.short(p.difference)} away" if np.isfinite(p.difference) else "gives nan or inf"
            line = f"! torch's {_tied(p.layer)} {gives} in {c.dtype}; above is the exact result, rounded once"
            yield from labels.wrap(line, width, rest="  ")


def _tied(layer: str) -> str:
    """``nn.LayerNorm(3) on x.permute(0, 2, 1)`` breaks at ``on`` only."""
    return " on ".join(labels.tied(part) for part in layer.split(" on "))
