"""What happens to Batch Norm and Layer Norm when the batch gets small, as people try it?

An MLP (64, 64, 64, 10) and a CNN (3 x 3 convolutions to 8 and 16 channels, the second of stride 2) learn the digits
with batches of 64 down to 1. All see equally many examples, 10 epochs of them, so small batches mean more and noisier
updates: what differs by batch size has several causes, which `ghost_batch` takes apart. SGD, momentum 0.9, cosine, no
weight decay, He's initialization; the learning rate is tuned for each model, norm and batch size on validation data
with seeds of their own; each seed is a 5-fold cross-validation over all 1,797 digits, with the same initial weights and
order for all norms. Batch Norm is scored with running statistics, with statistics of the training set under the final
weights, and in training mode. A smoke test trains for less than half an epoch. With a folder of MNIST or CIFAR-10
files their first 2,000 images, averaged over 2 x 2 pixels, take the place of the digits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from .. import plots
from ..crossval import cross_validate, tune
from ..data import FOLDS, Data, images
from ..experiment import Contrast, Experiment, Finding, Numbers, Plan, Results, Trial
from ..intervals import Effect, mean
from ..replicates import GRID, NORMS, cnn, mlp

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MODELS: dict[str, Callable[..., nn.Module]] = {"mlp": partial(mlp, hidden=(64, 64)), "cnn": cnn}
BATCHES = (64, 16, 4, 2, 1)
SMALLEST = 1.0
"""Points that matter to who chooses a norm."""


def _fixed(case: str, data: Data, epochs: float) -> dict[str, Any]:
    """What tuning and training of a case share."""
    model, norm, batch = case.split()
    examples = len(data.x) * (FOLDS - 2) // FOLDS - 1
    return {
        "model": partial(MODELS[model], norm, data=data),
        "data": data,
        "batch": int(batch),
        "updates": max(1, int(epochs * examples / int(batch))),
    }


def _values(case: str, data: Data) -> int:
    """How many values a statistic of the last Batch Norm has."""
    model, _, batch = case.split()
    return int(batch) * (math.ceil(data.side / 2) ** 2 if model == "cnn" else 1)


def _tune(case: str, plan: Plan, _: Results) -> Numbers:
    """The grid begins with two decades about where small batches have had their best rate, and reaches out."""
    data, batch = images(plan.data), int(case.split()[2])
    first = 2 if batch > 4 else 1 if batch > 1 else 0
    grid = plan.choose(GRID[first + 1 : first + 4], GRID[first : first + 5], GRID)
    seeds = range(plan.seed_base + 900, plan.seed_base + 900 + plan.choose(1, 1, 3))
    try:
        return tune(seeds=seeds, grid=grid, most=plan.choose(0, 4, 4), **_fixed(case, data, _epochs(plan)))
    except ValueError as error:
        if "value per channel" not in str(error):
            raise
        return {"refused": str(error)}


def _train(case: str, plan: Plan, results: Results) -> Numbers:
    tuned, data = results[f"tune {case}"], images(plan.data)
    if "refused" in tuned:
        return tuned
    fixed = _fixed(case, data, _epochs(plan))
    return cross_validate(seeds=plan.seeds(), rate=tuned["best"], **fixed) | {"values": _values(case, data)}


def _epochs(plan: Plan) -> float:
    return plan.choose(0.4, 10.0, 10.0)


def trials(plan: Plan) -> list[Trial]:
    """Each case is tuned, then trained with the seeds that count, all at once."""
    images(plan.data)  # what cannot be read is told before anything runs
    batches = plan.choose((64, 2), BATCHES, BATCHES)
    cases = [f"{model} {norm} {batch}" for model in MODELS for batch in batches for norm in NORMS]
    if 1 not in batches:
        cases.append("mlp batch_norm 1")  # whose refusal takes no time
    return [
        Trial(f"{kind} {case}", partial(function, case, plan), weight=1 / int(case.split()[2]) + 0.1)
        for case in cases
        for kind, function in (("tune", _tune), ("train", _train))
    ]


def _scores(results: Results) -> dict[tuple[str, str, int], Numbers]:
    """What was trained, by model, norm and batch size."""
    found = {}
    for name, numbers in results.items():
        kind, *case = name.split()
        if kind == "train" and "refused" not in numbers:
            found[case[0], case[1], int(case[2])] = numbers
    return found


def _difference(a: Sequence[float], b: Sequence[float]) -> Effect:
    return mean([x - y for x, y in zip(a, b, strict=True)], "points")


def _pairs(results: Results) -> Iterator[tuple[str, int, dict[str, Effect]]]:
    """Model, batch size, and the points by which other norms, and other ways of scoring it, are ahead of Batch Norm."""
    scores = _scores(results)
    for (model, norm, batch), found in scores.items():
        if norm == "batch_norm":
            others = {plots.NAMES[n]: scores.get((model, n, batch), {}).get("running") for n in NORMS[:2]}
            others |= {f"Batch Norm {how}": found.get(how) for how in ("in training mode", "re-estimated")}
            yield model, batch, {name: _difference(a, found["running"]) for name, a in others.items() if a}


def judge(results: Results) -> Finding:
    """Points by which Layer Norm is ahead of Batch Norm at batch 2 in the MLP, and everywhere else."""
    scores = _scores(results)
    behind = {(model, batch): found for model, batch, found in _pairs(results)}
    ln, bn = (mean(scores["mlp", norm, 2]["running"], "%") for norm in ("layer_norm", "batch_norm"))
    refused = results["train mlp batch_norm 1"].get("refused", "")
    lead = {case: found["Layer Norm"] for case, found in behind.items() if "Layer Norm" in found}
    return Finding(
        effect=lead["mlp", 2],
        batch_norm=f"MLP, batch 2: {bn} right" + ("; batch 1 is refused" if refused else ""),
        layer_norm=f"MLP, batch 2: {ln} right" + _at_one(results),
        sentences=[*_sentences(lead, refused), *_outside(results)],
        correction=_correction(results, lead),
        others={
            f"{model}, batch {batch}: {name} - Batch Norm": effect
            for (model, batch), found in behind.items()
            for name, effect in found.items()
            if (model, batch, name) != ("mlp", 2, "Layer Norm")
        },
    )


def _at_one(results: Results) -> str:
    one = results.get("train mlp layer_norm 1")
    return f"; batch 1: {mean(one['running'], '%')}" if one else ""


def _sentences(lead: dict[tuple[str, int], Effect], refused: str) -> list[str]:
    ahead = [f"{_named(*case)} ({-effect.value:.1f} points)" for case, effect in lead.items() if effect.high < 0]
    found = [f"Batch Norm is ahead of Layer Norm in the {', '.join(ahead)}"] if ahead else []
    return found + ([f"Batch Norm refuses the MLP at batch 1: {refused.rstrip('.')}"] if refused else [])


def _named(model: str, batch: int) -> str:
    return f"{model.upper()} at batch {batch}"


def _outside(results: Results) -> list[str]:
    ends = [name for name, found in results.items() if not found.get("inside", True)]
    return [f"the best learning rate lies at the end of the grid: {', '.join(ends)}"] if ends else []


def _correction(results: Results, lead: dict[tuple[str, int], Effect]) -> str:
    """A small batch of many values a channel does not hurt, if it does not."""
    scores = _scores(results)
    safe = [case for case, effect in lead.items() if case[1] <= 2 and effect.high < SMALLEST]
    if not safe:
        return ""
    fails = [case for case, effect in lead.items() if effect.low >= SMALLEST]

    def told(cases: list[tuple[str, int]]) -> str:
        values = {(model, batch): scores[model, "batch_norm", batch]["values"] for model, batch in cases}
        return ", ".join(f"{_named(*case)} ({values[case]} values: {lead[case]})" for case in cases)

    return (
        "what counts is how many values share a statistic, not the batch alone. Layer Norm is ahead by "
        f"{SMALLEST:g} point or more in the {told(fails)}; it is not in the {told(safe)}"
    )


def plot(figure: Figure, results: Results) -> None:
    """Accuracy by batch size, a panel for each model."""
    scores = _scores(results)
    axes = figure.subplots(1, 2, sharey=True)
    for ax, model in zip(axes, MODELS, strict=True):
        batches = sorted({batch for m, _, batch in scores if m == model}, reverse=True)
        ax.set_xscale("log", base=2)
        for i, norm in enumerate(NORMS):
            xs = [batch for batch in batches if (model, norm, batch) in scores]
            ys = [mean(scores[model, norm, batch]["running"], "%") for batch in xs]
            apart = 2 ** (0.15 * (1 - i))  # so that no interval covers another
            plots.curve(ax, [batch * apart for batch in xs], ys, norm, label="")
        ax.set_xticks(batches, [str(batch) for batch in batches])
        ax.set_xlim(1.5 * batches[0], batches[-1] / 1.5)
        ax.set_title(model.upper())
        ax.set_xlabel("batch size; equally many examples")
    axes[0].set_ylabel("test accuracy, %")
    plots.below(figure, axes[0], NORMS)


EXPERIMENT = Experiment(
    name="batch_size",
    aspect="Small batches, as people meet them",
    claim="Batch Norm is unstable with small batches.",
    contrast=Contrast("accuracy at batch 2 in an MLP, Layer Norm less Batch Norm, paired seeds", SMALLEST),
    method=__doc__,
    trials=trials,
    judge=judge,
    plot=plot,
    takes_data=True,
)
