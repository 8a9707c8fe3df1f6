"""Memory of large outputs, as the CPU kernels reuse it.

Fresh memory costs more than the arithmetic of a norm: the operating system clears every page at its first touch. So the
kernels keep the blocks, of 1 MB and more, that freed outputs leave, up to a limit, and give them to later outputs; so
they do with the arrays of 32 kB and more that a call needs for itself. The memory of a live tensor is never counted nor
touched. ``NORMWISE_MEMORY_MB`` sets the limit at the start.

A tensor in such a block cannot grow: ``y.resize_`` to more elements raises. A limit of 0 turns the reuse off.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

_library: ctypes.CDLL | None = None


def held() -> int:
    """The bytes that wait for the next output; 0 without CPU kernels."""
    return _library.normwise_memory_held() if _library else 0


def limit() -> int:
    """The most bytes that may wait."""
    return _library.normwise_memory_limit() if _library else 0


def set_limit(size: int) -> None:
    """Set the most bytes that may wait; what is over it is freed. 0 turns the reuse off.

    Raises:
        ValueError: If ``size`` is negative.
    """
    if size < 0:
        raise ValueError(f"set_limit: size must be 0 or more bytes; got {size}; use 0 to turn the reuse off.")
    if _library:
        _library.normwise_set_memory_limit(size)


def clear() -> None:
    """Free what waits."""
    size = limit()
    set_limit(0)
    set_limit(size)


def poison(on: bool) -> None:
    """Fill outputs with NaN before the kernels write them: for tests, which then see what a kernel forgot."""
    if _library:
        _library.normwise_set_memory_poisoned(on)


def describe() -> str:
    """One line for ``normwise env``."""
    if not limit():
        return "outputs are not reused"
    return f"outputs of 1 MB and more are reused: {held() / 2**20:.0f} MB held, {limit() / 2**20:.0f} MB at most"


def open_library(path: Path) -> None:
    """Find the functions of the loaded kernels, and set the limit that the environment asks for.

    Raises:
        ValueError: If ``NORMWISE_MEMORY_MB`` is no number of megabytes.
    """
    global _library
    _library = ctypes.CDLL(str(path))
    for name in ("held", "limit"):
        getattr(_library, f"normwise_memory_{name}").restype = ctypes.c_int64
    _library.normwise_set_memory_limit.argtypes = [ctypes.c_int64]
    _library.normwise_set_memory_poisoned.argtypes = [ctypes.c_bool]
    if asked := os.environ.get("NORMWISE_MEMORY_MB"):
        if not asked.isdecimal():
            raise ValueError(f"NORMWISE_MEMORY_MB: it must be a whole number of megabytes; got {asked!r}; unset it.")
        set_limit(int(asked) * 2**20)
