"""What the norms of a training run saw, step by step, as data: written, read and shown."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from .. import files
from . import as_json, html, labels, page
from .trace import Array

SCHEMA, VERSION = "normwise.recording", 1
LARGEST = 64_000_000  # bytes of a file that is read
OF_CHANNELS = ("mean", "var", "running_mean", "running_var")
OF_GROUPS = ("mean", "var", "mean_spread", "var_spread")
QUANTITIES = tuple(dict.fromkeys(OF_CHANNELS + OF_GROUPS))


@dataclass(eq=False)
class Layer:
    """What one norm saw.

    Attributes:
        name: Its place in the model, ``""`` for the model itself.
        kind: Its class.
        channels: Of a Batch Norm those that are recorded; of others a single 0, which stands for all they normalize.
        quantities: What is recorded, of ``mean``, ``var``, ``running_mean``, ``running_var``, ``mean_spread`` and
            ``var_spread``.
        rows: For each step an array (quantities, channels), float64; None where the layer was not called.
    """

    name: str
    kind: str
    channels: tuple[int, ...] = (0,)
    quantities: tuple[str, ...] = OF_GROUPS
    rows: list[Array | None] = field(default_factory=list)

    def of(self, quantity: str) -> Array | None:
        """A quantity (steps, channels), nan where the layer was not called; None if it has none."""
        if quantity not in self.quantities:
            return None
        absent, i = np.full(len(self.channels), np.nan), self.quantities.index(quantity)
        return np.array([absent if row is None else row[i] for row in self.rows]).reshape(-1, len(self.channels))


class Recording:
    """Statistics of a training run: print it, or use ``to_json``, ``to_html``, ``save``; notebooks show it.

    Attributes:
        model: The class of the model.
        steps: The training steps that are recorded, counted from 0.
        layers: What each norm saw in them.

    Example:
        >>> Recording("Net", [0, 1], [])
        recording of Net: 2 steps, 0 to 1, of 0 norms
    """

    def __init__(self, model: str, steps: Sequence[int], layers: Sequence[Layer]) -> None:
        self.model, self.steps, self.layers = model, list(steps), list(layers)

    def to_data(self) -> dict[str, Any]:
        """What JSON can hold: nan and infinities are strings, a quantity that a layer lacks is null."""
        called = [layer for layer in self.layers if any(row is not None for row in layer.rows)]
        data = {
            "schema": SCHEMA,
            "version": VERSION,
            "model": self.model,
            "steps": self.steps,
            "layers": [
                {"name": at.name, "kind": at.kind, "channels": at.channels, **{q: at.of(q) for q in QUANTITIES}}
                for at in called
            ],
        }
        plain: dict[str, Any] = as_json.plain(data)
        return plain

    def to_json(self) -> str:
        """As JSON; ``schema`` and ``version`` name its form."""
        return json.dumps(self.to_data(), allow_nan=False)

    def to_html(self) -> str:
        """One self-contained page that replays it; it embeds the recording."""
        static = f"{html.styled(self._table())}{page.embeds('a recording')}"
        return page.document(f"recording of {self.model}", static, "null", self.to_data())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON, whole or not at all; :func:`load_recording` reads it.

        Raises:
            ValueError: If the file cannot be written.
        """
        try:
            files.write(Path(path), f"{self.to_json()}\n".encode())
        except OSError as error:
            raise ValueError(f"recording: {path} must be writable; {error.strerror}; choose another path.") from None

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        shown = page.in_notebook(self.to_html(), html.styled(self._table()), f"normwise: recording of {self.model}")
        return {"text/plain": str(self), "text/html": shown}

    def _table(self) -> str:
        """Where each layer's mean and variance began and ended, over all recorded channels."""
        rows = []
        for layer in self.layers:
            seen = [row for row in layer.rows if row is not None]
            for i, quantity in enumerate(layer.quantities[:2] if seen else ()):
                first, last = (labels.short(float(row[i].mean()), 6) for row in (seen[0], seen[-1]))
                rows.append((f"{layer.name or 'the model itself'}, {quantity}", [layer.kind, first, last]))
        return f"<h1>{escape(str(self))}</h1>{html.words(('layer', 'first', 'last'), rows)}"

    def __str__(self) -> str:
        span = f", {self.steps[0]} to {self.steps[-1]}," if self.steps else ""
        count, norms = len(self.steps), len(self.layers)
        return (
            f"recording of {self.model}: {count} step{'' if count == 1 else 's'}{span} "
            f"of {norms} norm{'' if norms == 1 else 's'}"
        )

    __repr__ = __str__


