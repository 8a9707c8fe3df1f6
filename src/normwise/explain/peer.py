"""The torch layer that computes the same as a norm, run on the same batch: how far apart are they?"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .trace import Norm, Trace


@dataclass(frozen=True)
class Peer:
    """A torch layer and its largest absolute difference from the norm's output; infinite where it alone gives nan.

    Attributes:
        norm: The title of the norm.
        layer: What to write in torch.
        difference: The largest absolute difference.
        close: True if it is a few roundings of the largest output.
    """

    norm: str
    layer: str
    difference: float
    close: bool


def torch_peers(x: Tensor, layout: str, traces: tuple[Trace, ...]) -> tuple[Peer, ...]:
    """Run the twin of every trace that has one, and that torch does not refuse (it does at eps 0)."""
    peers = []
    for t in traces:
        if t.refused or t.norm.name == "pattern":
            continue
        try:
            layer, y = _twin(x, layout, t.norm)
        except (RuntimeError, ValueError):
            continue
        ours = torch.tensor(t.y)
        apart = y.double().sub(ours).abs_()
        difference, largest = apart.max().item(), max(float(t.y.max()), -float(t.y.min()))
        if not math.isfinite(difference):
            apart[(y == ours) | (y.isnan() & ours.isnan())] = 0
            difference, largest = apart.nan_to_num(math.inf).max().item(), ours.abs().nan_to_num(0).max().item()
        peers.append(Peer(t.norm.title, layer, difference, difference <= 8 * torch.finfo(x.dtype).eps * largest))
    return tuple(peers)


def _twin(x: Tensor, layout: str, norm: Norm) -> tuple[str, Tensor]:
    weight, bias = (None if p is None else torch.tensor(p).to(x.dtype) for p in (norm.weight, norm.bias))
    if norm.name in ("layer_norm", "rms_norm"):
        return _over_last_axes(x, layout, norm, weight, bias)
    channel = layout.index("c")
    moved, channels = x.movedim(channel, 1), x.shape[channel]
    order = [0, channel, *(i for i in range(1, x.dim()) if i != channel)]
    where = "" if channel == 1 else f" on x.permute{tuple(order)}"
    dims = max(x.dim() - 2, 1)
    if norm.name == "group_norm":
        groups = norm.given["g"]
        y = F.group_norm(moved, groups, weight, bias, norm.eps)
        return f"nn.GroupNorm({groups}, {channels}){where}", y.movedim(1, channel)
    training, mean, var = not norm.uses_running, None, None
    if norm.running is not None and not training:
        mean, var = (torch.tensor(a).to(x.dtype) for a in (norm.running.mean, norm.running.var))
    mode = "" if training else ".eval()"
    if norm.name == "instance_norm":
        y = F.instance_norm(moved, mean, var, weight, bias, training, 0.0, norm.eps)
        return f"nn.InstanceNorm{dims}d({channels}){mode}{where}", y.movedim(1, channel)
    y = F.batch_norm(moved, mean, var, weight, bias, training, 0.0, norm.eps)
    return f"nn.BatchNorm{dims}d({channels}){mode}{where}", y.movedim(1, channel)


def _over_last_axes(
    x: Tensor, layout: str, norm: Norm, weight: Tensor | None, bias: Tensor | None
) -> tuple[str, Tensor]:
    averaged = [layout.index(a) for a in norm.pattern.averaged]
    order = [i for i in range(x.dim()) if i not in averaged] + averaged
    shape = [x.shape[i] for i in averaged]
    where = "" if order == sorted(order) else f" on x.permute{tuple(order)}"
    size = shape[0] if len(shape) == 1 else tuple(shape)
    moved, inverse = x.permute(order), [order.index(i) for i in range(x.dim())]
    if norm.name == "rms_norm":
        return f"nn.RMSNorm({size}){where}", F.rms_norm(moved, shape, weight, norm.eps).permute(inverse)
    return f"nn.LayerNorm({size}){where}", F.layer_norm(moved, shape, weight, bias, norm.eps).permute(inverse)
