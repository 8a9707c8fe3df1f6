"""Digits classifiers trained side by side: many seeds, folds and learning rates in one set of tensors.

Replicate r owns the channels r C to (r + 1) C of every activation (N, R C, ...), so the library's own layers normalize
all replicates at once: Batch Norm over the channels as they are, Layer Norm with statistics for each replicate.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import functional
from ..nn import BatchNorm1d, BatchNorm2d, GroupNorm

FOLDS = 5
NORMS = ("none", "layer_norm", "batch_norm")
GRID = tuple(10 ** (k / 2) for k in range(-6, 3))
"""Learning rates: half decades from 0.001 to 10."""


@dataclass(frozen=True)
class Data:
    """Images of all classes; digits are (1797, 64) in 0..1."""

    x: Tensor
    y: Tensor

    @property
    def classes(self) -> int:
        """How many labels there are."""
        return int(self.y.max()) + 1


def digits() -> Data:
    """scikit-learn's 1,797 images of 8 x 8, which come with it."""
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    x, y = load_digits(return_X_y=True)
    return Data(torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y))


@dataclass(frozen=True)
class Split:
    """Indices of a replicate's examples; over the folds of a seed each example is tested once."""

    train: Tensor
    validation: Tensor
    test: Tensor

    @staticmethod
    def of(examples: int, seed: int, fold: int) -> Split:
        """A fifth to test, the next to validate, the rest, of the same size in all folds, to train."""
        order = torch.randperm(examples, generator=torch.Generator().manual_seed(seed))
        ends = [examples * k // FOLDS for k in range(FOLDS + 1)]
        parts = [order[a:b] for a, b in itertools.pairwise(ends)]
        test, validation, *rest = parts[fold:] + parts[:fold]
        return Split(torch.cat(rest)[: examples * (FOLDS - 2) // FOLDS - 1], validation, test)


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

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        """(N, R I, H, W) -> (N, R O, H, W)."""
        return F.conv2d(x, self.weight.flatten(0, 1), padding=1, groups=len(self.weight))


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
        xhat = functional.normalize(x.view(len(x), *self.weight.shape), "n r c -> n r")
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
        group: int | None = None) -> nn.Sequential:  # fmt: skip
    """Linear, norm, ReLU; the same initial weights for every norm: He's, one generator for each replicate."""
    sizes, layers = (data.x.shape[1], *hidden), list[nn.Module]()
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [
            Linear(_normal(generators, (outputs, inputs), math.sqrt(2 / inputs))),
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


def cnn(norm: str, generators: Sequence[torch.Generator], data: Data, channels: Sequence[int] = (16, 32)) -> nn.Module:
    """3 x 3 convolution, norm, ReLU, 2 x 2 maximum, twice; then a linear layer. Gray square images; He's weights."""
    side, before, layers = math.isqrt(data.x.shape[1]), 1, list[nn.Module]()
    layers.append(_Images(1, side))
    for after in channels:
        layers += [
            Conv(_normal(generators, (after, before, 3, 3), math.sqrt(2 / (9 * before)))),
            norm_layer(norm, len(generators), after, spatial=True),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
        before, side = after, side // 2
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


def train(setting: Setting, data: Data) -> tuple[nn.Module, list[Split]]:
    """SGD with momentum 0.9, no weight decay, the rate falling to zero along a cosine.

    Returns:
        The model in evaluation mode, and each replicate's split. Weights and order depend on seed and fold alone.
    """
    splits = [Split.of(len(data.x), seed, fold) for seed, fold, _ in setting.runs]
    generators = [torch.Generator().manual_seed(1_000_003 * (seed + 1) + fold) for seed, fold, _ in setting.runs]
    model = setting.model(generators).train()
    rates = torch.tensor([rate for *_, rate in setting.runs])[:, None]
    parameters = list(model.parameters())
    velocities = [torch.zeros_like(p) for p in parameters]
    for step, indices in zip(range(setting.updates), _batches(splits, generators, setting.batch), strict=False):
        logits = model(data.x[indices].flatten(1)).view(*indices.shape, -1)
        F.cross_entropy(logits.flatten(0, 1), data.y[indices].flatten(), reduction="sum").div(len(indices)).backward()
        rate = rates * (1 + math.cos(math.pi * step / setting.updates)) / 2
        with torch.no_grad():
            for p, v in zip(parameters, velocities, strict=True):
                assert p.grad is not None
                v.mul_(0.9).add_(p.grad)
                p.view(len(rates), -1).sub_(rate * v.view(len(rates), -1))
                p.grad = None
    return model.eval(), splits


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
def accuracy(model: nn.Module, data: Data, parts: Sequence[Tensor]) -> list[float]:
    """Percent of each replicate's part that it gets right."""
    logits = model(data.x.repeat(1, len(parts))).view(len(data.x), len(parts), -1)
    right = logits.argmax(-1) == data.y[:, None]
    return [100 * right[part, r].double().mean().item() for r, part in enumerate(parts)]


@torch.no_grad()
def accuracy_in_training_mode(model: nn.Module, data: Data, parts: Sequence[Tensor], batch: int) -> list[float]:
    """The same with the statistics of batches of the part; the last batch is filled with the part's first examples."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train()
    longest = max(map(len, parts))
    count = math.ceil(longest / batch) * batch
    indices = torch.stack(
        [part.repeat(2)[:count] if len(part) >= batch else part.repeat(count)[:count] for part in parts]
    )
    right = torch.cat(
        [
            model(data.x[chunk].flatten(1)).view(*chunk.shape, -1).argmax(-1) == data.y[chunk]
            for chunk in indices.T.split(batch)
        ]
    )
    model.eval()
    for name, buffer in model.named_buffers():
        buffer.copy_(before[name])
    return [100 * right[: len(part), r].double().mean().item() for r, part in enumerate(parts)]


@torch.no_grad()
def reestimate(model: nn.Module, data: Data, parts: Sequence[Tensor]) -> None:
    """Set the running statistics to those of the parts, of equal length, under the final weights."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    groups = [norm.group for norm in norms if isinstance(norm, GhostBatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
        if isinstance(norm, GhostBatchNorm):
            norm.group = len(parts[0])
    model.train()
    model(data.x[torch.stack(list(parts), dim=1)].flatten(1))
    model.eval()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    for norm, group in zip((n for n in norms if isinstance(n, GhostBatchNorm)), groups, strict=True):
        norm.group = group


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
