"""The contract, A1 to A4, for every norm and backend; R1 to R3 are promises of the kernels and tested with them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator

import cases
import pytest
import torch
from cases import Norm

import normwise.functional as nf
from normwise.kernels import memory

pytestmark = pytest.mark.usefixtures("backend", "poisoned")

NORMAL = torch.finfo(torch.float32)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """New memory holds NaN, so that an output which is not written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    memory.poison(True)
    yield
    memory.poison(False)
    torch.use_deterministic_algorithms(before)


@pytest.fixture(params=cases.NORMS, ids=str)
def norm(request: pytest.FixtureRequest) -> Norm:
    return request.param


def test_memory_is_poisoned():
    assert torch.empty(1000).isnan().all()


# A1: float32, any mean


@pytest.mark.parametrize("size", cases.SIZES)
@pytest.mark.parametrize("ratio", cases.RATIOS)
def test_any_mean_at_any_size(norm: Norm, ratio: float, size: int):
    x, dy = cases.draw(norm.shape(size), ratio)
    weight, bias = norm.parameters(x)
    if 0 < size < norm.smallest:
        with pytest.raises(ValueError, match="1 value per channel"):
            norm(x, weight, bias, dy)
        return
    truth = norm.truth(x, weight, bias, dy)
    # of one or two values the exact gradients are what is left of a few terms that cancel: measured against those terms
    few = {"dx": torch.stack(truth.dx_terms)} if size <= 2 else {}
    if few and not cases.EXACT_SUMS:
        few |= {"dweight": dy.double(), "dbias": dy.double()}
    cases.assert_a1(norm(x, weight, bias, dy), truth, **few)


@pytest.mark.parametrize("ratio", cases.RATIOS)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_any_mean_in_any_layout(norm: Norm, layout: str, ratio: float):
    x, dy = map(cases.LAYOUTS[layout], cases.draw(cases.IMAGE, ratio))
    weight, bias = norm.parameters(x)
    cases.assert_a1(norm(x, weight, bias, dy), norm.truth(x, weight, bias, dy))


@pytest.mark.parametrize("ratio", cases.RATIOS)
def test_any_mean_over_many_rows(norm: Norm, ratio: float):
    x, dy = cases.draw(cases.MANY_ROWS[norm.name], ratio)
    weight, bias = norm.parameters(x)
    cases.assert_a1(norm(x, weight, bias, dy), norm.truth(x, weight, bias, dy))
    cases.assert_a1(norm(x, None, None, dy), norm.truth(x, None, None, dy))


# A2: half precision


def assert_a2(norm: Norm, x: torch.Tensor, dy: torch.Tensor, parameter_dtype: torch.dtype) -> None:
    weight, bias = norm.parameters(x, parameter_dtype)
    got, truth = norm(x, weight, bias, dy), norm.truth(x, weight, bias, dy)
    # float32 sums are good to the size of what they add up, float64 ones to the sum itself
    dx_terms = truth.dx_terms if cases.EXACT_SUMS else truth.dx_magnitudes
    for name, terms in (("y", truth.y_terms), ("dx", dx_terms)):
        actual, exact = getattr(got, name), getattr(truth, name)
        assert actual.dtype == x.dtype
        assert ((actual.double() - exact).abs() <= cases.a2_elementwise(exact, terms, x.dtype)).all(), name
    limit = cases.A2_SUMS.get(parameter_dtype, cases.A2_WIDE)
    for name, parameter in (("dweight", weight), ("dbias", bias)):
        if parameter is not None:
            assert getattr(got, name).dtype == parameter_dtype
            scale = max(getattr(truth, name), truth.summands[name], key=torch.linalg.vector_norm)
            scale = None if cases.EXACT_SUMS else scale
            assert cases.error(getattr(got, name), getattr(truth, name), scale) <= limit, name


