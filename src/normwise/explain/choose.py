"""Which norms to compute: from names, from a pattern, from a layer; and how the axes of the batch are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..definitions import DEFINITIONS, LAYOUTS, Pattern
from ..nn import LayerNorm2d
from . import labels
from .trace import Norm, Running, frozen

DEFAULT = ("batch_norm", "layer_norm")

KINDS: dict[type[nn.Module], str] = {
    nn.modules.instancenorm._InstanceNorm: "instance_norm",
    nn.modules.batchnorm._BatchNorm: "batch_norm",
    nn.LayerNorm: "layer_norm",
    nn.RMSNorm: "rms_norm",
    nn.GroupNorm: "group_norm",
}

DIMENSIONS: dict[tuple[type[nn.Module], ...], tuple[int, ...]] = {
    (nn.BatchNorm1d,): (2, 3),
    (nn.InstanceNorm1d,): (3,),
    (nn.BatchNorm2d, nn.InstanceNorm2d, LayerNorm2d): (4,),
    (nn.BatchNorm3d, nn.InstanceNorm3d): (5,),
}


def axes(x: Tensor, layout: str | None, pattern: str | None, layer: nn.Module | None) -> tuple[str, Pattern | None]:
    """The letter of each axis: as given, as the pattern or the layer has them, or the default; and the pattern itself.

    Raises:
        ValueError: If there are too few or too many axes, or layout and pattern do not fit them or one another.
    """
    known = LAYOUTS.get(x.dim(), ())
    if not known:
        raise ValueError(f"compare: the batch must have 2 to 5 axes; got shape {tuple(x.shape)}; reshape it.")
    if layout is not None and layout not in known:
        raise ValueError(
            f"layout: it must fit the {x.dim()} axes of {tuple(x.shape)}; got {layout!r}; use {' or '.join(known)}."
        )
    if pattern is None:
        return layout or _of_layer(known, layer), None
    written = Pattern.parse(pattern)
    own = written.expand(x.dim())
    fitting = [name for name in ([layout] if layout else known) if _agree(own, name)]
    if layout and not fitting:
        raise ValueError(f"layout: it must agree with the pattern; {layout!r} does not with {pattern!r}; drop one.")
    found = fitting[0] if fitting else known[0]
    free = [name for name in own.names if name not in written.names]
    names = {name: found[own.left.index((name,))] for name in free} if fitting else {}
    left = tuple(tuple(names.get(name, name) for name in item) for item in own.left)
    return found, Pattern(left, tuple(names.get(name, name) for name in own.right))


def _agree(pattern: Pattern, layout: str) -> bool:
    """True if every letter that both have stands for the same axis in both."""
    return all(name not in layout or name == letter for item, letter in zip(pattern.left, layout, strict=True)
               for name in item)  # fmt: skip


def _of_layer(known: Sequence[str], layer: nn.Module | None) -> str:
    """The layout that a layer expects, or the default."""
    if layer is None:
        return known[0]
    if isinstance(layer, nn.LayerNorm | nn.RMSNorm) and not isinstance(layer, LayerNorm2d):
        return next(name for name in known if name.endswith("c")) if len(layer.normalized_shape) == 1 else known[0]
    return next(name for name in known if name[1] == "c")


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
        TypeError: If ``names`` holds no names.
        ValueError: If a name is unknown, or parameters or groups do not fit the channels.
    """
    names = _names(names, own)
    channels = x.shape[layout.index("c")]
    scale, offset = _parameter("weight", weight, channels), _parameter("bias", bias, channels)
    if groups is not None and "group_norm" not in names and not (own and any(len(item) > 1 for item in own.left)):
        raise ValueError(
            f"groups: it is for group_norm, or for a pattern with a split axis such as (g c); got {groups} without "
            "either; add group_norm to the norms."
        )
    found = []
    for name in names:
        d = DEFINITIONS[name]
        given = {"g": _groups(groups, channels)} if name == "group_norm" else {}
        offered = offset if name != "rms_norm" else None
        norm = Norm(
            name, d.title, d.at(layout), d.affine, d.centred, eps, MappingProxyType(given), scale, offered
        )  # fmt: skip
        found.append(norm)
    if own is not None:
        channel = own.left[layout.index("c")]
        affine = channel[0] if len(channel) == 1 else f"({' '.join(channel)})"
        given = parts(own, x, groups)
        own.sizes(x.shape, given)
        found.append(Norm("pattern", "Your pattern", own, affine, True, eps, MappingProxyType(given), scale, offset))
    return found


def _names(names: Sequence[str] | str, own: Pattern | None) -> tuple[str, ...]:
    if own is not None and names is DEFAULT:  # nobody asked for these two: Batch Norm alone goes beside a pattern
        return ("batch_norm",)
    if isinstance(names, str):
        names = tuple(DEFINITIONS) if names.strip() == "all" else tuple(name.strip() for name in names.split(","))
    if not isinstance(names, Sequence):
        raise TypeError(f"norms: it must be names of norms; got {type(names).__name__}; write for example 'all'.")
    for name in names:
        if name not in DEFINITIONS:
            raise ValueError(
                f"norms: each must be one of {', '.join(DEFINITIONS)}, or all; got {name!r}; choose among these."
            )
    return tuple(dict.fromkeys(names))


