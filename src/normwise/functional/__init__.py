"""The public functions: check the arguments, then choose the reference or an operator.

Signatures, defaults and results are those of `torch.nn.functional`; `mask`, `reproducible`, :func:`normalize` and the
fused functions are additions. Under a functorch transform or forward-mode differentiation the reference runs; where a
gradient is needed, an autograd function around the operators; else an operator alone.

A file is named after its family, with an underscore because the plain name is the function's.
"""

from ._batch_norm import batch_norm, batch_norm_relu
from ._group_norm import group_norm, instance_norm
from ._layer_norm import fused_add_layer_norm, fused_add_rms_norm, layer_norm, rms_norm
from ._normalize import normalize
from ._sync_batch_norm import sync_batch_norm

__all__ = [
    "batch_norm",
    "batch_norm_relu",
    "fused_add_layer_norm",
    "fused_add_rms_norm",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "normalize",
    "rms_norm",
    "sync_batch_norm",
]
