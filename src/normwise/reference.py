"""Every norm, forward and backward, in plain differentiable PyTorch: the specification of the library.

Each norm is the same three steps, and the pattern says which axes form a row:

    rearrange the input to rows  ->  normalize each row  ->  rearrange back

All arithmetic is in float64 and is rounded once, at the end, to the output's type. Nothing is checked here
(`functional` does that), and nothing is changed, :func:`update_running_` apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor

from .definitions import BATCH_NORM, GROUP_NORM, Pattern, format_axes, parse_axes


@dataclass(frozen=True)
class Rows:
    """How one call maps to rows: the pattern without ``...``, the length of each axis, and the affine axes."""

    pattern: Pattern
    sizes: dict[str, int]
    affine: str = ""
    centred: bool = True

    @staticmethod
    def of(
        pattern: Pattern,
        shape: Sequence[int],
        affine: str = "",
        *,
        centred: bool = True,
        given: Mapping[str, int] = MappingProxyType({}),
    ) -> Rows:
        """The rows of an input of this shape; ``given`` fixes the parts of split axes."""
        return Rows(pattern.expand(len(shape)), pattern.sizes(shape, given), affine, centred)

    def split(self, x: Tensor) -> Tensor:
        """``(n, c, h, w) -> (kept axes ..., averaged values)``, in float64."""
        kept, averaged = " ".join(self.pattern.right), " ".join(self.pattern.averaged)
        return rearrange(x.double(), f"{format_axes(self.pattern.left)} -> {kept} ({averaged})", **self.sizes)

    def join(self, rows: Tensor) -> Tensor:
        """The inverse of :meth:`split`."""
        kept, averaged = " ".join(self.pattern.right), " ".join(self.pattern.averaged)
        return rearrange(rows, f"{kept} ({averaged}) -> {format_axes(self.pattern.left)}", **self.sizes)

    def spread(self, parameter: Tensor) -> Tensor:
        """Weight or bias in float64, shaped to broadcast against the input."""
        affine = {name for item in parse_axes(self.affine, "affine") for name in item}
        axes = [item if affine.intersection(item) else ("1",) for item in self.pattern.left]
        sizes = {name: self.sizes[name] for item in axes for name in item if name != "1"}
        return repeat(parameter.double(), f"{self.affine} -> {format_axes(axes)}", **sizes)

    def gather(self, values: Tensor) -> Tensor:
        """Sum over all but the affine axes: the transpose of :meth:`spread`."""
        return reduce(values, f"{format_axes(self.pattern.left)} -> {self.affine}", "sum", **self.sizes)


def layer_norm_rows(shape: Sequence[int], normalized_shape: Sequence[int], *, centred: bool = True) -> Rows:
    """The rows of layer_norm and rms_norm: the last ``len(normalized_shape)`` axes are averaged and affine."""
    names = " ".join(f"d{i}" for i in range(len(normalized_shape)))
    return Rows.of(Pattern.parse(f"... {names} -> ..."), shape, names, centred=centred)


def group_norm_rows(shape: Sequence[int], num_groups: int) -> Rows:
    """The rows of group_norm, and with a group for each channel of instance_norm."""
    return Rows.of(Pattern.parse(GROUP_NORM.pattern), shape, GROUP_NORM.affine, given={"g": num_groups})


def batch_norm_rows(shape: Sequence[int]) -> Rows:
    """The rows of batch_norm: one for each channel."""
    return Rows.of(Pattern.parse(BATCH_NORM.pattern), shape, BATCH_NORM.affine)


class Statistics(NamedTuple):
    """One mean and variance a row, in float64, with the row's axis kept at length 1."""

    mean: Tensor
    var: Tensor
    rstd: Tensor


class Normalized(NamedTuple):
    """The result of :func:`normalize`: ``y`` rounded, the rest in float64."""

    y: Tensor
    xhat: Tensor
    statistics: Statistics


def valid_positions(mask: Tensor, x: Tensor) -> Tensor:
    """Spread a mask of shape (N) or (N, positions) over the channels of ``x`` (N, C, positions)."""
    mask = mask.unsqueeze(1) if mask.dim() > 1 else mask.reshape(-1, *[1] * (x.dim() - 1))
    return mask.expand(x.shape)


def statistics(x: Tensor, rows: Rows, eps: float, valid: Tensor | None = None) -> Statistics:
    """Mean (zero if not centred) and biased variance of each row, over its valid values."""
    values = rows.split(x)
    weights = None if valid is None else rows.split(valid)
    count = max(values.shape[-1], 1) if weights is None else weights.sum(-1, keepdim=True).clamp(min=1)

    def average(v: Tensor) -> Tensor:
        return (v if weights is None else v * weights).sum(-1, keepdim=True) / count

    mean = values.new_zeros(*values.shape[:-1], 1)
    if rows.centred:
        mean = average(values)
        mean = mean + average(values - mean)  # its own rounding, large at high mean/std
    var = average((values - mean).square())
    return Statistics(mean, var, (var + eps).rsqrt())


def fixed_statistics(mean: Tensor, var: Tensor, eps: float) -> Statistics:
    """Statistics kept elsewhere, such as running ones of shape (C)."""
    mean, var = mean.double().unsqueeze(-1), var.double().unsqueeze(-1)
    return Statistics(mean, var, (var + eps).rsqrt())


