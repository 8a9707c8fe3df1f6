"""group_norm, and with a group for each channel instance_norm: every group of an example has its own statistics.

Of contiguous memory a group is a row: one that a tile holds is read once. Of others the moments of all parts of all
channels come first, then the statistics of each group, then y; backward likewise. The sums of a group have an order
that the shape of an example sets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .channels import Channels, Own, apart_from_one, channels_of, check, mask_of, moments_of_part, store_factors
from .common import (
    EXACT,
    add_blocks,
    along,
    expect,
    get,
    joined,
    laid_out,
    merged,
    normalized,
    ready,
    rounded,
    warps,
    wide,
)
from .rows import Rows, tile_of_rows

ROWS, COLUMNS = 64, 64
"""The most parts and channels of a group that a tile takes."""

LONGEST = 8192
"""Values of the largest group that a tile holds whole: with twice as many registers spill."""


@triton.jit(do_not_specialize=["rows"])
def _whole_groups(
    x, y, weight, bias, mean, rstd, rows, cols, groups, width, positions, eps: tl.float64,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    number, exists, col, offsets, inside = tile_of_rows(
        tl.program_id(0), rows, cols, 0, cols, 1, ROWS, BLOCK, False
    )  # fmt: skip
    result = get(x + offsets, inside, WIDE)
    count = tl.cast(cols, tl.float64)
    anchor, apart = apart_from_one(result, inside, -1)  # float64: what a mean is off adds up in dweight
    shift = tl.sum(apart, -1) / count
    squares = tl.sum(apart * apart, -1) - shift * shift * count
    m = anchor + shift
    r = tl.rsqrt(tl.where(squares < 0.0, 0.0, squares) / count + eps)  # unlike maximum, keeps NaN
    if rstd is not None:
        tl.store(mean + number, m, mask=exists)
        tl.store(rstd + number, r, mask=exists)
    result, _, _ = normalized(result, m, r, -1)
    channel = along(number % groups * width, result, -1) + col // positions
    if weight is not None:
        result = result * get(weight + channel, inside, WIDE)
    if bias is not None:
        result = result + get(bias + channel, inside, WIDE)
    tl.store(y + offsets, rounded(result, y), mask=inside)


@triton.jit(do_not_specialize=["size", "many", "positions"])
def _statistics(
    parts, size, many, channels, chunks, span, positions, mean, rstd, numbers, groups, width, eps: tl.float64,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64)
    first_part, first_channel = group // groups * chunks, (group % groups).to(tl.int32) * width
    m = tl.cast(0.0, tl.float64)
    squares, count = m, m
    for part in range(0, chunks, ROWS):
        for column in range(0, width, COLUMNS):
            chunk, channel = part + tl.arange(0, ROWS)[:, None], column + tl.arange(0, COLUMNS)[None, :]
            inside = (chunk < chunks) & (channel < width)
            means, its_squares, counts = moments_of_part(
                parts, size, first_part + chunk, first_channel + channel, inside, channels, chunks, span, positions,
                COUNTED,
            )  # fmt: skip
            n = tl.sum(tl.sum(counts, 1), 0)
            means, its_squares = tl.reshape(means, [ROWS * COLUMNS]), tl.reshape(its_squares, [ROWS * COLUMNS])
            counts = tl.reshape(tl.broadcast_to(counts, [ROWS, COLUMNS]), [ROWS * COLUMNS])
            its_mean, its_squares = merged(means, its_squares, counts, 1.0 / tl.where(n > 0, n, 1.0), 0)
            m, squares, count = joined(m, squares, count, its_mean, its_squares, n)
    r = tl.rsqrt(squares / tl.where(count > 0, count, 1.0) + eps)
    if rstd is not None:
        tl.store(mean + group, m)
        tl.store(rstd + group, r)
    store_factors(numbers, group, True, m, r, tl.num_programs(0))


@triton.jit(do_not_specialize=["many"])
def _factors(mean, rstd, numbers, many, BLOCK: tl.constexpr):
    group = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = group < many
    m, r = tl.load(mean + group, mask=exists, other=0.0), tl.load(rstd + group, mask=exists, other=0.0)
    store_factors(numbers, group, exists, m, r, many)


@triton.jit(do_not_specialize=["size", "positions"])
def _through(
    sums, size, channels, chunks, positions, counts, weight, through, groups, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64)
    example = group // groups
    first_part, first_channel = example * chunks, (group % groups) * width
    dw, db = tl.zeros([ROWS, COLUMNS], tl.float64), tl.zeros([ROWS, COLUMNS], tl.float64)
    for part in range(0, chunks, ROWS):
        for column in range(0, width, COLUMNS):
            chunk, channel = part + tl.arange(0, ROWS)[:, None], column + tl.arange(0, COLUMNS)[None, :]
            inside = (chunk < chunks) & (channel < width)
            at = (first_part + chunk) * channels + first_channel + channel
            w = 1.0
            if weight is not None:
                w = get(weight + first_channel + channel, channel < width, tl.float64)
            dw += w * tl.load(sums + at, mask=inside, other=0.0)
            db += w * tl.load(sums + tl.cast(size, tl.int64) + at, mask=inside, other=0.0)
    n = tl.cast(positions, tl.float64)
    if counts is not None:
        n = tl.load(counts + example)
    share = 1.0 / (tl.where(n > 0, n, 1.0) * width)
    TYPE: tl.constexpr = through.dtype.element_ty
    tl.store(through + group, (tl.sum(tl.sum(db, 1), 0) * share).to(TYPE))
    tl.store(through + tl.num_programs(0).to(tl.int64) + group, (tl.sum(tl.sum(dw, 1), 0) * share).to(TYPE))


def _tile(chunks: int, width: int) -> dict[str, Any]:
    rows, columns = min(triton.next_power_of_2(chunks), ROWS), min(triton.next_power_of_2(width), COLUMNS)
    return {"ROWS": rows, "COLUMNS": columns, "num_warps": 4, **EXACT}


def _own(at: Channels, groups: int) -> Own:
    return Own(at.examples * groups, groups, at.channels // groups)


def _numbers(own: Own, *tensors: Tensor) -> Tensor:
    return tensors[0].new_empty(4, own.many, dtype=torch.float64 if wide(*tensors) == tl.float64 else torch.float32)


def _check(x: Tensor, groups: int, mask: Tensor | None, *of_channels: Tensor | None, **alike: Tensor | None) -> None:
    check(x, mask, *of_channels, **alike)
    if groups < 1 or x.shape[1] % groups:
        raise RuntimeError(
            f"group_norm: num_groups must divide the {x.shape[1]} channels; got {groups}; choose a divisor."
        )


def forward(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    mask: Tensor | None,
    out_dtype: torch.dtype | None,
    save: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Normalize x; give y, and what backward needs if ``save``: mean and rstd in float64.

    Numerics:
        Float32 (float64 for float64) within a tile, float64 for the numbers of a group; y is rounded once.
    """
    _check(x, groups, mask, weight, bias)
    source, at = channels_of(x)
    places, own = mask_of(mask, x), _own(at, groups)
    y = torch.empty_like(source, dtype=out_dtype or x.dtype)
    mean, rstd = (x.new_empty(at.examples, groups, dtype=torch.float64) if save else None for _ in range(2))
    group = Rows(1, own.many, own.width * at.positions, 0, own.width * at.positions, 1)
    if at.planar and places is None and group.cols <= LONGEST:
        rows, block, _ = group.tile(LONGEST)
        _whole_groups[(triton.cdiv(own.many, rows),)](
            source, y, ready(weight), ready(bias), mean, rstd, own.many, group.cols, groups, own.width, at.positions,
            float(eps), ROWS=rows, BLOCK=block, WIDE=wide(source, y), num_warps=warps(rows * block), **EXACT,
        )  # fmt: skip
        return laid_out(y, x), mean, rstd
    numbers = _numbers(own, source, y)
    parts = at.moments(source, places)
    _statistics[(own.many,)](
        *parts.arguments, mean, rstd, numbers, groups, own.width, float(eps), COUNTED=mask is not None,
        **_tile(parts.chunks, own.width),
    )  # fmt: skip
    at.normalize(source, y, places, weight, bias, numbers, own)
    return laid_out(y, x), mean, rstd


