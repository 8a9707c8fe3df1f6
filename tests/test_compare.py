"""A comparison as a whole: what it notices, a layer of one's own, the summary, and how it is shown."""

from __future__ import annotations

import base64
import copy
import gzip
import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import normwise as nw
import normwise.functional as nf
from normwise.definitions import DEFINITIONS
from normwise.explain import labels, load_batch, notice_samples, page
from normwise.explain.trace import Norm

WORKED = torch.tensor([[2, 4, 6], [3, 5, 7], [1, 3, 5], [4, 6, 8]]).double()
BROKEN = torch.tensor([[2, 4, 6], [3, 5, 7], [1, 3, 5], [4, 6, 14]]).double()
NAMES = list(DEFINITIONS)


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return (torch.randn(shape, dtype=torch.float64) * 2 + 1).to(dtype)


def train(x: Tensor) -> np.ndarray:
    """Batch Norm of a batch (N, C, ...), from the public function."""
    return nf.batch_norm(x, None, None, training=True).double().numpy()


# Input and settings


def test_nothing_is_the_worked_batch() -> None:
    c = nw.compare()
    assert c.name == "worked batch"
    assert c.x.tolist() == WORKED.tolist()
    assert [t.norm.name for t in c.traces] == ["batch_norm", "layer_norm"]


@pytest.mark.parametrize(
    "as_input", [Tensor.tolist, Tensor.numpy, lambda x: x, lambda x: tuple(map(tuple, x.tolist()))]
)
def test_inputs(as_input: Callable[[Tensor], Any]) -> None:
    c = nw.compare(as_input(BROKEN))
    assert c.x.tolist() == BROKEN.tolist()
    assert c.name == "batch"


def test_integers_and_single_samples_are_said_so() -> None:
    c = nw.compare(torch.tensor([2, 4, 6]), "layer_norm")
    assert c.notes == ("integers read as float64", "read as one sample of 3 features")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtype(dtype: torch.dtype) -> None:
    c = nw.compare(BROKEN, dtype=dtype)
    name = str(dtype).removeprefix("torch.")
    assert c.dtype == name
    assert (name in c.to_text()) == (dtype != torch.float64)
    y = torch.tensor(c.traces[0].y)
    assert torch.equal(y.to(dtype).double(), y)


def test_half_precision_says_what_rounding_made_of_the_number() -> None:
    c = nw.compare(BROKEN, "batch_norm", dtype=torch.bfloat16)
    exact, rounded = c.traces[0].xhat[0, 0], c.traces[0].y[0, 0]
    assert f"= {exact:.6f}, in bfloat16 {rounded:.6f}" in " ".join(c.to_text().split())


@pytest.mark.parametrize(
    ("settings_", "words"),
    [
        ({"norms": "foo"}, "norms: each must be one of"),
        ({"norms": ["batch_norm", None]}, "got None"),
        ({"norms": ()}, "norms: there must be at least one"),
        ({"mode": "test"}, "mode: it must be train or eval"),
        ({"steps": -1}, "steps: it must be 0 or more"),
        ({"momentum": 1.5}, "momentum: it must be from 0 to 1"),
        ({"momentum": math.nan}, "momentum: it must be from 0 to 1"),
        ({"eps": -1e-5}, "eps: it must be 0 or more"),
        ({"eps": math.inf}, "eps: it must be 0 or more and finite"),
        ({"weight": [1, 2]}, "weight: it must have a value for each of 3 channels"),
        ({"weight": "abc"}, "weight: it must hold numbers"),
        ({"bias": [1, 2, math.nan]}, "bias: every value must be finite"),
        ({"cell": (4, 0)}, "cell: it must be an index into (4, 3)"),
        ({"cell": (0,)}, "cell: it must be an index into (4, 3)"),
        ({"cell": (-1, 0)}, "cell: it must be an index into (4, 3)"),
        ({"groups": 3}, "groups: it is for group_norm"),
        ({"groups": 2, "norms": "group_norm"}, "groups: it must divide the 3"),
        ({"groups": 0, "norms": "group_norm"}, "groups: it must divide the 3"),
        ({"layout": "nchw"}, "layout: it must fit the 2 axes"),
        ({"pattern": "n c"}, "pattern: it must read"),
        ({"pattern": "n c -> x"}, "'x' does not"),
        ({"pattern": "n c -> n c"}, "at least one axis must be averaged"),
        ({"pattern": "n c h w -> n"}, "describes 4 dimensions; the input has 2"),
        ({"pattern": "(a n) c -> a"}, "pattern: the batch must stay whole"),
        ({"pattern": "n (a b c) -> n a"}, "pattern: one axis may be split, in two"),
        ({"grad": torch.ones(3, 4)}, "grad: it must have the shape of x (4, 3)"),
        ({"dtype": torch.int32}, "float64, float32, bfloat16, float16"),
        ({"norms": "batch_norm", "x": [[1, 2, 3]]}, "1 value per channel in training"),
        ({"x": np.zeros((2, 2, 2, 2, 2, 2))}, "the batch must have 2 to 5 axes"),
        ({"x": [[math.nan, 1]]}, "every value must be finite"),
    ],
)
def test_wrong_settings(settings_: dict[str, Any], words: str) -> None:
    """One sentence that says what must hold, what came and what to do."""
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as caught:
        nw.compare(**{"x": WORKED, **settings_})
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("settings_", "words"),
    [
        ({"norms": 3}, "norms: it must be names of norms; got int"),
        ({"cell": 3}, "cell: it must be whole numbers; got 3"),
        ({"cell": (0.5, 1)}, "cell: it must be whole numbers"),
        ({"x": "[[1, 2]]"}, "x must hold numbers; got the text"),
        ({"layer": nn.Linear(3, 3)}, "layer must be a norm of torch.nn or normwise.nn; got Linear"),
    ],
)
def test_wrong_types(settings_: dict[str, Any], words: str) -> None:
    with pytest.raises(TypeError, match=r"\A[^\n]+\Z") as caught:
        nw.compare(**{"x": WORKED, **settings_})
    assert words in str(caught.value)


def test_grad_is_drawn_once_and_for_all() -> None:
    """Of mean 0.5: for a gradient that sums to 0, a wrong backward may pass."""
    c = nw.compare(random(50, 40), grad=True)
    expected = torch.empty(50, 40, dtype=torch.float64).normal_(0.5, 1, generator=torch.Generator().manual_seed(0))
    for t in c.traces:
        assert t.backward is not None
        assert t.backward.dy.tolist() == expected.tolist()
    assert c.notes == ("dy is drawn from a normal distribution, mean 0.5, sd 1, seed 0",)


