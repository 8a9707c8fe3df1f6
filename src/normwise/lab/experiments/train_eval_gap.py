"""Why does a network with Batch Norm compute something else in evaluation than in training?

An MLP (64, 128, 128, 10) learns the digits with batches of 4 or of 64 (10 epochs: equal examples; SGD, momentum 0.9,
cosine, no weight decay; the rate tuned for each norm and batch on validation data with seeds of their own; 5-fold
cross-validation, same initial weights and order for every norm). Then the test images, in batches of the same size, are
classified in both modes. Four things differ between them, and each is switched on its own: the running statistics give
way to those of the training set under the final weights (lag), these to those of the test set (shift), these to each
batch's own (noise), and the variance is divided by n instead of n - 1 (bias). All 16 combinations are evaluated, and
the gap, accuracy in training mode less that in evaluation, is shared out by Shapley's values; what they leave of the
gap between the library's own modes is the remainder. Causes planted by hand into the networks of batch 64 (running
means moved, test images of lower contrast, batches of 4 in training mode) show whether they are found.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .. import plots
from ..crossval import batch_norms, tune
from ..data import FOLDS, Data, digits
from ..experiment import Contrast, Experiment, Finding, Numbers, Plan, Results, Trial
from ..intervals import Effect, mean
from ..replicates import GRID, NORMS, Setting, mlp, train
from ..switched import CAUSES, mixed, population, shapley, subsets

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SMALL, LARGE = 4, 64
PLANTED = {"moved running means": "lag", "lower contrast": "shift", f"batches of {SMALL}": "noise"}


def _updates(batch: int, epochs: int) -> int:
    return epochs * (len(digits().x) * (FOLDS - 2) // FOLDS // batch)


def _tune(norm: str, batch: int, seeds: Sequence[int], grid: Sequence[float], epochs: int, _: Results) -> Numbers:
    data = digits()
    updates = _updates(batch, epochs)
    return tune(partial(mlp, norm, data=data), data, seeds, batch=batch, updates=updates, grid=grid)


@torch.no_grad()
def _scores(model: nn.Module, data: Data, splits: Sequence[Sequence[Tensor]], batch: int) -> dict[str, list[float]]:
    """Each replicate's accuracy in both modes, the share of predictions that change, and that of each mixture."""
    train_parts, parts = splits
    count = math.ceil(max(map(len, parts)) / batch) * batch
    rows = torch.stack([part.repeat(2)[:count] for part in parts], 1)
    x, truth = data.x[rows].flatten(1), data.y[rows]

    def right(predicted: Tensor, wanted: Tensor) -> list[float]:
        hits = predicted == wanted
        return [100 * hits[: len(part), r].double().mean().item() for r, part in enumerate(parts)]

    def in_batches(mode: nn.Module) -> Tensor:
        return torch.cat([mode(chunk).view(len(chunk), len(parts), -1).argmax(-1) for chunk in x.split(batch)])

    evaluation, training = in_batches(model), in_batches(copy.deepcopy(model).train())
    found = {"evaluation": right(evaluation, truth), "training": right(training, truth)}
    found["changed"] = [100 - same for same in right(evaluation, training)]
    norms = batch_norms(model)
    if norms:
        running = [(layer.running_mean, layer.running_var) for layer in norms]
        seen = population(model, torch.stack([data.x[part] for part in train_parts], 1).flatten(1))
        fixed = running, seen
        for on in subsets():
            logits = mixed(model, x, fixed, on, batch)  # type: ignore[arg-type]
            found[f"with {on}"] = right(logits.view(count, len(parts), -1).argmax(-1), truth)
    return found


def _train(norm: str, batch: int, seeds: Sequence[int], epochs: int, results: Results) -> Numbers:
    data = digits()
    rate = results[f"tune {norm} {batch}"]["best"]
    runs = [(seed, fold, rate) for seed in seeds for fold in range(FOLDS)]
    model, splits = train(Setting(partial(mlp, norm, data=data), runs, batch, _updates(batch, epochs)), data)
    parts = [split.train for split in splits], [split.test for split in splits]
    found = {"": _scores(model, data, parts, batch)}
    if norm == "batch_norm" and batch == LARGE:
        found |= _planted(model, data, parts)
    return {
        planted: {what: [sum(a[i : i + FOLDS]) / FOLDS for i in range(0, len(a), FOLDS)] for what, a in scores.items()}
        for planted, scores in found.items()
    }


def _planted(model: nn.Module, data: Data, parts: Sequence[Sequence[Tensor]]) -> dict[str, dict[str, list[float]]]:
    """The same networks with a cause more."""
    moved, noisy = copy.deepcopy(model), torch.Generator().manual_seed(0)
    for layer in batch_norms(moved):
        if layer.running_mean is not None and layer.running_var is not None:
            layer.running_mean += layer.running_var.sqrt() * torch.randn(layer.num_features, generator=noisy)
    train_parts, tests = parts
    dimmed = Data(torch.cat([data.x, 0.3 + 0.5 * data.x]), data.y.repeat(2))
    dim_tests = [part + len(data.x) for part in tests]
    cases = (moved, data, parts, LARGE), (model, dimmed, (train_parts, dim_tests), LARGE), (model, data, parts, SMALL)
    return {name: _scores(*case) for name, case in zip(PLANTED, cases, strict=True)}


