"""Does Batch Norm let a causal model see the future?

Byte-level causal transformers (2 layers, width 64, sequences of 64 bytes of the standard library's source) are trained
with 8 sequences an update, and with one. Then the second half of each sequence of test files is replaced by that of
another place: in a causal model no prediction in the first half may move. What moves is measured in nats per byte, as
the mean of absolute changes, in training mode and in evaluation: with the second halves of all sequences replaced, and
of the sequence itself alone. If replacing them makes the first half's loss worse, the model uses what it sees. Adam, no
weight decay, equal updates (8 sequences 200, one 1,000, in the standard size), the same initial weights and order, the
learning rate tuned for each norm on validation files in evaluation mode, with seeds of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .. import plots
from ..experiment import Contrast, Experiment, Finding, Numbers, Plan, Results, Trial
from ..intervals import Effect, exact, mean
from ..language import LENGTH, Setting, drawn, nats, train, training_mode, tune

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HALF = LENGTH // 2
MANY, ONE = 8, 1
CASES = (("layer_norm", MANY), ("batch_norm", MANY), ("none", MANY), ("layer_norm", ONE), ("batch_norm", ONE))
GRID = (10**-2.5, 1e-2, 10**-1.5)


def _tune(setting: Setting, seeds: Sequence[int], _: Results) -> Numbers:
    return tune(setting, seeds, GRID)


def _train(setting: Setting, seeds: Sequence[int], batches: int, results: Results) -> Numbers:
    rate = results[f"tune {_name(setting)}"]["best"]
    model = train(setting, [(seed, rate) for seed in seeds])
    text = drawn("test", seeds, 2 * batches * setting.sequences)
    found = {"evaluation": _moved(model, text, setting.sequences)}
    with training_mode(model):
        found["training"] = _moved(model, text, setting.sequences)
    return found


def _name(setting: Setting) -> str:
    return f"{setting.norm} {setting.sequences}"


@torch.no_grad()
def _moved(model: nn.Module, text: Tensor, sequences: int) -> Numbers:
    """Means over each replicate's first halves: their loss, its change by other futures, and the absolute change."""
    kept, others = text.chunk(2)
    found: dict[str, list[Tensor]] = {"nats": [], "change": [], "moved": [], "moved by own": []}
    for batch, other in zip(kept.split(sequences), others.split(sequences), strict=True):
        # The first half predicts up to byte HALF, so what comes after that is the future.
        swapped = torch.cat([batch[..., : HALF + 1], other[..., HALF + 1 :]], dim=-1)
        before = nats(model, batch)[..., :HALF].double()
        change = nats(model, swapped)[..., :HALF].double() - before
        own = torch.stack([_of_own(model, batch, swapped, before, i) for i in range(sequences)]).mean(0)
        for name, costs in zip(found, (before, change, change.abs()), strict=False):
            found[name].append(costs.mean((1, 2)))
        found["moved by own"].append(own)
    return {name: torch.stack(values).mean(0).tolist() for name, values in found.items()}


def _of_own(model: nn.Module, batch: Tensor, swapped: Tensor, before: Tensor, i: int) -> Tensor:
    """How far one sequence's first half moves if its own future alone is another."""
    one = batch.clone()
    one[i] = swapped[i]
    return (nats(model, one)[:, i, :HALF].double() - before[:, i]).abs().mean(1)


def trials(plan: Plan) -> list[Trial]:
    """Each norm is tuned, trained and tested, with many sequences a batch and with one."""
    tuning = range(plan.seed_base + 900, plan.seed_base + 900 + plan.choose(1, 1, 3))
    done = []
    for norm, sequences in plan.choose(CASES[:2], CASES, CASES):
        setting = Setting(norm, plan.choose(20, 200, 1000) * (1 if sequences == MANY else 5), sequences)
        batches = plan.choose(2, 4, 8) * MANY // sequences
        weight = setting.updates * (sequences + 2)
        done += [
            Trial(f"tune {_name(setting)}", partial(_tune, setting, tuning), weight * len(GRID) * len(tuning)),
            Trial(
                f"train {_name(setting)}", partial(_train, setting, plan.seeds(), batches), weight * len(plan.seeds())
            ),
        ]
    return done


