"""The reference: the worked batch to six decimals, an exact rational computation, gradients, masks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import cases
import pytest
import torch
from cases import Norm
from torch import Tensor

from normwise import reference
from normwise.definitions import Pattern
from normwise.reference import Rows

WORKED = torch.tensor([[2, 4, 6], [3, 5, 7], [1, 3, 5], [4, 6, 8]], dtype=torch.float64)
BROKEN = torch.tensor([[2, 4, 6], [3, 5, 7], [1, 3, 5], [4, 6, 14]], dtype=torch.float64)
WEIGHT = torch.tensor([1, 2, 0.5], dtype=torch.float64)
BIAS = torch.tensor([0, 1, -1], dtype=torch.float64)
DY = torch.tensor([[1, -1, 2], [0, 3, -2], [-1, 1, 0], [2, 0, 1]], dtype=torch.float64)

BN = reference.batch_norm_rows((4, 3))
LN = reference.layer_norm_rows((4, 3), (3,))
RMS = reference.layer_norm_rows((4, 3), (3,), centred=False)


def close(actual: Tensor, expected: object) -> None:
    """Equal to six decimals, as printed."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    actual = actual.squeeze(-1) if actual.dim() > expected.dim() else actual
    torch.testing.assert_close(actual, expected, rtol=0, atol=5.1e-7)


def normalize(x: Tensor, rows: Rows, **kwargs: Tensor) -> reference.Normalized:
    return reference.normalize(x, rows, kwargs.get("weight"), kwargs.get("bias"), 1e-5)


