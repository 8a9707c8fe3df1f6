"""layer_norm and rms_norm, and both fused with the addition of a residual."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary, has_torch_function_variadic

from .. import checks, dispatch
from ..ops.common import OPS

LAYER_NORM, RMS_NORM = OPS.layer_norm.default, OPS.rms_norm.default


def layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Layer Norm: each example, or token, is normalized over its own last axes.

    ``y = (x - mean) / sqrt(var + eps) * weight + bias``; pattern ``... c -> ...``.

    Args:
        x: (..., *normalized_shape), any floating-point type; nested tensors too.
        normalized_shape: The sizes of the last axes, over which mean and variance are taken.
        weight: normalized_shape, or None for 1.
        bias: normalized_shape, or None for 0.
        eps: Added to the variance, inside the root.

    Returns:
        A tensor like ``x``; float32 under CUDA autocast, as in PyTorch.

    Raises:
        TypeError: If ``x`` or a parameter is not floating point.
        ValueError: If shapes or devices do not fit, or eps is negative.

    Numerics:
        Biased variance; accumulated in float32 or wider, rounded once. Backward keeps mean and rstd in float64.

    Example:
        >>> import torch
        >>> layer_norm(torch.tensor([[2.0, 4.0, 6.0]]), (3,))
        tensor([[-1.2247,  0.0000,  1.2247]])

    References:
        Ba, Kiros and Hinton 2016, arXiv:1607.06450, equation 4.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(layer_norm, (x,), x, normalized_shape, weight, bias, eps)
    y = dispatch.at_once(LAYER_NORM, (x, weight, bias), x, normalized_shape, weight, bias, eps, None)
    if y is None and isinstance(x, Tensor) and x.is_nested:
        return _on_nested(layer_norm, x, normalized_shape, weight, bias, eps)
    if y is None:
        checks.check_last_axes("layer_norm", x, normalized_shape, eps, weight, bias)
        y = dispatch.layer_norm(x, normalized_shape, weight, bias, eps)
    return dispatch.viewable(y)


def rms_norm(
    x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """RMSNorm: Layer Norm without subtracting the mean.

    ``y = x / sqrt(mean(x²) + eps) * weight``; pattern ``... c -> ...``.

    Args:
        x: (..., *normalized_shape), any floating-point type; nested tensors too.
        normalized_shape: The sizes of the last axes, over which the mean square is taken.
        weight: normalized_shape, or None for 1.
        eps: Added to the mean square, inside the root; None for the machine epsilon of float32 (of float64 for
            float64 input), as in PyTorch.

    Returns:
        A tensor like ``x``; float32 under CUDA autocast, as in PyTorch.

    Raises:
        TypeError: If ``x`` or the weight is not floating point.
        ValueError: If shapes or devices do not fit, or eps is negative.

    Numerics:
        Accumulated in float32 or wider, rounded once. Backward keeps rstd in float64.

    Example:
        >>> import torch
        >>> rms_norm(torch.tensor([[2.0, 4.0, 6.0]]), (3,))
        tensor([[0.4629, 0.9258, 1.3887]])

    References:
        Zhang and Sennrich 2019, arXiv:1910.07467, equation 4.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(rms_norm, (x,), x, normalized_shape, weight, eps)
    if eps is None:
        eps = machine_eps(x)
    y = dispatch.at_once(RMS_NORM, (x, weight), x, normalized_shape, weight, eps, None)
    if y is None and isinstance(x, Tensor) and x.is_nested:
        return _on_nested(rms_norm, x, normalized_shape, weight, eps)
    if y is None:
        checks.check_last_axes("rms_norm", x, normalized_shape, eps, weight)
        y = dispatch.rms_norm(x, normalized_shape, weight, eps)
    return dispatch.viewable(y)


