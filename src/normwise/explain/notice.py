"""What to notice: each sentence is computed from the batch, most of them by running the norms once more."""

from __future__ import annotations

import torch
from torch import Tensor

from . import notice_batch, notice_modes, notice_samples
from .scene import Notice, Scene
from .trace import Trace

FINDERS = (
    notice_batch.additive,
    notice_batch.thrown_away,
    notice_batch.kept,
    notice_batch.constant,
    notice_batch.one_value,
    notice_samples.neighbour,
    notice_samples.fewer,
    notice_modes.untrained,
    notice_modes.evaluated,
    notice_modes.layer_modes,
    notice_batch.ceiling,
    notice_batch.eps,
)
"""The observations in the order in which they are shown."""


def notices(
    x: Tensor,
    batch_name: str,
    layout: str,
    traces: tuple[Trace, ...],
    cell: tuple[int, ...],
    steps: int,
    momentum: float,
) -> tuple[Notice, ...]:
    """All that can be said about this batch."""
    preset = batch_name in ("worked batch", "broken-symmetry")
    scene = Scene(x, preset, layout, traces, cell, steps, momentum)
    if not torch.isfinite(x).all():
        return tuple(notice_batch.nonfinite(scene))
    wrong = tuple(notice_batch.out_of_range(scene))  # nothing that these numbers say would be true
    return wrong or tuple(notice for find in FINDERS for notice in find(scene))
