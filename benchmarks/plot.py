"""The plot: how many times faster than eager PyTorch, every case one mark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import verdict
from .verdict import Record

COLOURS = {"float32": "#1f77b4", "bfloat16": "#d95f02", "float16": "#7b3294"}
MARKS = {"float32": "o", "bfloat16": "s", "float16": "^"}
"""Types differ in shape too, for who does not see the colours."""


def write(path: Path, records: list[Record], machine: str) -> None:
    """Draw every case that PyTorch runs eagerly; forward left, forward+backward right; a hollow mark is one thread."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    known = [record for record in records if verdict.ratio(record, "torch")]
    groups = list(dict.fromkeys(verdict.class_of(record)[0] for record in known))
    passes = ("forward", "forward+backward")
    figure, panels = plt.subplots(1, 2, figsize=(12, 1.5 + 0.55 * len(groups)), sharey=True, layout="constrained")
    for panel, which in zip(panels, passes, strict=True):
        draw(panel, [record for record in known if record["pass"] == which], groups)
        panel.set_title(which)
    panels[0].set_yticks(range(len(groups)), groups)
    panels[0].invert_yaxis()
    marks = [plt.Line2D([], [], color=COLOURS[t], marker=MARKS[t], linestyle="", label=t) for t in COLOURS]
    marks.append(plt.Line2D([], [], color="grey", marker="o", linestyle="", label="one thread", fillstyle="none"))
    figure.legend(handles=marks, loc="outside lower center", ncols=len(marks), frameon=False)
    figure.suptitle(f"normwise, times as fast as eager PyTorch; {machine}; right of the line is faster")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw(panel: Any, records: list[Record], groups: list[str]) -> None:
    """The marks of one pass, spread in height so that they do not hide each other."""
    placed = dict.fromkeys(groups, 0)
    counts = {group: sum(verdict.class_of(r)[0] == group for r in records) for group in groups}
    for record in records:
        group, dtype = verdict.class_of(record)[0], record["dtype"]
        height = groups.index(group) - 0.35 + 0.7 * (placed[group] + 0.5) / counts[group]
        placed[group] += 1
        face = "none" if record["threads"] == 1 else COLOURS[dtype]
        style = {"marker": MARKS[dtype], "edgecolors": COLOURS[dtype], "facecolors": face, "s": 22, "linewidths": 1}
        panel.scatter([verdict.ratio(record, "torch")], [height], **style)
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.axvline(1, color="black", linewidth=1)
    panel.grid(axis="x", alpha=0.3)
    for boundary in range(1, len(groups)):
        panel.axhline(boundary - 0.5, color="grey", linewidth=0.4)
