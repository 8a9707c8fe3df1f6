"""BatchNorm1d, 2d, 3d and SyncBatchNorm: `torch.nn` layers whose forward is normwise's."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import checks, exchange, functional
from .refusal import in_lines, why_not


def _forward(self: nn.modules.batchnorm._BatchNorm, input: Tensor, mask: Tensor | None = None) -> Tensor:
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


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch Norm over the examples of all processes; arguments and state of `torch.nn.SyncBatchNorm`.

    It is no subclass of that, which `DistributedDataParallel` refuses on the CPU. It runs on any backend and takes
    uneven and empty shards and masks; :meth:`convert` puts it into a model. Formula, errors and numerics:
    :func:`normwise.functional.sync_batch_norm`.

    Args:
        num_features: C.
        eps: Added to the variance, inside the root.
        momentum: The weight of a batch in the running statistics; None for the average of all.
        affine: If True, learn weight and bias, (C).
        track_running_stats: If True, keep running statistics for eval.
        process_group: The processes that share statistics; None for all.
        device: Where parameters and statistics live.
        dtype: Their type.
        reproducible: If True, no bit depends on how the examples are split over the processes; None for True where an
            example has 16 or more values a channel.
        allow_local: If True, training without a process group is plain Batch Norm; else it raises.

    Example:
        >>> SyncBatchNorm(1, allow_local=True)(torch.tensor([[2.0], [3.0], [1.0], [4.0]])).flatten().detach()
        tensor([-0.4472,  0.4472, -1.3416,  1.3416])
    """

    reproducible: bool | None = None
    allow_local = False
    name = ""
    """Where the layer stands in its model, for errors; the conversion sets it."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: dist.ProcessGroup | None = None,
        device: Any = None,
        dtype: Any = None,
        *,
        reproducible: bool | None = None,
        allow_local: bool = False,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self.process_group, self.reproducible, self.allow_local = process_group, reproducible, allow_local

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of axes from (N, C) on, which the functional checks."""

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """``input`` (N, C, ...), ``mask`` (N) or (N, ...) -> the shape of ``input``."""
        if not self.training or (self.allow_local and not exchange.initialized()):
            return _forward(self, input, mask)
        tracked = self.track_running_stats
        return functional.sync_batch_norm(
            input,
            self.running_mean if tracked else None,
            self.running_var if tracked else None,
            self.weight,
            self.bias,
            True,
            self.momentum,
            self.eps,
            process_group=self.process_group,
            mask=mask,
            num_batches_tracked=self.num_batches_tracked if tracked else None,
            reproducible=self.reproducible,
            layer=label(self),
        )

    @classmethod
    def convert(
        cls, model: nn.Module, process_group: dist.ProcessGroup | None = None, *, reproducible: bool | None = None
    ) -> nn.Module:
        """Turn the Batch Norms of a model, torch's and normwise's, into this class, in place.

        Parameters, buffers, modes, hooks, and every reference to the modules stay as they are. The layer takes any
        number of axes from (N, C) on: what BatchNorm2d would refuse is not refused.

        Args:
            model: Any module; it may be a norm itself.
            process_group: The processes that share statistics; None for all, or for those that a layer has already.
            reproducible: As for the layer; None keeps what a layer has already.

        Returns:
            The model.

        Raises:
            TypeError: If ``model`` is no module.
            ValueError: If a Batch Norm in it would lose behaviour; then nothing is changed.

        Example:
            >>> type(SyncBatchNorm.convert(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))[1]).__module__
            'normwise.nn.batch_norm'
        """
        checks.check_module("convert", model)
        found = {name: m for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
        refused = {name: why for name, m in found.items() if (why := why_not(m, CONVERTIBLE))}
        if refused:
            raise ValueError(
                f"convert: every Batch Norm must keep its behaviour; {len(refused)} would not; "
                f"change these or convert the others' modules one by one:\n{in_lines(refused)}"
            )
        for name, norm in found.items():
            norm.__class__ = cls
            kept = vars(norm)  # a layer that was synchronized keeps what is not given
            kept["process_group"] = process_group or kept.get("process_group")
            kept["reproducible"] = kept.get("reproducible") if reproducible is None else reproducible
            kept["name"] = name
        return model

    def __deepcopy__(self, memo: dict[int, Any]) -> SyncBatchNorm:
        """A layer of its own, in the same process group."""
        memo[id(self.process_group)] = self.process_group
        memo[id(self)] = other = type(self).__new__(type(self))
        vars(other).update(copy.deepcopy(vars(self), memo))
        return other


CONVERTIBLE = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm),
)


@exchange.constant
def label(layer: SyncBatchNorm) -> str:
    """A name that tells a layer from its group's others: its place in the order in which they are first called."""
    group = exchange.name_of(layer.process_group, "SyncBatchNorm: training")
    return f"SyncBatchNorm {exchange.of_group(group).number(layer)}" + (f" ({layer.name})" if layer.name else "")


def labelled(layer: nn.Module) -> str | None:
    """The name of a layer that has been called in training, else None."""
    if not (isinstance(layer, SyncBatchNorm) and exchange.initialized()):
        return None
    group = exchange.of_group(exchange.name_of(layer.process_group, "SyncBatchNorm"))
    return label(layer) if layer in group else None