def fused_add_layer_norm(
    x: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Add a residual, then Layer Norm, as the blocks of a transformer do; both results come back.

    ``h = x + residual``, ``y = layer_norm(h)``; pattern ``... c -> ...``.

    Args:
        x: (..., *normalized_shape), any floating-point type; nested tensors too.
        residual: The shape of ``x``, any floating-point type.
        normalized_shape: The sizes of the last axes, over which mean and variance are taken.
        weight: normalized_shape, or None for 1.
        bias: normalized_shape, or None for 0.
        eps: Added to the variance, inside the root.

    Returns:
        ``(y, h)``, the norm's output and the sum, which is the residual of the next block. h has the type that
        ``x + residual`` has; y likewise, but float32 under CUDA autocast, as in :func:`layer_norm`.

    Raises:
        TypeError: If ``x``, the residual or a parameter is not floating point.
        ValueError: If shapes or devices do not fit, or eps is negative.

    Numerics:
        h is rounded to its type and y computed from the rounded h, so both have the bits of the two functions apart.
        The gradient is that of layer_norm plus that of h, added in float32 or wider and rounded once. Backward keeps h,
        and mean and rstd in float64.

    Example:
        >>> import torch
        >>> y, h = fused_add_layer_norm(torch.tensor([[1.0, 1.0, 4.0]]), torch.tensor([[1.0, 3.0, 2.0]]), (3,))
        >>> y, h
        (tensor([[-1.2247,  0.0000,  1.2247]]), tensor([[2., 4., 6.]]))

    References:
        Vaswani et al. 2017, arXiv:1706.03762, section 3.1: LayerNorm(x + Sublayer(x)).
    """
    if has_torch_function_variadic(x, residual):
        return handle_torch_function(
            fused_add_layer_norm, (x, residual), x, residual, normalized_shape, weight, bias, eps
        )
    if isinstance(x, Tensor) and x.is_nested:
        h = x + residual
        return _on_nested(layer_norm, h, normalized_shape, weight, bias, eps), h
    checks.check_last_axes("fused_add_layer_norm", x, normalized_shape, eps, weight, bias)
    checks.check_residual("fused_add_layer_norm", x, residual)
    y, h = dispatch.fused_add_layer_norm(*_promoted(x, residual), normalized_shape, weight, bias, eps)
    return dispatch.viewable(y), h


def fused_add_rms_norm(
    x: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Add a residual, then RMSNorm, as the blocks of a language model do; both results come back.

    ``h = x + residual``, ``y = rms_norm(h)``; pattern ``... c -> ...``.

    Args:
        x: (..., *normalized_shape), any floating-point type; nested tensors too.
        residual: The shape of ``x``, any floating-point type.
        normalized_shape: The sizes of the last axes, over which the mean square is taken.
        weight: normalized_shape, or None for 1.
        eps: Added to the mean square, inside the root; None as in :func:`rms_norm`.

    Returns:
        ``(y, h)``, as :func:`fused_add_layer_norm`.

    Raises:
        TypeError: If ``x``, the residual or the weight is not floating point.
        ValueError: If shapes or devices do not fit, or eps is negative.

    Numerics:
        As :func:`fused_add_layer_norm`; backward keeps h, and rstd in float64.

    Example:
        >>> import torch
        >>> fused_add_rms_norm(torch.tensor([[1.0, 1.0, 4.0]]), torch.tensor([[1.0, 3.0, 2.0]]), (3,))
        (tensor([[0.4629, 0.9258, 1.3887]]), tensor([[2., 4., 6.]]))

    References:
        Zhang and Sennrich 2019, arXiv:1910.07467, equation 4.
    """
    if has_torch_function_variadic(x, residual):
        return handle_torch_function(fused_add_rms_norm, (x, residual), x, residual, normalized_shape, weight, eps)
    if isinstance(x, Tensor) and x.is_nested:
        h = x + residual
        return _on_nested(rms_norm, h, normalized_shape, weight, eps), h
    checks.check_last_axes("fused_add_rms_norm", x, normalized_shape, eps or 0.0, weight)
    checks.check_residual("fused_add_rms_norm", x, residual)
    x, residual = _promoted(x, residual)
    y, h = dispatch.fused_add_rms_norm(x, residual, normalized_shape, weight, machine_eps(x) if eps is None else eps)
    return dispatch.viewable(y), h


def machine_eps(x: object) -> float:
    """PyTorch's eps for None: float32's, and of float64 its own."""
    wide = isinstance(x, Tensor) and x.dtype == torch.float64
    return torch.finfo(torch.float64 if wide else torch.float32).eps


def _promoted(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the type of their sum."""
    if x.dtype == residual.dtype:
        return x, residual
    dtype = torch.promote_types(x.dtype, residual.dtype)
    return x.to(dtype), residual.to(dtype)


def _on_nested(norm: Callable[..., Tensor], x: Any, normalized_shape: Sequence[int], *args: Any) -> Tensor:
    """Normalize a nested tensor, whose last axes are regular: its packed values if it is jagged, else each example."""
    if x.layout == torch.strided:
        return torch.nested.as_nested_tensor([norm(example, normalized_shape, *args) for example in x.unbind()])
    if len(normalized_shape) > x.dim() - 2:
        raise ValueError(
            f"{norm.__name__}: only the regular axes of a jagged tensor can be normalized; x is {tuple(x.shape)} and "
            f"normalized_shape {tuple(normalized_shape)}; leave the batch and the jagged axis out."
        )
    values = norm(x.values(), normalized_shape, *args)
    return torch.nested.nested_tensor_from_jagged(values, x.offsets(), x.lengths(), x._ragged_idx)
