"""batch_norm in training and in eval, alone and followed by ReLU: every channel has its own statistics.

The moments of all parts of all channels come first, then the statistics of each channel, then y; backward likewise:
sums of parts, sums of channels, dx. Reproducible sums of parts are joined as integers, which have no order; others in
float64 in an order that the shape of x sets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...exact_sum import SLOTS
from .channels import Channels, Own, Parts, channels_of, check, mask_of, moments_of_part, store_factors
from .common import EXACT, add_blocks, get, joined, laid_out, merged, ready, rounded, wide
from .exact_sum import add, carry, deposit, divide, exponent_of, multiply, power_of_two, two_product, value

MOMENTS, GRADIENTS = 2 * SLOTS + 1, 2 * SLOTS
"""Integers of a channel: two sums, and in the first case a count."""

ROWS, COLUMNS = 64, 16
"""Parts and channels of a tile of what kernels found about parts."""

MOST = 16 * ROWS
"""Parts that one program merges."""

_MOMENTS: tl.constexpr = tl.constexpr(MOMENTS)
_GRADIENTS: tl.constexpr = tl.constexpr(GRADIENTS)
_SLOTS: tl.constexpr = tl.constexpr(SLOTS)


@triton.jit
def _store_statistics(m, v, mean, var, numbers, channel, channels, eps):
    exists = channel < channels
    tl.store(mean + channel, m, mask=exists)
    tl.store(var + channel, v, mask=exists)
    if numbers is not None:
        store_factors(numbers, channel, exists, m, tl.rsqrt(v + eps), channels)


@triton.jit(do_not_specialize=["size", "many", "chunks", "positions", "span"])
def _merge(
    parts, size, many, channels, chunks, span, positions, to, mean, var, numbers, eps: tl.float64,
    ROWS: tl.constexpr, MOST: tl.constexpr, COLUMNS: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    exists = channel < channels
    m = tl.zeros([COLUMNS], tl.float64)
    squares, count = m, m
    first = tl.program_id(0) * MOST
    for begin in range(first, tl.minimum(first + MOST, many), ROWS):
        number = begin + tl.arange(0, ROWS)[:, None]
        inside = (number < many) & exists[None, :]
        means, its_squares, counts = moments_of_part(
            parts, size, number, channel[None, :], inside, channels, chunks, span, positions, COUNTED
        )
        n = tl.sum(counts, 0)
        its_mean, its_squares = merged(means, its_squares, counts, 1.0 / tl.where(n > 0, n, 1.0), 0)
        m, squares, count = joined(m, squares, count, its_mean, its_squares, n)
    if to is not None:
        at = to + tl.program_id(0).to(tl.int64) * channels + channel
        size = tl.num_programs(0).to(tl.int64) * channels
        tl.store(at, m, mask=exists)
        tl.store(at + size, squares, mask=exists)
        tl.store(at + 2 * size, count, mask=exists)
    else:
        _store_statistics(m, squares / tl.where(count > 0, count, 1.0), mean, var, numbers, channel, channels, eps)


@triton.jit(do_not_specialize=["size", "many", "chunks", "positions", "span"])
def _deposit_moments(
    parts, size, many, channels, chunks, span, positions, sums,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    exists = channel < channels
    number = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    inside = (number < many) & exists[None, :]
    mean, squares, count = moments_of_part(
        parts, size, number, channel[None, :], inside, channels, chunks, span, positions, COUNTED
    )
    total, total_rest = two_product(mean, count)
    square, square_rest = two_product(mean, mean)
    square, square_rest = multiply(square, square_rest, count, 0.0)
    square, square_rest = add(square, square_rest, squares, 0.0)
    at = sums + channel.to(tl.int64) * _MOMENTS
    deposit(total, at, exists)
    deposit(total_rest, at, exists)
    deposit(square, at + _SLOTS, exists)
    deposit(square_rest, at + _SLOTS, exists)
    tl.atomic_add(at + 2 * _SLOTS, tl.sum(count, 0).to(tl.int64), mask=exists, sem="relaxed")


@triton.jit
def _statistics_of_sums(sums, mean, var, count, numbers, channels, eps: tl.float64, COLUMNS: tl.constexpr):
    channel = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    exists = channel < channels
    at = sums + channel.to(tl.int64) * _MOMENTS
    number = tl.load(at + 2 * _SLOTS, mask=exists, other=0).to(tl.float64)
    n = tl.where(number > 0, number, 1.0)
    total, total_rest = value(at, exists)
    squares, squares_rest = value(at + _SLOTS, exists)
    m, m_rest = divide(total, total_rest, n)
    product, product_rest = multiply(total, total_rest, m, m_rest)
    m2, _ = add(squares, squares_rest, -product, -product_rest)
    m2 = tl.where(m2 < 0.0, 0.0, m2)  # unlike maximum, keeps NaN
    _store_statistics(m, m2 / n, mean, var, numbers, channel, channels, eps)
    if count is not None:
        tl.store(count + channel, number, mask=exists)


@triton.jit
def _factors(mean, var, numbers, channels, eps: tl.float64, COLUMNS: tl.constexpr):
    channel = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    exists = channel < channels
    m, v = get(mean + channel, exists, tl.float64), get(var + channel, exists, tl.float64)
    store_factors(numbers, channel, exists, m, tl.rsqrt(v + eps), channels)


@triton.jit
def _mantissa_of_rstd(var, channel, exists, eps):
    """What rstd has beside a power of two: the exact sums are of dy * (x - mean) times that power."""
    rstd = tl.rsqrt(get(var + channel, exists, tl.float64) + eps)
    return rstd * power_of_two(-exponent_of(rstd))


@triton.jit(do_not_specialize=["many"])
def _deposit_gradients(
    parts, var, eps: tl.float64, sums, many, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    channel = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    exists = channel < channels
    number = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    inside = (number < many) & exists[None, :]
    part = parts + number * channels + channel[None, :]
    dyxhat = tl.load(part, mask=inside, other=0.0)
    dy = tl.load(part + tl.cast(many, tl.int64) * channels, mask=inside, other=0.0)
    at = sums + channel.to(tl.int64) * _GRADIENTS
    deposit(dy, at, exists)
    deposit(dyxhat / _mantissa_of_rstd(var, channel, exists, eps)[None, :], at + _SLOTS, exists)


@triton.jit(do_not_specialize=["count"])
def _gradients_of_channels(
    totals, sums, var, eps: tl.float64, weight, counts, count, through, dweight, dbias, channels,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    exists = channel < channels
    if sums is None:
        dw = tl.load(totals + channel, mask=exists, other=0.0)
        db = tl.load(totals + channels + channel, mask=exists, other=0.0)
    else:
        at = sums + channel.to(tl.int64) * _GRADIENTS
        db, _ = value(at, exists)
        dw, _ = value(at + _SLOTS, exists)
        dw = dw * _mantissa_of_rstd(var, channel, exists, eps)
        if totals is not None:  # where the grid cannot hold the terms
            other_dw = tl.load(totals + channel, mask=exists, other=0.0)
            other_db = tl.load(totals + channels + channel, mask=exists, other=0.0)
            dw = tl.where((dw == dw) & (tl.abs(other_dw) > power_of_two(-240)), dw, other_dw)
            db = tl.where((db == db) & (tl.abs(other_db) > power_of_two(-240)), db, other_db)
    if dweight is not None:
        tl.store(dweight + channel, rounded(dw, dweight), mask=exists)
    if dbias is not None:
        tl.store(dbias + channel, rounded(db, dbias), mask=exists)
    if through is not None:
        n = tl.load(counts + channel, mask=exists, other=0.0) if counts is not None else tl.cast(count, tl.float64)
        share = 1.0 / tl.where(n > 0, n, 1.0)
        if weight is not None:
            share = share * get(weight + channel, exists, tl.float64)
        tl.store(through + channel, (db * share).to(through.dtype.element_ty), mask=exists)
        tl.store(through + channels + channel, (dw * share).to(through.dtype.element_ty), mask=exists)


OPTIONS: dict[str, Any] = {"COLUMNS": COLUMNS, "num_warps": 4, **EXACT}


def _columns(channels: int) -> int:
    return triton.cdiv(channels, COLUMNS)


def _own(at: Channels) -> Own:
    return Own(at.channels, 0, 1)


class Statistics(NamedTuple):
    """Mean and biased variance of each channel in float64, and the factors that the kernels normalize with."""

    mean: Tensor
    var: Tensor
    numbers: Tensor

    @classmethod
    def empty(cls, x: Tensor, channels: int) -> Statistics:
        """Memory for those of x."""
        mean, var = (x.new_empty(channels, dtype=torch.float64) for _ in range(2))
        return cls(mean, var, x.new_empty(4, channels, dtype=_wide(x)))


def _wide(*tensors: Tensor | None) -> torch.dtype:
    return torch.float64 if wide(*tensors) == tl.float64 else torch.float32


def _given(x: Tensor, mean: Tensor, var: Tensor, eps: float, dtype: torch.dtype) -> Statistics:
    channels = len(mean)
    found = Statistics(ready(mean), ready(var), x.new_empty(4, channels, dtype=dtype))
    _factors[(_columns(channels),)](*found, channels, float(eps), **OPTIONS)
    return found


def _merged(x: Tensor, parts: Parts, eps: float) -> Statistics:
    """Statistics from moments of parts, merged in float64."""
    channels = parts.moments.shape[2]
    found = Statistics.empty(x, channels)
    while True:
        kinds, many, _ = parts.moments.shape
        blocks = triton.cdiv(many, MOST)
        to = None if blocks == 1 else x.new_empty(3, blocks, channels, dtype=torch.float64)
        _merge[(blocks, _columns(channels))](
            *parts.arguments, to, *found, float(eps), ROWS=ROWS, MOST=MOST, COUNTED=kinds == 3, **OPTIONS
        )
        if to is None:
            return found
        parts = Parts(to, 1, 0, 0)


def _sums(x: Tensor, parts: Parts) -> Tensor:
    """The order-free sums of each channel, (C, MOMENTS), from moments of parts."""
    kinds, many, channels = parts.moments.shape
    sums = torch.zeros(channels, MOMENTS, dtype=torch.int64, device=x.device)
    _deposit_moments[(triton.cdiv(many, ROWS), _columns(channels))](
        *parts.arguments, sums, ROWS=ROWS, COUNTED=kinds == 3, **OPTIONS
    )
    return sums


def _of_batch(x: Tensor, parts: Parts, eps: float, reproducible: bool) -> Statistics:
    """Statistics from moments of parts; those in float64 that the grid of exact sums cannot hold are merged."""
    if not reproducible:
        return _merged(x, parts, eps)
    channels = parts.moments.shape[2]
    found, sums = Statistics.empty(x, channels), _sums(x, parts)
    _statistics_of_sums[(_columns(channels),)](
        sums, found.mean, found.var, None, found.numbers, channels, float(eps), **OPTIONS
    )
    if x.dtype != torch.float64:
        return found
    merged, squares = _merged(x, parts, eps), (found.var + found.mean.square()) * sums[:, -1]
    held = squares > 2.0**-240  # not so if not a number
    return Statistics(*(torch.where(held, exact, other) for exact, other in zip(found, merged, strict=True)))


def _check_sums(sums: Tensor, channels: int, columns: int) -> None:
    if sums.shape != (channels, columns) or sums.dtype != torch.int64:
        raise RuntimeError(
            f"normwise: the sums must be int64, ({channels}, {columns}); they are {sums.dtype}, {tuple(sums.shape)}."
        )


def forward(
    x: Tensor,
    running: tuple[Tensor, Tensor] | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    mask: Tensor | None,
    residual: Tensor | None = None,
    reproducible: bool = False,
    relu: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize x with these statistics, or with its own if None; give y, mean and variance.

    Numerics:
        Float32 (float64 for float64) within a tile, float64 for the numbers of a channel; y is rounded once.
    """
    check(x, mask, weight, bias, *(running or ()), residual=residual)
    source, at = channels_of(x, reproducible)
    places = mask_of(mask, x)
    if running is None:
        found = _of_batch(x, at.moments(source, places), eps, reproducible)
    else:
        found = _given(x, *running, eps, _wide(x))
    y = torch.empty_like(source)
    at.normalize(source, y, places, weight, bias, found.numbers, _own(at), residual, relu)
    return laid_out(y, x), found.mean, found.var


