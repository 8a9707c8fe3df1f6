"""Figures: the colours of the tables, the numbers in their places, and who shares a mean."""

from __future__ import annotations

import math
import pickle
import re
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection, QuadMesh
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from test_compare import random

import normwise as nw
from normwise.definitions import DEFINITIONS, LAYOUTS, Pattern
from normwise.explain import cube, html, load_batch, plot, sharing


def panels(figure: Figure) -> dict[str, Axes]:
    """By title; the scale has none."""
    return {a.texts[0].get_text(): a for a in figure.axes if a.texts}


def texts(axes: Axes) -> list[str]:
    return [t.get_text() for t in axes.texts]


def on_white(style: str) -> list[float]:
    """What a cell of the HTML tables looks like on white."""
    found = re.search(r"rgba\((\d+),(\d+),(\d+),([\d.]+)\)", style)
    if found is None:
        return [1, 1, 1]
    *color, strength = map(float, found.groups())
    return [1 + strength * (v / 255 - 1) for v in color]


# Colours


@settings(max_examples=100, deadline=None)
@given(values=st.lists(st.floats(width=64), min_size=1))
def test_colours_are_those_of_the_tables(values: list[float]) -> None:
    expected = [on_white(html._shade(v, html.SCALE)) for v in values]
    np.testing.assert_allclose(plot.colors(np.array(values)), expected, atol=5e-4)  # HTML has three decimals


def test_colours_are_centred_and_end_at_three() -> None:
    below, zero, above, beyond = plot.colors(np.array([-3.0, 0.0, 3.0, 300.0]))
    assert zero.tolist() == [1, 1, 1]
    np.testing.assert_allclose(below, [1 - 0.45 * (1 - v / 255) for v in (30, 110, 220)])
    np.testing.assert_allclose(above, [1 - 0.45 * (1 - v / 255) for v in (230, 120, 20)])
    assert beyond.tolist() == above.tolist()


@settings(max_examples=100, deadline=None)
@given(values=st.lists(st.floats(width=64), min_size=1).map(np.array))
def test_greys_keep_the_order_and_stay_readable(values: np.ndarray) -> None:
    found = plot.greys(values)
    assert ((found >= 0.5) & (found <= 1)).all()
    assert (found[..., 0] == found[..., 2]).all()
    order = np.argsort(values[np.isfinite(values)])
    assert (np.diff(found[np.isfinite(values)][order, 0]) <= 1e-12).all()


# A comparison


def test_cells_have_their_numbers_and_colours() -> None:
    c = nw.compare([[2, 4, 6], [3, 5, 7], [1, 3, 5], [4, 6, 14]], "all", cell=(2, 1))
    found = panels(c.plot())
    assert list(found) == ["input", *(t.norm.title for t in c.traces)]
    for t in c.traces:
        axes = found[t.norm.title]
        if t.refused:
            assert " ".join(t.refused.split()) in " ".join(" ".join(texts(axes)).split())
            continue
        (mesh,) = [a for a in axes.collections if isinstance(a, QuadMesh)]
        np.testing.assert_array_equal(mesh.get_array().reshape(-1, 3), plot.colors(t.y.reshape(-1)))
        numbers = [x for x in axes.texts if re.fullmatch(r"−?\d\.\d{3}", x.get_text())]
        for text, (i, j) in zip(numbers, np.ndindex(4, 3), strict=True):
            assert text.get_position() == (j + 0.5, i + 0.5)
            assert float(text.get_text().replace("−", "-")) == pytest.approx(t.y[i, j], abs=5.1e-4)
        assert str(t.norm.pattern) in texts(axes)
        (outline,) = axes.patches
        assert outline.get_xy() == (1, 2)
        assert axes.get_ylim() == (4, 0)
    assert texts(found["input"])[1:13] == [str(int(v)) for v in c.x.flat]
    assert "greys from 1 to 14" in texts(found["input"])
    assert "one mean for each feature" in " ".join(texts(found["Batch Norm"]))


def test_large_batches_are_pictures_of_a_corner() -> None:
    c = nw.compare(random(500, 300), cell=(450, 7))
    found = panels(c.plot())
    for title, array in {"Batch Norm": c.traces[0].y, "Layer Norm": c.traces[1].y}.items():
        (image,) = found[title].images
        np.testing.assert_array_equal(image.get_array(), plot.colors(array[404:500, 7:103]))
        assert "a corner of 500 × 300" in texts(found[title])[-1]
        assert found[title].get_yticklabels()[0].get_text() == "s404"


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_images_are_drawn_as_images(layout: str) -> None:
    images = random(5, 2, 6, 4)
    x = images if layout == "nchw" else images.movedim(1, -1)
    c = nw.compare(x, "batch_norm", layout=layout)
    y = c.traces[0].y.transpose([layout.index(a) for a in "nchw"])
    (image,) = panels(c.plot())["Batch Norm"].images
    painted = image.get_array()
    assert painted.shape == (4 * 6 + 3, 2 * 4 + 1, 3)
    for i, j in np.ndindex(4, 2):
        np.testing.assert_array_equal(painted[7 * i : 7 * i + 6, 5 * j : 5 * j + 4], plot.colors(y[i, j]))
    assert (painted[6] == 1).all()
    assert "4 of 5 samples, 2 of 2 channels" in texts(panels(c.plot())["Batch Norm"])[-1]


