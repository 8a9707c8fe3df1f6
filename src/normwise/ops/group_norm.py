"""Operators of group_norm; instance_norm is the one with a group for each channel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .common import (
    AFFINE,
    GRADIENTS,
    OPS,
    Function,
    backward_outputs,
    declare,
    fake_channel_gradients,
    fake_statistics,
    fake_y,
    forward_outputs,
    saved_statistics,
    select,
)


def _group_norm_forward(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    mask: Tensor | None,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = reference.group_norm_rows(x.shape, num_groups)
    return forward_outputs(x, reference.normalize(x, rows, weight, bias, eps, mask=mask, out_dtype=out_dtype))


def _group_norm_backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    eps: float,
    mask: Tensor | None,
    weight: Tensor | None,
    bias_dtype: torch.dtype | None,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    rows = reference.group_norm_rows(x.shape, num_groups)
    stats = saved_statistics(mean, rstd)
    return backward_outputs(
        x, reference.normalize_backward(dy, x, rows, weight, bias_dtype, stats, mask=mask), output_mask
    )


def _fake_group_norm_forward(x: Tensor, num_groups: int, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    kept = (x.shape[0], num_groups)
    return fake_y(x, *args), fake_statistics(x, kept), fake_statistics(x, kept)


declare(
    f"group_norm(Tensor x, SymInt num_groups, {AFFINE}, Tensor? mask, ScalarType? out_dtype) -> Tensor",
    lambda *args: _group_norm_forward(*args)[0],
    fake_y,
)
declare(
    f"group_norm_forward(Tensor x, SymInt num_groups, {AFFINE}, Tensor? mask, ScalarType? out_dtype)"
    " -> (Tensor y, Tensor mean, Tensor rstd)",
    _group_norm_forward,
    _fake_group_norm_forward,
)
declare(
    f"group_norm_backward(Tensor dy, Tensor x, Tensor mean, Tensor rstd, SymInt num_groups, float eps,"
    f" Tensor? mask, {GRADIENTS}) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    _group_norm_backward,
    fake_channel_gradients,
)


class GroupNorm(Function):
    """group_norm with a gradient: ``apply(x, weight, bias, num_groups, eps, mask, out_dtype) -> (y, mean, rstd)``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        num_groups: int,
        eps: float,
        mask: Tensor | None,
        out_dtype: torch.dtype | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, mean, rstd = OPS.group_norm_forward.default(x, num_groups, weight, bias, eps, mask, out_dtype)
        ctx.save_for_backward(x, weight, mean, rstd, mask)
        ctx.mark_non_differentiable(mean, rstd)
        ctx.arguments = num_groups, None if bias is None else bias.dtype, eps
        return y, mean, rstd

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _mean: Any, _rstd: Any) -> Any:
        x, weight, mean, rstd, mask = ctx.saved_tensors
        num_groups, bias_dtype, eps = ctx.arguments
        wanted = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            rows = reference.group_norm_rows(x.shape, num_groups)
            valid = None if mask is None else reference.valid_positions(mask, x)
            stats = reference.statistics(x, rows, eps, valid)
            grads = reference.normalize_backward(dy, x, rows, weight, bias_dtype, stats, mask=mask)[:3]
        else:
            grads = OPS.group_norm_backward.default(
                dy, x, mean, rstd, num_groups, eps, mask, weight, bias_dtype, wanted
            )
        return *select(wanted, grads), None, None, None, None
