"""Does the arithmetic of a norm stay right when activations drift off zero?

Inputs have standard deviation 1 and a mean of 0, 100, 10⁴ and 10⁶ times that (0, 10 and 100 in bfloat16, which holds no
more); five norms, rows (N, C) and images in both memory layouts, normwise's function and torch's own. Their y, dx and
dweight are compared with torch's float64 on the same inputs, in the order of memory that it computes stably: relative
L2 error, with weights from U(0.5, 1.5), biases from N(0, 1), a cotangent from N(0.5, 1). Digits are -log10 of the
error: float32 holds 7.2, bfloat16 2.7, and 0 digits are an error as large as the result. A seed's worst norm, layout
and mean count; the interval is over seeds, each with inputs of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ... import functional
from .. import plots
from ..experiment import Contrast, Experiment, Finding, Numbers, Plan, Results, Trial
from ..intervals import Effect, mean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RATIOS = {"float32": (0.0, 1e2, 1e4, 1e6), "bfloat16": (0.0, 1e1, 1e2)}
IMAGES = ("NCHW", "channels_last")
LAYOUTS = {
    "batch_norm": ("rows", *IMAGES),
    "layer_norm": ("rows", *IMAGES),
    "rms_norm": ("rows", *IMAGES),
    "group_norm": IMAGES,
    "instance_norm": IMAGES,
}
LIBRARIES = {"normwise": functional, "torch": F}
RESULTS = ("y", "dx", "dweight")
ENOUGH = -math.log10(2e-7)
"""Of the 7.2 digits of float32: three roundings to the nearest, one after the other, may take the rest."""


def _over_channels(function: Callable[..., Tensor], x: Tensor, *rest: Any) -> Tensor:
    """Of the last axis of rows, of each pixel of images."""
    if x.dim() == 2:
        return function(x, x.shape[1:], *rest)
    return function(x.permute(0, 2, 3, 1), x.shape[1:2], *rest).permute(0, 3, 1, 2)


NORMS: dict[str, Callable[..., Tensor]] = {
    "batch_norm": lambda f, x, w, b: f.batch_norm(x, None, None, w, b, training=True),
    "layer_norm": lambda f, x, w, b: _over_channels(f.layer_norm, x, w, b),
    "rms_norm": lambda f, x, w, b: _over_channels(f.rms_norm, x, w, 1e-5),
    "group_norm": lambda f, x, w, b: f.group_norm(x, 8, w, b),
    "instance_norm": lambda f, x, w, b: f.instance_norm(x, None, None, w, b),
}


def _found(norm: str, library: Any, dy: Tensor, *arguments: Tensor) -> list[Tensor]:
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in arguments]
    y = NORMS[norm](library, *leaves)
    y.backward(dy)
    return [t.double() for t in (y.detach(), leaves[0].grad, leaves[1].grad) if t is not None]


def _drawn(layout: str, shape: tuple[int, ...], ratio: float, dtype: torch.dtype) -> list[Tensor]:
    """The cotangent dy, x, weight and bias."""
    dy, x = torch.randn(shape, dtype=torch.float64) + 0.5, torch.randn(shape, dtype=torch.float64) + ratio
    tensors = [dy, x, torch.rand(shape[1]) + 0.5, torch.randn(shape[1])]
    form = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    return [t.to(dtype, memory_format=form) if t.dim() > 1 else t.to(dtype) for t in tensors]


def _errors(norm: str, layout: str, shape: tuple[int, ...], seeds: Sequence[int], _: Results) -> Numbers:
    found: Numbers = {}
    for name, ratios in RATIOS.items():
        for ratio in ratios:
            cell = found[f"{name} {ratio:g}"] = {library: {what: [] for what in RESULTS} for library in LIBRARIES}
            for seed in seeds:
                torch.manual_seed(seed)
                drawn = _drawn(layout, shape, ratio, getattr(torch, name))
                # In channels_last torch takes E[x²] - E[x]², wrong even in float64.
                truth = _found(norm, F, *(t.double().contiguous() for t in drawn))
                for library, module in LIBRARIES.items():
                    for what, value, exact in zip(RESULTS, _found(norm, module, *drawn), truth, strict=True):
                        error = ((value - exact).norm() / exact.norm()).item()
                        cell[library][what].append(error if math.isfinite(error) else None)
    return found


def trials(plan: Plan) -> list[Trial]:
    """Each norm in each layout."""
    seeds = plan.seeds()
    rows, image = plan.choose(
        ((128, 96), (4, 16, 14, 14)), ((512, 384), (8, 32, 28, 28)), ((4096, 768), (16, 64, 56, 56))
    )
    return [
        Trial(f"{norm}, {layout}", partial(_errors, norm, layout, rows if layout == "rows" else image, seeds))
        for norm, layouts in LAYOUTS.items()
        for layout in layouts
    ]


def _digits(error: float | None) -> float:
    """None is an error that is not finite."""
    return 0.0 if error is None else min(16.0, max(0.0, -math.log10(error or 1e-16)))


def _worst(
    results: Results, library: str, what: str = "y", case: str = "", inputs: Callable[[str], bool] | None = None
) -> Effect:
    """Digits of the worst of the cases whose names begin so, and of these inputs; a mean over seeds."""
    chosen = inputs or (lambda name: name.startswith("float32"))
    rows = [
        [_digits(error) for error in cell[library][what]]
        for name, found in results.items()
        for cell_name, cell in found.items()
        if name.startswith(case) and chosen(cell_name)
    ]
    return mean([min(seed) for seed in zip(*rows, strict=True)], "digits")


def _short(ratio: float) -> str:
    return f"{ratio:.0e}".replace("e+0", "e") if ratio >= 1e4 else f"{ratio:g}"


def _enough(results: Results, norm: str) -> str:
    """Up to which mean over standard deviation torch's y has the digits."""
    last = "at no mean"
    for ratio in RATIOS["float32"]:
        if _worst(results, "torch", case=norm, inputs=f"float32 {ratio:g}".__eq__).value < ENOUGH:
            break
        last = f"to {_short(ratio)}"
    return f"{last} ({norm})"


