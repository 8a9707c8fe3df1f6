"""Several norms on one batch: which to compute, computed once, and handed to the renderers as immutable data."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..definitions import Pattern
from . import choose
from .load import Batch, as_batch, load_batch
from .notice import Notice, notices
from .peer import Peer, torch_peers
from .trace import Array, Trace, frozen, trace

SCHEMA = "normwise.comparison"
SCHEMA_VERSION = 1
JSON_VALUES = 4096  # longer arrays are cut to their corner

WORKED_DY = ((1, -1, 2), (0, 3, -2), (-1, 1, 0), (2, 0, 1))


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found; immutable. Print it, or use ``to_text``, ``to_json``, ``to_html``.

    Attributes:
        name: What the batch is called.
        notes: What was decided while reading it.
        x: The batch, float64, read-only.
        dtype: The type in which the norms ran.
        layout: A letter for each axis: n samples, c features or channels, l positions, h w an image.
        mode: ``"train"`` or ``"eval"``.
        traces: One for each norm.
        cell: The index of the value that is worked out in full.
        notices: What to notice in this batch.
        peers: The torch layers that compute the same, and how far away they are.
    """

    name: str
    notes: tuple[str, ...]
    x: Array
    dtype: str
    layout: str
    mode: str
    traces: tuple[Trace, ...]
    cell: tuple[int, ...]
    notices: tuple[Notice, ...]
    peers: tuple[Peer, ...]
    feature_names: tuple[str, ...] = ()

    def to_text(self, *, width: int = 80, precision: int = 3, color: bool = False, summary: bool = False) -> str:
        """The comparison as text of at most ``width`` columns; with ``summary``, the table of properties instead."""
        from . import text

        return text.render(self, width=width, precision=precision, color=color, summary=summary)

    def to_json(self, *, indent: int | None = 2) -> str:
        """The comparison as JSON; ``schema`` and ``version`` name its form, nan and infinities are strings."""
        return json.dumps(_plain(self._data()), indent=indent, allow_nan=False)

    def to_html(self) -> str:
        """One self-contained HTML document; it embeds the data."""
        from . import html

        return html.render(self)

    def _data(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "version": SCHEMA_VERSION,
            "batch": {
                "name": self.name,
                "notes": self.notes,
                "shape": self.x.shape,
                "layout": self.layout,
                "dtype": self.dtype,
                "feature_names": self.feature_names,
                "values": _corner(self.x),
            },
            "mode": self.mode,
            "cell": self.cell,
            "norms": [_trace_data(t) for t in self.traces],
            "notices": [{"kind": n.kind, "text": n.text(6), "values": n.values} for n in self.notices],
            "peers": [{"layer": p.layer, "norm": p.norm, "largest_difference": p.difference} for p in self.peers],
        }

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        from . import html

        return {"text/plain": self.to_text(), "text/html": html.fragment(self)}

    def __str__(self) -> str:
        return self.to_text()

    __repr__ = __str__


def compare(
    x: Any = None,
    norms: Sequence[str] | str = ("batch_norm", "layer_norm"),
    *,
    layer: nn.Module | None = None,
    pattern: str | None = None,
    layout: str | None = None,
    groups: int | None = None,
    mode: str = "train",
    steps: int = 1,
    momentum: float = 0.1,
    eps: float = 1e-5,
    weight: Any = None,
    bias: Any = None,
    cell: Sequence[int] | None = None,
    grad: Any = False,
    dtype: torch.dtype | None = None,
    allow_nonfinite: bool = False,
) -> Comparison:
    """Compare what norms do to one batch, step by step.

    Args:
        x: The batch: a tensor, an array, nested lists, or None for the worked batch. The first axis is the batch.
        norms: Names of norms, or ``"all"``: batch_norm, layer_norm, rms_norm, group_norm, instance_norm.
        layer: A norm layer of yours. It is shown with its weights and running statistics, in training and in eval,
            beside the alternatives; it is not changed.
        pattern: A norm of your own, ``"n c h w -> n h w"``, shown beside Batch Norm unless ``norms`` says otherwise.
        layout: The meaning of the axes: nc; nlc (default) or ncl; nchw (default) or nhwc; ncdhw (default) or ndhwc.
        groups: For group_norm; by default the largest number up to 32 that leaves two or more channels a group.
        mode: ``"train"``, or ``"eval"``: what runs on running statistics uses them.
        steps: Training steps on this batch before eval is looked at.
        momentum: The weight of each batch in the running statistics.
        eps: Added to the variance, inside the root; 0 is allowed.
        weight: A value for each channel, for every norm; None for 1.
        bias: A value for each channel, for every norm; None for 0.
        cell: The index of the value to work out in full; the first if None.
        grad: True, or a cotangent shaped like ``x``: show the backward pass too.
        dtype: Convert the batch to this type first.
        allow_nonfinite: Accept nan and infinities.

    Returns:
        A :class:`Comparison`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If it has a wrong value, or no norm can be computed on this batch.

    Numerics:
        Everything is computed in float64 by the reference; outputs are rounded to the batch's type.

    Example:
        >>> compare([[2, 4, 6], [3, 5, 7], [1, 3, 5], [4, 6, 8]]).traces[1].y[0].round(3)
        array([-1.225,  0.   ,  1.225])
    """
    batch = _batch(x, dtype, allow_nonfinite)
    values = batch.values
    _check_settings(mode, steps, momentum, eps)
    own = None if pattern is None else Pattern.parse(pattern).expand(values.dim())
    layout = choose.layout(values, layout, own, layer)
    chosen = choose.named(norms, values, layout, groups, eps, weight, bias, own)
    if layer is not None:
        chosen = choose.of_layer(layer, values, layout) + [n for n in chosen if n.name != choose.kind(layer)]
    described = "" if layer is None else choose.layer_note(layer)
    chosen = [choose.with_mode(n, values, mode, steps, momentum) for n in chosen]
    where = _cell(cell, values, layout)
    dy, origin = _cotangent(grad, batch)
    traces = tuple(trace(values, n, dy) for n in chosen)
    if all(t.refused for t in traces):
        raise ValueError(traces[0].refused)
    return Comparison(
        name=batch.name,
        notes=tuple(note for note in (*batch.notes, origin, described) if note),
        x=frozen(values),
        dtype=str(values.dtype).removeprefix("torch."),
        layout=layout,
        mode=mode,
        traces=traces,
        cell=where,
        notices=notices(values, batch.name, layout, traces, where, steps, momentum),
        peers=torch_peers(values, layout, traces),
        feature_names=batch.feature_names,
    )