@pytest.mark.parametrize(
    ("shape", "arguments", "layout"),
    [
        ((2, 3), {}, "nc"),
        ((2, 3, 4), {}, "nlc"),
        ((2, 3, 4), {"layout": "ncl"}, "ncl"),
        ((2, 3, 4, 5), {}, "nchw"),
        ((2, 3, 4, 5, 6), {}, "ncdhw"),
        ((2, 3, 4), {"pattern": "n c l -> n l"}, "ncl"),
        ((2, 3, 4), {"pattern": "a b c -> a"}, "nlc"),
        ((2, 3, 4, 5), {"pattern": "n h w c -> n"}, "nhwc"),
        ((2, 3, 4, 5), {"pattern": "... c -> ..."}, "nhwc"),
        ((2, 3, 4, 5), {"pattern": "n ... -> n"}, "nchw"),
        ((2, 3, 4, 5), {"pattern": "n (g c) h w -> n g"}, "nchw"),
        ((2, 3, 4, 5), {"pattern": "b k y x -> k"}, "nchw"),
        ((2, 3, 4), {"layer": nn.LayerNorm(4)}, "nlc"),
        ((2, 3, 4), {"layer": nn.BatchNorm1d(3)}, "ncl"),
        ((2, 3, 4, 5), {"layer": nn.LayerNorm(5)}, "nhwc"),
        ((2, 3, 4, 5), {"layer": nn.LayerNorm((3, 4, 5))}, "nchw"),
        ((2, 3, 4, 5), {"layer": nw.nn.LayerNorm2d(3)}, "nchw"),
        ((2, 3, 4, 5), {"layer": nn.LayerNorm(5), "layout": "nchw"}, "nchw"),
    ],
)
def test_layout(shape: tuple[int, ...], arguments: dict[str, Any], layout: str) -> None:
    c = nw.compare(random(*shape), **arguments)
    assert c.layout == layout
    assert (f"axes read as {layout}: " in c.to_text()) == (len(shape) > 2)


def test_layout_and_pattern_must_agree() -> None:
    with pytest.raises(
        ValueError, match=r"layout: it must agree with the pattern; 'nchw' does not with 'n h w c -> n'"
    ):
        nw.compare(random(2, 3, 4, 5), pattern="n h w c -> n", layout="nchw")


def test_the_screen_says_which_axes_layer_norm_takes() -> None:
    text = " ".join(nw.compare(random(2, 3, 4, 5)).to_text().split())
    assert "Layer Norm here takes the channels of each pixel of each sample, as transformers and ConvNeXt do" in text
    assert "the whole sample, as the GroupNorm paper draws it: --pattern 'n c h w -> n'" in text
    assert "Layer Norm here" not in nw.compare(random(2, 3, 4, 5), "batch_norm").to_text()


def test_a_pattern_stands_beside_batch_norm_unless_norms_are_named() -> None:
    x = random(2, 3, 4, 5)
    names = [t.norm.name for t in nw.compare(x, pattern="n c h w -> n").traces]
    assert names == ["batch_norm", "pattern"]
    for asked in ("batch_norm,layer_norm", ["batch_norm", "layer_norm"]):
        names = [t.norm.name for t in nw.compare(x, asked, pattern="n c h w -> n").traces]
        assert names == ["batch_norm", "layer_norm", "pattern"]


@pytest.mark.parametrize(("channels", "groups"), [(64, 32), (3, 1), (6, 3), (1, 1), (100, 25)])
def test_default_groups_leave_two_channels_or_more(channels: int, groups: int) -> None:
    assert nw.compare(random(2, channels, 3), "group_norm", layout="ncl").traces[0].sizes["g"] == groups


# A layer of one's own


def warm(layer: nn.Module, x: Tensor) -> nn.Module:
    """A layer that has seen three batches, and whose parameters are not 1 and 0."""
    for p in layer.parameters():
        nn.init.normal_(p, 1, 0.5)
    layer.train()
    for _ in range(3):
        layer(x + torch.randn_like(x))
    return layer


