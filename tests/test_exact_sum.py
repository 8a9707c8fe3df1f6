"""Contract R3: Batch Norm's bits do not depend on how a batch is split into parts, nor on the order of its examples."""

from __future__ import annotations

from fractions import Fraction

import cases
import pytest
import torch
from torch import Tensor

import normwise as nw
import normwise.functional as nf
from normwise.exact_sum import DIGITS, exact_sum, two_product, value

OPS = torch.ops.normwise
ON_KERNELS = not nw.backends()["cpu"].startswith("reference")
EPS = 1e-5


def training(x: Tensor, dy: Tensor, order: Tensor | None = None, mask: Tensor | None = None) -> list[Tensor]:
    """y, dx, dweight, dbias, running_mean and running_var, with y and dx in the original order."""
    weight, bias = (torch.linspace(a, b, x.shape[1]).requires_grad_() for a, b in ((0.5, 1.5), (-1.0, 1.0)))
    mean, var = torch.zeros(x.shape[1]), torch.ones(x.shape[1])
    order = torch.arange(len(x)) if order is None else order
    back = torch.argsort(order)
    leaf = x[order].contiguous(memory_format=layout(x)).requires_grad_()
    mask = None if mask is None else mask[order]
    y = nf.batch_norm(leaf, mean, var, weight, bias, training=True, mask=mask, reproducible=True)
    y.backward(dy[order])
    return [y.detach()[back], leaf.grad[back], weight.grad, bias.grad, mean, var]


def layout(x: Tensor) -> torch.memory_format:
    last = x.dim() == 4 and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def in_parts(parts: list[tuple[Tensor, Tensor]], weight: Tensor) -> list[Tensor]:
    """The same by sums that are merged: mean, var, then y and dx of all parts, dweight and dbias."""
    mean, var, count = OPS.batch_norm_moments(sum(OPS.batch_norm_sums(x, EPS, None, True) for x, _ in parts))
    sums = sum(OPS.batch_norm_gradient_sums(dy, x, mean, var, EPS, None, True) for x, dy in parts)
    y = [OPS.batch_norm(x, mean, var, weight, weight, EPS, None) for x, _ in parts]
    grads = [
        OPS.batch_norm_backward_of_sums(
            dy, x, mean, var, EPS, None, sums, count, weight, torch.float32, [True, True, True]
        )
        for x, dy in parts
    ]
    return [mean, var, torch.cat(y), torch.cat([g[0] for g in grads]), grads[0][1], grads[0][2]]


@pytest.mark.skipif(not ON_KERNELS, reason="no order of the reference's float64 sums is promised")
@pytest.mark.parametrize(
    ("dtype", "ratio"),
    [*((d, r) for d in (torch.float32, torch.float64) for r in cases.RATIOS),
     *((d, r) for d in (torch.bfloat16, torch.float16) for r in cases.HALF_RATIOS)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize(
    ("shape", "last"), [((23, 5, 4, 4), False), ((23, 5, 4, 4), True), ((9, 3, 1100), False), ((40, 7), False)], ids=str
)
def test_a_permuted_batch_has_the_same_bits(shape: tuple[int, ...], last: bool, ratio: float, dtype: torch.dtype):
    x, dy = cases.draw(shape, ratio, dtype)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    x[::3] *= 7  # examples of different size, so that sums of them in float64 would differ
    first = training(x, dy)
    for _ in range(5):
        again = training(x, dy, torch.randperm(shape[0]))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.skipif(not ON_KERNELS, reason="no order of the reference's float64 sums is promised")
def test_a_permuted_masked_batch_has_the_same_bits():
    x, dy = cases.draw((17, 4, 5, 5), 1e3)
    mask = torch.rand(17, 5, 5) < 0.7
    first = training(x, dy, mask=mask)
    for _ in range(5):
        again = training(x, dy, torch.randperm(17), mask)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("ratio", [0.0, 1e4, 1e6])
@pytest.mark.parametrize("shape", [(24, 5, 4, 4), (40, 7)], ids=str)
def test_any_split_into_parts_merged_has_the_same_bits(shape: tuple[int, ...], ratio: float):
    x, dy = cases.draw(shape, ratio)
    x[::3] *= 7
    weight = torch.linspace(0.5, 1.5, shape[1])
    whole = in_parts([(x, dy)], weight)
    for _ in range(10):
        order = torch.randperm(len(x))
        cuts = torch.randint(0, len(x) + 1, (int(torch.randint(1, 13, ())),)).sort().values.tolist()  # empty parts, too
        pieces = [order[a:b] for a, b in zip([0, *cuts], [*cuts, len(x)], strict=True)]
        mean, var, y, dx, dweight, dbias = in_parts([(x[i], dy[i]) for i in pieces], weight)
        back = torch.argsort(order)
        again = [mean, var, y[back], dx[back], dweight, dbias]
        assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))