def trials(plan: Plan) -> list[Trial]:
    """Each norm and batch is tuned, then trained; a smoke test takes the small batch, and Batch Norm's large one."""
    epochs, grid = plan.choose(1, 10, 10), plan.choose(GRID[2:5], GRID[:-2], GRID[:-2])
    tuning = range(plan.seed_base + 900, plan.seed_base + 900 + plan.choose(1, 1, 3))
    cases = [(norm, batch) for batch in (SMALL, LARGE) for norm in NORMS]
    if plan.size == "smoke":
        cases = [("layer_norm", SMALL), ("batch_norm", SMALL), ("batch_norm", LARGE)]
    return [
        Trial(f"{kind} {norm} {batch}", run, weight=1 / batch)
        for norm, batch in cases
        for kind, run in (
            ("tune", partial(_tune, norm, batch, tuning, grid, epochs)),
            ("train", partial(_train, norm, batch, plan.seeds(smoke=2), epochs)),
        )
    ]


def _shares(numbers: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """Shapley's values and the remainder, in points, by seed."""
    shares = shapley({what[5:]: a for what, a in numbers.items() if what.startswith("with ")})
    gap = _gap(numbers)
    return shares | {"remainder": [g - sum(found) for g, *found in zip(gap, *shares.values(), strict=True)]}


def _gap(numbers: Mapping[str, Sequence[float]]) -> list[float]:
    return [a - b for a, b in zip(numbers["training"], numbers["evaluation"], strict=True)]


def judge(results: Results) -> Finding:
    """Predictions that change with the mode, and what the gap in accuracy consists of."""
    small, large, layer = (
        results[f"train {case}"][""] for case in (f"batch_norm {SMALL}", f"batch_norm {LARGE}", f"layer_norm {SMALL}")
    )
    changed, of_layer, of_large = (mean(found["changed"], "%") for found in (small, layer, large))
    others: dict[str, Effect] = {f"predictions that change, batch {LARGE}": of_large}
    sentences = []
    for batch, found in ((SMALL, small), (LARGE, large)):
        parts = _shares(found)
        rest = parts.pop("remainder")
        shares = {cause: mean(share, "points") for cause, share in parts.items()}
        others[f"gap, batch {batch}"] = mean(_gap(found), "points")
        others |= {f"{cause}, batch {batch}": share for cause, share in shares.items()}
        evaluation, training = (mean(found[mode], "%") for mode in ("evaluation", "training"))
        listed = ", ".join(f"{cause} {share}" for cause, share in shares.items())
        sentences.append(
            f"batch {batch}: {training} right in training mode, {evaluation} in evaluation; the gap: {listed}, "
            f"remainder {max(map(abs, rest)):.0e} at most"
        )
    before = _shares(large)
    for name, cause in PLANTED.items():
        planted = results[f"train batch_norm {LARGE}"][name]
        more = {c: mean(_less(a, before[c]), "points") for c, a in _shares(planted).items()}
        gap = mean(_less(_gap(planted), _gap(large)), "points")
        largest = max(more, key=lambda c: abs(more[c].value))
        found_it = "found" if largest == cause else f"taken for {largest} {more[largest]}"
        sentences.append(f"planted, {name}: the gap moves by {gap}, of that {cause} {more[cause]}: {found_it}")
    sentences += [f"the best learning rate lies at the end of the grid: {n}" for n, f in results.items() if _end(f)]
    return Finding(
        effect=mean(_less(small["changed"], layer["changed"]), "points"),
        batch_norm=f"{changed} of predictions change, batch {SMALL}; {of_large}, {LARGE}",
        layer_norm=f"{of_layer} of predictions change, batch {SMALL}",
        sentences=sentences,
        correction=f"of small batches only: {changed} of predictions change at batch {SMALL}, {of_large} at {LARGE}"
        if of_large.high < EXPERIMENT.contrast.smallest
        else "",
        others=others,
    )


def _end(numbers: Numbers) -> bool:
    return not numbers.get("inside", True)


def _less(a: Sequence[float], b: Sequence[float]) -> list[float]:
    return [x - y for x, y in zip(a, b, strict=True)]


def plot(figure: Figure, results: Results) -> None:
    """Shapley's values at both batch sizes."""
    others = judge(results).others
    axes = figure.subplots()
    rows = [(cause, batch) for cause in ("gap", *CAUSES) for batch in (SMALL, LARGE)]
    labels = [CAUSES.get(cause, "the gap") if batch == SMALL else "" for cause, batch in rows]
    colors = {SMALL: "batch_norm", LARGE: "light"}
    effects = [others[f"{cause}, batch {batch}"] for cause, batch in rows]
    plots.bars(axes, labels, effects, [colors[batch] for _, batch in rows])
    for row, batch in enumerate(colors):
        axes.annotate(
            f"batch {batch}", (0.02, 0.5 - 0.07 * row), xycoords="axes fraction", color=plots.COLORS[colors[batch]]
        )
    axes.axvline(0, color="black", linewidth=0.5)
    axes.locator_params(axis="x", nbins=6)
    axes.set_xlabel("accuracy in training mode less that in evaluation, points")


EXPERIMENT = Experiment(
    name="train_eval_gap",
    aspect="Training against evaluation",
    claim="Batch Norm behaves differently in training and in evaluation; Layer Norm does not.",
    contrast=Contrast("test predictions that change with the mode, Batch Norm less Layer Norm, batch 4", 1.0),
    method=__doc__,
    trials=trials,
    judge=judge,
    plot=plot,
)
