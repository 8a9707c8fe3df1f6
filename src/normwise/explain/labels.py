"""Words and numbers as the screen writes them."""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..definitions import Pattern

Form = Callable[[float], str]

PREFIX = {"n": "s"}
AXES = {"n": "sample", "c": "channel", "l": "position", "h": "row", "w": "column", "d": "slice", "g": "group"}


def cell_name(layout: str, index: Sequence[int]) -> str:
    """The name of a value: ``s0,f2`` in a table, ``s0,c1,h3,w4`` in an image."""
    return ",".join(f"{axis_prefix(layout, axis)}{i}" for axis, i in zip(layout, index, strict=True))


def axis_prefix(layout: str, axis: str) -> str:
    """The letter before an index: s for samples, f for the features of a table, else the axis's own."""
    return "f" if axis == "c" and layout == "nc" else PREFIX.get(axis, axis)


def axis_word(layout: str, axis: str, count: int = 1) -> str:
    """``sample``, ``features``, ``channels``: the word for an axis, plural unless ``count`` is 1."""
    word = "feature" if axis == "c" and layout == "nc" else AXES.get(axis, axis)
    return word if count == 1 else f"{word}s"


def unit(pattern: Pattern, layout: str) -> str:
    """What keeps statistics of its own: ``feature``, ``sample``, ``position``, ``group of each sample``."""
    kept = [axis for axis in pattern.right if axis != "n"]
    if not kept:
        return "sample" if pattern.right else "batch"
    word = "pixel" if set(kept) == {"h", "w"} else " and ".join(axis_word(layout, axis) for axis in kept)
    tokens = set(kept).issubset("lhwd")
    return word if "n" not in pattern.right or tokens else f"{word} of each sample"


def value(number: float, precision: int = 3) -> str:
    """An output: fixed decimals, or an exponent where these would hide it."""
    number = float(number)
    if not math.isfinite(number):
        return str(number)
    plain = 0.5 * 10**-precision <= abs(number) < 10 ** (8 - precision) or number == 0
    return f"{number + 0.0:.{precision}f}" if plain else f"{number:.{max(precision - 1, 1)}e}"


def short(number: float, precision: int = 3) -> str:
    """A statistic or an input: no more digits than it has, at most ``precision`` after the point."""
    number = float(number)
    if not math.isfinite(number) or number == 0:
        return str(number + 0.0) if number else "0"
    if not 10**-precision <= abs(number) < 1e6:
        return f"{number:.{precision}g}"
    return f"{number:.{precision}f}".rstrip("0").rstrip(".") if number != int(number) else str(int(number))


class _Sentence(string.Formatter):
    """Formats ``{x:y}`` as an output, ``{x:s}`` as a statistic, tuples item by item; ``Y``, ``S``: as a range."""

    def __init__(self, precision: int) -> None:
        self.precision = precision

    def format_field(self, field: Any, spec: str) -> str:
        if isinstance(field, tuple | list):
            return (" to " if spec.isupper() else " ").join(self.format_field(item, spec) for item in field)
        if spec in ("y", "Y", "s", "S"):
            return (value if spec in "yY" else short)(field, self.precision)
        return str(super().format_field(field, spec))


def fill(sentence: str, values: Mapping[str, Any], precision: int) -> str:
    """Put values into a sentence."""
    return _Sentence(precision).vformat(sentence, (), values)


def listed(items: Sequence[str], word: str = "and") -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} {word} {items[-1]}"
