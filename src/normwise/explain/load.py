"""Reading a batch of numbers from whatever there is: a literal, a file, standard input, a batch built in, an array.

Each suffix has one reader, from bytes to an array. The rules about type, shape and finiteness stand once, behind
:func:`as_batch`; every failure becomes one sentence in :func:`_sentence`. Nothing in a file is ever executed.
"""

from __future__ import annotations

import difflib
import importlib
import json
import os
import pickle
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from reprlib import repr as brief
from typing import Any, BinaryIO, TextIO

import numpy as np
import torch
from torch import Tensor

from .formats import READERS, Reading, Refusal, decode, printable

WORKED = [[2.0, 4.0, 6.0], [3.0, 5.0, 7.0], [1.0, 3.0, 5.0], [4.0, 6.0, 8.0]]


PRESETS = {
    "worked": ("worked batch", WORKED),
    "broken-symmetry": ("broken-symmetry", [*WORKED[:3], [4.0, 6.0, 14.0]]),
}


FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


INTEGERS = {getattr(torch, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)}


SENTENCES = {
    MemoryError: "must fit in memory; it asks for more than there is, or is damaged; give fewer samples",
    RecursionError: "must be nested a few brackets deep; it goes deeper than can be read; close them earlier",
}


@dataclass(frozen=True)
class Batch:
    """A batch of numbers and where it came from.

    Attributes:
        values: Floating point, two dimensions or more, on the CPU, detached; the first axis is the samples.
        name: What the screen calls it: ``"worked batch"``, ``"literal"``, ``"stdin"``, ``"acts.npy"``.
        notes: What was decided while reading, one sentence each.
        feature_names: The header of a CSV file, if it has one.
    """

    values: Tensor
    name: str
    notes: tuple[str, ...]
    feature_names: tuple[str, ...] = ()


def load_batch(
    source: str | os.PathLike[str] | None = None,
    *,
    preset: str | None = None,
    dtype: torch.dtype | None = None,
    allow_nonfinite: bool = False,
    key: str | None = None,
    stdin: TextIO | BinaryIO | None = None,
) -> Batch:
    """Read a batch.

    Args:
        source: A literal ``"[[2, 4, 6], [3, 5, 7]]"``, the path of a file, ``"-"`` for standard input (JSON or CSV),
            ``"digits"`` for 8 images of scikit-learn's digits, or None for the preset.
        preset: ``"worked"`` (the default) or ``"broken-symmetry"``, instead of a source.
        dtype: The floating-point type to convert to; None keeps that of the file, and float64 for text.
        allow_nonfinite: Whether NaN and inf may pass.
        key: Which array of a file that holds several.
        stdin: What ``"-"`` reads instead of standard input.

    Returns:
        The batch. One dimension is read as one sample, integers as float64; ``notes`` says so.

    Raises:
        ValueError: If there is no such batch, or it cannot be read; always this type and always one sentence.

    Example:
        >>> load_batch("[2, 4, 6]").notes
        ('read as one sample of 3 features',)
    """
    reading = Reading("batch", key)
    with _one_sentence(reading):
        raw = _read(None if source is None else os.fspath(source), preset, stdin, reading)
        if reading.key is not None:
            raise Refusal(f"--key {brief(key)} must choose among named arrays; it holds one without a name; drop --key")
        return _batch(raw, dtype, allow_nonfinite, reading)


def as_batch(
    x: object,
    name: str,
    notes: Sequence[str] = (),
    dtype: torch.dtype | None = None,
    allow_nonfinite: bool = False,
    feature_names: Sequence[str] = (),
) -> Batch:
    """Make a batch of a tensor, an array or nested lists, under the rules of :func:`load_batch`.

    Raises:
        ValueError: If it breaks one of them, in one sentence.
    """
    reading = Reading(name, notes=list(notes), feature_names=tuple(feature_names))
    with _one_sentence(reading):
        return _batch(x, dtype, allow_nonfinite, reading)


@contextmanager
def _one_sentence(reading: Reading) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        cause = None if isinstance(error, Refusal) else error
        raise ValueError(printable(f"{reading.name}: {_sentence(error, reading.what)}.")) from cause


