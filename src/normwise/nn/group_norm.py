"""GroupNorm and InstanceNorm1d, 2d, 3d: `torch.nn` layers whose forward is normwise's."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional


class GroupNorm(torch.nn.GroupNorm):
    """Group Norm; arguments, state and results of `torch.nn.GroupNorm`.

    Formula, shapes, errors and numerics: :func:`normwise.functional.group_norm`.

    Example:
        >>> GroupNorm(2, 4)(torch.tensor([[2.0, 4.0, 6.0, 8.0]])).detach()
        tensor([[-1.0000,  1.0000, -1.0000,  1.0000]])
    """

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """``input`` (N, C, ...), ``mask`` (N) or (N, ...) -> the shape of ``input``."""
        return functional.group_norm(input, self.num_groups, self.weight, self.bias, self.eps, mask=mask)


def _forward(self: torch.nn.modules.instancenorm._InstanceNorm, input: Tensor, mask: Tensor | None = None) -> Tensor:
    """``input`` (N, C, ...) or (C, ...), ``mask`` (N) or (N, ...) -> the shape of ``input``."""
    unbatched = False
    if isinstance(input, Tensor):  # a tracer's proxy has no dimensions to check
        self._check_input_dim(input)
        unbatched = input.dim() == self._get_no_batch_dim()
    y = functional.instance_norm(
        input.unsqueeze(0) if unbatched else input,
        self.running_mean,
        self.running_var,
        self.weight,
        self.bias,
        self.training or not self.track_running_stats,
        self.momentum if self.momentum is not None else 0.0,
        self.eps,
        mask=mask,
    )
    return y.squeeze(0) if unbatched else y


class InstanceNorm1d(torch.nn.InstanceNorm1d):
    """Instance Norm of (N, C, L); arguments, state and results of `torch.nn.InstanceNorm1d`.

    Formula, shapes, errors and numerics: :func:`normwise.functional.instance_norm`.

    Example:
        >>> InstanceNorm1d(2)(torch.tensor([[[1.0, 3.0], [10.0, 30.0]]]))
        tensor([[[-1.0000,  1.0000],
                 [-1.0000,  1.0000]]])
    """

    forward = _forward


class InstanceNorm2d(torch.nn.InstanceNorm2d):
    """Instance Norm of (N, C, H, W); as :class:`InstanceNorm1d`."""

    forward = _forward


class InstanceNorm3d(torch.nn.InstanceNorm3d):
    """Instance Norm of (N, C, D, H, W); as :class:`InstanceNorm1d`."""

    forward = _forward
