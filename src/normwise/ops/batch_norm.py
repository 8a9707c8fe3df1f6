"""Operators of batch_norm, in training and in eval, and of its running statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .common import (
    AFFINE,
    GRADIENTS,
    backward_outputs,
    declare,
    fake_channel_gradients,
    fake_statistics,
    fake_y,
    like,
    select,
)


def _batch_norm(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    mask: Tensor | None,
) -> Tensor:
    fixed = reference.fixed_statistics(running_mean, running_var, eps)
    rows = reference.batch_norm_rows(x.shape)
    return like(x, reference.normalize(x, rows, weight, bias, eps, mask=mask, fixed=fixed).y)


def _batch_norm_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    y, _, (mean, var, _) = reference.normalize(x, reference.batch_norm_rows(x.shape), weight, bias, eps, mask=mask)
    return like(x, y), mean.squeeze(-1), var.squeeze(-1)


def _batch_norm_backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    training: bool,
    mask: Tensor | None,
    weight: Tensor | None,
    bias_dtype: torch.dtype | None,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    rows, stats = reference.batch_norm_rows(x.shape), reference.fixed_statistics(mean, var, eps)
    grads = reference.normalize_backward(dy, x, rows, weight, bias_dtype, stats, mask=mask, fixed=not training)
    return backward_outputs(x, grads, output_mask)


def _update_running_(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    mean: Tensor,
    var: Tensor,
    count: int,
    momentum: float | None,
    mask: Tensor | None,
) -> None:
    reference.update_running_(running_mean, running_var, num_batches_tracked, mean, var, count, momentum, mask)


def _fake_batch_norm_forward(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), fake_statistics(x, x.shape[1:2]), fake_statistics(x, x.shape[1:2])


declare(
    f"batch_norm(Tensor x, Tensor running_mean, Tensor running_var, {AFFINE}, Tensor? mask) -> Tensor",
    _batch_norm,
    fake_y,
)
declare(
    f"batch_norm_forward(Tensor x, {AFFINE}, Tensor? mask) -> (Tensor y, Tensor mean, Tensor var)",
    _batch_norm_forward,
    _fake_batch_norm_forward,
)
declare(
    "batch_norm_backward(Tensor dy, Tensor x, Tensor mean, Tensor var, float eps, bool training, Tensor? mask,"
    f" {GRADIENTS}) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    _batch_norm_backward,
    fake_channel_gradients,
)
declare(
    "update_running_(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor(c!)? num_batches_tracked,"
    " Tensor mean, Tensor var, SymInt count, float? momentum, Tensor? mask) -> ()",
    _update_running_,
    lambda *args: None,
)


class BatchNormTraining(torch.autograd.Function):
    """batch_norm with the batch's statistics: ``apply(x, weight, bias, eps, mask) -> (y, mean, var)``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, mean, var = torch.ops.normwise.batch_norm_forward(x, weight, bias, eps, mask)
        ctx.save_for_backward(x, weight, mean, var, mask)
        ctx.mark_non_differentiable(mean, var)
        ctx.arguments = None if bias is None else bias.dtype, eps
        return y, mean, var

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _mean: Any, _var: Any) -> Any:
        x, weight, mean, var, mask = ctx.saved_tensors
        bias_dtype, eps = ctx.arguments
        wanted = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            rows = reference.batch_norm_rows(x.shape)
            valid = None if mask is None else reference.valid_positions(mask, x)
            stats = reference.statistics(x, rows, eps, valid)
            grads = reference.normalize_backward(dy, x, rows, weight, bias_dtype, stats, mask=mask)[:3]
        else:
            grads = torch.ops.normwise.batch_norm_backward(
                dy, x, mean, var, eps, True, mask, weight, bias_dtype, wanted
            )
        return *select(wanted, grads), None, None


class BatchNormEval(torch.autograd.Function):
    """batch_norm with running statistics: ``apply(x, weight, bias, running_mean, running_var, eps, mask) -> y``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor,
        running_var: Tensor,
        eps: float,
        mask: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, running_mean, running_var, mask)
        ctx.arguments = None if bias is None else bias.dtype, eps
        return torch.ops.normwise.batch_norm(x, running_mean, running_var, weight, bias, eps, mask)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, mean, var, mask = ctx.saved_tensors
        bias_dtype, eps = ctx.arguments
        wanted = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            rows, stats = reference.batch_norm_rows(x.shape), reference.fixed_statistics(mean, var, eps)
            grads = reference.normalize_backward(dy, x, rows, weight, bias_dtype, stats, mask=mask, fixed=True)[:3]
        else:
            grads = torch.ops.normwise.batch_norm_backward(
                dy, x, mean, var, eps, False, mask, weight, bias_dtype, wanted
            )
        return *select(wanted, grads), None, None, None, None
