"""Do the gradients of micro-batches add up to that of the big batch?

A small CNN with 1, 2 or 4 norms in a row is trained on digits for some steps with batches of 64; then the gradient of
all its parameters, of a batch of 64 taken as four micro-batches of 16, is compared in float64 with the one of the same
batch in one pass: the relative L2 error, averaged over seeds by its logarithm. Batch Norm is taken three ways: each
micro-batch with its own statistics; with running statistics, which the backward takes for constants; and with those of
the big batch itself, from one statistics pass for each layer, for constants too. A network without norms is the
baseline. Nothing is learnt from the compared gradients, so no learning rate has to be tuned.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ... import nn as norms
from .. import plots
from ..data import digits
from ..experiment import Contrast, Experiment, Finding, Numbers, Plan, Results, Trial
from ..intervals import Effect, mean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BATCH, PART, CHANNELS = 64, 16, 8
DEPTHS = (1, 2, 4)
ROUNDING = 1e-12
"""Relative errors below it count as this: they are of the order of the sums, not of the norm."""

NORMS: dict[str, Callable[[int], nn.Module]] = {
    "none": lambda channels: nn.Identity(),
    "layer_norm": lambda channels: norms.LayerNorm2d(channels),
    "group_norm": lambda channels: norms.GroupNorm(2, channels),
    "batch_norm": lambda channels: norms.BatchNorm2d(channels),
}
WAYS = {
    "none": ("none", "plain"),
    "Layer Norm": ("layer_norm", "plain"),
    "Group Norm": ("group_norm", "plain"),
    "Batch Norm": ("batch_norm", "plain"),
    "Batch Norm, running statistics": ("batch_norm", "running"),
    "Batch Norm, statistics pass for each layer": ("batch_norm", "pass"),
}


def _network(norm: str, depth: int) -> nn.Module:
    blocks: list[nn.Module] = []
    for i in range(depth):
        conv = nn.Conv2d(CHANNELS if i else 1, CHANNELS, 3, padding=1, bias=False)
        blocks += [conv, NORMS[norm](CHANNELS), nn.ReLU()]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS, 10))


def _gradient(model: nn.Module, x: Tensor, y: Tensor, part: int) -> Tensor:
    """Of the mean loss, added up over parts."""
    model.zero_grad()
    for inputs, labels in zip(x.split(part), y.split(part), strict=True):
        cross_entropy(model(inputs), labels, reduction="sum").div(len(x)).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@torch.no_grad()
def _take_statistics(model: nn.Module, x: Tensor) -> None:
    """Make the running statistics those with which Batch Norm normalizes x."""

    def take(norm: nn.BatchNorm2d, args: tuple[Tensor]) -> None:
        var, average = torch.var_mean(args[0], (0, 2, 3), correction=0)
        found.append((norm, average, var))

    found: list[tuple[nn.BatchNorm2d, Tensor, Tensor]] = []
    handles = [m.register_forward_pre_hook(take) for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    model(x)
    for handle in handles:
        handle.remove()
    for norm, average, var in found:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean.copy_(average)
        norm.running_var.copy_(var)


def _error(way: str, model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The gradient's, of micro-batches against one pass."""
    truth = _gradient(model.train(), x, y, BATCH)
    if way == "pass":
        _take_statistics(model, x)
    found = _gradient(model.train(way == "plain"), x, y, PART)
    return float((found - truth).norm() / truth.norm())


def _measure(seed: int, depths: Sequence[int], steps: int, _: Results) -> Numbers:
    """The error of each way at each number of norms."""
    return {_name(depth): _errors(depth, seed, steps) for depth in depths}


def _errors(depth: int, seed: int, steps: int) -> dict[str, float]:
    data = digits()
    images = data.x.view(-1, 1, 8, 8)
    errors: dict[str, float] = {}
    for norm in NORMS:
        torch.manual_seed(seed)
        model = _network(norm, depth)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for chosen in torch.randint(len(images), (steps, BATCH)):
            _gradient(model, images[chosen], data.y[chosen], BATCH)
            optimizer.step()
        chosen = torch.randperm(len(images))[:BATCH]
        state = copy.deepcopy(model.double().state_dict())
        for name, (of, way) in WAYS.items():
            if of == norm:
                model.load_state_dict(state)
                errors[name] = _error(way, model, images[chosen].double(), data.y[chosen])
    return errors


