"""What parts Batch Norm in training from Batch Norm in evaluation, cause by cause."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

CAUSES = {
    "lag": "running statistics are old",
    "shift": "test set, not training set",
    "noise": "a batch's own statistics",
    "bias": "variance over n, not n - 1",
}

Statistics = tuple[Tensor, Tensor]
"""Mean and variance of each channel."""


def forward(model: nn.Module, x: Tensor, statistics: Callable[[int, Tensor], Statistics]) -> Tensor:
    """The model with these statistics in the place of Batch Norm's, called with its number and its input."""
    count = itertools.count()
    for layer in model.children():
        if isinstance(layer, _BatchNorm):
            average, var = statistics(next(count), x)
            x = (x - average) * torch.rsqrt(var + layer.eps) * layer.weight + layer.bias
        else:
            x = layer(x)
    return x


def population(model: nn.Module, x: Tensor) -> list[Statistics]:
    """Of each norm's input, if each normalizes with those of all examples; variances over n - 1."""
    found: list[Statistics] = []

    def take(_: int, inputs: Tensor) -> Statistics:
        var, average = torch.var_mean(inputs, 0)
        found.append((average, var))
        return found[-1]

    forward(model, x, take)
    return found


def mixed(model: nn.Module, x: Tensor, fixed: Sequence[Sequence[Statistics]], on: str, batch: int) -> Tensor:
    """All off is evaluation, all on is training mode: each cause moves the mean and scales the variance.

    Args:
        model: It.
        x: Its input, a multiple of the batch.
        fixed: Running statistics, those of the training set.
        on: The causes that are switched on.
        batch: How many examples are normalized together where noise is on.
    """

    def statistics(i: int, inputs: Tensor) -> Statistics:
        running, training = (layers[i] for layers in fixed)
        average, var = running
        test_var, test = torch.var_mean(inputs, 0)  # of this mixture's inputs: what another layer does is not its noise
        own_var, own = torch.var_mean(inputs.unflatten(0, (-1, batch)), 1)
        own, own_var = (t.repeat_interleave(batch, 0) for t in (own, own_var))
        for cause, before, after in (
            ("lag", running, training),
            ("shift", training, (test, test_var)),
            ("noise", (test, test_var), (own, own_var)),
        ):
            if cause in on:
                average = average + (after[0] - before[0])
                var = var * (after[1] / before[1])
        return average, var * ((batch - 1) / batch) if "bias" in on else var

    return forward(model, x, statistics)


def subsets(causes: Iterable[str] = CAUSES) -> list[str]:
    """All sets of causes, each by their names in their order."""
    causes = tuple(causes)
    return [" ".join(some) for n in range(len(causes) + 1) for some in itertools.combinations(causes, n)]


def shapley(scores: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """Each cause's share of the way from no cause to all of them, its mean over the orders of switching; by seed.

    Args:
        scores: By the causes that are on, in the order of all, each name once.
    """
    n = len(CAUSES)
    found = {}
    for cause in CAUSES:
        total = [0.0] * len(scores[""])
        for without in subsets(c for c in CAUSES if c != cause):
            size = len(without.split())
            weight = math.factorial(size) * math.factorial(n - 1 - size) / math.factorial(n)
            together = " ".join(c for c in CAUSES if c == cause or c in without.split())
            steps = zip(total, scores[together], scores[without], strict=True)
            total = [t + weight * (a - b) for t, a, b in steps]
        found[cause] = total
    return found
