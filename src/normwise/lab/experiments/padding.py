"""Does padding change a normalized sequence?

Zeros are appended to 16 sequences of 64 tokens until they are 0 to 75 % of all positions, and the outputs at the tokens
that were there before are compared with those without zeros: of Batch Norm in training mode, alone and told by a mask
which positions count, and of Layer Norm. The change is the norm of the difference beside that of the outputs, in
percent. Compared too are the standard deviations that Batch Norm remembers for evaluation. The tokens are those that
enter the second block of a briefly trained byte-level transformer reading source text, and random ones with a mean and
a scale for each channel. The zeros stand where the norm reads them, as after an embedding with a padding index.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ... import nn as norms
from .. import plots
from ..experiment import Contrast, Experiment, Finding, Numbers, Plan, Results, Trial
from ..intervals import Effect, exact, mean
from ..language import LENGTH, WIDTH, Setting, drawn, train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHARES = (0, 25, 50, 75)
"""Of the positions that are padding, in percent."""
SEQUENCES = 16
CASES = ("batch_norm", "batch_norm masked", "layer_norm")
SOURCES = ("text", "random")


@torch.no_grad()
def _tokens(source: str, seeds: Sequence[int], updates: int) -> list[Tensor]:
    """(N, L, C) for each seed."""
    if source == "random":
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        means, scales = ([torch.randn(WIDTH, generator=g) for g in generators] for _ in range(2))
        values = [torch.randn(SEQUENCES, LENGTH, WIDTH, generator=g) for g in generators]
        return [m + s.exp() * x for m, s, x in zip(means, scales, values, strict=True)]
    with torch.enable_grad():
        model = train(Setting("layer_norm", updates, 4), [(seed, 1e-2) for seed in seeds])
    text = drawn("test", seeds, SEQUENCES)[..., :-1]
    return list(model.blocks[0](model.embed(text)).unflatten(0, (SEQUENCES, LENGTH)).permute(2, 0, 1, 3).contiguous())


@torch.no_grad()
def _normalized(case: str, x: Tensor, padding: int) -> tuple[Tensor, Tensor | None]:
    """The tokens' outputs (N, L, C) with so many zeros behind each sequence, and the running variances."""
    padded = nn.functional.pad(x, (0, 0, 0, padding))
    if case == "layer_norm":
        return norms.LayerNorm(WIDTH)(padded)[:, :LENGTH], None
    layer = norms.BatchNorm1d(WIDTH, momentum=None)
    mask = torch.arange(LENGTH + padding).expand(len(x), -1) < LENGTH if case.endswith("masked") else None
    y = layer(padded.transpose(1, 2), mask).transpose(1, 2)
    return y[:, :LENGTH], layer.running_var


def _compare(source: str, seeds: Sequence[int], updates: int, _: Results) -> Numbers:
    tokens = _tokens(source, seeds, updates)
    found: dict[str, Any] = {}
    for case in CASES:
        plain = [_normalized(case.removesuffix(" masked"), x, 0) for x in tokens]
        for share in SHARES:
            padding = LENGTH * share // (100 - share)
            padded = [_normalized(case, x, padding) for x in tokens]
            found[f"{case} {share}"] = {
                "change": [100 * _relative(y, y0) for (y, _), (y0, _) in zip(padded, plain, strict=True)],
                "other bits": [
                    100 * (y != y0).double().mean().item() for (y, _), (y0, _) in zip(padded, plain, strict=True)
                ],
            }
            if case != "layer_norm":
                found[f"{case} {share}"]["running"] = [
                    100 * _relative(v.sqrt(), v0.sqrt())
                    for (_, v), (_, v0) in zip(padded, plain, strict=True)
                    if v is not None and v0 is not None
                ]
    return found


def _relative(y: Tensor, y0: Tensor) -> float:
    return ((y.double() - y0.double()).norm() / y0.double().norm()).item()


def trials(plan: Plan) -> list[Trial]:
    """Both kinds of tokens, all shares of padding."""
    seeds, updates = plan.seeds(), plan.choose(20, 100, 300)
    return [
        Trial(source, partial(_compare, source, seeds, updates), weight)
        for source, weight in zip(SOURCES, (10, 1), strict=True)
    ]


def judge(results: Results) -> Finding:
    """What half of the positions being padding does."""
    text = results["text"]
    bn, ln = (text[f"{norm} 50"]["change"] for norm in ("batch_norm", "layer_norm"))
    masked, running, bits = (_worst(results, "batch_norm masked", what) for what in ("change", "running", "other bits"))
    others = {
        f"batch_norm {share}, {source}": mean(found[f"batch_norm {share}"]["change"], "%")
        for source, found in results.items()
        for share in SHARES[1:]
    }
    remembered = {
        f"running deviations, batch_norm 50, {source}": mean(found["batch_norm 50"]["running"], "%")
        for source, found in results.items()
    }
    told = f"with a mask at most {masked:.2g} %"
    return Finding(
        effect=mean([a - b for a, b in zip(bn, ln, strict=True)], "%"),
        batch_norm=f"{others['batch_norm 50, text']} changed by 50 % zeros, {told}",
        layer_norm=f"at most {_worst(results, 'layer_norm', 'change'):.2g} % changed",
        correction=f"only without a mask: {told} of outputs and {running:.2g} % of running deviations change, rounding"
        if max(masked, running) < ROUNDING
        else "",
        sentences=[
            f"with a mask at most {bits:.2g} % of the outputs have other bits; of Layer Norm's "
            f"{_worst(results, 'layer_norm', 'other bits'):.2g} %",
            f"what Batch Norm remembers is off by {remembered['running deviations, batch_norm 50, text']} at 50 %",
        ],
        others=others | remembered,
    )


ROUNDING = 1e-4
"""Percent of the outputs that sums in another order may move: 1e-6, a few roundings of float32."""


def _worst(results: Results, case: str, what: str) -> float:
    """The largest of all tokens, shares of padding and seeds: a promise holds everywhere or not at all."""
    return max(max(found[f"{case} {share}"][what]) for found in results.values() for share in SHARES)


def _interval(values: Sequence[float]) -> Effect:
    return mean(values, "%") if any(values) else exact(0, "%")


def plot(figure: Figure, results: Results) -> None:
    """Change by the share of padding."""
    axes = figure.subplots()
    undone = _worst(results, "batch_norm masked", "change") < 1
    labels = {
        ("batch_norm", "text"): "Batch Norm, text",
        ("batch_norm", "random"): "Batch Norm, random",
        ("batch_norm masked", "text"): "" if undone else "Batch Norm, mask",
        ("layer_norm", "text"): "Layer Norm, and\nBatch Norm with a mask" if undone else "Layer Norm",
    }
    for (case, source), label in labels.items():
        effects = [_interval(results[source][f"{case} {share}"]["change"]) for share in SHARES]
        plots.curve(axes, SHARES, effects, case.split()[0], label)
    axes.set_xticks(SHARES)
    axes.set_xlabel("positions that are padding, %")
    axes.set_ylabel("change of the tokens' outputs, %")
    axes.set_xlim(-3, 112)
    axes.margins(y=0.1)


EXPERIMENT = Experiment(
    name="padding",
    aspect="Sequences: padding",
    claim="Padding changes what Batch Norm makes of a sequence; Layer Norm does not see it.",
    contrast=Contrast(
        "change of the tokens' outputs when half of all positions are zeros, Batch Norm less Layer Norm, paired seeds",
        1.0,
    ),
    method=__doc__,
    trials=trials,
    judge=judge,
    plot=plot,
)
