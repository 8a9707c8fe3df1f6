"""Channels in memory for batch_norm and group_norm: the tiles that walk through them, and the kernels that both need.

A tile has positions of one example along one axis and neighbours in memory along the other: where a channel's positions
lie next to each other the channels of examples, as lines; where channels do, channels. Every value of a tile has an
example and a channel, and these tell which statistics are its own: Batch Norm's one for each channel, Group Norm's one
for each example and group of channels. Part of a channel are the positions of one example in a few tiles.

A part's sums have an order that the shape of an example sets. What is made of the parts is the norm's own affair.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import EXACT, along, expect, factors, get, ready, rounded, standardized, wide

TILE = 4096
"""Values of a tile."""

SIDE = 64
"""Channels of a tile where they lie next to each other and positions are many."""

STEPS = 8
"""Tiles of a part, likewise: few enough parts to be small beside x, enough of them to fill a GPU."""


@triton.jit
def tile_of_channels(
    step, steps, examples, channels, positions, line,
    VALUES: tl.constexpr, SIDE: tl.constexpr, PLANAR: tl.constexpr,
):  # fmt: skip
    """A tile's examples and channels and which exist, its part; offsets and mask of its values, and their positions.

    Examples, channels and parts are numbers of each line or channel. A tile of one line has one axis, and its numbers
    are scalars: then the compiler has no layouts to convert. Positions are counted through all examples.
    """
    program = tl.program_id(0)
    if PLANAR:
        positions = line  # the same number, but one whose alignment the compiler knows
        chunks = tl.cdiv(positions, VALUES)
        chunk = program % chunks
        first = (program // chunks).to(tl.int64) * SIDE
        position = chunk * VALUES + tl.arange(0, VALUES)
        example = first // channels
        channel = (first % channels).to(tl.int32)
        if SIDE == 1:
            exists = first < examples.to(tl.int64) * channels
            offsets = first * line + position
            inside = position < positions
            place = example * positions + position
        else:
            channel = channel + tl.arange(0, SIDE)
            example = example + channel // channels
            channel = channel % channels
            exists = example < examples
            offsets = (example * channels + channel)[:, None] * line + position[None, :]
            inside = exists[:, None] & (position < positions)[None, :]
            place = (example * positions)[:, None] + position[None, :]
    else:
        columns = tl.cdiv(channels, SIDE)
        chunks = tl.cdiv(positions, steps * VALUES)
        chunk = program // columns % chunks
        example = (program // columns // chunks).to(tl.int64)
        position = (chunk * steps + step).to(tl.int64) * VALUES + tl.arange(0, VALUES)
        channel = program % columns * SIDE + tl.arange(0, SIDE)
        exists = channel < channels
        place = example * positions + position
        offsets = place[:, None] * line + channel[None, :]
        inside = (position < positions)[:, None] & exists[None, :]
    return example, channel, exists, (example * chunks + chunk) * channels + channel, offsets, inside, place


@triton.jit
def _valid(mask, place, inside, PLANAR: tl.constexpr):
    """Which values of a tile take part."""
    if mask is None:
        valid = inside
    elif PLANAR:
        valid = inside & (tl.load(mask + place, mask=inside, other=0) != 0)
    else:
        rows = tl.max(inside.to(tl.int32), 1) != 0
        valid = inside & (tl.load(mask + place, mask=rows, other=0) != 0)[:, None]
    return valid


@triton.jit
def moments_of_part(parts, size, number, channel, inside, channels, chunks, span, positions, COUNTED: tl.constexpr):
    """Read mean, sum of squared deviations and count of parts; if not COUNTED their places in an example tell."""
    size = tl.cast(size, tl.int64)
    at = number.to(tl.int64) * channels + channel
    if COUNTED:
        count = tl.load(parts + 2 * size + at, mask=inside, other=0.0)
    else:
        count = tl.where(inside, tl.minimum(positions - number % chunks * span, span), 0).to(tl.float64)
    return tl.load(parts + at, mask=inside, other=0.0), tl.load(parts + size + at, mask=inside, other=0.0), count


@triton.jit
def apart_from_one(values, valid, AXIS: tl.constexpr):
    """The largest value along AXIS, and how far all are from it, in float64; zero where not valid."""
    anchor = tl.max(tl.where(valid & (values == values), values, float("-inf")), AXIS)
    anchor = tl.where(anchor > float("-inf"), anchor, 0.0).to(tl.float64)
    return anchor, tl.where(valid, values.to(tl.float64) - along(anchor, values, AXIS), 0.0)


@triton.jit(do_not_specialize=["size", "steps", "examples", "positions"])
def _moments_of_parts(
    x, mask, parts, size, steps, examples, channels, positions, line,
    VALUES: tl.constexpr, SIDE: tl.constexpr, PLANAR: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    AXIS: tl.constexpr = -1 if PLANAR else 0
    _example, _channel, exists, part, offsets, inside, place = tile_of_channels(  # not _, which the loop has
        0, steps, examples, channels, positions, line, VALUES, SIDE, PLANAR
    )
    valid = _valid(mask, place, inside, PLANAR)
    values = get(x + offsets, valid, WIDE)
    anchor, apart = apart_from_one(values, valid, AXIS)
    total, squares = apart, apart * apart
    n = tl.sum(valid.to(tl.int32), AXIS)
    if not PLANAR:
        for step in range(1, steps):
            _, _, _, _, offsets, inside, place = tile_of_channels(
                step, steps, examples, channels, positions, line, VALUES, SIDE, PLANAR
            )
            valid = _valid(mask, place, inside, PLANAR)
            apart = get(x + offsets, valid, WIDE).to(tl.float64) - along(anchor, values, AXIS)
            apart = tl.where(valid, apart, 0.0)
            total += apart
            squares = tl.fma(apart, apart, squares)
            n += tl.sum(valid.to(tl.int32), AXIS)
    count = n.to(tl.float64)
    shift = tl.sum(total, AXIS) / tl.where(count > 0, count, 1.0)
    m2 = tl.sum(squares, AXIS) - shift * shift * count
    size = tl.cast(size, tl.int64)
    tl.store(parts + part, anchor + shift, mask=exists)
    tl.store(parts + size + part, tl.where(m2 < 0.0, 0.0, m2), mask=exists)  # unlike maximum, keeps NaN
    if mask is not None:
        tl.store(parts + 2 * size + part, count, mask=exists)


@triton.jit
def store_factors(to, at, mask, mean, rstd, many):
    """Write what :func:`standardized` needs of statistics, (4, many)."""
    unit, hi, scale, rest = factors(mean, rstd, to.dtype.element_ty)
    size = tl.cast(many, tl.int64)
    tl.store(to + at, unit, mask=mask)
    tl.store(to + size + at, hi, mask=mask)
    tl.store(to + 2 * size + at, scale, mask=mask)
    tl.store(to + 3 * size + at, rest, mask=mask)


@triton.jit
def _xhat(x, numbers, at, exists, many, offsets, valid, AXIS: tl.constexpr, WIDE: tl.constexpr):
    """Read xhat of a tile."""
    size = tl.cast(many, tl.int64)
    unit = tl.load(numbers + at, mask=exists, other=0.0)
    hi = tl.load(numbers + size + at, mask=exists, other=0.0)
    scale = tl.load(numbers + 2 * size + at, mask=exists, other=0.0)
    rest = tl.load(numbers + 3 * size + at, mask=exists, other=0.0)
    return standardized(get(x + offsets, valid, WIDE), unit, hi, scale, rest, AXIS)


@triton.jit(do_not_specialize=["examples", "positions", "many"])
def _normalize(
    x, y, residual, mask, weight, bias, numbers, many, of_example, width, examples, channels, positions, line,
    VALUES: tl.constexpr, SIDE: tl.constexpr, PLANAR: tl.constexpr, WIDE: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    AXIS: tl.constexpr = -1 if PLANAR else 0
    example, channel, exists, _, offsets, inside, place = tile_of_channels(
        0, 1, examples, channels, positions, line, VALUES, SIDE, PLANAR
    )
    valid = _valid(mask, place, inside, PLANAR)
    at = example * of_example + channel // width
    result = _xhat(x, numbers, at, exists, many, offsets, valid, AXIS, WIDE)
    if weight is not None:
        result = result * along(get(weight + channel, exists, WIDE), result, AXIS)
    if bias is not None:
        result = result + along(get(bias + channel, exists, WIDE), result, AXIS)
    if residual is not None:
        result = result + get(residual + offsets, valid, WIDE)
    if RELU:
        result = tl.where(result <= 0.0, 0.0, result)  # unlike maximum, keeps NaN
    if mask is not None:
        result = tl.where(valid, result, 0.0)
    tl.store(y + offsets, rounded(result, y), mask=inside)


@triton.jit
def _gradient(dy, y, offsets, valid, WIDE: tl.constexpr):
    """Read dy of a tile; with the y of a ReLU, zero where that was shut."""
    g = get(dy + offsets, valid, WIDE)
    if y is not None:
        g = tl.where(get(y + offsets, valid, WIDE) <= 0.0, 0.0, g)
    return g


@triton.jit(do_not_specialize=["steps", "examples", "positions", "many", "size"])
def _gradients_of_parts(
    dy, y, x, mask, numbers, sums, many, of_example, width, steps, examples, channels, positions, line, size,
    VALUES: tl.constexpr, SIDE: tl.constexpr, PLANAR: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    AXIS: tl.constexpr = -1 if PLANAR else 0
    example, channel, exists, part, offsets, inside, place = tile_of_channels(
        0, steps, examples, channels, positions, line, VALUES, SIDE, PLANAR
    )
    at = example * of_example + channel // width
    valid = _valid(mask, place, inside, PLANAR)
    db = _gradient(dy, y, offsets, valid, WIDE)
    dw = tl.where(valid, db * _xhat(x, numbers, at, exists, many, offsets, valid, AXIS, WIDE), 0.0)
    if not PLANAR:
        for step in range(1, steps):
            _, _, _, _, offsets, inside, place = tile_of_channels(
                step, steps, examples, channels, positions, line, VALUES, SIDE, PLANAR
            )
            valid = _valid(mask, place, inside, PLANAR)
            g = _gradient(dy, y, offsets, valid, WIDE)
            xhat = _xhat(x, numbers, at, exists, many, offsets, valid, AXIS, WIDE)
            dw = tl.where(valid, tl.fma(g, xhat, dw), dw)
            db += g
    tl.store(sums + part, tl.sum(dw.to(tl.float64), AXIS), mask=exists)
    tl.store(sums + tl.cast(size, tl.int64) + part, tl.sum(db.to(tl.float64), AXIS), mask=exists)


@triton.jit(do_not_specialize=["examples", "positions", "many"])
def _dx(
    dy, y, x, mask, weight, numbers, through, dx, dresidual, many, of_example, width,
    examples, channels, positions, line,
    VALUES: tl.constexpr, SIDE: tl.constexpr, PLANAR: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    AXIS: tl.constexpr = -1 if PLANAR else 0
    example, channel, exists, _, offsets, inside, place = tile_of_channels(
        0, 1, examples, channels, positions, line, VALUES, SIDE, PLANAR
    )
    valid = _valid(mask, place, inside, PLANAR)
    g = _gradient(dy, y, offsets, inside, WIDE)
    if dresidual is not None:
        tl.store(dresidual + offsets, rounded(g, dresidual), mask=inside)
    if dx is not None:
        at = example * of_example + channel // width
        size = tl.cast(many, tl.int64)
        if weight is not None:
            g = g * along(get(weight + channel, exists, WIDE), g, AXIS)
        if through is not None:
            xhat = _xhat(x, numbers, at, exists, many, offsets, valid, AXIS, WIDE)
            g = g - along(tl.load(through + at, mask=exists, other=0.0), g, AXIS)
            g = tl.fma(-xhat, along(tl.load(through + size + at, mask=exists, other=0.0), g, AXIS), g)
        g = g * along(tl.load(numbers + 2 * size + at, mask=exists, other=0.0), g, AXIS)
        g = g * along(tl.load(numbers + at, mask=exists, other=0.0), g, AXIS)
        if mask is not None:
            g = tl.where(valid, g, 0.0)
        tl.store(dx + offsets, rounded(g, dx), mask=inside)


class Own(NamedTuple):
    """Which statistics are a value's own: ``example * of_example + channel // width``, one of ``many``."""

    many: int
    of_example: int
    width: int


