"""Random norms, shapes, types, layouts and values against the float64 reference.

`make test` tries the same examples every time; `make fuzz` tries new ones for as long as it is told. What fails is
printed as a `Case`: `check(Case(...))` repeats it.
"""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import cases
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import seed as with_seed
from hypothesis import strategies as st
from torch import Tensor

import normwise.functional as nf
from normwise import reference
from normwise.definitions import Pattern, parse_axes
from normwise.reference import Rows

VALUES = 20_000
"""The most values of an example: enough for blocks, tails and threads, few enough for many examples a second."""

LAST_AXES = ("layer_norm", "rms_norm", "fused_add_layer_norm", "fused_add_rms_norm")
MASKED = ("group_norm", "instance_norm", "batch_norm", "batch_norm_eval", "batch_norm_relu", "batch_norm_relu_eval")
PATTERNS = (
    ("n c h w -> n h w", "c"), ("n l c -> n l", "c"), ("n l c -> n l", "l c"), ("n c h w -> n c w", "c"),
    ("n (g c) l -> n g", "(g c)"), ("n l (g c) -> n g", "(g c)"), ("n h w c -> c", "c"), ("n h w c -> n c", "c"),
    ("n c l -> c l", "l"), ("n a b -> a", "b"), ("n a b c -> n b", "a c"),
)  # fmt: skip
LAYOUTS = ("contiguous", "channels_last", "permuted", "sliced", "expanded", "unaligned", "windows")
KINDS = ("normal", "constant", "outlier", "integers", "heavy", "zeros")
SCALES = {
    torch.float32: (1.0, 1e-43, 1e-40, 1e-38, 1e-30, 1e-19, 1e-12, 1e-4, 1e4, 1e12, 1e19, 1e30, 3e37),
    torch.bfloat16: (1.0, 1e-40, 1e-30, 1e-12, 1e-4, 1e4, 1e12, 1e30, 3e37),
    torch.float16: (1.0, 1e-6, 1e-4, 1e-2, 1e2, 1e4),
    torch.float64: (1.0, 1e-60, 1e-30, 1e-4, 1e4, 1e30, 1e60),
}


@dataclass(frozen=True)
class Case:
    """An example; ``option`` counts the normalized axes, the groups, or points to one of `PATTERNS`."""

    norm: str
    shape: tuple[int, ...]
    option: int = 1
    dtype: torch.dtype = torch.float32
    parameter_dtype: torch.dtype = torch.float32
    weight: bool = True
    bias: bool = True
    mask: str = ""
    eps: float = 1e-5
    kind: str = "normal"
    ratio: float = 0.0
    scale: float = 1.0
    dy_scale: float = 1.0
    layouts: tuple[str, str] = ("contiguous", "contiguous")
    grads: tuple[bool, bool, bool] = (True, True, True)
    threads: int = 2
    seed: int = 0

    @property
    def fixed(self) -> bool:
        return self.norm.endswith("_eval")

    def rows(self) -> Rows:
        if self.norm in LAST_AXES:
            return reference.layer_norm_rows(self.shape, self.shape[-self.option :], centred="rms" not in self.norm)
        if self.norm == "group_norm":
            return reference.group_norm_rows(self.shape, self.option)
        if self.norm == "instance_norm":
            return reference.group_norm_rows(self.shape, max(self.shape[1], 1))
        if self.norm == "normalize":
            pattern, affine = PATTERNS[self.option]
            return Rows.of(Pattern.parse(pattern), self.shape, affine, given={"g": 2} if "g" in pattern else {})
        return reference.batch_norm_rows(self.shape)

    def parameter_shape(self) -> tuple[int, ...]:
        if self.norm in LAST_AXES:
            return self.shape[-self.option :]
        rows = self.rows()
        if self.norm == "normalize":
            return tuple(self.shape[rows.pattern.left.index(item)] for item in parse_axes(rows.affine, "affine"))
        return self.shape[1:2]


