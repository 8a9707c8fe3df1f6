"""Layer Norm and RMSNorm of rows whose columns lie on several processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .common import OPS, Function, like, select
from .exchange import Place, in_order, refuse_second_derivative


def row_sum(values: Tensor) -> Tensor:
    """Sum the last axis, kept at length 1, in a tree that its length alone decides: no other row changes a bit."""
    size = values.shape[-1]
    if size == 0:
        return values.sum(-1, keepdim=True)
    values = values.clone()
    while size > 1:
        half = size // 2
        values.narrow(-1, 0, half).add_(values.narrow(-1, size - half, half))
        size -= half
    return values.narrow(-1, 0, 1)


def _moments(values: Tensor, centred: bool) -> Tensor:
    """Of each row count, mean (zero if not centred) and sum of squares about it: (..., 3)."""
    count = values.new_full((*values.shape[:-1], 1), values.shape[-1])
    mean = torch.zeros_like(count)
    for _ in range(2 if centred else 0):  # the second time its own rounding, large at high mean/std
        mean = mean + row_sum(values - mean) / count.clamp(min=1)
    return torch.cat([count, mean, row_sum((values - mean).square())], -1)


def _merged(parts: Tensor) -> list[Tensor]:
    """Count, mean and sum of squares of the rows whose parts are stacked: (W, ..., 3) -> three of (..., 1).

    Chan, Golub and LeVeque 1979, equation 2.1, from the first to the last: the same bits on every process.
    """
    count, mean, m2 = parts[0].split(1, -1)
    for part in parts.unbind()[1:]:
        n, its_mean, its_m2 = part.split(1, -1)
        delta, total = its_mean - mean, (count + n).clamp(min=1)
        mean = mean + delta * (n / total)
        m2 = m2 + its_m2 + delta.square() * (count * n / total)
        count = count + n
    return [count, mean, m2]


def normalize_shard(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    centred: bool,
    eps: float,
    out_dtype: torch.dtype | None,
    place: Place,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Y of this process's columns; mean, rstd and count of whole rows, (..., 1) in float64."""
    values = x.double()
    parts = OPS.gather_over_processes.default(_moments(values, centred), *place, "forward")
    count, mean, m2 = _merged(parts)
    mean, count = mean.contiguous(), count.clamp(min=1)  # of one process still a view of its parts
    rstd = (m2 / count + eps).rsqrt().contiguous()
    y = (values - mean) * rstd
    y = y if weight is None else y * weight.double()
    y = y if bias is None else y + bias.double()
    return like(x, y.to(out_dtype or x.dtype)), mean, rstd, count


class ShardedLayerNorm(Function):
    """The same with a gradient: ``apply(x, weight, bias, centred, eps, out_dtype, place) -> y``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        centred: bool,
        eps: float,
        out_dtype: torch.dtype | None,
        place: Place,
    ) -> Tensor:
        y, mean, rstd, count = normalize_shard(x, weight, bias, centred, eps, out_dtype, place)
        ctx.save_for_backward(x, weight, mean, rstd, count)
        ctx.arguments = None if bias is None else bias.dtype, centred, place
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, mean, rstd, count = ctx.saved_tensors
        bias_dtype, centred, place = ctx.arguments
        refuse_second_derivative(place[1], "use layer_norm")
        wants_dx, *wanted = ctx.needs_input_grad[:3]
        dx = None
        if wants_dx:
            xhat = (x.double() - mean) * rstd
            g = dy.double() if weight is None else dy.double() * weight.double()
            sums = torch.cat([row_sum(g), row_sum(g * xhat)], -1)
            parts = OPS.gather_over_processes.default(sums, *place, "backward")
            mean_g, mean_gxhat = (in_order(parts) / count).split(1, -1)
            centre = mean_g if centred else torch.zeros_like(mean_g)
            dx = like(x, (rstd * (g - centre - xhat * mean_gxhat)).to(x.dtype))
        grads: tuple[Tensor, ...]
        common = rstd.squeeze(-1), x.shape[-1:], weight
        if centred:
            grads = OPS.layer_norm_backward.default(dy, x, mean.squeeze(-1), *common, bias_dtype, [False, *wanted])
        else:
            grads = (*OPS.rms_norm_backward.default(dy, x, *common, [False, wanted[0]]), x.new_empty(0))
        return *select((wants_dx, *wanted), [dx, *grads[1:]]), None, None, None, None
