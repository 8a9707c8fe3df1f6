"""What the page replays of an experiment's results."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .experiment import CORRECTED

SCHEMA, VERSION = "normwise.lab", 1


def replayed(found: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The claim, its verdict and the measured effects, as the result file states them.

    Args:
        found: A result file's content.
        name: What errors call it.

    Returns:
        Plain data with ``schema``, ``version``, ``name``, ``claim``, ``verdict`` and ``effects``: for each ``label``,
        ``value``, ``low``, ``high`` and ``unit``.

    Raises:
        ValueError: If it is no result, or not complete.
    """
    try:
        title = _text(found["experiment"])
        if "finding" not in found:
            raise ValueError(
                f"recording: {name} must be a complete result; some trials of {title} have not run; "
                f"run normwise lab run {title}."
            )
        finding, verdict = found["finding"], _text(found["verdict"])
        effects = {found["contrast"]["text"]: finding["effect"], **finding["others"]}
        return {
            "schema": SCHEMA,
            "version": VERSION,
            "name": title,
            "claim": _text(found["claim"]),
            "verdict": f"{verdict}: {_text(finding['correction'])}" if verdict == CORRECTED else verdict,
            "effects": [_effect(label, effect) for label, effect in effects.items()],
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"recording: {name} must be a result of normwise lab run; {type(error).__name__} at {error}; run it anew."
        ) from None


def _effect(label: str, effect: Mapping[str, Any]) -> dict[str, Any]:
    numbers = {key: effect[key] for key in ("value", "low", "high")}
    if any(type(value) not in (int, float) or not math.isfinite(value) for value in numbers.values()):
        raise TypeError(f"the numbers of {label!r:.60}")
    return {"label": _text(label), **numbers, "unit": _text(effect["unit"])}


def _text(value: object) -> str:
    if not isinstance(value, str) or len(value) > 10_000:
        raise TypeError("text")
    return value
