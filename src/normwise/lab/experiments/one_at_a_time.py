"""Does a norm work with one example, in inference and in training?

Inference: an example alone, and among others in batches of 2, 7 and 64; the bits of its output are compared: of the
norm, and of a model (linear, norm, ReLU, linear; and the same with 3 x 3 convolutions). Layer Norm, Batch Norm in
evaluation after three training steps, torch's own of both, and Batch Norm folded into the layer before it, which leaves
no norm. Training: the bits of y and dx of an example alone and in a batch of 7. A try fails where the norm refuses,
where a value is not finite, or where a bit differs. Layer Norm of an image is that of the whole sample. Latencies are
medians over calls, the kinds taken in turns, and told as ratios; no verdict rests on them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import fusion

from ... import nn as norms
from .. import plots
from ..experiment import Contrast, Experiment, Finding, Numbers, Plan, Results, Trial
from ..intervals import Effect, mean, share

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OTHERS = (2, 7, 64)
SHAPES = {"features": (256,), "image": (16, 14, 14)}
LIBRARIES = {"": norms, "torch ": nn}
NORMS = tuple(f"{library}{norm}" for library in LIBRARIES for norm in ("layer_norm", "batch_norm"))
MODELS = (*NORMS, "folded")
MOST = 1.0
"""Percent of examples that may fail where a norm works."""


def _layer(kind: str, shape: tuple[int, ...]) -> Any:
    """With weights that are not 1."""
    library, image = LIBRARIES["torch " if kind.startswith("torch") else ""], len(shape) > 1
    if kind.endswith("layer_norm"):
        layer = library.GroupNorm(1, shape[0]) if image else library.LayerNorm(shape[0])
    else:
        layer = (library.BatchNorm2d if image else library.BatchNorm1d)(shape[0])
    nn.init.uniform_(layer.weight, 0.5, 1.5)
    return layer


def _model(kind: str, shape: tuple[int, ...]) -> nn.Module:
    """A norm between two layers that keep the shape; folded, Batch Norm is gone."""
    image, size = len(shape) > 1, shape[0]
    first, last = (nn.Conv2d(size, size, 3, padding=1) if image else nn.Linear(size, size) for _ in range(2))
    norm = _layer("batch_norm" if kind == "folded" else kind, shape)
    model = _trained(nn.Sequential(first, norm, nn.ReLU(), last), shape)
    if kind == "folded":
        fold: Callable[..., nn.Module] = fusion.fuse_conv_bn_eval if image else fusion.fuse_linear_bn_eval
        model = nn.Sequential(fold(first, norm), nn.ReLU(), last)
    return model.requires_grad_(False)


def _drawn(size: int, shape: tuple[int, ...]) -> Tensor:
    return 3 + torch.randn(size, *shape)


def _trained(module: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """In evaluation, with running statistics of three batches."""
    for _ in range(3):
        module(_drawn(8, shape))
    return module.eval()


def _made(level: str, kind: str, shape: tuple[int, ...]) -> nn.Module:
    return _model(kind, shape) if level == "model" else _trained(_layer(kind, shape), shape)


def _inference(level: str, kind: str, seeds: Sequence[int], tries: int, _: Results) -> Numbers:
    found: Numbers = {shape: {str(size): 0 for size in OTHERS} for shape in SHAPES}
    for name, shape in SHAPES.items():
        for seed in seeds:
            torch.manual_seed(seed)
            module = _made(level, kind, shape)
            with torch.no_grad():
                for size in OTHERS * tries:
                    x = _drawn(size, shape)
                    found[name][str(size)] += _fails(module, x)
    return {"tries": tries * len(seeds), "failed": found}


def _fails(function: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    """Whether the first example alone is refused, not finite, or not what it is among the others."""
    try:
        alone = function(x[:1])
    except ValueError:
        return True
    return not (alone.isfinite().all() and torch.equal(alone, function(x)[:1]))


def _y_and_dx(layer: nn.Module, x: Tensor) -> Tensor:
    """Each example's, one beside the other; the cotangent is a function of x."""
    x = x.detach().requires_grad_()
    y = layer(x)
    (dx,) = torch.autograd.grad(y, x, x.detach().sin() + 0.5)
    return torch.stack([y.detach(), dx], dim=1)


def _training(kind: str, seeds: Sequence[int], tries: int, _: Results) -> Numbers:
    found: Numbers = {"tries": tries * len(seeds), "failed": {}, "refused": {}, "like instance_norm": {}}
    for name, shape in SHAPES.items():
        failed, refused, like = 0, 0, 0
        for seed in seeds:
            torch.manual_seed(seed)
            layer = _layer(kind, shape)
            for _try in range(tries):
                x = _drawn(7, shape)
                failed += _fails(partial(_y_and_dx, layer), x)
                try:
                    alone = layer(x[:1])
                except ValueError:
                    refused += 1
                    continue
                if len(shape) > 1:
                    other = nn.functional.instance_norm(x[:1], weight=layer.weight, bias=layer.bias)
                    like += torch.allclose(alone, other, atol=1e-5)
        found["failed"][name], found["refused"][name], found["like instance_norm"][name] = failed, refused, like
    return found