def _check_settings(mode: str, steps: int, momentum: float, eps: float) -> None:
    if mode not in ("train", "eval"):
        raise ValueError(f"mode: it must be train or eval; got {mode!r}; choose one.")
    if steps < 0:
        raise ValueError(f"steps: it must be 0 or more; got {steps}; give the number of training steps before eval.")
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum: it must be from 0 to 1; got {momentum}; use for example 0.1.")
    if not (eps >= 0 and math.isfinite(eps)):
        raise ValueError(f"eps: it must be 0 or more and finite; got {eps}; use for example 1e-5.")


def _batch(x: Any, dtype: torch.dtype | None, allow_nonfinite: bool) -> Batch:
    if x is None:
        return load_batch(dtype=dtype)
    if isinstance(x, Batch):
        return as_batch(x.values, x.name, x.notes, dtype, allow_nonfinite, x.feature_names)
    if isinstance(x, str):
        raise TypeError(f"compare: x must hold numbers; got the text {x!r}; read a file with numpy or torch first.")
    return as_batch(x, "batch", (), dtype, allow_nonfinite)


def _cotangent(grad: Any, batch: Batch) -> tuple[Tensor | None, str]:
    """The gradient of some loss with respect to y, and where it comes from."""
    x = batch.values
    if grad is False or grad is None:
        return None, ""
    if grad is not True:
        dy = torch.as_tensor(grad, dtype=x.dtype)
        if dy.shape != x.shape:
            raise ValueError(f"grad: it must have the shape of x {tuple(x.shape)}; got {tuple(dy.shape)}; reshape it.")
        return dy, "dy as given"
    if x.shape == (4, 3):
        return torch.tensor(WORKED_DY, dtype=x.dtype), "dy is the worked example's"
    generator = torch.Generator().manual_seed(0)
    dy = torch.empty(x.shape, dtype=torch.float64).normal_(0.5, 1.0, generator=generator)
    return dy.to(x.dtype), "dy is drawn from a normal distribution, mean 0.5, sd 1, seed 0"


def _cell(cell: Sequence[int] | None, x: Tensor, layout: str) -> tuple[int, ...]:
    where = _telling_cell(x, layout) if cell is None else tuple(cell)
    if len(where) != x.dim() or any(not 0 <= i < n for i, n in zip(where, x.shape, strict=True)):
        raise ValueError(
            f"cell: it must be an index into {tuple(x.shape)}, counted from 0; got {','.join(map(str, where))}; "
            f"give {x.dim()} numbers, each less than its length."
        )
    return where


def _telling_cell(x: Tensor, layout: str) -> tuple[int, ...]:
    """The first value of the first sample whose channel is not constant."""
    channel = layout.index("c")
    columns = x.movedim(channel, -1).flatten(0, -2)
    live = (columns != columns[0]).any(0).nonzero()
    where = [0] * x.dim()
    where[channel] = int(live[0]) if len(live) else 0
    return tuple(where)


def _trace_data(t: Trace) -> dict[str, Any]:
    norm, backward = t.norm, t.backward
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
        "weight": None if norm.weight is None else frozen(norm.weight),
        "bias": None if norm.bias is None else frozen(norm.bias),
        "running": None if norm.running is None else vars(norm.running),
        "statistics": None if t.refused else {k: _corner(getattr(t, k)) for k in ("mean", "var", "rstd")},
        "xhat": None if t.refused else _corner(t.xhat),
        "y": None if t.refused else _corner(t.y),
        "backward": None if backward is None else {k: _corner(v) for k, v in vars(backward).items()},
    }


def _corner(array: Array) -> Any:
    """The values of a small array; of a large one its shape and the first values of each axis."""
    if array.size <= JSON_VALUES:
        return array
    keep = max(1, int(JSON_VALUES ** (1 / array.ndim)) // 8)
    return {"shape": array.shape, "corner": array[tuple(slice(keep) for _ in array.shape)]}


def _plain(data: Any) -> Any:
    """Arrays to lists, mappings to objects, nan and infinities to strings."""
    if isinstance(data, np.ndarray):
        return _plain(data.tolist())
    if isinstance(data, Mapping):
        return {str(key): _plain(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_plain(value) for value in data]
    if isinstance(data, float) and not math.isfinite(data):
        return "NaN" if math.isnan(data) else "Infinity" if data > 0 else "-Infinity"
    return data