def parts(own: Pattern, x: Tensor, groups: int | None) -> dict[str, int]:
    """The length of the first part of the axis that a pattern splits."""
    if len(own.left[0]) > 1:
        raise ValueError(f"pattern: the batch must stay whole; {own} splits it; split another axis.")
    split = [(item, length) for item, length in zip(own.left, x.shape, strict=True) if len(item) > 1]
    if len(split) > 1 or any(len(item) > 2 for item, _ in split):
        raise ValueError(f"pattern: one axis may be split, in two; got {own}; split fewer, groups is the first part.")
    return {item[0]: _groups(groups, length) for item, length in split}


def kind(layer: nn.Module) -> str:
    """The name of the norm that a layer computes.

    Raises:
        TypeError: If it computes none.
    """
    for base, name in KINDS.items():
        if isinstance(layer, base):
            return name
    raise TypeError(
        f"compare: layer must be a norm of torch.nn or normwise.nn; got {type(layer).__name__}; pass the norm itself."
    )


def of_layer(layer: Any, x: Tensor, layout: str) -> list[Norm]:
    """A layer as it stands, with its parameters; one that keeps running statistics in training and in eval.

    Raises:
        ValueError: If the batch does not fit the layer, or the layer holds no numbers yet.
    """
    name, title = kind(layer), type(layer).__name__
    _check_layer(layer, title, x, layout)
    definition = DEFINITIONS[name]
    pattern, affine = definition.at(layout), definition.affine
    if isinstance(layer, nn.LayerNorm | nn.RMSNorm) and not isinstance(layer, LayerNorm2d):
        kept = len(layout) - len(layer.normalized_shape)
        pattern, affine = Pattern(tuple((a,) for a in layout), tuple(layout[:kept])), " ".join(layout[kept:])
    given = {"g": layer.num_groups} if isinstance(layer, nn.GroupNorm) else {}
    eps = layer.eps if layer.eps is not None else torch.finfo(x.dtype if x.dtype.itemsize > 2 else torch.float32).eps
    weight, bias = (None if p is None else frozen(p) for p in (layer.weight, getattr(layer, "bias", None)))
    norm = Norm(name, title, pattern, affine, definition.centred, float(eps), MappingProxyType(given), weight, bias)
    norm = replace(norm, fresh=False)
    if getattr(layer, "running_mean", None) is None:
        return [norm]
    running = Running(frozen(layer.running_mean), frozen(layer.running_var), layer.momentum, None)
    return [
        replace(norm, title=f"{title} ({mode})", running=running, training=mode == "train")
        for mode in ("train", "eval")
    ]


def _check_layer(layer: Any, title: str, x: Tensor, layout: str) -> None:
    held = [*layer.parameters(), *layer.buffers()]
    if any(nn.parameter.is_lazy(p) or p.is_meta for p in held):
        raise ValueError(
            f"{title}: its parameters must hold numbers; they do not yet; initialize it with a batch first."
        )
    for types, dimensions in DIMENSIONS.items():
        if isinstance(layer, types) and x.dim() not in dimensions:
            allowed = " or ".join(map(str, dimensions))
            raise ValueError(
                f"{title}: x must have {allowed} axes; got shape {tuple(x.shape)}; pass the layer's input."
            )
    if isinstance(layer, nn.LayerNorm | nn.RMSNorm) and not isinstance(layer, LayerNorm2d):
        if len(layer.normalized_shape) >= x.dim():
            raise ValueError(
                f"{title}: x must have a batch axis before {tuple(layer.normalized_shape)}; got {tuple(x.shape)}; "
                "add one with unsqueeze(0)."
            )
        checks.check_normalized_shape(title, x, layer.normalized_shape)
        return
    channels, came = _channels(layer), x.shape[layout.index("c")]
    if channels != came:
        raise ValueError(
            f"{title}: it has {channels} channels; x {tuple(x.shape)} has {came}; pass the input of this layer."
        )


def layer_note(layer: Any) -> str:
    """The parameters and the state of a layer, in a few words."""
    parts = []
    for name in ("weight", "bias"):
        values = getattr(layer, name, None)
        if values is not None:
            low, high = (labels.short(float(v)) for v in values.detach().aminmax())
            parts.append(f"{name} {low}" if low == high else f"{name} {low} to {high}")
    if getattr(layer, "num_batches_tracked", None) is not None:
        tracked = int(layer.num_batches_tracked)
        average = "a plain average" if layer.momentum is None else f"momentum {layer.momentum}"
        parts.append(f"{tracked} batch{'' if tracked == 1 else 'es'} tracked, {average}")
    return f"{type(layer).__name__}: {'; '.join(parts) or 'no parameters'}"


def _channels(layer: Any) -> int:
    if isinstance(layer, LayerNorm2d):
        return int(layer.normalized_shape[0])
    return int(layer.num_channels if isinstance(layer, nn.GroupNorm) else layer.num_features)


def _groups(groups: int | None, channels: int) -> int:
    if groups is None:
        return max((g for g in range(1, 33) if channels % g == 0 and channels // g >= 2), default=1)
    if groups <= 0 or channels % groups:
        raise ValueError(f"groups: it must divide the {channels} that it splits; got {groups}; choose a divisor.")
    return groups


def _parameter(name: str, values: Any, channels: int) -> Any:
    if values is None:
        return None
    try:
        parameter = torch.as_tensor(values, dtype=torch.float64).detach()
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name}: it must hold numbers; got {values!r}; write for example 1,2,0.5.") from None
    if parameter.shape != (channels,):
        raise ValueError(
            f"{name}: it must have a value for each of {channels} channels; got shape {tuple(parameter.shape)}; "
            f"give {channels} numbers."
        )
    if not parameter.isfinite().all():
        raise ValueError(f"{name}: every value must be finite; got {parameter.tolist()}; correct it.")
    return frozen(parameter)