class TestWorkedBatch:
    def test_batch_norm(self):
        y, _, (mean, var, rstd) = normalize(WORKED, BN)
        close(mean, [2.5, 4.5, 6.5])
        close(var, [1.25] * 3)
        close(var * 4 / 3, [1.666667] * 3)
        close(rstd, [0.894424] * 3)
        close(y, torch.tensor([[-0.447212], [0.447212], [-1.341635], [1.341635]]).expand(4, 3))

    def test_layer_norm(self):
        y, _, (mean, var, rstd) = normalize(WORKED, LN)
        close(mean, [4, 5, 3, 6])
        close(var, [2.666667] * 4)
        close(rstd, [0.612371] * 4)
        close(y, torch.tensor([-1.224743, 0, 1.224743]).expand(4, 3))
        assert reference.normalize(WORKED, LN, None, None, 0).y[0, 0].item() == pytest.approx(-1.2247449, abs=5e-8)

    def test_rms_norm(self):
        close(normalize(WORKED, RMS).y[0], [0.462910, 0.925820, 1.388730])

    def test_affine(self):
        close(normalize(WORKED, BN, weight=WEIGHT, bias=BIAS).y[0], [-0.447212, 0.105576, -1.223606])
        close(
            normalize(WORKED, LN, weight=WEIGHT, bias=BIAS).y,
            torch.tensor([-1.224743, 1, -0.387629]).expand(4, 3),
        )

    def test_broken_symmetry(self):
        worked, broken = normalize(WORKED, BN), normalize(BROKEN, BN)
        close(broken.statistics.mean[2], [8])
        close(broken.statistics.var[2], [12.5])
        close(broken.y[:, 2], [-0.565685, -0.282843, -0.848528, 1.697056])
        assert torch.equal(broken.y[:, :2], worked.y[:, :2])
        worked, broken = normalize(WORKED, LN), normalize(BROKEN, LN)
        close(broken.statistics.mean[3], [8])
        close(broken.statistics.var[3], [18.666667])
        close(broken.y[3], [-0.925820, -0.462910, 1.388730])
        assert torch.equal(broken.y[:3], worked.y[:3])

    @pytest.mark.parametrize(
        ("rows", "dx", "dweight"),
        [
            (
                BN,
                [
                    [0.804978, -1.520521, 1.520521],
                    [-0.804978, 1.967732, -1.967732],
                    [-0.268336, 0.357768, -0.357768],
                    [0.268336, -0.804980, 0.804980],
                ],
                [3.577694, 0.447212, -0.447212],
            ),
            (
                LN,
                [
                    [0.510308, -1.020619, 0.510311],
                    [-0.816493, 1.632990, -0.816497],
                    [-0.306187, 0.612371, -0.306184],
                    [0.306187, -0.612371, 0.306184],
                ],
                [-2.449485, 0, 1.224743],
            ),
        ],
        ids=["batch_norm", "layer_norm"],
    )
    def test_backward(self, rows: Rows, dx: list, dweight: list):
        ones, stats = torch.ones(3, dtype=torch.float64), normalize(WORKED, rows).statistics
        grads = reference.normalize_backward(DY, WORKED, rows, ones, torch.float64, stats)
        close(grads.dx, dx)
        close(grads.dweight, dweight)
        close(grads.dbias, [2, 3, 1])
        close(rows.join(sum(grads.terms)), dx)

    @pytest.mark.parametrize(("rows", "non_zeros", "rank", "coupling"), [(BN, 48, 6, 1.419849), (LN, 36, 4, 0)])
    def test_jacobian(self, rows: Rows, non_zeros: int, rank: int, coupling: float):
        jacobian = torch.autograd.functional.jacobian(lambda x: normalize(x, rows).y, WORKED)
        assert (jacobian.abs() > 1e-9).sum() == non_zeros
        # eps leaves a trace, 1e-6, of the directions that are lost without it
        assert torch.linalg.matrix_rank(jacobian.reshape(12, 12), atol=1e-4) == rank
        across = jacobian.clone()
        for i in range(4):
            across[i, :, i] = 0
        close(torch.linalg.vector_norm(across), coupling)

    def test_a_neighbour(self):
        moved = WORKED.clone()
        moved[3] *= 10
        close(normalize(moved, BN).y[0], [-0.576818, -0.577105, -0.577210])
        assert torch.equal(normalize(moved, LN).y[0], normalize(WORKED, LN).y[0])

    def test_batch_sizes(self):
        values, biased, unbiased = {}, {}, {}
        for n in (1, 2, 3, 4):
            subsets = [(0, *others) for others in itertools.combinations((1, 2, 3), n - 1)]
            results = [normalize(WORKED[list(s)], reference.batch_norm_rows((n, 3))) for s in subsets]
            values[n] = [r.y[0, 0].item() for r in results]
            # every subset of this size, for the mean of the variances
            every = [WORKED[list(s), 0] for s in itertools.combinations(range(4), n)]
            rows = reference.batch_norm_rows((n, 1))
            variances = [reference.statistics(x[:, None], rows, 0).var.item() for x in every]
            biased[n] = sum(variances) / len(variances)
            unbiased[n] = biased[n] * n / (n - 1) if n > 1 else None
            for subset in subsets:
                y = normalize(WORKED[list(subset)], reference.layer_norm_rows((n, 3), (3,))).y
                assert y[0, 0].item() == pytest.approx(-1.224743, abs=5.1e-7)
        assert values[1] == [0]
        assert values[2] == pytest.approx([-1, 1, -1], abs=2.1e-5)  # eps / (2 var)
        assert values[3] == pytest.approx([0, -1.224736, -0.267260], abs=5.1e-7)
        assert values[4] == pytest.approx([-0.447212], abs=5.1e-7)
        assert list(biased.values()) == pytest.approx([0, 0.833333, 1.111111, 1.25], abs=5.1e-7)
        assert [unbiased[n] for n in (2, 3, 4)] == pytest.approx([1.666667] * 3, abs=5.1e-7)

    def test_running_statistics(self):
        mean, var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
        count = torch.tensor(0)
        batch = normalize(WORKED, BN).statistics
        seen = {0: (mean.clone(), var.clone())}
        for t in range(1, 501):
            assert not reference.update_running_(mean, var, count, batch.mean[:, 0], batch.var[:, 0], 4, 0.1)
            assert count == t
            seen[t] = (mean.clone(), var.clone())
        close(seen[1][0], [0.25, 0.45, 0.65])
        close(seen[1][1], [1.066667] * 3)
        close(seen[10][0], [1.628304, 2.930947, 4.233590])
        close(seen[10][1], [1.434214] * 3)
        evaluated = {
            0: [1.999990, 3.999980, 5.999970],
            1: [1.694422, 3.437257, 5.180091],
            10: [0.310370, 0.892669, 1.474969],
            500: [-0.387297] * 3,
        }
        for t, expected in evaluated.items():
            fixed = reference.fixed_statistics(*seen[t], 1e-5)
            close(reference.normalize(WORKED, BN, None, None, 1e-5, fixed=fixed).y[0], expected)
        b = 1 - 0.9**10
        close(seen[10][0] / b, [2.5, 4.5, 6.5])  # the exact repair of a short history
        close((seen[10][1] - (1 - b)) / b, [1.666667] * 3)

    def test_shards(self):
        """Two shards of two: what each normalizes to alone, and the whole."""
        rows = reference.batch_norm_rows((2, 3))
        local = normalize(WORKED[:2], rows).y
        assert local.abs().min() > 0.9999
        others = [normalize(WORKED[[0, 2]], rows), normalize(WORKED[[1, 3]], rows)]
        within = sum(o.statistics.var for o in others) / 2
        between = torch.stack([o.statistics.mean for o in others]).var(0, correction=0)
        close(within, [0.25] * 3)
        close(between, [1.0] * 3)
        assert others[0].y[0, 0] > 0.9999