def judge(results: Results) -> Finding:
    """How far the future moves the past, in nats."""
    found = {name.removeprefix("train "): modes for name, modes in results.items() if name.startswith("train ")}
    moved = {f"{case}, {mode}": _interval(now["moved"]) for case, modes in found.items() for mode, now in modes.items()}
    bn, ln = (found[f"{norm} {MANY}"] for norm in ("batch_norm", "layer_norm"))
    others = moved | {
        f"{case}, training, its own future": _interval(modes["training"]["moved by own"])
        for case, modes in found.items()
        if case.startswith("batch_norm")
    }
    for case, modes in found.items():
        if case.startswith("batch_norm"):
            peer = found[f"layer_norm {case.split()[1]}"]
            others[f"{case}, loss by other futures"] = mean(modes["training"]["change"], "nats")
            for mode in modes:
                others[f"{case} - layer_norm, loss in {mode}"] = _less(modes[mode]["nats"], peer[mode]["nats"])
    training, evaluation = (moved[f"batch_norm {MANY}, {mode}"] for mode in ("training", "evaluation"))
    return Finding(
        effect=_less(bn["training"]["moved"], ln["training"]["moved"]),
        batch_norm=f"moves {training} in training, {evaluation.value:.2g} in evaluation",
        layer_norm=f"moves {moved[f'layer_norm {MANY}, training']}",
        correction="true in training; with running statistics no prediction moves" if not evaluation.high else "",
        sentences=[*_uses(others), *_ends(results)],
        others=others,
    )


def _uses(others: dict[str, Effect]) -> list[str]:
    """Whether the model makes use of what it sees, and what that looks like."""
    said = []
    for sequences in (MANY, ONE):
        used = others.get(f"batch_norm {sequences}, loss by other futures")
        if used:
            verb = "uses" if used.low > 0 else "is not shown to use"
            gaps = [others[f"batch_norm {sequences} - layer_norm, loss in {m}"] for m in ("training", "evaluation")]
            said.append(
                f"with {sequences} a batch, Batch Norm {verb} the future: another adds {used} to its loss; it "
                f"is {gaps[0]} beside Layer Norm in training mode, {gaps[1]} in evaluation"
            )
    return said


def _ends(results: Results) -> list[str]:
    return [
        f"the best learning rate lies at the end of the grid: {name}"
        for name, found in results.items()
        if name.startswith("tune ") and not found["inside"]
    ]


def _interval(values: Sequence[float]) -> Effect:
    return mean(values, "nats") if any(values) else exact(0, "nats")


def _less(a: Sequence[float], b: Sequence[float]) -> Effect:
    return mean([x - y for x, y in zip(a, b, strict=True)], "nats")


def plot(figure: Figure, results: Results) -> None:
    """Bars of what moves in training; in evaluation, Batch Norm's."""
    others = judge(results).others
    names = [n for n in others if "loss" not in n and ("training" in n or n == f"batch_norm {MANY}, evaluation")]
    names.sort(key=lambda name: (not name.startswith("batch_norm"), "evaluation" in name))
    axes = figure.subplots()
    plots.bars(axes, [_label(n) for n in names], [others[n] for n in names], [n.split()[0] for n in names])
    axes.tick_params(axis="y", labelsize=8)
    axes.set_xlabel("change of the first half's loss when the second half is another, nats a byte", x=0.3)


def _label(name: str) -> str:
    norm, sequences, mode = name.replace(",", "").split(" ", 2)
    ways = {"training": "", "evaluation": ", evaluation"}
    return f"{plots.NAMES[norm]}, {sequences} a batch{ways.get(mode, ', its own')}"


EXPERIMENT = Experiment(
    name="leak",
    aspect="Sequences: sees the future",
    claim="Batch Norm lets a causal model see the future; Layer Norm does not.",
    contrast=Contrast(
        f"absolute change of the first half's loss by other futures, in training mode with {MANY} sequences: Batch "
        "Norm less Layer Norm, paired seeds",
        0.01,
    ),
    method=__doc__,
    trials=trials,
    judge=judge,
    plot=plot,
)
