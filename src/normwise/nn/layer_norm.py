"""LayerNorm, RMSNorm and LayerNorm2d: `torch.nn` layers whose forward is normwise's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import functional


class LayerNorm(torch.nn.LayerNorm):
    """Layer Norm over the last axes; arguments, state and results of `torch.nn.LayerNorm`.

    Formula, shapes, errors and numerics: :func:`normwise.functional.layer_norm`.

    Example:
        >>> LayerNorm(3)(torch.tensor([[2.0, 4.0, 6.0]])).detach()
        tensor([[-1.2247,  0.0000,  1.2247]])
    """

    def forward(self, input: Tensor) -> Tensor:
        """``input`` (..., *normalized_shape) -> the same shape."""
        return functional.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm over the last axes; arguments, state and results of `torch.nn.RMSNorm`.

    Formula, shapes, errors and numerics: :func:`normwise.functional.rms_norm`.

    Example:
        >>> RMSNorm(3)(torch.tensor([[2.0, 4.0, 6.0]])).detach()
        tensor([[0.4629, 0.9258, 1.3887]])
    """

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (..., *normalized_shape) -> the same shape."""
        return functional.rms_norm(x, self.normalized_shape, self.weight, self.eps)


class LayerNorm2d(torch.nn.LayerNorm):
    """Layer Norm over the channels of an image, at each of its positions, as in ConvNeXt: ``n c h w -> n h w``.

    Args:
        num_channels: C.
        eps: Added to the variance, inside the root.
        elementwise_affine: If True, learn weight and bias, (C).
        bias: If False, learn no bias.
        device: Where the parameters live.
        dtype: Their type.

    Raises:
        ValueError: If the input is not (N, C, H, W).

    Example:
        >>> LayerNorm2d(3)(torch.tensor([2.0, 4.0, 6.0]).view(1, 3, 1, 1)).flatten().detach()
        tensor([-1.2247,  0.0000,  1.2247])

    References:
        Liu et al. 2022, "A ConvNet for the 2020s", arXiv:2201.03545, section 2.6.
    """

    def __init__(
        self,
        num_channels: int,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(num_channels, eps, elementwise_affine, bias, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        """``input`` (N, C, H, W) -> the same shape and memory format."""
        return functional.normalize(input, "n c h w -> n h w", "c", self.weight, self.bias, self.eps)
