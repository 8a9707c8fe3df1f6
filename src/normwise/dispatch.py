"""Which of the three paths a call takes.

A plain call, as most small ones are, goes to the CPU kernel :func:`at_once`. Else, under a functorch transform or in
forward-mode differentiation the reference runs, since it can be differentiated in every way; where a gradient is
needed, an autograd function around the operators; else an operator alone. The arguments are those of `functional`,
already checked, :func:`at_once` apart.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from . import kernels, ops, reference
from .definitions import parse_axes
from .ops.common import OPS
from .reference import Rows

HAS_KERNELS = kernels.instruction_set() != "reference"

PLAIN = (Tensor, torch.nn.Parameter)
"""The types of tensors that nothing stands in for."""


def at_once(op: Any, tensors: Sequence[Tensor | None], *args: Any) -> Tensor | None:
    """The result of a CPU kernel that is the only one to see a call, and so the one to check its arguments.

    Nothing is changed by trying: an operator checks them before it allocates, and sooner than Python could.

    Args:
        op: The overload of an operator.
        tensors: All tensors among its arguments, checked or not.
        *args: Its arguments, likewise.

    Returns:
        None if the kernel refuses the arguments, or a call is traced, transformed or differentiated, or a tensor is
        elsewhere or of a type of its own: then they are to be checked and another path found.
    """
    if not HAS_KERNELS or is_compiling() or transformed() or _len_torch_dispatch_stack():
        return None
    differentiable = torch.is_grad_enabled()
    for t in tensors:
        if t is not None and (type(t) not in PLAIN or not t.is_cpu or (differentiable and t.requires_grad)):
            return None
    try:
        return op._op(*args)  # what calling op does, less a frame of Python
    except Exception:  # of whatever kind where another kernel took the call, as it does for a sparse tensor
        return None


def layer_norm(
    x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    out_dtype = autocast_dtype(x)
    if transformed():
        rows = reference.layer_norm_rows(x.shape, normalized_shape)
        return reference.normalize(x, rows, weight, bias, eps, out_dtype=out_dtype).y
    if differentiated(x, weight, bias):
        return ops.LayerNorm.apply(x, weight, bias, normalized_shape, eps, out_dtype)
    return OPS.layer_norm.default(x, normalized_shape, weight, bias, eps, out_dtype)


def rms_norm(x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, eps: float) -> Tensor:
    out_dtype = autocast_dtype(x)
    if transformed():
        rows = reference.layer_norm_rows(x.shape, normalized_shape, centred=False)
        return reference.normalize(x, rows, weight, None, eps, out_dtype=out_dtype).y
    if differentiated(x, weight):
        return ops.RMSNorm.apply(x, weight, normalized_shape, eps, out_dtype)
    return OPS.rms_norm.default(x, normalized_shape, weight, eps, out_dtype)


def fused_add_layer_norm(
    x: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """y, and h = x + residual."""
    if transformed():
        h = x + residual
        return layer_norm(h, normalized_shape, weight, bias, eps), h
    out_dtype = autocast_dtype(x)
    if differentiated(x, residual, weight, bias):
        return ops.FusedAddLayerNorm.apply(x, residual, weight, bias, normalized_shape, eps, out_dtype)
    return OPS.fused_add_layer_norm.default(x, residual, normalized_shape, weight, bias, eps, out_dtype)


def fused_add_rms_norm(
    x: Tensor, residual: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """y, and h = x + residual."""
    if transformed():
        h = x + residual
        return rms_norm(h, normalized_shape, weight, eps), h
    out_dtype = autocast_dtype(x)
    if differentiated(x, residual, weight):
        return ops.FusedAddRMSNorm.apply(x, residual, weight, normalized_shape, eps, out_dtype)
    return OPS.fused_add_rms_norm.default(x, residual, normalized_shape, weight, eps, out_dtype)


def group_norm(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, mask: Tensor | None
) -> Tensor:
    out_dtype = autocast_dtype(x)
    if transformed() or differentiated(x, weight, bias):
        return group_norm_with_statistics(x, num_groups, weight, bias, eps, mask, out_dtype)[0]
    return OPS.group_norm.default(x, num_groups, weight, bias, eps, mask, out_dtype)


def group_norm_with_statistics(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    mask: Tensor | None,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and for each group mean and rstd."""
    if transformed():
        rows = reference.group_norm_rows(x.shape, num_groups)
        y, _, stats = reference.normalize(x, rows, weight, bias, eps, mask=mask, out_dtype=out_dtype)
        return y, stats.mean.squeeze(-1), stats.rstd.squeeze(-1)
    if differentiated(x, weight, bias):
        return ops.GroupNorm.apply(x, weight, bias, num_groups, eps, mask, out_dtype)
    return OPS.group_norm_forward.default(x, num_groups, weight, bias, eps, mask, out_dtype)


