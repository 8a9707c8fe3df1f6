"""Cross-validation of replicates: the learning rate tuned first, Batch Norm scored in three ways."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean

import torch
from torch import Tensor, nn

from .data import FOLDS, Data
from .experiment import Numbers
from .replicates import GRID, GhostBatchNorm, Setting, accuracy, train, tuned

Model = Callable[[Sequence[torch.Generator]], nn.Module]


def tune(
    model: Model,
    data: Data,
    seeds: Sequence[int],
    *,
    batch: int,
    updates: int,
    grid: Sequence[float] = GRID,
    most: int = 4,
) -> Numbers:
    """The learning rate of the best mean validation accuracy over seeds and folds, with its curve; see `tuned`."""

    def validate(rates: Sequence[float]) -> list[float]:
        runs = [(seed, fold, rate) for rate in rates for seed in seeds for fold in range(FOLDS)]
        trained, splits = train(Setting(model, runs, batch, updates), data)
        found = accuracy(trained, data, [split.validation for split in splits])
        return _means(found, len(seeds) * FOLDS)

    return tuned(validate, grid, most)


def cross_validate(
    model: Model, data: Data, seeds: Sequence[int], *, rate: float, batch: int, updates: int, group: int | None = None
) -> Numbers:
    """Percent of all examples that each seed's models get right, each example by the model that has not seen it.

    Args:
        model: What is trained.
        data: The examples.
        seeds: Of weights, order and folds.
        rate: The learning rate.
        batch: Examples in an update.
        updates: How many.
        group: Examples that share Batch Norm's statistics; None for the batch.

    Returns:
        For each way of scoring a list over seeds: ``running``, and of Batch Norm also ``in training mode``, with the
        statistics of each group of test examples, and ``re-estimated``, with those of the training set under the final
        weights. Folds differ in size by one example: their mean is the accuracy over all examples to 0.01 points.
    """
    runs = [(seed, fold, rate) for seed in seeds for fold in range(FOLDS)]
    trained, splits = train(Setting(model, runs, batch, updates), data)
    tests = [split.test for split in splits]
    found = {"running": accuracy(trained, data, tests)}
    if batch_norms(trained):
        found["in training mode"] = accuracy_in_training_mode(trained, data, tests, group or batch)
        reestimate(trained, data, [split.train for split in splits])
        found["re-estimated"] = accuracy(trained, data, tests)
    return {how: _means(each, FOLDS) for how, each in found.items()}


def accuracy_in_training_mode(model: nn.Module, data: Data, parts: Sequence[Tensor], batch: int) -> list[float]:
    """The accuracy with the statistics of batches of the part; the running ones stay."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    found = accuracy(model.train(), data, parts, batch)
    model.eval()
    for name, buffer in model.named_buffers():
        buffer.copy_(before[name])
    return found


@torch.no_grad()
def reestimate(model: nn.Module, data: Data, parts: Sequence[Tensor]) -> None:
    """Set the running statistics to those of the parts, of equal length, under the final weights."""
    norms = batch_norms(model)
    before = [(norm.momentum, getattr(norm, "group", 0)) for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
        if isinstance(norm, GhostBatchNorm):
            norm.group = len(parts[0])
    model.train()(data.x[torch.stack(list(parts), dim=1)].flatten(1))
    model.eval()
    for norm, (momentum, group) in zip(norms, before, strict=True):
        norm.momentum = momentum
        if isinstance(norm, GhostBatchNorm):
            norm.group = group


def batch_norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """Those of a model."""
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def _means(values: Sequence[float], size: int) -> list[float]:
    return [fmean(values[i : i + size]) for i in range(0, len(values), size)]
