"""update_running_: running statistics move towards those of a batch, in place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import EXACT, expect, get, ready, rounded

ROWS, COLUMNS = 64, 16
"""Rows of statistics and channels of a tile."""


@triton.jit(do_not_specialize=["rows", "count"])
def _update_running(
    running_mean, running_var, tracked, mean, var, valid, total, rows, channels, mean_stride, var_stride, count,
    momentum: tl.float64, limit: tl.float64, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    exists = channel < channels
    sum_of_means = tl.zeros([COLUMNS], tl.float64)
    sum_of_vars, with_mean, with_var = sum_of_means, sum_of_means, sum_of_means
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & exists[None, :]
        n = tl.zeros([ROWS, COLUMNS], tl.float64)
        if total is not None:
            n += get(total + channel, exists, tl.float64)[None, :]
        elif valid is not None:
            n += tl.load(valid + row, mask=row < rows, other=0.0)[:, None]
        else:
            n += count
        at = row.to(tl.int64)[:, None] * channels + channel[None, :]
        has_mean, has_var = inside & (n > 0), inside & (n > 1)
        sum_of_means += tl.sum(tl.load(mean + at, mask=has_mean, other=0.0), 0)
        unbiased = n / tl.where(n > 1, n - 1, 1.0)
        sum_of_vars += tl.sum(tl.load(var + at, mask=has_var, other=0.0) * unbiased, 0)
        with_mean += tl.sum(has_mean.to(tl.int32), 0).to(tl.float64)
        with_var += tl.sum(has_var.to(tl.int32), 0).to(tl.float64)
    if tracked is not None:
        momentum = 1.0 / tl.load(tracked).to(tl.float64)
    average = sum_of_means / tl.where(with_mean > 0, with_mean, 1.0)
    to = running_mean + channel.to(tl.int64) * mean_stride
    moved = (1.0 - momentum) * get(to, exists, tl.float64) + momentum * tl.where(average > limit, limit, average)
    tl.store(to, rounded(moved, running_mean), mask=exists & (with_mean > 0))
    average = sum_of_vars / tl.where(with_var > 0, with_var, 1.0)
    to = running_var + channel.to(tl.int64) * var_stride
    moved = (1.0 - momentum) * get(to, exists, tl.float64) + momentum * tl.where(average > limit, limit, average)
    tl.store(to, rounded(moved, running_var), mask=exists & (with_var > 0))


def update_running_(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    mean: Tensor,
    var: Tensor,
    count: int,
    momentum: float | None,
    mask: Tensor | None,
    total: Tensor | None = None,
) -> None:
    """Change the running statistics in place."""
    channels = running_mean.numel()
    rows = mean.numel() // channels
    expect(running_mean, (channels,), running_mean=running_mean, running_var=running_var, total=total)
    expect(running_mean, (channels,) if mean.dim() == 1 else (rows, channels), mean=mean, var=var)
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    tracked = num_batches_tracked if momentum is None else None
    valid = None if mask is None else mask.reshape(rows, mask.numel() // max(rows, 1)).double().mean(1) * count
    _update_running[(triton.cdiv(channels, COLUMNS),)](
        running_mean, running_var, tracked, ready(mean), ready(var), valid, ready(total), rows, channels,
        running_mean.stride(0), running_var.stride(0), count, float(momentum or 0.0),
        torch.finfo(running_var.dtype).max, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4, **EXACT,
    )  # fmt: skip
