"""Operators of layer_norm and rms_norm."""

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
    fake_gradients,
    fake_statistics,
    fake_y,
    forward_outputs,
    saved_statistics,
    select,
)


def _layer_norm_forward(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = reference.layer_norm_rows(x.shape, normalized_shape)
    return forward_outputs(x, reference.normalize(x, rows, weight, bias, eps, out_dtype=out_dtype))


def _layer_norm_backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias_dtype: torch.dtype | None,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    rows = reference.layer_norm_rows(x.shape, normalized_shape)
    return backward_outputs(
        x, reference.normalize_backward(dy, x, rows, weight, bias_dtype, saved_statistics(mean, rstd)), output_mask
    )


def _rms_norm_forward(
    x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, eps: float, out_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    rows = reference.layer_norm_rows(x.shape, normalized_shape, centred=False)
    y, _, rstd = forward_outputs(x, reference.normalize(x, rows, weight, None, eps, out_dtype=out_dtype))
    return y, rstd


def _rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    rstd: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    rows = reference.layer_norm_rows(x.shape, normalized_shape, centred=False)
    grads = reference.normalize_backward(dy, x, rows, weight, None, saved_statistics(torch.zeros_like(rstd), rstd))
    dx, dweight, _ = backward_outputs(x, grads, (*output_mask, False))
    return dx, dweight


def _fake_layer_norm_forward(x: Tensor, normalized_shape: Sequence[int], *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    kept = x.shape[: x.dim() - len(normalized_shape)]
    return fake_y(x, *args), fake_statistics(x, kept), fake_statistics(x, kept)


def _fake_rms_norm_forward(x: Tensor, normalized_shape: Sequence[int], *args: Any) -> tuple[Tensor, Tensor]:
    y, _, rstd = _fake_layer_norm_forward(x, normalized_shape, *args)
    return y, rstd


def _fake_layer_norm_backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, normalized_shape: Sequence[int], *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return fake_gradients(x, normalized_shape, *args)


def _fake_rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    rstd: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    dx, dweight, _ = fake_gradients(x, normalized_shape, weight, None, (*output_mask, False))
    return dx, dweight


declare(
    f"layer_norm(Tensor x, SymInt[] normalized_shape, {AFFINE}, ScalarType? out_dtype) -> Tensor",
    lambda *args: _layer_norm_forward(*args)[0],
    fake_y,
)
declare(
    f"layer_norm_forward(Tensor x, SymInt[] normalized_shape, {AFFINE}, ScalarType? out_dtype)"
    " -> (Tensor y, Tensor mean, Tensor rstd)",
    _layer_norm_forward,
    _fake_layer_norm_forward,
)
declare(
    f"layer_norm_backward(Tensor dy, Tensor x, Tensor mean, Tensor rstd, SymInt[] normalized_shape, {GRADIENTS})"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)",
    _layer_norm_backward,
    _fake_layer_norm_backward,
)
declare(
    "rms_norm(Tensor x, SymInt[] normalized_shape, Tensor? weight, float eps, ScalarType? out_dtype) -> Tensor",
    lambda *args: _rms_norm_forward(*args)[0],
    fake_y,
)
declare(
    "rms_norm_forward(Tensor x, SymInt[] normalized_shape, Tensor? weight, float eps, ScalarType? out_dtype)"
    " -> (Tensor y, Tensor rstd)",
    _rms_norm_forward,
    _fake_rms_norm_forward,
)
declare(
    "rms_norm_backward(Tensor dy, Tensor x, Tensor rstd, SymInt[] normalized_shape, Tensor? weight,"
    " bool[2] output_mask) -> (Tensor dx, Tensor dweight)",
    _rms_norm_backward,
    _fake_rms_norm_backward,
)


class LayerNorm(torch.autograd.Function):
    """layer_norm with a gradient: ``apply(x, weight, bias, normalized_shape, eps, out_dtype) -> y``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        normalized_shape: Sequence[int],
        eps: float,
        out_dtype: torch.dtype | None,
    ) -> Tensor:
        y, mean, rstd = torch.ops.normwise.layer_norm_forward(x, normalized_shape, weight, bias, eps, out_dtype)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.arguments = normalized_shape, None if bias is None else bias.dtype, eps
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, mean, rstd = ctx.saved_tensors
        normalized_shape, bias_dtype, eps = ctx.arguments
        wanted = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            rows = reference.layer_norm_rows(x.shape, normalized_shape)
            stats = reference.statistics(x, rows, eps)
            grads = reference.normalize_backward(dy, x, rows, weight, bias_dtype, stats)[:3]
        else:
            grads = torch.ops.normwise.layer_norm_backward(
                dy, x, mean, rstd, normalized_shape, weight, bias_dtype, wanted
            )
        return *select(wanted, grads), None, None, None


class RMSNorm(torch.autograd.Function):
    """rms_norm with a gradient: ``apply(x, weight, normalized_shape, eps, out_dtype) -> y``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        normalized_shape: Sequence[int],
        eps: float,
        out_dtype: torch.dtype | None,
    ) -> Tensor:
        y, rstd = torch.ops.normwise.rms_norm_forward(x, normalized_shape, weight, eps, out_dtype)
        ctx.save_for_backward(x, weight, rstd)
        ctx.arguments = normalized_shape, eps
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, rstd = ctx.saved_tensors
        normalized_shape, eps = ctx.arguments
        wanted = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():
            rows = reference.layer_norm_rows(x.shape, normalized_shape, centred=False)
            stats = reference.statistics(x, rows, eps)
            grads = reference.normalize_backward(dy, x, rows, weight, None, stats)[:2]
        else:
            grads = torch.ops.normwise.rms_norm_backward(dy, x, rstd, normalized_shape, weight, wanted)
        return *select(wanted, grads), None, None, None