def exact_layer_norm(values: list[float], eps: float) -> list[float]:
    """Rational arithmetic and an integer root to 40 digits: no rounding before the last."""
    exact = [Fraction(v) for v in values]
    mean = sum(exact) / len(exact)
    var = sum((v - mean) ** 2 for v in exact) / len(exact) + Fraction(eps)
    digits = 10**40
    root = Fraction(math.isqrt(var.numerator * digits**2 // var.denominator), digits)
    return [float((v - mean) / root) for v in exact]


@pytest.mark.parametrize("ratio", cases.RATIOS)
def test_against_rational_arithmetic(ratio: float):
    """The float64 reference and the formula of the tests, both against a truth that does not round."""
    x, dy = cases.draw((3, 33), ratio)
    exact = torch.tensor([exact_layer_norm(row, cases.EPS) for row in x.double().tolist()], dtype=torch.float64)
    norm = cases.BY_NAME["layer_norm"]
    assert cases.error(norm.truth(x, None, None, dy).y, exact) <= cases.REFERENCE
    assert cases.error(norm.formula(x, None, None, dy).y, exact) <= cases.REFERENCE


def assert_reference_equals_the_formula(norm: Norm, shape: Sequence[int], ratio: float, scale: bool = False) -> None:
    """The truth of every other test is itself checked, by a formula that autograd differentiates."""
    x, dy = cases.draw(shape, ratio)
    for parameters in (norm.parameters(x), (None, None)):
        truth, formula = norm.truth(x, *parameters, dy), norm.formula(x, *parameters, dy)
        for name in cases.A1:
            got, want = getattr(truth, name), getattr(formula, name)
            terms = torch.stack(truth.dx_terms) if name == "dx" and scale else None
            assert (got is None) == (want is None)
            assert want is None or cases.error(got, want, terms) <= cases.REFERENCE, name


@pytest.mark.parametrize("ratio", cases.RATIOS)
@pytest.mark.parametrize("size", cases.SIZES)
@pytest.mark.parametrize("norm", cases.NORMS, ids=str)
def test_against_the_formula_at_any_size(norm: Norm, size: int, ratio: float):
    assert_reference_equals_the_formula(norm, norm.shape(size), ratio, scale=size <= 2)


@pytest.mark.parametrize("ratio", cases.RATIOS)
@pytest.mark.parametrize("norm", cases.NORMS, ids=str)
def test_against_the_formula_on_images(norm: Norm, ratio: float):
    assert_reference_equals_the_formula(norm, cases.IMAGE, ratio)


@pytest.mark.parametrize(
    ("pattern", "affine", "sizes"),
    [
        ("n c h -> n", "c", (4,)),
        ("n c h -> n h", "c", (4,)),
        ("n c h -> n h", "h c", (5, 4)),
        ("n c h -> c h", "c h", (4, 5)),
        ("n (g c) h -> n g", "(g c)", (4,)),
        ("n (g c) h -> n g h", "g", (2,)),
        ("n (g c) h -> g", "h", (5,)),
        ("n c h -> c", "c", (4,)),
        ("n c h ->", "n c h", (3, 4, 5)),
    ],
)
@pytest.mark.parametrize("centred", [True, False])
def test_backward_is_the_gradient_of_forward(pattern: str, affine: str, sizes: tuple[int, ...], centred: bool):
    given = {"g": 2} if "g" in pattern else {}
    rows = Rows.of(Pattern.parse(pattern), (3, 4, 5), affine, centred=centred, given=given)
    x, weight, bias = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 4, 5), sizes, sizes))
    dy = torch.randn_like(x) + 0.5

    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return reference.normalize(x, rows, weight, bias, 1e-5).y

    assert torch.autograd.gradcheck(forward, (x, weight, bias))
    expected = torch.autograd.grad(forward(x, weight, bias), (x, weight, bias), dy)
    with torch.no_grad():
        stats = reference.statistics(x, rows, 1e-5)
        grads = reference.normalize_backward(dy, x, rows, weight, torch.float64, stats)
    torch.testing.assert_close(grads[:3], expected, rtol=1e-12, atol=1e-12)
    assert grads.terms[1].any() == centred


