"""layer_norm and rms_norm, alone and after an addition: every row has its own statistics.

A tile of whole rows is read once, kept in registers and written. Of longer rows each tile holds a part; a kernel before
finds the sums of the parts, and each part merges all of its row. Tiles depend on the row's size and memory order alone.

In backward a program walks through a block of rows and keeps their sums of dweight and dbias; how many rows a block has
depends on the shape of x alone. The blocks are added in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    EXACT,
    add_blocks,
    along,
    expect,
    get,
    laid_out,
    merged,
    moments,
    normalized,
    ready,
    rounded,
    warps,
    wide,
    widened,
)
from .rows import check, parts_of_rows, rows_of, tile_of_rows

LONGEST = 16384
"""Values of the longest row that a tile holds, in forward."""

LONGEST_IN_BACKWARD = 8192
"""Likewise, where a tile of x, of dy, and of two sums must fit into registers."""


@triton.jit
def _read(x, residual, h, offsets, inside, WIDE: tl.constexpr):
    """The values to normalize; if there is a residual its sum with x, rounded, which is also stored as h."""
    values = get(x + offsets, inside, WIDE)
    if residual is not None:
        total = rounded(values + get(residual + offsets, inside, WIDE), h)
        tl.store(h + offsets, total, mask=inside)
        values = widened(total, WIDE)
    return values


@triton.jit(do_not_specialize=["rows"])
def _forward_parts(
    x, residual, h, parts, rows, cols, outer_stride, row_stride, col_stride,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, PLANAR: tl.constexpr, CENTRED: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    number, exists, col, offsets, inside = tile_of_rows(
        tl.program_id(0), rows, cols, outer_stride, row_stride, col_stride, ROWS, BLOCK, PLANAR
    )
    count = tl.minimum(cols - tl.program_id(1) * BLOCK, BLOCK).to(tl.float64)
    mean, squares = moments(_read(x, residual, h, offsets, inside, WIDE), col < cols, count, -1, CENTRED)
    at = (number * PARTS + tl.program_id(1)) * 2
    tl.store(parts + at, mean, mask=exists)
    tl.store(parts + at + 1, squares, mask=exists)


@triton.jit(do_not_specialize=["rows"])
def _forward(
    x, residual, h, y, weight, bias, mean, rstd, parts, rows, cols, outer_stride, row_stride, col_stride,
    eps: tl.float64,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, PLANAR: tl.constexpr, CENTRED: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    number, exists, col, offsets, inside = tile_of_rows(
        tl.program_id(0), rows, cols, outer_stride, row_stride, col_stride, ROWS, BLOCK, PLANAR
    )
    result = _read(x, residual, h, offsets, inside, WIDE)
    count = tl.cast(cols, tl.float64)
    share = 1.0 / count
    if PARTS == 1:
        m, squares = moments(result, col < cols, count, -1, CENTRED)
    else:
        means, squares, counts = parts_of_rows(parts, number, exists, cols, ROWS, BLOCK, PARTS)
        m, squares = merged(means, squares, counts, share, -1)
    r = tl.rsqrt(squares * share + eps)
    if rstd is not None:
        once = exists & (tl.program_id(1) == 0)
        tl.store(rstd + number, r, mask=once)
        if CENTRED:
            tl.store(mean + number, m, mask=once)
    result, _, _ = normalized(result, m, r, -1)
    if weight is not None:
        result = result * get(weight + col, col < cols, WIDE)
    if bias is not None:
        result = result + get(bias + col, col < cols, WIDE)
    tl.store(y + offsets, rounded(result, y), mask=inside)


@triton.jit
def _read_gradient(dy, x, mean, rstd, number, exists, offsets, inside, CENTRED: tl.constexpr, WIDE: tl.constexpr):
    """Read dy and xhat of a tile, and the factor of dx in two."""
    r = tl.load(rstd + number, mask=exists, other=0.0)
    m = tl.load(mean + number, mask=exists, other=0.0) if CENTRED else r * 0.0
    xhat, scale, unit = normalized(get(x + offsets, inside, WIDE), m, r, -1)
    return get(dy + offsets, inside, WIDE), xhat, scale, unit


@triton.jit(do_not_specialize=["rows"])
def _backward_parts(
    dy, x, weight, mean, rstd, parts, rows, cols, outer_stride, row_stride, col_stride,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, PLANAR: tl.constexpr, CENTRED: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    number, exists, col, offsets, inside = tile_of_rows(
        tl.program_id(0), rows, cols, outer_stride, row_stride, col_stride, ROWS, BLOCK, PLANAR
    )
    g, xhat, _, _ = _read_gradient(dy, x, mean, rstd, number, exists, offsets, inside, CENTRED, WIDE)
    if weight is not None:
        g = g * get(weight + col, col < cols, WIDE)
    at = (number * PARTS + tl.program_id(1)) * 2
    tl.store(parts + at, tl.sum(g, -1).to(tl.float64), mask=exists)
    tl.store(parts + at + 1, tl.sum(g * xhat, -1).to(tl.float64), mask=exists)


@triton.jit(do_not_specialize=["outers", "rows", "steps"])
def _backward(
    dy, x, dh, weight, mean, rstd, parts, dx, sums, outers, rows, cols, outer_stride, row_stride, col_stride, steps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, PLANAR: tl.constexpr, CENTRED: tl.constexpr,
    WIDE: tl.constexpr, DWEIGHT: tl.constexpr, DBIAS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    share = 1.0 / tl.cast(cols, tl.float64)
    dw = tl.zeros([BLOCK] if ROWS == 1 else [ROWS, BLOCK], WIDE)
    db = dw
    if weight is not None:
        w = get(weight + col, col < cols, WIDE)
    first = block * steps
    for step in range(tl.minimum(outers * tl.cdiv(rows, ROWS) - first, steps)):
        number, exists, col, offsets, inside = tile_of_rows(
            first + step, rows, cols, outer_stride, row_stride, col_stride, ROWS, BLOCK, PLANAR
        )
        g, xhat, scale, unit = _read_gradient(dy, x, mean, rstd, number, exists, offsets, inside, CENTRED, WIDE)
        if DWEIGHT:
            dw = tl.fma(g, xhat, dw)
        if DBIAS:
            db += g
        if dx is not None:
            if weight is not None:
                g = g * w
            if PARTS == 1:
                a, b = tl.sum(g, -1).to(tl.float64), tl.sum(g * xhat, -1).to(tl.float64)
            else:
                a, b, _ = parts_of_rows(parts, number, exists, cols, ROWS, BLOCK, PARTS)
                a, b = tl.sum(a, -1), tl.sum(b, -1)
            if CENTRED:
                g = g - along((a * share).to(WIDE), g, -1)
            g = tl.fma(-xhat, along((b * share).to(WIDE), g, -1), g) * scale * unit
            if dh is not None:
                g = g + get(dh + offsets, inside, WIDE)
            tl.store(dx + offsets, rounded(g, dx), mask=inside)
    if DWEIGHT:
        tl.store(sums + block * cols + col, tl.sum(dw.to(tl.float64), 0) if ROWS > 1 else dw, mask=col < cols)
    if DBIAS:
        row = block + tl.num_programs(0) if DWEIGHT else block
        tl.store(sums + row * cols + col, tl.sum(db.to(tl.float64), 0) if ROWS > 1 else db, mask=col < cols)


class Forward(NamedTuple):
    """The output; if asked for h, and mean and rstd in float64."""

    y: Tensor
    h: Tensor | None
    mean: Tensor | None
    rstd: Tensor | None


def forward(
    x: Tensor,
    residual: Tensor | None,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    out_dtype: torch.dtype | None,
    centred: bool,
    save: bool,
) -> Forward:
    """Normalize x, or h = x + residual; keep what backward needs if ``save``.

    Numerics:
        Float32 (float64 for float64) within a tile, float64 for the numbers of a row; y is rounded once.
    """
    kept = check(x, normalized_shape, weight, bias, residual=residual)
    source, at = rows_of(x, len(normalized_shape))
    added = ready(residual, source)
    y = torch.empty_like(source, dtype=out_dtype or x.dtype)
    h = None if residual is None else torch.empty_like(source)
    mean = x.new_empty(kept, dtype=torch.float64) if save and centred else None
    rstd = x.new_empty(kept, dtype=torch.float64) if save else None
    rows, block, count = at.tile(LONGEST)
    grid = at.outers * triton.cdiv(at.rows, rows), triton.cdiv(at.cols, block)
    options: dict[str, Any] = {
        "ROWS": rows, "BLOCK": block, "PARTS": count, "PLANAR": at.planar, "CENTRED": centred, "WIDE": wide(source, y),
        "num_warps": warps(rows * block), **EXACT,
    }  # fmt: skip
    parts = at.parts(x, LONGEST)
    values, result = source, h
    if parts is not None:
        _forward_parts[grid](source, added, h, parts, *at[1:], **options)
        values, added, result = source if h is None else h, None, None
    _forward[grid](
        values, added, result, y, ready(weight), ready(bias), mean, rstd, parts, *at[1:], float(eps), **options
    )
    return Forward(laid_out(y, x), None if h is None else laid_out(h, x), mean, rstd)


def backward(
    dy: Tensor,
    dh: Tensor | None,
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias_dtype: torch.dtype | None,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Give dx, dweight and dbias, each empty where it is not wanted; without a mean those of rms_norm.

    Numerics:
        The sums of a row and of a block of rows are taken in float32 (float64 for float64), those of blocks in float64.
    """
    expect(x, check(x, normalized_shape, weight, dy=dy, dh=dh), mean=mean, rstd=rstd)
    source, at = rows_of(x, len(normalized_shape))
    want_dx, want_dw, want_db = (
        output_mask[0], output_mask[1] and weight is not None, output_mask[2] and bias_dtype is not None,
    )  # fmt: skip
    kinds = int(want_dw) + int(want_db)
    dx = torch.empty_like(source) if want_dx else None
    rows, block, count = at.tile(LONGEST_IN_BACKWARD)
    tiles, columns = at.outers * triton.cdiv(at.rows, rows), triton.cdiv(at.cols, block)
    steps = steps_of(tiles, at.cols) if kinds else 1
    blocks = triton.cdiv(tiles, steps)
    options: dict[str, Any] = {
        "ROWS": rows, "BLOCK": block, "PARTS": count, "PLANAR": at.planar, "CENTRED": mean is not None,
        "WIDE": wide(source, dy), "num_warps": warps(rows * block), **EXACT,
    }  # fmt: skip
    parts = at.parts(x, LONGEST_IN_BACKWARD) if want_dx else None
    arguments = ready(dy, source), source
    w, statistics = ready(weight), (ready(mean), ready(rstd))
    sums = x.new_empty(kinds, blocks, at.cols, dtype=torch.float64 if options["WIDE"] == tl.float64 else torch.float32)
    if parts is not None:
        _backward_parts[(tiles, columns)](*arguments, w, *statistics, parts, *at[1:], **options)
    _backward[(blocks, columns)](
        *arguments, ready(dh, source), w, *statistics, parts, dx, sums, *at, steps,
        DWEIGHT=want_dw, DBIAS=want_db, **options,
    )  # fmt: skip
    dweight = torch.empty_like(w) if want_dw and w is not None else None
    dbias = x.new_empty(tuple(normalized_shape), dtype=bias_dtype) if want_db else None
    if kinds:
        add_blocks(sums, dweight, dbias)
    return (
        x.new_empty(0) if dx is None else laid_out(dx, x),
        x.new_empty(0) if dweight is None else dweight,
        x.new_empty(0) if dbias is None else dbias,
    )


