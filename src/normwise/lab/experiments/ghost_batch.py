"""Is Batch Norm unstable because its batch is small, everything else equal?

An MLP (64, 128, 128, 10) learns the digits with updates of 64 examples always; only how many of them share Batch Norm's
mean and variance varies, from all 64 to 2 (ghost batches). So the number of updates, the examples per update and the
noise of the gradient are the same, and what differs is caused by the statistics. SGD, momentum 0.9, cosine, no weight
decay, 10 epochs; the learning rate is tuned for each case on validation data with seeds of their own; each seed is a
5-fold cross-validation over all 1,797 digits, with the same initial weights and order in all cases. Batch Norm is
scored with running statistics, with statistics of the training set under the final weights, and in training mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from .. import plots
from ..crossval import cross_validate, tune
from ..experiment import Contrast, Experiment, Finding, Numbers, Plan, Results, Trial
from ..intervals import Effect, mean
from ..replicates import FOLDS, digits, mlp

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BATCH = 64
GROUPS = (64, 32, 16, 8, 4, 2)
CASES = ("none", "layer_norm", *(f"batch_norm {group}" for group in GROUPS))
SMALL, LARGE = "batch_norm 2", "batch_norm 64"


def _fixed(case: str, epochs: int) -> dict[str, Any]:
    """What tuning and training of a case share."""
    norm, _, group = case.partition(" ")
    data = digits()
    return {
        "model": partial(mlp, norm, data=data, group=int(group) if group else None),
        "data": data,
        "batch": BATCH,
        "updates": epochs * (len(data.x) * (FOLDS - 2) // FOLDS // BATCH),
    }


def _tune(case: str, seeds: Sequence[int], epochs: int, _: Results) -> Numbers:
    return tune(seeds=seeds, **_fixed(case, epochs))


def _train(case: str, seeds: Sequence[int], epochs: int, results: Results) -> Numbers:
    group = int(case.partition(" ")[2] or BATCH)
    return cross_validate(seeds=seeds, rate=results[f"tune {case}"]["best"], group=group, **_fixed(case, epochs))


def trials(plan: Plan) -> list[Trial]:
    """Each case is tuned, then trained with the seeds that count, all at once."""
    epochs = plan.choose(3, 10, 10)
    tuning = range(plan.seed_base + 900, plan.seed_base + 900 + plan.choose(1, 2, 5))
    cases = plan.choose(("none", "layer_norm", LARGE, SMALL), CASES, CASES)
    return [
        Trial(f"{kind} {case}", partial(function, case, seeds, epochs))
        for case in cases
        for kind, function, seeds in (("tune", _tune, tuning), ("train", _train, plan.seeds()))
    ]


def judge(results: Results) -> Finding:
    """Points lost from one statistic for 64 examples to one for 2."""
    scores = {name.removeprefix("train "): found for name, found in results.items() if name.startswith("train ")}
    means = {case: mean(found["running"], "%") for case, found in scores.items()}
    effect = _difference(scores[LARGE]["running"], scores[SMALL]["running"])
    outside = [name for name, found in results.items() if name.startswith("tune ") and not found["inside"]]
    return Finding(
        effect=effect,
        batch_norm=f"{means[SMALL]} right with 2 examples a statistic, {means[LARGE]} with 64",
        layer_norm=f"{means['layer_norm']} right, one example a statistic",
        sentences=[f"the best learning rate lies at the end of the grid: {name}" for name in outside],
        others={
            **{
                f"64 - 2 examples, {how}": _difference(scores[LARGE][how], scores[SMALL][how])
                for how in ("re-estimated", "in training mode")
            },
            **{
                f"{LARGE} - {c}": _difference(scores[LARGE]["running"], scores[c]["running"])
                for c in scores
                if c != LARGE
            },
            **means,
        },
    )


def _difference(a: Sequence[float], b: Sequence[float]) -> Effect:
    return mean([x - y for x, y in zip(a, b, strict=True)], "points")


def plot(figure: Figure, results: Results) -> None:
    """Accuracy by examples a statistic."""
    means = judge(results).others
    cases = [case for case in means if case.startswith("batch_norm") and " - " not in case]
    groups = [int(case.split()[1]) for case in cases]
    axes = figure.subplots()
    axes.set_xscale("log", base=2)
    plots.curve(axes, groups[::-1], [means[case] for case in cases[::-1]], "batch_norm")
    for norm in ("layer_norm", "none"):
        plots.curve(axes, [min(groups), max(groups)], [means[norm]] * 2, norm)
    axes.set_xticks(groups, [str(group) for group in groups])
    axes.set_xlabel("examples that share Batch Norm's mean and variance; 64 in each update")
    axes.set_ylabel("digits right, %")
    axes.margins(x=0.2)


EXPERIMENT = Experiment(
    name="ghost_batch",
    aspect="Small batches, the cause",
    claim="Batch Norm is unstable with small batches.",
    contrast=Contrast("accuracy with 64 examples a statistic less that with 2, same updates, paired seeds", 1.0),
    method=__doc__,
    trials=trials,
    judge=judge,
    plot=plot,
)