@st.composite
def random_cases(draw: st.DrawFn) -> Case:
    norm = draw(st.sampled_from((*LAST_AXES, *MASKED, "normalize")))
    option = draw(st.integers(0, len(PATTERNS) - 1)) if norm == "normalize" else 1
    axes = Pattern.parse(PATTERNS[option][0]).left if norm == "normalize" else ()
    least = 1 if norm in LAST_AXES else 3 if norm == "instance_norm" else 2
    dims = len(axes) or draw(st.integers(least, 5))
    size = st.integers(1, 9) | st.sampled_from([0, 1, 2, 15, 16, 17, 31, 33, 63, 65, 127, 130, 1023, 2049, 4099, 5000])
    shape = [draw(size) for _ in range(dims)]
    while math.prod(n or 1 for n in shape) > VALUES:
        halved = draw(st.integers(0, dims - 1))
        shape[halved] = (shape[halved] + 1) // 2
    shape = [n + n % 2 * (len(axis) > 1) for n, axis in zip(shape, axes or [()] * dims, strict=True)]  # two groups
    if norm == "group_norm":
        option = draw(st.sampled_from([g for g in range(1, max(shape[1], 1) + 1) if shape[1] % g == 0][:8]))
    elif norm in LAST_AXES:
        option = draw(st.integers(1, dims))
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    narrow = dtype.itemsize == 2
    return Case(
        norm, tuple(shape), option, dtype,
        parameter_dtype=draw(st.sampled_from([dtype, torch.float32])) if narrow else dtype,
        weight=draw(st.booleans()),
        bias=draw(st.booleans()) and "rms" not in norm,
        mask=draw(st.sampled_from(["", "", "examples", "positions"])) if norm in MASKED else "",
        eps=draw(st.sampled_from([1e-5, 1e-5, 1e-3, 1e-12, 0.0])),
        kind=draw(st.sampled_from(KINDS)),
        ratio=draw(st.sampled_from([0.0, 1.0] if narrow else [0.0, 1.0, 1e2, 1e4])),
        scale=draw(st.sampled_from(SCALES[dtype][:1] * 6 + SCALES[dtype][1:])),
        dy_scale=draw(st.sampled_from([1.0, 1e-3, 1e3])),
        layouts=(draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from(LAYOUTS))),
        grads=(draw(st.booleans()), draw(st.booleans()), draw(st.booleans())),
        threads=draw(st.integers(1, 3)),
        seed=draw(st.integers(0, 2**31)),
    )  # fmt: skip


