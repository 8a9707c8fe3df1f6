"""A comparison as JSON: every number in full, of large arrays a corner."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .trace import Array, Trace

if TYPE_CHECKING:
    from .comparison import Comparison

SCHEMA = "normwise.comparison"
VERSION = 1
WHOLE = 4096  # longer arrays are cut to a corner
NUMBER = r'(?:[-+.\deE]+|"NaN"|"-?Infinity")'
NUMBERS = re.compile(rf"\[\n\s*{NUMBER}(?:,\n\s*{NUMBER})*\n\s*\]")  # no string of JSON holds a line break
MOMENTS = ("mean", "var")


def render(c: Comparison, *, indent: int | None) -> str:
    """The comparison as JSON; nan and infinities are strings, and a list of numbers stands on one line."""
    text = json.dumps(plain(_data(c)), indent=indent, allow_nan=False)
    return NUMBERS.sub(lambda found: " ".join(found[0].split()).replace("[ ", "[").replace(" ]", "]"), text)


def _data(c: Comparison) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "batch": {
            "name": c.name,
            "notes": c.notes,
            "shape": c.x.shape,
            "layout": c.layout,
            "dtype": c.dtype,
            "feature_names": c.feature_names,
            "values": _corner(c.x),
        },
        "mode": c.mode,
        "cell": c.cell,
        "norms": [_trace_data(t, c.cell) for t in c.traces],
        "notices": [{"kind": n.kind, "text": n.text(6), "values": n.values} for n in c.notices],
        "peers": [
            {"layer": p.layer, "norm": p.norm, "largest_difference": p.difference, "close": p.close} for p in c.peers
        ],
    }


def _trace_data(t: Trace, cell: tuple[int, ...]) -> dict[str, Any]:
    norm, running, backward = t.norm, t.norm.running, t.backward
    return {
        "name": norm.name,
        "title": norm.title,
        "pattern": str(norm.pattern),
        "affine": norm.affine,
        "centred": norm.centred,
        "training": not norm.uses_running,
        "eps": norm.eps,
        "sizes": t.sizes,
        "facts": vars(t.facts),
        "refused": t.refused or None,
        "weight": _corner(norm.weight),
        "bias": _corner(norm.bias),
        "running": None if running is None else {**vars(running), **{k: _corner(vars(running)[k]) for k in MOMENTS}},
        "statistics": None if t.refused else {k: _corner(getattr(t, k)) for k in (*MOMENTS, "rstd")},
        "xhat": None if t.refused else _corner(t.xhat),
        "y": None if t.refused else _corner(t.y),
        "cell": None if t.refused else {"xhat": float(t.xhat[cell]), "y": float(t.y[cell])},
        "backward": None if backward is None else {k: _corner(v) for k, v in vars(backward).items()},
    }


def _corner(array: Array | None) -> Any:
    """The values of a small array; of a large one its shape and the first values of each axis, about 64."""
    if array is None or array.size <= WHOLE:
        return array
    keep = round(64 ** (1 / array.ndim))
    return {"shape": array.shape, "corner": array[tuple(slice(keep) for _ in array.shape)]}


def plain(data: Any) -> Any:
    """Arrays to lists, mappings to objects, nan and infinities to strings."""
    if isinstance(data, np.ndarray):
        return plain(data.tolist())
    if isinstance(data, Mapping):
        return {str(key): plain(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [plain(value) for value in data]
    if isinstance(data, float) and not math.isfinite(data):
        return "NaN" if math.isnan(data) else "Infinity" if data > 0 else "-Infinity"
    return data