def _sentence(error: Exception, what: str) -> str:
    """What must hold, what came and what to do, for any exception of ours or of a library."""
    if isinstance(error, Refusal):
        return str(error)
    if isinstance(error, json.JSONDecodeError):
        return f"must be {what}; {error.msg} at line {error.lineno}, column {error.colno}; correct it there"
    if isinstance(error, (UnicodeDecodeError, UnicodeEncodeError)):
        return f"must be UTF-8 text; it is not at position {error.start}; save it as UTF-8"
    for kind, sentence in SENTENCES.items():
        if isinstance(error, kind):
            return sentence
    if isinstance(error, OSError):
        return f"must be readable; {error.strerror or 'reading failed'}; check the path and its permissions"
    if isinstance(error, pickle.UnpicklingError) or "pickle" in str(error):
        return f"must be {what}; it holds Python objects or is damaged, and nothing in it was run; save numbers alone"
    return f"must be {what}; it is damaged, cut short or something else; write it again"


def _read(source: str | None, preset: str | None, stdin: TextIO | BinaryIO | None, reading: Reading) -> object:
    """What was asked for, not yet checked; names it in ``reading``."""
    if source is None:
        if preset is not None and preset not in PRESETS:
            raise Refusal(f"the preset must be one of {', '.join(PRESETS)}; got {brief(preset)}; choose one of them")
        reading.name, rows = PRESETS[preset or "worked"]
        return rows
    if preset is not None:
        raise Refusal(f"must be a source or a preset; got both, {brief(source)} and {brief(preset)}; drop one")
    if not source:
        raise Refusal("must be a file, '-', digits or [[1, 2], [3, 4]]; it is empty; leave it out for the worked batch")
    if source.strip().startswith("["):
        reading.name = "literal"
        return decode(source.encode(), ".json", reading)
    if source == "digits":
        reading.name = source
        return _digits()
    if source == "-":
        reading.name = "stdin"
        stream: Any = stdin or getattr(sys.stdin, "buffer", sys.stdin)
        content = stream.read()
        data = content.encode() if isinstance(content, str) else content
        is_json = data.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"[", b"{")
        return decode(data, ".json" if is_json else ".csv", reading)
    return _read_file(Path(source), reading)


def _digits() -> object:
    try:
        return importlib.import_module("sklearn.datasets").load_digits().data[:8]
    except ImportError:
        raise Refusal("needs scikit-learn; install it with: pip install 'normwise[lab]'") from None


def _read_file(path: Path, reading: Reading) -> object:
    reading.name = path.name or str(path)
    suffix = path.suffix.lower()
    try:
        with path.open("rb") as file:
            if suffix not in READERS:
                got = f"it ends in {brief(path.suffix)}" if suffix else "it has no suffix"
                raise Refusal(f"must be a file that ends in {', '.join(READERS)}; {got}; convert or rename it")
            data = file.read()
    except FileNotFoundError:
        names = os.listdir(path.parent) if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, names, n=1)
        advice = f"did you mean {str(path.with_name(close[0]))!r}" if close else "give a file, '-' or [[1, 2], [3, 4]]"
        raise Refusal(f"must be a file; there is none of this name in {str(path.parent)!r}; {advice}") from None
    except IsADirectoryError:
        raise Refusal("must be a file; it is a directory; name a file in it") from None
    except ValueError:
        raise Refusal("must be the path of a file; it holds a character that no path can; remove it") from None
    return decode(data, suffix, reading)


def _batch(raw: object, dtype: torch.dtype | None, allow_nonfinite: bool, reading: Reading) -> Batch:
    """The batch, if it has samples and features, of a supported type, all finite unless allowed."""
    values = _as_tensor(raw, reading)
    if values.dim() == 0:
        raise Refusal(f"must have samples and features; it is one number, {values.item()}; give [[1, 2], [3, 4]]")
    if values.numel() == 0:
        shape = tuple(values.shape)
        raise Refusal(f"must hold at least one sample and one feature; its shape is {shape}; add what is missing")
    if values.dim() == 1:
        reading.notes.append(f"read as one sample of {len(values)} feature{'s' * (len(values) > 1)}")
        values = values.unsqueeze(0)
    if not allow_nonfinite:
        _check_finite(values)
    if dtype is not None and dtype != values.dtype:
        if dtype not in FLOATS:
            raise Refusal(f"the type must be one of {_names(FLOATS)}; got {_names([dtype])}; choose one of them")
        given, values = values, values.to(dtype)
        _check_fits(given, given.isfinite() & ~values.isfinite(), _names([dtype]))
        reading.notes.append(f"{_names([given.dtype])} converted to {_names([dtype])}")
    notes = tuple(printable(note) for note in reading.notes)
    return Batch(values, printable(reading.name), notes, reading.feature_names)