IMAGE, TOKENS, TABLE = (4, 6, 5, 3), (4, 5, 6), (8, 6)
LAYERS: list[tuple[Callable[[], nn.Module], tuple[int, ...]]] = [
    (lambda: nn.BatchNorm1d(6), TABLE),
    (lambda: nn.BatchNorm1d(5), TOKENS),
    (lambda: nn.BatchNorm2d(6), IMAGE),
    (lambda: nn.BatchNorm3d(6), (2, 6, 2, 3, 2)),
    (lambda: nn.BatchNorm2d(6, affine=False), IMAGE),
    (lambda: nn.BatchNorm2d(6, track_running_stats=False), IMAGE),
    (lambda: nn.BatchNorm2d(6, momentum=None, eps=1e-3), IMAGE),
    (lambda: nw.nn.BatchNorm2d(6), IMAGE),
    (lambda: nn.LayerNorm(6), TABLE),
    (lambda: nn.LayerNorm(6), TOKENS),
    (lambda: nn.LayerNorm((5, 6)), TOKENS),
    (lambda: nn.LayerNorm((6, 5, 3)), IMAGE),
    (lambda: nn.LayerNorm(3, elementwise_affine=False), IMAGE),
    (lambda: nn.LayerNorm(6, bias=False), TOKENS),
    (lambda: nw.nn.LayerNorm2d(6), IMAGE),
    (lambda: nn.RMSNorm(6), TOKENS),
    (lambda: nn.RMSNorm((5, 6), eps=1e-6), TOKENS),
    (lambda: nn.GroupNorm(3, 6), IMAGE),
    (lambda: nn.GroupNorm(2, 6, affine=False), TABLE),
    (lambda: nn.InstanceNorm2d(6), IMAGE),
    (lambda: nn.InstanceNorm2d(6, affine=True, track_running_stats=True), IMAGE),
    (lambda: nn.InstanceNorm1d(5, affine=True), TOKENS),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
@pytest.mark.parametrize(("make", "shape"), LAYERS, ids=[f"{i}-{make()}" for i, (make, _) in enumerate(LAYERS)])
def test_layer(make: Callable[[], nn.Module], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = random(*shape, dtype=dtype)
    layer = warm(make().to(dtype), x)
    state = copy.deepcopy(layer.state_dict())
    layer.eval()
    c = nw.compare(x, layer=layer)
    assert not layer.training
    assert layer.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in layer.state_dict().items())
    title, keeps = type(layer).__name__, getattr(layer, "running_mean", None) is not None
    own = c.traces[: 2 if keeps else 1]
    assert [t.norm.title for t in own] == ([f"{title} (train)", f"{title} (eval)"] if keeps else [title])
    for t, mode in zip(own, (True, False) if keeps else (layer.training,), strict=True):
        exact = copy.deepcopy(layer).double().train(mode)
        y = exact(x.double()).to(dtype).double()
        np.testing.assert_allclose(t.y, y.detach(), rtol=1e-12 if dtype == torch.float64 else 1e-2, atol=1e-12)
    assert title in c.to_text()
    assert len(c.to_html()) > 1000
    assert len(c.to_json()) > 1000


def test_layer_stands_beside_the_alternatives() -> None:
    x = random(*IMAGE)
    assert [t.norm.title for t in nw.compare(x, layer=nn.BatchNorm2d(6)).traces] == [
        "BatchNorm2d (train)",
        "BatchNorm2d (eval)",
        "Layer Norm",
    ]
    titles = [t.norm.title for t in nw.compare(x, "all", layer=nn.GroupNorm(2, 6)).traces]
    assert titles == ["GroupNorm", "Batch Norm", "Layer Norm", "RMSNorm", "Instance Norm"]
    assert len(nw.compare(x, (), layer=nn.GroupNorm(2, 6)).traces) == 1


def test_layer_note() -> None:
    layer = nn.BatchNorm1d(3)
    nn.init.constant_(layer.weight, 2)
    layer(random(4, 3, dtype=torch.float32))
    (note,) = nw.compare(random(4, 3), layer=layer).notes
    assert note == "BatchNorm1d: weight 2; bias 0; 1 batch tracked, momentum 0.1"
    (note,) = nw.compare(random(4, 3), layer=nn.LayerNorm(3, elementwise_affine=False)).notes
    assert note == "LayerNorm: no parameters"


def test_layer_without_statistics_in_eval_uses_the_batch() -> None:
    """So nothing is said about an eval() on running statistics."""
    c = nw.compare(random(*IMAGE), layer=nn.BatchNorm2d(6, track_running_stats=False))
    assert "eval" not in [n.kind for n in c.notices]


def test_one_sample_through_a_warm_layer() -> None:
    x = random(8, 3)
    c = nw.compare(x[:1], layer=warm(nn.BatchNorm1d(3).double(), x))
    trained, evaluated, *_ = c.traces
    assert trained.refused
    assert not evaluated.refused
    assert np.isfinite(evaluated.y).all()


@pytest.mark.parametrize(
    ("layer", "shape", "words"),
    [
        (nn.BatchNorm2d(7), IMAGE, "it has 7 channels; x (4, 6, 5, 3) has 6"),
        (nn.BatchNorm2d(6), TABLE, "x must have 4 axes"),
        (nn.BatchNorm1d(6), IMAGE, "x must have 2 or 3 axes"),
        (nn.InstanceNorm2d(4), (4, 6, 5), "x must have 4 axes"),
        (nn.LayerNorm(7), TOKENS, "must be normalized_shape (7,)"),
        (nn.LayerNorm((4, 5, 6)), TOKENS, "x must have a batch axis before (4, 5, 6)"),
        (nn.LazyBatchNorm2d(), IMAGE, "parameters must hold numbers"),
        (nn.LayerNorm(6, device="meta"), TOKENS, "parameters must hold numbers"),
    ],
    ids=repr,
)
def test_layer_that_does_not_fit(layer: nn.Module, shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as caught:
        nw.compare(random(*shape), layer=layer)
    assert words in str(caught.value)
    assert str(caught.value).startswith(type(layer).__name__)


# What to notice


def noticed(kind: str, x: Any, *args: Any, **kwargs: Any) -> list[Any]:
    """The notices of one kind; the same must stand on the screen."""
    c = nw.compare(x, *args, **kwargs)
    text = " ".join(c.to_text(width=120).split())
    for n in c.notices:
        assert " ".join(n.text().split()) in text
        assert "{" not in n.text()
    return [n for n in c.notices if n.kind == kind]


def test_notice_additive() -> None:
    (n,) = noticed("additive", None)
    assert n.text().startswith("Layer Norm made the 4 samples identical, Batch Norm the 3 features: every value is a ")
    assert n.text().endswith("a sample offset + a feature offset. Try --preset broken-symmetry")
    (n,) = noticed("additive", random(5, 1) + random(1, 4), "layer_norm")
    assert n.text() == "Layer Norm made the 5 samples identical: every value is a sample offset + a feature offset."
    for other in (BROKEN, random(5, 4), torch.full((4, 3), 2.0), WORKED[:1], WORKED.unsqueeze(-1)):
        assert noticed("additive", other) == []


def test_notice_thrown_away() -> None:
    x = random(6, 4)
    batch, layer, rms = noticed("thrown_away", x, "batch_norm,layer_norm,rms_norm")
    array = x.numpy()
    for n, axis, unit in ((batch, 0, "feature"), (layer, 1, "sample")):
        assert n.values["means"] == pytest.approx((array.mean(axis).min(), array.mean(axis).max()))
        assert n.values["sds"] == pytest.approx((array.std(axis).min(), array.std(axis).max()))
        assert n.text().endswith(f"of each {unit}.")
    square = np.sqrt(np.square(array).mean(1))
    assert rms.values["sds"] == pytest.approx((square.min(), square.max()))
    assert rms.text().endswith("of each sample; the mean stays.")
    assert noticed("thrown_away", WORKED, "batch_norm,layer_norm") == []
    assert noticed("thrown_away", x, "batch_norm", mode="eval") == []
    assert noticed("thrown_away", torch.full((4, 3), 2.0)) == []


def test_notice_kept() -> None:
    x = random(6, 4)
    (n,) = noticed("kept", x)
    samples = train(x).mean(1)
    features = nf.layer_norm(x, (4,)).numpy().mean(0)
    assert n.values["range0"] == pytest.approx((samples.min(), samples.max()))
    assert n.values["range1"] == pytest.approx((features.min(), features.max()))
    assert "after Batch Norm the samples' means still run" in n.text()
    for other in (WORKED, random(2, 3, 4), random(1, 4), torch.full((4, 3), 2.0)):
        assert noticed("kept", other) == []


def test_notice_constant() -> None:
    x = random(6, 5)
    x[:, [1, 3]] = torch.tensor([0.1, -7.0], dtype=torch.float64)
    (n,) = noticed("constant", x)
    assert n.text() == "2 of 5 features are constant in this batch (f1, f3): Batch Norm gives 0."
    assert n.values["where"] == [[1], [3]]
    x[2] = 0.3
    (n,) = noticed("constant", x, "layer_norm", bias=[1, 2, 3, 4, 5])
    assert n.text() == "1 of 6 samples is constant in this batch (s2): Layer Norm gives the bias."
    (n,) = noticed("constant", x.T, "batch_norm", eps=0)
    assert n.text() == "1 of 6 features is constant in this batch (f2): Batch Norm gives 0 / 0 = nan."
    for other in (random(6, 5), WORKED, [[1e-300, 2e-300], [3e-300, 1e-300]]):
        assert noticed("constant", other) == []


def test_notice_constant_pixels_of_the_digits() -> None:
    (n,) = noticed("constant", load_batch("digits"))
    assert n.text() == "17 of 64 features are constant in this batch: Batch Norm gives 0."


def test_notice_one_value() -> None:
    (n,) = noticed("one_value", random(5, 1))
    assert n.text() == "Layer Norm has one value for each sample: it gives 0 for any input."
    assert noticed("one_value", random(5, 2)) == []
    assert noticed("constant", random(5, 1)) == []


@pytest.mark.parametrize("scale", [1e-300, 1e300, 2e307])
def test_notice_out_of_range(scale: float) -> None:
    """And nothing else, for nothing else would be true."""
    c = nw.compare(random(4, 3) * scale, "layer_norm")
    assert [n.kind for n in c.notices] == ["out_of_range"]
    assert c.notices[0].text().startswith("4 of 4 variances of Layer Norm leave the range of float64")


@pytest.mark.parametrize("scale", [1e-100, 1.0, 1e100])
def test_notice_within_range(scale: float) -> None:
    assert noticed("out_of_range", random(4, 3) * scale) == []


@pytest.mark.parametrize(("cell", "other"), [((0, 0), 3), ((3, 2), 0)])
def test_notice_neighbour(cell: tuple[int, int], other: int) -> None:
    batch = load_batch(preset="broken-symmetry")
    moved = BROKEN.clone()
    moved[other] += 1
    (n,) = noticed("neighbour", batch, cell=cell)
    assert n.values["before"] == pytest.approx(train(BROKEN)[cell])
    assert n.values["after"] == pytest.approx(train(moved)[cell])
    assert n.text().startswith(f"Neighbour s{other} + 1: s{cell[0]},f{cell[1]} under Batch Norm goes ")
    assert n.text().endswith(", Layer Norm keeps every bit.")
    assert noticed("neighbour", BROKEN) == []


def leave_each_out(x: Tensor, normalize: Callable[[Tensor], np.ndarray]) -> list[tuple[float, int]]:
    """The largest move of what stays, for each sample left out, largest first: by the definition."""
    whole = normalize(x)
    moves = []
    for k in range(len(x)):
        stay = [i for i in range(len(x)) if i != k]
        moves.append((float(np.abs(normalize(x[stay]) - whole[stay]).max()), k))
    return sorted(moves, key=lambda move: (-move[0], move[1]))


@pytest.mark.parametrize("shape", [(5, 3), (3, 4, 2), (2, 3, 4)], ids=str)
def test_notice_left_out(shape: tuple[int, ...]) -> None:
    x = random(*shape)
    x[1] *= 3
    (n,) = noticed("left_out", x, layout=None if x.dim() == 2 else "ncl")
    expected = leave_each_out(x, train)
    assert [m["move"] for m in n.values["moves"]] == pytest.approx([move for move, _ in expected])
    assert [m["sample"] for m in n.values["moves"]] == [k for _, k in expected]
    assert n.values["other"] == expected[0][1]
    assert abs(n.values["after"] - n.values["before"]) == pytest.approx(expected[0][0])
    assert n.text().startswith(f"Leave s{expected[0][1]} out: under Batch Norm ")
    assert n.text().endswith("Layer Norm keeps every bit.")


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(9, 6), (6, 6, 3)], ids=str)
def test_closed_form_finds_the_most_influential_sample(
    shape: tuple[int, ...], weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is used where trying each sample takes too long."""
    monkeypatch.setattr(notice_samples, "EXACT", 0)
    weight = torch.tensor([1, 9, 1, 0.1, 1, -5]).double() if weighted else None
    layout = None if len(shape) == 2 else "ncl"
    for _ in range(4):
        x = random(*shape)
        (n,) = noticed("left_out", x, layout=layout, weight=weight)
        expected = leave_each_out(x, lambda v: nf.batch_norm(v, None, None, weight, training=True).numpy())
        assert n.values["tried"] == 1
        assert n.values["other"] == expected[0][1]
        assert abs(n.values["after"] - n.values["before"]) == pytest.approx(expected[0][0])


def test_closed_form_warns_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notice_samples, "EXACT", 0)
    assert len(noticed("left_out", random(5, 3) * 1e-158, eps=0)) == 1  # rstd² is infinite


def test_notice_left_out_without_a_move() -> None:
    x = torch.tensor([[1.0, 2.0]]).repeat(5, 1)
    (n,) = noticed("left_out", x)
    assert n.text() == "Leave any sample out: under Batch Norm the others stay as they are, Layer Norm keeps every bit."


def test_notice_left_out_that_ends_training() -> None:
    (n,) = noticed("left_out", random(2, 3))
    assert n.text() == "Leave s1 out: Batch Norm can no longer train, Layer Norm keeps every bit."


@pytest.fixture
def careless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Layer Norm whose results depend on the size of the batch."""
    run = Norm.run

    def run_carelessly(norm: Norm, x: Tensor) -> Any:
        found = run(norm, x)
        return found._replace(y=found.y + 1e-9 * len(x)) if norm.name == "layer_norm" else found

    monkeypatch.setattr(Norm, "run", run_carelessly)


@pytest.mark.usefixtures("careless")
def test_notice_bits_are_observed() -> None:
    (n,) = noticed("left_out", random(5, 3), "layer_norm,rms_norm")
    assert n.text() == "Leave s4 out: RMSNorm keeps every bit, Layer Norm changes by up to 1e-9."


@pytest.mark.usefixtures("careless")
def test_notice_every_time_is_observed() -> None:
    (n,) = noticed("fewer", random(5, 3), "batch_norm,layer_norm,rms_norm")
    assert "RMSNorm: " in n.text()
    assert "Layer Norm: " not in n.text()


def test_notice_nothing_to_leave_out() -> None:
    assert noticed("left_out", random(1, 3)) == []


def test_notice_eval_does_not_depend_on_the_others() -> None:
    (n,) = noticed("left_out", random(4, 3), mode="eval")
    assert n.text() == "Leave s3 out: Batch Norm and Layer Norm keep every bit."


def test_notice_fewer() -> None:
    x = random(4, 3)
    (n,) = noticed("fewer", x, cell=(1, 2))
    assert n.values["beside"] == pytest.approx([train(x[[1, k]])[0, 2] for k in (0, 2, 3)])
    assert n.values["separate0"] == pytest.approx(nf.layer_norm(x, (3,))[1, 2].item())
    assert "(beside s0, s2, s3); alone Batch Norm cannot train on it. Layer Norm: " in n.text()
    (n,) = noticed("fewer", random(4, 3, 2, 2), cell=(0, 1, 1, 1))
    assert math.isfinite(n.values["alone"])
    (n,) = noticed("fewer", random(2, 3))
    assert n.text().startswith("s0,f0 alone: Batch Norm cannot train on it. Layer Norm: ")
    (n,) = noticed("fewer", random(9, 3))
    assert f"is {n.values['low']:.3f} to {n.values['high']:.3f}; alone" in n.text()
    for other in (random(1, 3), random(300, 2)):
        assert noticed("fewer", other) == []
    assert noticed("fewer", x, "layer_norm") == []


def test_notice_untrained() -> None:
    (n,) = noticed("untrained", [[2, 4, 6]], mode="eval")
    assert n.text() == "Batch Norm cannot train on this batch: its running statistics are a new layer's, 0 and 1."
    assert noticed("untrained", [[2, 4, 6], [1, 2, 3]], mode="eval") == []
    assert noticed("untrained", [[2, 4, 6]], mode="eval", steps=0) == []


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(
    ("steps", "words"),
    [
        (0, "before any step"),
        (1, "after this one step"),
        (5, "running statistics still cold: 41% of this batch"),
        (100, "what stays: it divides by the unbiased variance, a factor 0.9129"),
    ],
)
def test_notice_eval(mode: str, steps: int, words: str) -> None:
    x = random(6, 3)
    mean, var = torch.zeros(3).double(), torch.ones(3).double()
    for _ in range(steps):
        nf.batch_norm(x, mean, var, training=True)
    y = nf.batch_norm(x, mean, var).numpy()
    (n,) = noticed("eval", x, mode=mode, steps=steps)
    assert n.values["y"] == pytest.approx(y[0])
    assert n.values["gap"] == pytest.approx(np.abs(y - train(x)).max())
    assert n.values["held"] == pytest.approx(1 - 0.9**steps)
    assert n.values["ratio"] == pytest.approx(math.sqrt(5 / 6))
    assert words in n.text()
    assert n.text().endswith("Layer Norm has no such state.")


def test_notice_no_eval_without_running_statistics() -> None:
    assert noticed("eval", random(6, 3), "layer_norm,instance_norm") == []
    assert noticed("eval", [[2, 4, 6]]) == []


def test_notice_layer_modes() -> None:
    x = random(*IMAGE)
    layer = warm(nn.BatchNorm2d(6).double(), x)
    trained, evaluated = (copy.deepcopy(layer).train(mode)(x).detach().numpy() for mode in (True, False))
    away = np.abs(trained - evaluated).max((0, 2, 3))
    (n,) = noticed("layer_modes", x, layer=layer)
    worst = int(away.argmax())
    assert n.values["channel"] == f"c{worst}"
    assert n.values["gap"] == pytest.approx(away[worst])
    assert n.values["rm"] == pytest.approx(layer.running_mean[worst].item())
    assert n.values["v"] == pytest.approx(x[:, worst].var(unbiased=False).item())
    assert noticed("layer_modes", x) == []
    assert noticed("layer_modes", random(*TOKENS), layer=nn.LayerNorm(6)) == []


def test_notice_ceiling() -> None:
    x = torch.randn(20, 3).double()
    assert noticed("ceiling", x) == []
    x[7, 1] = 1000
    (n,) = noticed("ceiling", x)
    assert n.text() == (
        f"s7,f1 = 1000 stands alone among its 20 values: Batch Norm gives {train(x)[7, 1]:.3f}; the ceiling is "
        "sqrt(20 - 1) = 4.359."
    )


def test_notice_eps() -> None:
    x = random(6, 3)
    x[:, 1] *= 1e-3
    (n,) = noticed("eps", x, "batch_norm")
    var = x[:, 1].var(unbiased=False).item()
    assert n.values["var"] == pytest.approx(var)
    assert n.values["shrunk"] == pytest.approx(1 - math.sqrt(var / (var + 1e-5)))
    assert "eps 1e-5)" in n.text()
    for arguments in ({"eps": 0}, {"eps": 1e-12}):
        assert noticed("eps", x, "batch_norm", **arguments) == []
    assert noticed("eps", random(6, 3) * 100) == []


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_notice_nonfinite(bad: float) -> None:
    x = random(4, 5)
    x[1, 2] = bad
    c = nw.compare(x, "batch_norm,layer_norm,rms_norm", allow_nonfinite=True)
    (n,) = c.notices
    assert n.text() == (
        "1 of 20 values is not finite. Outputs spoiled: Batch Norm 4, Layer Norm 5, RMSNorm 5: those that share "
        "statistics with one."
    )
    for t, spoiled in zip(c.traces, (np.s_[:, 2], np.s_[1], np.s_[1]), strict=True):
        untouched = np.ones((4, 5), bool)
        untouched[spoiled] = False
        assert np.isfinite(t.y[untouched]).all()
    assert "not finite" in c.to_text()


# Peers


def test_peers_are_torchs_and_close() -> None:
    c = nw.compare(random(3, 6, 4, 4), "all", groups=3)
    assert [p.layer for p in c.peers] == [
        "nn.BatchNorm2d(6)",
        "nn.LayerNorm(6) on x.permute(0, 2, 3, 1)",
        "nn.RMSNorm(6) on x.permute(0, 2, 3, 1)",
        "nn.GroupNorm(3, 6)",
        "nn.InstanceNorm2d(6)",
    ]
    assert all(p.close and p.difference < 1e-13 for p in c.peers)


def test_a_peer_that_overflows_is_not_called_equal() -> None:
    c = nw.compare(torch.tensor([[3e38, -3e38, 1e38], [1e38, 2e38, -3e38]]), "layer_norm")
    assert not c.peers[0].close
    assert math.isinf(c.peers[0].difference)
    assert "! torch's nn.LayerNorm(3) gives nan or inf in float32" in c.to_text()
    assert "largest difference" not in c.to_text()


def test_eps_0_has_no_batch_norm_in_torch() -> None:
    c = nw.compare(BROKEN, eps=0)
    assert [p.norm for p in c.peers] == ["Layer Norm"]
    np.testing.assert_allclose(
        c.traces[0].y[:, 0], [-1 / math.sqrt(5), 1 / math.sqrt(5), -3 / math.sqrt(5), 3 / math.sqrt(5)]
    )


# The summary: each derived row is seen to hold on the running norm


def run(name: str, x: Tensor) -> Tensor:
    """A norm in training on (N, C, H, W), or an error; Group Norm in two groups."""
    if name in ("layer_norm", "rms_norm"):
        return getattr(nf, name)(x.movedim(1, -1), x.shape[1:2]).movedim(-1, 1)
    if name == "group_norm":
        return nf.group_norm(x, 2)
    return nf.instance_norm(x) if name == "instance_norm" else nf.batch_norm(x, None, None, training=True)


def summary(c: nw.Comparison) -> dict[str, str]:
    """The summary of one norm, as it stands on the screen."""
    lines = c.to_text(summary=True, width=120).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("Summary"))
    column = lines[start].index(c.traces[0].norm.title)
    return {line[:column].strip(): line[column:].strip() for line in lines[start + 1 :]}


