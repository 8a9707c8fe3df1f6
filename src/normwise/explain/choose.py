"""Which norms to compute: from names, from a pattern, from a layer; and how the axes of the batch are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..definitions import DEFINITIONS, LAYOUTS, Pattern
from ..nn import LayerNorm2d
from . import labels
from .trace import Norm, Running, frozen, running_after


def layout(x: Tensor, given: str | None, own: Pattern | None, layer: nn.Module | None) -> str:
    """The letter of each axis: as given, as the pattern names them, as the layer expects them, or the default.

    Raises:
        ValueError: If the layout does not fit the axes, or there are too few or too many.
    """
    known = LAYOUTS.get(x.dim(), ())
    if not known:
        raise ValueError(f"compare: the batch must have 2 to 5 axes; got shape {tuple(x.shape)}; reshape it.")
    if given is not None:
        if given not in known:
            raise ValueError(
                f"layout: it must fit the {x.dim()} axes of {tuple(x.shape)}; got {given!r}; use {' or '.join(known)}."
            )
        return given
    if own is not None:
        letters = "".join(item[-1] for item in own.left)
        return letters if letters in known else known[0]
    if isinstance(layer, nn.LayerNorm | nn.RMSNorm) and not isinstance(layer, LayerNorm2d):
        return next(name for name in known if name.endswith("c")) if len(layer.normalized_shape) == 1 else known[0]
    if layer is not None:
        return next(name for name in known if name[1] == "c")
    return known[0]


def named(
    names: Sequence[str] | str,
    x: Tensor,
    layout: str,
    groups: int | None,
    eps: float,
    weight: Any,
    bias: Any,
    own: Pattern | None,
) -> list[Norm]:
    """The norms of these names, and the one that ``own`` describes.

    Raises:
        ValueError: If a name is unknown, or parameters or groups do not fit the channels.
    """
    if isinstance(names, str):
        names = tuple(DEFINITIONS) if names == "all" else tuple(name.strip() for name in names.split(","))
    if own is not None and tuple(names) == ("batch_norm", "layer_norm"):
        names = ("batch_norm",)
    channels = x.shape[layout.index("c")]
    scale, offset = _parameter("weight", weight, channels), _parameter("bias", bias, channels)
    found = []
    for name in dict.fromkeys(names):
        if name not in DEFINITIONS:
            raise ValueError(
                f"norms: each must be one of {', '.join(DEFINITIONS)}, all; got {name!r}; choose of these."
            )
        d = DEFINITIONS[name]
        given = {"g": _groups(groups, channels)} if name == "group_norm" else {}
        found.append(Norm(name, d.title, d.at(layout), d.affine, d.centred, eps, given, scale, offset))
    if own is not None:
        channel = own.left[layout.index("c")]
        given = {channel[0]: _groups(groups, channels)} if len(channel) == 2 else {}
        own.sizes(x.shape, given)
        affine = channel[0] if len(channel) == 1 else f"({' '.join(channel)})"
        found.append(Norm("pattern", "Your pattern", own, affine, True, eps, given, scale, offset))
    return [replace(norm, bias=None) if norm.name == "rms_norm" else norm for norm in found]


def kind(layer: nn.Module) -> str:
    """The name of the norm that a layer computes.

    Raises:
        TypeError: If it computes none.
    """
    kinds = {
        nn.modules.instancenorm._InstanceNorm: "instance_norm",
        nn.modules.batchnorm._BatchNorm: "batch_norm",
        nn.LayerNorm: "layer_norm",
        nn.RMSNorm: "rms_norm",
        nn.GroupNorm: "group_norm",
    }
    for base, name in kinds.items():
        if isinstance(layer, base):
            return name
    raise TypeError(
        f"compare: layer must be a norm of torch.nn or normwise.nn; got {type(layer).__name__}; pass the norm itself."
    )


def of_layer(layer: Any, x: Tensor, layout: str) -> list[Norm]:
    """A layer as it stands, with its parameters; one that keeps running statistics in training and in eval.

    Raises:
        ValueError: If the batch does not fit the layer.
    """
    name, title = kind(layer), type(layer).__name__
    definition = DEFINITIONS[name]
    pattern, affine, given = definition.at(layout), definition.affine, {}
    weight, bias = (None if p is None else p.detach() for p in (layer.weight, getattr(layer, "bias", None)))
    if isinstance(layer, nn.LayerNorm | nn.RMSNorm) and not isinstance(layer, LayerNorm2d):
        checks.check_normalized_shape(title, x, layer.normalized_shape)
        kept = len(layout) - len(layer.normalized_shape)
        pattern, affine = Pattern(tuple((a,) for a in layout), tuple(layout[:kept])), " ".join(layout[kept:])
    else:
        channels = layer.normalized_shape[0] if isinstance(layer, LayerNorm2d) else _channels(layer)
        came = x.shape[layout.index("c")]
        if channels != came:
            raise ValueError(
                f"{title}: it has {channels} channels; x {tuple(x.shape)} has {came}; pass the input of this layer."
            )
        given = {"g": layer.num_groups} if isinstance(layer, nn.GroupNorm) else {}
    eps = layer.eps if layer.eps is not None else torch.finfo(x.dtype if x.dtype.itemsize > 2 else torch.float32).eps
    norm = Norm(name, title, pattern, affine, definition.centred, float(eps), given, weight, bias)
    if getattr(layer, "running_mean", None) is None:
        return [norm]
    running = Running(frozen(layer.running_mean), frozen(layer.running_var), layer.momentum, None)
    return [
        replace(norm, title=f"{title} ({mode})", running=running, training=mode == "train") for mode in ("train", "eval")
    ]


def layer_note(layer: Any) -> str:
    """The parameters and the state of a layer, in a few words."""
    parts = []
    for name in ("weight", "bias"):
        values = getattr(layer, name, None)
        if values is not None:
            low, high = (labels.short(float(v)) for v in values.detach().aminmax())
            parts.append(f"{name} {low}" if low == high else f"{name} {low} to {high}")
    if getattr(layer, "num_batches_tracked", None) is not None:
        parts.append(f"{int(layer.num_batches_tracked)} batches tracked, momentum {layer.momentum}")
    return f"{type(layer).__name__}: {'; '.join(parts) or 'no parameters'}"


def with_mode(norm: Norm, x: Tensor, mode: str, steps: int, momentum: float) -> Norm:
    """Give a norm that averages the batch away the running statistics of a fresh layer, and the mode."""
    if norm.running is None and norm.pattern.averages_batch:
        return replace(norm, running=running_after(x, norm, steps, momentum), training=mode == "train")
    return norm


def _channels(layer: Any) -> int:
    return int(layer.num_channels if isinstance(layer, nn.GroupNorm) else layer.num_features)


def _groups(groups: int | None, channels: int) -> int:
    if groups is None:
        return max((g for g in range(1, 33) if channels % g == 0 and channels // g >= 2), default=1)
    if groups <= 0 or channels % groups:
        raise ValueError(f"groups: it must divide the {channels} channels; got {groups}; choose a divisor.")
    return groups


def _parameter(name: str, values: Any, channels: int) -> Tensor | None:
    if values is None:
        return None
    try:
        parameter = torch.as_tensor(values, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name}: it must hold numbers; got {values!r}; write for example 1,2,0.5.") from None
    if parameter.shape != (channels,):
        raise ValueError(
            f"{name}: it must have a value for each of {channels} channels; got shape {tuple(parameter.shape)}; "
            f"give {channels} numbers."
        )
    return parameter
