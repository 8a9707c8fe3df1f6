"""Tables of numbers that fit the screen: rows are samples and positions, columns are channels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from rich.table import Table
from rich.text import Text

from . import header, labels
from .trace import Array, Trace

if TYPE_CHECKING:
    from .comparison import Comparison

Renderable = str | Text | Table
Form = Callable[[Sequence[float]], list[str]]

BLOCKS = "▁▂▃▄▅▆▇█"
NARROW = 60  # on a screen less wide, norms stand one below the other


@dataclass(frozen=True, eq=False)
class Sides:
    """An array and each norm's beside it, to be shown in so many columns of the screen; None where a norm has none."""

    c: Comparison
    title: str
    left: Array
    arrays: Sequence[tuple[Trace, Array | None]]
    width: int
    precision: int


@dataclass(frozen=True)
class Plan:
    """How much is shown, and how: so many rows and columns, so many norms abreast, statistics under them or not."""

    rows: int
    columns: int
    abreast: int
    inline: bool


def plan(s: Sides, *, inline: bool = True) -> Plan:
    """All columns if they fit, two norms abreast or one; else a corner. Statistics stand under it where they fit."""
    rows, few = _height(s.c), len(s.arrays) <= 2
    total = s.c.x.shape[s.c.layout.index("c")]

    def used(p: Plan) -> int:
        widths = [len(_block(s, t, a, p)[0]) + 2 for t, a in s.arrays]
        return len(_lead(s, p)[0]) + max(sum(widths[: p.abreast]), *widths)

    sides = min(len(s.arrays), 1 if s.width < NARROW else 2)
    found = Plan(rows, min(total, s.width // 4), sides, False)
    if found.columns == total and rows == _rows(s.c) and few and used(found) > s.width:
        found = replace(found, abreast=1)
    while (needed := used(found)) > s.width and found.columns > 1:
        columns = min(found.columns - 1, max(1, found.columns * s.width // needed))
        found = Plan(rows, columns, sides, False)
    if needed > s.width:
        return replace(found, abreast=0)
    under = replace(found, inline=inline and s.c.layout == "nc" and few)
    return under if used(under) <= s.width else found


def side_by_side(s: Sides, p: Plan) -> Iterator[Renderable]:
    """The array and each norm's beside it, in as many bands as it takes."""
    if not p.abreast:
        yield from _stacked(s, p)
        return
    lead, blocks = _lead(s, p), [_block(s, t, a, p) for t, a in s.arrays]
    while blocks:
        taken = [blocks.pop(0)]
        while blocks and p.abreast > 1 and len(lead[0]) + sum(len(b[0]) + 2 for b in (*taken, blocks[0])) <= s.width:
            taken.append(blocks.pop(0))
        height = max(len(block) for block in (lead, *taken))
        padded = [block + [" " * len(block[0])] * (height - len(block)) for block in (lead, *taken)]
        for i, parts in enumerate(zip(*padded, strict=True)):
            yield Text("  ".join(parts), "bold" if i == 0 else "")


def _stacked(s: Sides, p: Plan) -> Iterator[Renderable]:
    """One table below the other, each with the names of its rows: for a very narrow screen."""
    for name, array in [(s.title, s.left), *((t.norm.title, a) for t, a in s.arrays)]:
        yield Text(f"    {name}"[: s.width], "bold")
        if array is None:
            yield "        no variance: see below"
            continue
        found = corner(s.c, array, p.rows, 1)
        texts = (labels.column if array is s.left else _outputs(s))(found.values[:, 0].tolist())
        head = f"{labels.axis_prefix(s.c.layout, 'c')}{found.left}"
        yield from (f"        {row:12}{text:>9}" for row, text in zip(["", *found.rows], [head, *texts], strict=True))


def _outputs(s: Sides) -> Form:
    return lambda numbers: [labels.value(number, s.precision) for number in numbers]


def _height(c: Comparison) -> int:
    """How many rows of a taller batch are shown, from the chosen cell on."""
    few = 8 if len(c.traces) <= 2 else 4
    return _rows(c) if _rows(c) <= few + 2 else few


def _rows(c: Comparison) -> int:
    """How many rows there are: channels are columns, everything else is rows."""
    return int(c.x.size // c.x.shape[c.layout.index("c")])


def _tall(c: Comparison) -> bool:
    """True if titles and patterns need a line each."""
    return c.x.ndim > 2 or len(c.traces) > 2


def _lead(s: Sides, p: Plan) -> list[str]:
    """Row names and the input."""
    c = s.c
    names = ["", *corner(c, s.left, p.rows, p.columns).rows, *(["..."] if _rows(c) > p.rows else [])]
    cells = _cells(c, s.left, p, labels.column, 4)
    if p.columns < c.x.shape[c.layout.index("c")]:
        cells = [cells[0] + " ...", *(line + "    " for line in cells[1:])]
    margin = max(len(name) for name in names) + 4
    lines = [name.rjust(margin) + row for name, row in zip(names, cells, strict=True)]
    head = [" " * margin + s.title.center(len(cells[0])), *([""] if _tall(c) else [])]
    tail = ["    one mean for", "    variance"] if p.inline else []
    wide = max(len(line) for line in (*head, *lines, *tail)) + (2 if p.inline else 0)
    return [line.ljust(wide) for line in (*head, *lines, *tail)]


def _block(s: Sides, t: Trace, array: Array | None, p: Plan) -> list[str]:
    """A norm's title, its values and its statistics; or why it has none."""
    pattern = str(t.norm.pattern) if len(str(t.norm.pattern)) <= header.LONG else ""
    head = [t.norm.title, pattern] if _tall(s.c) else [f"{t.norm.title}   {pattern}".rstrip()]
    if array is None:
        wide = max(26, *(len(line) for line in head))
        why = labels.wrap(t.refused, wide) if len(s.arrays) <= 2 else ["no variance: see below"]
        return [line.ljust(wide) for line in (*head, "", *why)]
    cells = _cells(s.c, array, p, _outputs(s), s.precision + 5)
    tail = _under(s.c, t) if p.inline else []
    wide = max(len(line) for line in (*head, *cells, *tail))
    pad = " " * ((wide - len(cells[0])) // 2)
    return [
        *(line.center(wide) for line in head),
        *(line.ljust(wide) for line in (*(pad + row for row in cells), *tail)),
    ]


def _cells(c: Comparison, array: Array, p: Plan, form: Form, least: int) -> list[str]:
    """A line of column names and the formatted corner of an array."""
    found = corner(c, array, p.rows, p.columns)
    texts = [list(row) for row in np.reshape(form(found.values.reshape(-1).tolist()), found.values.shape)]
    names = [f"{labels.axis_prefix(c.layout, 'c')}{found.left + i}" for i in range(p.columns)]
    wide = max(least, *(len(text) + 2 for row in (*texts, names) for text in row))
    lines = ["".join(text.rjust(wide) for text in row) for row in (names, *texts)]
    return lines + ([" " * len(lines[0])] if _rows(c) > p.rows else [])


def _under(c: Comparison, t: Trace) -> list[str]:
    """Whose mean, and what variance."""
    word = {"c": "COLUMN", "n": "ROW"}.get(
        "".join(labels.letters(t.norm.pattern, c.layout)[a] for a in t.norm.pattern.right)
    )
    mean, var = statistics(t)
    unit = labels.unit(t.norm.pattern, c.layout)
    return [f"{f'each {word}' if word else labels.each(unit)}: {mean}", var]


def statistics(t: Trace, most: int = 4) -> tuple[str, str]:
    """The means and the variances in a few words; more than ``most`` different ones as their range."""
    m = 0 if t.norm.uses_running else t.facts.values_per_statistic
    if not t.norm.centred:
        return "taken as 0", few(t.var, m, most)
    where = " (running)" if t.norm.uses_running else ""
    return few(t.mean, 0, most) + where, few(t.var, m, most)


def few(values: Array, m: int = 0, most: int = 4) -> str:
    """All of a few values, one for all if they agree, else their range; with ``m``, as a fraction where simple."""
    flat = values.reshape(-1)
    finite = flat[np.isfinite(flat)]
    if finite.size < flat.size:
        rest = f"{flat.size - finite.size} of {flat.size} not finite"
        return f"{few(finite, m, most)}, {rest}" if finite.size else rest
    low, high = float(flat.min()), float(flat.max())
    if np.isclose(low, high, rtol=1e-9, atol=0):
        total = low * m
        terminates = labels.short(low, 3) == labels.short(low, 9)
        fraction = "" if terminates or not m or abs(total - round(total)) > 1e-9 else f"{round(total)}/{m} = "
        return f"{fraction}{labels.short(low)}{labels.in_all(flat.size)}"
    if flat.size <= most:
        return " ".join(labels.short(v) for v in flat)
    return f"{labels.short(low)} to {labels.short(high)}"


@dataclass(frozen=True)
class Corner:
    """A part of an array as a matrix, the names of its rows, its first column, and where in it the chosen cell is."""

    values: Array
    rows: list[str]
    left: int
    chosen: int


def corner(c: Comparison, array: Array, rows: int, columns: int) -> Corner:
    """The corner of an array that holds the chosen cell: channels are columns, everything else is rows."""
    channel = c.layout.index("c")
    axes = [(a, n, i) for k, (a, n, i) in enumerate(zip(c.layout, c.x.shape, c.cell, strict=True)) if k != channel]
    sizes = [n for _, n, _ in axes]
    chosen = int(np.ravel_multi_index([i for _, _, i in axes], sizes))
    top = max(0, min(chosen, _rows(c) - rows))
    left = max(0, min(c.cell[channel], array.shape[channel] - columns))
    where = np.unravel_index(np.arange(top, min(top + rows, _rows(c))), sizes)
    names = [
        ",".join(f"{labels.axis_prefix(c.layout, a)}{i}" for (a, _, _), i in zip(axes, row, strict=True))
        for row in zip(*where, strict=True)
    ]
    values = np.moveaxis(array, channel, -1)[..., left : left + columns][where]
    return Corner(values, names, left, (chosen - top) * values.shape[1] + c.cell[channel] - left)


def sparkline(values: Array, bins: int) -> str:
    """A histogram from the least to the greatest value, however far apart they are."""
    low, high = values.min(), values.max()
    half = high / 2 - low / 2  # the whole may overflow
    shares = (values / 2 - low / 2) / half if half else np.full(1, 0.5)
    counts, _ = np.histogram(shares, bins, range=(0, 1))
    levels = np.ceil(counts / max(counts.max(), 1) * (len(BLOCKS) - 1)).astype(int)
    return "".join(BLOCKS[level] for level in levels)


def grid(
    heading: str, titles: Sequence[str], rows: Sequence[tuple[str, list[str]]], width: int
) -> Iterator[Renderable]:
    """A table of words with a column for each title; for many titles, under each row the titles that share a word."""
    first = max(len(heading), *(len(name) + 4 for name, _ in rows))
    wide = [max(len(title), *(min(len(cells[i]), 16) for _, cells in rows)) for i, title in enumerate(titles)]
    if first + sum(w + 2 for w in wide) <= width:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        table.add_column(heading, no_wrap=True)
        for title in titles:
            table.add_column(title)
        for name, cells in rows:
            table.add_row(f"    {name}", *cells)
        yield table
        return
    for line in labels.wrap(heading, width, rest="    "):
        yield Text(line, "bold")
    for name, cells in rows:
        yield from labels.wrap(name, width, "    ", "    ")
        for cell in dict.fromkeys(cells):
            alike = ", ".join(title for title, own in zip(titles, cells, strict=True) if own == cell)
            yield from labels.wrap(f"{cell}: {alike}", width, " " * 8, " " * 10)
