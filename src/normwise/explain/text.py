"""A comparison as text: what the terminal shows."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from . import cell, labels, table
from .facts_table import property_rows, summary_rows
from .trace import Array, Trace

if TYPE_CHECKING:
    from .comparison import Comparison

HEADING = "bold"


def render(c: Comparison, *, width: int, precision: int, color: bool, summary: bool) -> str:
    """The comparison in at most ``width`` columns."""
    width = max(width, 40) - 2
    lines = _summary(c, width) if summary else _screen(c, width, precision)
    out = io.StringIO()
    console = Console(file=out, width=width, color_system="standard" if color else None, force_terminal=color)
    for line in lines:
        console.print(line, soft_wrap=not isinstance(line, Table), highlight=False, markup=False, emoji=False)
    return "".join(f"{line.rstrip()}\n" for line in out.getvalue().splitlines())


def _screen(c: Comparison, width: int, precision: int) -> Iterator[table.Renderable]:
    yield from _header(c, width)
    arrays = [(t, None if t.refused else t.y) for t in c.traces]
    inline = table.statistics_inline(c)
    yield from table.side_by_side(c, "input", c.x, arrays, width, precision, inline=inline)
    if not inline:
        yield from _statistics(c, width)
    if not table.shown(c):
        yield from _distributions(c, width, precision)
    yield from _one_number(c, width)
    yield from _gradient(c, width, precision)
    if c.notices:
        yield Text("What to notice (computed from this batch)", HEADING)
        for notice in c.notices:
            yield from textwrap.wrap(notice.text(precision), width, initial_indent="  * ", subsequent_indent="    ")
    yield from _properties(c, width)
    yield from _peers(c, width)
    yield "next:  normwise compare your.npy     --summary     --html page.html     --help"[:width]


def _header(c: Comparison, width: int) -> Iterator[table.Renderable]:
    shape = " x ".join(f"{n} {labels.axis_word(c.layout, a, n)}" for a, n in zip(c.layout, c.x.shape, strict=True))
    eps = " or ".join(dict.fromkeys(f"{t.norm.eps:.3g}".replace("e-0", "e-") for t in c.traces))
    mode = "training" if c.mode == "train" else "eval"
    kind = "" if c.dtype == "float64" else f"   {c.dtype}"
    yield from _styled(f"normwise compare   {c.name}, {shape}   {mode}   eps {eps}{kind}", width, HEADING)
    for note in (*c.notes, *_reading(c)):
        yield from _wrapped(f"({note})", width, " ")


def _reading(c: Comparison) -> Iterator[str]:
    """How the axes are read: which ones Layer Norm takes is the commonest confusion."""
    first = ",".join(f"{labels.axis_prefix(c.layout, a)}0" for a in c.layout)
    if c.layout == "nc":
        yield f"{first} is sample 0, feature 0: counted from 0"
        return
    axes = ", ".join(f"{a} = {labels.axis_word(c.layout, a, 2)}" for a in c.layout)
    yield f"axes read as {c.layout}: {axes}, counted from 0; --layout reads them otherwise"
    if any(t.norm.name == "layer_norm" for t in c.traces):
        whole = f"{' '.join(c.layout)} -> n"
        here = next(str(t.norm.pattern) for t in c.traces if t.norm.name == "layer_norm")
        if here != whole:
            yield (
                "Layer Norm here takes the channels of each position, as transformers and ConvNeXt do; "
                f"the whole sample, as the GroupNorm paper draws it: --pattern '{whole}'"
            )


def _statistics(c: Comparison, width: int) -> Iterator[table.Renderable]:
    """Whose mean and variance, for each norm on a line."""
    found = [t for t in c.traces if not t.refused]
    rows = [("", "one mean for each", "mean", "variance")]
    rows += [(t.norm.title, labels.unit(t.norm.pattern, c.layout), *table.statistics(t)) for t in found]
    wide = [max(len(row[i]) for row in rows) + 2 for i in range(3)]
    for i, row in enumerate(rows):
        line = "    " + "".join(text.ljust(w) for text, w in zip(row, wide, strict=False)) + row[3]
        for part in _wrapped(line, width, " " * 8):
            yield Text(part, HEADING if i == 0 else "")


def _distributions(c: Comparison, width: int, precision: int) -> Iterator[table.Renderable]:
    named = [("input", c.x), *((t.norm.title, t.y) for t in c.traces if not t.refused)]
    first = max(len(name) for name, _ in named) + 4
    yield Text(
        "All values".ljust(first) + "".join(h.rjust(11) for h in ("min", "max", "mean", "sd")) + "   histogram", HEADING
    )
    for name, values in named:
        finite = values[np.isfinite(values)]
        if not finite.size:
            continue
        low, high, mean, sd = finite.min(), finite.max(), finite.mean(), finite.std()
        numbers = (low, high, 0.0 if abs(mean) < 1e-6 * sd else mean, sd)
        line = f"    {name}".ljust(first) + "".join(labels.short(v, precision).rjust(11) for v in numbers)
        yield f"{line}   {table.sparkline(finite, min(16, max(4, width - len(line) - 3)))}"


def _one_number(c: Comparison, width: int) -> Iterator[table.Renderable]:
    here = labels.cell_name(c.layout, c.cell)
    other = ",".join(str(n - 1 if i == 0 else n // 2) for i, n in enumerate(c.x.shape))
    ways = "both ways" if len(c.traces) == 2 else "each way"
    line = f"One number, {ways}: {here} = {labels.short(c.x[c.cell], 6)}"
    offer = f"{line:56}another: --cell {other}"
    yield Text(offer if len(offer) <= width else line, HEADING)
    indent = max(len(t.norm.title) for t in c.traces) + 6
    for t in c.traces:
        head = f"    {t.norm.title}".ljust(indent)
        if t.refused:
            yield from textwrap.wrap(t.refused, width, initial_indent=head, subsequent_indent=" " * indent)
            continue
        for i, line in enumerate(_steps(c, t, width - indent)):
            yield from textwrap.wrap(
                line, width, initial_indent=head if i == 0 else " " * indent, subsequent_indent=" " * indent
            )


def _steps(c: Comparison, t: Trace, room: int) -> Iterator[str]:
    """The steps of one value: whose statistics, which mean and variance, and the formula with its numbers."""
    x = float(c.x[c.cell])
    values, mean, var = cell.group(c, t)
    m, show = len(values), lambda v: labels.short(v, 6)
    total, square = values.sum(), np.square(values - (mean if t.norm.centred else 0)).sum()
    members = " ".join(labels.short(v) for v in values[:6]) + (f" ... ({m} values)" if m > 6 else "")
    spread = "variance" if t.norm.centred else "mean square"
    if t.norm.uses_running:
        yield f"running mean {show(mean)}   running variance {show(var)}"
    else:
        steps = [f"{cell.word(c, t)} {members}", f"{spread} {_ratio(square, m, var)}"]
        if t.norm.centred:
            steps.insert(1, f"mean {_ratio(total, m, mean)}")
        line = "   ".join(steps)
        yield from [line] if len(line) <= room else [steps[0], "   ".join(steps[1:])]
    top = f"({show(x)} - {show(mean)})".replace("- -", "+ ") if t.norm.centred else show(x)
    line = f"{top} / sqrt({show(var)} + eps)"
    weight, bias = (cell.parameter(c, t, p) for p in (t.norm.weight, t.norm.bias))
    line += f" * {show(weight)}" if weight is not None else ""
    line += f" + {show(bias)}".replace("+ -", "- ") if bias is not None else ""
    yield f"{line} = {labels.value(float(t.y[c.cell]), 6)}"


def _ratio(total: float, m: int, result: float) -> str:
    if float(total).is_integer() and abs(total) < 1e6:
        return f"{int(total)}/{m} = {labels.short(result, 6)}"
    return labels.short(result, 6)


def _gradient(c: Comparison, width: int, precision: int) -> Iterator[table.Renderable]:
    done = [t for t in c.traces if t.backward is not None]
    if not done:
        return
    yield Text("Backward: dL/dx for this dL/dy", HEADING)
    first = done[0].backward
    if first is not None:
        arrays = [(t, None if t.backward is None else t.backward.dx) for t in c.traces]
        yield from table.side_by_side(c, "dy", first.dy, arrays, width, precision, inline=False)
    indent = max(len(t.norm.title) for t in c.traces) + 6
    for t in done:
        b = t.backward
        if b is None:
            continue
        terms = [labels.value(float(a[c.cell]), 6) for a in (b.direct, b.through_mean, b.through_var)]
        parts = [f"direct {terms[0]}", f"through the mean {terms[1]}", f"through the variance {terms[2]}"]
        if not t.norm.centred:
            del parts[1]
        lines = [
            f"{labels.cell_name(c.layout, c.cell)}: {', '.join(parts)}; dx = {labels.value(float(b.dx[c.cell]), 6)}",
            f"dweight {_some(b.dweight)}" + ("" if t.norm.name == "rms_norm" else f"   dbias {_some(b.dbias)}"),
        ]
        for i, line in enumerate(lines):
            head = f"    {t.norm.title}".ljust(indent) if i == 0 else " " * indent
            yield from textwrap.wrap(line, width, initial_indent=head, subsequent_indent=" " * indent)


def _some(values: Array) -> str:
    flat = values.reshape(-1)
    return " ".join(labels.value(v, 6) for v in flat[:4]) + (f" ... ({flat.size} values)" if flat.size > 4 else "")


def _properties(c: Comparison, width: int) -> Iterator[table.Renderable]:
    titles = [t.norm.title for t in c.traces]
    averaged = any(t.facts.depends_on_other_examples for t in c.traces)
    heading = "Because n is averaged away:" if averaged else "Because n is not averaged away:"
    yield from table.grid(heading, titles, property_rows(c), width)


def _summary(c: Comparison, width: int) -> Iterator[table.Renderable]:
    yield from _header(c, width)
    yield from table.grid(
        "Summary (derived from the patterns)", [t.norm.title for t in c.traces], summary_rows(c), width
    )


def _peers(c: Comparison, width: int) -> Iterator[table.Renderable]:
    if c.peers:
        worst = max(p.difference for p in c.peers)
        same = ", ".join(p.layer for p in c.peers)
        yield from _wrapped(
            f"= {same}: largest difference from torch {worst:.0e}".replace("e-0", "e-").replace("0e+00", "0"),
            width,
            "  ",
        )


def _wrapped(line: str, width: int, indent: str) -> Iterable[str]:
    return textwrap.wrap(line, width, subsequent_indent=indent) if len(line) > width else [line]


def _styled(line: str, width: int, style: str) -> Iterator[Text]:
    for part in _wrapped(line, width, "    "):
        yield Text(part, style)
