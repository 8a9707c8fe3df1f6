"""Rows in memory for layer_norm and rms_norm: how they lie, and the tiles that walk through them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import expect, ready

Shape = Sequence[int]

TILE = 2048
"""Values of a tile of short rows."""

POSITIONS = 32
"""Rows of a tile where rows lie next to each other."""

LONGEST_OF_POSITIONS = 256
"""Values of the longest row in such a tile."""


@triton.jit
def tile_of_rows(
    tile, rows, cols, outer_stride, row_stride, col_stride,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, PLANAR: tl.constexpr,
):  # fmt: skip
    """The numbers of a tile's rows and which of them exist; its columns; offsets and mask of its values.

    A tile of one row has one axis, and numbers of that row are scalars: then the compiler has no layouts to convert.
    """
    if PLANAR:
        rows = col_stride  # the same number, but one whose alignment the compiler knows
    tiles = tl.cdiv(rows, ROWS)
    outer = tile.to(tl.int64) // tiles
    row = (tile % tiles).to(tl.int64) * ROWS
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    across = col.to(tl.int64) * col_stride
    if ROWS == 1:
        offsets = outer * outer_stride + row * row_stride + across
        inside = col < cols
    else:
        row = row + tl.arange(0, ROWS)
        offsets = (outer * outer_stride + row * row_stride)[:, None] + across[None, :]
        inside = (row < rows)[:, None] & (col < cols)[None, :]
    return outer * rows + row, row < rows, col, offsets, inside


@triton.jit
def parts_of_rows(parts, number, exists, cols, ROWS: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """Both numbers of each part of some rows, and how many values each part has."""
    part = tl.arange(0, PARTS)
    count = tl.minimum(tl.maximum(cols - part * BLOCK, 0), BLOCK).to(tl.float64)
    if ROWS == 1:
        at, mask = (number * PARTS + part) * 2, count > 0
    else:
        at, mask = (number[:, None] * PARTS + part[None, :]) * 2, exists[:, None] & (count > 0)[None, :]
        count = count[None, :]
    return tl.load(parts + at, mask=mask, other=0.0), tl.load(parts + at + 1, mask=mask, other=0.0), count


class Rows(NamedTuple):
    """How rows lie in memory: ``rows`` of ``cols`` values in each of ``outers`` examples."""

    outers: int
    rows: int
    cols: int
    outer_stride: int
    row_stride: int
    col_stride: int

    @property
    def planar(self) -> bool:
        """Neighbouring rows lie next to each other, as the channels of an image do."""
        return self.row_stride == 1 and self.col_stride > 1

    def tile(self, longest: int) -> tuple[int, int, int]:
        """Rows and columns of a tile, and a power of two of parts that a row may have."""
        block = min(triton.next_power_of_2(self.cols), LONGEST_OF_POSITIONS if self.planar else longest)
        rows = POSITIONS if self.planar else max(TILE // block, 1)
        return rows, block, triton.next_power_of_2(triton.cdiv(self.cols, block))

    def parts(self, x: Tensor, longest: int) -> Tensor | None:
        """Memory for two numbers of each part of each row, if tiles do not hold whole rows."""
        parts = self.tile(longest)[2]
        return x.new_empty(self.outers * self.rows, parts, 2, dtype=torch.float64) if parts > 1 else None


def rows_of(x: Tensor, axes: int) -> tuple[Tensor, Rows]:
    """The input in an order of memory that the kernels walk through, copied if it has another, and that order."""
    cols = math.prod(x.shape[-axes:])
    one = x[:1]  # gaps between examples are no matter of an example, whose bits must not depend on them
    if axes == 1 and x.dim() > 2 and not one.is_contiguous() and one.movedim(-1, 1).is_contiguous():
        rows = math.prod(x.shape[1:-1])
        return ready(x.movedim(-1, 1)).movedim(1, -1), Rows(x.shape[0], rows, cols, rows * cols, 1, rows)
    return ready(x), Rows(1, x.numel() // cols, cols, 0, cols, 1)


def check(x: Tensor, normalized_shape: Sequence[int], *parameters: Tensor | None, **alike: Tensor | None) -> Shape:
    """What keeps the kernels within their arguments' memory; the shape of what every row has once.

    Args:
        x: The input.
        normalized_shape: Its last axes.
        *parameters: Of that shape.
        **alike: Of the shape of x.

    Raises:
        RuntimeError: If a shape or device does not fit.
    """
    shape = tuple(normalized_shape)
    if not shape or x.shape[-len(shape) :] != shape:
        raise RuntimeError("normwise: the last axes of x must be normalized_shape.")
    for parameter in parameters:
        expect(x, shape, parameter=parameter)
    expect(x, x.shape, **alike)
    return x.shape[: x.dim() - len(shape)]
