"""group_norm and instance_norm."""

from __future__ import annotations

import math

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from .. import checks, dispatch
from ..ops.common import OPS

GROUP_NORM = OPS.group_norm.default


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    """Group Norm: the channels of each example are normalized in groups, over all positions.

    ``y = (x - mean) / sqrt(var + eps) * weight + bias``; pattern ``n (g c) ... -> n g``.

    Args:
        x: (N, C, ...), any floating-point type.
        num_groups: The number of groups, a divisor of C.
        weight: (C), or None for 1.
        bias: (C), or None for 0.
        eps: Added to the variance, inside the root.
        mask: (N) or (N, ...), True where valid. Other positions take no part and give 0; the valid ones come out as
            they would without the others.

    Returns:
        A tensor like ``x``; float32 under CUDA autocast, as in PyTorch.

    Raises:
        TypeError: If ``x`` or a parameter is not floating point, or the mask not boolean.
        ValueError: If shapes or devices do not fit, eps is negative, or a batch of one has one value a group.

    Numerics:
        Biased variance; accumulated in float32 or wider, rounded once. Backward keeps mean and rstd in float64.

    Example:
        >>> import torch
        >>> group_norm(torch.tensor([[2.0, 4.0, 6.0, 8.0]]), 2)
        tensor([[-1.0000,  1.0000, -1.0000,  1.0000]])

    References:
        Wu and He 2018, arXiv:1803.08494, equation 7.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(group_norm, (x,), x, num_groups, weight, bias, eps, mask=mask)
    y = None
    if isinstance(x, Tensor) and x.numel() != num_groups:  # one value a group is refused below
        tensors = (x, weight, bias, mask)
        y = dispatch.at_once(GROUP_NORM, tensors, x, num_groups, weight, bias, eps, mask, None)
    if y is None:
        checks.check_group_norm("group_norm", x, num_groups, weight, bias, eps, mask)
        y = dispatch.group_norm(x, num_groups, weight, bias, eps, mask)
    return dispatch.viewable(y)


def instance_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    """Instance Norm: each channel of each example is normalized over its positions.

    ``y = (x - mean) / sqrt(var + eps) * weight + bias``; pattern ``n c ... -> n c``.

    Args:
        x: (N, C, ...) with more than one position, any floating-point type.
        running_mean: (C), moved in place by the examples' average mean, or None.
        running_var: (C), moved in place by their average unbiased variance, or None.
        weight: (C), or None for 1.
        bias: (C), or None for 0.
        use_input_stats: If False, the running statistics normalize, as Batch Norm does in eval.
        momentum: The weight of this batch in the running statistics.
        eps: Added to the variance, inside the root.
        mask: (N) or (N, ...), True where valid; as in :func:`group_norm`.

    Returns:
        A tensor like ``x``.

    Raises:
        TypeError: If ``x`` or a parameter is not floating point, or the mask not boolean.
        ValueError: If shapes or devices do not fit, eps is negative, there is one position, or running statistics are
            needed and missing.

    Numerics:
        Biased variance; accumulated in float32 or wider, rounded once. Backward keeps mean and rstd in float64.

    Example:
        >>> import torch
        >>> instance_norm(torch.tensor([[[1.0, 3.0], [10.0, 30.0]]]))
        tensor([[[-1.0000,  1.0000],
                 [-1.0000,  1.0000]]])

    References:
        Ulyanov, Vedaldi and Lempitsky 2016, arXiv:1607.08022, equation 4.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(
            instance_norm, (x,), x, running_mean, running_var, weight, bias, use_input_stats, momentum, eps, mask=mask
        )
    checks.check_input("instance_norm", x, 2)
    checks.check_eps("instance_norm", eps)
    checks.check_parameters(
        "instance_norm", x, x.shape[1:2], weight=weight, bias=bias, running_mean=running_mean, running_var=running_var
    )
    checks.check_running_pair("instance_norm", running_mean, running_var)
    checks.check_mask("instance_norm", x, mask)
    if not use_input_stats:
        mean, var = checks.check_running("instance_norm", running_mean, running_var)
        return dispatch.viewable(dispatch.batch_norm_eval(x, mean, var, weight, bias, eps, mask))
    checks.check_values_per_instance("instance_norm", x)
    y, mean, rstd = dispatch.group_norm_with_statistics(x, max(x.shape[1], 1), weight, bias, eps, mask, None)
    if running_mean is not None:
        var = (rstd.square().reciprocal() - eps).clamp(min=0)
        dispatch.update_running_(running_mean, running_var, None, mean, var, math.prod(x.shape[2:]), momentum, mask)
    return dispatch.viewable(y)