def test_backward_with_fixed_statistics_is_the_gradient_of_forward():
    x, weight, bias = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 4, 5), 4, 4))
    dy = torch.randn_like(x) + 0.5
    rows = reference.batch_norm_rows(x.shape)
    fixed = reference.fixed_statistics(torch.randn(4), torch.rand(4), 1e-5)
    y = reference.normalize(x, rows, weight, bias, 1e-5, fixed=fixed).y
    grads = reference.normalize_backward(dy, x, rows, weight, torch.float64, fixed, fixed=True)
    torch.testing.assert_close(grads[:3], torch.autograd.grad(y, (x, weight, bias), dy), rtol=1e-12, atol=1e-12)


# Masks: what is valid comes out as if the rest were not there


class Masked(NamedTuple):
    """What a masked norm gives, and how a running statistic moves."""

    y: Tensor
    dx: Tensor
    dweight: Tensor
    dbias: Tensor
    running_mean: Tensor
    running_var: Tensor


def run(x: Tensor, dy: Tensor, weight: Tensor, rows: Rows, mask: Tensor | None = None) -> Masked:
    y, _, stats = reference.normalize(x, rows, weight, weight, 1e-5, mask=mask)
    grads = reference.normalize_backward(dy, x, rows, weight, torch.float64, stats, mask=mask)
    running = [torch.zeros(stats.mean.shape[-2]).double(), torch.ones(stats.mean.shape[-2]).double()]
    mean, var, count = stats.mean[..., 0], stats.var[..., 0], rows.pattern.values_per_statistic(rows.sizes)
    reference.update_running_(*running, None, mean, var, count, 0.3, mask)
    return Masked(y, *grads[:3], *running)