def batch_norm_training(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    mask: Tensor | None,
    reproducible: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and for each channel mean and biased variance."""
    if transformed():
        y, _, stats = reference.normalize(x, reference.batch_norm_rows(x.shape), weight, bias, eps, mask=mask)
        return y, stats.mean.squeeze(-1), stats.var.squeeze(-1)
    exact = exact_sums(x, reproducible)
    if differentiated(x, weight, bias):
        return ops.BatchNormTraining.apply(x, weight, bias, eps, mask, exact)
    return OPS.batch_norm_forward.default(x, weight, bias, eps, mask, exact)


def sync_batch_norm_training(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    mask: Tensor | None,
    reproducible: bool | None,
    place: ops.Place,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y; mean, biased variance and count of all processes."""
    refuse_transforms(place[1], "batch_norm")
    exact = exact_sums(x, reproducible)
    if differentiated(x, weight, bias):
        return ops.SyncBatchNorm.apply(x, weight, bias, eps, mask, exact, place)
    return ops.normalize_over_processes(x, weight, bias, eps, mask, exact, place)


def batch_norm_eval(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    mask: Tensor | None,
) -> Tensor:
    if transformed():
        fixed = reference.fixed_statistics(running_mean, running_var, eps)
        return reference.normalize(x, reference.batch_norm_rows(x.shape), weight, bias, eps, mask=mask, fixed=fixed).y
    if differentiated(x, weight, bias):
        return ops.BatchNormEval.apply(x, weight, bias, running_mean, running_var, eps, mask)
    return OPS.batch_norm.default(x, running_mean, running_var, weight, bias, eps, mask)


def batch_norm_relu_training(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    mask: Tensor | None,
    residual: Tensor | None,
    reproducible: bool | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and for each channel mean and biased variance."""
    if transformed():
        rows = reference.batch_norm_rows(x.shape)
        y, _, stats = reference.normalize(x, rows, weight, bias, eps, mask=mask, residual=residual)
        return y.relu(), stats.mean.squeeze(-1), stats.var.squeeze(-1)
    exact = exact_sums(x, reproducible)
    if differentiated(x, weight, bias, residual):
        return ops.BatchNormReLUTraining.apply(x, weight, bias, residual, eps, mask, exact)
    return OPS.batch_norm_relu_forward.default(x, weight, bias, eps, mask, residual, exact)


def batch_norm_relu_eval(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    mask: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    if transformed():
        rows, fixed = reference.batch_norm_rows(x.shape), reference.fixed_statistics(running_mean, running_var, eps)
        return reference.normalize(x, rows, weight, bias, eps, mask=mask, fixed=fixed, residual=residual).y.relu()
    if differentiated(x, weight, bias, residual):
        return ops.BatchNormReLUEval.apply(x, weight, bias, residual, running_mean, running_var, eps, mask)
    return OPS.batch_norm_relu.default(x, running_mean, running_var, weight, bias, eps, mask, residual)


def update_running_(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    mean: Tensor,
    var: Tensor,
    count: int,
    momentum: float | None,
    mask: Tensor | None,
    total: Tensor | None = None,
) -> None:
    """Move running statistics, if there are any, and warn where a variance is cut to what its type can hold.

    A forward that activation checkpointing repeats moves nothing: it was counted.
    """
    if running_mean is None or running_var is None or recomputing():
        return
    if transformed():
        with torch.no_grad():
            reference.update_running_(running_mean, running_var, num_batches_tracked, mean, var, count, momentum, mask)
        return
    OPS.update_running_.default(running_mean, running_var, num_batches_tracked, mean, var, count, momentum, mask, total)
    if type(var) is not Tensor or not var.is_cpu or torch.compiler.is_compiling() or not var.numel():
        return
    count = count if total is None else int(total[0])
    if count < 2:
        return
    limit, largest = torch.finfo(running_var.dtype).max, var.nan_to_num(0.0).max().item()
    if largest * (count / (count - 1)) > limit:
        warnings.warn(
            f"batch_norm: running_var must fit its type; this batch's variance exceeds {limit:.3g} and was cut to it; "
            "scale the input down or keep running statistics in a wider type.",
            stacklevel=3,
        )


def normalize(x: Tensor, rows: Rows, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Send a pattern to the norm that it is, on a permuted view; the reference computes those that are none."""
    left, right = rows.pattern.left, set(rows.pattern.right)
    affine = parse_axes(rows.affine, "affine")
    kept = [i for i, item in enumerate(left) if right.issuperset(item)]
    averaged = [i for i, item in enumerate(left) if right.isdisjoint(item)]
    split = [i for i in range(len(left)) if i not in kept and i not in averaged]
    order = kept + averaged
    over_rows = not split and affine in ((), tuple(left[i] for i in averaged))
    if over_rows and order == sorted(order):
        return layer_norm(x, [x.shape[i] for i in averaged], weight, bias, eps)
    channel = left.index(affine[0]) if len(affine) == 1 and affine[0] in left else (split or kept or [0])[-1]
    per_channel = affine in ((), (left[channel],)) and channel > 0
    if per_channel and kept == [channel] and not split:
        return batch_norm_training(x.movedim(channel, 1), weight, bias, eps, None)[0].movedim(1, channel)
    outer = left[channel][:-1]
    if per_channel and kept == [0] and split in ([], [channel]) and right == {*left[0], *(outer if split else ())}:
        groups = math.prod([rows.sizes[name] for name in outer]) if split else 1
    elif per_channel and kept == [0, channel] and not split:
        groups = max(x.shape[channel], 1)
    elif over_rows:
        inverse = [order.index(i) for i in range(len(order))]
        return layer_norm(x.permute(order), [x.shape[i] for i in averaged], weight, bias, eps).permute(inverse)
    else:
        return reference.normalize(x, rows, weight, bias, eps, out_dtype=autocast_dtype(x)).y
    return group_norm(x.movedim(channel, 1), groups, weight, bias, eps, None).movedim(1, channel)


def recomputing() -> bool:
    """True in a forward run inside a backward pass: activation checkpointing repeating one that was counted."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def transformed() -> bool:
    """True under vmap, grad, jvp and their like, and in forward-mode differentiation."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def refuse_transforms(layer: str, instead: str) -> None:
    """What is exchanged between processes is outside any transform.

    Raises:
        RuntimeError: If one is active.
    """
    if transformed():
        raise RuntimeError(f"{layer}: no transform of torch.func crosses processes; one is active; use {instead}.")


def differentiated(*tensors: Tensor | None) -> bool:
    """True if autograd will want a gradient of one of them."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def exact_sums(x: Tensor, reproducible: bool | None) -> bool:
    """Whether the sums of batch_norm are order-free: if nothing was said, where an example has values to pay for it."""
    return math.prod(x.shape[2:]) >= 16 if reproducible is None else reproducible


def viewable(y: Tensor) -> Tensor:
    """PyTorch's layout: channels_last stays, any other permutation is undone, so that ``y.view`` works as there."""
    if y.is_contiguous():
        return y
    if transformed():  # vmap knows no other memory format
        return y.contiguous()
    if y.is_contiguous(memory_format=torch.channels_last) or y.is_contiguous(memory_format=torch.channels_last_3d):
        return y
    return y.contiguous()


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """PyTorch's policy: CUDA autocast runs layer_norm, rms_norm and group_norm in float32; CPU autocast leaves them."""
    narrow = x.is_cuda and x.dtype in (torch.float16, torch.bfloat16)
    return torch.float32 if narrow and torch.is_autocast_enabled("cuda") else None