class Parts(NamedTuple):
    """Of the parts of channels means, sums of squares and, if a mask leaves values out, counts: (2 or 3, parts, C).

    An example has ``chunks`` parts a channel, of ``span`` of its ``positions`` or what is left of them.
    """

    moments: Tensor
    chunks: int
    span: int
    positions: int

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What kernels take that call :func:`moments_of_part`."""
        _, many, channels = self.moments.shape
        return self.moments, many * channels, many, channels, self.chunks, self.span, self.positions


class Channels(NamedTuple):
    """How channels lie in memory: examples of ``channels`` lines of ``positions``, or if not ``planar`` the reverse."""

    examples: int
    channels: int
    positions: int
    planar: bool
    joined: bool = False
    """The positions of all examples count as those of one."""

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """What the kernels take: the last is how far neighbours of a tile's shorter axis lie apart."""
        return *self[:3], self.positions if self.planar else self.channels

    @property
    def tile(self) -> tuple[int, int]:
        """Positions of a tile, and lines or channels, whatever the number of examples."""
        if self.planar:
            values = min(triton.next_power_of_2(self.positions), TILE)
            return values, TILE // values
        narrow = min(triton.next_power_of_2(self.channels), SIDE)
        values = TILE // narrow
        if not self.joined:
            values = min(triton.next_power_of_2(self.positions), values)
        return values, min(triton.next_power_of_2(self.channels), TILE // values)

    @property
    def steps(self) -> int:
        """Tiles of a part."""
        return 1 if self.planar else min(triton.cdiv(self.positions, self.tile[0]), STEPS)

    def chunks(self, steps: int) -> int:
        """Parts of an example's channel, each of so many tiles."""
        return triton.cdiv(self.positions, self.tile[0] * steps)

    def grid(self, steps: int) -> tuple[int]:
        """The programs of a kernel that walks through all values, ``steps`` tiles each."""
        neighbours = self.channels * self.examples if self.planar else self.channels
        columns = triton.cdiv(neighbours, self.tile[1])
        return (columns * self.chunks(steps) * (1 if self.planar else self.examples),)

    def options(self, *tensors: Tensor | None) -> dict[str, Any]:
        """What every kernel is launched with."""
        values, side = self.tile
        common = {"VALUES": values, "SIDE": side, "PLANAR": self.planar, "WIDE": wide(*tensors)}
        each = 8 if self.planar and side > 1 else 16  # values of a thread: fewer where it has the numbers of many lines
        return {**common, "num_warps": max(values * side // (32 * each), 1), **EXACT}

    def moments(self, x: Tensor, mask: Tensor | None) -> Parts:
        """Mean, sum of squared deviations and count of every part.

        In float64 about one of the part's own values, of its first tile: so that must have one that takes part.
        """
        steps = self.steps if mask is None else 1
        chunks = self.chunks(steps)
        kinds = 2 if mask is None else 3
        parts = x.new_empty(kinds, self.examples * chunks, self.channels, dtype=torch.float64)
        _moments_of_parts[self.grid(steps)](x, mask, parts, parts[0].numel(), steps, *self.sizes, **self.options(x))
        return Parts(parts, chunks, steps * self.tile[0], self.positions)

    def normalize(
        self,
        x: Tensor,
        y: Tensor,
        mask: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        numbers: Tensor,
        own: Own,
        residual: Tensor | None = None,
        relu: bool = False,
    ) -> None:
        """Write y from the factors of the statistics."""
        _normalize[self.grid(1)](
            x, y, ready(residual, x), mask, ready(weight), ready(bias), numbers, *own, *self.sizes, RELU=relu,
            **self.options(x, y),
        )  # fmt: skip

    def gradients(
        self, dy: Tensor, y: Tensor | None, x: Tensor, mask: Tensor | None, numbers: Tensor, own: Own
    ) -> Tensor:
        """Sums of dy * xhat and of dy for every part, (2, parts, C) in float64."""
        steps = self.steps
        sums = x.new_empty(2, self.examples * self.chunks(steps), self.channels, dtype=torch.float64)
        _gradients_of_parts[self.grid(steps)](
            dy, y, x, mask, numbers, sums, *own, steps, *self.sizes, sums[0].numel(), **self.options(x, dy)
        )
        return sums

    def dx(
        self,
        dy: Tensor,
        y: Tensor | None,
        x: Tensor,
        mask: Tensor | None,
        weight: Tensor | None,
        numbers: Tensor,
        through: Tensor | None,
        own: Own,
        wanted: Sequence[bool] = (True, False),
    ) -> tuple[Tensor | None, Tensor | None]:
        """dx, and the gradient of the residual, where wanted; without ``through`` statistics are constants."""
        dx, dresidual = (torch.empty_like(x) if want else None for want in wanted)
        if any(wanted):
            _dx[self.grid(1)](
                dy, y, x, mask, ready(weight), numbers, through, dx, dresidual, *own, *self.sizes,
                **self.options(x, dy),
            )  # fmt: skip
        return dx, dresidual


def channels_of(x: Tensor, by_example: bool = True) -> tuple[Tensor, Channels]:
    """The input in an order of memory that the kernels walk through, copied if it has another, and that order.

    If examples need no sums of their own, the positions of all count as one example's where channels lie between them.
    """
    examples, channels, positions = x.shape[0], x.shape[1], math.prod(x.shape[2:])
    planar = positions == 1 or x.is_contiguous() or x.stride(1) != 1
    source = ready(x) if planar else ready(x.movedim(1, -1)).movedim(-1, 1)
    if not by_example and (positions == 1 or not planar):
        return source, Channels(1, channels, examples * positions, False, True)
    return source, Channels(examples, channels, positions, planar)


def mask_of(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """A mask (N) or (N, positions) as one byte for each position of each example."""
    if mask is None:
        return None
    shape = x.shape[0], *x.shape[2:]
    spread = mask if mask.shape == shape else mask.reshape(-1, *[1] * (x.dim() - 2)).expand(shape)
    return ready(spread.contiguous().view(torch.uint8))


def check(x: Tensor, mask: Tensor | None, *of_channels: Tensor | None, **alike: Tensor | None) -> None:
    """What keeps the kernels within their arguments' memory.

    Args:
        x: The input.
        mask: Of its examples or positions.
        *of_channels: Parameters and statistics, (C).
        **alike: Of the shape of x.

    Raises:
        RuntimeError: If a shape or device does not fit.
    """
    if x.dim() < 2:
        raise RuntimeError("normwise: x must have two axes or more.")
    expect(x, x.shape, **alike)
    for t in of_channels:
        expect(x, x.shape[1:2], parameter=t)
    if mask is not None:
        shapes = x.shape[:1], (x.shape[0], *x.shape[2:])
        if mask.shape not in shapes or mask.device != x.device or mask.dtype != torch.bool:
            raise RuntimeError("normwise: a mask must be bool, (N) or (N, positions), on the device of x.")
