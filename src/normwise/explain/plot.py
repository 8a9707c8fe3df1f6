"""A comparison as a figure: the batch in greys, and beside it what each norm makes of it, on one scale about zero."""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from . import html, labels, table
from .trace import Array, Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .comparison import Comparison

Colors = NDArray[np.float64]

MOST = 96  # rows and columns of a picture without numbers; of more, a corner
TILES = 4, 6  # samples and channels of images
GAP = 1  # pixels between two images
INK, SOFT = "#1b1f24", "#57606a"
STYLE: dict[Any, Any] = {
    "font.size": 8.5,
    "text.color": INK,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "svg.fonttype": "none",
}

# Inches
WIDTH = 9.2  # that panels abreast may take
CELL = 0.5, 0.26  # of a cell with a number in it
PICTURE, THIN = 2.3, 0.11  # of the longer side of a matrix without numbers, and of a row that still shows
ABOVE, LINE, APART = 0.46, 0.165, 0.25  # for a title, for a line under a panel, between two panels
LETTER = 0.075  # of one letter of a row's name; what is said under a panel is in smaller ones
KEY = 1.5, 0.09, 0.3  # length and height of the scale, and what is under it


@dataclass(frozen=True, eq=False)
class Matrix:
    """Numbers to draw, nan between images, the names of rows and columns, and what was left out."""

    values: Array
    rows: Sequence[str]
    columns: Sequence[str]
    numbers: bool
    chosen: tuple[int, int] | None = None
    cut: str = ""

    @property
    def body(self) -> tuple[float, float]:
        """Inches of the cells."""
        rows, columns = self.values.shape
        if self.numbers:
            return columns * CELL[0], rows * CELL[1]
        scale = PICTURE / max(rows, columns)
        thin = 0 if any(not name for name in self.rows) else min(rows * THIN, PICTURE)  # images keep their shape
        return columns * scale, max(rows * scale, thin)

    @property
    def margin(self) -> float:
        """Inches of the names of the rows."""
        return LETTER * max(map(len, self.rows)) + 0.1


@dataclass(frozen=True, eq=False)
class Panel:
    """What is drawn of the batch or of one norm; no matrix where a norm refuses it."""

    title: str
    matrix: Matrix | None
    painted: Colors
    said: tuple[str, ...]
    pattern: str = ""


def matplotlib() -> Any:
    """The library.

    Raises:
        ImportError: If it is not installed.
    """
    try:
        import matplotlib as found
        import matplotlib.figure
    except ImportError:
        raise ImportError("plot: matplotlib must be installed; it is not; pip install 'normwise[plots]'.") from None
    return found


def canvas(width: float, height: float) -> Any:
    """An empty figure of so many inches, of no window; notebooks show it whether or not pyplot is imported there."""
    found = matplotlib().figure.Figure(figsize=(width, height))
    found._repr_png_ = partial(_png, found)
    return found


def _png(figure: Figure) -> bytes:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=150)
    return data.getvalue()


