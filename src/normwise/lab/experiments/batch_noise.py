"""How noisy are the mean and variance of a batch, and does the formula say it?

Of N independent values with variance σ² and excess kurtosis κ the mean has the standard deviation σ/√N, and the
unbiased variance σ²√(2/(N-1) + κ/N). Batches of 2 to 256 are drawn, with replacement, from normal values and from the
hidden activations of digits classifiers with Batch Norm (an MLP with 128 and 128 features, a CNN with 16 channels of
8 x 8 and 32 of 4 x 4; 10 epochs, learning rate 0.1: no model is compared), and the mean and variance that Batch Norm
remembers of each (momentum 1) are held against the formula, with σ² and κ of all examples. The pixels of a channel are
not independent: the mean's noise tells as how many independent values an example counts, first of all for normal images
of which that is known. Last, one example's y is followed while its neighbours are drawn anew. Each channel has batches
of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ... import functional
from .. import plots
from ..activations import activations
from ..experiment import Contrast, Experiment, Finding, Numbers, Plan, Results, Trial
from ..intervals import Effect, mean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZES = (2, 4, 8, 16, 32, 64, 128, 256)
ROWS = ("normal", "MLP 1", "MLP 2")
PIXELS = ("smooth", "CNN 1", "CNN 2")
ALIKE = 0.8
"""The correlation of adjoining pixels of the smooth images."""


def _drawn(pool: Tensor, size: int, values: int, generator: torch.Generator) -> Tensor:
    """Batches of examples of a pool (M, C, ...), each channel's drawn by itself: (size, batches, C, ...)."""
    examples, channels = pool.shape[:2]
    batches = max(2, values // (size * pool[0].numel()) // 2 * 2)
    index = torch.randint(examples, (size, batches, channels), generator=generator)
    return pool[index, torch.arange(channels)]


def _statistics(batches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of each batch, (batches, C), as Batch Norm remembers them."""
    x = batches.flatten(1, 2)
    running = torch.zeros(2, x.shape[1])
    functional.batch_norm(x, running[0], running[1], training=True, momentum=1.0)
    found = running.view(2, *batches.shape[1:3]).double()
    return found[0], found[1]


def _noise(pool: Tensor, sizes: Sequence[int], values: int, generator: torch.Generator) -> Numbers:
    """For each size the standard deviations, relative to σ and σ², root mean squares over channels."""
    every = pool.transpose(0, 1).flatten(1).double()
    mu, var = every.mean(1), every.var(1, correction=0)
    kurtosis = (every - mu[:, None]).pow(4).mean(1) / var**2 - 3
    found: Numbers = {}
    for size in sizes:
        means, variances = _statistics(_drawn(pool, size, values, generator))
        count = size * pool[0, 0].numel()
        squares = {
            "mean": (means - mu) ** 2 / var,
            "var": (variances / var - 1) ** 2,
            "mean, formula": torch.tensor(1 / count),
            "var, formula": 2 / (count - 1) + kurtosis / count,
        }
        found[str(size)] = {what: math.sqrt(square.mean().item()) for what, square in squares.items()}
    return found


def _pools(source: str, seeds: Sequence[int], epochs: int) -> tuple[list[Tensor], Numbers]:
    """One pool (M, C, ...) for each seed, and what is to be known of them."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    if source == "normal":
        return [torch.randn(2000, 64, generator=generator) for generator in generators], {}
    if source == "smooth":
        alike = ALIKE ** (torch.arange(8.0)[:, None] - torch.arange(8.0)).abs()
        root = torch.linalg.cholesky(alike)
        known = {"counts": (64 / alike.sum().item()) ** 2}
        return [root @ torch.randn(2000, 16, 8, 8, generator=generator) @ root.T for generator in generators], known
    kind, layer = source.split()
    layers, right = activations(kind, "batch_norm", seeds, epochs)
    return list(layers[int(layer) - 1].unbind(1)), {"accuracy": right}


def _of_source(
    source: str, seeds: Sequence[int], epochs: int, values: int, sizes: Sequence[int], _: Results
) -> Numbers:
    pools, found = _pools(source, seeds, epochs)
    noises = [
        _noise(pool, sizes, values, torch.Generator().manual_seed(seed))
        for seed, pool in zip(seeds, pools, strict=True)
    ]
    found["pixels"] = pools[0][0, 0].numel()
    found["sizes"] = {
        str(size): {what: [noise[str(size)][what] for noise in noises] for what in noises[0][str(size)]}
        for size in sizes
    }
    return found


def _moved(y: Tensor) -> float:
    """Standard deviation of the first example's y over batches, (N, batches, C), root mean square over all."""
    first = y[0].double()
    return math.sqrt(((first[::2] - first[1::2]) ** 2 / 2).mean().item())


def _neighbours(seeds: Sequence[int], epochs: int, values: int, sizes: Sequence[int], _: Results) -> Numbers:
    found: Numbers = {norm: {str(size): [] for size in sizes} for norm in ("batch_norm", "layer_norm")}
    for seed, pool in zip(seeds, _pools("MLP 2", seeds, epochs)[0], strict=True):
        generator = torch.Generator().manual_seed(seed)
        for size in sizes:
            x = _drawn(pool, size, values, generator)
            x[0] = pool[seed % len(pool)]
            y = functional.batch_norm(x.flatten(1), None, None, training=True).view_as(x)
            found["batch_norm"][str(size)].append(_moved(y))
            # An example's row is the same in all batches: the batches are laid one after the other.
            y = functional.layer_norm(x.transpose(0, 1).flatten(0, 1), x.shape[-1:])
            found["layer_norm"][str(size)].append(_moved(y.view(x.shape[1], size, -1).transpose(0, 1)))
    return found


def trials(plan: Plan) -> list[Trial]:
    """Each source, then an example among its neighbours."""
    seeds, epochs = plan.seeds(), plan.choose(2, 10, 10)
    values, sizes = plan.choose(2**19, 2**20, 2**22), plan.choose((2, 16, 256), SIZES, SIZES)
    few = [size for size in sizes if size <= 64]
    return [
        *(
            Trial(source, partial(_of_source, source, seeds, epochs, values, sizes if source in ROWS else few))
            for source in (*ROWS, *PIXELS)
        ),
        Trial("neighbours", partial(_neighbours, seeds, epochs, values, sizes)),
    ]


def _off(results: Results) -> Effect:
    """A seed's largest distance between measured and predicted noise, of mean and variance, without pixels."""
    rows = [
        [100 * abs(a / b - 1) for a, b in zip(at[what], at[f"{what}, formula"], strict=True)]
        for source in ROWS
        for at in results[source]["sizes"].values()
        for what in ("mean", "var")
    ]
    return mean([max(seed) for seed in zip(*rows, strict=True)], "%")


def _percent(values: Sequence[float]) -> Effect:
    return mean([100 * value for value in values], "%")


def _counts(found: Numbers) -> Effect:
    """As how many independent values an example counts, by the mean's noise; over sizes and then seeds."""
    sizes = found["sizes"]
    rows = [[int(size) * sd * sd for sd in at["mean"]] for size, at in sizes.items()]
    return mean([len(seed) / sum(seed) for seed in zip(*rows, strict=True)], "values")


def _noisier(found: Numbers) -> Effect:
    """The variance's noise over that of as many independent values; over sizes and then seeds."""
    rows = [[a / b for a, b in zip(at["var"], at["var, formula"], strict=True)] for at in found["sizes"].values()]
    return mean([sum(seed) / len(seed) for seed in zip(*rows, strict=True)], "x")


def judge(results: Results) -> Finding:
    """How far the formula is off, and what it says."""
    small, large = min(results["MLP 2"]["sizes"], key=int), max(results["MLP 2"]["sizes"], key=int)
    noise = {size: _percent(results["MLP 2"]["sizes"][size]["var"]) for size in (small, large)}
    still = _percent(results["neighbours"]["layer_norm"][small])
    moved = _percent(results["neighbours"]["batch_norm"][small])
    counts = {source: _counts(results[source]) for source in PIXELS}
    noisier = {source: _noisier(results[source]) for source in PIXELS}
    known = results["smooth"]["counts"]
    return Finding(
        effect=_off(results),
        batch_norm=f"variance off by {noise[small]} in batches of {small}, {noise[large]} of {large}",
        layer_norm=f"an example's y moves by {still} with other neighbours",
        sentences=[
            f"with other neighbours in its batch of {small} an example's y moves by {moved} of its standard deviation, "
            "Batch Norm in training",
            *(
                f"{source}: the {results[source]['pixels']} pixels of a channel count as {count} in a batch's mean"
                + (f" ({known:.3g} by construction)" if source == "smooth" else "")
                + f"; its variance is {noisier[source]} as noisy as of as many independent values"
                for source, count in counts.items()
            ),
        ],
        others={
            **{
                f"{source}, sd of the variance at {size}": _percent(at["var"])
                for source in (*ROWS, *PIXELS)
                for size, at in results[source]["sizes"].items()
            },
            **{f"{source}, independent values an example": count for source, count in counts.items()},
            **{f"{source}, noise of the variance to the formula's": ratio for source, ratio in noisier.items()},
            f"an example's y, Batch Norm at {small}": moved,
            f"an example's y, Layer Norm at {small}": still,
        },
    )


def plot(figure: Figure, results: Results) -> None:
    """Noise by batch size, with the formula."""
    axes = figure.subplots()
    for source, color, label in (
        ("MLP 2", "batch_norm", "MLP"),
        ("smooth", "light", "smooth images"),
        ("CNN 1", "other", "CNN"),
    ):
        found = results[source]["sizes"]
        sizes = [int(size) for size in found]
        plots.curve(axes, sizes, [_percent(at["var"]) for at in found.values()], color, label)
        formula = [_percent(at["var, formula"]).value for at in found.values()]
        axes.plot(sizes, formula, color="black", linestyle=":", linewidth=1, zorder=3)
    axes.annotate("dotted: the formula for independent values", (0.02, 0.03), xycoords="axes fraction")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = [int(size) for size in results["MLP 2"]["sizes"]]
    axes.set_xticks(ticks, [str(size) for size in ticks])
    axes.set_yticks([1, 3, 10, 30, 100, 300], ["1", "3", "10", "30", "100", "300"])
    axes.minorticks_off()
    axes.set_xlabel("examples in the batch")
    axes.set_ylabel("noise of a batch's variance, %")
    axes.margins(x=0.15)


EXPERIMENT = Experiment(
    name="batch_noise",
    aspect="Noise of the statistics",
    claim="The batch statistics of small batches are noisy.",
    contrast=Contrast(
        "noise of a batch's mean and variance, largest distance from the formula, normal values and MLP",
        10.0,
        equal=True,
    ),
    method=__doc__,
    trials=trials,
    judge=judge,
    plot=plot,
)