def _latency(level: str, kinds: Sequence[str], rounds: int, _: Results) -> Numbers:
    """Seconds a call by shape, batch size and kind, one for each round."""
    found: Numbers = {}
    for name, shape in SHAPES.items():
        modules = {kind: _made(level, kind, shape) for kind in kinds}
        for size in (1, *OTHERS):
            x = _drawn(size, shape)
            seconds = found.setdefault(name, {}).setdefault(str(size), {kind: [] for kind in kinds})
            for _round in range(rounds):
                for kind, module in modules.items():
                    seconds[kind].append(_seconds(module, x))
    return found


@torch.inference_mode()
def _seconds(module: nn.Module, x: Tensor, calls: int = 9) -> float:
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        module(x)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def trials(plan: Plan) -> list[Trial]:
    """Bits of norm and model, training, latencies."""
    seeds, tries, rounds = plan.seeds(), plan.choose(30, 50, 100), plan.choose(3, 30, 100)
    levels = {"norm": NORMS, "model": MODELS}
    return [
        *(
            Trial(f"{level}, {kind}", partial(_inference, level, kind, seeds, tries))
            for level, kinds in levels.items()
            for kind in kinds
        ),
        *(Trial(f"training, {kind}", partial(_training, kind, seeds, tries)) for kind in NORMS),
        *(Trial(f"latency, {level}", partial(_latency, level, kinds, rounds)) for level, kinds in levels.items()),
    ]


def _failed(found: Numbers) -> Effect:
    """Of all shapes and sizes."""
    counts = [n for of in found["failed"].values() for n in (of.values() if isinstance(of, dict) else [of])]
    return share(sum(counts), found["tries"] * len(counts))


def _ratio(results: Results, level: str, kind: str, other: str) -> Effect:
    """Of the latencies of one example, by round, a mean over both shapes."""
    of = [found["1"] for found in results[f"latency, {level}"].values()]
    ratios = [[a / b for a, b in zip(seconds[kind], seconds[other], strict=True)] for seconds in of]
    return mean([sum(round_) / len(round_) for round_ in zip(*ratios, strict=True)], "x")


def judge(results: Results) -> Finding:
    """Shares of examples that fail alone."""
    failed = {name: _failed(found) for name, found in results.items() if "failed" in found}
    ln, bn, training = (failed[name] for name in ("norm, layer_norm", "norm, batch_norm", "training, batch_norm"))
    refused = {shape: share(n, results["training, batch_norm"]["tries"]) for shape, n in
               results["training, batch_norm"]["refused"].items()}  # fmt: skip
    return Finding(
        effect=ln,
        batch_norm=f"{bn} fail in evaluation; training refuses {refused['features'].value:g} % of rows",
        layer_norm=f"{ln} fail, {failed['training, layer_norm'].value:g} % in training",
        correction=f"so does Batch Norm in evaluation ({bn} fail); in training {training} are refused or change bits"
        if bn.high < MOST <= training.low
        else "",
        sentences=_sentences(results, failed, refused),
        others={name: effect for name, effect in failed.items() if name != "norm, layer_norm"},
    )


def _sentences(results: Results, failed: dict[str, Effect], refused: dict[str, Effect]) -> list[str]:
    bn = results["training, batch_norm"]
    like = share(bn["like instance_norm"]["image"], bn["tries"])
    return [
        f"Batch Norm refuses to train on {refused['features']} of single examples with one value a channel, and on "
        f"{refused['image']} of single images, of which {like} are normalized as by Instance Norm",
        f"a model's products change bits with the batch size: {failed['model, layer_norm']} of outputs with Layer "
        f"Norm, {failed['model, batch_norm']} with Batch Norm, {failed['model, folded']} with it folded",
        "latency of one example, of the norm: "
        + ", ".join(
            f"{plots.NAMES[norm]} {_ratio(results, 'norm', norm, f'torch {norm}')} torch's"
            for norm in ("layer_norm", "batch_norm")
        ),
        "latency of one example, of the model with no norm left: "
        + ", ".join(f"{_ratio(results, 'model', 'folded', norm)} that with {norm}" for norm in NORMS),
    ]


def plot(figure: Figure, results: Results) -> None:
    """Bars of the failures."""
    finding = judge(results)
    names = {
        "norm, layer_norm": "Layer Norm, inference",
        "norm, batch_norm": "Batch Norm, inference",
        "training, layer_norm": "Layer Norm, training",
        "training, batch_norm": "Batch Norm, training",
        "model, layer_norm": "model with Layer Norm",
        "model, batch_norm": "model with Batch Norm",
        "model, folded": "model, Batch Norm folded",
    }
    effects = {"norm, layer_norm": finding.effect, **finding.others}
    axes = figure.subplots()
    colors = ["other" if name.endswith("folded") else name.split(", ")[1] for name in names]
    plots.bars(axes, list(names.values()), [effects[name] for name in names], colors)
    axes.set_xlim(0, 150)
    axes.set_xticks(range(0, 101, 25))
    axes.set_xlabel("examples refused alone, or with other bits than in a batch, %")


EXPERIMENT = Experiment(
    name="one_at_a_time",
    aspect="Inference, one example",
    claim="Layer Norm works with one example.",
    contrast=Contrast("Layer Norm: examples that fail alone or have other bits than in a batch", MOST, equal=True),
    method=__doc__,
    trials=trials,
    judge=judge,
    plot=plot,
)
