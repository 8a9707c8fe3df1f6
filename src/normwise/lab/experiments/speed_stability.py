"""Does normalization make training faster, and forgiving of the learning rate?

MLPs of 2, 8 and 20 hidden layers of 64 learn the digits by plain SGD at constant rates from 0.001 to 10, batch 64, 10
epochs (a smoke test has 6, 8 layers and rates from 0.03 to 3), no weight decay, He's initialization; equal updates, and
the same initial weights and order for all norms. The window is how many decades of rates end at 90 % or more of the
validation examples, interpolated between the rates tried; what lies outside them is not counted. Speed is the fewest
updates, at any of the rates, after which 90 % are right, looked at every 4 updates; where no rate gets there all
updates count. Seeds have folds of their own; Batch Norm is scored with running statistics, at the end also with
statistics of the training set and in training mode. Batch Norm, of which the claim was first made, decides; what is not
so of Layer Norm or at another depth is the correction. The trap: without a norm the 8 layers also start from weights of
the variance of torch's default, 1 / (3 inputs), a sixth of He's.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from torch import nn

from .. import plots
from ..crossval import accuracy_in_training_mode, batch_norms, reestimate
from ..data import FOLDS, Split, digits
from ..experiment import Contrast, Experiment, Finding, Numbers, Plan, Results, Trial
from ..intervals import Effect, mean
from ..replicates import GRID, NORMS, Setting, accuracy, mlp, train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BATCH, WIDTH, DEPTH = 64, 64, 8
TARGET = 90.0
SMALLEST = 0.5
"""Decades: a factor of 3, the step in which people try rates."""

TRAP = f"none {DEPTH} default"


def _run(case: str, plan: Plan, _: Results) -> Numbers:
    norm, depth, *default = case.split()
    data, seeds = digits(), plan.seeds()
    rates, every = plan.choose(GRID[3:8], GRID, GRID), plan.choose(16, 4, 4)
    model = partial(mlp, norm, data=data, hidden=(WIDTH,) * int(depth), gain=1 / 3 if default else 2.0)
    runs = [(seed, seed % FOLDS, rate) for rate in rates for seed in seeds]
    updates = plan.choose(6, 10, 10) * (len(data.x) * (FOLDS - 2) // FOLDS // BATCH)
    setting = Setting(model, runs, BATCH, updates, momentum=0.0, cosine=False)
    first: list[int | None] = [None] * len(runs)

    def watch(done: int, model: nn.Module) -> None:
        if done % every == 0:
            now = accuracy(model.eval(), data, parts)
            model.train()
            first[:] = [done if was is None and a >= TARGET else was for was, a in zip(first, now, strict=True)]

    parts = [Split.of(len(data.x), seed, fold).validation for seed, fold, _ in runs]
    trained, splits = train(setting, data, watch)
    found = {"running": accuracy(trained, data, parts)}
    if batch_norms(trained):
        found["in training mode"] = accuracy_in_training_mode(trained, data, parts, BATCH)
        reestimate(trained, data, [split.train for split in splits])
        found["re-estimated"] = accuracy(trained, data, parts)

    def by_seed(values: Sequence[float | int | None]) -> list[list[float | int | None]]:
        return [list(values[i :: len(seeds)]) for i in range(len(seeds))]

    return {
        "rates": list(rates),
        "updates": updates,
        "first": by_seed(first),
        "accuracies": {how: by_seed(each) for how, each in found.items()},
    }


def trials(plan: Plan) -> list[Trial]:
    """Each depth and norm, all rates and seeds at once."""
    depths = plan.choose((DEPTH,), (2, DEPTH, 20), (2, 4, DEPTH, 20, 40))
    cases = [f"{norm} {depth}" for depth in depths for norm in NORMS]
    return [Trial(case, partial(_run, case, plan), weight=int(case.split()[1]) + 1) for case in [*cases, TRAP]]


def window(rates: Sequence[float], accuracies: Sequence[float], target: float = TARGET) -> float:
    """Over how many decades of rates the accuracy, linear between those tried, is the target or more.

    Example:
        >>> window([0.1, 1.0, 10.0], [80.0, 95.0, 95.0])
        1.3333333333333333
    """
    width = 0.0
    points = list(zip(map(math.log10, rates), accuracies, strict=True))
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        low, high = sorted((y0, y1))
        width += (x1 - x0) * (1.0 if low >= target else 0.0 if high < target else (high - target) / (high - low))
    return width


def _windows(found: Numbers, how: str = "running") -> list[float]:
    return [window(found["rates"], seed) for seed in found["accuracies"][how]]


def _doublings(found: Numbers) -> list[float]:
    """Of the fewest updates to the target, for each seed."""
    return [math.log2(min(found["updates"] if n is None else n for n in seed)) for seed in found["first"]]


def _difference(a: Sequence[float], b: Sequence[float], unit: str) -> Effect:
    return mean([x - y for x, y in zip(a, b, strict=True)], unit)


def judge(results: Results) -> Finding:
    """Decades by which Batch Norm's window is wider than without a norm, 8 layers deep, and the rest."""
    depths = [int(name.split()[1]) for name in results if name.startswith("batch_norm")]
    wider, sooner = dict[tuple[str, int], Effect](), dict[tuple[str, int], Effect]()
    for depth in depths:
        bare = results[f"none {depth}"]
        for norm in NORMS[1:]:
            found = results[f"{norm} {depth}"]
            wider[norm, depth] = _difference(_windows(found), _windows(bare), "decades")
            sooner[norm, depth] = _difference(_doublings(bare), _doublings(found), "doublings")
    cells = {
        norm: f"{DEPTH} layers: window {wider[norm, DEPTH]} wider, {_times(sooner[norm, DEPTH])}" for norm in NORMS[1:]
    }
    none = mean(_windows(results[f"none {DEPTH}"]), "decades")
    best = {name: max(map(max, results[name]["accuracies"]["running"])) for name in (f"none {DEPTH}", TRAP)}
    return Finding(
        effect=wider["batch_norm", DEPTH],
        batch_norm=cells["batch_norm"],
        layer_norm=cells["layer_norm"],
        sentences=[
            f"without a norm {none} of rates reach {TARGET:g} % at {DEPTH} layers",
            f"the trap: without a norm the best run of {DEPTH} layers has {best[f'none {DEPTH}']:.1f} % from He's "
            f"initialization and {best[TRAP]:.1f} % from the variance of torch's default",
            *_ends(results),
        ],
        correction=_correction(wider, sooner),
        others={
            f"{plots.NAMES[norm]}, {depth} layers: {what}": effect
            for what, effects in (("window", wider), ("updates saved", sooner))
            for (norm, depth), effect in effects.items()
            if (what, norm, depth) != ("window", "batch_norm", DEPTH) and effect.error  # else no run got there
        }
        | _scored_otherwise(results),
    )