@pytest.mark.skipif(not ON_KERNELS, reason="the reference adds float64 in torch's order")
@pytest.mark.parametrize("ratio", [0.0, 1e4])
def test_merged_parts_equal_one_process(ratio: float):
    x, dy = cases.draw((24, 5, 4, 4), ratio)
    weight = torch.linspace(0.5, 1.5, 5)
    leaf, w, b = x.clone().requires_grad_(), weight.clone().requires_grad_(), weight.clone().requires_grad_()
    y = nf.batch_norm(leaf, None, None, w, b, training=True, reproducible=True)
    y.backward(dy)
    merged = in_parts([(x[:5], dy[:5]), (x[5:5], dy[5:5]), (x[5:], dy[5:])], weight)
    assert all(torch.equal(p, q) for p, q in zip(merged[2:], (y, leaf.grad, w.grad, b.grad), strict=True))


@pytest.mark.parametrize("scale", [1e-120, 1e-105, 1e-60, 1e100])
def test_gradients_of_any_size_in_float64(scale: float):
    """What the grid of exact sums cannot hold is added in order."""
    x, dy = (t.double() for t in cases.draw((6, 3, 20)))
    found = []
    for factor in (1.0, scale):
        leaf, w, b = x.clone().requires_grad_(), *(torch.ones(3, dtype=torch.float64).requires_grad_() for _ in "wb")
        y = nf.batch_norm(leaf, None, None, w, b, training=True, reproducible=True)
        found.append([grad / factor for grad in torch.autograd.grad(y, (leaf, w, b), dy * factor)])
    for plain, scaled in zip(*found, strict=True):
        assert torch.allclose(scaled, plain, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("scale", [1e-45, 1e-30, 1.0, 1e30])
def test_the_moments_of_merged_parts_are_exact(scale: float):
    x = (torch.randn(50, 3, dtype=torch.float64) * scale + scale * 1e3).float()
    parts = sum(OPS.batch_norm_sums(part, EPS, None, True) for part in x.split(7))
    mean, var, count = OPS.batch_norm_moments(parts)
    assert count.tolist() == [50.0] * 3
    for c, column in enumerate(x.T.tolist()):
        values = [Fraction(v) for v in column]
        exact_mean = sum(values) / 50
        exact_var = sum((v - exact_mean) ** 2 for v in values) / 50
        assert mean[c].item() == pytest.approx(float(exact_mean), rel=1e-15)
        # a kernel adds the squares of one example in double, or in float about an anchor
        assert var[c].item() == pytest.approx(float(exact_var), rel=1e-6 if ON_KERNELS else 1e-15, abs=1e-300)


def test_sums_are_exact_whatever_their_order_and_signs():
    terms = torch.randn(1000, 4, dtype=torch.float64) * torch.logspace(-90, 70, 1000, dtype=torch.float64).unsqueeze(1)
    terms = torch.cat([terms, -terms[::2], torch.tensor([[1e-300, 5e-324, 0.0, -0.0]])])
    sums = exact_sum(terms)
    assert torch.equal(sums, exact_sum(terms[torch.randperm(len(terms))]))
    assert torch.equal(sums, exact_sum(terms[:300]) + exact_sum(terms[300:]))
    high, low = value(sums)
    for c, column in enumerate(terms.T.tolist()):
        exact = sum(Fraction(v) for v in column if abs(v) > 2.0**-290)
        assert abs(Fraction(high[c].item()) + Fraction(low[c].item()) - exact) <= abs(exact) / 2**98


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e200], ids=str)
def test_a_term_off_the_grid_is_seen(bad: float):
    sums = exact_sum(torch.tensor([[1.0, 1.0], [bad, 2.0]], dtype=torch.float64))
    assert sums[:, DIGITS].tolist() == [1, 0]
    assert value(sums)[0][0].isnan()
    assert value(sums)[0][1] == 3


def test_a_product_and_its_error_are_exact():
    a, b = torch.randn(2, 100, dtype=torch.float64)
    high, low = two_product(a, b)
    for p, e, x, y in zip(high.tolist(), low.tolist(), a.tolist(), b.tolist(), strict=True):
        assert Fraction(p) + Fraction(e) == Fraction(x) * Fraction(y)