def _cell(results: Results, norm: str) -> str:
    theirs = replace(_worst(results, "torch", case=norm), unit="")
    return f"y right to {_worst(results, 'normwise', case=norm)}, torch's {theirs}"


def judge(results: Results) -> Finding:
    """Digits of the worst y of all."""
    effect, theirs = _worst(results, "normwise"), _worst(results, "torch")
    at_zero = _worst(results, "torch", inputs="float32 0".__eq__)
    half = lambda name: name.startswith("bfloat16")  # noqa: E731
    return Finding(
        effect=effect,
        batch_norm=_cell(results, "batch_norm"),
        layer_norm=_cell(results, "layer_norm"),
        correction=f"true of the formula; the arithmetic must be built for it: torch's own y has {at_zero} at mean 0 "
        f"and {theirs} at worst, normwise's {effect}"
        if theirs.high < ENOUGH
        else "",
        sentences=[
            f"torch's own y keeps {ENOUGH:.1f} digits up to a mean / standard deviation of: "
            + ", ".join(_enough(results, norm) for norm in LAYOUTS)
        ],
        others={
            **{f"{what}, normwise": _worst(results, "normwise", what) for what in RESULTS[1:]},
            **{f"{what}, torch": _worst(results, "torch", what) for what in RESULTS},
            **{
                f"{what}, {library}, bfloat16": _worst(results, library, what, inputs=half)
                for what in RESULTS
                for library in LIBRARIES
            },
        },
    )


def plot(figure: Figure, results: Results) -> None:
    """Digits by mean."""
    axes = figure.subplots()
    ratios = RATIOS["float32"]
    for color, library, case, label in (
        ("none", "normwise", "", "normwise, worst"),
        ("layer_norm", "torch", "layer_norm", "torch, Layer Norm"),
        ("batch_norm", "torch", "batch_norm", "torch, Batch Norm"),
    ):
        effects = [_worst(results, library, case=case, inputs=f"float32 {ratio:g}".__eq__) for ratio in ratios]
        plots.curve(axes, range(len(ratios)), effects, color, label)
    axes.set_xticks(range(len(ratios)), [_short(ratio) for ratio in ratios])
    axes.set_xlabel("mean / standard deviation of the activations")
    axes.set_ylabel("right digits of y, float32")
    axes.set_xlim(-0.3, 3.9)
    axes.set_ylim(-0.5, 8)


EXPERIMENT = Experiment(
    name="numerics",
    aspect="Right numbers",
    claim="A norm computes the right numbers, however far the activations drift.",
    contrast=Contrast(
        "right digits of y in float32, worst norm and layout, mean/std up to 1e6; 6.7 is an error of 2e-7", ENOUGH
    ),
    method=__doc__,
    trials=trials,
    judge=judge,
    plot=plot,
)
