"""Digits classifiers trained side by side: many seeds, folds and learning rates in one set of tensors.

Replicate r owns the channels r C to (r + 1) C of every activation (N, R C, ...), so the library's own layers normalize
all replicates at once: Batch Norm over the channels as they are, Layer Norm with statistics for each replicate.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from .. import functional
from ..nn import BatchNorm1d, BatchNorm2d, GroupNorm
from .data import FOLDS as FOLDS
from .data import Data, Split
from .data import digits as digits

NORMS = ("none", "layer_norm", "batch_norm")
GRID = tuple(10 ** (k / 2) for k in range(-6, 3))
"""Learning rates: half decades from 0.001 to 10."""


class Linear(nn.Module):
    """(N, R I) -> (N, R O), each replicate with its own weight, (R, O, I)."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(weight.shape[:2]))

    def forward(self, x: Tensor) -> Tensor:
        """(N, R I) -> (N, R O)."""
        replicates, _, inputs = self.weight.shape
        rows = x.reshape(len(x), replicates, inputs).transpose(0, 1)
        return torch.baddbmm(self.bias[:, None], rows, self.weight.mT).transpose(0, 1).flatten(1)


class Conv(nn.Module):
    """3 x 3, (N, R I, H, W) -> (N, R O, H, W), each replicate with its own weight, (R, O, I, 3, 3)."""

    def __init__(self, weight: Tensor, stride: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """(N, R I, H, W) -> (N, R O, H, W), or less high and wide by the stride."""
        return F.conv2d(x, self.weight.flatten(0, 1), stride=self.stride, padding=1, groups=len(self.weight))


class GhostBatchNorm(BatchNorm1d):
    """Batch Norm whose statistics are of groups of the batch; the running ones move by the groups' mean."""

    group: int

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """(N, C) -> (N, C); N is a multiple of the group, or there is one smaller group."""
        if not self.training or len(input) <= self.group:
            return super().forward(input, mask)
        groups = input.unflatten(0, (-1, self.group))
        with torch.no_grad():
            var, mean = torch.var_mean(groups, dim=1)
            for running, now in ((self.running_mean, mean), (self.running_var, var)):
                running.lerp_(now.mean(0), self.momentum)  # type: ignore[union-attr, arg-type]
        xhat = functional.normalize(groups, "g n c -> g c", eps=self.eps).flatten(0, 1)
        return xhat * self.weight + self.bias


class LayerNorm(nn.Module):
    """Layer Norm of each replicate's features, with its own weight and bias, (R, C)."""

    def __init__(self, replicates: int, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(replicates, channels))
        self.bias = nn.Parameter(torch.zeros(replicates, channels))

    def forward(self, x: Tensor) -> Tensor:
        """(N, R C) -> (N, R C)."""
        xhat = functional.layer_norm(x.view(len(x), *self.weight.shape), self.weight.shape[1:])
        return torch.addcmul(self.bias, xhat, self.weight).flatten(1)


def norm_layer(norm: str, replicates: int, channels: int, spatial: bool, group: int | None = None) -> nn.Module:
    """The norm of so many replicates, over the features of an MLP or the channels of an image."""
    if norm == "batch_norm":
        if group is not None:
            layer = GhostBatchNorm(replicates * channels)
            layer.group = group
            return layer
        return (BatchNorm2d if spatial else BatchNorm1d)(replicates * channels)
    if norm == "layer_norm":
        return GroupNorm(replicates, replicates * channels) if spatial else LayerNorm(replicates, channels)
    return nn.Identity()


def mlp(norm: str, generators: Sequence[torch.Generator], data: Data, hidden: Sequence[int] = (128, 128),
        group: int | None = None, gain: float = 2.0) -> nn.Sequential:  # fmt: skip
    """Linear, norm, ReLU; the same initial weights for every norm, one generator for each replicate.

    Their variance is the gain, of He's initialization 2, by the number of inputs.
    """
    sizes, layers = (data.x.shape[1], *hidden), list[nn.Module]()
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [
            Linear(_normal(generators, (outputs, inputs), math.sqrt(gain / inputs))),
            norm_layer(norm, len(generators), outputs, spatial=False, group=group),
            nn.ReLU(),
        ]
    last = sizes[-1]
    return nn.Sequential(*layers, Linear(_normal(generators, (data.classes, last), math.sqrt(1 / last))))


class _Images(nn.Module):
    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        self.shape = channels, side, side

    def forward(self, x: Tensor) -> Tensor:
        return x.view(len(x), -1, *self.shape[1:])


def cnn(norm: str, generators: Sequence[torch.Generator], data: Data, channels: Sequence[int] = (8, 16)) -> nn.Module:
    """3 x 3 convolution, norm, ReLU, each after the first with stride 2; then a linear layer. He's weights."""
    side, before, layers = data.side, data.channels, list[nn.Module]()
    layers.append(_Images(before, side))
    for i, after in enumerate(channels):
        stride = 2 if i else 1
        layers += [
            Conv(_normal(generators, (after, before, 3, 3), math.sqrt(2 / (9 * before))), stride),
            norm_layer(norm, len(generators), after, spatial=True),
            nn.ReLU(),
        ]
        before, side = after, math.ceil(side / stride)
    features = before * side * side
    head = Linear(_normal(generators, (data.classes, features), math.sqrt(1 / features)))
    return nn.Sequential(*layers, nn.Flatten(), head)


def _normal(generators: Sequence[torch.Generator], shape: Sequence[int], std: float) -> Tensor:
    return torch.stack([torch.randn(shape, generator=g) * std for g in generators])


@dataclass(frozen=True)
class Setting:
    """How a set of replicates is trained: one replicate for each of `runs`, (seed, fold, learning rate)."""

    model: Callable[[Sequence[torch.Generator]], nn.Module]
    runs: Sequence[tuple[int, int, float]]
    batch: int
    updates: int
    momentum: float = 0.9
    cosine: bool = True


def train(
    setting: Setting,
    data: Data,
    watch: Callable[[int, nn.Module], None] = lambda updates, model: None,
    group: dist.ProcessGroup | None = None,
) -> tuple[nn.Module, list[Split]]:
    """SGD, no weight decay, the rate constant or falling to zero along a cosine.

    Args:
        setting: What is trained, and how.
        data: The examples.
        watch: Told of the model after each update, and of how many there were.
        group: Processes, each of which takes its part of every batch; their gradients are added up.

    Returns:
        The model, of the type of the examples, in evaluation mode, and each replicate's split. Weights and order depend
        on seed and fold alone.
    """
    splits = [Split.of(len(data.x), seed, fold) for seed, fold, _ in setting.runs]
    generators = [torch.Generator().manual_seed(1_000_003 * (seed + 1) + fold) for seed, fold, _ in setting.runs]
    model = setting.model(generators).train().to(data.x.dtype)
    rates = torch.tensor([rate for *_, rate in setting.runs], dtype=data.x.dtype) / setting.batch
    rank, processes = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    weights, velocity = _flat(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "batch_norm: running_var must fit")  # where a rate diverges
        for step, all_of in zip(range(setting.updates), _batches(splits, generators, setting.batch), strict=False):
            indices = all_of[rank::processes]
            logits = model(data.x[indices].flatten(1)).view(*indices.shape, -1)
            losses = F.cross_entropy(logits.flatten(0, 1), data.y[indices].flatten(), reduction="none").view_as(indices)
            velocity.mul_(setting.momentum)
            fall = (1 + math.cos(math.pi * step / setting.updates)) / 2 if setting.cosine else 1.0
            losses.backward((rates * fall).expand_as(losses))  # adds to the gradients, which are the velocity
            weights.sub_(velocity if group is None else _added_up(velocity, group))
            watch(step + 1, model)
    for p in model.parameters():
        p.grad = None
    return model.eval(), splits


def _added_up(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Over the processes: of the velocities it is that of their gradients' sum."""
    total = values.clone()
    dist.all_reduce(total, group=group)
    return total


def _flat(model: nn.Module) -> tuple[Tensor, Tensor]:
    """All parameters and all gradients, which the model's become views of: an update is one operation on each."""
    parameters = list(model.parameters())
    weights = torch.cat([p.detach().flatten() for p in parameters])
    gradients = torch.zeros_like(weights)
    sizes = [p.numel() for p in parameters]
    for p, weight, gradient in zip(parameters, weights.split(sizes), gradients.split(sizes), strict=True):
        p.data, p.grad = weight.view_as(p), gradient.view_as(p)
    return weights, gradients


def _batches(splits: list[Split], generators: Sequence[torch.Generator], batch: int) -> Any:
    """Indices (batch, R) without end: epochs of shuffled examples, each replicate's by its own generator."""
    size = len(splits[0].train)
    while True:
        order = torch.stack(
            [s.train[torch.randperm(size, generator=g)] for s, g in zip(splits, generators, strict=True)]
        )
        for start in range(0, size - batch + 1, batch):
            yield order[:, start : start + batch].T


@torch.no_grad()
def accuracy(model: nn.Module, data: Data, parts: Sequence[Tensor], batch: int = 512) -> list[float]:
    """Percent of each replicate's part that it gets right; the last batch is filled with the part's first examples."""
    count = math.ceil(max(map(len, parts)) / batch) * batch
    indices = torch.stack([part.repeat(math.ceil(count / len(part)))[:count] for part in parts], dim=1)
    right = torch.cat(
        [model(data.x[i].flatten(1)).view(*i.shape, -1).argmax(-1) == data.y[i] for i in indices.split(batch)]
    )
    return [100 * right[: len(part), r].double().mean().item() for r, part in enumerate(parts)]


def tuned(
    validate: Callable[[Sequence[float]], Sequence[float]], grid: Sequence[float] = GRID, most: int = 4
) -> dict[str, Any]:
    """The learning rate that validates best, with the grid reached out until the best lies inside.

    Args:
        validate: From rates to their mean validation accuracy, one call for all of them.
        grid: To begin with, ascending, in equal ratios.
        most: How many rates are added at most.

    Returns:
        ``rates``, ``accuracies``, ``best``, and ``inside``, whether the best has neighbours on both sides.
    """
    rates, ratio = list(grid), grid[1] / grid[0]
    found = list(validate(rates))
    for _ in range(most):
        best = max(range(len(rates)), key=lambda i: (found[i], -rates[i]))
        if best == 0:
            rates.insert(0, rates[0] / ratio)
            found.insert(0, validate(rates[:1])[0])
        elif best == len(rates) - 1:
            rates.append(rates[-1] * ratio)
            found.append(validate(rates[-1:])[0])
        else:
            break
    best = max(range(len(rates)), key=lambda i: (found[i], -rates[i]))
    return {"rates": rates, "accuracies": found, "best": rates[best], "inside": 0 < best < len(rates) - 1}
