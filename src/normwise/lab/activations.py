"""What norms get to see: the hidden activations of trained digits classifiers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from .replicates import Conv, Linear, Setting, accuracy, cnn, digits, mlp, train

BATCH, RATE = 64, 0.1
MODELS: dict[str, Callable[..., nn.Module]] = {"MLP": mlp, "CNN": cnn}


def activations(kind: str, norm: str, seeds: Sequence[int], epochs: int) -> tuple[list[Tensor], list[float]]:
    """Train one model for each seed and let it see all digits.

    Args:
        kind: ``"MLP"`` or ``"CNN"``.
        norm: Of the models.
        seeds: Of initial weights, order and split.
        epochs: Of batches of 64; SGD, momentum 0.9, cosine from 0.1, no weight decay.

    Returns:
        The input of each norm, (examples, seeds, C, ...), and each model's percentage of test digits.
    """
    data = digits()
    updates = epochs * (len(data.x) * 3 // 5 // BATCH)
    setting = Setting(partial(MODELS[kind], norm, data=data), [(seed, 0, RATE) for seed in seeds], BATCH, updates)
    model, splits = train(setting, data)
    found, x = [], data.x.repeat(1, len(seeds))
    with torch.no_grad():
        for layer in model.children():
            x = layer(x)
            if isinstance(layer, (Linear, Conv)):
                found.append(x.unflatten(1, (len(seeds), -1)))
    return found[:-1], accuracy(model, data, [split.test for split in splits])
