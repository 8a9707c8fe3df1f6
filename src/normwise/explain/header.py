"""What stands above a comparison: the batch, the mode, and how its axes are read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from . import labels

if TYPE_CHECKING:
    from .comparison import Comparison

LONG = 26  # a longer pattern does not stand over a table


def parts(c: Comparison) -> list[str]:
    """``worked batch, 4 samples x 3 features``, ``training``, ``eps 1e-5``, and the type unless it is float64."""
    shape = " x ".join(f"{n} {labels.axis_word(c.layout, a, n)}" for a, n in zip(c.layout, c.x.shape, strict=True))
    eps = " or ".join(dict.fromkeys(labels.tidy(f"{t.norm.eps:.3g}") for t in c.traces))
    return [f"{c.name}, {shape}", _mode(c), f"eps {eps}", *([] if c.dtype == "float64" else [c.dtype])]


def _mode(c: Comparison) -> str:
    """Training, or eval after how many steps; a layer with running statistics is shown in both."""
    running = [t.norm.running for t in c.traces if t.norm.running is not None]
    if any(r.steps is None for r in running):
        return "training and eval"
    if c.mode == "train":
        return "training"
    steps = next((r.steps for r in running), None)
    return "eval" if steps is None else f"eval after {steps} step{'' if steps == 1 else 's'}"


def notes(c: Comparison) -> Iterator[str]:
    """What was decided while reading, and how the axes are read: which ones Layer Norm takes confuses most."""
    yield from c.notes
    for t in c.traces:
        if t.norm.name == "pattern" and len(str(t.norm.pattern)) > LONG:
            yield f"{t.norm.title} is {t.norm.pattern}"
    if c.layout == "nc":
        yield f"{labels.cell_name(c.layout, (0, 0))} is sample 0, feature 0: counted from 0"
        return
    axes = ", ".join(labels.tied(f"{a} = {labels.axis_word(c.layout, a, 2)}") for a in c.layout)
    yield f"axes read as {c.layout}: {axes}, counted from 0; --layout reads them otherwise"
    whole = f"{' '.join(c.layout)} -> n"
    here = [t for t in c.traces if t.norm.name == "layer_norm"]
    if here and str(here[0].norm.pattern) != whole:
        over = labels.averaged(here[0].norm.pattern, c.layout)
        like = ", as transformers and ConvNeXt do" if over == "channels" else ""
        command = labels.tied(f"--pattern '{whole}'")
        yield (
            f"Layer Norm here takes the {over} of {labels.each(labels.unit(here[0].norm.pattern, c.layout))}{like}; "
            f"the whole sample, as the GroupNorm paper draws it: {command}"
        )
