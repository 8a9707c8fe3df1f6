"""The properties of the chosen norms as rows of text: derived from their patterns, or observed on the batch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..definitions import DEFINITIONS
from . import labels
from .trace import Trace

if TYPE_CHECKING:
    from .comparison import Comparison

Row = tuple[str, list[str]]


def property_rows(c: Comparison) -> list[Row]:
    """What follows from averaging the batch axis away, or not."""
    example = "(1, " + ", ".join(str(n) for n in c.x.shape[1:]) + ")"
    return [
        ("output depends on the other samples", [_depends(t) for t in c.traces]),
        (f"trains on a single {example} example", [_yes(_trains_alone(t)) for t in c.traces]),
        ("needs running statistics at inference", [_yes(t.facts.needs_running_statistics) for t in c.traces]),
        ("data-parallel must communicate for exactness", [_yes(t.facts.communicates) for t in c.traces]),
    ]


def summary_rows(c: Comparison) -> list[Row]:
    """The summary table; all rows but the last are derived from the pattern."""
    return [
        ("pattern", [str(t.norm.pattern) for t in c.traces]),
        ("normalizes across", [_across(c, t) for t in c.traces]),
        ("depends on the other examples", [_depends(t) for t in c.traces]),
        ("trains on one value per channel", [_yes(t.facts.trains_on_one_value_per_channel) for t in c.traces]),
        ("values per statistic, m", [str(t.facts.values_per_statistic) for t in c.traces]),
        ("relative error of its variance", [_error(t) for t in c.traces]),
        ("needs running statistics at inference", [_yes(t.facts.needs_running_statistics) for t in c.traces]),
        ("communicates in data-parallel training", [_yes(t.facts.communicates) for t in c.traces]),
        ("commonly used in", [d.used_in if (d := DEFINITIONS.get(t.norm.name)) else "" for t in c.traces]),
    ]


def _yes(fact: bool) -> str:
    return "yes" if fact else "no"


def _depends(t: Trace) -> str:
    return "in training" if t.facts.depends_on_other_examples else "never"


def _trains_alone(t: Trace) -> bool:
    """A batch of one has a variance to train on."""
    left = t.norm.pattern.values_per_statistic({**t.sizes, t.norm.pattern.batch: 1})
    return left > 1 or t.facts.trains_on_one_value_per_channel


def _across(c: Comparison, t: Trace) -> str:
    words = [labels.axis_word(c.layout, axis, 2) for axis in t.facts.normalizes_across]
    return labels.listed(words) if words else "nothing"


def _error(t: Trace) -> str:
    error = t.facts.statistic_error
    root = "√(2/(m-1))" if t.norm.centred else "√(2/m)"
    return "no variance" if math.isinf(error) else f"{root} = {error:.1%}"