def load_recording(path: str | os.PathLike[str]) -> Recording:
    """Read what :meth:`Recording.save` wrote.

    Args:
        path: The file.

    Returns:
        The recording.

    Raises:
        ValueError: If it cannot be read, is larger than 64 MB, or is something else; in one sentence.
    """
    return parse(read(path), str(path))


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: If there is none.
    """
    try:
        with open(path, "rb") as file:
            text = file.read(LARGEST + 1)
    except OSError as error:
        raise ValueError(f"recording: {path} must be readable; {error.strerror}; check the path.") from None
    if len(text) > LARGEST:
        raise ValueError(f"recording: {path} must be of at most {LARGEST} bytes; it is larger; record fewer steps.")
    try:
        found = json.loads(text.decode("utf-8-sig"), parse_constant=_no_json)
    except (ValueError, RecursionError):
        raise ValueError(f"recording: {path} must be JSON; it is not; write it with recording.save(path).") from None
    if not isinstance(found, dict):
        raise ValueError(f"recording: {path} must hold an object; it holds a {type(found).__name__}; {INSTEAD}.")
    return found


INSTEAD = "give one that recording.save(path) wrote"


def parse(data: Mapping[str, Any], name: str) -> Recording:
    """The recording in this data.

    Raises:
        ValueError: If it is none.
    """
    if data.get("schema") != SCHEMA or data.get("version") != VERSION:
        was = f"{data.get('schema')!r:.40} version {data.get('version')!r:.40}"
        raise ValueError(f"recording: {name} must be {SCHEMA} version {VERSION}; it is {was}; {INSTEAD}.")
    try:
        steps = data["steps"]
        if not _whole(steps) or steps != sorted(set(steps)):
            raise _Wrong("steps")
        return Recording(_text(data["model"], "model"), steps, [_layer(layer, len(steps)) for layer in data["layers"]])
    except (_Wrong, KeyError, TypeError) as error:
        what = str(error) if isinstance(error, _Wrong) else f"its form ({type(error).__name__}: {error})"
        raise ValueError(f"recording: {name} must be whole; {what} is not as it was written; {INSTEAD}.") from None


class _Wrong(Exception):
    """What part of a file is wrong."""


def _layer(data: Mapping[str, Any], steps: int) -> Layer:
    name, kind, channels = _text(data["name"], "name"), _text(data["kind"], "kind"), data["channels"]
    if not _whole(channels) or not channels:
        raise _Wrong(f"channels of {name!r:.40}")
    quantities = tuple(q for q in QUANTITIES if data[q] is not None)
    if quantities not in (OF_CHANNELS, OF_CHANNELS[:2], OF_GROUPS):
        raise _Wrong(f"the choice of quantities of {name!r:.40}")
    found = [_numbers(data[q], (steps, len(channels)), f"{q} of {name!r:.40}") for q in quantities]
    rows = np.stack(found, 1)  # (steps, quantities, channels)
    return Layer(name, kind, tuple(channels), quantities, [None if np.isnan(row).all() else row for row in rows])


def _numbers(data: Any, shape: tuple[int, int], what: str) -> Array:
    """A matrix of this shape; only nan and infinities may be strings."""
    fits = isinstance(data, list) and len(data) == shape[0]
    if not fits or any(not isinstance(row, list) or len(row) != shape[1] for row in data):
        raise _Wrong(what)
    for value in (value for row in data for value in row):
        number = type(value) in (int, float) and abs(value) <= sys.float_info.max
        if not number and value not in ("NaN", "Infinity", "-Infinity"):
            raise _Wrong(what)
    return np.array(data, dtype=np.float64).reshape(shape)


def _whole(data: Any) -> bool:
    return isinstance(data, list) and all(type(value) is int and 0 <= value < 2**53 for value in data)


def _text(data: Any, what: str) -> str:
    if not isinstance(data, str) or len(data) > 1000:
        raise _Wrong(what)
    return data


def _no_json(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
