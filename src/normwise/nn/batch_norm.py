"""BatchNorm1d, 2d, 3d: `torch.nn` layers whose forward is normwise's."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional


def _forward(self: torch.nn.modules.batchnorm._BatchNorm, input: Tensor, mask: Tensor | None = None) -> Tensor:
    """``input`` (N, C, ...), ``mask`` (N) or (N, ...) -> the shape of ``input``."""
    if isinstance(input, Tensor):  # a tracer's proxy has no dimensions to check
        self._check_input_dim(input)
    tracked = self.training and self.track_running_stats
    usable = tracked or not self.training
    return functional.batch_norm(
        input,
        self.running_mean if usable else None,
        self.running_var if usable else None,
        self.weight,
        self.bias,
        self.training or (self.running_mean is None and self.running_var is None),
        self.momentum,
        self.eps,
        mask=mask,
        num_batches_tracked=self.num_batches_tracked if tracked else None,
    )


class BatchNorm1d(torch.nn.BatchNorm1d):
    """Batch Norm of (N, C) or (N, C, L); arguments, state and results of `torch.nn.BatchNorm1d`.

    Formula, shapes, errors and numerics: :func:`normwise.functional.batch_norm`.

    Example:
        >>> BatchNorm1d(1)(torch.tensor([[2.0], [3.0], [1.0], [4.0]])).flatten().detach()
        tensor([-0.4472,  0.4472, -1.3416,  1.3416])
    """

    forward = _forward


class BatchNorm2d(torch.nn.BatchNorm2d):
    """Batch Norm of (N, C, H, W); as :class:`BatchNorm1d`."""

    forward = _forward


class BatchNorm3d(torch.nn.BatchNorm3d):
    """Batch Norm of (N, C, D, H, W); as :class:`BatchNorm1d`."""

    forward = _forward