@pytest.mark.parametrize("name", NAMES)
def test_summary_is_observed(name: str) -> None:
    x = random(4, 6, 3, 2)
    c = nw.compare(x, name, groups=2 if name == "group_norm" else None)
    rows = summary(c)
    moved = x.clone()
    moved[3] += torch.randn(6, 3, 2)
    depends = not torch.equal(run(name, x)[:3], run(name, moved)[:3])
    assert rows["depends on the other examples"] == ("in training" if depends else "never")
    halves = torch.cat([run(name, x[:2]), run(name, x[2:])])
    assert rows["communicates in data-parallel training"] == ("no" if torch.allclose(halves, run(name, x)) else "yes")
    try:
        trains = run(name, random(1, 6, 1, 1)).isfinite().all().item()
    except ValueError:
        trains = False
    assert rows["trains on one value per channel"] == ("yes" if trains else "no")
    module = {"batch_norm": nn.BatchNorm2d(6), "group_norm": nn.GroupNorm(2, 6), "instance_norm": nn.InstanceNorm2d(6)}
    needs = getattr(module.get(name, nn.LayerNorm(6)), "running_mean", None) is not None
    assert rows["needs running statistics at inference"] == ("yes" if needs else "no")
    m = {"batch_norm": 24, "group_norm": 18, "instance_norm": 6}.get(name, 6)
    assert rows["values per statistic, m"] == str(m)
    root, error = ("√(2/m)", math.sqrt(2 / m)) if name == "rms_norm" else ("√(2/(m-1))", math.sqrt(2 / (m - 1)))
    assert rows[f"its relative error, {root}"] == f"{error:.1%}"
    assert rows["commonly used in"] == DEFINITIONS[name].used_in


