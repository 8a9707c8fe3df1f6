"""The table behind the tests: norms, sizes, types, layouts, mean/std ratios, and the tolerances with their reasons.

Every test of the contract is a walk over this table. A norm here is more than its name: how it is called in normwise
and in torch, which values share statistics, and its exact result by a formula that shares nothing with the reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

import normwise as nw
import normwise.functional as nf
from normwise import reference
from normwise.definitions import Pattern
from normwise.reference import Rows

BACKENDS = [nw.backends()["cpu"].split(",")[0].split(" (")[0]]
"""What runs the operators here; `test_kernels.py` runs the contract on the others, each in a process of its own."""

EXACT_SUMS = BACKENDS == ["reference"]
"""Sums are good to their own size even where they cancel. Sums in float32 are good to the size of what they add up."""

SIZES = [0, 1, 2, 31, 33, 1023, 4099]
"""Empty, without a variance, the smallest with one, and around the widths and blocks of vector code."""

RATIOS = [0.0, 1e2, 1e4, 1e6]
"""|mean| / std of the values that share statistics. At 1e6 a float32 has 4 bits left for the deviations."""

HALF_RATIOS = [0.0, 1e2]
"""The same for 8 and 11 bits: at 1e4 all values are equal."""

TYPES = [
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
]
"""Of the input and of the parameters."""

HALF_TYPES = TYPES[2:]

EPS = 1e-5

A1 = {"y": 2e-7, "dx": 5e-7, "dweight": 5e-7, "dbias": 5e-7}
"""Relative L2 in float32: half an ulp is 6e-8, so y may be rounded three times on its way and a gradient eight."""

A2_SUMS = {torch.bfloat16: 4e-3, torch.float16: 5e-4}
"""Relative L2 of dweight and dbias: rounding once to 8 bits costs at most 2**-9 = 2e-3, to 11 bits 2**-12 = 2.4e-4."""

A2_WIDE = 5e-7
"""The same where the parameters are float32: then nothing is rounded to half precision, and the bound is A1's."""

REFERENCE = 1e-8
"""The reference against the exact formula, relative L2: 2**-53 of a mean of 1e6 deviations is 1e-10 of a deviation, and
the same for all values, so that it grows with their root in dweight: to 6e-9 at 4,099."""


