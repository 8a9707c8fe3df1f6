"""Patterns as data: reading them, and each fact derived from them observed on the running norm."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import normwise.functional as nf
from normwise.definitions import (
    BATCH_NORM,
    DEFINITIONS,
    GROUP_NORM,
    INSTANCE_NORM,
    LAYER_NORM,
    LAYOUTS,
    RMS_NORM,
    Definition,
    Pattern,
    facts,
    format_axes,
    parse_axes,
)


@pytest.mark.parametrize(
    ("text", "left", "right", "averaged"),
    [
        ("n c -> c", (("n",), ("c",)), ("c",), ("n",)),
        ("n c h w -> n h w", (("n",), ("c",), ("h",), ("w",)), ("n", "h", "w"), ("c",)),
        ("n (g c) ... -> n g", (("n",), ("g", "c"), ("...",)), ("n", "g"), ("c", "...")),
        ("n  l c->n l", (("n",), ("l",), ("c",)), ("n", "l"), ("c",)),
        ("n c ->", (("n",), ("c",)), (), ("n", "c")),
        ("(a b)c->a", (("a", "b"), ("c",)), ("a",), ("b", "c")),
    ],
)
def test_parse(text: str, left: tuple, right: tuple, averaged: tuple):
    pattern = Pattern.parse(text)
    assert (pattern.left, pattern.right, pattern.averaged) == (left, right, averaged)
    assert Pattern.parse(str(pattern)) == pattern
    assert pattern.averages_batch == any(name not in right for name in left[0])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("n c", "must read 'axes -> axes"),
        ("n -> c -> n", "must read 'axes -> axes"),
        ("n c -> d", "'d' does not"),
        ("n n -> n", "'n' comes twice"),
        ("n c -> n n", "'n' comes twice"),
        ("n (c n) -> n", "'n' comes twice"),
        ("n c -> n c", "keeps them all"),
        ("-> ", "at least one axis must be averaged"),
        ("n (c -> n", "left open"),
        ("n c) -> n", "'\\)' in 'n c\\)' is no axis"),
        ("n ((c) d) -> n", "is no axis"),
        ("n () c -> n", "is no axis"),
        ("n (g ...) -> n", "is no axis"),
        ("n 3 -> n", "'3' in 'n 3' is no axis"),
        ("n _c -> n", "'_c'"),
        ("n é -> n", "'é'"),
        ("n (g c) -> (n g)", "right side takes single axes"),
    ],
)
def test_parse_errors_say_what_is_wrong(text: str, problem: str):
    with pytest.raises(ValueError, match=problem) as caught:
        Pattern.parse(text)
    message = str(caught.value)
    assert message.startswith("pattern: ")
    assert message.endswith(".")
    assert "\n" not in message


def test_axes_are_written_as_read():
    for text in ("n c h w", "n (g c) ...", "c", ""):
        assert format_axes(parse_axes(text, "test")) == text


def test_expand_names_what_the_ellipsis_stands_for():
    pattern = Pattern.parse("n c ... -> n ...")
    assert str(pattern.expand(4)) == "n c x0 x1 -> n x0 x1"
    assert str(pattern.expand(2)) == "n c -> n"
    assert Pattern.parse("n c -> n").expand(2) == Pattern.parse("n c -> n")
    for ndim, text in ((1, "n c ... -> c"), (3, "n c -> n"), (1, "n c -> n")):
        with pytest.raises(ValueError, match=f"2( or more)? dimensions; the input has {ndim}"):
            Pattern.parse(text).expand(ndim)


def test_sizes():
    pattern = Pattern.parse("n (g c) ... -> n g")
    sizes = pattern.sizes((2, 12, 5, 7), {"g": 4})
    assert sizes == {"n": 2, "g": 4, "c": 3, "x0": 5, "x1": 7}
    assert pattern.expand(4).values_per_statistic(sizes) == 3 * 5 * 7
    assert pattern.sizes((2, 12), {"g": 4, "c": 3}) == {"n": 2, "g": 4, "c": 3}
    assert pattern.sizes((0, 12), {"g": 4})["n"] == 0
    for shape, given, problem in (
        ((2, 12), {}, "its product 12 is; give g="),
        ((2, 12), {"g": 5}, "g=5 does not"),
        ((2, 12), {"g": 4, "c": 4}, "g=4, c=4 does not"),
        ((2, 12), {"g": 0}, "g=0 does not"),
        ((2, 12), {"g": -4}, "g=-4 does not"),
        ((2, 12), {"g": 4, "n": 3}, "n=3 does not"),
    ):
        with pytest.raises(ValueError, match=problem):
            pattern.sizes(shape, given)


@pytest.mark.parametrize(
    ("definition", "layout", "pattern"),
    [
        (BATCH_NORM, "nc", "n c -> c"),
        (BATCH_NORM, "nhwc", "n h w c -> c"),
        (LAYER_NORM, "nlc", "n l c -> n l"),
        (LAYER_NORM, "ncl", "n c l -> n l"),
        (RMS_NORM, "nchw", "n c h w -> n h w"),
        (GROUP_NORM, "nchw", "n (g c) h w -> n g"),
        (GROUP_NORM, "ndhwc", "n d h w (g c) -> n g"),
        (INSTANCE_NORM, "ncdhw", "n c d h w -> n c"),
    ],
)
def test_a_definition_has_a_pattern_for_each_layout(definition: Definition, layout: str, pattern: str):
    assert str(definition.at(layout)) == pattern


def test_a_definition_at_every_layout_is_a_pattern_of_its_axes():
    for definition in DEFINITIONS.values():
        for layouts in LAYOUTS.values():
            for layout in layouts:
                pattern = definition.at(layout)
                if definition is INSTANCE_NORM and layout == "nc":
                    assert not pattern.averaged  # it has no positions to average
                    continue
                assert Pattern.parse(str(pattern)) == pattern
                assert pattern.averages_batch == (definition is BATCH_NORM)


# Each derived fact, observed. A norm is run in training on (N, C, positions) or (N, positions, C).

SHAPE = {"nc": (6, 4), "ncl": (6, 4, 5), "nlc": (6, 5, 4), "nchw": (6, 4, 3, 2)}


def run(definition: Definition, layout: str) -> Callable[[Tensor], Tensor]:
    """The function of that name, training, on that layout."""
    functional: dict[str, Callable[[Tensor], Tensor]] = {
        "batch_norm": lambda x: nf.batch_norm(x, None, None, training=True),
        "instance_norm": nf.instance_norm,
        "group_norm": lambda x: nf.group_norm(x, 2),
        "layer_norm": lambda x: nf.layer_norm(x, x.shape[-1:]),
        "rms_norm": lambda x: nf.rms_norm(x, x.shape[-1:]),
    }
    norm, axis = functional[definition.name], layout.index("c")
    last = definition.name in ("layer_norm", "rms_norm")
    return lambda x: norm(x.movedim(axis, -1 if last else 1)).movedim(-1 if last else 1, axis)


EVERY = [
    pytest.param(definition, layout, id=f"{definition.name}-{layout}")
    for definition in DEFINITIONS.values()
    for layout in SHAPE
    if not (definition is INSTANCE_NORM and layout == "nc")
]


def facts_of(definition: Definition, layout: str, shape: tuple[int, ...]):
    pattern = definition.at(layout)
    given = {"g": 2} if "g" in pattern.names else {}
    return facts(pattern, pattern.sizes(shape, given), centred=definition.centred)


@pytest.mark.parametrize(("definition", "layout"), EVERY)
class TestFacts:
    def test_depends_on_other_examples(self, definition: Definition, layout: str):
        x = torch.randn(SHAPE[layout], dtype=torch.float64)
        other = x.clone()
        other[1:] += torch.randn_like(x[1:])
        norm = run(definition, layout)
        moved = not torch.equal(norm(x)[0], norm(other)[0])
        assert moved == facts_of(definition, layout, x.shape).depends_on_other_examples

    def test_values_per_statistic(self, definition: Definition, layout: str):
        """The gradient of one output reaches exactly the values that share its statistics."""
        x = torch.randn(SHAPE[layout], dtype=torch.float64, requires_grad=True)
        dx = torch.autograd.grad(run(definition, layout)(x).flatten()[7], x)[0]
        found = facts_of(definition, layout, x.shape)
        assert dx.count_nonzero() == found.values_per_statistic
        pattern = definition.at(layout)
        reached = {
            name
            for axis, item in enumerate(pattern.left)
            for name in item
            if dx.movedim(axis, 0).flatten(1).any(1).sum() > 1
        }
        averaged = set(found.normalizes_across)
        assert reached == averaged | ({"g"} if "c" in averaged and "g" in pattern.names else set())

    def test_trains_on_one_value_per_channel(self, definition: Definition, layout: str):
        shape = [4 if axis == "c" else 1 for axis in layout]
        found = facts_of(definition, layout, tuple(shape))
        x = torch.randn(shape, requires_grad=True)
        if found.trains_on_one_value_per_channel:
            y = run(definition, layout)(x)
            assert torch.autograd.grad(y, x, torch.randn(shape))[0].any()
        else:
            with pytest.raises(ValueError, match="1 value per channel"):
                run(definition, layout)(x)

    def test_communicates(self, definition: Definition, layout: str):
        """Two shards of a batch, each normalized alone, differ from the whole or not."""
        x = torch.randn(SHAPE[layout], dtype=torch.float64)
        norm = run(definition, layout)
        alone = torch.cat([norm(x[:3]), norm(x[3:])])
        assert (not torch.equal(alone, norm(x))) == facts_of(definition, layout, x.shape).communicates

    def test_needs_running_statistics(self, definition: Definition, layout: str):
        """Served one example at a time, the norm differs from training, so it must remember something, or does not."""
        x = torch.randn(SHAPE[layout], dtype=torch.float64)
        norm = run(definition, layout)
        try:
            served = torch.cat([norm(x[i : i + 1]) for i in range(len(x))])
            differs = not torch.equal(served, norm(x))
        except ValueError:
            differs = True
        assert differs == facts_of(definition, layout, x.shape).needs_running_statistics

    def test_statistic_error(self, definition: Definition, layout: str):
        """The spread, over 20,000 Gaussian batches, of the variance that the norm divided by: 1 / slope².

        Its own sampling error is 1.3 % at worst (m = 2), so 5 % tells m - 1 from m up to m = 10.
        """
        x = torch.randn(20_000, *SHAPE[layout], dtype=torch.float64)
        found = facts_of(definition, layout, SHAPE[layout])
        y = torch.vmap(run(definition, layout))(x)
        shared = next(i for i, item in enumerate(definition.at(layout).left) if found.normalizes_across[0] in item)
        x0, y0, x1, y1 = (t.select(shared + 1, i).flatten(1)[:, 0] for i in (0, 1) for t in (x, y))
        slope = (y1 - y0) / (x1 - x0) if definition.centred else y0 / x0
        variance = slope.square().reciprocal() - 1e-5
        assert (variance.std() / variance.mean()).item() == pytest.approx(found.statistic_error, rel=0.05)


def test_statistic_error_without_a_variance():
    assert facts(BATCH_NORM.at("nc"), {"n": 1, "c": 3}).statistic_error == math.inf
    assert facts(RMS_NORM.at("nc"), {"n": 3, "c": 1}, centred=False).statistic_error == math.sqrt(2)


def test_a_split_batch_is_averaged_if_a_part_of_it_is():
    assert Pattern.parse("(a b) c -> a c").averages_batch
    assert not Pattern.parse("(a b) c -> a b").averages_batch