@pytest.mark.parametrize(
    ("name", "shape", "across"),
    [
        ("batch_norm", (4, 6), "samples"),
        ("layer_norm", (4, 6), "features"),
        ("group_norm", (4, 6), "features of a group"),
        ("batch_norm", (4, 5, 6), "samples and positions"),
        ("layer_norm", (4, 5, 6), "channels"),
        ("batch_norm", (4, 6, 3, 2), "samples, rows and columns"),
        ("group_norm", (4, 6, 3, 2), "channels of a group, rows and columns"),
        ("instance_norm", (4, 6, 3, 2), "rows and columns"),
    ],
)
def test_summary_normalizes_across(name: str, shape: tuple[int, ...], across: str) -> None:
    assert summary(nw.compare(random(*shape), name))["normalizes across"] == across


@pytest.mark.parametrize("m", [2, 8, 32])
def test_relative_error_is_what_gaussian_values_show(m: int) -> None:
    draws = torch.randn(20_000, m).double().var(1)  # unbiased, of variance 1; 20,000 of them are good to a few percent
    assert draws.std().item() == pytest.approx(nw.compare(random(m, 3)).traces[0].facts.statistic_error, rel=0.05)


def test_a_layer_in_two_modes_is_one_column_of_the_summary() -> None:
    text = nw.compare(random(*IMAGE), layer=nn.BatchNorm2d(6)).to_text(summary=True)
    assert "BatchNorm2d  " in text
    assert "(eval)" not in text


