"""Operators of layer_norm and rms_norm, alone and fused with the addition of a residual."""

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
    fake_gradients,
    fake_statistics,
    fake_y,
    forward_outputs,
    like,
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


def _fused_add_layer_norm_forward(
    x: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    h = like(x, x + residual)
    y, mean, rstd = _layer_norm_forward(h, normalized_shape, weight, bias, eps, out_dtype)
    return y, h, mean, rstd


def _fused_add_layer_norm_backward(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    mean: Tensor,
    rstd: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias_dtype: torch.dtype | None,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    rows, stats = reference.layer_norm_rows(h.shape, normalized_shape), saved_statistics(mean, rstd)
    return backward_outputs(h, reference.normalize_backward(dy, h, rows, weight, bias_dtype, stats, dh=dh), output_mask)


def _fused_add_rms_norm_forward(
    x: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    eps: float,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    h = like(x, x + residual)
    y, rstd = _rms_norm_forward(h, normalized_shape, weight, eps, out_dtype)
    return y, h, rstd


def _fused_add_rms_norm_backward(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    rstd: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    rows = reference.layer_norm_rows(h.shape, normalized_shape, centred=False)
    stats = saved_statistics(torch.zeros_like(rstd), rstd)
    grads = reference.normalize_backward(dy, h, rows, weight, None, stats, dh=dh)
    dx, dweight, _ = backward_outputs(h, grads, (*output_mask, False))
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


def _fake_fused_add_layer_norm_forward(x: Tensor, residual: Tensor, *args: Any) -> tuple[Tensor, ...]:
    y, *kept = _fake_layer_norm_forward(x, *args)
    return y, torch.empty_like(x), *kept


def _fake_fused_add_rms_norm_forward(x: Tensor, residual: Tensor, *args: Any) -> tuple[Tensor, ...]:
    y, rstd = _fake_rms_norm_forward(x, *args)
    return y, torch.empty_like(x), rstd


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


declare(
    f"fused_add_layer_norm(Tensor x, Tensor residual, SymInt[] normalized_shape, {AFFINE}, ScalarType? out_dtype)"
    " -> (Tensor y, Tensor h)",
    lambda *args: _fused_add_layer_norm_forward(*args)[:2],
    lambda *args: _fake_fused_add_layer_norm_forward(*args)[:2],
)
declare(
    f"fused_add_layer_norm_forward(Tensor x, Tensor residual, SymInt[] normalized_shape, {AFFINE},"
    " ScalarType? out_dtype) -> (Tensor y, Tensor h, Tensor mean, Tensor rstd)",
    _fused_add_layer_norm_forward,
    _fake_fused_add_layer_norm_forward,
)
declare(
    "fused_add_layer_norm_backward(Tensor dy, Tensor? dh, Tensor h, Tensor mean, Tensor rstd,"
    f" SymInt[] normalized_shape, {GRADIENTS}) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    _fused_add_layer_norm_backward,
    lambda dy, dh, *args: _fake_layer_norm_backward(dy, *args),
)
declare(
    "fused_add_rms_norm(Tensor x, Tensor residual, SymInt[] normalized_shape, Tensor? weight, float eps,"
    " ScalarType? out_dtype) -> (Tensor y, Tensor h)",
    lambda *args: _fused_add_rms_norm_forward(*args)[:2],
    lambda *args: _fake_fused_add_rms_norm_forward(*args)[:2],
)
declare(
    "fused_add_rms_norm_forward(Tensor x, Tensor residual, SymInt[] normalized_shape, Tensor? weight, float eps,"
    " ScalarType? out_dtype) -> (Tensor y, Tensor h, Tensor rstd)",
    _fused_add_rms_norm_forward,
    _fake_fused_add_rms_norm_forward,
)
declare(
    "fused_add_rms_norm_backward(Tensor dy, Tensor? dh, Tensor h, Tensor rstd, SymInt[] normalized_shape,"
    " Tensor? weight, bool[2] output_mask) -> (Tensor dx, Tensor dweight)",
    _fused_add_rms_norm_backward,
    lambda dy, dh, *args: _fake_rms_norm_backward(dy, *args),
)


class LayerNorm(Function):
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
        y, mean, rstd = OPS.layer_norm_forward.default(x, normalized_shape, weight, bias, eps, out_dtype)
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
            grads = OPS.layer_norm_backward.default(dy, x, mean, rstd, normalized_shape, weight, bias_dtype, wanted)
        return *select(wanted, grads), None, None, None


class RMSNorm(Function):
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
        y, rstd = OPS.rms_norm_forward.default(x, normalized_shape, weight, eps, out_dtype)
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
            grads = OPS.rms_norm_backward.default(dy, x, rstd, normalized_shape, weight, wanted)
        return *select(wanted, grads), None, None, None


class FusedAddLayerNorm(Function):
    """Both outputs: ``apply(x, residual, weight, bias, normalized_shape, eps, out_dtype) -> (y, h)``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        normalized_shape: Sequence[int],
        eps: float,
        out_dtype: torch.dtype | None,
    ) -> tuple[Tensor, Tensor]:
        y, h, mean, rstd = OPS.fused_add_layer_norm_forward.default(
            x, residual, normalized_shape, weight, bias, eps, out_dtype
        )
        ctx.save_for_backward(h, weight, mean, rstd)
        ctx.set_materialize_grads(False)
        if not any(ctx.needs_input_grad[:2]):
            ctx.mark_non_differentiable(h)
        ctx.arguments = normalized_shape, None if bias is None else bias.dtype, eps
        return y, h

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dh: Tensor | None) -> Any:
        h, weight, mean, rstd = ctx.saved_tensors
        normalized_shape, bias_dtype, eps = ctx.arguments
        wanted = any(ctx.needs_input_grad[:2]), *ctx.needs_input_grad[2:4]
        if dy is None:
            return dh, dh, None, None, None, None, None
        if torch.is_grad_enabled():
            rows = reference.layer_norm_rows(h.shape, normalized_shape)
            stats = reference.statistics(h, rows, eps)
            grads = reference.normalize_backward(dy, h, rows, weight, bias_dtype, stats, dh=dh)[:3]
        else:
            grads = OPS.fused_add_layer_norm_backward.default(
                dy, dh, h, mean, rstd, normalized_shape, weight, bias_dtype, wanted
            )
        dx, dweight, dbias = select(wanted, grads)
        return dx, dx, dweight, dbias, None, None, None


class FusedAddRMSNorm(Function):
    """Both outputs: ``apply(x, residual, weight, normalized_shape, eps, out_dtype) -> (y, h)``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        weight: Tensor | None,
        normalized_shape: Sequence[int],
        eps: float,
        out_dtype: torch.dtype | None,
    ) -> tuple[Tensor, Tensor]:
        y, h, rstd = OPS.fused_add_rms_norm_forward.default(x, residual, normalized_shape, weight, eps, out_dtype)
        ctx.save_for_backward(h, weight, rstd)
        ctx.set_materialize_grads(False)
        if not any(ctx.needs_input_grad[:2]):
            ctx.mark_non_differentiable(h)
        ctx.arguments = normalized_shape, eps
        return y, h

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dh: Tensor | None) -> Any:
        h, weight, rstd = ctx.saved_tensors
        normalized_shape, eps = ctx.arguments
        wanted = any(ctx.needs_input_grad[:2]), ctx.needs_input_grad[2]
        if dy is None:
            return dh, dh, None, None, None, None
        if torch.is_grad_enabled():
            rows = reference.layer_norm_rows(h.shape, normalized_shape, centred=False)
            stats = reference.statistics(h, rows, eps)
            grads = reference.normalize_backward(dy, h, rows, weight, None, stats, dh=dh)[:2]
        else:
            grads = OPS.fused_add_rms_norm_backward.default(dy, dh, h, rstd, normalized_shape, weight, wanted)
        dx, dweight = select(wanted, grads)
        return dx, dx, dweight, None, None, None
