"""Does an example's output change when its neighbours in the batch do?

One example stays, all others of the batch are drawn anew, and the bits of its output are compared: of the layer alone
on inputs of three shapes, in training and in evaluation; and of a whole model (linear, norm, linear), with no norm too,
where besides its neighbours also the batch size changes. The unit is one example beside one new set of neighbours. Both
halves of the claim decide: Layer Norm's share, in whichever mode is the larger, is taken from Batch Norm's in training.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ... import nn as norms
from .. import plots
from ..experiment import Contrast, Experiment, Finding, Numbers, Plan, Results, Trial
from ..intervals import Effect, share

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHAPES = {"features": (64,), "image": (32, 7, 7), "tokens": (16, 64)}
BOTH, MODES = ("batch_norm", "layer_norm"), ("training", "evaluation")
BATCH = 8
SMALLEST = 1.0
"""Percent: fewer outputs that change are as good as none."""


def _layer(norm: str, shape: tuple[int, ...]) -> nn.Module:
    if norm == "none":
        return nn.Identity()
    if norm == "layer_norm":
        return norms.LayerNorm(shape[-1]) if len(shape) < 3 else norms.GroupNorm(1, shape[0])
    if len(shape) == 2:
        return nn.Sequential(_Transposed(), norms.BatchNorm1d(shape[-1]), _Transposed())
    return (norms.BatchNorm2d if len(shape) == 3 else norms.BatchNorm1d)(shape[0])


class _Transposed(nn.Module):
    """(N, L, C) <-> (N, C, L)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


def _trained(layer: nn.Module, shape: tuple[int, ...], mode: str) -> nn.Module:
    """In this mode, after a few steps that give Batch Norm running statistics."""
    for _ in range(3):
        layer(3 + torch.randn(BATCH, *shape))
    return layer.train(mode == "training")


def _changed(function: Callable[[Tensor], Tensor], shape: tuple[int, ...], tries: int, other_size: bool) -> int:
    """How often one example's output has other bits beside new neighbours."""
    count = 0
    for _ in range(tries):
        first = 3 + torch.randn(BATCH, *shape)
        size = int(torch.randint(2, 4 * BATCH, ())) if other_size else BATCH
        second = 3 + torch.randn(size, *shape)
        second[0] = first[0]
        count += not torch.equal(function(first)[0], function(second)[0])
    return count


@torch.no_grad()
def _measure(seed: int, tries: int, _: Results) -> Numbers:
    """How many outputs change, of how many: each norm in each mode, and in a model."""
    changed: Numbers = {}
    for norm in BOTH:
        for mode in MODES:
            changed[f"{norm} {mode}"] = {}
            for name, shape in SHAPES.items():
                torch.manual_seed(seed)
                layer = _trained(_layer(norm, shape), shape, mode)
                changed[f"{norm} {mode}"][name] = _changed(layer, shape, tries, mode != "training")
    for norm in (*BOTH, "none"):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(256, 256), _layer(norm, (256,)), nn.Linear(256, 256))
        of_model = _changed(_trained(model, (256,), "evaluation"), (256,), tries, other_size=True)
        changed[f"{norm} model"] = {"features": of_model}
    return {"tries": tries, "changed": changed}


def trials(plan: Plan) -> list[Trial]:
    """One for each seed."""
    return [Trial(f"seed {seed}", partial(_measure, seed, 100)) for seed in plan.seeds()]


def judge(results: Results) -> Finding:
    """Shares of examples whose bits changed."""
    parts = _shares(results)
    bn, model, none = parts["batch_norm training"], parts["layer_norm model"], parts["none model"]
    ln = max((parts[f"layer_norm {mode}"] for mode in MODES), key=lambda share: share.high)
    corrections = []
    if parts["batch_norm evaluation"].high < SMALLEST:
        corrections.append(
            f"Batch Norm in training only, in evaluation {parts['batch_norm evaluation']} of outputs change"
        )
    if model.low > 0:
        corrections.append(
            "and this is true of the layer: a model's matrix products change an example's last bits with the batch "
            f"size, in {model} of outputs with Layer Norm, in {none} with no norm"
        )
    return Finding(
        effect=Effect(
            bn.value - ln.value, bn.low - ln.high, bn.high - ln.low, "points", math.hypot(bn.error, ln.error)
        ),
        batch_norm=f"{bn} of outputs change, in training; {parts['batch_norm evaluation'].value:g} % in evaluation",
        layer_norm=f"{ln} change, in training and evaluation alike"
        if parts["layer_norm training"] == parts["layer_norm evaluation"]
        else f"{parts['layer_norm training'].value:g} % change in training, "
        f"{parts['layer_norm evaluation'].value:g} % in evaluation",
        correction="; ".join(corrections),
        others=parts,
    )


def _shares(results: Results) -> dict[str, Effect]:
    """Of each norm and mode, over seeds and shapes."""
    counts: dict[str, list[int]] = {}
    for found in results.values():
        for name, changed in found["changed"].items():
            hits, of = counts.get(name, (0, 0))
            counts[name] = [hits + sum(changed.values()), of + found["tries"] * len(changed)]
    return {name: share(hits, of) for name, (hits, of) in counts.items()}


def plot(figure: Figure, results: Results) -> None:
    """Bars of the shares."""
    parts = _shares(results)
    labels = [plots.NAMES[norm] + ", " + what for norm, what in map(str.split, parts)]
    axes = figure.subplots()
    plots.bars(axes, labels, list(parts.values()), [name.split()[0] for name in parts])
    axes.set_xlabel("outputs whose bits change when the neighbours do, %")


EXPERIMENT = Experiment(
    name="independence",
    aspect="Depends on the other examples",
    claim="Layer Norm is independent of the batch, Batch Norm depends on it.",
    contrast=Contrast(
        "outputs whose bits change with the neighbours: Batch Norm in training less Layer Norm, in its worse mode",
        100 - SMALLEST,
    ),
    method=__doc__,
    trials=trials,
    judge=judge,
    plot=plot,
)
