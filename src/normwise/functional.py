"""The public functions: check the arguments, then choose the reference or an operator.

Signatures, defaults and results are those of `torch.nn.functional`; `mask` and :func:`normalize` are additions. Under a
functorch transform or forward-mode differentiation the reference runs; where a gradient is needed, an autograd
function around the operators; else an operator alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from . import checks, dispatch
from .definitions import Pattern
from .reference import Rows


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
        >>> layer_norm(torch.tensor([[2.0, 4.0, 6.0]]), (3,))
        tensor([[-1.2247,  0.0000,  1.2247]])

    References:
        Ba, Kiros and Hinton 2016, arXiv:1607.06450, equation 4.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(layer_norm, (x,), x, normalized_shape, weight, bias, eps)
    if isinstance(x, Tensor) and x.is_nested:
        return _on_nested(layer_norm, x, normalized_shape, weight, bias, eps)
    checks.check_input("layer_norm", x)
    checks.check_eps("layer_norm", eps)
    checks.check_normalized_shape("layer_norm", x, normalized_shape)
    checks.check_parameters("layer_norm", x, normalized_shape, weight=weight, bias=bias)
    return _viewable(dispatch.layer_norm(x, normalized_shape, weight, bias, eps))


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
        >>> rms_norm(torch.tensor([[2.0, 4.0, 6.0]]), (3,))
        tensor([[0.4629, 0.9258, 1.3887]])

    References:
        Zhang and Sennrich 2019, arXiv:1910.07467, equation 4.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(rms_norm, (x,), x, normalized_shape, weight, eps)
    if isinstance(x, Tensor) and x.is_nested:
        return _on_nested(rms_norm, x, normalized_shape, weight, eps)
    checks.check_input("rms_norm", x)
    if eps is None:
        eps = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps
    checks.check_eps("rms_norm", eps)
    checks.check_normalized_shape("rms_norm", x, normalized_shape)
    checks.check_parameters("rms_norm", x, normalized_shape, weight=weight)
    return _viewable(dispatch.rms_norm(x, normalized_shape, weight, eps))


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
        >>> group_norm(torch.tensor([[2.0, 4.0, 6.0, 8.0]]), 2)
        tensor([[-1.0000,  1.0000, -1.0000,  1.0000]])

    References:
        Wu and He 2018, arXiv:1803.08494, equation 7.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(group_norm, (x,), x, num_groups, weight, bias, eps, mask=mask)
    checks.check_input("group_norm", x, 2)
    checks.check_eps("group_norm", eps)
    checks.check_channels("group_norm", x, num_groups)
    checks.check_parameters("group_norm", x, x.shape[1:2], weight=weight, bias=bias)
    checks.check_mask("group_norm", x, mask)
    checks.check_values_per_group("group_norm", x, num_groups)
    return _viewable(dispatch.group_norm(x, num_groups, weight, bias, eps, mask, dispatch.autocast_dtype(x))[0])


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
        return _viewable(dispatch.batch_norm_eval(x, mean, var, weight, bias, eps, mask))
    checks.check_values_per_instance("instance_norm", x)
    y, mean, rstd = dispatch.group_norm(x, max(x.shape[1], 1), weight, bias, eps, mask, None)
    if running_mean is not None and running_var is not None and not dispatch.recomputing():
        var = (rstd.square().reciprocal() - eps).clamp(min=0)
        dispatch.update_running_(running_mean, running_var, None, mean, var, math.prod(x.shape[2:]), momentum, mask)
    return _viewable(y)


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
        )
    checks.check_input("batch_norm", x, 2)
    checks.check_eps("batch_norm", eps)
    checks.check_parameters(
        "batch_norm", x, x.shape[1:2], weight=weight, bias=bias, running_mean=running_mean, running_var=running_var
    )
    checks.check_running_pair("batch_norm", running_mean, running_var)
    checks.check_mask("batch_norm", x, mask)
    if not training:
        mean, var = checks.check_running("batch_norm", running_mean, running_var)
        return _viewable(dispatch.batch_norm_eval(x, mean, var, weight, bias, eps, mask))
    checks.check_values_per_channel("batch_norm", x, mask)
    y, mean, var = dispatch.batch_norm_training(x, weight, bias, eps, mask)
    if running_mean is not None and running_var is not None and not dispatch.recomputing():
        count = x.shape[0] * math.prod(x.shape[2:])
        dispatch.update_running_(running_mean, running_var, num_batches_tracked, mean, var, count, momentum, mask)
    return _viewable(y)


def normalize(
    x: Tensor,
    pattern: str,
    affine: str | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    **sizes: int,
) -> Tensor:
    """Normalize over any axes: the pattern names what keeps statistics of its own.

    Every norm is one pattern: ``n c h w -> c`` is Batch Norm in training, ``n l c -> n l`` Layer Norm,
    ``n (g c) h w -> n g`` Group Norm, ``n c h w -> n h w`` the Layer Norm over channels of ConvNeXt.

    Args:
        x: Shaped as the left side of the pattern, any floating-point type.
        pattern: Axes of ``x``, the batch first, an arrow, and the axes that keep their own mean and variance.
        affine: The axes of weight and bias, among those on the left: ``"c"``, ``"(g c)"``, ``"c h w"``.
        weight: Sizes of the affine axes, or None for 1.
        bias: Sizes of the affine axes, or None for 0.
        eps: Added to the variance, inside the root.
        **sizes: The parts of split axes, as in ``g=32``.

    Returns:
        A tensor like ``x``.

    Raises:
        TypeError: If ``x`` or a parameter is not floating point.
        ValueError: If the pattern is none, or shapes do not fit it.

    Numerics:
        Biased variance; accumulated in float32 or wider, rounded once.

    Example:
        >>> x = torch.tensor([[[2.0, 4.0, 6.0], [1.0, 5.0, 9.0]]])
        >>> torch.equal(normalize(x, "n l c -> n l"), layer_norm(x, (3,)))
        True

    References:
        Notation after Rogozhnikov 2022, einops, https://openreview.net/forum?id=oapKSVM2bcj.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(normalize, (x,), x, pattern, affine, weight, bias, eps, **sizes)
    checks.check_input("normalize", x)
    checks.check_eps("normalize", eps)
    rows = Rows.of(Pattern.parse(pattern), x.shape, affine or "", given=sizes)
    shape = checks.check_affine("normalize", rows, weight, bias)
    checks.check_parameters("normalize", x, shape, weight=weight, bias=bias)
    return dispatch.normalize(x, rows, weight, bias, eps)


def _viewable(y: Tensor) -> Tensor:
    """PyTorch's layout: channels_last stays, any other permutation is undone, so that ``y.view`` works as there."""
    if dispatch.transformed():
        return y.contiguous()
    if y.is_contiguous() or y.is_contiguous(memory_format=torch.channels_last):
        return y
    return y if y.is_contiguous(memory_format=torch.channels_last_3d) else y.contiguous()


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