def a2_elementwise(exact: Tensor, terms: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Contract A2 for y and dx: one rounding to ``dtype`` of a sum of terms that are each good to float32."""
    info = torch.finfo(dtype)
    ulp = torch.ldexp(torch.full_like(exact, info.eps), exact.frexp().exponent - 1)
    return ulp.clamp(min=info.tiny * info.eps) / 2 + 4 * 2.0**-24 * sum(term.abs() for term in terms)


def error(actual: Tensor, exact: Tensor, scale: Tensor | None = None) -> float:
    """Relative L2 error; relative to ``scale`` where the exact value is what remains of terms that cancel."""
    distance = torch.linalg.vector_norm(actual.double() - exact).item()
    return distance / torch.linalg.vector_norm(exact if scale is None else scale).item() if distance else 0.0


def assert_a1(actual: Results, exact: Results, **scales: Tensor | None) -> None:
    """All four outputs are within A1.

    Of a kernel, a sum that happens to cancel is measured against the size of as many random terms, their L2 norm.
    """
    for name, bound in A1.items():
        got, want = getattr(actual, name), getattr(exact, name)
        assert (got is None) == (want is None), name
        if want is not None:
            scale = scales.get(name)
            if scale is None and name in exact.summands and not EXACT_SUMS:
                scale = max(want, exact.summands[name], key=torch.linalg.vector_norm)
            assert error(got, want, scale) <= bound, name


class Results(NamedTuple):
    """What a norm and its backward give; ``terms`` are the summands of y and of dx, known for the truth alone,
    ``magnitudes`` those of dx with each mean taken of absolute values, ``summands`` what dweight and dbias add up."""

    y: Tensor
    dx: Tensor
    dweight: Tensor | None
    dbias: Tensor | None
    y_terms: tuple[Tensor, ...] = ()
    dx_terms: tuple[Tensor, ...] = ()
    dx_magnitudes: tuple[Tensor, ...] = ()
    summands: Mapping[str, Tensor] = MappingProxyType({})


Running = tuple[Tensor, Tensor] | None


@dataclass(frozen=True)
class Norm:
    """One norm as the tests see it.

    Attributes:
        name: What tells it apart.
        call: ``(functions, x, weight, bias, eps, running) -> y``, with the functions of normwise or of torch.
        shape: An input shape for a size of its last axis.
        blocks: That shape with the values of one statistic on axes of their own, in the same order of memory.
        shared: Those axes of ``blocks``; none if the statistics are kept elsewhere.
        rows: The same norm for the reference.
        affine: The axes of the input that weight and bias have.
        smallest: The smallest size that can be normalized, besides 0.
    """

    name: str
    call: Callable[[Any, Tensor, Tensor | None, Tensor | None, float, Running], Tensor]
    shape: Callable[[int], tuple[int, ...]]
    blocks: Callable[[Sequence[int]], tuple[int, ...]]
    shared: tuple[int, ...]
    rows: Callable[[Sequence[int]], Rows]
    affine: tuple[int, ...] = (1,)
    smallest: int = 1
    in_torch: bool = True

    def __str__(self) -> str:
        return self.name

    @property
    def centred(self) -> bool:
        return self.name != "rms_norm"

    def parameters(self, x: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor | None]:
        """A random weight, and a bias if the norm has one."""
        shape = [x.shape[axis] for axis in self.affine]
        weight, bias = 1 + torch.randn(shape) / 4, torch.randn(shape)
        return weight.to(dtype or x.dtype), bias.to(dtype or x.dtype) if self.centred else None

    def running(self, x: Tensor, weight: Tensor | None = None) -> Running:
        """Statistics of the past, near those of ``x`` and typed like the weight, for the norm that needs them."""
        if self.name != "batch_norm_eval":
            return None
        values = x.double().transpose(0, 1).flatten(1)
        mean = values.mean(1)
        var = (values - mean.unsqueeze(1)).square().mean(1)
        dtype = x.dtype if weight is None else weight.dtype
        return (mean + var.sqrt() / 3).nan_to_num(0.0).to(dtype), (1.5 * var + 0.1).nan_to_num(1.0).to(dtype)

    def share(self, x: Tensor, index: tuple[int, ...]) -> Tensor:
        """True for each value of ``x`` that shares statistics with the one at ``index``."""
        marks = torch.zeros(x.shape, dtype=torch.bool)
        marks[index] = True
        blocks = marks.reshape(self.blocks(x.shape))
        return (
            (blocks.sum(self.shared, keepdim=True) > 0).expand(blocks.shape).reshape(x.shape) if self.shared else marks
        )

    def __call__(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        dy: Tensor,
        eps: float = EPS,
        running: Running = None,
        functions: Any = nf,
    ) -> Results:
        """y and the gradients, by normwise or by torch."""
        x, weight, bias = (t if t is None else t.detach().requires_grad_() for t in (x, weight, bias))
        wanted = [t for t in (x, weight, bias) if t is not None]
        y = self.call(functions, x, weight, bias, eps, running or self.running(x.detach(), weight))
        grads = dict(zip(map(id, wanted), torch.autograd.grad(y, wanted, dy), strict=True))
        return Results(y.detach(), *(None if t is None else grads[id(t)] for t in (x, weight, bias)))

    def truth(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        dy: Tensor,
        eps: float = EPS,
        running: Running = None,
    ) -> Results:
        """The reference on the same values in float64, with the terms that make up y and dx."""
        running = running or self.running(x, weight)
        x, weight, bias, dy = (t if t is None else t.double() for t in (x, weight, bias, dy))
        rows = self.rows(x.shape)
        fixed = None if running is None else reference.fixed_statistics(*running, eps)
        y, xhat, stats = reference.normalize(x, rows, weight, bias, eps, fixed=fixed)
        dtype = None if bias is None else bias.dtype
        *grads, terms = reference.normalize_backward(dy, x, rows, weight, dtype, stats, fixed=fixed is not None)
        scaled = xhat if weight is None else xhat * self.spread(weight, x)
        offset = torch.zeros_like(x) if bias is None else self.spread(bias, x).expand(x.shape)
        full = tuple(rows.join(torch.broadcast_to(term, rows.split(x).shape)) for term in terms)
        # a mean of terms that cancel is good to the size of the terms, not of the mean
        g = rows.split(dy if weight is None else dy * self.spread(weight, x))
        through_mean = g.abs().mean(-1, keepdim=True) if self.centred and fixed is None else torch.zeros_like(g)
        through_var = (g * rows.split(xhat)).abs().mean(-1, keepdim=True) if fixed is None else torch.zeros_like(g)
        magnitudes = (g.abs(), through_mean.expand_as(g), rows.split(xhat).abs() * through_var)
        magnitudes = tuple(rows.join(stats.rstd * m) for m in magnitudes)
        summands = {"dweight": dy * xhat, "dbias": dy}
        return Results(y, *grads, y_terms=(scaled, offset), dx_terms=full, dx_magnitudes=magnitudes, summands=summands)

    def formula(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        dy: Tensor,
        eps: float = EPS,
        running: Running = None,
    ) -> Results:
        """The definition in float64, centred twice against the rounding of the mean, differentiated by autograd."""
        running = running or self.running(x, weight)
        x, weight, bias = (t if t is None else t.detach().double().requires_grad_() for t in (x, weight, bias))
        values = x.reshape(self.blocks(x.shape))
        if running is not None:
            mean, var = (t.double().reshape(1, -1, 1, 1) for t in running)
            values = values - mean
        else:
            for _ in range(2 if self.centred else 0):
                values = values - values.mean(self.shared, keepdim=True)
            var = values.square().mean(self.shared, keepdim=True)
        y = (values / (var + eps).sqrt()).reshape(x.shape)
        y = y if weight is None else y * self.spread(weight, x)
        y = y if bias is None else y + self.spread(bias, x)
        wanted = [t for t in (x, weight, bias) if t is not None]
        grads = dict(zip(map(id, wanted), torch.autograd.grad(y, wanted, dy.double()), strict=True))
        return Results(y.detach(), *(None if t is None else grads[id(t)] for t in (x, weight, bias)))

    def spread(self, parameter: Tensor, x: Tensor) -> Tensor:
        """Weight or bias made to broadcast against ``x``."""
        axes = [axis % x.dim() for axis in self.affine]
        return parameter.reshape([x.shape[axis] if axis in axes else 1 for axis in range(x.dim())])


def _channels(groups: int | None) -> Callable[[Sequence[int]], tuple[int, ...]]:
    """(N, C, ...) as (N, groups, channels of a group, positions); None for a group for each channel."""
    return lambda s: (s[0], groups or s[1], s[1] // (groups or max(s[1], 1)), math.prod(s[2:]))


NORMS = [
    Norm(
        "layer_norm",
        lambda f, x, w, b, eps, _: f.layer_norm(x, x.shape[-1:], w, b, eps),
        shape=lambda size: (5, size),
        blocks=lambda s: (math.prod(s[:-1]), s[-1]),
        shared=(1,),
        rows=lambda s: reference.layer_norm_rows(s, s[-1:]),
        affine=(-1,),
    ),
    Norm(
        "layer_norm_of_two_axes",
        lambda f, x, w, b, eps, _: f.layer_norm(x, x.shape[-2:], w, b, eps),
        shape=lambda size: (3, 2, size),
        blocks=lambda s: (math.prod(s[:-2]), math.prod(s[-2:])),
        shared=(1,),
        rows=lambda s: reference.layer_norm_rows(s, s[-2:]),
        affine=(-2, -1),
    ),
    Norm(
        "rms_norm",
        lambda f, x, w, b, eps, _: f.rms_norm(x, x.shape[-1:], w, eps),
        shape=lambda size: (5, size),
        blocks=lambda s: (math.prod(s[:-1]), s[-1]),
        shared=(1,),
        rows=lambda s: reference.layer_norm_rows(s, s[-1:], centred=False),
        affine=(-1,),
    ),
    Norm(
        "group_norm",
        lambda f, x, w, b, eps, _: f.group_norm(x, 2, w, b, eps),
        shape=lambda size: (3, 6, size),
        blocks=_channels(2),
        shared=(2, 3),
        rows=lambda s: reference.group_norm_rows(s, 2),
    ),
    Norm(
        "instance_norm",
        lambda f, x, w, b, eps, _: f.instance_norm(x, None, None, w, b, eps=eps),
        shape=lambda size: (3, 4, size),
        blocks=_channels(None),
        shared=(2, 3),
        rows=lambda s: reference.group_norm_rows(s, s[1]),
        smallest=2,
    ),
    Norm(
        "batch_norm",
        lambda f, x, w, b, eps, _: f.batch_norm(x, None, None, w, b, True, eps=eps),
        shape=lambda size: (size, 4),
        blocks=_channels(None),
        shared=(0, 3),
        rows=reference.batch_norm_rows,
        smallest=2,
    ),
    Norm(
        "batch_norm_eval",
        lambda f, x, w, b, eps, running: f.batch_norm(x, *running, w, b, eps=eps),
        shape=lambda size: (2, 4, size),
        blocks=_channels(None),
        shared=(),
        rows=reference.batch_norm_rows,
    ),
    Norm(
        "layer_norm_2d",
        lambda f, x, w, b, eps, _: f.normalize(x, "n c ... -> n ...", "c", w, b, eps),
        shape=lambda size: (2, size, 3),
        blocks=_channels(1),
        shared=(2,),
        rows=lambda s: Rows.of(Pattern.parse("n c ... -> n ..."), s, "c"),
        in_torch=False,
    ),
]
BY_NAME = {norm.name: norm for norm in NORMS}
TORCH_NORMS = [norm for norm in NORMS if norm.in_torch]

MANY_ROWS = {
    **{norm.name: (1024, 4, 64) for norm in NORMS},
    **dict.fromkeys(["layer_norm", "rms_norm", "batch_norm"], (65_536, 4)),
    "layer_norm_of_two_axes": (65_536, 2, 2),
}
"""65,536 values behind each value of dweight and dbias, where a plain float32 sum is 5e-6 off and a bf16 one 50 %."""

SCALES = [
    (torch.float32, 1e-43),
    (torch.float32, 1e-38),
    (torch.float32, 1e-19),
    (torch.float32, 1e19),
    (torch.float32, 3.4e38),
    (torch.bfloat16, 1e-39),
    (torch.bfloat16, 3.3e38),
    (torch.float16, 1e-6),
    (torch.float16, 6.5e4),
]
"""The largest |x|, from subnormal to the largest finite; from 1e-19 and 1e19 on squares leave the range of float32."""

IMAGE = (4, 6, 5, 7)
"""A shape that every norm takes: (N, C, H, W); LayerNorm normalizes its last axes."""

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "batch_last": lambda x: x.movedim(0, 3).contiguous().movedim(3, 0),
    "expanded": lambda x: x[:1].expand(x.shape),
    "sliced": lambda x: torch.nn.functional.pad(x, (1, 2))[..., 1:-2],
    "channels_sliced": lambda x: LAYOUTS["channels_last"](torch.nn.functional.pad(x, (0, 0, 0, 0, 1, 1)))[:, 1:-1],
    "strided": lambda x: x.repeat_interleave(2, dim=3)[..., ::2],
}
"""The same values otherwise laid out in memory (``expanded``: those of the first example). A slice is not aligned."""


def draw(shape: Sequence[int], ratio: float = 0.0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """x with that mean/std, and a cotangent from N(0.5, 1): with mean 0 a lost sum would not show."""
    return (torch.randn(shape) + ratio).to(dtype), (torch.randn(shape) + 0.5).to(dtype)
