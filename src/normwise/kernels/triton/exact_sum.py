"""Sums of float64 that have no order, as `exact_sum.py` and `csrc/exact_sum.h` of this package have them.

A term is split into digits of 32 bits on a fixed grid, each of which is an integer; integers add exactly, so programs
may add theirs in any order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...exact_sum import DIGITS, LOWEST, SLOTS
from .common import EXACT

_DIGITS: tl.constexpr = tl.constexpr(DIGITS)
_SLOTS: tl.constexpr = tl.constexpr(SLOTS)
_LOWEST: tl.constexpr = tl.constexpr(LOWEST)


@triton.jit
def power_of_two(exponent):
    """2 to an integer from -1022 to 1023, in float64."""
    return (tl.cast(exponent + 1023, tl.int64) << 52).to(tl.float64, bitcast=True)


@triton.jit
def exponent_of(value):
    """Of float64 the exponent of the first bit; -1023 for zero and subnormal numbers."""
    return ((value.to(tl.int64, bitcast=True) >> 52) & 0x7FF).to(tl.int32) - 1023


@triton.jit
def two_sum(a, b):
    """A sum and its rounding error."""
    s = a + b
    z = s - a
    return s, (a - (s - z)) + (b - z)


@triton.jit
def _halves(a):
    t = a * 134217729.0  # 2**27 + 1
    top = t - (t - a)
    return top, a - top


@triton.jit
def two_product(a, b):
    """A product and its rounding error."""
    p = a * b
    a1, a2 = _halves(a)
    b1, b2 = _halves(b)
    return p, ((a1 * b1 - p) + a1 * b2 + a2 * b1) + a2 * b2


@triton.jit
def add(a, b, c, d):
    """The sum of two pairs."""
    s, s_rest = two_sum(a, c)
    t, t_rest = two_sum(b, d)
    u, u_rest = two_sum(s, s_rest + t)
    return two_sum(u, u_rest + t_rest)


@triton.jit
def multiply(a, b, c, d):
    """The product of two pairs."""
    p, rest = two_product(a, c)
    return two_sum(p, rest + (a * d + b * c))


@triton.jit
def divide(a, b, c):
    """A pair over a number."""
    q = a / c
    p, rest = two_product(q, c)
    left, _ = add(a, b, -p, -rest)
    return two_sum(q, left / c)


@triton.jit
def deposit(terms, sums, exists):
    """Add the rows of float64 terms (R, W) to W sums, which begin where ``sums`` points: at most 2**20 rows."""
    held = tl.abs(terms) < power_of_two(_LOWEST + 32 * (_DIGITS - 1))
    lost = tl.sum((held == 0).to(tl.int32), 0)
    tl.atomic_add(sums + _DIGITS, lost.to(tl.int64), mask=exists & (lost > 0), sem="relaxed")
    rest = tl.where(held, terms, 0.0)
    place = exponent_of(tl.max(tl.max(tl.abs(rest), 1), 0)) - _LOWEST
    while place >= 0:
        digit = place // 32
        unit = power_of_two(32 * digit + _LOWEST)
        magic = unit * 6755399441055744.0  # 1.5 * 2**52: what is added to it is rounded to units
        whole = (rest + magic) - magic
        rest = rest - whole
        total = (tl.sum(whole, 0) / unit).to(tl.int64)
        tl.atomic_add(sums + digit, total, mask=exists & (total != 0), sem="relaxed")
        place = exponent_of(tl.max(tl.max(tl.abs(rest), 1), 0)) - _LOWEST


@triton.jit
def value(sums, exists):
    """The values of sums as pairs, each good to 2**-100 of itself; not a number where a term was off the grid."""
    carry = tl.zeros(exists.shape, tl.int64)
    hi = tl.zeros(exists.shape, tl.float64)
    lo = hi
    for i in tl.static_range(_DIGITS):
        digit = tl.load(sums + i, mask=exists, other=0) + carry
        carry = (digit + 0x80000000) >> 32  # digits from -2**31: then the first that is not zero outweighs the others
        digit = digit - (carry << 32)
        hi, lo = add(hi, lo, digit.to(tl.float64) * power_of_two(_LOWEST + 32 * i), 0.0)
    hi, lo = add(hi, lo, carry.to(tl.float64) * power_of_two(_LOWEST + 32 * _DIGITS), 0.0)
    off_grid = tl.load(sums + _DIGITS, mask=exists, other=0) > 0
    return tl.where(off_grid, float("nan"), hi), lo


@triton.jit(do_not_specialize=["many"])
def _carry(sums, many, columns, each, BLOCK: tl.constexpr):
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = number < many
    at = sums + number // each * columns + number % each * _SLOTS
    carry = tl.zeros([BLOCK], tl.int64)
    for i in tl.static_range(_DIGITS):
        digit = tl.load(at + i, mask=exists, other=0) + carry
        if i < _DIGITS - 1:
            carry = digit >> 32
            digit = digit & 0xFFFFFFFF
        tl.store(at + i, digit, mask=exists)


def carry(sums: Tensor, each: int) -> None:
    """Bring the digits of sums, ``each`` in a row, below 2**32, so that those of 2**30 processes can be added."""
    many = len(sums) * each
    _carry[(triton.cdiv(many, 128),)](sums, many, sums.shape[1], each, BLOCK=128, num_warps=4, **EXACT)
