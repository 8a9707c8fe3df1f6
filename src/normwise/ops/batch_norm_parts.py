"""Operators of Batch Norm over a batch in parts: each gives its sums, which are added, and takes the statistics of all.

The sums have no order: the sequence of the parts changes no bit and, where they are reproducible, neither do the split
and the sequence of the examples. The reference's always are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from ..exact_sum import SLOTS, add, carried, divide, exact_sum, multiply, two_product, value
from .common import GRADIENTS, declare, fake_channel_gradients, fake_statistics, like


def _positions(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The values in float64, (K, C), zero where the mask leaves them out; and how many are in, for each channel."""
    valid = torch.ones_like(x, dtype=torch.bool) if mask is None else reference.valid_positions(mask, x)
    rows = x.double().masked_fill(~valid, 0).movedim(1, -1).reshape(-1, x.shape[1])
    return rows, valid.sum((0, *range(2, x.dim())))


def _batch_norm_sums(x: Tensor, eps: float, mask: Tensor | None, reproducible: bool) -> Tensor:
    rows, count = _positions(x, mask)
    squares = torch.cat(two_product(rows, rows))
    return torch.cat([carried(exact_sum(rows)), carried(exact_sum(squares)), count.unsqueeze(1)], 1)


def _batch_norm_moments(sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    count = sums[:, -1].double()
    n = count.clamp(min=1)
    total, squares = value(sums[:, :SLOTS]), value(sums[:, SLOTS:-1])
    mean = divide(total, n)
    product = multiply(total, mean)
    m2 = add(squares, (-product[0], -product[1]))
    return mean[0], m2[0].clamp(min=0) / n, count


def _unit(rstd: Tensor) -> Tensor:
    """The power of two below rstd: by it x - mean is multiplied without rounding, and is of the size of 1."""
    return torch.ldexp(torch.ones_like(rstd), torch.frexp(rstd).exponent - 1)


def _batch_norm_gradient_sums(
    dy: Tensor, x: Tensor, mean: Tensor, var: Tensor, eps: float, mask: Tensor | None, reproducible: bool
) -> Tensor:
    (g, _), (rows, _) = _positions(dy, mask), _positions(x, mask)
    centred = (rows - mean) * _unit((var + eps).rsqrt())
    return torch.cat([carried(exact_sum(g)), carried(exact_sum(g * centred))], 1)


def _batch_norm_backward_of_sums(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    mask: Tensor | None,
    sums: Tensor,
    count: Tensor,
    weight: Tensor | None,
    bias_dtype: torch.dtype | None,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    rstd = (var + eps).rsqrt()
    dbias, dweight = value(sums[:, :SLOTS])[0], value(sums[:, SLOTS:])[0] * (rstd / _unit(rstd))
    spread = [1, -1, *[1] * (x.dim() - 2)]
    mean, rstd, through_mean, through_var = (
        t.reshape(spread) for t in (mean, rstd, dbias / count.clamp(min=1), dweight / count.clamp(min=1))
    )
    xhat = (x.double() - mean) * rstd
    scale = rstd if weight is None else rstd * weight.double().reshape(spread)
    dx = (dy.double() - through_mean - xhat * through_var) * scale
    if mask is not None:
        dx = dx.masked_fill(~reference.valid_positions(mask, x), 0)
    empty = x.new_empty(0)
    return (
        like(x, dx.to(x.dtype)) if output_mask[0] else empty,
        dweight.to(weight.dtype) if weight is not None and output_mask[1] else empty,
        dbias.to(bias_dtype) if bias_dtype is not None and output_mask[2] else empty,
    )


declare(
    "batch_norm_sums(Tensor x, float eps, Tensor? mask, bool reproducible) -> Tensor",
    _batch_norm_sums,
    lambda x, *args: x.new_empty((x.shape[1], 2 * SLOTS + 1), dtype=torch.int64),
)
declare(
    "batch_norm_moments(Tensor sums) -> (Tensor mean, Tensor var, Tensor count)",
    _batch_norm_moments,
    lambda sums: tuple(fake_statistics(sums, sums.shape[:1]) for _ in range(3)),
)
declare(
    "batch_norm_gradient_sums(Tensor dy, Tensor x, Tensor mean, Tensor var, float eps, Tensor? mask, bool reproducible)"
    " -> Tensor",
    _batch_norm_gradient_sums,
    lambda dy, x, *args: x.new_empty((x.shape[1], 2 * SLOTS), dtype=torch.int64),
)
declare(
    "batch_norm_backward_of_sums(Tensor dy, Tensor x, Tensor mean, Tensor var, float eps, Tensor? mask, Tensor sums,"
    f" Tensor count, {GRADIENTS}) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    _batch_norm_backward_of_sums,
    fake_channel_gradients,
)
