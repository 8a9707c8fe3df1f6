"""batch_norm, alone and fused with what follows it in a residual network."""

from __future__ import annotations

import math

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary, has_torch_function_variadic

from .. import checks, dispatch
from ..ops.common import OPS

BATCH_NORM = OPS.batch_norm.default


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    mask: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
    reproducible: bool | None = None,
) -> Tensor:
    """Batch Norm: each channel is normalized over all examples of the batch and all positions.

    ``y = (x - mean) / sqrt(var + eps) * weight + bias``; pattern ``n c ... -> c``.

    Args:
        x: (N, C, ...), any floating-point type.
        running_mean: (C). In training it is moved in place by the batch's mean; in eval it is the mean. None in
            training for no memory.
        running_var: (C). The same for the variance; moved by the unbiased one.
        weight: (C), or None for 1.
        bias: (C), or None for 0.
        training: If True, the batch's own statistics normalize.
        momentum: The weight of this batch in the running statistics; None, with ``num_batches_tracked``, for the plain
            average of all batches.
        eps: Added to the variance, inside the root.
        mask: (N) or (N, ...), True where valid. Other positions take no part and give 0.
        num_batches_tracked: Integer scalar, incremented in place with the running statistics.
        reproducible: If True, training on a kernel gives the same bits in any order of the examples; None for
            True where an example has 16 or more values a channel. The reference ignores it.

    Returns:
        A tensor like ``x``.

    Raises:
        TypeError: If ``x`` or a parameter is not floating point, or the mask not boolean.
        ValueError: If shapes or devices do not fit, eps is negative, there is one value per channel in training, or
            running statistics are needed and missing.

    Numerics:
        Normalizes by the biased variance and remembers the unbiased one, as PyTorch does. Accumulated in
        float32 or wider, rounded once. Backward keeps mean and variance in float64. A forward recomputed by activation
        checkpointing does not move the running statistics again.

    Example:
        >>> import torch
        >>> batch_norm(torch.tensor([[2.0], [3.0], [1.0], [4.0]]), None, None, training=True).flatten()
        tensor([-0.4472,  0.4472, -1.3416,  1.3416])

    References:
        Ioffe and Szegedy 2015, arXiv:1502.03167, algorithms 1 and 2.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(
            batch_norm,
            (x,),
            x,
            running_mean,
            running_var,
            weight,
            bias,
            training,
            momentum,
            eps,
            mask=mask,
            num_batches_tracked=num_batches_tracked,
            reproducible=reproducible,
        )
    if not training:
        tensors = (x, running_mean, running_var, weight, bias, mask)
        y = dispatch.at_once(BATCH_NORM, tensors, x, running_mean, running_var, weight, bias, eps, mask)
        if y is not None:
            return dispatch.viewable(y)
    checks.check_batch_norm("batch_norm", x, running_mean, running_var, weight, bias, training, eps, mask)
    if training:
        y, mean, var = dispatch.batch_norm_training(x, weight, bias, eps, mask, reproducible)
        count = x.shape[0] * math.prod(x.shape[2:])
        dispatch.update_running_(running_mean, running_var, num_batches_tracked, mean, var, count, momentum, mask)
    else:
        mean, var = checks.check_running("batch_norm", running_mean, running_var)
        y = dispatch.batch_norm_eval(x, mean, var, weight, bias, eps, mask)
    return dispatch.viewable(y)


def batch_norm_relu(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
    reproducible: bool | None = None,
) -> Tensor:
    """Batch Norm, the addition of a residual and ReLU in one, as they follow each other in a residual network.

    ``y = max(0, (x - mean) / sqrt(var + eps) * weight + bias + residual)``; pattern ``n c ... -> c``.

    Args:
        x: (N, C, ...), any floating-point type.
        running_mean: (C); as in :func:`batch_norm`.
        running_var: (C); as in :func:`batch_norm`.
        weight: (C), or None for 1.
        bias: (C), or None for 0.
        training: If True, the batch's own statistics normalize.
        momentum: The weight of this batch in the running statistics; as in :func:`batch_norm`.
        eps: Added to the variance, inside the root.
        residual: Shape and type of ``x``, added before the ReLU, or None for 0.
        mask: (N) or (N, ...), True where valid. Other positions take no part, give 0 and pass no gradient.
        num_batches_tracked: Integer scalar, incremented in place with the running statistics.
        reproducible: As in :func:`batch_norm`.

    Returns:
        A tensor like ``x``.

    Raises:
        TypeError: If ``x`` or a parameter is not floating point, the residual not of the type of ``x``, or the mask not
            boolean.
        ValueError: If shapes or devices do not fit, eps is negative, there is one value per channel in training, or
            running statistics are needed and missing.

    Numerics:
        As :func:`batch_norm`; the sum with the residual is taken before the one rounding. Backward keeps y beside what
        batch_norm keeps, and passes the gradient where y is not 0; NaN stays NaN and passes it, as in PyTorch's relu.

    Example:
        >>> import torch
        >>> batch_norm_relu(torch.tensor([[2.0], [3.0], [1.0], [4.0]]), None, None, training=True).flatten()
        tensor([0.0000, 0.4472, 0.0000, 1.3416])

    References:
        He, Zhang, Ren and Sun 2016, arXiv:1512.03385, figure 2.
    """
    if has_torch_function_variadic(x, residual):
        return handle_torch_function(
            batch_norm_relu,
            (x, residual),
            x,
            running_mean,
            running_var,
            weight,
            bias,
            training,
            momentum,
            eps,
            residual=residual,
            mask=mask,
            num_batches_tracked=num_batches_tracked,
            reproducible=reproducible,
        )
    name = "batch_norm_relu"
    checks.check_batch_norm(name, x, running_mean, running_var, weight, bias, training, eps, mask, residual)
    if training:
        y, mean, var = dispatch.batch_norm_relu_training(x, weight, bias, eps, mask, residual, reproducible)
        count = x.shape[0] * math.prod(x.shape[2:])
        dispatch.update_running_(running_mean, running_var, num_batches_tracked, mean, var, count, momentum, mask)
    else:
        mean, var = checks.check_running(name, running_mean, running_var)
        y = dispatch.batch_norm_relu_eval(x, mean, var, weight, bias, eps, mask, residual)
    return dispatch.viewable(y)
