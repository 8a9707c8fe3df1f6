"""Does Batch Norm make the samples of a batch look alike?

Of a batch the mean and the standard deviation of each sample, and of each feature or channel, are taken: before any
norm, after Batch Norm in training and after Layer Norm, of the same values. Samples look alike where these do. Their
spread is their standard deviation as a share of that of all values, so that it has no scale. Batches: the worked
example's 4 x 3; 64 images of digits; and what 64 digits become inside an MLP and a CNN trained without a norm, at the
second place where one would stand (10 epochs, learning rate 0.1: no model is compared). Features that are constant in
the batch are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ... import functional
from ...explain.load import WORKED
from .. import plots
from ..activations import activations
from ..experiment import Contrast, Experiment, Finding, Numbers, Plan, Results, Trial
from ..intervals import Effect, exact, mean
from ..replicates import digits

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BATCH = 64
LARGE = 50.0
"""Percent: samples that are made similar have lost at least half of what tells them apart."""

NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "before": lambda x: x,
    "batch_norm": lambda x: functional.batch_norm(x, None, None, training=True),
    "layer_norm": lambda x: functional.layer_norm(x, x.shape[1:]),
}
AXES = {"samples": 0, "features": 1}


def _spreads(x: Tensor) -> Numbers:
    """Of means and standard deviations, in percent of the standard deviation of all values."""
    found = {}
    for name, axis in AXES.items():
        rows = x.double().transpose(0, axis).flatten(1)
        for what, values in (("means", rows.mean(1)), ("deviations", rows.std(1, correction=0))):
            found[f"{name}' {what}"] = (100 * values.std(correction=0) / rows.std(correction=0)).item()
    return found


def _batch(source: str, seed: int, epochs: int) -> Tensor:
    if source == "worked batch":
        return torch.tensor(WORKED)
    pool = digits().x if source == "digits" else activations(source, "none", [seed], epochs)[0][1][:, 0]
    x = pool[torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))[:BATCH]]
    return x[:, x.transpose(0, 1).flatten(1).var(1) > 0]


def _of_source(source: str, seed: int, epochs: int, _: Results) -> Numbers:
    x = _batch(source, seed, epochs)
    return {norm: _spreads(function(x)) for norm, function in NORMS.items()}


def trials(plan: Plan) -> list[Trial]:
    """Each source of batches, each seed; the source that decides first."""
    epochs = plan.choose(3, 10, 10)
    seeds = {source: plan.seeds() for source in ("MLP", "CNN", "digits")} | {"worked batch": plan.seeds(1, 1, 1)}
    return [
        Trial(f"{source}, seed {seed}", partial(_of_source, source, seed, epochs))
        for source in seeds
        for seed in seeds[source]
    ]


def _by_source(results: Results) -> dict[str, Numbers]:
    """Each norm's spreads over seeds."""
    found: dict[str, Numbers] = {}
    for name, norms in results.items():
        source = found.setdefault(name.partition(",")[0], {norm: {} for norm in NORMS})
        for norm, spreads in norms.items():
            for what, spread in spreads.items():
                source[norm].setdefault(what, []).append(spread)
    return found


def _left(found: Numbers, norm: str, what: str) -> Effect | None:
    """What a norm leaves of a spread, to a hundredth of a percent; None of no spread."""
    pairs = list(zip(found["before"][what], found[norm][what], strict=True))
    if min(before for before, _ in pairs) < 1e-3:
        return None
    left = [round(100 * after / before, 2) for before, after in pairs]
    return exact(left[0], "%") if len(left) == 1 else mean(left, "%")


def judge(results: Results) -> Finding:
    """How much of the spread of the samples' means Batch Norm takes away."""
    left = {
        (source, norm, what): effect
        for source, found in _by_source(results).items()
        for norm in ("batch_norm", "layer_norm")
        for what in found["before"]
        if (effect := _left(found, norm, what))
    }
    of = {
        (norm, axis): left["MLP", norm, f"{axis}' means"]
        for norm in ("batch_norm", "layer_norm")
        for axis in ("samples", "features")
    }
    bn = of["batch_norm", "samples"]
    return Finding(
        effect=replace(bn, value=100 - bn.value, low=100 - bn.high, high=100 - bn.low),
        batch_norm=f"leaves {bn} of the samples' spread, {of['batch_norm', 'features']} of the features'",
        layer_norm=f"leaves {of['layer_norm', 'samples']} of the samples' spread, "
        f"{of['layer_norm', 'features']} of the features'",
        sentences=[
            f"{plots.NAMES[norm]} leaves {of[norm, 'samples']} of the spread of the samples' means and "
            f"{of[norm, 'features']} of the features': it makes {_alike(of, norm)} alike"
            for norm in ("batch_norm", "layer_norm")
        ],
        others={
            f"{source}: spread of the {what} after {plots.NAMES[norm]}": effect
            for (source, norm, what), effect in left.items()
        },
    )


def _alike(of: dict[tuple[str, str], Effect], norm: str) -> str:
    axes = [axis for axis in ("samples", "features") if of[norm, axis].high <= 100 - LARGE]
    return "the " + " and the ".join(axes) if axes else "neither"


def plot(figure: Figure, results: Results) -> None:
    """Spread before and after, of samples and of features."""
    panels, spread = figure.subplots(1, 2, sharey=True), _by_source(results)["MLP"]
    for axes, name in zip(panels, ("samples", "features"), strict=True):
        spreads = [mean(spread[norm][f"{name}' means"]) for norm in NORMS]
        effects = [replace(e, **{k: round(getattr(e, k), 3) for k in ("value", "low", "high")}) for e in spreads]
        plots.bars(axes, ["before", "Batch Norm", "Layer Norm"], effects, ["none", "batch_norm", "layer_norm"])
        axes.set_xlabel(f"spread of the {name}' means,\n% of the spread of all values")
        axes.margins(x=0.9)
    panels[0].invert_yaxis()


EXPERIMENT = Experiment(
    name="intuition",
    aspect="What becomes alike",
    claim="Batch Norm makes all samples of a batch look statistically similar.",
    contrast=Contrast("the part of the spread of the samples' means that Batch Norm takes away, in an MLP", LARGE),
    method=__doc__,
    trials=trials,
    judge=judge,
    plot=plot,
)
