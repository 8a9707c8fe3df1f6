"""The torch layer that computes the same as a norm, run on the same batch: how far apart are they?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .trace import Norm, Trace


@dataclass(frozen=True)
class Peer:
    """A torch layer and its largest absolute difference from the norm's output."""

    norm: str
    layer: str
    difference: float


def torch_peers(x: Tensor, layout: str, traces: tuple[Trace, ...]) -> tuple[Peer, ...]:
    """Run the twin of every trace that has one."""
    peers = []
    for t in traces:
        if t.refused or t.norm.name == "pattern":
            continue
        layer, y = _twin(x, layout, t.norm)
        difference = (y.double() - torch.tensor(t.y)).abs().nan_to_num(0).max().item()
        peers.append(Peer(t.norm.title, layer, difference))
    return tuple(peers)


def _twin(x: Tensor, layout: str, norm: Norm) -> tuple[str, Tensor]:
    weight, bias = (None if p is None else p.detach().to(x.dtype) for p in (norm.weight, norm.bias))
    if norm.name in ("layer_norm", "rms_norm"):
        averaged = [layout.index(a) for a in norm.pattern.averaged]
        order = [i for i in range(x.dim()) if i not in averaged] + averaged
        moved = x.permute(order)
        shape = [x.shape[i] for i in averaged]
        where = "" if order == sorted(order) else f" on x.permute{tuple(order)}"
        size = shape[0] if len(shape) == 1 else tuple(shape)
        inverse = [order.index(i) for i in range(x.dim())]
        if norm.name == "rms_norm":
            return f"nn.RMSNorm({size}){where}", F.rms_norm(moved, shape, weight, norm.eps).permute(inverse)
        return f"nn.LayerNorm({size}){where}", F.layer_norm(moved, shape, weight, bias, norm.eps).permute(inverse)
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
    if norm.name == "instance_norm":
        y = F.instance_norm(moved, mean, var, weight, bias, training, 0.0, norm.eps)
        return f"nn.InstanceNorm{dims}d({channels}){where}", y.movedim(1, channel)
    y = F.batch_norm(moved, mean, var, weight, bias, training, 0.0, norm.eps)
    mode = "" if training else ".eval()"
    return f"nn.BatchNorm{dims}d({channels}){mode}{where}", y.movedim(1, channel)
