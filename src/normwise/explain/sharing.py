"""Who shares a mean: a cube of samples, channels and positions, coloured by any pattern."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from ..definitions import DEFINITIONS, ELLIPSIS, Pattern
from . import choose, labels
from .plot import INK, SOFT, STYLE, canvas, matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")  # of Okabe and Ito
TINTS = (0.0, 0.35, 0.6, 0.78)  # shares of white: four times as many groups can be told apart
OTHER = "#e3e7eb"
LIGHT = {"top": 0.14, "left": 0.0, "right": -0.12}  # of the three sides that are seen; below zero a shadow
SMALL = {"n": 4, "c": 6, "l": 4, "d": 1, "h": 2, "w": 2}
LONGEST = 16  # cells of an edge
INCHES, LEAST = 2.7, 3.9  # of the cube's longer extent, and of the figure, for its title

Ids = NDArray[np.int64]
Point = tuple[float, float]
Face = tuple[str, int, list[Point]]


def cube(pattern: str, shape: Sequence[int] | None = None, *, groups: int | None = None) -> Figure:
    """Draw which values share a mean: samples go back, channels to the right, all positions down.

    Args:
        pattern: The axes of the input, an arrow, and those with statistics of their own: ``"n c h w -> n h w"``. The
            first are the samples; channels are recognized as :func:`normwise.compare` does.
        shape: The length of each axis on the left, at most 16 samples, channels and positions; None for a small one.
        groups: The first part of a split axis such as (g c); by default as many as leave two channels each.

    Returns:
        A matplotlib figure. Each group of values with one mean has a colour; of more than 28 only one has.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If the pattern or the shape is wrong, or they do not fit.

    Example:
        >>> len(cube("n c h w -> c", (3, 5, 2, 2)).axes[0].collections)  # one for each channel
        5
    """
    style = matplotlib().rc_context(STYLE)
    layout, own, sizes, lengths = _read(pattern, shape, groups)
    ids = _ids(layout, own, sizes, lengths)
    n, c, p = ids.shape
    width, height = (n + c) * math.cos(math.pi / 6), (n + c) / 2 + p
    inch = INCHES / max(width, height)
    left, low, high = max(0.75, (LEAST - width * inch) / 2), 0.85, 0.6
    size = width * inch + 2 * left, height * inch + low + high
    with style:
        figure: Figure = canvas(*size)
        axes = figure.add_axes((left / size[0], low / size[1], width * inch / size[0], height * inch / size[1]))
        axes.set(xlim=(0, width), ylim=(-c / 2 - p, n / 2))
        axes.set_axis_off()
        seen = _draw(axes, ids, _colors([sizes[name] for name in own.right]))
        _edges(axes, layout, ids, inch)
        at = 0.12 / size[0]
        figure.text(at, 1 - 0.1 / size[1], _title(layout, own), va="top", weight="bold", size=9.5)
        figure.text(at, 1 - 0.29 / size[1], pattern, va="top", family="monospace", size=8.5)
        figure.text(at, 0.1 / size[1], _caption(layout, own, sizes, seen), va="bottom", color=SOFT, size=8)
    return figure


def _read(
    pattern: str, shape: Sequence[int] | None, groups: int | None
) -> tuple[str, Pattern, Mapping[str, int], tuple[int, ...]]:
    """The letter of each axis, the pattern with these letters, and the sizes of its axes and of the input's."""
    left = Pattern.parse(pattern).left
    lengths = tuple(shape) if shape is not None else (1,) * (4 if (ELLIPSIS,) in left else len(left))
    if any(length < 1 for length in lengths):
        raise ValueError(f"cube: every length must be 1 or more; got {lengths}; give for example (4, 6, 2, 2).")
    layout, own = choose.axes(torch.empty(lengths, device="meta"), None, pattern, None)
    assert own is not None
    if shape is None:
        lengths = tuple(SMALL[letter] for letter in layout)
    edges = [lengths[0], lengths[layout.index("c")]]
    edges.append(math.prod(lengths) // math.prod(edges))
    if max(edges) > LONGEST:
        counts = "{} samples, {} channels, {} positions".format(*edges)
        raise ValueError(f"cube: there may be {LONGEST} of each; got {counts}; draw a smaller one, it tells the same.")
    return layout, own, own.sizes(lengths, choose.parts(own, torch.empty(lengths, device="meta"), groups)), lengths


def _ids(layout: str, own: Pattern, sizes: Mapping[str, int], lengths: tuple[int, ...]) -> Ids:
    """Which group each value is of: (samples, channels, positions)."""
    kept = [name for name in own.names if name in own.right]
    numbers = np.arange(math.prod(sizes[name] for name in kept)).reshape([sizes[name] for name in own.right])
    numbers = numbers.transpose([own.right.index(name) for name in kept])
    numbers = numbers.reshape([sizes[name] if name in kept else 1 for name in own.names])
    whole = np.broadcast_to(numbers, [sizes[name] for name in own.names]).reshape(lengths)
    channel = layout.index("c")
    order = [0, channel, *(i for i in range(1, len(lengths)) if i != channel)]
    return whole.transpose(order).reshape(lengths[0], lengths[channel], -1)


def _colors(kept: Sequence[int]) -> list[str]:
    """Of each group: the first kept axis or the last is the hue and the others are the tint, if that is enough."""
    count = math.prod(kept)
    for hues, first in ((count // math.prod(kept[1:]), True), (kept[-1] if kept else 1, False), (len(PALETTE), False)):
        if hues <= len(PALETTE) and count <= hues * len(TINTS):
            places = (divmod(i, count // hues) if first else divmod(i, hues)[::-1] for i in range(count))
            return [_tinted(PALETTE[hue], TINTS[tint]) for hue, tint in places]
    return [PALETTE[0], *[OTHER] * (count - 1)]


def _tinted(color: str, share: float) -> str:
    """With a share of white, or below zero of black."""
    channels = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(v + abs(share) * ((255 if share > 0 else 0) - v)):02x}" for v in channels)


def _point(n: float, c: float, p: float) -> Point:
    """Where a corner of a cell is drawn: isometric, the first sample in front."""
    return (n + c) * math.cos(math.pi / 6), (n - c) / 2 - p


def _faces(ids: Ids) -> Iterator[Face]:
    """The faces that are seen: which side, of which group, and their corners."""
    n, c, p = ids.shape
    for i, j in np.ndindex(n, c):
        yield "top", int(ids[i, j, 0]), [_point(i + a, j + b, 0) for a, b in ((0, 0), (1, 0), (1, 1), (0, 1))]
    for j, k in np.ndindex(c, p):
        yield "left", int(ids[0, j, k]), [_point(0, j + a, k + b) for a, b in ((0, 0), (1, 0), (1, 1), (0, 1))]
    for i, k in np.ndindex(n, p):
        yield "right", int(ids[i, -1, k]), [_point(i + a, c, k + b) for a, b in ((0, 0), (1, 0), (1, 1), (0, 1))]


def _draw(axes: Axes, ids: Ids, colors: Sequence[str]) -> int:
    """A collection for each group that is seen; how many there are."""
    from matplotlib.collections import PolyCollection

    found: dict[int, list[Face]] = {}
    for face in _faces(ids):
        found.setdefault(face[1], []).append(face)
    for group, faces in sorted(found.items()):
        shades = [_tinted(colors[group], LIGHT[side]) for side, _, _ in faces]
        drawn = PolyCollection([corners for _, _, corners in faces], facecolors=shades, edgecolors="white")
        drawn.set(linewidth=1.0, joinstyle="round", label=f"group {group}", clip_on=False)
        drawn.set_gid(colors[group])
        axes.add_collection(drawn)
    return len(found)


def _edges(axes: Axes, layout: str, ids: Ids, inch: float) -> None:
    """The name of each edge and, where there is room, of each cell."""
    n, c, p = ids.shape
    positions = [a for a in layout if a not in "nc"]
    words = {
        "c": f"C = {c} {labels.axis_word(layout, 'c', c)}",
        "n": f"N = {n} {labels.axis_word(layout, 'n', n)}",
        "p": f"{'·'.join(a.upper() for a in positions)} = {p} position{'' if p == 1 else 's'}",
    }
    sides = {
        "c": (c, [_point(0, j + 0.5, p) for j in range(c)], (-5, -8), -30),
        "n": (n, [_point(i + 0.5, c, p) for i in range(n)], (5, -8), 30),
        "p": (p if positions else 0, [_point(0, 0, k + 0.5) for k in range(p)], (-8, 0), 90),
    }
    for letter, (count, places, (dx, dy), angle) in sides.items():
        if not count:
            continue
        middle = tuple(np.mean([places[0], places[-1]], 0))
        named = inch > 0.24 and letter != "p"
        prefix = labels.axis_prefix(layout, letter)
        for i in range(count if named else 0):
            _write(axes, f"{prefix}{i}", places[i], (dx, dy), 0, color=SOFT, size=7.5)
        away = 2.6 if named else 1.3
        _write(axes, words[letter], (middle[0], middle[1]), (away * dx, away * dy), angle, color=INK, size=8.5)


def _write(axes: Axes, text: str, place: Point, points: Point, angle: float, color: str, size: float) -> None:
    axes.annotate(
        text, place, points, textcoords="offset points", ha="center", va="center", rotation=angle, color=color,
        size=size, rotation_mode="anchor", annotation_clip=False,
    )  # fmt: skip


def _title(layout: str, own: Pattern) -> str:
    """What the norm is called, if it is one that has a name."""
    whole = Pattern(tuple((a,) for a in layout), ("n",))
    if own == whole and len(layout) > 2:
        return "Layer Norm as the GroupNorm paper draws it"
    title = next((d.title for d in DEFINITIONS.values() if d.at(layout) == own), "A norm without a name")
    return f"{title} as transformers and ConvNeXt use it" if title == "Layer Norm" and len(layout) > 2 else title


def _caption(layout: str, own: Pattern, sizes: Mapping[str, int], seen: int) -> str:
    """How many values share a mean, and how many means there are."""
    letters = labels.letters(own, layout)
    parts = {name: item for item in own.left for name in item if len(item) > 1}
    names, lengths = [], []
    for name in own.averaged:
        others = [o.upper() for o in parts.get(name, ()) if o in own.right]
        names.append("/".join([letters[name].upper(), *others]))
        lengths.append(sizes[name])
    values, means = math.prod(lengths), math.prod(sizes[name] for name in own.right)
    product = f" = {'·'.join(map(str, lengths))}" if len(lengths) > 1 else ""
    rest = "" if seen == means else f", {means - seen} of them inside"
    return (
        f"{'·'.join(names)}{product} = {values} value{'s share' if values > 1 else ' has'} one mean\n"
        f"{means} mean{'' if means == 1 else 's'} in all{rest}"
    )
