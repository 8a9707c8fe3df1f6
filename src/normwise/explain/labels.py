"""Words and numbers as the screen writes them."""

from __future__ import annotations

import math
import re
import string
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from ..definitions import Pattern

AXES = {"n": "sample", "c": "channel", "l": "position", "h": "row", "w": "column", "d": "slice", "g": "group"}
COUNTS = ("", "", "both", *(f"all {n}" for n in ("three", "four", "five", "six", "seven", "eight", "nine")))
TIE = "\u00a0"  # a space at which no line breaks; the screen shows a plain one


def cell_name(layout: str, index: Sequence[int]) -> str:
    """The name of a value: ``s0,f2`` in a table, ``s0,c1,h3,w4`` in an image."""
    return ",".join(f"{axis_prefix(layout, axis)}{i}" for axis, i in zip(layout, index, strict=True))


def axis_prefix(layout: str, axis: str) -> str:
    """The letter before an index: s for samples, f for the features of a table, else the axis's own."""
    return "f" if axis == "c" and layout == "nc" else {"n": "s"}.get(axis, axis)


def axis_word(layout: str, axis: str, count: int = 1) -> str:
    """``sample``, ``features``, ``channels``: the word for an axis, plural unless ``count`` is 1."""
    word = "feature" if axis == "c" and layout == "nc" else AXES.get(axis, axis)
    return word if count == 1 else f"{word}s"


def letters(pattern: Pattern, layout: str) -> dict[str, str]:
    """The layout's letter for each axis of a pattern, whatever the pattern calls it; a part of a split axis is itself.

    Of ``n (g c) h w`` it is n, g, c of a group, h and w.
    """
    found: dict[str, str] = {}
    for item, letter in zip(pattern.left, layout, strict=True):
        found.update({name: letter if len(item) == 1 else name for name in item})
    return found


def averaged(pattern: Pattern, layout: str) -> str:
    """What is averaged away: ``samples, rows and columns``; ``channels of a group``."""
    words = [
        axis_word(layout, letter, 2) + (" of a group" if len(item) > 1 and set(item) & set(pattern.right) else "")
        for item, letter in zip(pattern.left, layout, strict=True)
        if not set(item) <= set(pattern.right)
    ]
    return listed(words) if words else "nothing"


def unit(pattern: Pattern, layout: str) -> str:
    """What keeps statistics of its own: ``feature``, ``sample``, ``group of each sample``; ``batch`` if nothing."""
    names = letters(pattern, layout)
    kept = [names[name] for name in pattern.right]
    within = [axis for axis in kept if axis != "n"]
    if not within:
        return "sample" if kept else "batch"
    positions = set(layout) - set("nc")
    if set(within) == positions:
        word = "pixel" if positions == set("hw") else "position"
    else:
        word = listed([axis_word(layout, axis) for axis in within])
    return f"{word} of each sample" if "n" in kept else word


def each(unit: str) -> str:
    """``each feature``, ``the batch``."""
    return "the batch" if unit == "batch" else f"each {unit}"


def plural(unit: str) -> str:
    """``features``, ``groups of each sample``."""
    first, *rest = unit.split(" ", 1)
    return " ".join([f"{first}{'es' if first == 'batch' else 's'}", *rest])


def in_all(count: int) -> str:
    """``in all three``; nothing for one."""
    return "" if count == 1 else f" in {COUNTS[count] if count < len(COUNTS) else f'all {count}'}"


def tied(text: str) -> str:
    """A text that no line break may divide, such as a command to copy; :func:`wrap` unties it."""
    return text.replace(" ", TIE)


def untied(text: str) -> str:
    """Plain spaces again, once lines are broken."""
    return text.replace(TIE, " ")


def wrap(text: str, width: int, first: str = "", rest: str = "") -> list[str]:
    """Lines of at most ``width``, broken at spaces, that begin with ``first`` and then with ``rest``."""
    lines = textwrap.wrap(text, width, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)
    return [untied(line) for line in lines]


def value(number: float, precision: int = 3) -> str:
    """An output: fixed decimals, or an exponent where these would hide it."""
    number = float(number)
    if not math.isfinite(number):
        return str(number)
    plain = 0.5 * 10**-precision <= abs(number) < 1e5 or number == 0
    return f"{number + 0.0:.{precision}f}" if plain else tidy(f"{number:.{max(precision - 1, 1)}e}")


def short(number: float, precision: int = 3) -> str:
    """A statistic or an input: no more digits than it has, at most ``precision`` after the point."""
    number = float(number)
    if not math.isfinite(number) or number == 0:
        return str(number + 0.0) if number else "0"
    if not 10**-precision <= abs(number) < 1e6:
        return tidy(f"{number:.{precision}g}")
    return f"{number:.{precision}f}".rstrip("0").rstrip(".") if number != int(number) else str(int(number))


def column(numbers: Sequence[float], precision: int = 3) -> list[str]:
    """Inputs as :func:`short` writes them, all with the decimals of the one that has most."""
    texts = [short(number, precision) for number in numbers]
    if any("e" in text for text in texts):
        return texts
    decimals = max((len(text.partition(".")[2]) for text in texts), default=0)
    return [f"{n + 0.0:.{decimals}f}" if math.isfinite(n) else str(n) for n in map(float, numbers)]


def tidy(text: str) -> str:
    """``1e-5`` for ``1e-05``."""
    return re.sub(r"e([+-])0(?=\d)", r"e\1", text)


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