def backward(
    dy: Tensor,
    y: Tensor | None,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    training: bool,
    mask: Tensor | None,
    reproducible: bool,
    weight: Tensor | None,
    bias_dtype: torch.dtype | None,
    output_mask: Sequence[bool],
    whole: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Give dx, dweight, dbias and dresidual, each empty where it is not wanted; with a y that of ReLU's input.

    ``whole`` has the order-free sums of the gradients and the counts of a batch of which x is a part, if it is one.

    Numerics:
        Sums of parts are taken in float32 (float64 for float64), those of channels in float64 or exactly.
    """
    check(x, mask, weight, mean, var, dy=dy, y=y)
    source, at = channels_of(x, reproducible)
    places = mask_of(mask, x)
    dy, y, own = ready(dy, source), ready(y, source), _own(at)
    found = _given(x, mean, var, eps, _wide(x, dy))
    through = x.new_empty(2, at.channels, dtype=found.numbers.dtype) if training and output_mask[0] else None
    dweight = None if weight is None or not output_mask[1] else x.new_empty(at.channels, dtype=weight.dtype)
    dbias = None if bias_dtype is None or not output_mask[2] else x.new_empty(at.channels, dtype=bias_dtype)
    if not (through is dweight is dbias is None):
        if whole is None:
            parts = at.gradients(dy, y, source, places, found.numbers, own)
            sums, totals = _sums_of_gradients(parts, found, eps, reproducible)
            counts = None if places is None else places.sum(dtype=torch.float64).expand(at.channels).contiguous()
        else:
            sums, counts, totals = ready(whole[0]), ready(whole[1]), None
        _gradients_of_channels[(_columns(at.channels),)](
            totals, sums, found.var, float(eps), ready(weight), counts, at.examples * at.positions, through, dweight,
            dbias, at.channels, **OPTIONS,
        )  # fmt: skip
    wanted = output_mask[0], output_mask[3]
    dx, dresidual = at.dx(dy, y, source, places, weight, found.numbers, through, own, wanted)
    empty = x.new_empty(0)
    return (
        empty if dx is None else laid_out(dx, x),
        empty if dweight is None else dweight,
        empty if dbias is None else dbias,
        empty if dresidual is None else laid_out(dresidual, x),
    )


def _sums_of_gradients(
    parts: Tensor, found: Statistics, eps: float, reproducible: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Of dy * xhat and dy of each channel the order-free sums, or those in float64; both where the grid may not do."""
    sums = _gradient_sums(parts, found.var, eps) if reproducible else None
    if reproducible and found.numbers.dtype != torch.float64:
        return sums, None
    totals = parts.new_empty(2, parts.shape[2], dtype=torch.float64)
    add_blocks(parts, totals[0], totals[1])
    return sums, totals


def _gradient_sums(parts: Tensor, var: Tensor, eps: float) -> Tensor:
    """The order-free sums of each channel, (C, GRADIENTS), from sums of dy * xhat and dy of parts."""
    _, many, channels = parts.shape
    sums = torch.zeros(channels, GRADIENTS, dtype=torch.int64, device=parts.device)
    _deposit_gradients[(triton.cdiv(many, ROWS), _columns(channels))](
        parts, var, float(eps), sums, many, channels, ROWS=ROWS, **OPTIONS
    )
    return sums


Parameter = Tensor | None
Type = torch.dtype | None
Mask = Sequence[bool]


def batch_norm(
    x: Tensor, running_mean: Tensor, running_var: Tensor, weight: Parameter, bias: Parameter, eps: float,
    mask: Parameter,
) -> Tensor:  # fmt: skip
    """The operator of this name, as all below."""
    return forward(x, (running_mean, running_var), weight, bias, eps, mask)[0]


def batch_norm_forward(
    x: Tensor, weight: Parameter, bias: Parameter, eps: float, mask: Parameter, reproducible: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Give y, mean, var."""
    return forward(x, None, weight, bias, eps, mask, None, reproducible)


def batch_norm_backward(
    dy: Tensor, x: Tensor, mean: Tensor, var: Tensor, eps: float, training: bool, mask: Parameter, reproducible: bool,
    weight: Parameter, bias_dtype: Type, wanted: Mask,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Give dx, dweight, dbias."""
    return backward(dy, None, x, mean, var, eps, training, mask, reproducible, weight, bias_dtype, (*wanted, False))[:3]


def batch_norm_relu(
    x: Tensor, running_mean: Tensor, running_var: Tensor, weight: Parameter, bias: Parameter, eps: float,
    mask: Parameter, residual: Parameter,
) -> Tensor:  # fmt: skip
    """Give y."""
    return forward(x, (running_mean, running_var), weight, bias, eps, mask, residual, relu=True)[0]


def batch_norm_relu_forward(
    x: Tensor, weight: Parameter, bias: Parameter, eps: float, mask: Parameter, residual: Parameter,
    reproducible: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Give y, mean, var."""
    return forward(x, None, weight, bias, eps, mask, residual, reproducible, relu=True)


batch_norm_relu_backward = backward


def batch_norm_sums(x: Tensor, eps: float, mask: Parameter, reproducible: bool) -> Tensor:
    """Give the order-free sums of a part of a batch."""
    check(x, mask)
    source, at = channels_of(x, reproducible)
    sums = _sums(x, at.moments(source, mask_of(mask, x)))
    carry(sums, 2)
    return sums


def batch_norm_moments(sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Give mean, var, count of the whole batch."""
    channels = len(sums)
    _check_sums(sums, channels, MOMENTS)
    mean, var, count = (sums.new_empty(channels, dtype=torch.float64) for _ in range(3))
    _statistics_of_sums[(_columns(channels),)](ready(sums), mean, var, count, None, channels, 0.0, **OPTIONS)
    return mean, var, count


def batch_norm_gradient_sums(
    dy: Tensor, x: Tensor, mean: Tensor, var: Tensor, eps: float, mask: Parameter, reproducible: bool
) -> Tensor:
    """Give the order-free sums of a part of a batch."""
    check(x, mask, mean, var, dy=dy)
    source, at = channels_of(x, reproducible)
    found = _given(x, mean, var, eps, _wide(x, dy))
    parts = at.gradients(ready(dy, source), None, source, mask_of(mask, x), found.numbers, _own(at))
    sums = _gradient_sums(parts, found.var, eps)
    carry(sums, 2)
    return sums


def batch_norm_backward_of_sums(
    dy: Tensor, x: Tensor, mean: Tensor, var: Tensor, eps: float, mask: Parameter, sums: Tensor, count: Tensor,
    weight: Parameter, bias_dtype: Type, wanted: Mask,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Give dx of a part of a batch, dweight and dbias of the whole."""
    check(x, mask, count)
    _check_sums(sums, x.shape[1], GRADIENTS)
    return backward(dy, None, x, mean, var, eps, True, mask, True, weight, bias_dtype, (*wanted, False), (sums, count))[
        :3
    ]
