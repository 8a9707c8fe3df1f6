"""How plots look: one message each, direct labels, colours that everyone can tell apart, intervals drawn."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import files
from .experiment import Experiment, Results
from .intervals import Effect

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = {
    "batch_norm": "#0072B2",
    "layer_norm": "#D55E00",
    "rms_norm": "#009E73",
    "none": "#6E6E6E",
    "other": "#CC79A7",
    "light": "#56B4E9",
}
"""Of Okabe and Ito, which the colour-blind can tell apart, and a grey."""

NAMES = {"batch_norm": "Batch Norm", "layer_norm": "Layer Norm", "rms_norm": "RMSNorm", "none": "no norm"}

STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.12,
    "svg.hashsalt": "normwise",
    "svg.fonttype": "path",
}


def draw(experiment: Experiment, results: Results, folder: Path) -> None:
    """Write NAME.svg and NAME.png beside the results; the same numbers give the same files."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.6))
        FigureCanvasAgg(figure)
        figure.suptitle(title(experiment, results), x=0.01, horizontalalignment="left", fontsize=10)
        experiment.plot(figure, results)
        set_apart(figure)
        for kind, metadata in {"svg": {"Date": None}, "png": {"Software": None}}.items():
            data = io.BytesIO()
            figure.savefig(data, format=kind, dpi=150, metadata=metadata)
            files.write(folder / f"{experiment.name}.{kind}", data.getvalue())


def set_apart(figure: Figure) -> None:
    """Lift labels that cover the one below."""
    from matplotlib.text import Annotation

    figure.canvas.draw()
    labels = [text for axes in figure.axes for text in axes.texts if isinstance(text, Annotation)]
    labels.sort(key=lambda label: label.get_window_extent().y0)
    for i, label in enumerate(labels):
        for other in labels[:i]:
            if label.get_window_extent().overlaps(other.get_window_extent()):
                x, y = label.xyann
                lift = other.get_window_extent().y1 - label.get_window_extent().y0
                label.xyann = x, y + (lift + 1) * 72 / figure.dpi


def title(experiment: Experiment, results: Results) -> str:
    """The claim, and what the numbers make of it."""
    verdict = experiment.verdict(experiment.judge(results))
    return "\n".join(textwrap.wrap(f'"{experiment.claim}" {verdict[0].upper()}{verdict[1:]}.', 85))


def curve(axes: Axes, xs: Sequence[float], effects: Sequence[Effect], name: str, label: str | None = None) -> None:
    """Estimates joined by a line, with their intervals, and the label at the last one."""
    color = COLORS[name]
    values = [e.value for e in effects]
    bars = [[e.value - e.low for e in effects], [e.high - e.value for e in effects]]
    axes.errorbar(xs, values, bars, color=color, marker="o", markersize=4, linewidth=1.5, capsize=2)
    axes.annotate(
        NAMES.get(name, name) if label is None else label,
        (xs[-1], values[-1]),
        (6, 0),
        textcoords="offset points",
        color=color,
        va="center",
    )


def below(figure: Figure, axes: Axes, names: Sequence[str]) -> None:
    """The names of the curves of several panels, under them: one of the panels' curves, in this order."""
    handles: list[Any] = list(axes.containers)
    labels, colors = [NAMES.get(name, name) for name in names], [COLORS[name] for name in names]
    figure.legend(handles, labels, labelcolor=colors, loc="outside lower center", ncols=len(names), frameon=False)


def bars(axes: Axes, labels: Sequence[str], effects: Sequence[Effect], colors: Sequence[str]) -> None:
    """Horizontal estimates with intervals, the first on top, the figure written beside each."""
    for i, (effect, name) in enumerate(zip(effects, colors, strict=True)):
        axes.barh(i, effect.value, color=COLORS[name], height=0.6)
        axes.plot([effect.low, effect.high], [i, i], color="black", linewidth=1)
        axes.annotate(
            str(effect), (max(effect.high, effect.value, 0), i), (4, 0), textcoords="offset points", va="center"
        )
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.margins(x=0.35)
