"""The gradients of SyncBatchNorm's parameters over the examples of all processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from ..checks import check_module
from ..nn.batch_norm import labelled
from ..ops import sync_batch_norm


@contextmanager
def parameter_gradients(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Collect the gradients of the weights and biases of SyncBatchNorm, summed over all processes.

    ``weight.grad`` has the sum over this process's examples, which data-parallel training averages over the processes;
    that average rounds in an order of its own. These sums are exact before their one rounding: their bits do not depend
    on how the batch was split. Every process of the group must collect in the same backward.

    Args:
        model: A module with :class:`normwise.nn.SyncBatchNorm`, not compiled.

    Yields:
        A dict that is filled when the block ends: for each parameter its name in the model, and its gradient. A layer
        that was called more than once has the sum of its gradients.

    Raises:
        TypeError: If ``model`` is no module.

    Example:
        >>> import torch
        >>> with parameter_gradients(nn.Linear(1, 1)) as gradients:
        ...     pass
        >>> gradients
        {}
    """
    check_module("parameter_gradients", model)
    gradients: dict[str, Tensor] = {}
    before, sync_batch_norm.collected = sync_batch_norm.collected, {}
    try:
        yield gradients
        for name, layer in model.named_modules():
            known = labelled(layer)
            for of_all in sync_batch_norm.collected.get(known, []) if known else []:
                for key, gradient in zip(("weight", "bias"), of_all, strict=True):
                    if getattr(layer, key) is not None:
                        path = f"{name}.{key}" if name else key
                        gradients[path] = gradients[path] + gradient if path in gradients else gradient
    finally:
        sync_batch_norm.collected = before
