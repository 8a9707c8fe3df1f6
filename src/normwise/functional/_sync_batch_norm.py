"""sync_batch_norm: Batch Norm over the examples of all processes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from .. import checks, dispatch, exchange, kernels


def sync_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    process_group: dist.ProcessGroup | None = None,
    mask: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
    reproducible: bool | None = None,
    layer: str = "sync_batch_norm",
) -> Tensor:
    """Batch Norm over the examples of all processes of a group, as if they were one batch.

    ``y = (x - mean) / sqrt(var + eps) * weight + bias``; pattern ``n c ... -> c``, with n over all processes. In
    training every process of the group calls it, with as many examples as it has, which may be none; forward and
    backward take one collective each. In eval nothing is exchanged.

    Args:
        x: (N, C, ...), any floating-point type; N and the positions may differ between processes.
        running_mean: (C); as in :func:`batch_norm`.
        running_var: (C); as in :func:`batch_norm`.
        weight: (C), or None for 1.
        bias: (C), or None for 0.
        training: If True, the statistics of all processes' examples normalize.
        momentum: The weight of this batch in the running statistics; as in :func:`batch_norm`.
        eps: Added to the variance, inside the root.
        process_group: The processes; None for all. Its backend may be any that adds up int64.
        mask: (N) or (N, ...), True where valid. Other positions take no part and give 0.
        num_batches_tracked: Integer scalar, incremented in place with the running statistics.
        reproducible: If True, on the kernels the bits depend neither on the number of processes nor on how the
            examples are split over them, and equal :func:`batch_norm`'s; None for True where an example has 16 or more
            values a channel.
        layer: A name for this call, the same on every process and no other call's, by which errors tell where a process
            is.

    Returns:
        A tensor like ``x``. The gradients of weight and bias are sums over this process's examples, as data-parallel
        training expects; :func:`normwise.distributed.parameter_gradients` gives those of all.

    Raises:
        TypeError: As :func:`batch_norm`.
        ValueError: As :func:`batch_norm`; or if the processes' layers or settings differ, this one does not belong to
            the group, or, not compiled, all together have one value per channel.
        RuntimeError: In training without a process group, under a transform of `torch.func`, or if another process
            ended, hung or left out the call.

    Numerics:
        Sums travel as exact integers, 45 of 64 bits a channel, whatever ``reproducible``; so no bit depends on the
        order in which the processes' sums are added.

    Example:
        >>> import torch
        >>> sync_batch_norm(torch.tensor([[2.0], [4.0]]), torch.tensor([3.0]), torch.tensor([1.0])).flatten()
        tensor([-1.0000,  1.0000])

    References:
        Peng et al. 2018, "MegDet: A Large Mini-Batch Object Detector", arXiv:1711.07240, section 3.3.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(
            sync_batch_norm,
            (x,),
            x,
            running_mean,
            running_var,
            weight,
            bias,
            training,
            momentum,
            eps,
            process_group=process_group,
            mask=mask,
            num_batches_tracked=num_batches_tracked,
            reproducible=reproducible,
            layer=layer,
        )
    checks.check_batch_norm("sync_batch_norm", x, running_mean, running_var, weight, bias, False, eps, mask)
    if training:
        place = exchange.name_of(process_group, f"{layer}: training"), layer, settings(x, eps, momentum, reproducible)
        y, mean, var, count = dispatch.sync_batch_norm_training(x, weight, bias, eps, mask, reproducible, place)
        if not torch.compiler.is_compiling():
            checks.check_values_of_all(layer, x, count)
        dispatch.update_running_(running_mean, running_var, num_batches_tracked, mean, var, 0, momentum, None, count)
    else:
        mean, var = checks.check_running("sync_batch_norm", running_mean, running_var)
        y = dispatch.batch_norm_eval(x, mean, var, weight, bias, eps, mask)
    return dispatch.viewable(y)


def settings(x: Tensor, eps: float, momentum: float | None, reproducible: bool | None) -> str:
    """What must be the same on every process, in words."""
    dtype, where = str(x.dtype).removeprefix("torch."), kernels.instruction_set() if x.is_cpu else x.device.type
    return f"{x.shape[1]} channels, {dtype}, eps {eps}, momentum {momentum}, reproducible {reproducible}, {where}"
