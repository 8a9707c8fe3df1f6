"""What the observations about a batch look at, and what they are: a sentence and the values that fill it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
from torch import Tensor

from . import labels
from .trace import Trace


@dataclass(frozen=True, eq=False)
class Notice:
    """One observation: its kind, a sentence with gaps, and the values that fill them."""

    kind: str
    sentence: str
    values: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", MappingProxyType(dict(self.values)))

    def text(self, precision: int = 3) -> str:
        """The sentence, filled."""
        return labels.fill(self.sentence, self.values, precision)


@dataclass(frozen=True, eq=False)
class Scene:
    """What the observations look at.

    Attributes:
        x: The batch.
        preset: One of the small batches that come along, in which a neighbour is moved rather than left out.
        layout: A letter for each axis.
        traces: One for each norm.
        cell: The index of the pinned value.
        steps: Training steps before eval.
        momentum: Of the running statistics.
    """

    x: Tensor
    preset: bool
    layout: str
    traces: tuple[Trace, ...]
    cell: tuple[int, ...]
    steps: int
    momentum: float

    @property
    def shown(self) -> list[Trace]:
        """The norms that have a result."""
        return [t for t in self.traces if not t.refused]

    @property
    def own(self) -> list[Trace]:
        """The norms that took their statistics from this batch."""
        return [t for t in self.shown if not t.norm.uses_running]

    @property
    def coupled(self) -> list[Trace]:
        """The norms whose statistics come from several samples of this batch."""
        return [t for t in self.own if t.facts.depends_on_other_examples]

    @property
    def separate(self) -> list[Trace]:
        """The others."""
        return [t for t in self.shown if t not in self.coupled]

    def name(self, *index: int) -> str:
        """The name of the value at ``index``."""
        return labels.cell_name(self.layout, index)

    def unit(self, t: Trace) -> str:
        """What keeps statistics of its own."""
        return labels.unit(t.norm.pattern, self.layout)


def spread(values: np.ndarray[Any, Any]) -> tuple[float, ...]:
    """The least and the greatest value, or the one that all share."""
    low, high = float(np.min(values)), float(np.max(values))
    return (low,) if abs(high - low) <= 1e-12 * abs(high) else (low, high)