def _name(depth: int) -> str:
    return f"{depth} norm{'s' if depth > 1 else ''}"


def trials(plan: Plan) -> list[Trial]:
    """One for each seed."""
    steps = plan.choose(10, 50, 50)
    return [Trial(f"seed {seed}", partial(_measure, seed, DEPTHS, steps)) for seed in plan.seeds()]


def _by_depth(results: Results) -> dict[str, dict[str, list[float]]]:
    """Each way's errors over seeds."""
    return {
        _name(depth): {way: [found[_name(depth)][way] for found in results.values()] for way in WAYS}
        for depth in DEPTHS
    }


def _orders(a: Sequence[float], b: Sequence[float]) -> Effect:
    """By how many powers of ten the errors a exceed b's, on average over pairs."""
    ratios = [math.log10(max(x, ROUNDING) / max(y, ROUNDING)) for x, y in zip(a, b, strict=True)]
    return mean(ratios, "orders of magnitude")


def judge(results: Results) -> Finding:
    """Errors of the deepest network."""
    errors = _by_depth(results)
    deepest = errors[_name(DEPTHS[-1])]
    worst = max(error for found in errors.values() for error in found["Layer Norm"])
    others = {
        f"{way}, {depth}: log10 of the error": mean([math.log10(max(error, ROUNDING)) for error in found[way]])
        for depth, found in errors.items()
        for way in WAYS
        if way.startswith("Batch Norm")
    }
    log = others[f"Batch Norm, {_name(DEPTHS[-1])}: log10 of the error"]
    plain = Effect(10**log.value, 10**log.low, 10**log.high)
    ratios = {way: _orders(deepest[way], deepest["Batch Norm"]) for way in WAYS if way.startswith("Batch Norm, ")}
    return Finding(
        effect=_orders(deepest["Batch Norm"], deepest["Layer Norm"]),
        batch_norm=f"gradient off by {plain} of its length, {_name(DEPTHS[-1])}",
        layer_norm=f"off by {worst:.0e} at most",
        sentences=[
            f"{way.partition(', ')[2]}: {ratio.value:+.1f} orders of magnitude beside plain accumulation"
            for way, ratio in ratios.items()
        ],
        others=others,
    )


def plot(figure: Figure, results: Results) -> None:
    """Errors by the number of norms."""
    axes, errors = figure.subplots(), _by_depth(results)
    axes.set_yscale("log")
    colors = dict(zip(WAYS, ("none", "layer_norm", "rms_norm", "batch_norm", "light", "other"), strict=True))
    labels = {"Batch Norm, statistics pass for each layer": "Batch Norm, statistics passes", "none": "no norm"}
    for way, name in colors.items():
        for found, depth in zip(errors.values(), DEPTHS, strict=True):
            axes.plot([depth] * len(found[way]), found[way], ".", color=plots.COLORS[name], markersize=3)
        middle = [sorted(found[way])[len(found[way]) // 2] for found in errors.values()]
        axes.plot(DEPTHS, middle, color=plots.COLORS[name])
        height = {"layer_norm": 0.0, "none": -9.0, "rms_norm": 12.0, "light": 7.0, "other": -1.0, "batch_norm": -8.0}[
            name
        ]
        axes.annotate(
            labels.get(way, way),
            (DEPTHS[-1], middle[-1]),
            (6, height),
            textcoords="offset points",
            color=plots.COLORS[name],
            va="center",
        )
    axes.set_xticks(DEPTHS, [str(depth) for depth in DEPTHS])
    axes.margins(y=0.09)
    axes.set_xlim(0.7, 6.2)
    axes.set_xlabel("norms in a row")
    axes.set_ylabel("relative error of the gradient")


EXPERIMENT = Experiment(
    name="accumulation",
    aspect="Gradient accumulation",
    claim="Accumulated over micro-batches, Layer Norm's gradient is that of the big batch; Batch Norm's is not.",
    contrast=Contrast("relative gradient error of Batch Norm over that of Layer Norm, at least 1e-12; 4 norms", 10.0),
    method=__doc__,
    trials=trials,
    judge=judge,
    plot=plot,
)
