"""A comparison as static HTML tables: no script, no network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from . import cell, header, labels, table
from .facts_table import summary_rows
from .trace import Array, Trace

if TYPE_CHECKING:
    from .comparison import Comparison

ROWS, COLUMNS = 16, 12  # a larger batch shows this corner
WIDTH = 100  # of the steps of one number
BELOW, ABOVE, STRONGEST = (30, 110, 220), (230, 120, 20), 0.45  # colours of either sign, and the most of them on white
SCALE = 3.0  # outputs this far from zero and further have the strongest colour

STYLE = """
.nw { font: 15px/1.5 system-ui, sans-serif; color: #1b1f24; background: #fff; max-width: 72rem; }
.nw h1 { font-size: 1.5rem; margin: 0 0 .2rem } .nw h2 { font-size: 1.05rem; margin: 1.6rem 0 .4rem }
.nw p { margin: .2rem 0 } .nw .notes { color: #57606a }
.nw .norms { display: flex; flex-wrap: wrap; gap: 1.5rem; align-items: flex-start; margin: .8rem 0 }
.nw figure { margin: 0; overflow-x: auto } .nw figcaption { font-weight: 600; margin-bottom: .3rem }
.nw code { font: .9em ui-monospace, monospace; font-weight: 400 }
.nw table { border-collapse: collapse; font-variant-numeric: tabular-nums }
.nw th { font-weight: 500; color: #57606a; text-align: left; padding: .2rem .6rem }
.nw td, .nw thead th { text-align: right; padding: .2rem .6rem } .nw .words td, .nw .words th { text-align: left }
.nw pre { font: .87rem/1.45 ui-monospace, monospace; margin: 0; overflow-x: auto }
.nw td.chosen { outline: 2px solid currentColor; outline-offset: -2px }
.nw .words tr { border-top: 1px solid #d0d7de } .nw li { margin: .25rem 0 }
@media (prefers-color-scheme: dark) {
  .nw { color: #e6edf3; background: #0d1117 } .nw th, .nw .notes { color: #9198a1 }
  .nw .words tr { border-color: #3d444d }
}
"""


@np.errstate(all="ignore")
def fragment(c: Comparison) -> str:
    """The tables with their style: no document around them."""
    return styled("".join(_parts(c)))


def styled(content: str) -> str:
    """Content in the style of the tables."""
    return f'<style>{STYLE}</style><div class="nw">{content}</div>'


def _parts(c: Comparison) -> Iterator[str]:
    shape, *settings = header.parts(c)
    yield f"<h1>{escape(c.name)}</h1><p>{escape(', '.join([shape.removeprefix(c.name + ', '), *settings]))}</p>"
    yield "".join(f'<p class="notes">{escape(labels.untied(note))}</p>' for note in header.notes(c))
    yield f'<div class="norms">{_figure(c, "input", "", c.x, None)}'
    for t in c.traces:
        yield f"<figure>{_caption(t)}<p>{escape(t.refused)}</p></figure>" if t.refused else _outputs(c, t)
    yield f"</div><h2>{escape(cell.heading(c))}</h2>"
    yield _steps(cell.steps(c, WIDTH))
    yield from _backward(c)
    if c.notices:
        items = "".join(f"<li>{escape(n.text())}</li>" for n in c.notices)
        yield f"<h2>What to notice (computed from this batch)</h2><ul>{items}</ul>"
    yield "<h2>What follows from the patterns</h2>"
    yield words(*summary_rows(c))


def _outputs(c: Comparison, t: Trace) -> str:
    mean, var = table.statistics(t)
    unit = labels.each(labels.unit(t.norm.pattern, c.layout))
    under = f"<p>one mean for {unit}: {escape(mean)}</p><p>variance: {escape(var)}</p>"
    return _figure(c, t.norm.title, str(t.norm.pattern), t.y, SCALE, under)


def _backward(c: Comparison) -> Iterator[str]:
    done = [(t, t.backward) for t in c.traces if t.backward is not None]
    if done:
        yield f'<h2>Backward: dL/dx for this dL/dy</h2><div class="norms">{_figure(c, "dy", "", done[0][1].dy, None)}'
        yield "".join(_figure(c, t.norm.title, str(t.norm.pattern), b.dx, SCALE) for t, b in done)
        yield f"</div>{_steps(cell.backward_steps(c, WIDTH))}"


def _steps(lines: Iterator[str]) -> str:
    return "<pre>" + escape("\n".join(line.removeprefix("    ") for line in lines)) + "</pre>"


def _caption(t: Trace) -> str:
    return f"<figcaption>{escape(t.norm.title)} <code>{escape(str(t.norm.pattern))}</code></figcaption>"


def _figure(c: Comparison, title: str, pattern: str, array: Array, scale: float | None, under: str = "") -> str:
    """A table of numbers; with a scale, each cell coloured from -scale to scale."""
    found = table.corner(c, array, ROWS, COLUMNS)
    flat = found.values.reshape(-1).tolist()
    texts = labels.column(flat) if scale is None else [labels.value(v) for v in flat]
    cells = [f"<td{_shade(v, scale)}>{text}</td>" for v, text in zip(flat, texts, strict=True)]
    cells[found.chosen] = cells[found.chosen].replace("<td", '<td class="chosen"')  # the one that is worked out in full
    wide = found.values.shape[1]
    head = "".join(f'<th scope="col">{labels.axis_prefix(c.layout, "c")}{found.left + i}</th>' for i in range(wide))
    body = "".join(
        f'<tr><th scope="row">{name}</th>{"".join(cells[i * wide : (i + 1) * wide])}</tr>'
        for i, name in enumerate(found.rows)
    )
    rows = c.x.size // c.x.shape[c.layout.index("c")]
    cut = "" if len(flat) == array.size else f"<p>a corner of {rows} × {array.size // rows}</p>"
    caption = f"<figcaption>{escape(title)} <code>{escape(pattern)}</code></figcaption>"
    return (
        f"<figure>{caption}<table><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table>"
        f"{cut}{under}</figure>"
    )


def _shade(v: float, scale: float | None) -> str:
    """Blue below zero, orange above, stronger away from it; the number says the same."""
    if scale is None or not np.isfinite(v):
        return ""
    strength = round(min(abs(v) / scale, 1) * STRONGEST, 3)
    return f' style="background: rgba({",".join(map(str, ABOVE if v > 0 else BELOW))},{strength})"'


def words(titles: Sequence[str], rows: Sequence[tuple[str, list[str]]]) -> str:
    """A table of words with a column for each title."""
    head = "".join(f'<th scope="col">{escape(t)}</th>' for t in titles)
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
        for name, cells in rows
    )
    return f'<table class="words"><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table>'
