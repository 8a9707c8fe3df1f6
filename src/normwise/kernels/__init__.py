"""Which implementation of the operators runs on which device here, and why not a faster one.

The CPU kernels are one shared library for each instruction set. Loading it registers them with PyTorch's dispatcher, in
place of the reference; the Triton kernels are registered for CUDA where the operators are declared. ``NORMWISE_CPU``
forces one of avx512, avx2, baseline (on 64-bit ARM: neon) or reference, or is the path of a library built elsewhere,
such as the one of ``make sanitize``.
"""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch

from . import memory, triton

INSTRUCTION_SETS = {"AVX512": ("avx512", "avx2", "baseline"), "AVX2": ("avx2", "baseline")}
"""For each capability of the chip, as torch names it, the libraries that run on it, the fastest first."""

_cpu = "reference"


def backends() -> dict[str, str]:
    """What runs the norms on each kind of device.

    Returns:
        For ``"cpu"`` and ``"cuda"`` a short text; one that starts with ``unavailable`` gives the reason.

    Example:
        >>> sorted(backends())
        ['cpu', 'cuda']
    """
    threads = torch.get_num_threads()
    return {"cpu": f"{_cpu}, {threads} thread{'s' if threads > 1 else ''}", "cuda": _cuda()}


def _cuda() -> str:
    if not torch.cuda.is_available():
        return "unavailable: no CUDA device"
    device = torch.device("cuda", torch.cuda.current_device())
    reason = triton.unusable(device)
    return f"reference ({reason})" if reason else f"triton {version('triton')}, {torch.cuda.get_device_name(device)}"


def instruction_set() -> str:
    """What runs the norms on the CPU: one of the libraries, or the reference."""
    return _cpu.partition(" ")[0]


def usable() -> tuple[str, ...]:
    """The instruction sets that this chip has, the fastest first."""
    if platform.machine().lower() in ("aarch64", "arm64"):
        return ("neon",)
    return INSTRUCTION_SETS.get(torch.backends.cpu.get_cpu_capability(), ("baseline",))


def _instruction_set(library: Path) -> str:
    return library.stem.removeprefix("libnormwise_")


def load_cpu_kernels() -> None:
    """Load the library that fits this chip, or the one that ``NORMWISE_CPU`` names; without one the reference runs.

    Raises:
        ValueError: If ``NORMWISE_CPU`` names a library that this chip cannot run or that was not built.
    """
    global _cpu
    forced = os.environ.get("NORMWISE_CPU")
    if forced == "reference":
        return
    paths = [path for folder in __path__ for path in Path(folder).glob("lib*.so")]
    if forced and forced.endswith(".so"):
        paths, forced = [Path(forced).resolve()], _instruction_set(Path(forced))
    if forced and forced not in usable():
        raise ValueError(
            f"NORMWISE_CPU: it must be one of {', '.join(usable())}, reference on this chip; got {forced!r}; unset it."
        )
    built = {_instruction_set(path): path for path in paths}
    choice = forced or next((name for name in usable() if name in built), None)
    if choice is None:
        _cpu = "reference (kernels not built; with a C++ compiler: pip install --no-build-isolation .)"
        return
    if choice not in built:
        raise ValueError(f"NORMWISE_CPU: the {choice} kernels must be built; they were not; unset it.")
    torch.ops.load_library(str(built[choice]))
    memory.open_library(built[choice])
    _cpu = choice
