"""The properties of the chosen norms as rows of text: derived from their patterns."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..definitions import DEFINITIONS
from . import labels
from .trace import Trace

if TYPE_CHECKING:
    from .comparison import Comparison

Row = tuple[str, list[str]]
Rows = tuple[list[str], list[Row]]


def property_rows(c: Comparison) -> Rows:
    """The titles, and what follows from averaging the batch axis away or not."""
    found = _once(c)
    example = "(1, " + ", ".join(str(n) for n in c.x.shape[1:]) + ")"
    return _titles(found), [
        ("output depends on the other samples", [_depends(t) for t in found]),
        (f"trains on a single {example} example", [_yes(_trains_alone(c, t)) for t in found]),
        ("needs running statistics at inference", [_running(t) for t in found]),
        ("data-parallel must communicate for exactness", [_yes(t.facts.communicates) for t in found]),
    ]


def summary_rows(c: Comparison) -> Rows:
    """The titles and the summary table; all rows but the last are derived from the pattern."""
    found = _once(c)
    root = "√(2/(m-1))" if any(t.norm.centred for t in found) else "√(2/m)"
    return _titles(found), [
        ("pattern", [str(t.norm.pattern) for t in found]),
        ("normalizes across", [labels.averaged(t.norm.pattern, c.layout) for t in found]),
        ("depends on the other examples", [_depends(t) for t in found]),
        ("trains on one value per channel", [_yes(t.facts.trains_on_one_value_per_channel) for t in found]),
        ("values per statistic, m", [str(t.facts.values_per_statistic) for t in found]),
        (f"its relative error, {root}", [_error(t, root) for t in found]),
        ("needs running statistics at inference", [_running(t) for t in found]),
        ("communicates in data-parallel training", [_yes(t.facts.communicates) for t in found]),
        ("commonly used in", [d.used_in if (d := DEFINITIONS.get(t.norm.name)) else "" for t in found]),
    ]


def _once(c: Comparison) -> list[Trace]:
    """A layer that is shown in training and in eval counts once."""
    return [
        t
        for i, t in enumerate(c.traces)
        if not (i and t.norm.uses_running and c.traces[i - 1].norm.running is t.norm.running)
    ]


def _titles(found: list[Trace]) -> list[str]:
    return [t.norm.title.removesuffix(" (train)") for t in found]


def _yes(fact: bool) -> str:
    return "yes" if fact else "no"


def _depends(t: Trace) -> str:
    return "in training" if t.facts.depends_on_other_examples else "never"


def _running(t: Trace) -> str:
    """A layer may keep what its norm does not need."""
    kept = t.norm.running is not None and t.norm.running.steps is None and not t.facts.needs_running_statistics
    return "no, but uses them" if kept else _yes(t.facts.needs_running_statistics)


def _trains_alone(c: Comparison, t: Trace) -> bool:
    """A batch of one has a variance to train on, or needs none."""
    sizes = {**t.sizes, t.norm.pattern.batch: 1}
    many = t.norm.pattern.values_per_statistic(sizes) > 1
    return many or (t.facts.trains_on_one_value_per_channel and t.norm.name != "group_norm")


def _error(t: Trace, root: str) -> str:
    own = "√(2/(m-1))" if t.norm.centred else "√(2/m)"
    if math.isinf(t.facts.statistic_error):
        return "no variance"
    return f"{t.facts.statistic_error:.1%}" + ("" if own == root else f", {own}")