def steps_of(tiles: int, cols: int) -> int:
    """Tiles of a block: few enough blocks that their sums are small beside x, and enough to fill a GPU."""
    blocks = min(max(2**20 // cols, 256), 1024)
    return min(triton.next_power_of_2(max(tiles // blocks, 1)), 64)


Parameter = Tensor | None
Shape = Sequence[int]
Type = torch.dtype | None
Mask = Sequence[bool]


def layer_norm(x: Tensor, shape: Shape, weight: Parameter, bias: Parameter, eps: float, out_dtype: Type) -> Tensor:
    """The operator of this name, as all below."""
    return forward(x, None, shape, weight, bias, eps, out_dtype, True, False).y


def layer_norm_forward(
    x: Tensor, shape: Shape, weight: Parameter, bias: Parameter, eps: float, out_dtype: Type
) -> tuple[Any, ...]:
    """Give y, mean, rstd."""
    y, _, mean, rstd = forward(x, None, shape, weight, bias, eps, out_dtype, True, True)
    return y, mean, rstd


def layer_norm_backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, shape: Shape, weight: Parameter, bias_dtype: Type, mask: Mask
) -> tuple[Any, ...]:
    """Give dx, dweight, dbias."""
    return backward(dy, None, x, mean, rstd, shape, weight, bias_dtype, mask)


def rms_norm(x: Tensor, shape: Shape, weight: Parameter, eps: float, out_dtype: Type) -> Tensor:
    """Give y."""
    return forward(x, None, shape, weight, None, eps, out_dtype, False, False).y


def rms_norm_forward(x: Tensor, shape: Shape, weight: Parameter, eps: float, out_dtype: Type) -> tuple[Any, ...]:
    """Give y, rstd."""
    y, _, _, rstd = forward(x, None, shape, weight, None, eps, out_dtype, False, True)
    return y, rstd


def rms_norm_backward(
    dy: Tensor, x: Tensor, rstd: Tensor, shape: Shape, weight: Parameter, mask: Mask
) -> tuple[Any, ...]:
    """Give dx, dweight."""
    return backward(dy, None, x, None, rstd, shape, weight, None, (*mask, False))[:2]


def fused_add_layer_norm(
    x: Tensor, residual: Tensor, shape: Shape, weight: Parameter, bias: Parameter, eps: float, out_dtype: Type
) -> tuple[Any, ...]:
    """Give y, h."""
    return forward(x, residual, shape, weight, bias, eps, out_dtype, True, False)[:2]


def fused_add_layer_norm_forward(
    x: Tensor, residual: Tensor, shape: Shape, weight: Parameter, bias: Parameter, eps: float, out_dtype: Type
) -> tuple[Any, ...]:
    """Give y, h, mean, rstd."""
    return tuple(forward(x, residual, shape, weight, bias, eps, out_dtype, True, True))


def fused_add_layer_norm_backward(dy: Tensor, dh: Parameter, h: Tensor, *args: Any) -> tuple[Any, ...]:
    """Give dx, dweight, dbias."""
    return backward(dy, dh, h, *args)


def fused_add_rms_norm(
    x: Tensor, residual: Tensor, shape: Shape, weight: Parameter, eps: float, out_dtype: Type
) -> tuple[Any, ...]:
    """Give y, h."""
    return forward(x, residual, shape, weight, None, eps, out_dtype, False, False)[:2]


def fused_add_rms_norm_forward(
    x: Tensor, residual: Tensor, shape: Shape, weight: Parameter, eps: float, out_dtype: Type
) -> tuple[Any, ...]:
    """Give y, h, rstd."""
    y, h, _, rstd = forward(x, residual, shape, weight, None, eps, out_dtype, False, True)
    return y, h, rstd


def fused_add_rms_norm_backward(
    dy: Tensor, dh: Parameter, h: Tensor, rstd: Tensor, shape: Shape, weight: Parameter, mask: Mask
) -> tuple[Any, ...]:
    """Give dx, dweight."""
    return backward(dy, dh, h, None, rstd, shape, weight, None, (*mask, False))[:2]
