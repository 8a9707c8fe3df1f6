"""What the figures depend on besides the code: the machine, and the versions of everything that was timed."""

from __future__ import annotations

import datetime
import os
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import normwise as nw

PACKAGES = ("normwise", "torch", "onnxruntime", "onnx", "jax", "jaxlib", "numpy")


def cores() -> list[int]:
    """The processors that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def model() -> str:
    """What the processor calls itself."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def name() -> str:
    """A file name, such as ``amd-epyc-2-cores``."""
    plain = re.sub(r"\((r|tm)\)|\bcpu\b|\bprocessor\b|@.*", " ", model().lower())
    return "-".join([*re.findall(r"[a-z0-9]+", plain), str(len(cores())), "cores"])


def versions() -> dict[str, str]:
    """Of each package that is installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def load() -> float | None:
    """Processors in use over the last minute, by anyone."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def describe() -> dict[str, Any]:
    """All of it, as JSON."""
    return {
        "machine": name(),
        "processor": model(),
        "cores": len(cores()),
        "instruction_set_of_torch": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.release()}",
        "backends": nw.backends(),
        "versions": versions(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
