"""Tables of numbers that fit the screen: rows are samples and positions, columns are channels."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from rich.table import Table
from rich.text import Text

from . import labels
from .trace import Array, Trace

if TYPE_CHECKING:
    from .comparison import Comparison

Renderable = str | Text | Table

BLOCKS = "▁▂▃▄▅▆▇█"


def side_by_side(
    c: Comparison,
    title: str,
    left: Array,
    arrays: Sequence[tuple[Trace, Array | None]],
    width: int,
    precision: int,
    *,
    inline: bool,
) -> Iterator[Renderable]:
    """``left`` and each norm's array beside it: all of it, or a corner that fits two norms abreast."""
    columns = c.x.shape[c.layout.index("c")]
    while True:
        lead = _lead(c, title, left, columns, inline)
        blocks = [_block(c, t, a, columns, precision, inline) for t, a in arrays]
        used = len(lead[0]) + sum(len(block[0]) + 2 for block in blocks[: 2 if width >= 60 else 1])
        if used <= width or columns == 1:
            break
        columns = min(columns - 1, max(1, columns * width // used))
    while blocks:
        taken = [blocks.pop(0)]
        while blocks and len(lead[0]) + sum(len(block[0]) + 2 for block in (*taken, blocks[0])) <= width:
            taken.append(blocks.pop(0))
        height = max(len(block) for block in (lead, *taken))
        padded = [block + [" " * len(block[0])] * (height - len(block)) for block in (lead, *taken)]
        for i, parts in enumerate(zip(*padded, strict=True)):
            yield Text("  ".join(parts), "bold" if i == 0 else "")


def shown(c: Comparison) -> bool:
    """True if the table holds every value, or nearly."""
    return len(_matrix(c, c.x)) <= _height(c) and c.x.shape[c.layout.index("c")] <= 6


def _height(c: Comparison) -> int:
    """How many rows of a taller batch are shown, from the chosen cell on."""
    return 8 if len(c.traces) <= 2 else 4


def _matrix(c: Comparison, array: Array) -> Array:
    """Channels as columns, everything else as rows."""
    channel = c.layout.index("c")
    return np.moveaxis(array, channel, -1).reshape(-1, array.shape[channel])


def _lead(c: Comparison, title: str, array: Array, columns: int, inline: bool) -> list[str]:
    """Row names and the input."""
    full, rows, _, _ = corner(c, array, _height(c), columns)
    names = ["", *rows, *(["..."] if len(full) > _height(c) else [])]
    cells = _cells(c, array, columns, labels.short, 4)
    if columns < array.shape[c.layout.index("c")]:
        cells = [cells[0] + " ...", *(line + "    " for line in cells[1:])]
    margin = max(len(name) for name in names) + 4
    lines = [name.rjust(margin) + row for name, row in zip(names, cells, strict=True)]
    wide = max(len(lines[0]), 20)
    head = [" " * margin + title.center(len(cells[0]))]
    if c.x.ndim > 2 or len(c.traces) > 2:
        head.append("")
    tail = ["    one mean for", "    variance"] if inline else []
    return [line.ljust(wide) for line in (*head, *lines, *tail)]


def _block(c: Comparison, t: Trace, array: Array | None, columns: int, precision: int, inline: bool) -> list[str]:
    """A norm's title, its values and its statistics; or why it has none."""
    head = [f"{t.norm.title}   {t.norm.pattern}"]
    if c.x.ndim > 2 or len(c.traces) > 2:
        head = [t.norm.title, str(t.norm.pattern)]
    if array is None:
        wide = max(26, *(len(line) for line in head))
        why = textwrap.wrap(t.refused, wide) if len(c.traces) <= 2 else ["no variance: see below"]
        return [line.ljust(wide) for line in (*head, "", *why)]
    cells = _cells(c, array, columns, lambda v: labels.value(v, precision), precision + 5)
    tail = _statistics(c, t) if inline else []
    wide = max(len(line) for line in (*head, *cells, *tail))
    pad = " " * ((wide - len(cells[0])) // 2)
    return [
        *(line.center(wide) for line in head),
        *(line.ljust(wide) for line in (*(pad + row for row in cells), *tail)),
    ]


def _cells(c: Comparison, array: Array, columns: int, form: labels.Form, least: int) -> list[str]:
    """A line of column names and the formatted corner of an array."""
    full, _, top, left = corner(c, array, _height(c), columns)
    texts = [[form(v) for v in row[left : left + columns]] for row in full[top : top + _height(c)]]
    prefix = labels.axis_prefix(c.layout, "c")
    names = [f"{prefix}{left + i}" for i in range(columns)]
    wide = max(least, *(len(text) + 2 for row in (*texts, names) for text in row))
    lines = ["".join(text.rjust(wide) for text in row) for row in (names, *texts)]
    return lines + ([" " * len(lines[0])] if len(full) > _height(c) else [])


def statistics_inline(c: Comparison) -> bool:
    """True if the statistics stand under the columns of the table."""
    return c.layout == "nc" and len(c.traces) <= 2


def _statistics(c: Comparison, t: Trace) -> list[str]:
    """Whose mean, and what variance."""
    word = {"c": "COLUMN", "n": "ROW"}.get(" ".join(t.norm.pattern.right)) if c.layout == "nc" else None
    mean, var = statistics(t)
    return [f"each {word or labels.unit(t.norm.pattern, c.layout)}: {mean}", var]


def statistics(t: Trace) -> tuple[str, str]:
    """The means and the variances in a few words."""
    m = t.facts.values_per_statistic
    if not t.norm.centred:
        return "none", f"{_few(t.var, m)} (mean square)"
    if t.norm.uses_running and t.norm.running is not None:
        return _few(t.norm.running.mean), _few(t.norm.running.var)
    return _few(t.mean), _few(t.var, m)


def _few(values: Array, m: int = 0) -> str:
    """All of a few values, one for all if they agree, else their range; with ``m``, as a fraction where simple."""
    flat = values.reshape(-1)
    low, high = float(flat.min()), float(flat.max())
    if np.isclose(low, high, rtol=1e-9, atol=0) and (m or flat.size == 1):
        count = "" if flat.size == 1 else f" in all {flat.size}"
        total = low * m
        terminates = labels.short(low, 3) == labels.short(low, 9)
        fraction = "" if terminates or not m or abs(total - round(total)) > 1e-9 else f"{round(total)}/{m} = "
        return f"{fraction}{labels.short(low)}{count}"
    if flat.size <= 4:
        return " ".join(labels.short(v) for v in flat)
    return f"{labels.short(low)} to {labels.short(high)}"


def corner(c: Comparison, array: Array, rows: int, columns: int) -> tuple[Array, list[str], int, int]:
    """The matrix of an array, the names of ``rows`` rows, and where the corner that holds the chosen cell begins."""
    full = _matrix(c, array)
    channel = c.layout.index("c")
    axes = [(a, n, i) for k, (a, n, i) in enumerate(zip(c.layout, c.x.shape, c.cell, strict=True)) if k != channel]
    sizes = [n for _, n, _ in axes]
    chosen = int(np.ravel_multi_index([i for _, _, i in axes], sizes))
    top = max(0, min(chosen, len(full) - rows))
    left = max(0, min(c.cell[channel], full.shape[1] - columns))
    indices = zip(*np.unravel_index(np.arange(top, min(top + rows, len(full))), sizes), strict=True)
    names = [
        ",".join(f"{labels.axis_prefix(c.layout, a)}{i}" for (a, _, _), i in zip(axes, row, strict=True))
        for row in indices
    ]
    return full, names, top, left


def sparkline(values: Array, bins: int) -> str:
    """A histogram from the least to the greatest value."""
    counts, _ = np.histogram(values, bins)
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
    yield Text(heading, "bold")
    for name, cells in rows:
        yield from textwrap.wrap(name, width, initial_indent="    ", subsequent_indent="    ")
        for cell in dict.fromkeys(cells):
            alike = ", ".join(title for title, own in zip(titles, cells, strict=True) if own == cell)
            yield from textwrap.wrap(f"{cell}: {alike}", width, initial_indent=" " * 8, subsequent_indent=" " * 10)
