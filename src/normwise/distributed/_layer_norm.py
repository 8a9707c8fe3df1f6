"""layer_norm and rms_norm where each process has some of the columns, as tensor parallelism leaves them."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from .. import checks, dispatch, exchange, ops
from ..functional._layer_norm import machine_eps


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    process_group: dist.ProcessGroup | None = None,
    layer: str = "distributed.layer_norm",
) -> Tensor:
    """Layer Norm over a last axis that is cut into pieces, one on each process of a group.

    ``y = (x - mean) / sqrt(var + eps) * weight + bias``; pattern ``... c -> ...``, with c over all processes. Every
    process calls it with the same rows; forward takes one collective, and so does the backward that gives dx.

    Args:
        x: (..., C of this process), any floating-point type. C may differ between processes and be 0; the other axes
            are the same everywhere.
        weight: (C of this process), or None for 1.
        bias: (C of this process), or None for 0.
        eps: Added to the variance, inside the root.
        process_group: The processes that share rows; None for all.
        layer: A name for this call, the same on every process, by which errors tell where a process is.

    Returns:
        A tensor like ``x``; float32 under CUDA autocast, as in PyTorch. The gradients of x, weight and bias are
        complete: nothing is left to be summed over the group.

    Raises:
        TypeError: If ``x`` or a parameter is not floating point.
        ValueError: If shapes or devices do not fit, eps is negative, or type or eps differ between processes.
        RuntimeError: Without a process group, under a transform of `torch.func`, or if another process ended, hung,
            left out the call, or has another number of rows. With gloo that may take the group's timeout to show.

    Numerics:
        Float64, rounded once; biased variance. Each process sends count, mean and centred sum of squares of its columns
        of a row; all merge them in the order of the ranks, so a row's bits depend on how its columns are split, but not
        on the other rows, nor on the number of threads. Backward keeps mean and rstd in float64.

    Example:
        >>> import torch, torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> layer_norm(torch.tensor([[2.0, 4.0, 6.0]]))
        tensor([[-1.2247,  0.0000,  1.2247]])
        >>> dist.destroy_process_group()

    References:
        Ba, Kiros and Hinton 2016, arXiv:1607.06450, equation 4. Chan, Golub and LeVeque 1979, "Updating Formulae and a
        Pairwise Algorithm for Computing Sample Variances", equation 2.1.
    """
    return _normalize(x, weight, bias, True, eps, process_group, layer)


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    process_group: dist.ProcessGroup | None = None,
    layer: str = "distributed.rms_norm",
) -> Tensor:
    """RMSNorm over a last axis that is cut into pieces, one on each process of a group.

    ``y = x / sqrt(mean(x²) + eps) * weight``; else as :func:`layer_norm`.

    Args:
        x: (..., C of this process), as there.
        weight: (C of this process), or None for 1.
        eps: Added to the mean square, inside the root; None as in :func:`normwise.functional.rms_norm`.
        process_group: The processes that share rows; None for all.
        layer: A name for this call, as there.

    Returns:
        A tensor like ``x``; float32 under CUDA autocast, as in PyTorch.

    Raises:
        TypeError: As :func:`layer_norm`.
        ValueError: Likewise.
        RuntimeError: Likewise.

    Numerics:
        As :func:`layer_norm`.

    Example:
        >>> import torch, torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> rms_norm(torch.tensor([[2.0, 4.0, 6.0]]))
        tensor([[0.4629, 0.9258, 1.3887]])
        >>> dist.destroy_process_group()

    References:
        Zhang and Sennrich 2019, arXiv:1910.07467, equation 4.
    """
    return _normalize(x, weight, None, False, machine_eps(x) if eps is None else eps, process_group, layer)


def _normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    centred: bool,
    eps: float,
    process_group: dist.ProcessGroup | None,
    layer: str,
) -> Tensor:
    norm = "layer_norm" if centred else "rms_norm"
    checks.check_last_axes(layer, x, x.shape[-1:], eps, weight, bias)
    dispatch.refuse_transforms(layer, norm)
    group = exchange.name_of(process_group, layer, f"use normwise.functional.{norm} for whole rows")
    place = group, layer, f"{norm}, {str(x.dtype).removeprefix('torch.')}, eps {eps}"
    out_dtype = dispatch.autocast_dtype(x)
    if dispatch.differentiated(x, weight, bias):
        return dispatch.viewable(ops.ShardedLayerNorm.apply(x, weight, bias, centred, eps, out_dtype, place))
    return dispatch.viewable(ops.normalize_shard(x, weight, bias, centred, eps, out_dtype, place)[0])