def test_statistics_that_a_layer_keeps_without_need() -> None:
    c = nw.compare(random(*IMAGE), (), layer=nn.InstanceNorm2d(6, track_running_stats=True))
    assert "no, but uses them" in c.to_text(summary=True)


# JSON


def test_json_is_exact() -> None:
    x = random(4, 3)
    c = nw.compare(x, "all", grad=True, weight=[1, 2, 0.5])
    found = json.loads(c.to_json())
    assert (found["schema"], found["version"]) == ("normwise.comparison", 1)
    assert found["batch"]["values"] == c.x.tolist()
    assert found["batch"]["shape"] == [4, 3]
    assert [n["name"] for n in found["norms"]] == NAMES
    for data, t in zip(found["norms"], c.traces, strict=True):
        if t.refused:
            assert data["refused"] == t.refused
            assert data["y"] is None
            continue
        assert t.backward is not None
        assert data["y"] == t.y.tolist()
        assert data["xhat"] == t.xhat.tolist()
        assert data["statistics"] == {"mean": t.mean.tolist(), "var": t.var.tolist(), "rstd": t.rstd.tolist()}
        assert data["backward"]["dx"] == t.backward.dx.tolist()
        assert data["cell"] == {"xhat": t.xhat[0, 0], "y": t.y[0, 0]}
        assert data["facts"]["values_per_statistic"] == t.facts.values_per_statistic
    assert [n["kind"] for n in found["notices"]] == [n.kind for n in c.notices]
    assert found["peers"][0].keys() == {"layer", "norm", "largest_difference", "close"}


def test_json_names_what_is_no_number() -> None:
    c = nw.compare([[math.nan, math.inf, -math.inf, 1.0]], "rms_norm", allow_nonfinite=True)
    assert json.loads(c.to_json())["batch"]["values"] == [["NaN", "Infinity", "-Infinity", 1.0]]
    json.loads(c.to_json(), parse_constant=pytest.fail)


def test_json_keeps_lists_of_numbers_on_a_line_and_text_as_it_is() -> None:
    c = nw.compare(BROKEN)
    assert "\n      [2.0, 4.0, 6.0],\n" in c.to_json()
    assert json.loads(c.to_json()) == json.loads(c.to_json(indent=None))
    named = load_batch("[[1, 2], [3, 5]]")
    named = type(named)(named.values, 'a "name" [ 1,  2 ]\\', ("note [ 3,  4 ]",))
    data = json.loads(nw.compare(named).to_json())["batch"]
    assert (data["name"], data["notes"]) == (named.name, list(named.notes))


def test_json_of_a_large_batch_is_a_corner() -> None:
    c = nw.compare(random(100, 80))
    found = json.loads(c.to_json())
    assert found["batch"]["values"] == {"shape": [100, 80], "corner": c.x[:8, :8].tolist()}
    assert len(c.to_json()) < 50_000


# Text


@pytest.mark.parametrize(
    ("number", "output", "statistic"),
    [
        (0.0, "0.000", "0"),
        (-0.0, "0.000", "0"),
        (2.0, "2.000", "2"),
        (-0.4472, "-0.447", "-0.447"),
        (0.64, "0.640", "0.64"),
        (1e-5, "1.00e-5", "1e-5"),
        (0.0007, "0.001", "0.0007"),
        (-3.2e-310, "-3.20e-310", "-3.2e-310"),
        (12345.6, "12345.600", "12345.6"),
        (123456.7, "1.23e+5", "123456.7"),
        (1e30, "1.00e+30", "1e+30"),
        (math.nan, "nan", "nan"),
        (-math.inf, "-inf", "-inf"),
    ],
)
def test_numbers(number: float, output: str, statistic: str) -> None:
    assert labels.value(number) == output
    assert labels.short(number) == statistic


