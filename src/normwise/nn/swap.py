"""Put normwise's layers into a model and take them out again.

Each layer subclasses its torch twin and adds no state, so a swap changes the class of the module and nothing else:
parameters, buffers, modes, hooks, and every reference to the module stay as they are.
"""

from __future__ import annotations

import warnings

import torch
from torch import nn

from .. import checks
from .batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from .group_norm import GroupNorm, InstanceNorm1d, InstanceNorm2d, InstanceNorm3d
from .layer_norm import LayerNorm, LayerNorm2d, RMSNorm
from .refusal import in_lines, why_not

TWINS: dict[type[nn.Module], type[nn.Module]] = {
    nn.LayerNorm: LayerNorm,
    nn.RMSNorm: RMSNorm,
    nn.GroupNorm: GroupNorm,
    nn.InstanceNorm1d: InstanceNorm1d,
    nn.InstanceNorm2d: InstanceNorm2d,
    nn.InstanceNorm3d: InstanceNorm3d,
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
}
"""The torch layers that can be replaced, with what replaces them."""


def replace(model: nn.Module) -> nn.Module:
    """Turn the torch norms of a model into normwise's, in place.

    `torch.nn.TransformerEncoderLayer` has a fused inference path that reads the norms' parameters and never calls them;
    it is switched off in the layers whose norms are replaced.

    Args:
        model: Any module; it may be a norm itself.

    Returns:
        The model. Norms that could not be replaced are listed in a warning, and by :func:`skipped`.

    Raises:
        TypeError: If ``model`` is no module.

    Example:
        >>> replace(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)))[1].__class__.__module__
        'normwise.nn.layer_norm'
    """
    return _swap("replace", model, TWINS)


def restore(model: nn.Module) -> nn.Module:
    """Turn normwise's norms back into torch's, in place: the inverse of :func:`replace`.

    `LayerNorm2d` has no twin in torch and stays.

    Args:
        model: Any module; it may be a norm itself.

    Returns:
        The model.

    Raises:
        TypeError: If ``model`` is no module.
    """
    return _swap("restore", model, {ours: theirs for theirs, ours in TWINS.items()})


def skipped(model: nn.Module) -> dict[str, str]:
    """The norms of a model that :func:`replace` leaves alone.

    Returns:
        For each its name in the model, ``""`` for the model itself, and why.
    """
    norms: tuple[type[nn.Module], ...] = (*TWINS, nn.SyncBatchNorm, nn.modules.batchnorm._LazyNormBase)
    ours = (*TWINS.values(), LayerNorm2d)
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, norms) and type(module) not in ours and (why := _why_not(module)):
            found[name] = why
    return found


def _why_not(module: nn.Module) -> str:
    if isinstance(module, nn.SyncBatchNorm):
        return "normwise.nn.SyncBatchNorm.convert takes it"
    return why_not(module, TWINS)


def _swap(verb: str, model: nn.Module, classes: dict[type[nn.Module], type[nn.Module]]) -> nn.Module:
    checks.check_module(verb, model)
    swapped = [m for m in model.modules() if type(m) in classes and "forward" not in vars(m)]
    for norm in swapped:
        norm.__class__ = classes[type(norm)]
    for layer in model.modules():
        if isinstance(layer, nn.TransformerEncoderLayer):
            _set_fast_path(layer, swapped)
    left = skipped(model) if verb == "replace" else {}
    if left:
        warnings.warn(f"replace: {len(left)} norms were left as they are:\n{in_lines(left)}", stacklevel=3)
    return model


def _set_fast_path(layer: nn.TransformerEncoderLayer, swapped: list[nn.Module]) -> None:
    """Forbid the fused inference path where it would bypass our norms; allow it again where torch's are put back."""
    norms, activation = (layer.norm1, layer.norm2), layer.activation
    if any(type(norm) in TWINS.values() for norm in norms):
        layer.activation_relu_or_gelu = 0
    elif any(norm in swapped for norm in norms):
        relu = activation is torch.nn.functional.relu or isinstance(activation, nn.ReLU)
        gelu = activation is torch.nn.functional.gelu or isinstance(activation, nn.GELU)
        layer.activation_relu_or_gelu = 1 if relu else 2 if gelu else 0
