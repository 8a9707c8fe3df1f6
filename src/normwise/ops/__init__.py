"""The operators: schemas, shapes, the reference as their implementation for every device, and differentiation.

PyTorch's dispatcher is the registry. Each schema is declared here, once; the reference implements it for any device
below autograd, and a kernel for one device takes its place by being registered for that device. Statistics leave the
operators in float64: an absolute float32 mean alone would cost a relative error of 1e-4 in dx at mean/std 1e4.

A family has ``<name>`` (y alone, for when no gradient is needed), ``<name>_forward`` (y and what backward needs) and
``<name>_backward``, whose ``output_mask`` says which of (dx, dweight, dbias) to compute; the others come back empty.
Its autograd functions join forward and backward; asked for a double backward, they differentiate the reference.
"""

from ..kernels import load_cpu_kernels
from . import batch_norm_parts  # noqa: F401  declares its operators
from .batch_norm import BatchNormEval, BatchNormReLUEval, BatchNormReLUTraining, BatchNormTraining
from .exchange import Place
from .group_norm import GroupNorm
from .layer_norm import FusedAddLayerNorm, FusedAddRMSNorm, LayerNorm, RMSNorm
from .sharded_layer_norm import ShardedLayerNorm, normalize_shard
from .sync_batch_norm import SyncBatchNorm, normalize_over_processes

__all__ = [
    "BatchNormEval",
    "BatchNormReLUEval",
    "BatchNormReLUTraining",
    "BatchNormTraining",
    "FusedAddLayerNorm",
    "FusedAddRMSNorm",
    "GroupNorm",
    "LayerNorm",
    "Place",
    "RMSNorm",
    "ShardedLayerNorm",
    "SyncBatchNorm",
    "normalize_over_processes",
    "normalize_shard",
]

load_cpu_kernels()
