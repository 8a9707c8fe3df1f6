"""Operators of batch_norm, in training and in eval, alone and followed by ReLU, and of its running statistics."""

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
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, mask: Tensor | None, reproducible: bool
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
    reproducible: bool,
    weight: Tensor | None,
    bias_dtype: torch.dtype | None,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    rows, stats = reference.batch_norm_rows(x.shape), reference.fixed_statistics(mean, var, eps)
    grads = reference.normalize_backward(dy, x, rows, weight, bias_dtype, stats, mask=mask, fixed=not training)
    return backward_outputs(x, grads, output_mask)


def _batch_norm_relu(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    mask: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    rows, fixed = reference.batch_norm_rows(x.shape), reference.fixed_statistics(running_mean, running_var, eps)
    y = reference.normalize(x, rows, weight, bias, eps, mask=mask, fixed=fixed, residual=residual).y
    return like(x, y.relu())


def _batch_norm_relu_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    mask: Tensor | None,
    residual: Tensor | None,
    reproducible: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = reference.batch_norm_rows(x.shape)
    y, _, (mean, var, _) = reference.normalize(x, rows, weight, bias, eps, mask=mask, residual=residual)
    return like(x, y.relu()), mean.squeeze(-1), var.squeeze(-1)


def _batch_norm_relu_backward(
    dy: Tensor,
    y: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    training: bool,
    mask: Tensor | None,
    reproducible: bool,
    weight: Tensor | None,
    bias_dtype: torch.dtype | None,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dy = dy.masked_fill(y <= 0, 0)
    grads = _batch_norm_backward(
        dy, x, mean, var, eps, training, mask, reproducible, weight, bias_dtype, output_mask[:3]
    )
    return *grads, like(x, dy) if output_mask[3] else x.new_empty(0)


def _update_running_(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    mean: Tensor,
    var: Tensor,
    count: int,
    momentum: float | None,
    mask: Tensor | None,
    total: Tensor | None = None,
) -> None:
    reference.update_running_(running_mean, running_var, num_batches_tracked, mean, var, count, momentum, mask, total)


def _fake_batch_norm_forward(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), fake_statistics(x, x.shape[1:2]), fake_statistics(x, x.shape[1:2])


def _fake_batch_norm_relu_backward(dy: Tensor, y: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *kept, output_mask = args
    dresidual = torch.empty_like(x) if output_mask[3] else x.new_empty(0)
    return *fake_channel_gradients(dy, x, *kept, output_mask[:3]), dresidual


declare(
    f"batch_norm(Tensor x, Tensor running_mean, Tensor running_var, {AFFINE}, Tensor? mask) -> Tensor",
    _batch_norm,
    fake_y,
)
declare(
    f"batch_norm_forward(Tensor x, {AFFINE}, Tensor? mask, bool reproducible) -> (Tensor y, Tensor mean, Tensor var)",
    _batch_norm_forward,
    _fake_batch_norm_forward,
)
declare(
    "batch_norm_backward(Tensor dy, Tensor x, Tensor mean, Tensor var, float eps, bool training, Tensor? mask,"
    f" bool reproducible, {GRADIENTS}) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    _batch_norm_backward,
    fake_channel_gradients,
)
declare(
    f"batch_norm_relu(Tensor x, Tensor running_mean, Tensor running_var, {AFFINE}, Tensor? mask, Tensor? residual)"
    " -> Tensor",
    _batch_norm_relu,
    fake_y,
)
declare(
    f"batch_norm_relu_forward(Tensor x, {AFFINE}, Tensor? mask, Tensor? residual, bool reproducible)"
    " -> (Tensor y, Tensor mean, Tensor var)",
    _batch_norm_relu_forward,
    _fake_batch_norm_forward,
)
declare(
    "batch_norm_relu_backward(Tensor dy, Tensor y, Tensor x, Tensor mean, Tensor var, float eps, bool training,"
    " Tensor? mask, bool reproducible, Tensor? weight, ScalarType? bias_dtype, bool[4] output_mask)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)",
    _batch_norm_relu_backward,
    _fake_batch_norm_relu_backward,
)
declare(
    "update_running_(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor(c!)? num_batches_tracked,"
    " Tensor mean, Tensor var, SymInt count, float? momentum, Tensor? mask, Tensor? total=None) -> ()",
    _update_running_,
    lambda *args: None,
)


class BatchNormTraining(Function):
    """batch_norm with the batch's statistics: ``apply(x, weight, bias, eps, mask, reproducible) -> (y, mean, var)``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        mask: Tensor | None,
        reproducible: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, mean, var = OPS.batch_norm_forward.default(x, weight, bias, eps, mask, reproducible)
        ctx.save_for_backward(x, weight, mean, var, mask)
        ctx.mark_non_differentiable(mean, var)
        ctx.arguments = None if bias is None else bias.dtype, eps, reproducible
        return y, mean, var

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _mean: Any, _var: Any) -> Any:
        x, weight, mean, var, mask = ctx.saved_tensors
        bias_dtype, eps, reproducible = ctx.arguments
        wanted = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            grads = _differentiable(dy, x, eps, mask, weight, bias_dtype)
        else:
            grads = OPS.batch_norm_backward.default(
                dy, x, mean, var, eps, True, mask, reproducible, weight, bias_dtype, wanted
            )
        return *select(wanted, grads), None, None, None


class BatchNormEval(Function):
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
        return OPS.batch_norm.default(x, running_mean, running_var, weight, bias, eps, mask)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, mean, var, mask = ctx.saved_tensors
        bias_dtype, eps = ctx.arguments
        wanted = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            grads = _differentiable(dy, x, eps, mask, weight, bias_dtype, (mean, var))
        else:
            grads = OPS.batch_norm_backward.default(
                dy, x, mean, var, eps, False, mask, False, weight, bias_dtype, wanted
            )
        return *select(wanted, grads), None, None, None, None


class BatchNormReLUTraining(Function):
    """batch_norm_relu: ``apply(x, weight, bias, residual, eps, mask, reproducible) -> (y, mean, var)``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        eps: float,
        mask: Tensor | None,
        reproducible: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, mean, var = OPS.batch_norm_relu_forward.default(x, weight, bias, eps, mask, residual, reproducible)
        ctx.save_for_backward(y, x, weight, mean, var, mask)
        ctx.mark_non_differentiable(mean, var)
        ctx.arguments = None if bias is None else bias.dtype, eps, reproducible
        return y, mean, var

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _mean: Any, _var: Any) -> Any:
        y, x, weight, mean, var, mask = ctx.saved_tensors
        bias_dtype, eps, reproducible = ctx.arguments
        wanted = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():
            dy = dy.masked_fill(y <= 0, 0)
            grads = *_differentiable(dy, x, eps, mask, weight, bias_dtype), dy
        else:
            grads = OPS.batch_norm_relu_backward.default(
                dy, y, x, mean, var, eps, True, mask, reproducible, weight, bias_dtype, wanted
            )
        return *select(wanted, grads), None, None, None


class BatchNormReLUEval(Function):
    """Its eval: ``apply(x, weight, bias, residual, running_mean, running_var, eps, mask) -> y``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        running_mean: Tensor,
        running_var: Tensor,
        eps: float,
        mask: Tensor | None,
    ) -> Tensor:
        y = OPS.batch_norm_relu.default(x, running_mean, running_var, weight, bias, eps, mask, residual)
        ctx.save_for_backward(y, x, weight, running_mean, running_var, mask)
        ctx.arguments = None if bias is None else bias.dtype, eps
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        y, x, weight, mean, var, mask = ctx.saved_tensors
        bias_dtype, eps = ctx.arguments
        wanted = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():
            dy = dy.masked_fill(y <= 0, 0)
            grads = *_differentiable(dy, x, eps, mask, weight, bias_dtype, (mean, var)), dy
        else:
            grads = OPS.batch_norm_relu_backward.default(
                dy, y, x, mean, var, eps, False, mask, False, weight, bias_dtype, wanted
            )
        return *select(wanted, grads), None, None, None, None


def _differentiable(
    dy: Tensor,
    x: Tensor,
    eps: float,
    mask: Tensor | None,
    weight: Tensor | None,
    bias_dtype: torch.dtype | None,
    running: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dx, dweight and dbias by the reference's formula, for a second derivative."""
    rows = reference.batch_norm_rows(x.shape)
    if running is None:
        stats = reference.statistics(x, rows, eps, None if mask is None else reference.valid_positions(mask, x))
    else:
        stats = reference.fixed_statistics(*running, eps)
    fixed = running is not None
    return reference.normalize_backward(dy, x, rows, weight, bias_dtype, stats, mask=mask, fixed=fixed)[:3]