@pytest.mark.parametrize("ratio", cases.HALF_RATIOS)
@pytest.mark.parametrize(("dtype", "parameter_dtype"), cases.HALF_TYPES, ids=str)
@pytest.mark.parametrize("size", [0, 2, 33, 1023])
def test_half_precision_at_any_size(
    norm: Norm, dtype: torch.dtype, parameter_dtype: torch.dtype, ratio: float, size: int
):
    assert_a2(norm, *cases.draw(norm.shape(size), ratio, dtype), parameter_dtype)


@pytest.mark.parametrize(("dtype", "parameter_dtype"), cases.HALF_TYPES, ids=str)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_half_precision_in_any_layout(norm: Norm, dtype: torch.dtype, parameter_dtype: torch.dtype, layout: str):
    x, dy = map(cases.LAYOUTS[layout], cases.draw(cases.IMAGE, 3.0, dtype))
    assert_a2(norm, x, dy, parameter_dtype)


@pytest.mark.parametrize(("dtype", "parameter_dtype"), cases.HALF_TYPES, ids=str)
def test_half_precision_over_many_rows(norm: Norm, dtype: torch.dtype, parameter_dtype: torch.dtype):
    assert_a2(norm, *cases.draw(cases.MANY_ROWS[norm.name], 0.0, dtype), parameter_dtype)


# A3: any scale


@pytest.mark.parametrize("eps", [0.0, cases.EPS])
@pytest.mark.parametrize(("dtype", "scale"), cases.SCALES, ids=str)
def test_any_scale(norm: Norm, dtype: torch.dtype, scale: float, eps: float):
    x = ((torch.rand(norm.shape(33), dtype=torch.float64) * 2 - 1) * scale).to(dtype)
    assert x.isfinite().all()
    weight, bias = norm.parameters(x)
    # zero statistics of the past: those of x itself may not fit its type
    running = (torch.zeros(x.shape[1], dtype=dtype), torch.ones(x.shape[1], dtype=dtype)) if norm.running(x) else None
    y, exact = norm.call(nf, x, weight, bias, eps, running), norm.truth(x, weight, bias, x, eps, running)
    info = torch.finfo(dtype)
    normal = (exact.y.abs() >= info.tiny) & (exact.y.abs() <= info.max)
    bound = cases.A1["y"] if dtype == torch.float32 else info.eps / 2
    assert normal.any() or eps  # which outweighs the variance of tiny values
    assert cases.error(y[normal], exact.y[normal]) <= bound


@pytest.mark.parametrize(
    ("dtype", "scale", "running_dtype"),
    [
        (torch.float32, 3e38, torch.float32),
        (torch.bfloat16, 3e38, torch.bfloat16),
        (torch.float16, 6e4, torch.float16),
        (torch.float64, 1e100, torch.float32),
    ],
)
@pytest.mark.parametrize("momentum", [0.1, 1.0])
def test_running_variance_saturates(dtype: torch.dtype, scale: float, running_dtype: torch.dtype, momentum: float):
    x = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=dtype)[:, None, None].expand(4, 2, 3) * scale
    x = torch.cat([x[:, :1], torch.randn_like(x[:, 1:])], dim=1)
    limit = torch.finfo(running_dtype).max
    for norm in (nf.batch_norm, nf.instance_norm):
        mean, var = torch.zeros(2, dtype=running_dtype), torch.ones(2, dtype=running_dtype)
        values = x if norm is nf.batch_norm else x.transpose(0, 2)
        for step in range(1, 4):
            with pytest.warns(UserWarning, match=r"running_var must fit its type.*exceeds.*scale the input down"):
                y = norm(values, mean, var, None, None, True, momentum)
            assert y.isfinite().all()
            expected = limit * (1 - (1 - momentum) ** step) + (1 - momentum) ** step
            assert var[0].item() == pytest.approx(expected, rel=4 * torch.finfo(running_dtype).eps)
            assert var.isfinite().all()
            assert var[1] < 10  # the other channel is its own