@pytest.mark.parametrize("positions", [(7,), (3, 4), ()], ids=["ncl", "nchw", "nc"])
@pytest.mark.parametrize("by_example", [True, False])
@pytest.mark.parametrize("name", ["batch_norm", "instance_norm", "group_norm"])
def test_a_mask_equals_the_computation_without_padding(name: str, by_example: bool, positions: tuple[int, ...]):
    if by_example or not positions:
        mask = torch.tensor([True, False, True, True, False])
    else:
        mask = torch.rand(5, *positions) < 0.6
        mask[1], mask[2] = False, True  # an example without a valid position, one without padding
    x, dy = (torch.randn(5, 4, *positions, dtype=torch.float64) + 3 for _ in range(2))
    weight = torch.randn(4, dtype=torch.float64)
    valid = reference.valid_positions(mask, x)
    groups = {"batch_norm": None, "instance_norm": 4, "group_norm": 2}[name]

    def rows(shape: torch.Size) -> Rows:
        return reference.batch_norm_rows(shape) if groups is None else reference.group_norm_rows(shape, groups)

    padded = [t.masked_fill(~valid, math.nan) for t in (x, dy)]
    got = run(*padded, weight, rows(x.shape), mask)

    def unpad(t: Tensor) -> list[Tensor]:
        """The valid positions: those of the batch together for batch_norm, else of each example that has one."""
        examples = [t.reshape(5, 4, -1)[i, :, valid[i, 0].flatten()] for i in range(5)]
        examples = [e for e in examples if e.numel()]
        return [torch.cat(examples, 1).T] if groups is None else [e[None] for e in examples]

    parts = [run(*pair, weight, rows(pair[0].shape)) for pair in zip(unpad(x), unpad(dy), strict=True)]
    for actual, expected in ((got.y, [p.y for p in parts]), (got.dx, [p.dx for p in parts])):
        torch.testing.assert_close(unpad(actual), expected)
        assert (actual[~valid] == 0).all()
    torch.testing.assert_close(got.dweight, sum(p.dweight for p in parts))
    torch.testing.assert_close(got.dbias, sum(p.dbias for p in parts))
    if name != "group_norm":  # which has no running statistics
        torch.testing.assert_close(got.running_mean, sum(p.running_mean for p in parts) / len(parts))
        # an example of one value has no variance and does not count
        variances = [p.running_var for p in parts if (p.running_var != 1).any()] or [torch.ones(4).double()]
        torch.testing.assert_close(got.running_var, sum(variances) / len(variances))


def test_an_empty_or_single_batch_leaves_what_it_cannot_inform():
    mean, var, count = torch.full((3,), 2.0), torch.full((3,), 3.0), torch.tensor(0)
    zeros = torch.zeros(3, dtype=torch.float64)
    reference.update_running_(mean, var, count, zeros, zeros, 0, 0.5)
    assert (mean == 2).all()
    assert (var == 3).all()
    reference.update_running_(mean, var, count, zeros, zeros, 1, 0.5)
    assert (mean == 1).all()
    assert (var == 3).all()
    assert count == 2
    for shape, mask in (((0, 3), torch.ones(0, 4, dtype=torch.bool)), ((3,), torch.zeros(2, 4, dtype=torch.bool))):
        none = torch.zeros(shape, dtype=torch.float64)
        reference.update_running_(mean, var, count, none, none, 8, 0.5, mask)
        assert (mean == 1).all()
        assert (var == 3).all()
    reference.update_running_(torch.zeros(0), torch.ones(0), None, zeros[:0], zeros[:0], 4, 0.5)


def test_momentum_none_is_the_average_of_all_batches():
    batches = torch.randn(4, 6, 3, dtype=torch.float64)
    mean, var, count = torch.randn(3).double(), torch.rand(3).double(), torch.tensor(0)
    for x in batches:
        stats = reference.statistics(x, reference.batch_norm_rows(x.shape), 1e-5)
        reference.update_running_(mean, var, count, stats.mean[:, 0], stats.var[:, 0], 6, None)
    torch.testing.assert_close(mean, batches.mean((0, 1)))
    torch.testing.assert_close(var, batches.var(1).mean(0))


@pytest.mark.parametrize(("dtype", "out_dtype"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_out_dtype(dtype: torch.dtype, out_dtype: torch.dtype):
    x = torch.randn(3, 8).to(dtype)
    rows = reference.layer_norm_rows(x.shape, (8,))
    result = reference.normalize(x, rows, None, None, 1e-5, out_dtype=out_dtype)
    assert torch.equal(result.y, result.xhat.to(out_dtype))
    assert result.xhat.dtype == torch.float64
