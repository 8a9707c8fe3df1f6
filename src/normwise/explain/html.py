"""A comparison as one HTML document that needs nothing else: no script, no network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from . import labels, table
from .facts_table import summary_rows
from .trace import Array, Trace

if TYPE_CHECKING:
    from .comparison import Comparison

ROWS, COLUMNS = 16, 12  # a larger batch shows this corner

STYLE = """
.nw { font: 15px/1.5 system-ui, sans-serif; color: #1b1f24; background: #fff; max-width: 72rem; }
.nw h1 { font-size: 1.5rem; margin: 0 0 .2rem } .nw h2 { font-size: 1.05rem; margin: 1.6rem 0 .4rem }
.nw p { margin: .2rem 0 } .nw .notes { color: #57606a }
.nw .norms { display: flex; flex-wrap: wrap; gap: 1.5rem; align-items: flex-start }
.nw figure { margin: 0; overflow-x: auto } .nw figcaption { font-weight: 600; margin-bottom: .3rem }
.nw code { font: .9em ui-monospace, monospace; font-weight: 400 }
.nw table { border-collapse: collapse; font-variant-numeric: tabular-nums }
.nw th { font-weight: 500; color: #57606a; text-align: left; padding: .2rem .6rem }
.nw td { text-align: right; padding: .2rem .6rem } .nw .words td { text-align: left }
.nw td.chosen { outline: 2px solid currentColor; outline-offset: -2px }
.nw .words tr { border-top: 1px solid #d0d7de } .nw li { margin: .25rem 0 }
@media (prefers-color-scheme: dark) {
  .nw { color: #e6edf3; background: #0d1117 } .nw th, .nw .notes { color: #9198a1 }
  .nw .words tr { border-color: #3d444d }
}
body { margin: 2rem; } @media (prefers-color-scheme: dark) { body { background: #0d1117 } }
"""


def render(c: Comparison) -> str:
    """The whole document. Its policy forbids scripts and every outside resource."""
    title = escape(f"normwise: {c.name}")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"{_body(c)}\n"
        '<p class="nw notes">This file embeds the batch and everything computed from it (below, as JSON): '
        "share it only where you would share the data.</p>\n"
        f'<script type="application/json" id="comparison">{_embedded(c)}</script>\n</body>\n</html>\n'
    )


def fragment(c: Comparison) -> str:
    """The same for a notebook: no document around it, no embedded JSON."""
    return f"<style>{STYLE.split('body {')[0]}</style>{_body(c)}"


def _embedded(c: Comparison) -> str:
    """JSON that cannot end its script element."""
    return c.to_json(indent=None).replace("<", "\\u003c")


def _body(c: Comparison) -> str:
    return f'<div class="nw">{"".join(_parts(c))}</div>'


def _parts(c: Comparison) -> Iterator[str]:
    shape = " × ".join(f"{n} {labels.axis_word(c.layout, a, n)}" for a, n in zip(c.layout, c.x.shape, strict=True))
    yield f"<h1>{escape(c.name)}</h1><p>{shape}, {'training' if c.mode == 'train' else 'eval'}, {c.dtype}</p>"
    yield "".join(f'<p class="notes">{escape(note)}</p>' for note in c.notes)
    yield '<div class="norms">'
    yield _figure(c, "input", "", c.x, None)
    for t in c.traces:
        if t.refused:
            yield f"<figure>{_caption(t)}<p>{escape(t.refused)}</p></figure>"
        else:
            mean, var = table.statistics(t)
            unit = labels.unit(t.norm.pattern, c.layout)
            under = f"<p>one mean for each {unit}: {escape(mean)}</p><p>variance: {escape(var)}</p>"
            yield _figure(c, t.norm.title, str(t.norm.pattern), t.y, 3.0, under)
    yield "</div>"
    if c.notices:
        items = "".join(f"<li>{escape(n.text())}</li>" for n in c.notices)
        yield f"<h2>What to notice (computed from this batch)</h2><ul>{items}</ul>"
    yield "<h2>What follows from the patterns</h2>"
    yield _words([t.norm.title for t in c.traces], summary_rows(c))


def _caption(t: Trace) -> str:
    return f"<figcaption>{escape(t.norm.title)} <code>{escape(str(t.norm.pattern))}</code></figcaption>"


def _figure(c: Comparison, title: str, pattern: str, array: Array, scale: float | None, under: str = "") -> str:
    """A table of numbers; with a scale, each cell coloured from -scale to scale."""
    full, names, top, left = table.corner(c, array, ROWS, COLUMNS)
    shown = full[top : top + ROWS, left : left + COLUMNS]
    prefix = labels.axis_prefix(c.layout, "c")
    head = "".join(f'<th scope="col">{prefix}{left + i}</th>' for i in range(shown.shape[1]))
    body = "".join(
        f'<tr><th scope="row">{name}</th>'
        + "".join(f"<td{_shade(v, scale)}>{labels.short(v) if scale is None else labels.value(v)}</td>" for v in row)
        + "</tr>"
        for name, row in zip(names, shown, strict=True)
    )
    cut = "" if shown.size == full.size else f"<p>a corner of {full.shape[0]} × {full.shape[1]}</p>"
    caption = f"<figcaption>{escape(title)} <code>{escape(pattern)}</code></figcaption>"
    return (
        f"<figure>{caption}<table><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table>"
        f"{cut}{under}</figure>"
    )


def _shade(v: float, scale: float | None) -> str:
    """Blue below zero, orange above, stronger away from it; the number says the same."""
    if scale is None or not np.isfinite(v):
        return ""
    strength = round(min(abs(v) / scale, 1) * 0.45, 3)
    return f' style="background: rgba({"230,120,20" if v > 0 else "30,110,220"},{strength})"'


def _words(titles: Sequence[str], rows: Sequence[tuple[str, list[str]]]) -> str:
    head = "".join(f'<th scope="col">{escape(t)}</th>' for t in titles)
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
        for name, cells in rows
    )
    return f'<table class="words"><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table>'