def _scored_otherwise(results: Results) -> dict[str, Effect]:
    """The contrast, had Batch Norm been scored with other statistics than the running ones."""
    found, bare = results[f"batch_norm {DEPTH}"], _windows(results[f"none {DEPTH}"])
    return {
        f"Batch Norm, {DEPTH} layers: window, {how}": _difference(_windows(found, how), bare, "decades")
        for how in found["accuracies"]
        if how != "running"
    }


def _times(effect: Effect) -> str:
    return f"{2**effect.value:.2g} x as fast"


def _ends(results: Results) -> list[str]:
    """Which windows are as wide as the grid lets them be."""
    ends = [name for name, r in results.items() if any(max(a[0], a[-1]) >= TARGET for a in r["accuracies"]["running"])]
    return [f"the window reaches beyond the rates tried: {', '.join(ends)}"] if ends else []


def _correction(wider: dict[tuple[str, int], Effect], sooner: dict[tuple[str, int], Effect]) -> str:
    """Where a norm is not shown to gain what matters, or costs updates."""
    short = [f"{_named(*case)} ({e})" for case, e in wider.items() if e.low < SMALLEST]
    slow = [f"{_named(*case)} ({_times(e)})" for case, e in sooner.items() if e.high < 0]
    parts = [f"a gain of {SMALLEST:g} decades is not shown for {', '.join(short)}"] if short else []
    parts += [f"more updates are needed with {', '.join(slow)}"] if slow else []
    return "not of every norm and depth: " + "; ".join(parts) if parts else ""


def _named(norm: str, depth: int) -> str:
    return f"{plots.NAMES[norm]} at {depth} layers"


def plot(figure: Figure, results: Results) -> None:
    """Final accuracy by learning rate, a panel for each depth."""
    depths = [int(name.split()[1]) for name in results if name.startswith("batch_norm")]
    axes = figure.subplots(1, len(depths), sharey=True, squeeze=False)[0]
    for ax, depth in zip(axes, depths, strict=True):
        ax.set_xscale("log")
        ax.axhline(TARGET, color="black", linewidth=0.5, linestyle=":")
        for norm in NORMS:
            found = results[f"{norm} {depth}"]
            means = [mean(seeds, "%") for seeds in zip(*found["accuracies"]["running"], strict=True)]
            plots.curve(ax, found["rates"], means, norm, label="")
        ax.set_title(f"{depth} layers")
        ax.set_xlabel("learning rate")
        axes[0].set_ylabel("validation accuracy, %")
    axes[0].set_ylim(0, 102)
    plots.below(figure, axes[0], NORMS)


EXPERIMENT = Experiment(
    name="speed_stability",
    aspect="Faster and more stable training",
    claim="Normalization makes training faster and more stable.",
    contrast=Contrast(
        f"decades of learning rates that reach {TARGET:g} % at {DEPTH} layers, Batch Norm's less those "
        "without a norm, paired seeds",
        SMALLEST,
    ),
    method=__doc__,
    trials=trials,
    judge=judge,
    plot=plot,
)