def test_inputs_of_a_table_have_the_same_decimals() -> None:
    assert labels.column([2.0, 0.5, -0.0, 1.25]) == ["2.00", "0.50", "0.00", "1.25"]
    assert labels.column([2.0, 4.0, math.nan]) == ["2", "4", "nan"]
    assert labels.column([2.0, 1e-9]) == ["2", "1e-9"]


@st.composite
def comparisons(draw: st.DrawFn) -> nw.Comparison:
    """Any small batch under any settings."""
    shape = draw(st.lists(st.integers(1, 7), min_size=2, max_size=5))
    if draw(st.booleans()):
        shape[draw(st.integers(0, len(shape) - 1))] *= 9
    layouts = {2: ["nc"], 3: ["nlc", "ncl"], 4: ["nchw", "nhwc"], 5: ["ncdhw", "ndhwc"]}[len(shape)]
    norms = draw(st.lists(st.sampled_from([n for n in NAMES if n not in ("batch_norm", "instance_norm")]), min_size=1))
    norms += draw(st.lists(st.sampled_from(["batch_norm", "instance_norm"])))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 9)))).double()
    x = x * draw(st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 1e7, 1e30])) + draw(st.sampled_from([0.0, 5.0, -1e4]))
    layout = draw(st.sampled_from(layouts))
    return nw.compare(
        x,
        norms,
        layout=layout,
        grad=draw(st.booleans()),
        mode=draw(st.sampled_from(["train", "eval"])),
        steps=draw(st.integers(0, 20)),
        eps=draw(st.sampled_from([0.0, 1e-5, 1.0])),
        dtype=draw(st.sampled_from([None, torch.float32, torch.bfloat16])),
        cell=[draw(st.integers(0, n - 1)) for n in shape],
        weight=draw(st.sampled_from([None, torch.linspace(-2, 3, shape[layout.index("c")])])),
    )


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(c=comparisons(), width=st.integers(40, 130), precision=st.integers(1, 15))
def test_text_fits(c: nw.Comparison, width: int, precision: int) -> None:
    for summary_ in (False, True):
        text = c.to_text(width=width, precision=precision, summary=summary_)
        assert max(map(len, text.splitlines())) <= width
        assert text.isascii() or not set(text) - set("√▁▂▃▄▅▆▇█") - set(map(chr, range(128)))
        assert "\x1b" not in text
        assert text.endswith("\n")
        assert not re.search(r"[ \t]\n", text)
    c.to_html()
    json.loads(c.to_json())


@pytest.mark.parametrize("width", [40, 60, 80, 120])
@pytest.mark.parametrize("layer", [nn.SyncBatchNorm(6), nn.InstanceNorm2d(6, track_running_stats=True)], ids=repr)
def test_text_of_long_titles_fits(layer: nn.Module, width: int) -> None:
    text = nw.compare(random(*IMAGE), layer=layer).to_text(width=width)
    assert max(map(len, text.splitlines())) <= width


def test_text_of_a_long_pattern_fits() -> None:
    pattern = "batch channel height width -> batch height width"
    text = nw.compare(random(*IMAGE), pattern=pattern).to_text()
    assert max(map(len, text.splitlines())) <= 80
    assert f"(Your pattern is {pattern})" in text


def test_colour_is_an_addition() -> None:
    c = nw.compare()
    plain, colored = c.to_text(), c.to_text(color=True)
    assert "\x1b[1m" in colored
    assert re.sub(r"\x1b\[\d*m", "", colored).split() == plain.split()


@pytest.mark.parametrize("precision", [1, 3, 6, 9])
def test_precision(precision: int) -> None:
    text = nw.compare().to_text(precision=precision)
    assert f" {nw.compare().traces[0].y[1, 0]:.{precision}f} " in text


def test_all_columns_of_a_small_batch_are_shown() -> None:
    for shape, precision in [((4, 3), 6), ((4, 3), 3), ((4, 5), 3), ((2, 3, 2, 2), 3)]:
        c = nw.compare(torch.arange(math.prod(shape)).reshape(shape).double() % 7, layout=None)
        text = c.to_text(precision=precision)
        assert "..." not in text.split("One number")[0]
        for v in c.traces[1].y.flat:
            assert f"{v + 0:.{precision}f}" in text


def test_a_large_batch_is_no_wall_of_numbers() -> None:
    x = random(500, 300)
    lines = nw.compare(x).to_text().splitlines()
    assert len(lines) < 70
    assert any(re.match(r"    Batch Norm +-\d\.\d+ +\d\.\d+ +0 +1   [▁▂▃▄▅▆▇█]+$", line) for line in lines)
    shown = [line for line in lines if re.match(r" +s\d+ ", line)]
    assert len(shown) == 8


def test_the_corner_holds_the_chosen_cell() -> None:
    x = random(500, 300)
    c = nw.compare(x, cell=(321, 123))
    text = c.to_text()
    assert re.search(r"^ +s321 +" + re.escape(f"{c.x[321, 123]:.3f}".rstrip("0")), text, re.MULTILINE)
    assert f"s321,f123 = {c.x[321, 123]:.6f}".rstrip("0") in text


@pytest.mark.parametrize(
    ("least", "most"), [(-1.7e308, 1.7e308), (5e-324, 1e-323), (1e16, 1e16 + 2), (1.0, 1.0 + 2e-16), (3.0, 3.0)]
)
def test_histogram_of_any_range(least: float, most: float) -> None:
    x = np.full((20, 8), least)
    x[0, 0] = most
    line = next(line for line in nw.compare(x, "layer_norm").to_text().splitlines() if line.startswith("    input "))
    assert re.search(r" [▁▂▃▄▅▆▇█]{9,16}$", line)
    assert line.count("█") == 1


def test_formula_has_the_digits_that_a_large_mean_takes() -> None:
    x = [[1e9 + 1, 1e9 + 2, 1e9 + 6]]
    assert "(1000000001 - 1000000003)" in nw.compare(x, "layer_norm").to_text()


def test_text_in_a_notebook_is_returned_and_not_displayed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert nw.compare().to_text().startswith("normwise compare")


