"""The formats of files: one reader for each suffix, from bytes to an array or nested lists; nothing is executed."""

from __future__ import annotations

import csv
import io
import json
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from reprlib import repr as brief
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass
class Reading:
    """What is known while one batch is read; ``what`` is what it should be."""

    name: str
    key: str | None = None
    what: str = "a batch of numbers"
    notes: list[str] = field(default_factory=list)
    feature_names: tuple[str, ...] = ()


class Refusal(Exception):
    """A batch cannot be read: what must hold, what came, what to do."""


def printable(text: str) -> str:
    """Text of one line that a terminal can show."""
    return "".join(c if c.isprintable() else " " for c in text)


def decode(data: bytes, suffix: str, reading: Reading) -> object:
    """Read the content of a file with this suffix; empty content is refused."""
    reading.what = f"numbers in the {suffix[1:]} format"
    if not data.strip():
        raise Refusal("must hold at least one sample and one feature; it is empty; give for example [[1, 2], [3, 4]]")
    return READERS[suffix](data, reading)


def _choose(arrays: Mapping[str, Any], reading: Reading) -> Any:
    """The only array, or the one that ``key`` names."""
    names = sorted(arrays)
    key, reading.key = reading.key, None
    if key is None and len(names) == 1:
        key = names[0]
    if key not in names:
        listed = ", ".join(brief(name) for name in names[:8]) + ", ..." * (len(names) > 8)
        asked = "" if key is None else f", none named {brief(key)}"
        advice = "choose one with --key NAME" if names else "save an array in it"
        raise Refusal(
            f"must hold one array, or --key say which; it holds {len(names)}{asked}: {listed or '-'}; {advice}"
        )
    reading.notes.append(f"array {key!r} of {reading.name}")
    return arrays[key]


def _read_json(data: bytes, reading: Reading) -> object:
    value = json.loads(data.decode("utf-8-sig"), parse_int=_number, parse_float=_number)
    if isinstance(value, dict):
        return _choose({name: item for name, item in value.items() if isinstance(item, list)}, reading)
    return value


def _read_csv(data: bytes, reading: Reading) -> object:
    text = io.StringIO(data.decode("utf-8-sig"), newline=None)
    lines = [(number, line.partition("#")[0].rstrip("\n")) for number, line in enumerate(text, 1)]
    lines = [(number, line) for number, line in lines if line.strip()]
    first, head = lines[0] if lines else (0, "")
    delimiter = next((d for d in ";\t," if d in head), " ")
    names = _fields(head, delimiter)
    if lines and not any(_is_number(name.replace(",", ".", 1)) for name in names):
        reading.feature_names = tuple(printable(name) for name in names)
        reading.notes.append(f"header line {brief(head.strip())} skipped")
        lines = lines[1:]
    if not lines:
        raise Refusal("must hold at least one sample and one feature; it has no line of numbers; add one such as 1,2,3")
    try:
        split = None if delimiter == " " else delimiter
        table = np.loadtxt([line for _, line in lines], delimiter=split, comments=None, ndmin=2)
    except ValueError:
        table = None
    if table is None or table.shape[1] != len(names) or np.isinf(table).any():
        return [_row(number, line, delimiter, first, len(names)) for number, line in lines]
    return table


def _row(number: int, line: str, delimiter: str, first: int, width: int) -> list[float]:
    """The numbers of one line, which may be quoted; says in which column something is wrong."""
    fields = _fields(line, delimiter)
    if len(fields) != width:
        raise Refusal(
            f"every line must have as many values; line {number} has {len(fields)}, line {first} has {width}; "
            "make them equal, and write nan where a value is missing"
        )
    for column, text in enumerate(fields, 1):
        if not _is_number(text):
            comma = _is_number(text.replace(",", ".", 1))
            advice = "write 1.5, not 1,5: a decimal comma is not read" if comma else "correct it, or write nan"
            came = f"line {number}, column {column} is {brief(text) if text else 'empty'}"
            raise Refusal(f"every value must be a number; {came}; {advice}")
    return [_number(text) for text in fields]


def _fields(line: str, delimiter: str) -> list[str]:
    reader = csv.reader([line.strip(" ")], delimiter=delimiter, skipinitialspace=True)
    return [text.strip() for fields in reader for text in fields]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return "_" not in text


def _number(text: str) -> float:
    value = float(text)
    if math.isinf(value) and any(c.isdigit() for c in text):
        raise Refusal(f"every number must fit float64; {brief(text)} does not; scale the values")
    return value


def _read_numpy(data: bytes, reading: Reading) -> object:
    loaded = np.load(io.BytesIO(data), allow_pickle=False)
    return _choose(loaded, reading) if isinstance(loaded, Mapping) else loaded


def _read_safetensors(data: bytes, reading: Reading) -> object:
    from safetensors.torch import load

    return _choose(load(data), reading)


def _read_torch(data: bytes, reading: Reading) -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is wrong becomes one sentence
        loaded = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    if isinstance(loaded, Mapping):
        return _choose({str(name): item for name, item in loaded.items() if isinstance(item, Tensor)}, reading)
    if not isinstance(loaded, Tensor):
        raise Refusal(f"must be a tensor or a dict of tensors; it is a {type(loaded).__name__}; save the tensor alone")
    return loaded


READERS: dict[str, Callable[[bytes, Reading], object]] = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".txt": _read_csv,
    ".json": _read_json,
    ".npy": _read_numpy,
    ".npz": _read_numpy,
    ".safetensors": _read_safetensors,
    ".pt": _read_torch,
    ".pth": _read_torch,
}