def overlapping(figure: Figure) -> list[tuple[str, str]]:
    """Pairs of texts that run into one another, and texts that leave the figure."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    named = [t for a in figure.axes if a.axison for t in (*a.get_xticklabels(), *a.get_yticklabels())]
    found = [t for t in (*named, *figure.texts, *(t for a in figure.axes for t in a.texts)) if t.get_text().strip()]
    lines = [(t.get_text(), t.get_window_extent(renderer)) for t in found]
    inside = figure.bbox.padded(0.5)
    wrong = [(text, "outside") for text, box in lines if not inside.contains(box.x0, box.y0)]
    wrong += [(text, "outside") for text, box in lines if not inside.contains(box.x1, box.y1)]
    straight = [line for t, line in zip(found, lines, strict=True) if t.get_rotation() % 90 == 0]  # a box tells little
    boxes = [(text, box.padded(-0.75)) for text, box in straight]
    wrong += [(a, b) for i, (a, one) in enumerate(boxes) for b, other in boxes[:i] if one.overlaps(other)]
    return wrong


SHOWN: dict[str, Any] = {
    "worked": lambda: nw.compare(),
    "all": lambda: nw.compare([[2, 4, 6], [3, 5, 7], [1, 3, 5], [4, 6, 14]], "all"),
    "one sample": lambda: nw.compare([[2, 4, 6]]),
    "one feature": lambda: nw.compare([[2], [4]], "batch_norm"),
    "sixteen": lambda: nw.compare(random(16, 12) * 1e-3),
    "large numbers": lambda: nw.compare(random(4, 3) * 1e30),
    "digits": lambda: nw.compare(load_batch("digits")),
    "large": lambda: nw.compare(random(500, 300)),
    "tokens": lambda: nw.compare(random(3, 4, 6), "all"),
    "images": lambda: nw.compare(random(8, 3, 24, 24), "all"),
    "volumes": lambda: nw.compare(random(2, 4, 2, 3, 3), "all"),
    "eval": lambda: nw.compare(mode="eval", steps=10),
    "not finite": lambda: nw.compare([[1, math.nan], [math.inf, 2]], allow_nonfinite=True),
}


@pytest.mark.parametrize("name", SHOWN)
def test_no_text_is_cut_or_covered(name: str) -> None:
    figure = SHOWN[name]().plot()
    assert overlapping(figure) == []
    assert figure.get_figwidth() < 10


def test_a_figure_is_of_no_window_and_needs_no_settings() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    figure = nw.compare().plot()
    assert dict(matplotlib.rcParams) == before
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert isinstance(pickle.loads(pickle.dumps(figure)), Figure)


@pytest.mark.parametrize("draw", [lambda: nw.compare().plot(), lambda: cube("n c -> c")])
def test_without_matplotlib(draw: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(
        ImportError, match=r"\Aplot: matplotlib must be installed; .*pip install 'normwise\[plots\]'\.\Z"
    ):
        draw()


# The cube


def groups(figure: Figure) -> list[PolyCollection]:
    found = [a for a in figure.axes[0].collections if isinstance(a, PolyCollection)]
    assert all(str(a.get_label()).startswith("group ") for a in found)
    return found


PATTERNS = [
    *(str(d.at(layout)) for d in DEFINITIONS.values() for known in LAYOUTS.values() for layout in known
      if d.at(layout).averaged),
    "n c h w -> n", "n c h w ->", "n c h w -> h w", "n c -> n", "b t f -> b t", "n ... -> n", "n (g c) h w -> g",
]  # fmt: skip


@pytest.mark.parametrize("pattern", list(dict.fromkeys(PATTERNS)))
def test_each_group_has_a_colour_of_its_own(pattern: str) -> None:
    """As many as there are statistics, in these small cubes none of them hidden."""
    figure = cube(pattern)
    found = groups(figure)
    assert len({a.get_gid() for a in found}) == len(found)
    (caption,) = [t.get_text() for t in figure.texts if "mean" in t.get_text()]
    assert re.search(rf"\b{len(found)} means? in all$", caption)
    assert overlapping(figure) == []


def faces(figure: Figure) -> Counter[str]:
    return Counter(f"{a.get_label()}" for a in groups(figure) for _ in a.get_paths())


def test_batch_norm_colours_channels_and_layer_norm_samples() -> None:
    """Of 3 samples, 5 channels and 2 x 2 positions: faces on top, in front and on the right."""
    assert faces(cube("n c h w -> c", (3, 5, 2, 2))) == {
        **{f"group {c}": 3 + 4 for c in range(4)}, "group 4": 3 + 4 + 12,
    }  # fmt: skip
    assert faces(cube("n c h w -> n", (3, 5, 2, 2))) == {"group 0": 5 + 20 + 4, "group 1": 5 + 4, "group 2": 5 + 4}
    assert faces(cube("n h w c -> c", (3, 2, 2, 5))) == faces(cube("n c h w -> c", (3, 5, 2, 2)))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_ids_are_those_of_the_pattern(data: st.DataObject) -> None:
    """The means over the groups of the cube are those that `normalize` subtracts."""
    layout = data.draw(st.sampled_from(["nc", "nlc", "ncl", "nchw", "nhwc"]))
    shape = tuple(data.draw(st.integers(1, 4)) for _ in layout)
    right = data.draw(st.permutations(layout).map(lambda order: order[: data.draw(st.integers(0, len(layout) - 1))]))
    pattern = f"{' '.join(layout)} -> {' '.join(right)}"
    read, own, sizes, lengths = sharing._read(pattern, shape, None)
    assert read == layout
    ids = sharing._ids(read, own, sizes, lengths)
    x = torch.randn(shape).double()
    order = [0, layout.index("c"), *(i for i, a in enumerate(layout) if a not in "nc")]
    values = x.permute(order).reshape(ids.shape).numpy()
    averaged = [i for i, a in enumerate(layout) if a not in right]
    expected = x.mean(averaged, keepdim=True).expand(shape).permute(order).reshape(ids.shape).numpy()
    means = np.bincount(ids.reshape(-1), values.reshape(-1)) / np.bincount(ids.reshape(-1))
    np.testing.assert_allclose(means[ids], expected, atol=1e-12)
    assert len(np.unique(ids)) == math.prod(sizes[a] for a in right)


@pytest.mark.parametrize(
    ("pattern", "shape", "title", "caption"),
    [
        ("n c h w -> c", None, "Batch Norm", "N·H·W = 4·2·2 = 16 values share one mean\n6 means in all"),
        ("n c -> c", (8, 3), "Batch Norm", "N = 8 values share one mean\n3 means in all"),
        ("n l c -> n l", None, "Layer Norm as transformers and ConvNeXt use it",
         "C = 6 values share one mean\n16 means in all"),
        ("n c -> n", None, "Layer Norm", "C = 6 values share one mean\n4 means in all"),
        ("n c h w -> n", None, "Layer Norm as the GroupNorm paper draws it",
         "C·H·W = 6·2·2 = 24 values share one mean\n4 means in all"),
        ("n (g c) h w -> n g", None, "Group Norm", "C/G·H·W = 2·2·2 = 8 values share one mean\n12 means in all"),
        ("n c h w -> n c w", None, "A norm without a name",
         "H = 2 values share one mean\n48 means in all, 15 of them inside"),
        ("n c l ->", (1, 1, 1), "A norm without a name", "N·C·L = 1·1·1 = 1 value has one mean\n1 mean in all"),
    ],
)  # fmt: skip
def test_title_and_caption(pattern: str, shape: tuple[int, ...] | None, title: str, caption: str) -> None:
    figure = cube(pattern, shape)
    assert [t.get_text() for t in figure.texts] == [title, pattern, caption]


def test_groups_are_as_given() -> None:
    assert len(groups(cube("n (g c) h w -> g", (2, 12, 2, 2), groups=4))) == 4


def test_of_many_groups_one_is_coloured() -> None:
    found = groups(cube("n c h w -> n c", (8, 12, 2, 2)))
    assert Counter(a.get_gid() for a in found) == {sharing.PALETTE[0]: 1, sharing.OTHER: 95}
    assert [a.get_label() for a in found if a.get_gid() != sharing.OTHER] == ["group 0"]


def test_sides_differ_in_light_alone() -> None:
    (only,) = groups(cube("n c h w ->"))
    assert len({to_hex(color) for color in only.get_facecolors()}) == 3
    assert to_rgb(sharing.PALETTE[0]) in [to_rgb(color) for color in only.get_facecolors()]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("n c h w",), "pattern: it must read"),
        (("n c h w -> c", (2, 3)), "describes 4 dimensions; the input has 2"),
        (("n c -> c", (2, 0)), "cube: every length must be 1 or more; got (2, 0)"),
        (("n c -> c", (17, 2)), "cube: there may be 16 of each; got 17 samples, 2 channels, 1 positions"),
        (("n (a b c) -> n a", (2, 8)), "pattern: one axis may be split, in two"),
    ],
)
def test_cube_refuses(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(ValueError, match=r"\A[^\n]+\.\Z") as caught:
        cube(*arguments)
    assert words in str(caught.value)


def test_known_patterns_are_named() -> None:
    """Each definition, in each layout that it has one for."""
    for definition in DEFINITIONS.values():
        for layout in (layout for known in LAYOUTS.values() for layout in known):
            own = definition.at(layout)
            if own.averaged and definition.name != "rms_norm":  # which has Layer Norm's pattern
                assert sharing._title(layout, own).startswith(definition.title)
    assert sharing._title("nc", Pattern.parse("n c ->")) == "A norm without a name"