def normalize(
    x: Tensor,
    rows: Rows,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    mask: Tensor | None = None,
    fixed: Statistics | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Normalized:
    """``y = (x - mean) / sqrt(var + eps) * weight + bias + residual`` with one mean and variance a row.

    Args:
        x: The input.
        rows: Which values share statistics.
        weight: Scale over the affine axes, or None.
        bias: Offset over the affine axes, or None.
        eps: Added to the variance, inside the root.
        mask: Valid positions, (N) or (N, positions); others take no part and give 0.
        fixed: Statistics to use instead of the batch's own (Batch Norm in eval).
        residual: Added to y, shaped like ``x``, or None.
        out_dtype: The type of y; the input's if None.
    """
    valid = None if mask is None else valid_positions(mask, x)
    dtype, x = out_dtype or x.dtype, x.double()  # cast once: autograd then rounds dx once
    x = x if valid is None else x.masked_fill(~valid, 0)
    stats = fixed if fixed is not None else statistics(x, rows, eps, valid)
    xhat = rows.join((rows.split(x) - stats.mean) * stats.rstd)
    y = xhat if weight is None else xhat * rows.spread(weight)
    y = y if bias is None else y + rows.spread(bias)
    y = y if residual is None else y + residual.double()
    return Normalized((y if valid is None else y.masked_fill(~valid, 0)).to(dtype), xhat, stats)


class Gradients(NamedTuple):
    """The result of :func:`normalize_backward`, rounded; ``dweight`` and ``dbias`` are None without the parameter.

    ``terms`` are the three parts of dx in float64 rows: direct, through the mean, through the variance.
    """

    dx: Tensor
    dweight: Tensor | None
    dbias: Tensor | None
    terms: tuple[Tensor, Tensor, Tensor]


def normalize_backward(
    dy: Tensor,
    x: Tensor,
    rows: Rows,
    weight: Tensor | None,
    bias_dtype: torch.dtype | None,
    stats: Statistics,
    *,
    mask: Tensor | None = None,
    fixed: bool = False,
    dh: Tensor | None = None,
) -> Gradients:
    """The gradient of :func:`normalize`: ``dx = rstd * (g - mean(g) - xhat * mean(g * xhat))``, ``g = dy * weight``.

    With ``fixed`` statistics the last two terms vanish; for a norm that is not centred the middle one does. ``dh`` is
    what else reaches the input, added to dx before it is rounded.
    """
    dtype, valid = x.dtype, None if mask is None else valid_positions(mask, x)
    if valid is not None:
        x, dy = x.masked_fill(~valid, 0), dy.masked_fill(~valid, 0)
    values = rows.split(x)
    weights = values.new_ones(values.shape[-1:]) if valid is None else rows.split(valid)
    count = weights.sum(-1, keepdim=True).clamp(min=1)
    xhat = (values - stats.mean) * stats.rstd
    dy = dy.double()
    g = rows.split(dy if weight is None else dy * rows.spread(weight))
    direct, through_mean, through_var = g * stats.rstd, torch.zeros_like(count), torch.zeros_like(count)
    if not fixed:
        if rows.centred:
            through_mean = -stats.rstd * g.sum(-1, keepdim=True) / count
        through_var = -stats.rstd * xhat * ((g * xhat).sum(-1, keepdim=True) / count)
    dx = rows.join((direct + through_mean + through_var) * weights)
    dx = (dx if dh is None else dx + dh.double()).to(dtype)
    dweight = None if weight is None else rows.gather(dy * rows.join(xhat)).to(weight.dtype)
    dbias = None if bias_dtype is None else rows.gather(dy).to(bias_dtype)
    return Gradients(dx, dweight, dbias, (direct, through_mean, through_var))


def update_running_(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    mean: Tensor,
    var: Tensor,
    count: int,
    momentum: float | None,
    mask: Tensor | None = None,
    total: Tensor | None = None,
) -> None:
    """Move running statistics towards one batch's: ``running = (1 - momentum) * running + momentum * batch``.

    The mean is the batch's, the variance its unbiased one. A batch without values, or with one, which has no variance,
    leaves what it cannot inform as it was. The variance saturates at the largest finite value of its type.

    Args:
        running_mean: Changed in place, (C).
        running_var: Changed in place, (C).
        num_batches_tracked: Incremented if not None.
        mean: The batch's means, (C), or (N, C) to be averaged over the examples.
        var: The batch's biased variances, shaped like ``mean``.
        count: Values behind each of them, valid or not.
        momentum: The weight of this batch; None for the average of all batches so far.
        mask: The valid positions among them, (N) or (N, positions).
        total: The values behind each, (C), in place of ``count``, where they are known as data alone.
    """
    mean, var = torch.atleast_2d(mean.detach()), torch.atleast_2d(var.detach())
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    if momentum is None and num_batches_tracked is not None:
        factor: Tensor | float = 1.0 / num_batches_tracked.double()
    else:
        factor = momentum or 0.0
    n = mean.new_full((len(mean), 1), count) if total is None else total.double().unsqueeze(0)
    if mask is not None:
        n = n * mask.reshape(len(mean), mask.numel() // max(len(mean), 1)).double().mean(1, keepdim=True)
    limit = torch.finfo(running_var.dtype).max
    unbiased = torch.where(n > 1, var * (n / (n - 1)), 0.0)
    for running, batch, informed in ((running_mean, mean, n > 0), (running_var, unbiased, n > 1)):
        average = torch.where(informed, batch, 0.0).sum(0) / informed.sum(0).clamp(min=1)
        moved = (1 - factor) * running.double() + factor * average.clamp(max=limit)
        running.copy_(torch.where(informed.any(0), moved, running.double()))
