"""Several norms on one batch: which to compute, computed once, and handed to the renderers as immutable data."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from . import choose
from .load import Batch, as_batch, load_batch
from .notice import notices
from .peer import Peer, torch_peers
from .scene import Notice
from .trace import Array, Trace, frozen, running_after, trace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WORKED_DY = ((1, -1, 2), (0, 3, -2), (-1, 1, 0), (2, 0, 1))


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """What :func:`compare` found; immutable. Print it, or use its methods.

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
        from . import as_json

        return as_json.render(self, indent=indent)

    def to_html(self) -> str:
        """One self-contained page that shows it and lets every number be changed; it embeds the data."""
        from . import page

        return page.render(self)

    def plot(self) -> Figure:
        """The batch and each norm's output side by side as a matplotlib figure; the chosen value is outlined.

        The batch is in greys, from its least to its greatest value; the outputs are blue below zero and orange above,
        strongest from 3 on, all on one scale. Numbers stand where they fit; images are drawn as images, and of a
        larger batch a corner.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        from . import plot

        return plot.draw(self)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        from . import html, page

        shown = page.in_notebook(self.to_html(), html.fragment(self), f"normwise: {self.name}")
        return {"text/plain": self.to_text(), "text/html": shown}

    def __str__(self) -> str:
        return self.to_text()

    __repr__ = __str__


@np.errstate(all="ignore")  # what overflows or is 0 / 0 is shown, not warned of
def compare(
    x: Any = None,
    norms: Sequence[str] | str = choose.DEFAULT,
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
        cell: The index of the value to work out in full; if None, the first whose channel is not constant.
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
    read, own = choose.axes(values, layout, pattern, layer)
    chosen = choose.named(norms, values, read, groups, eps, weight, bias, own)
    if layer is not None:
        chosen = choose.of_layer(layer, values, read) + [n for n in chosen if n.name != choose.kind(layer)]
    if not chosen:
        raise ValueError("norms: there must be at least one; got none; write for example 'all'.")
    described = () if layer is None else (choose.layer_note(layer),)
    where = _cell(cell, values, read)
    dy, origin = _cotangent(grad, batch)
    traces = tuple(_remembering(trace(values, n, dy), values, dy, mode, steps, momentum) for n in chosen)
    if all(t.refused for t in traces):
        raise ValueError(traces[0].refused)
    return Comparison(
        name=batch.name,
        notes=(*batch.notes, *origin, *described),
        x=frozen(values),
        dtype=str(values.dtype).removeprefix("torch."),
        layout=read,
        mode=mode,
        traces=traces,
        cell=where,
        notices=notices(values, batch.name, read, traces, where, steps, momentum),
        peers=torch_peers(values, read, traces),
        feature_names=batch.feature_names,
    )


def _remembering(t: Trace, x: Tensor, dy: Tensor | None, mode: str, steps: int, momentum: float) -> Trace:
    """Give a norm that averages the batch away the running statistics of a fresh layer, and look at it in its mode."""
    if not (t.norm.fresh and t.norm.pattern.averages_batch):
        return t
    norm = replace(t.norm, running=running_after(t, steps, momentum), training=mode == "train")
    return replace(t, norm=norm) if norm.training else trace(x, norm, dy)


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


def _cotangent(grad: Any, batch: Batch) -> tuple[Tensor | None, tuple[str, ...]]:
    """The gradient of some loss with respect to y, and a note where it comes from."""
    x = batch.values
    if grad is False or grad is None:
        return None, ()
    if grad is not True:
        dy = torch.as_tensor(grad, dtype=x.dtype)
        if dy.shape != x.shape:
            raise ValueError(f"grad: it must have the shape of x {tuple(x.shape)}; got {tuple(dy.shape)}; reshape it.")
        return dy, ("dy as given",)
    if x.shape == (4, 3):
        return torch.tensor(WORKED_DY, dtype=x.dtype), ("dy is the worked example's",)
    generator = torch.Generator().manual_seed(0)
    dy = torch.empty(x.shape, dtype=torch.float64).normal_(0.5, 1.0, generator=generator)
    return dy.to(x.dtype), ("dy is drawn from a normal distribution, mean 0.5, sd 1, seed 0",)


def _cell(cell: Sequence[int] | None, x: Tensor, layout: str) -> tuple[int, ...]:
    try:
        where = _telling_cell(x, layout) if cell is None else tuple(operator.index(i) for i in cell)
    except TypeError:
        raise TypeError(f"cell: it must be whole numbers; got {cell!r}; write for example (0, 2).") from None
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