def values(case: Case, kind: str, ratio: float, scale: float) -> Tensor:
    x = torch.randn(case.shape, dtype=torch.float64)
    if kind == "constant":
        x = torch.randn(1, dtype=torch.float64).expand(case.shape).clone()
    elif kind == "outlier" and x.numel():
        x.view(-1)[random.randrange(x.numel())] = 1e3
    elif kind == "integers":
        x = x.round()
    elif kind == "heavy":
        x = x**5
    elif kind == "zeros":
        x = x * (torch.rand(case.shape) < 0.1)
    limit = torch.finfo(case.dtype).max
    return ((x + ratio) * scale).clamp(-limit, limit).to(case.dtype)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The values of ``x`` otherwise in memory; ``expanded`` and ``windows`` repeat some of them."""
    if layout == "channels_last" and x.dim() in (4, 5):
        return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    if layout == "permuted":
        order = random.sample(range(x.dim()), x.dim())
        return x.permute(order).contiguous().permute([order.index(i) for i in range(x.dim())])
    if layout == "sliced":
        steps, starts = ([random.choice(c) for _ in x.shape] for c in ((1, 1, 2, 3), (0, 1)))
        room = x.new_full([n * step + start for n, step, start in zip(x.shape, steps, starts, strict=True)], math.nan)
        view = room[tuple(slice(start, start + n * step, step) for n, step, start in zip(x.shape, steps, starts))]  # noqa: B905
        return view.copy_(x)
    if layout == "expanded" and x.numel():
        axis = random.randrange(x.dim())
        return x.narrow(axis, 0, 1).expand(x.shape)
    if layout == "unaligned":
        return x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)
    if layout == "windows" and x.numel():  # neighbours overlap, as those of unfold do
        return x.reshape(-1).as_strided(x.shape, [1] * x.dim())
    return x


class Truth:
    """Exact results in float64, and for each value the size of the terms that it is made of."""

    def __init__(
        self, case: Case, x: Tensor, weight: Tensor | None, bias: Tensor | None, dy: Tensor, eps: float,
        mask: Tensor | None, running: tuple[Tensor, Tensor] | None, residual: Tensor | None, gate: Tensor | None,
        dh: Tensor | None,
    ) -> None:  # fmt: skip
        rows = case.rows()
        x, dy = x.double(), dy.double() if gate is None else dy.double() * gate
        w, b = (None if t is None else t.double() for t in (weight, bias))
        fixed = None if running is None else reference.fixed_statistics(*running, eps)
        y, xhat, stats = reference.normalize(x, rows, w, b, eps, mask=mask, fixed=fixed)
        dx, dweight, dbias, _ = reference.normalize_backward(
            dy, x, rows, w, torch.float64, stats, mask=mask, fixed=fixed is not None
        )
        valid = torch.ones_like(x) if mask is None else reference.valid_positions(mask, x).double()
        spread = torch.ones_like(x) if w is None else rows.spread(w)
        # beside its own roundings each value has the mean's, known to 2**-26 of a std and 2**-44 of itself
        spoilt = stats.mean.abs() * stats.rstd / 2**22 + (stats.var.sqrt() * stats.rstd / 4 if rows.centred else 0)
        spoilt = rows.join(spoilt.expand(rows.split(x).shape)) if fixed is None else torch.zeros_like(x)
        y_size = (xhat.abs() + spoilt) * spread.abs() + (0 if b is None else rows.spread(b).abs())
        if residual is not None:
            y, y_size = y + residual.double() * valid, y_size + residual.double().abs()
        if gate is not None:
            y = y.clamp(min=0)
        g, each = rows.split(dy * valid * spread), rows.split(xhat * valid)
        count = rows.split(valid).sum(-1, keepdim=True).clamp(min=1)
        dx_size = g.abs()
        if fixed is None:
            dx_size = dx_size + each.abs() * ((g * each).abs().sum(-1, keepdim=True) / count)
            dx_size = dx_size + (g.abs().sum(-1, keepdim=True) / count if rows.centred else 0)
        dx_size = rows.join(dx_size * stats.rstd)
        if dh is not None:
            dx, dx_size = dx + dh.double(), dx_size + dh.double().abs()
        self.results = {"y": (y, y_size), "dx": (dx, dx_size)}
        for name, exact, summands in (("dweight", dweight, xhat.abs() + spoilt), ("dbias", dbias, 1.0)):
            if exact is not None:
                self.results[name] = (
                    exact,
                    torch.maximum(exact.abs(), rows.gather((dy * valid * summands).square()).sqrt()),
                )
        # the contract ends at a mean/std of 1e6, and the reference knows no better far beyond
        sure = stats.mean.abs() * stats.rstd <= 1e6
        self.sure = rows.join(torch.broadcast_to(sure, g.shape)) if fixed is None else torch.ones_like(x).bool()


def within(name: str, got: Tensor, exact: Tensor, size: Tensor, known: Tensor, case: Case) -> Tensor:
    """For each value of y or dx, whether it is as good as the contract says of its type: alone, or among its row.

    The contract is about many values. Where a row has few, or a few that outweigh the others, their roundings do not
    average out: it may be twice as far.
    What is exactly no normal number is as good as its row, and may lose what is below the smallest normal one.
    """
    distance, info = (got.double() - exact).where(known, 0).abs(), torch.finfo(case.dtype)
    if info.bits == 16:
        # a float32 sum cannot be finer than the smallest float32
        return distance <= cases.a2_elementwise(exact, [size], case.dtype) + 4 * 2.0**-149
    rows, bound = case.rows(), cases.A1[name] if case.dtype == torch.float32 else cases.REFERENCE
    normal = known & (exact.abs() >= info.tiny)
    far, terms = (rows.split(t.where(normal, 0)) for t in (distance, size))
    allowed = bound * torch.linalg.vector_norm(rows.split(size.where(known, 0)), dim=-1, keepdim=True)
    right = torch.linalg.vector_norm(far, dim=-1, keepdim=True) <= 2 * allowed
    if terms.square().sum() ** 2 >= 1000 * terms.pow(4).sum():  # as many of equal size, at least
        right &= torch.linalg.vector_norm(far) <= bound * torch.linalg.vector_norm(terms)
    right, allowed = (rows.join(t.expand(far.shape)) for t in (right, allowed))
    return right & (normal | (distance <= info.tiny + allowed))


def assert_right(name: str, got: Tensor, truth: Truth, case: Case) -> None:
    exact, size = truth.results[name]
    limit = torch.finfo(got.dtype).max
    if name in ("y", "dx"):
        known = truth.sure & exact.isfinite() & (size <= limit)
        bad = known & ~within(name, got, exact, size, known, case)
        assert not bad.any(), f"{name}{bad.nonzero()[0].tolist()}: {got[bad][0]!r}, exact {exact[bad][0]!r}, {case}"
        return
    bound = cases.REFERENCE if case.dtype == torch.float64 else cases.A2_SUMS.get(got.dtype, cases.A1[name])
    known = (exact.isfinite() & (size <= limit)) if truth.sure.all() else torch.zeros_like(exact).bool()
    slack = torch.finfo(got.dtype).tiny * math.sqrt(known.sum().item())
    distance = torch.linalg.vector_norm((got.double() - exact)[known])
    assert distance <= bound * torch.linalg.vector_norm(size[known]) + slack, f"{name}: {distance!r}, {case}"


def parameters(case: Case) -> tuple[Tensor | None, Tensor | None]:
    shape = case.parameter_shape()
    weight, bias = (1 + torch.randn(shape) / 4).to(case.parameter_dtype), torch.randn(shape).to(case.parameter_dtype)
    if case.seed % 3 == 1:
        weight = laid_out(weight, "sliced")
    elif case.seed % 3 == 2:
        bias = laid_out(bias, "expanded")
    return weight if case.weight else None, bias if case.bias else None


def apply(
    case: Case, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, mask: Tensor | None,
    running: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """y, and h of the norms that add first."""
    eps = case.eps
    if case.norm in LAST_AXES:
        affine = (weight, eps) if "rms" in case.norm else (weight, bias, eps)
        function, shape = getattr(nf, case.norm), case.shape[-case.option :]
        return (function(x, shape, *affine), None) if residual is None else function(x, residual, shape, *affine)
    if case.norm == "group_norm":
        return nf.group_norm(x, case.option, weight, bias, eps, mask=mask), None
    if case.norm == "instance_norm":
        return nf.instance_norm(x, None, None, weight, bias, eps=eps, mask=mask), None
    if case.norm == "normalize":
        pattern, affine = PATTERNS[case.option]
        sizes = {"g": 2} if "g" in pattern else {}
        affine = affine if case.weight or case.bias else None
        return nf.normalize(x, pattern, affine, weight, bias, eps, **sizes), None
    keywords = {"residual": residual} if "relu" in case.norm else {}
    function = nf.batch_norm_relu if "relu" in case.norm else nf.batch_norm
    return function(x, *(running or (None, None)), weight, bias, not case.fixed, eps=eps, mask=mask, **keywords), None


def refused(case: Case, mask: Tensor | None) -> bool:
    """True where there is one value for a statistic that needs more."""
    positions = math.prod(case.shape[2:])
    if case.norm == "normalize":
        rows = case.rows()
        averaged = rows.pattern.averaged
        return "n" in averaged and math.prod(rows.sizes[name] for name in averaged) == 1
    if case.norm == "instance_norm":
        return positions == 1
    if case.norm == "group_norm":
        return case.shape[0] == 1 and case.shape[1] // case.option * positions == 1
    valid = case.shape[0] * positions
    if mask is not None:
        valid = valid // max(mask.numel(), 1) * int(mask.sum())
    return case.norm in ("batch_norm", "batch_norm_relu") and valid == 1


def check(case: Case) -> None:
    """y and every gradient that is asked for are within the contract."""
    torch.manual_seed(case.seed)
    random.seed(case.seed)
    torch.set_num_threads(case.threads)
    x = laid_out(values(case, case.kind, case.ratio, case.scale), case.layouts[0])
    dy = laid_out(values(case, "normal", 0.5, case.dy_scale), case.layouts[1])
    weight, bias = parameters(case)
    mask = None
    if case.mask:
        shape = case.shape[:1] if case.mask == "examples" else (case.shape[0], *case.shape[2:])
        mask = laid_out(torch.rand(shape), "permuted") < random.choice([0.0, 0.5, 0.9, 1.0])
    running = None
    if case.fixed:
        mean = (torch.randn(case.shape[1], dtype=torch.float64) + case.ratio) * case.scale
        var = (torch.rand(case.shape[1], dtype=torch.float64) + 0.1) * case.scale**2
        running = tuple(
            t.clamp(max=torch.finfo(case.parameter_dtype).max).to(case.parameter_dtype) for t in (mean, var)
        )
    adds, relu = "fused_add" in case.norm, "relu" in case.norm
    residual = None
    if adds or (relu and case.seed % 2):
        residual = laid_out(values(case, "normal", 0.0, case.scale if adds else 1.0), case.layouts[1])
    leaves = [
        t if t is None else t.detach().requires_grad_(g) for t, g in zip((x, weight, bias), case.grads, strict=True)
    ]
    if residual is not None:
        residual = residual.detach().requires_grad_(case.grads[0])
    try:
        y, h = apply(case, leaves[0], residual, *leaves[1:], mask, running)
    except ValueError as error:
        assert "1 " in str(error) and refused(case, mask), case  # noqa: PT017, PT018
        return
    assert not refused(case, mask), case
    dh = None
    if adds:
        assert torch.equal(h, x + residual), case
        dh, x = values(case, "normal", 0.5, case.dy_scale), h.detach()
    assert y.dtype == case.dtype
    assert y.shape == case.shape
    gate = (~(y.detach() <= 0)).double() if relu else None
    added = residual.detach() if relu and residual is not None else None
    truth = Truth(case, x, weight, bias, dy, case.eps, mask, running, added, gate, dh)
    assert_right("y", y.detach(), truth, case)
    names = [
        (n, t) for n, t in zip(("dx", "dweight", "dbias"), leaves, strict=True) if t is not None and t.requires_grad
    ]
    if not names:
        return
    wanted = [t for _, t in names] + ([residual] if residual is not None and case.grads[0] else [])
    outputs = [(y, dy), (h, dh)] if h is not None and h.requires_grad else [(y, dy)]
    grads = torch.autograd.grad([output for output, _ in outputs], wanted, [cotangent for _, cotangent in outputs])
    for (name, leaf), grad in zip(names, grads, strict=False):
        assert grad is not None, (name, case)
        assert grad.dtype == leaf.dtype, (name, case)
        assert_right(name, grad, truth, case)
    if len(wanted) > len(names):
        if adds:
            assert torch.equal(grads[-1].nan_to_num(0), grads[0].nan_to_num(0)), case
        else:
            valid = 1 if mask is None else reference.valid_positions(mask, x)
            assert torch.equal(grads[-1], (dy * gate * valid).to(case.dtype)), case


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


FUZZ = settings(
    deadline=None, database=None, derandomize=True, max_examples=1500, print_blob=False, report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


@FUZZ
@given(case=random_cases())
def test_random_cases_agree_with_the_reference(case: Case):
    check(case)


def fuzz(minutes: float) -> None:
    """Check random cases until the time is over, and say how many."""
    end, examples = time.monotonic() + 60 * minutes, 0

    def count(case: Case) -> None:
        nonlocal examples
        examples += 1
        check(case)

    start = time.time_ns()
    for number in range(sys.maxsize):
        if time.monotonic() > end:
            break
        run = given(case=random_cases())(count)
        with_seed(start + number)(settings(FUZZ, derandomize=False, max_examples=200)(run))()
        print(f"\r{examples} examples", end="", flush=True)
    print(f"\r{examples} examples agree with the reference")


if __name__ == "__main__":
    fuzz(float(sys.argv[1]))
