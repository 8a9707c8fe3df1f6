"""Does an example's output change when its neighbours in the batch do?

One example stays, all others of the batch are drawn anew, and the bits of its output are compared: of the layer alone
on inputs of three shapes, in training and in evaluation; and of a whole model (linear, norm, linear) where besides its
neighbours also the batch size changes. The unit is one example beside one new set of neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ... import nn as norms
from .. import plots
from ..experiment import Contrast, Experiment, Finding, Numbers, Plan, Results, Trial
from ..intervals import share

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHAPES = {"features": (64,), "image": (32, 7, 7), "tokens": (16, 64)}
BATCH = 8


def _layer(norm: str, shape: tuple[int, ...]) -> nn.Module:
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
def _of_layer(norm: str, mode: str, seeds: Sequence[int], tries: int, _: Results) -> Numbers:
    found: Numbers = {"tries": 0, "changed": {}}
    for name, shape in SHAPES.items():
        found["changed"][name] = 0
        for seed in seeds:
            torch.manual_seed(seed)
            found["changed"][name] += _changed(
                _trained(_layer(norm, shape), shape, mode), shape, tries, mode != "training"
            )
            found["tries"] += tries
    return found


@torch.no_grad()
def _of_model(norm: str, seeds: Sequence[int], tries: int, _: Results) -> Numbers:
    found = {"tries": len(seeds) * tries, "changed": 0}
    for seed in seeds:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(256, 256), _layer(norm, (256,)), nn.Linear(256, 256))
        found["changed"] += _changed(_trained(model, (256,), "evaluation"), (256,), tries, other_size=True)
    return found


def trials(plan: Plan) -> list[Trial]:
    """Layer and model, both norms, both modes."""
    seeds, tries = plan.seeds(), plan.choose(50, 100, 200)
    both = ("batch_norm", "layer_norm")
    layers = [
        Trial(f"{norm} {mode}", partial(_of_layer, norm, mode, seeds, tries))
        for norm in both
        for mode in ("training", "evaluation")
    ]
    return layers + [Trial(f"{norm} model", partial(_of_model, norm, seeds, tries)) for norm in both]


def judge(results: Results) -> Finding:
    """Shares of examples whose bits changed."""
    parts = {
        name: share(sum(found["changed"].values()) if "model" not in name else found["changed"], found["tries"])
        for name, found in results.items()
    }
    ln, bn = parts["layer_norm training"], parts["batch_norm training"]
    model = parts["layer_norm model"]
    correction = (
        "true of the layer; a model's matrix products change an example's last bits with the batch size, around Layer "
        f"Norm too: {model} of outputs"
        if model.low > 0
        else ""
    )
    return Finding(
        effect=ln,
        batch_norm=f"{bn} of outputs change, in training; {parts['batch_norm evaluation'].value:g} % in evaluation",
        layer_norm=f"{ln} change, in training and evaluation alike"
        if ln == parts["layer_norm evaluation"]
        else f"{ln}",
        correction=correction,
        others={name: part for name, part in parts.items() if name != "layer_norm training"},
    )


def plot(figure: Figure, results: Results) -> None:
    """Bars of the shares."""
    finding = judge(results)
    parts = {"layer_norm training": finding.effect, **finding.others}
    names = list(results)
    axes = figure.subplots()
    labels = [plots.NAMES[norm] + ", " + what for norm, what in map(str.split, names)]
    plots.bars(axes, labels, [parts[name] for name in names], [name.split()[0] for name in names])
    axes.set_xlabel("outputs whose bits change when the neighbours do, %")


EXPERIMENT = Experiment(
    name="independence",
    aspect="Depends on the other examples",
    claim="Layer Norm is independent of the batch, Batch Norm depends on it.",
    contrast=Contrast("Layer Norm in training: outputs whose bits change with the neighbours", 1.0, equal=True),
    method=__doc__,
    trials=trials,
    judge=judge,
    plot=plot,
)
