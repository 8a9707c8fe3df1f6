"""Sharding rules by which DTensor runs the row-wise norms where their rows are."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from torch._ops import OpOverload

from ..ops.common import OPS

ROW_WISE = [
    f"{norm}{part}"
    for norm in ("layer_norm", "rms_norm", "group_norm", "fused_add_layer_norm", "fused_add_rms_norm")
    for part in ("", "_forward", "_backward")
]
"""Operators whose rows know nothing of each other."""

OVER_THE_BATCH = ["batch_norm", "batch_norm_forward", "batch_norm_relu", "batch_norm_relu_forward", "batch_norm_sums"]
"""Those whose do, as they start."""


def register_dtensor() -> None:
    """Let DTensor run layer_norm, rms_norm, group_norm, instance_norm and the fused additions, where the rows are.

    After it, :mod:`normwise.nn` and :mod:`normwise.functional` take DTensors sharded over the batch or the sequence and
    give DTensors sharded alike, with no communication: each process normalizes the rows it has, with the bits of plain
    tensors. Weight and bias are replicated (`distribute_module` does that); their gradients come out ``Partial(sum)``
    over the sharded axes of the mesh, and DTensor adds them up when they are used. Calling it again changes nothing.

    What needs the values of other processes raises and is never gathered in silence:

    - ``x`` sharded over a normalized axis, or over the channels of group_norm: :func:`layer_norm` and :func:`rms_norm`
      of this package take the shards as plain tensors (``x.to_local()``).
    - an axis shorter than the number of processes it is sharded over: DTensor lets no operator keep such a shard.
    - Batch Norm, in training and eval: call :class:`normwise.nn.SyncBatchNorm` with ``x.to_local()``.

    A ``Partial`` x is added up first, as DTensor does for all that is not linear, and so is a ``Partial`` dy; a dy
    sharded otherwise than x is brought to x's placement. Patterns of :func:`normwise.functional.normalize` that are
    none of these norms, and transforms of `torch.func`, run on PyTorch's operators and follow DTensor's own rules.

    Raises:
        ImportError: If this build of PyTorch has no `torch.distributed.tensor`.

    Example:
        >>> import torch
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
        >>> register_dtensor()
        >>> x = distribute_tensor(torch.tensor([[2.0, 4.0, 6.0]]), init_device_mesh("cpu", (1,)), [Shard(0)])
        >>> import normwise as nw
        >>> nw.functional.layer_norm(x, (3,)).to_local()
        tensor([[-1.2247,  0.0000,  1.2247]])
        >>> dist.destroy_process_group()
    """
    from torch.distributed.tensor.experimental import register_sharding

    for name in ROW_WISE:
        op = getattr(OPS, name).default
        register_sharding(op)(partial(_shardings, op))
    for name in OVER_THE_BATCH:
        register_sharding(getattr(OPS, name).default)(_refuse_batch_norm)


def _shardings(op: OpOverload, *args: Any) -> list[tuple[list[Any], list[Any]]]:
    """For each way in which x lies on an axis of the mesh, the placements of outputs and inputs that go with it."""
    from torch.distributed.tensor import Partial, Replicate

    given = dict(zip([argument.name for argument in op._schema.arguments], args, strict=True))
    x = given["h"] if "h" in given else given["x"]
    axes = _row_axes(op, x, 1 if "num_groups" in given else len(x.shape) - len(given["normalized_shape"]))
    found = []
    for axis, placement in zip(axes, x.placements, strict=True):
        rows = Replicate() if axis is None else placement
        sums = Replicate() if axis is None else Partial()
        outputs = [sums if output.name in ("dweight", "dbias") else rows for output in op._schema.returns]
        inputs = [
            (Replicate() if name in ("weight", "bias") else rows) if hasattr(value, "placements") else None
            for name, value in given.items()
        ]
        if (outputs, inputs) not in found:
            found.append((outputs, inputs))
    return found


def _row_axes(op: OpOverload, x: Any, rows: int) -> list[int | None]:
    """For each axis of the mesh the axis of ``x`` that is sharded over it, one of the first ``rows``, or None."""
    name = op._schema.name.removeprefix("normwise::").removesuffix("_forward").removesuffix("_backward")
    axes = [getattr(placement, "dim", None) for placement in x.placements]
    for axis in axes:
        if axis is None:
            continue
        shards = math.prod(x.mesh.size(i) for i, other in enumerate(axes) if other == axis)
        if axis >= rows:
            raise NotImplementedError(
                f"{name}: values that share statistics must be on one process; x {tuple(x.shape)} is sharded over axis "
                f"{axis}; redistribute it, or give x.to_local() to normwise.distributed.layer_norm or rms_norm."
            )
        if x.shape[axis] < shards:
            raise NotImplementedError(
                f"{name}: a sharded axis must be as long as there are shards; x {tuple(x.shape)} is sharded over axis "
                f"{axis} on {shards} processes; normalize x.to_local()."
            )
    return axes


def _refuse_batch_norm(x: Any, *args: Any) -> list[Any]:
    raise NotImplementedError(
        f"batch_norm: examples of other processes must take part; x {tuple(x.shape)} is a DTensor; "
        "call normwise.nn.SyncBatchNorm with x.to_local()."
    )