def draw(c: Comparison) -> Figure:
    """The whole figure; its parts are placed in inches, so that they have the same size in every figure."""
    style = matplotlib().rc_context(STYLE)
    first = _matrix(c, c.x)
    panels = [_input(c, first), *(_output(c, t) for t in c.traces)]
    said = max(len(line) for panel in panels if panel.matrix for line in panel.said) * LETTER * 0.8
    wide = first.margin + max(first.body[0], said, 1.6) + APART
    drawn = max(len(panel.said) + bool(panel.pattern) for panel in panels if panel.matrix)
    refused = max((len(panel.said) for panel in panels if not panel.matrix), default=0)
    high = ABOVE + max(first.body[1] + LINE * drawn, 0.8 * LINE * refused) + APART
    across = min(len(panels), max(1, int(WIDTH // wide)))
    width, height = across * wide, math.ceil(len(panels) / across) * high + KEY[1] + KEY[2]
    with style:
        figure: Figure = canvas(width, height)

        def place(x: float, top: float, size: tuple[float, float]) -> Axes:
            box = x / width, 1 - (top + size[1]) / height, size[0] / width, size[1] / height
            axes: Axes = figure.add_axes(box)
            axes.tick_params(length=0, pad=2)
            axes.spines[:].set_visible(False)
            return axes

        for i, panel in enumerate(panels):
            x, top = i % across * wide + first.margin, i // across * high + ABOVE
            _fill(place(x, top, first.body), panel)
        _key(place(first.margin, height - KEY[1] - KEY[2], KEY[:2]))
    return figure


def colors(values: Array) -> Colors:
    """On white as in the tables: blue below zero, orange above, the strongest from 3 on; white where not finite."""
    known = np.isfinite(values)
    strength = np.where(known, np.minimum(np.abs(np.where(known, values, 0)) / html.SCALE, 1), 0) * html.STRONGEST
    hue = np.where(values[..., None] > 0, html.ABOVE, html.BELOW) / 255
    return 1 + strength[..., None] * (hue - 1)


def greys(values: Array) -> Colors:
    """From white at the least to grey at the greatest value."""
    known = values[np.isfinite(values)]
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 0.0)
    share = np.nan_to_num((values / 2 - low / 2) / (high / 2 - low / 2 or 1), nan=0, posinf=1, neginf=0)
    return np.repeat(1 - html.STRONGEST * share[..., None], 3, -1)


def _input(c: Comparison, matrix: Matrix) -> Panel:
    known = c.x[np.isfinite(c.x)]
    span = f"greys from {labels.short(known.min())} to {labels.short(known.max())}" if known.size else "not finite"
    return Panel("input", matrix, greys(matrix.values), (_minus(span), *filter(None, [matrix.cut])))


def _output(c: Comparison, t: Trace) -> Panel:
    if t.refused:
        return Panel(t.norm.title, None, np.empty(0), tuple(textwrap.wrap(t.refused, 32)))
    matrix = _matrix(c, t.y)
    whose = f"one mean for {labels.each(labels.unit(t.norm.pattern, c.layout))}"
    said = (whose, *filter(None, [matrix.cut]))
    return Panel(t.norm.title, matrix, colors(matrix.values), said, str(t.norm.pattern))


def _matrix(c: Comparison, array: Array) -> Matrix:
    """Images as tiles, everything else as rows and channels; numbers where they fit."""
    if c.x.ndim == 4 and min(c.x.shape[c.layout.index(a)] for a in "hw") > 3:
        return _tiles(c, array)
    channels = c.x.shape[c.layout.index("c")]
    rows = c.x.size // channels
    numbers = rows <= html.ROWS and channels <= html.COLUMNS
    found = table.corner(c, array, min(rows, MOST), min(channels, MOST))
    names = [f"{labels.axis_prefix(c.layout, 'c')}{found.left + i}" for i in range(found.values.shape[1])]
    where = divmod(found.chosen, found.values.shape[1])
    cut = "" if found.values.size == array.size else f"a corner of {rows} × {channels}"
    return Matrix(found.values, found.rows, names, numbers, (int(where[0]), int(where[1])), cut)


def _tiles(c: Comparison, array: Array) -> Matrix:
    """A row for each sample, a column for each channel, an image in each place."""
    images = array.transpose([c.layout.index(a) for a in "nchw"])
    (n, k), (samples, channels) = images.shape[:2], TILES
    images = images[:samples, :channels, :MOST, :MOST]
    margins = [(0, 0), (0, 0), (0, GAP), (0, GAP)]
    padded = np.pad(images, margins, constant_values=np.nan)
    height, width = padded.shape[2:]
    values = padded.transpose(0, 2, 1, 3).reshape(padded.shape[0] * height, -1)[:-GAP, :-GAP]
    rows = [f"s{i // height}" if i % height == height // 2 else "" for i in range(len(values))]
    columns = [f"c{i // width}" if i % width == width // 2 else "" for i in range(values.shape[1])]
    shown, of = images.shape, f"{len(images)} of {n} samples, {images.shape[1]} of {k} channels"
    cut = "" if images.size == array.size else of if shown[2:] == array.shape[-2:] else f"corners of {of}"
    return Matrix(values, rows, columns, False, None, cut)


def _fill(axes: Axes, panel: Panel) -> None:
    """Title, cells and what is said under them."""
    _beside(axes, panel.title, 17, weight="bold", size=9.5)
    if panel.matrix is None:
        axes.set_axis_off()
        _beside(axes, "\n".join(panel.said), -2, top=True, color=SOFT, size=7.5)
        return
    if panel.matrix.numbers:
        _cells(axes, panel.matrix, panel.painted, not panel.pattern)
    else:
        rows, columns = panel.matrix.values.shape
        axes.imshow(panel.painted, interpolation="nearest", aspect="auto", extent=(0, columns, rows, 0))
    _names(axes, panel.matrix)
    if panel.pattern:
        _beside(axes, panel.pattern, -4, family="monospace", size=8)
    _beside(axes, "\n".join(panel.said), -16 if panel.pattern else -4, color=SOFT, size=8)


def _cells(axes: Axes, matrix: Matrix, painted: Colors, plain: bool) -> None:
    """Cells with numbers, drawn one by one, so that they stay sharp at any size."""
    from matplotlib.patches import Rectangle

    rows, columns = matrix.values.shape
    axes.pcolormesh(painted, edgecolors="white", linewidth=1.2)
    axes.set(xlim=(0, columns), ylim=(rows, 0))
    flat = matrix.values.reshape(-1).tolist()
    texts = labels.column(flat) if plain else []
    if max(map(len, texts), default=9) > 6:
        texts = [labels.value(v) for v in flat]
    size = 8.5 * min(1, 7 / max(map(len, texts)))
    for i, text in enumerate(texts):
        axes.text(i % columns + 0.5, i // columns + 0.5, _minus(text), ha="center", va="center", size=size)
    if matrix.chosen is not None:
        y, x = matrix.chosen
        axes.add_patch(Rectangle((x, y), 1, 1, fill=False, edgecolor=INK, linewidth=1.2))


def _names(axes: Axes, matrix: Matrix) -> None:
    """Of rows and columns, as many as there is room for."""
    axes.xaxis.tick_top()
    for axis, names, inches in (
        (axes.xaxis, matrix.columns, matrix.body[0]),
        (axes.yaxis, matrix.rows, matrix.body[1]),
    ):
        named = [(i + 0.5, name) for i, name in enumerate(names) if name]
        room = 0.14 if axis is axes.yaxis else LETTER * max(len(name) for _, name in named) + 0.1
        step = math.ceil(room * len(named) / inches)
        axis.set_ticks([at for at, _ in named[::step]], [name for _, name in named[::step]])


def _beside(axes: Axes, text: str, points: float, top: bool = False, **style: Any) -> None:
    """Text so many points above the upper edge, or below the lower one or, with ``top``, the upper one."""
    corner, va = (0, 1) if points > 0 or top else (0, 0), "bottom" if points > 0 else "top"
    axes.annotate(text, corner, (0, points), "axes fraction", textcoords="offset points", va=va, **style)


def _minus(text: str) -> str:
    """A minus sign as long as a plus sign; that of an exponent stays."""
    return re.sub(r"(?<![e\w])-(?=\d|inf)", "−", text)


def _key(axes: Axes) -> None:
    """What the colours mean, once for all panels."""
    most = html.SCALE
    axes.imshow(colors(np.linspace(-most, most, 255)[None]), aspect="auto", extent=(-most, most, 0, 1))
    axes.set_xticks([-most, 0, most], [f"≤ −{most:.0f}", "0", f"≥ {most:.0f}"])
    axes.set_yticks([])
