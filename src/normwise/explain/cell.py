"""One value of the batch: which others share its statistics, and which parameters are its own."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from ..definitions import parse_axes
from . import labels
from .trace import Array, Trace

if TYPE_CHECKING:
    from .comparison import Comparison


def group(c: Comparison, t: Trace) -> tuple[Array, float, float]:
    """The values that share statistics with the chosen cell, their mean and their variance."""
    where = _coordinates(c, t)
    elementary = c.x.reshape([t.sizes[name] for name in t.norm.pattern.names])
    values = elementary[tuple(where[n] if n in t.norm.pattern.right else slice(None) for n in t.norm.pattern.names)]
    kept = tuple(where[name] for name in t.norm.pattern.right)
    return values.reshape(-1), float(t.mean[kept]), float(t.var[kept])


def parameter(c: Comparison, t: Trace, values: Tensor | None) -> float | None:
    """The weight or bias of the chosen cell."""
    if values is None:
        return None
    where = _coordinates(c, t)
    items = parse_axes(t.norm.affine, "affine")
    index = tuple(np.ravel_multi_index([where[n] for n in item], [t.sizes[n] for n in item]) for item in items)
    return float(values[tuple(int(i) for i in index)])


def word(c: Comparison, t: Trace) -> str:
    """What the sharing values are: a column, a row, a position."""
    kept = " ".join(t.norm.pattern.right)
    plain = {"c": "column", "n": "row"}.get(kept) if c.layout == "nc" else None
    return plain or labels.unit(t.norm.pattern, c.layout).split(" ")[0]


def _coordinates(c: Comparison, t: Trace) -> dict[str, int]:
    found: dict[str, int] = {}
    for item, i in zip(t.norm.pattern.left, c.cell, strict=True):
        lengths = [t.sizes[name] for name in item]
        found.update(zip(item, (int(k) for k in np.unravel_index(i % math.prod(lengths), lengths)), strict=True))
    return found
