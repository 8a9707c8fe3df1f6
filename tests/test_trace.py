"""The computation as data: every step against numpy, the last against the public functions, and the worked numbers."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import cases
import numpy as np
import pytest
import torch
from torch import Tensor

import normwise as nw
import normwise.functional as nf
from normwise import reference
from normwise.definitions import DEFINITIONS, Pattern
from normwise.explain.choose import named
from normwise.explain.trace import Norm, Trace, running_after, trace

WORKED = torch.tensor([[2, 4, 6], [3, 5, 7], [1, 3, 5], [4, 6, 8]]).double()
BROKEN = torch.tensor([[2, 4, 6], [3, 5, 7], [1, 3, 5], [4, 6, 14]]).double()
DY = torch.tensor([[1, -1, 2], [0, 3, -2], [-1, 1, 0], [2, 0, 1]]).double()
SIXTH = 5.1e-7
"""Half of the sixth decimal, to which facts are written, and a little for numbers that end in 5."""

NAMES = list(DEFINITIONS)
SHAPES = {
    "nc": (5, 6),
    "nlc": (3, 4, 6),
    "ncl": (3, 6, 4),
    "nchw": (2, 6, 3, 4),
    "nhwc": (2, 3, 4, 6),
    "ncdhw": (2, 6, 2, 3, 2),
    "ndhwc": (2, 2, 3, 2, 6),
}
EVERY = [
    (name, layout) for name, layout in itertools.product(NAMES, SHAPES) if (name, layout) != ("instance_norm", "nc")
]
GROUPS = 3
TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
every = pytest.mark.parametrize(("name", "layout"), EVERY, ids=["-".join(case) for case in EVERY])
dtypes = pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def one(name: str, x: Tensor, layout: str, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Norm:
    """The norm of this name, as `compare` chooses it."""
    groups = GROUPS if name == "group_norm" else None
    (norm,) = named([name], x, layout, groups, eps, weight, bias, None)
    return norm


def batch(layout: str, dtype: torch.dtype = torch.float64) -> Tensor:
    return (torch.randn(SHAPES[layout], dtype=torch.float64) * 2 + 3).to(dtype)


def parameters() -> tuple[Tensor, Tensor]:
    return torch.linspace(0.5, 2, 6, dtype=torch.float64), torch.linspace(-1, 1, 6, dtype=torch.float64)


def by_numpy(
    name: str, x: Tensor, layout: str, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> dict[str, np.ndarray]:
    """Each step of a norm in numpy, with the channels on the second axis."""
    moved = np.moveaxis(x.double().numpy(), layout.index("c"), 1)
    n, c = moved.shape[:2]
    values = moved.reshape(n, GROUPS, c // GROUPS, *moved.shape[2:]) if name == "group_norm" else moved
    rest = tuple(range(2, values.ndim))
    shared = {"batch_norm": (0, *rest), "instance_norm": rest, "group_norm": rest}.get(name, (1,))
    mean = np.zeros_like(values.mean(shared)) if name == "rms_norm" else values.mean(shared)
    var = np.square(values - np.expand_dims(mean, shared)).mean(shared)
    xhat = ((values - np.expand_dims(mean, shared)) / np.sqrt(np.expand_dims(var, shared) + eps)).reshape(moved.shape)
    axes = (1, -1, *[1] * (moved.ndim - 2))
    scale = 1 if weight is None else weight.numpy().reshape(axes)
    offset = 0 if bias is None or name == "rms_norm" else bias.numpy().reshape(axes)
    return {"mean": mean, "var": var, "rstd": 1 / np.sqrt(var + eps), "xhat": xhat, "y": xhat * scale + offset}


def by_function(name: str, x: Tensor, layout: str, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Tensor:
    """The public function, given the axes where it wants them."""
    channel = layout.index("c")
    if name in ("layer_norm", "rms_norm"):
        moved = x.movedim(channel, -1)
        if name == "rms_norm":
            return nf.rms_norm(moved, moved.shape[-1:], weight, eps).movedim(-1, channel)
        return nf.layer_norm(moved, moved.shape[-1:], weight, bias, eps).movedim(-1, channel)
    moved = x.movedim(channel, 1)
    if name == "group_norm":
        return nf.group_norm(moved, GROUPS, weight, bias, eps).movedim(1, channel)
    if name == "instance_norm":
        return nf.instance_norm(moved, None, None, weight, bias, eps=eps).movedim(1, channel)
    return nf.batch_norm(moved, None, None, weight, bias, training=True, eps=eps).movedim(1, channel)


def assert_equal_rounding(actual: np.ndarray, expected: Tensor) -> None:
    """Equal in the type of ``expected`` but for a few units in the last place, which another order of sums may cost."""
    found = torch.tensor(actual).to(expected.dtype)
    narrow = 2e-7 if cases.EXACT_SUMS else 1e-6  # in float32: 4 * 2**-24 of terms up to 4
    atol = 1e-13 if expected.dtype == torch.float64 else narrow
    torch.testing.assert_close(found, expected.detach(), rtol=torch.finfo(expected.dtype).eps * 4, atol=atol)


@every
@pytest.mark.parametrize("affine", [False, True], ids=["plain", "affine"])
def test_every_step_is_numpys(name: str, layout: str, affine: bool) -> None:
    x = batch(layout)
    weight, bias = parameters() if affine else (None, None)
    found, expected = trace(x, one(name, x, layout, weight, bias)), by_numpy(name, x, layout, weight, bias)
    for step in ("mean", "var", "rstd"):
        assert getattr(found, step).shape == expected[step].shape
        np.testing.assert_allclose(getattr(found, step), expected[step], rtol=1e-12, atol=1e-12)
    for step in ("xhat", "y"):
        actual = np.moveaxis(getattr(found, step), layout.index("c"), 1)
        np.testing.assert_allclose(actual, expected[step], rtol=1e-10, atol=1e-12)


@every
@dtypes
@pytest.mark.parametrize("affine", [False, True], ids=["plain", "affine"])
def test_last_step_is_the_public_function(name: str, layout: str, dtype: torch.dtype, affine: bool) -> None:
    x = batch(layout, dtype)
    weight, bias = (p.to(dtype) for p in parameters()) if affine else (None, None)
    found = trace(x, one(name, x, layout, weight, bias))
    assert_equal_rounding(found.y, by_function(name, x, layout, weight, bias))


@every
@pytest.mark.parametrize("affine", [False, True], ids=["plain", "affine"])
def test_backward_is_autograd_of_the_public_function(name: str, layout: str, affine: bool) -> None:
    x = batch(layout).requires_grad_()
    dy = torch.randn(x.shape, dtype=torch.float64) + 0.5
    weight, bias = parameters() if affine else (None, None)
    ones, zeros = torch.ones(6).double(), torch.zeros(6).double()
    used = [p.clone().requires_grad_() for p in ((weight, bias) if affine else (ones, zeros))]
    wanted = [x, *used][: 2 if name == "rms_norm" else 3]
    dx, dweight, *dbias = torch.autograd.grad(by_function(name, x, layout, *used), wanted, dy)
    b = trace(x.detach(), one(name, x, layout, weight, bias), dy).backward
    assert b is not None
    np.testing.assert_allclose(b.direct + b.through_mean + b.through_var, b.dx, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(b.dx, dx.numpy(), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(b.dweight, dweight.numpy(), rtol=1e-10, atol=1e-11)
    for expected in dbias:
        np.testing.assert_allclose(b.dbias, expected.numpy(), rtol=1e-12)
    assert (name == "rms_norm") == (not b.through_mean.any())
    assert b.through_var.any()


@dtypes
@pytest.mark.parametrize("layout", SHAPES)
@pytest.mark.parametrize("steps", [0, 1, 5])
def test_eval_is_the_public_function(layout: str, dtype: torch.dtype, steps: int) -> None:
    x = batch(layout, dtype)
    weight, bias = (p.to(dtype) for p in parameters())
    moved = x.movedim(layout.index("c"), 1)
    mean, var = torch.zeros(6).double(), torch.ones(6).double()
    for _ in range(steps):
        nf.batch_norm(moved.double(), mean, var, training=True)
    norm = one("batch_norm", x, layout, weight, bias)
    running = running_after(trace(x, norm), steps, 0.1)
    norm = dataclasses.replace(norm, running=running, training=False)
    found = trace(x, norm)
    np.testing.assert_allclose(found.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(found.var, var, rtol=1e-12)
    expected = nf.batch_norm(moved, mean, var, weight, bias).movedim(1, layout.index("c"))
    assert_equal_rounding(found.y, expected)
    dy = torch.ones_like(x)
    backward = trace(x, norm, dy).backward
    assert backward is not None
    assert not backward.through_mean.any()
    assert not backward.through_var.any()


@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("steps", [0, 1, 2, 50, 1000])
def test_many_steps_are_one_with_another_momentum(momentum: float, steps: int) -> None:
    norm = one("batch_norm", WORKED, "nc")
    found = running_after(trace(WORKED, norm), steps, momentum)
    mean, var = torch.zeros(3).double(), torch.ones(3).double()
    stats = reference.statistics(WORKED, norm.rows(WORKED), 1e-5)
    for _ in range(steps):
        reference.update_running_(mean, var, None, stats.mean.flatten(), stats.var.flatten(), 4, momentum)
    np.testing.assert_allclose(found.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(found.var, var, rtol=1e-12)


@pytest.mark.parametrize(
    ("text", "shared", "kept"),
    [
        ("n c h w -> c h w", (0,), (4, 3, 2)),
        ("n c h w -> n c w", (2,), (5, 4, 2)),
        ("n c h w -> w", (0, 1, 2), (2,)),
        ("n c h w ->", (0, 1, 2, 3), ()),
        ("b k y x -> k", (0, 2, 3), (4,)),
        ("n ... -> n", (1, 2, 3), (5,)),
    ],
)
def test_any_pattern(text: str, shared: tuple[int, ...], kept: tuple[int, ...]) -> None:
    x = torch.randn(5, 4, 3, 2).double()
    t = nw.compare(x, pattern=text).traces[-1]
    np.testing.assert_allclose(t.mean, x.numpy().mean(shared), atol=1e-12)
    np.testing.assert_allclose(t.var, x.numpy().var(shared), rtol=1e-12)
    assert t.mean.shape == kept
    assert_equal_rounding(t.y, nf.normalize(x, text))
    if 0 in shared:  # its running statistics are kept for each of the same axes
        assert t.norm.running is not None
        m = math.prod(x.shape[axis] for axis in shared)
        np.testing.assert_allclose(t.norm.running.var, 0.9 + 0.1 * t.var * m / (m - 1), rtol=1e-12)


def test_a_pattern_that_splits_an_axis() -> None:
    x = torch.randn(2, 6, 4, 4).double()
    t = nw.compare(x, pattern="b (g k) y x -> b g", groups=3).traces[-1]
    assert_equal_rounding(t.y, nf.group_norm(x, 3))
    t = nw.compare(x, pattern="n c (a h) w -> n c a", groups=2).traces[-1]
    assert_equal_rounding(t.y, nf.normalize(x, "n c (a h) w -> n c a", a=2))


REFUSED_SHAPES = [(1, 3), (2, 3), (1, 3, 1), (2, 3, 1), (1, 3, 2), (1, 1), (1, 3, 1, 1), (2, 1, 1, 1)]


@pytest.mark.parametrize("shape", REFUSED_SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_refused_as_the_public_function_does(name: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape).double()
    layout = {2: "nc", 3: "ncl", 4: "nchw"}[len(shape)]
    groups = shape[1] if name == "group_norm" else None
    (norm,) = named([name], x, layout, groups, 1e-5, None, None, None)
    calls = {"group_norm": lambda: nf.group_norm(x, shape[1])}
    try:
        y = calls.get(name, lambda: by_function(name, x, layout))()
        refusal = ""
    except ValueError as error:
        refusal = str(error)
    found = trace(x, norm)
    assert found.refused == refusal
    assert bool(found.y.size) != bool(refusal)
    if not refusal:
        assert_equal_rounding(found.y, y)


def test_facts_do_not_depend_on_the_letters() -> None:
    x = torch.randn(2, 6, 4, 4)
    for ours, theirs in [
        ("n c h w -> c", "b k y x -> k"),
        ("n c h w -> n h w", "b k y x -> b y x"),
        ("n (g c) h w -> n g", "b (k m) y x -> b k"),
    ]:
        a, b = (nw.compare(x, pattern=text, groups=2 if "(" in text else None).traces[-1] for text in (ours, theirs))
        assert dataclasses.replace(a.facts, normalizes_across=()) == dataclasses.replace(b.facts, normalizes_across=())


@pytest.mark.parametrize(
    ("pattern", "trains"),
    [
        ("n (g c) h w -> n g", True),
        ("n (c g) h w -> n c", True),
        ("b k y x -> b y x", True),
        ("b k y x -> b k", False),
        ("b (g k) y x -> b g k", False),
        ("b k y x -> k", False),
    ],
)
def test_facts_know_which_axis_holds_the_channels(pattern: str, trains: bool) -> None:
    facts = nw.compare(torch.randn(2, 6, 4, 4), pattern=pattern, groups=2 if "(" in pattern else None).traces[-1].facts
    assert facts.trains_on_one_value_per_channel == trains


def arrays(value: Any) -> Iterator[np.ndarray]:
    """Every array anywhere in a comparison."""
    if isinstance(value, np.ndarray):
        yield value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from arrays(getattr(value, field.name))
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from arrays(item)
    elif isinstance(value, Mapping):
        yield from arrays(list(value.values()))


def immutable_example() -> nw.Comparison:
    return nw.compare(BROKEN, "all", weight=[1, 2, 0.5], bias=[0, 1, -1], grad=True)


def test_arrays_are_read_only() -> None:
    found = list(arrays(immutable_example()))
    assert len(found) > 40
    for array in found:
        assert array.dtype == np.float64
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0


def test_objects_are_frozen() -> None:
    c = immutable_example()
    t = c.traces[0]
    for value in (c, t, t.norm, t.norm.running, t.backward, t.facts, c.notices[0], c.peers[0]):
        field = dataclasses.fields(value)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, field, None)
    for mapping in (t.sizes, t.norm.given, c.notices[0].values):
        with pytest.raises(TypeError, match="does not support item assignment"):
            mapping["n"] = 9


def test_later_changes_of_the_input_do_not_reach_in() -> None:
    x, layer = torch.randn(4, 3), torch.nn.BatchNorm1d(3)
    c = nw.compare(x, layer=layer)
    before = c.to_json()
    x.zero_()
    torch.nn.init.constant_(layer.weight, 7)
    layer.running_mean += 1
    assert c.to_json() == before


def of(x: Tensor, name: str, **settings: Any) -> Trace:
    return nw.compare(x, name, **settings).traces[0]


def near(actual: Any, expected: Any) -> None:
    np.testing.assert_allclose(actual, np.asarray(expected, dtype=float), rtol=0, atol=SIXTH)


def test_worked_batch_norm() -> None:
    t = of(WORKED, "batch_norm")
    near(t.mean, [2.5, 4.5, 6.5])
    near(t.var, [1.25] * 3)
    near(t.rstd, [0.894424] * 3)
    near(t.y, np.transpose([[-0.447212, 0.447212, -1.341635, 1.341635]] * 3))


def test_worked_layer_norm() -> None:
    t = of(WORKED, "layer_norm")
    near(t.mean, [4, 5, 3, 6])
    near(t.var, [2.666667] * 4)
    near(t.rstd, [0.612371] * 4)
    near(t.y, [[-1.224743, 0, 1.224743]] * 4)
    near(of(WORKED, "layer_norm", eps=0).y[0, 0], -1.2247449)


def test_worked_rms_norm() -> None:
    near(of(WORKED, "rms_norm").y[0], [0.462910, 0.925820, 1.388730])


def test_worked_batch_with_its_symmetry_broken() -> None:
    t = of(BROKEN, "batch_norm")
    near(t.mean[2], 8)
    near(t.var[2], 12.5)
    near(t.y[:, 2], [-0.565685, -0.282843, -0.848528, 1.697056])
    np.testing.assert_array_equal(t.y[:, :2], of(WORKED, "batch_norm").y[:, :2])
    t = of(BROKEN, "layer_norm")
    near([t.mean[3], t.var[3]], [8, 18.666667])
    near(t.y[3], [-0.925820, -0.462910, 1.388730])
    np.testing.assert_array_equal(t.y[:3], of(WORKED, "layer_norm").y[:3])


def test_worked_weight_and_bias() -> None:
    affine = {"weight": [1, 2, 0.5], "bias": [0, 1, -1]}
    near(of(WORKED, "batch_norm", **affine).y[0], [-0.447212, 0.105576, -1.223606])
    near(of(WORKED, "layer_norm", **affine).y, [[-1.224743, 1, -0.387629]] * 4)


WORKED_DX = {
    "batch_norm": [
        [0.804978, -1.520521, 1.520521],
        [-0.804978, 1.967732, -1.967732],
        [-0.268336, 0.357768, -0.357768],
        [0.268336, -0.804980, 0.804980],
    ],
    "layer_norm": [
        [0.510308, -1.020619, 0.510311],
        [-0.816493, 1.632990, -0.816497],
        [-0.306187, 0.612371, -0.306184],
        [0.306187, -0.612371, 0.306184],
    ],
}
WORKED_DWEIGHT = {"batch_norm": [3.577694, 0.447212, -0.447212], "layer_norm": [-2.449485, 0, 1.224743]}


@pytest.mark.parametrize("name", WORKED_DX)
def test_worked_backward(name: str) -> None:
    b = of(WORKED, name, grad=True).backward
    assert b is not None
    np.testing.assert_array_equal(b.dy, DY)
    near(b.dx, WORKED_DX[name])
    near(b.dweight, WORKED_DWEIGHT[name])
    near(b.dbias, [2, 3, 1])


def test_worked_neighbour() -> None:
    moved = WORKED.clone()
    moved[3] *= 10
    near(of(moved, "batch_norm").y[0], [-0.576818, -0.577105, -0.577210])
    np.testing.assert_array_equal(of(moved, "layer_norm").y[0], of(WORKED, "layer_norm").y[0])


SUBSETS = {1: [0], 2: [-1, 1, -1], 3: [0, -1.224736, -0.267260], 4: [-0.447212]}
EPS_CUTS = {2: 2.1e-5}  # ±1 is 1 / sqrt(1 + eps / 0.25)
SUBSET_VARIANCE = {1: 0, 2: 0.833333, 3: 1.111111, 4: 1.25}


@pytest.mark.parametrize("n", SUBSETS)
def test_worked_subsets(n: int) -> None:
    """The pinned value in all batches of n that hold s0, and the mean biased variance over all batches of n."""
    holding = [WORKED[[0, *others]] for others in itertools.combinations((1, 2, 3), n - 1)]
    for x, expected in zip(holding, SUBSETS[n], strict=True):
        near(of(x, "layer_norm").y[0, 0], -1.224743)
        if n == 1:
            with pytest.raises(ValueError, match="1 value per channel in training has no variance"):
                of(x, "batch_norm")
        else:
            tolerance = EPS_CUTS.get(n, SIXTH)
            np.testing.assert_allclose(of(x, "batch_norm").y[0, 0], expected, rtol=0, atol=tolerance)
    if n > 1:
        variances = [of(WORKED[list(some)], "batch_norm").var[0] for some in itertools.combinations(range(4), n)]
        near(np.mean(variances), SUBSET_VARIANCE[n])
        near(np.mean(variances) * n / (n - 1), 1.666667)


@pytest.mark.parametrize(("n", "percent"), [(2, 141), (4, 82), (8, 53), (32, 25)])
def test_relative_error_of_a_variance(n: int, percent: int) -> None:
    t = of(torch.randn(n, 3), "batch_norm")
    assert round(100 * t.facts.statistic_error) == percent


WORKED_EVAL = {
    0: ([0, 0, 0], 1, [1.999990, 3.999980, 5.999970]),
    1: ([0.25, 0.45, 0.65], 1.066667, [1.694422, 3.437257, 5.180091]),
    10: ([1.628304, 2.930947, 4.233590], 1.434214, [0.310370, 0.892669, 1.474969]),
}


@pytest.mark.parametrize("steps", WORKED_EVAL)
def test_worked_eval(steps: int) -> None:
    mean, var, s0 = WORKED_EVAL[steps]
    t = of(WORKED, "batch_norm", mode="eval", steps=steps)
    assert t.norm.running is not None
    near(t.norm.running.mean, mean)
    near(t.norm.running.var, [var] * 3)
    near(t.y[0], s0)
    share = 0.9**steps  # exact repair of a short history
    if steps:
        near(t.norm.running.mean / (1 - share), [2.5, 4.5, 6.5])
        near((t.norm.running.var - share) / (1 - share), [1.666667] * 3)


def test_worked_eval_never_meets_training() -> None:
    limit = of(WORKED, "batch_norm", mode="eval", steps=1000).y
    near(limit[0], [-0.387297] * 3)
    np.testing.assert_allclose(limit / of(WORKED, "batch_norm").y, math.sqrt(3 / 4), rtol=1e-5)  # eps: 1e-6 of it


def test_worked_shards() -> None:
    """What one process sees of its half of the batch."""
    near(abs(of(WORKED[:2], "batch_norm").y), np.full((2, 3), 1 / math.sqrt(1 + 4e-5)))
    assert of(WORKED[[0, 2]], "batch_norm").y[0, 0] == pytest.approx(1, abs=1e-4)
    halves = [of(WORKED[rows], "batch_norm") for rows in ([0, 2], [1, 3])]
    near(np.mean([t.var for t in halves], axis=0), [0.25] * 3)
    near(np.var([t.mean for t in halves], axis=0), [1.0] * 3)


def test_pattern_of_every_layout() -> None:
    """The names on the left are the layout's letters, whatever the norm."""
    for name, layout in itertools.product(NAMES, SHAPES):
        pattern: Pattern = one(name, batch(layout), layout).pattern
        assert "".join(item[-1] for item in pattern.left) == layout


@pytest.mark.parametrize("ratio", cases.RATIOS)
@pytest.mark.parametrize("name", ["batch_norm", "layer_norm", "rms_norm"])
def test_any_mean(name: str, ratio: float) -> None:
    x, dy = cases.draw((33, 31), ratio)
    c = cases.BY_NAME[name]
    exact = c.formula(x, None, None, dy)
    t = nw.compare(x, name, grad=dy).traces[0]
    assert t.backward is not None
    assert cases.error(torch.tensor(t.y), exact.y) <= cases.A1["y"]
    assert cases.error(torch.tensor(t.backward.dx), exact.dx) <= cases.A1["dx"]
