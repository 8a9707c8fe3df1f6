"""normalize: any pattern."""

from __future__ import annotations

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from .. import checks, dispatch
from ..definitions import Pattern
from ..reference import Rows


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
        >>> import torch
        >>> normalize(torch.tensor([[[2.0, 4.0, 6.0], [1.0, 1.0, 7.0]]]), "n l c -> n l")
        tensor([[[-1.2247,  0.0000,  1.2247],
                 [-0.7071, -0.7071,  1.4142]]])

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
