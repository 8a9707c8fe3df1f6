"""Sums that have no order: integers on a fixed grid, which add exactly whatever their number and sequence.

A term, a float64, is laid down in 32-bit digits, each held in an int64; sums are merged by adding them. The grid, that
of `csrc/exact_sum.h`, starts at 2^-352, below the square of the smallest float32; the slot after the digits counts the
terms that it cannot hold.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOWEST, DIGITS = -352, 21
SLOTS = DIGITS + 1

Pair = tuple[Tensor, Tensor]
"""Two float64 whose exact sum stands for more digits than one has."""


def exact_sum(terms: Tensor) -> Tensor:
    """Add up the rows of float64 ``terms`` (K, C): the sums, (C, SLOTS) in int64."""
    fraction, exponent = torch.frexp(terms)
    finite = torch.isfinite(terms)
    mantissa = (torch.where(finite, fraction, 0.0) * 2.0**53).to(torch.int64)
    place = exponent.to(torch.int64) - 53 - LOWEST
    mantissa = torch.where(place < 0, mantissa >> (-place).clamp(0, 63), mantissa)  # below the grid
    place = place.clamp(min=0)
    held = finite & (exponent <= LOWEST + 32 * (DIGITS - 1))
    mantissa, place = torch.where(held, mantissa, 0), torch.where(held, place, 0)
    low, shift = mantissa & 0xFFFFFFFF, place & 31
    high = ((mantissa >> 32) << shift) + ((low << shift) >> 32)
    sums = torch.zeros(terms.shape[1], SLOTS, dtype=torch.int64, device=terms.device)
    for i, digit in enumerate(((low << shift) & 0xFFFFFFFF, high & 0xFFFFFFFF, high >> 32)):
        sums.scatter_add_(1, ((place >> 5) + i).T, digit.T)
    sums[:, DIGITS] += (~held).sum(0)
    return sums


def carried(sums: Tensor) -> Tensor:
    """The same sums with digits below 2^32, so that those of 2^30 processes can be added."""
    digits = list(sums.unbind(1))
    for i in range(DIGITS - 1):
        digits[i + 1], digits[i] = digits[i + 1] + (digits[i] >> 32), digits[i] & 0xFFFFFFFF
    return torch.stack(digits, 1)


def value(sums: Tensor) -> Pair:
    """The values of sums (C, SLOTS), each good to 2^-100 of itself; not a number where a term was off the grid."""
    digits = _non_negative(sums)
    negative = digits[DIGITS] < 0
    digits = torch.where(negative, _non_negative(-sums), digits)
    total = torch.zeros(len(sums), dtype=torch.float64, device=sums.device), digits[0] * 0.0
    for i in reversed(range(DIGITS)):
        term = torch.ldexp(digits[i].double(), torch.tensor(LOWEST + 32 * i, device=sums.device))
        total = add(total, (term, torch.zeros_like(term)))
    sign = torch.where(negative, -1.0, 1.0)
    off_grid = torch.where(sums[:, DIGITS] > 0, torch.nan, 0.0)
    return total[0] * sign + off_grid, total[1] * sign


def _non_negative(sums: Tensor) -> Tensor:
    """Digits from 0 to 2^32 - 1, and after them what is left over: -1 for a negative sum."""
    digits, carry = [], torch.zeros_like(sums[:, 0])
    for digit in sums[:, :DIGITS].unbind(1):
        digits.append(((digit & 0xFFFFFFFF) + (carry & 0xFFFFFFFF)) & 0xFFFFFFFF)
        carry = (digit >> 32) + (carry >> 32) + (((digit & 0xFFFFFFFF) + (carry & 0xFFFFFFFF)) >> 32)
    return torch.stack([*digits, carry])


def two_sum(a: Tensor, b: Tensor) -> Pair:
    """A + b and its rounding error."""
    s = a + b
    z = s - a
    return s, (a - (s - z)) + (b - z)


def two_product(a: Tensor, b: Tensor) -> Pair:
    """A * b and its rounding error, by splitting both in halves."""

    def halves(x: Tensor) -> Pair:
        t = x * 134217729.0
        top = t - (t - x)
        return top, x - top

    p, (a1, a2), (b1, b2) = a * b, halves(a), halves(b)
    return p, ((a1 * b1 - p) + a1 * b2 + a2 * b1) + a2 * b2


def add(a: Pair, b: Pair) -> Pair:
    """The sum of two pairs."""
    s, t = two_sum(a[0], b[0]), two_sum(a[1], b[1])
    u = two_sum(s[0], s[1] + t[0])
    return two_sum(u[0], u[1] + t[1])


def multiply(a: Pair, b: Pair) -> Pair:
    """The product of two pairs."""
    p = two_product(a[0], b[0])
    return two_sum(p[0], p[1] + (a[0] * b[1] + a[1] * b[0]))


def divide(a: Pair, b: Tensor) -> Pair:
    """A pair over a number."""
    q = a[0] / b
    product = two_product(q, b)
    rest = add(a, (-product[0], -product[1]))
    return two_sum(q, rest[0] / b)
