"""One value of the batch, worked out in full: which others share its statistics, and each step with its numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..definitions import parse_axes
from . import labels
from .trace import Array, Trace

if TYPE_CHECKING:
    from .comparison import Comparison

SHOWN = 6  # so many of the values that share statistics are listed


def heading(c: Comparison) -> str:
    """Which value it is."""
    ways = "both ways" if len(c.traces) == 2 else "each way"
    return f"One number, {ways}: {labels.cell_name(c.layout, c.cell)} = {labels.short(c.x[c.cell], 6)}"


def steps(c: Comparison, width: int) -> Iterator[str]:
    """How every norm comes to its output for the chosen value."""
    margin = _margin(c)
    statistics = [[] if t.refused else _statistics(c, t) for t in c.traces]
    wide = [max((len(parts[k]) for parts in statistics if len(parts) > k), default=0) for k in range(3)]
    aligned = sum(wide) + 6 <= width - margin
    for t, parts in zip(c.traces, statistics, strict=True):
        lines = (
            [t.refused] if t.refused else [*_in_lines(parts, wide if aligned else (), width - margin), _formula(c, t)]
        )
        yield from _beside(t.norm.title, lines, margin, width)


def backward_steps(c: Comparison, width: int) -> Iterator[str]:
    """The terms of dx for the chosen value, and the gradients of weight and bias."""
    for t in c.traces:
        b = t.backward
        if b is None:
            continue
        terms = {"direct": b.direct, "through the mean": b.through_mean, "through the variance": b.through_var}
        if not t.norm.centred:
            del terms["through the mean"]
        shown = ", ".join(f"{name} {labels.value(a[c.cell], 6)}" for name, a in terms.items())
        lines = [
            f"{labels.cell_name(c.layout, c.cell)}: {shown}; dx = {labels.value(b.dx[c.cell], 6)}",
            f"dweight {_some(b.dweight)}" + ("" if t.norm.name == "rms_norm" else f"   dbias {_some(b.dbias)}"),
        ]
        yield from _beside(t.norm.title, lines, _margin(c), width)


def _margin(c: Comparison) -> int:
    """Where the steps begin, right of the longest title."""
    return max(len(t.norm.title) for t in c.traces) + 6


def _beside(title: str, lines: Sequence[str], margin: int, width: int) -> Iterator[str]:
    for i, line in enumerate(lines):
        first = f"    {title}".ljust(margin) if i == 0 else " " * margin
        yield from labels.wrap(line, width, first, " " * margin)


def _some(values: Array) -> str:
    flat = values.reshape(-1)
    return " ".join(labels.value(v, 6) for v in flat[:4]) + (f" ... ({flat.size} values)" if flat.size > 4 else "")


def _in_lines(parts: Sequence[str], wide: Sequence[int], room: int) -> list[str]:
    """The statistics on one line, under those of the other norms; or the values on a line of their own."""
    if wide:
        return ["   ".join(labels.tied(part.ljust(w)) for part, w in zip(parts, wide, strict=False)).rstrip()]
    line = "   ".join(parts)
    return [line] if len(line) <= room else [parts[0], "   ".join(parts[1:])]


def _statistics(c: Comparison, t: Trace) -> list[str]:
    """Whose statistics, which mean and which variance."""
    values, mean, var = _group(c, t)
    m = len(values)
    if t.norm.uses_running:
        return [f"running mean {labels.short(mean, 6)}", f"running variance {labels.short(var, 6)}"]
    members = " ".join(labels.short(v) for v in values[:SHOWN]) + (f" ... ({m} values)" if m > SHOWN else "")
    square = np.square(values - (mean if t.norm.centred else 0)).sum()
    whose = f"{_word(c, t)} {members}"
    if not t.norm.centred:
        return [whose, f"mean square {_ratio(square, m, var)}"]
    return [whose, f"mean {_ratio(values.sum(), m, mean)}", f"variance {_ratio(square, m, var)}"]


def _formula(c: Comparison, t: Trace) -> str:
    """``(2 - 2.5) / sqrt(1.25 + eps) = -0.447212``; and what rounding to the input's type makes of it."""
    x, (_, mean, var) = float(c.x[c.cell]), _group(c, t)
    top = _difference(x, mean) if t.norm.centred else labels.short(x, 6)
    line = f"{top} / sqrt({labels.short(var, 6)} + eps)"
    weight, bias = (_parameter(c, t, p) for p in (t.norm.weight, t.norm.bias))
    line += f" * {labels.short(weight, 6)}" if weight is not None else ""
    line += f" + {labels.short(bias, 6)}".replace("+ -", "- ") if bias is not None else ""
    exact = float(t.xhat[c.cell]) * (1 if weight is None else weight) + (bias or 0)
    shown, rounded = (labels.value(v, 6) for v in (exact, float(t.y[c.cell])))
    half = c.dtype in ("bfloat16", "float16") and shown != rounded
    return f"{line} = {shown}, in {c.dtype} {rounded}" if half else f"{line} = {rounded}"


def _difference(x: float, mean: float) -> str:
    """``(2 - 2.5)``, with as many digits as it takes to be followed by hand where both are large."""
    for digits in (6, 9, 12, 15, 17):
        shown = labels.short(x, digits), labels.short(mean, digits)
        if not abs(float(shown[0]) - float(shown[1]) - (x - mean)) > 1e-5 * abs(x - mean) + 1e-6:
            break
    return f"({shown[0]} - {shown[1]})".replace("- -", "+ ")


def _ratio(total: float, m: int, result: float) -> str:
    if float(total).is_integer() and abs(total) < 1e6:
        return f"{int(total)}/{m} = {labels.short(result, 6)}"
    return labels.short(result, 6)


def _group(c: Comparison, t: Trace) -> tuple[Array, float, float]:
    """The values that share statistics with the chosen one, their mean and their variance."""
    where = _coordinates(c, t)
    elementary = c.x.reshape([t.sizes[name] for name in t.norm.pattern.names])
    values = elementary[tuple(where[n] if n in t.norm.pattern.right else slice(None) for n in t.norm.pattern.names)]
    kept = tuple(where[name] for name in t.norm.pattern.right)
    return values.reshape(-1), float(t.mean[kept]), float(t.var[kept])


def _parameter(c: Comparison, t: Trace, values: Array | None) -> float | None:
    """The weight or bias of the chosen value."""
    if values is None:
        return None
    where = _coordinates(c, t)
    items = parse_axes(t.norm.affine, "affine")
    index = tuple(np.ravel_multi_index([where[n] for n in item], [t.sizes[n] for n in item]) for item in items)
    return float(values[tuple(int(i) for i in index)])


def _word(c: Comparison, t: Trace) -> str:
    """What the sharing values are: a column, a row, a position."""
    unit = labels.unit(t.norm.pattern, c.layout)
    plain = {"feature": "column", "sample": "row"}.get(unit) if c.layout == "nc" else None
    return plain or unit.removesuffix(" of each sample")


def _coordinates(c: Comparison, t: Trace) -> dict[str, int]:
    found: dict[str, int] = {}
    for item, i in zip(t.norm.pattern.left, c.cell, strict=True):
        lengths = [t.sizes[name] for name in item]
        found.update(zip(item, (int(k) for k in np.unravel_index(i % math.prod(lengths), lengths)), strict=True))
    return found
