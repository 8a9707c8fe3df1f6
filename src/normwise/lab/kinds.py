"""Which norm a layer is, by what it does."""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

KINDS = ("batch_norm", "layer_norm", "rms_norm", "group_norm")


def norms_in(model: nn.Module, known: dict[type, str | None]) -> Counter[str]:
    """How many norms of each kind a model has; known are the kinds of classes met before."""
    found: Counter[str] = Counter()
    for layer in model.modules():
        leaf = next(layer.children(), None) is None or isinstance(layer, nn.GroupNorm | nn.LayerNorm | _BatchNorm)
        if leaf and "norm" in type(layer).__name__.lower():
            if type(layer) not in known:
                known[type(layer)] = kind_of(layer)
            if kind := known[type(layer)]:
                found[kind] += 1
    return found


@torch.no_grad()
def kind_of(layer: nn.Module) -> str | None:
    """What a layer does, on an input of its size; None if it does not normalize."""
    if isinstance(layer, _BatchNorm) or getattr(layer, "running_mean", None) is not None:
        return "batch_norm"
    if isinstance(layer, _InstanceNorm):
        return "group_norm"
    layer = copy.deepcopy(layer).to_empty(device="cpu").float().train()
    for tensor in (*layer.parameters(), *layer.buffers()):
        tensor.fill_(1)
    first = next(layer.parameters(), None)
    size = tuple(first.shape) if first is not None else tuple(getattr(layer, "normalized_shape", (64,)))
    positions = slice(1, None)
    for shape, other in (
        ((2, 5, *size), (0, positions)),
        ((2, *size[:1], 5, 5), (0, slice(None), positions)),
        ((2, *size[:1], 5), (0, slice(None), positions)),
    ):
        generator = torch.Generator().manual_seed(0)
        x, new = (100 * torch.randn(shape, generator=generator) for _ in range(2))
        gate = {"gate": torch.ones_like(x)} if "gate" in inspect.signature(layer.forward).parameters else {}
        with suppress(Exception):  # of any kind: not every layer takes this shape
            return _behaviour(partial(layer, **gate), x, new, other)
    return None


def _behaviour(layer: Callable[[Tensor], Tensor], x: Tensor, new: Tensor, other: tuple[Any, ...]) -> str | None:
    def differs(changed: Tensor, where: Any = ...) -> bool:
        return not torch.allclose(layer(changed)[where], y[where], rtol=1e-2, atol=1e-2)

    y = layer(x)
    elsewhere, first = x.clone(), (*other[:-1], 0)
    elsewhere[other] = new[other]
    beside = torch.cat([x[:1], new[1:]])
    if differs(4 * x) or not differs(new):
        return None
    if differs(beside, 0):
        return "batch_norm"
    if differs(elsewhere, first):
        return "group_norm"
    return "rms_norm" if differs(x + 100) else "layer_norm"