def test_text_does_not_depend_on_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = nw.compare().to_text()
    for name, value in {"COLUMNS": "33", "FORCE_COLOR": "1", "TERM": "dumb", "NO_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    assert nw.compare().to_text() == expected


def test_str_and_repr() -> None:
    c = nw.compare()
    assert str(c) == repr(c) == c.to_text()


# HTML


class Page(HTMLParser):
    """The elements of a page, and a failure where one is left open."""

    VOID = ("meta", "br", "link", "!doctype")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        element = self.elements[-1][1] if self.open[-1:] == ["script"] else {}
        self.texts.setdefault(element.get("id") or (self.open[-1] if self.open else ""), []).append(data)


HOSTILE = "<script>alert(1)</script>&\"'.csv"
DATA = [{"type": "application/json", "id": "comparison"}, {"type": "application/json", "id": "recording"}]
PACKED = [{"type": "application/gzip", "id": "packed-style"}, {"type": "application/gzip", "id": "packed-script"}]


@pytest.mark.parametrize("shape", [(4, 3), (1, 3), (2, 3, 4), (2, 3, 4, 5), (50, 100)], ids=str)
def test_html_is_self_contained(shape: tuple[int, ...]) -> None:
    """No address but of an icon within, no handler in an attribute, and no script but the page's own, by its hash."""
    c = nw.compare(random(*shape), "all", grad=True)
    page = Page(c.to_html())
    assert [tag for tag, _ in page.elements].count("html") == 1
    for tag, attributes in page.elements:
        assert not {"src", "srcset", "data", "action"} & attributes.keys()
        assert tag not in ("link", "a") or attributes["href"].startswith("data:image/svg+xml,")
        assert not any(name.startswith("on") for name in attributes)
    policy = next(a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    scripts = [attributes for tag, attributes in page.elements if tag == "script"]
    assert scripts == [*DATA, *PACKED, {"type": "module"}]
    loader, packed = "".join(page.texts["script"]), "".join(page.texts["packed-script"])
    hashes = [hashlib.sha256(code).digest() for code in (loader.encode(), gzip.decompress(base64.b64decode(packed)))]
    digests = " ".join(f"'sha256-{base64.b64encode(h).decode()}'" for h in hashes)
    allowed = dict(directive.strip().split(" ", 1) for directive in str(policy).split(";"))
    assert (allowed["default-src"], allowed["script-src"]) == ("'none'", digests)
    assert json.loads("".join(page.texts["comparison"])) == json.loads(c.to_json())
    assert page.texts["recording"] == ["null"]
    style = "".join(page.texts["style"])
    assert "prefers-color-scheme: dark" in style
    assert "@import" not in style
    assert "url(" not in style
    said = "the batch" if c.x.size <= 4096 else "a corner of the batch"
    assert f"This file embeds {said} and" in "".join(page.texts["p"])


def test_html_holds_each_place_once() -> None:
    """What Python puts its data in the place of; the source of the page promises them."""
    for place in (
        "<title>normwise</title>",
        '<div id="static"></div>',
        '<script type="application/json" id="comparison">null</script>',
        '<script type="application/json" id="recording">null</script>',
    ):
        assert page.built().count(place) == 1


def test_html_shows_the_numbers_without_scripts() -> None:
    text = nw.compare().to_html()
    static = text[text.index('<div id="static">') : text.index("This file embeds")]
    for number in ("-0.447", "1.342", "-1.225", "1.225"):
        assert f">{number}</td>" in static
    assert "hidden" not in static
    assert "display: none" not in static


def test_html_with_a_recording() -> None:
    data = {"schema": "normwise.lab", "name": "</script><b>"}
    found = Page(page.render(nw.compare(), data))
    assert json.loads("".join(found.texts["recording"])) == data
    assert "what was computed from it and a recording (as JSON)" in "".join(found.texts["p"])


def test_html_escapes_names() -> None:
    loaded = load_batch("[[1, 2], [3, 5]]")
    hostile = type(loaded)(loaded.values, HOSTILE, (f"header line {HOSTILE!r} skipped",), (HOSTILE, "</script>"))
    c = nw.compare(hostile)
    found = Page(c.to_html())
    assert found.texts["title"] == [f"normwise: {HOSTILE}"]
    assert found.texts["h1"] == [HOSTILE]
    assert len([tag for tag, _ in found.elements if tag == "script"]) == 5
    assert json.loads("".join(found.texts["comparison"]))["batch"]["name"] == HOSTILE
    shown = Page(c._repr_mimebundle_()["text/html"])
    assert "script" not in [tag for tag, _ in shown.elements]


def test_html_marks_the_chosen_cell_and_shows_its_steps() -> None:
    c = nw.compare(random(30, 40), cell=(25, 33))
    html = c.to_html()
    marked = re.findall(r'<td class="chosen"[^>]*>([^<]+)</td>', html)
    assert len(marked) == 3
    assert float(marked[0]) == pytest.approx(c.x[25, 33], abs=5e-4)
    assert float(marked[1]) == pytest.approx(c.traces[0].y[25, 33], abs=5e-4)
    pre = "".join(Page(html).texts["pre"])
    assert f"= {c.traces[0].y[25, 33]:.6f}" in pre


def test_html_of_a_notebook() -> None:
    """The page in a sandboxed frame, and beside it the tables, hidden by nothing that outlives the frame."""
    c = nw.compare(load_batch("[[1, 2], [3, 5]]"))
    bundle = c._repr_mimebundle_()
    assert bundle["text/plain"] == c.to_text()
    shown = Page(bundle["text/html"])
    (frame,) = [attributes for tag, attributes in shown.elements if tag == "iframe"]
    assert frame["srcdoc"] == c.to_html()
    assert frame["sandbox"] == "allow-scripts allow-downloads"
    assert frame["title"] == "normwise: literal"
    assert "<script" not in bundle["text/html"]
    assert "<body" not in bundle["text/html"]
    hiding = re.findall(r"[^{}>]*\{[^{}]*display: none[^{}]*\}", re.sub('srcdoc="[^"]*"', "", bundle["text/html"]))
    assert hiding == [".nw-frame + .nw-static { display: none }"]
    assert "<td" in bundle["text/html"].split("</iframe>")[1]


def test_one_number_on_the_screen_can_be_followed_by_hand() -> None:
    """Every formula, with the numbers shown in it, gives the number shown for it."""
    x = random(5, 4, 3)
    norms = ["batch_norm", "layer_norm", "rms_norm", "group_norm", "instance_norm"]
    for layout, cell in itertools.product(("nlc", "ncl"), ((0, 0, 0), (3, 2, 1))):
        n = x.shape[layout.index("c")]
        c = nw.compare(
            x, norms, layout=layout, cell=cell, weight=torch.linspace(1, 2, n), bias=torch.linspace(-1, 1, n)
        )
        text = " ".join(c.to_text(width=120).split())
        formulas = re.findall(
            r"(\(?-?[\d.]+(?: [-+] [\d.]+\))?) / (sqrt\([\d.]+ \+ eps\)(?: [*+-] -?[\d.]+)*) = (-?[\d.]+)", text
        )
        assert len(formulas) == 5
        for above, below, result in formulas:
            value = eval(f"{above} / {below}", {"sqrt": math.sqrt, "eps": 1e-5})
            assert value == pytest.approx(float(result), abs=5e-6)