def group_norm(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, mask: Tensor | None,
    out_dtype: torch.dtype | None,
) -> Tensor:  # fmt: skip
    """The operator of this name, as all below."""
    return forward(x, num_groups, weight, bias, eps, mask, out_dtype, False)[0]


def group_norm_forward(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, mask: Tensor | None,
    out_dtype: torch.dtype | None,
) -> tuple[Any, ...]:  # fmt: skip
    """Give y, mean, rstd."""
    return forward(x, num_groups, weight, bias, eps, mask, out_dtype, True)


def group_norm_backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    eps: float,
    mask: Tensor | None,
    weight: Tensor | None,
    bias_dtype: torch.dtype | None,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Give dx, dweight and dbias, each empty where it is not wanted.

    Numerics:
        Sums of parts are taken in float32 (float64 for float64), those of groups and channels in float64.
    """
    _check(x, num_groups, mask, weight, dy=dy)
    expect(x, (x.shape[0], num_groups), mean=mean, rstd=rstd)
    source, at = channels_of(x)
    places, own, dy = mask_of(mask, x), _own(at, num_groups), ready(dy, source)
    numbers = _numbers(own, source, dy)
    _factors[(triton.cdiv(own.many, 128),)](
        ready(mean), ready(rstd), numbers, own.many, BLOCK=128, num_warps=4, **EXACT
    )
    parts = at.gradients(dy, None, source, places, numbers, own)
    dx, empty = None, x.new_empty(0)
    if output_mask[0]:
        through = x.new_empty(2, own.many, dtype=numbers.dtype)
        counts = None if places is None else places.reshape(at.examples, -1).sum(1, dtype=torch.float64)
        chunks = at.chunks(at.steps)
        _through[(own.many,)](
            parts, parts[0].numel(), at.channels, chunks, at.positions, counts, ready(weight), through, num_groups,
            own.width, **_tile(chunks, own.width),
        )  # fmt: skip
        dx, _ = at.dx(dy, None, source, places, weight, numbers, through, own)
    dweight = None if weight is None or not output_mask[1] else x.new_empty(at.channels, dtype=weight.dtype)
    dbias = None if bias_dtype is None or not output_mask[2] else x.new_empty(at.channels, dtype=bias_dtype)
    if dweight is not None or dbias is not None:
        add_blocks(parts, dweight, dbias)
    return (
        empty if dx is None else laid_out(dx, x),
        empty if dweight is None else dweight,
        empty if dbias is None else dbias,
    )