def test_running_variance_saturates_beside_a_bad_channel():
    x = torch.randn(8, 3)
    x[:, 0] = math.nan
    x[:, 1] *= 1e30
    mean, var = torch.zeros(3), torch.ones(3)
    with pytest.warns(UserWarning, match="running_var must fit its type"):
        nf.batch_norm(x, mean, var, training=True)
    assert var[1:].isfinite().all()


def test_running_variance_warns_only_when_it_saturates():
    mean, var = torch.zeros(3), torch.ones(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nf.batch_norm(torch.randn(5, 3) * 1e18, mean, var, training=True)
    assert (var > 1e34).all()


# A4: containment


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["x", "dy"])
def test_bad_values_are_contained(norm: Norm, where: str, bad: float):
    x, dy = cases.draw(cases.IMAGE)
    weight, bias = norm.parameters(x)
    running = norm.running(x)
    clean = norm(x, weight, bias, dy, running=running)
    index = (1, 2, 3, 4)
    (x if where == "x" else dy)[index] = bad
    spoilt = norm(x, weight, bias, dy, running=running)
    share = norm.share(x, index)
    assert share.any()
    assert not share.all()
    for name in ("y", "dx"):
        got, want = getattr(spoilt, name), getattr(clean, name)
        assert torch.equal(got[~share], want[~share]), name
    if where == "x":
        assert not spoilt.y[index].isfinite()
    assert not spoilt.dx[share].isfinite().all() or (where == "x" and running is not None)
    # sums over rows may be spoilt, but only of the parameter that met the bad value or its row
    reached = norm.spread(torch.ones_like(weight), x).expand(x.shape).clone()
    reached[~share] = 0
    axes = [axis for axis in range(x.dim()) if axis not in [a % x.dim() for a in norm.affine]]
    untouched = reached.sum(axes) == 0
    for name in ("dweight", "dbias") if bias is not None else ("dweight",):
        assert torch.equal(getattr(spoilt, name)[untouched], getattr(clean, name)[untouched]), name


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_bad_values_are_contained_in_running_statistics(bad: float):
    x = torch.randn(4, 3, 5)
    clean, spoilt = [(torch.zeros(3), torch.ones(3)) for _ in range(2)]
    nf.batch_norm(x, *clean, training=True)
    x[1, 2, 3] = bad
    nf.batch_norm(x, *spoilt, training=True)
    for want, got in zip(clean, spoilt, strict=True):
        assert torch.equal(got[:2], want[:2])
        assert not got[2].isfinite()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_running_statistics_are_contained(bad: float):
    x = torch.randn(4, 3, 5)
    mean, var = torch.zeros(3), torch.ones(3)
    clean = nf.batch_norm(x, mean, var)
    mean[1] = bad
    spoilt = nf.batch_norm(x, mean, var)
    assert torch.equal(spoilt[:, [0, 2]], clean[:, [0, 2]])
    assert not spoilt[:, 1].isfinite().any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, 3e38])
@pytest.mark.parametrize("by_example", [True, False])
@pytest.mark.parametrize("name", ["group_norm", "instance_norm", "batch_norm"])
def test_masked_values_reach_nothing(name: str, by_example: bool, bad: float):
    x, dy = cases.draw((4, 4, 6))
    mask = torch.tensor([True, False, True, True]) if by_example else torch.rand(4, 6) < 0.7
    call = {
        "group_norm": lambda x: nf.group_norm(x, 2, mask=mask),
        "instance_norm": lambda x: nf.instance_norm(x, mask=mask),
        "batch_norm": lambda x: nf.batch_norm(x, None, None, training=True, mask=mask),
    }[name]
    results = []
    valid = (mask[:, None, None] if by_example else mask[:, None]).expand(x.shape)
    for filling in (0.0, bad):
        leaf = x.masked_fill(~valid, filling).requires_grad_()
        y = call(leaf)
        results.append((y.detach(), *torch.autograd.grad(y, leaf, dy.masked_fill(~valid, filling))))
    for want, got in zip(*results, strict=True):
        assert torch.equal(got, want)
        assert (got[~valid] == 0).all()
