"""What the Triton kernels share: mean and variance of a group at any mean and scale, xhat from them, and sums of rows.

A group is what shares statistics. Kernels hold a tile of values in float32 (float64 for float64) and a few numbers for
each group in float64. Every kernel is launched with :data:`EXACT`; where a product and a sum are to be rounded once, it
says ``tl.fma``. The order of a sum depends on the shape of the tile, the number of warps and the alignment of pointers:
choose the first two from the group's size alone, and pass every tensor through :func:`ready`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

EXACT: dict[str, Any] = {"enable_fp_fusion": False, "num_stages": 1}
"""Options of every launch: the compiler joins no product with a sum."""


@triton.jit
def widened(values, WIDE: tl.constexpr):
    """Values in the type to compute in."""
    return values.to(WIDE) if values.dtype == tl.float64 else values.to(tl.float32).to(WIDE)


@triton.jit
def get(at, mask, WIDE: tl.constexpr):
    """What is stored there in the type to compute in; 0 where masked."""
    return widened(tl.load(at, mask=mask, other=0.0), WIDE)


@triton.jit
def rounded(values, at):
    """Values in the type that is stored there; half precision by way of float32, as torch rounds."""
    TYPE: tl.constexpr = at.dtype.element_ty
    return values.to(TYPE) if TYPE == tl.float64 else values.to(tl.float32).to(TYPE)


@triton.jit
def _unit(largest):
    """A power of two that brings ``largest`` between 1 and 2, as far as float32 has one, and its inverse."""
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 0xFF
    exponent = tl.minimum(tl.maximum(exponent, 1), 253)
    return ((254 - exponent) << 23).to(tl.float32, bitcast=True), (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def along(number, tile, AXIS: tl.constexpr):
    """A number of each group, to broadcast against the tile; that of a tile of one axis is a scalar already."""
    return tl.expand_dims(number, AXIS) if len(tile.shape) > 1 else number


@triton.jit
def moments(x, valid, count, AXIS: tl.constexpr, CENTRED: tl.constexpr):
    """Mean and sum of squared deviations of each group, in float64; if not CENTRED zero and the sum of squares.

    The values are scaled by a power of two, so that squares neither overflow nor vanish. Then the middle of their
    range is subtracted, then the mean of the differences, and what mean is left is corrected.

    Args:
        x: A tile in float32 or float64; if not CENTRED 0 where not valid.
        valid: Which of its values take part, to broadcast against it.
        count: How many do in each group, in float64; a group without any gets NaN.
        AXIS: The axis of the tile along which values share statistics.
        CENTRED: Whether the norm subtracts the mean.
    """
    high = tl.max(tl.where(valid, x, float("-inf")), AXIS)
    low = tl.min(tl.where(valid, x, float("inf")), AXIS)
    if x.dtype == tl.float32:
        unit, down = _unit(tl.maximum(high, -low))
        x = x * along(unit, x, AXIS)
        down = down.to(tl.float64)
        anchor = 0.5 * (high * unit) + 0.5 * (low * unit)
        anchor = (anchor + 6.0) - 6.0  # no digits below 2**-21: else all differences would be rounded alike
    else:
        down = 1.0
        anchor = 0.5 * high + 0.5 * low
    if CENTRED:
        share = 1.0 / count
        x = tl.where(valid, x - along(anchor, x, AXIS), 0.0)
        shift = (tl.sum(x, AXIS).to(tl.float64) * share).to(x.dtype)
        x = tl.where(valid, x - along(shift, x, AXIS), 0.0)
        rest = tl.sum(x, AXIS).to(tl.float64) * share
        squares = tl.sum(x * x, AXIS).to(tl.float64) - rest * rest * count
        squares = tl.where(squares < 0.0, 0.0, squares)  # unlike maximum, keeps NaN
        mean = (anchor.to(tl.float64) + shift.to(tl.float64) + rest) * down
    else:
        squares = tl.sum(x * x, AXIS).to(tl.float64)
        mean = squares * 0.0
    return mean, squares * down * down


@triton.jit
def merged(mean, squares, count, share, AXIS: tl.constexpr):
    """The :func:`moments` of whole groups from those of their parts along AXIS; ``share`` is 1 / all of ``count``."""
    whole = tl.sum(mean * count, AXIS) * share
    apart = mean - along(whole, mean, AXIS)
    return whole, tl.sum(squares + apart * apart * count, AXIS)


@triton.jit
def joined(mean, squares, count, other_mean, other_squares, other_count):
    """Mean, sum of squared deviations and count of two groups as one; an empty group changes nothing."""
    total = count + other_count
    share = other_count / tl.where(total > 0, total, 1.0)
    apart = tl.where(other_count > 0, other_mean - mean, 0.0)
    squares = squares + tl.where(other_count > 0, other_squares, 0.0) + apart * (count * share) * apart
    return mean + apart * share, squares, total


@triton.jit
def factors(mean, rstd, WIDE: tl.constexpr):
    """What :func:`standardized` needs of a group with these statistics: unit, hi, scale, rest.

    The unit is a power of two near rstd, which keeps all values in the range of float32. hi is the mean but for digits
    below 2**-18 of the deviation: without them x - hi is exact, or rounded at random. They follow in the rest.
    """
    if WIDE == tl.float64:
        unit, hi, scale, rest = mean * 0.0 + 1.0, mean, rstd, mean * 0.0
    else:
        of_mean = (mean.to(tl.int64, bitcast=True) >> 52) & 0x7FF
        of_rstd = (rstd.to(tl.int64, bitcast=True) >> 52) & 0x7FF
        exponent = tl.minimum(of_rstd, 2142 - of_mean) - 896  # biased, of float32; |mean| * unit < 2**97
        exponent = tl.minimum(tl.maximum(exponent, 1), 253).to(tl.int32)
        unit = (exponent << 23).to(tl.float32, bitcast=True)
        inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
        scaled = mean * unit.to(tl.float64)
        exact = rstd * inverse.to(tl.float64)
        hi = ((scaled + 25769803776.0) - 25769803776.0).to(tl.float32)  # 1.5 * 2**34
        scale = exact.to(tl.float32)
        rest = ((hi.to(tl.float64) - scaled) * exact).to(tl.float32)
    return unit, hi, scale, rest


@triton.jit
def standardized(x, unit, hi, scale, rest, AXIS: tl.constexpr):
    """Give xhat of a tile from the factors of its groups."""
    centred = x * along(unit, x, AXIS) - along(hi, x, AXIS)
    return tl.fma(centred, along(scale, x, AXIS), along(rest, x, AXIS))


@triton.jit
def normalized(x, mean, rstd, AXIS: tl.constexpr):
    """Give xhat of a tile, and in two factors what a gradient is multiplied by, from the statistics of its groups."""
    unit, hi, scale, rest = factors(mean, rstd, x.dtype)
    return standardized(x, unit, hi, scale, rest, AXIS), along(scale, x, AXIS), along(unit, x, AXIS)


@triton.jit(do_not_specialize=["blocks"])
def _add_blocks(sums, dweight, dbias, blocks, cols, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    which = tl.program_id(1)
    total = tl.zeros([ROWS, BLOCK], tl.float64)
    for first in range(0, blocks, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < blocks)[:, None] & (col < cols)[None, :]
        offsets = (which * blocks + row).to(tl.int64)[:, None] * cols + col[None, :]
        total += get(sums + offsets, inside, tl.float64)
    result = tl.sum(total, 0)
    if dweight is not None and which == 0:
        tl.store(dweight + col, rounded(result, dweight), mask=col < cols)
    if dbias is not None and which == tl.num_programs(1) - 1:
        tl.store(dbias + col, rounded(result, dbias), mask=col < cols)


def add_blocks(sums: Tensor, dweight: Tensor | None, dbias: Tensor | None) -> None:
    """Add the sums of row blocks in float64, in an order that their number sets, and round once.

    Args:
        sums: (1 or 2, blocks, cols), of dweight if wanted, then of dbias if wanted.
        dweight: Written, ``cols`` values, or None.
        dbias: Likewise.
    """
    kinds, blocks, cols = sums.shape
    _add_blocks[(triton.cdiv(cols, 16), kinds)](
        sums, dweight, dbias, blocks, cols, ROWS=256, BLOCK=16, num_warps=8, **EXACT
    )


MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)


def ready(t: MaybeTensor, like: Tensor | None = None) -> MaybeTensor:
    """The tensor, packed, or in the memory order of ``like``, and aligned as the kernels were compiled for."""
    if t is None:
        return t
    if like is None or like.is_contiguous():
        t = t.contiguous()
    elif t.stride() != like.stride():
        t = torch.empty_like(like, dtype=t.dtype).copy_(t)
    return t if t.data_ptr() % 16 == 0 else t.clone()


def expect(x: Tensor, shape: Sequence[int], **tensors: Tensor | None) -> None:
    """What keeps a kernel within the memory of tensors that go with x.

    Raises:
        RuntimeError: If one has another shape or device, or another type than float.
    """
    for name, t in tensors.items():
        if t is not None and (t.shape != torch.Size(shape) or t.device != x.device or not t.is_floating_point()):
            raise RuntimeError(
                f"normwise: {name} must be floating-point, {tuple(shape)}, on {x.device}; it is {t.dtype}, "
                f"{tuple(t.shape)}, on {t.device}."
            )


def laid_out(result: Tensor, x: Tensor) -> Tensor:
    """The result with the strides that ``torch.empty_like(x)`` has."""
    if result.stride() == x.stride():
        return result
    to = torch.empty_like(x, dtype=result.dtype)
    return result if result.stride() == to.stride() else to.copy_(result)


def warps(tile: int) -> int:
    """For a tile of so many values: 16 values a thread."""
    return min(max(tile // 512, 1), 32)


def wide(*tensors: Tensor | None) -> tl.dtype:
    """The type to compute in."""
    return tl.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else tl.float32