def _as_tensor(raw: object, reading: Reading) -> Tensor:
    """A dense tensor of a supported floating-point type; integers and longdouble become float64."""
    if isinstance(raw, (list, tuple)):
        rows = [item.tolist() if hasattr(item, "tolist") else item for item in raw]
        _check_nesting(rows)
        try:
            raw = np.array(rows, dtype=np.float64)
        except OverflowError:
            raise Refusal("every number must fit float64; an integer does not; scale the values") from None
    elif not isinstance(raw, Tensor) and (hasattr(raw, "__array__") or isinstance(raw, Real)):
        raw = _narrowed(np.asarray(raw), reading)
    if isinstance(raw, np.ndarray):
        raw = torch.from_numpy(raw)
    if not isinstance(raw, Tensor):
        raise Refusal(f"must hold an array of numbers; it is a {type(raw).__name__}; give the array itself")
    if raw.layout != torch.strided or raw.is_nested or raw.is_meta:
        raise Refusal(f"must be a dense tensor; it is {raw.layout} on {raw.device}; save the values themselves")
    if raw.dtype in INTEGERS:
        reading.notes.append("integers read as float64")
        raw = raw.to(torch.float64)
    if raw.dtype not in FLOATS:
        raise Refusal(f"must hold real numbers of type {_names(FLOATS)}; it holds {_names([raw.dtype])}; convert them")
    return raw.detach().cpu().contiguous()


def _narrowed(array: np.ndarray[Any, Any], reading: Reading) -> np.ndarray[Any, Any]:
    """The array as torch takes it: native byte order, writable, no wider than float64."""
    if array.dtype.kind not in "iuf":
        advice = "take a part of it or its magnitude" if array.dtype.kind == "c" else "save it as numbers"
        raise Refusal(f"must hold real numbers; it holds {brief(str(array.dtype))}; {advice}")
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        with np.errstate(over="ignore"):
            given, array = array, array.astype(np.float64)
        _check_fits(given, np.isfinite(given) & np.isinf(array), "float64")
        reading.notes.append("longdouble read as float64")
    return np.require(array, array.dtype.newbyteorder("="), ["C", "W"])


def _check_nesting(rows: Sequence[Any]) -> None:
    """Nested lists hold numbers only, and as many in each row."""
    level, shape = list(rows), [len(rows)]
    while any(isinstance(item, (list, tuple)) for item in level):
        lengths = [len(item) if isinstance(item, (list, tuple)) else -1 for item in level]
        odd = next((i for i, length in enumerate(lengths) if length != lengths[0]), None)
        if odd is not None:
            here, first = (f"{_place(i, shape, 'row')} {_held(lengths[i])}" for i in (odd, 0))
            raise Refusal(f"every row must have as many values; {here}, {first}; make them equal")
        level, shape = [child for item in level for child in item], [*shape, lengths[0]]
    for i, item in enumerate(level):
        if isinstance(item, bool) or not isinstance(item, Real):
            raise Refusal(f"every entry must be a number; {_place(i, shape, 'value')} is {brief(item)}; correct it")


def _place(i: int, shape: Sequence[int], last: str) -> str:
    """Where item ``i`` of nested lists stands, counted from 1: ``"row 2, value 3"``, ``"row 2.3"``."""
    index = [str(k + 1) for k in np.unravel_index(i, shape)]
    if last == "row":
        return f"row {'.'.join(index)}"
    return f"row {'.'.join(index[:-1])}, value {index[-1]}" if len(index) > 1 else f"value {index[0]}"


def _held(length: int) -> str:
    return "is no list" if length < 0 else f"has {length} value{'s' * (length != 1)}"


def _check_finite(values: Tensor) -> None:
    finite = values.isfinite()
    if finite.all():
        return
    bad = (~finite).nonzero()
    index = tuple(bad[0].tolist())
    where = f"s{index[0]}, f{index[1]}" if len(index) == 2 else str(index)
    raise Refusal(
        f"every value must be finite; {len(bad)} of {values.numel()} {'are' if len(bad) > 1 else 'is'} NaN or inf, "
        f"the first is {values[index].item()} at {where} (counted from 0); "
        "pass --allow-nonfinite to look at it all the same"
    )


def _check_fits(values: Any, lost: Any, to: str) -> None:
    if lost.any():
        raise Refusal(f"every value must fit {to}; {values[lost][0].item()!s} does not; scale it or use a wider type")


def _names(types: Iterable[object]) -> str:
    return ", ".join(str(kind).removeprefix("torch.") for kind in types)
