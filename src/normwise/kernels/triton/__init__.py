"""The Triton kernels: which operators have one, and when Triton is imported for them, at the first call.

Triton comes with PyTorch's CUDA builds for Linux and is no dependency of its own. Where it is missing, or the GPU is
older than it supports, the reference runs.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

FAMILIES = {
    "layer_norm": [
        f"{name}{part}"
        for name in ("layer_norm", "rms_norm", "fused_add_layer_norm", "fused_add_rms_norm")
        for part in ("", "_forward", "_backward")
    ],
    "group_norm": ["group_norm", "group_norm_forward", "group_norm_backward"],
    "batch_norm": [
        *(f"{name}{part}" for name in ("batch_norm", "batch_norm_relu") for part in ("", "_forward", "_backward")),
        *(f"batch_norm_{part}" for part in ("sums", "moments", "gradient_sums", "backward_of_sums")),
    ],
    "update_running": ["update_running_"],
}
"""The operators of each module here."""

MODULES = {name: module for module, names in FAMILIES.items() for name in names}

OLDEST = (8, 0)
"""The compute capability that Triton supports and that has bfloat16."""


@functools.cache
def missing() -> str:
    """Why no kernel can run on any GPU here; empty if some can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return "" if torch.version.cuda else "torch is built without CUDA"


def unusable(device: torch.device) -> str:
    """Why no kernel can run on that GPU; empty if they can."""
    capability = torch.cuda.get_device_capability(device)
    old = "the GPU's compute capability must be {}.{} or more; it is {}.{}".format(*OLDEST, *capability)
    return missing() or (old if capability < OLDEST else "")


def at_first_call(name: str, reference: Callable[..., Any]) -> Callable[..., Any]:
    """The implementation of an operator for CUDA, which is found when it is called.

    Args:
        name: One of :data:`MODULES`.
        reference: What runs where the kernel cannot, and what an empty input takes.
    """

    @functools.cache
    def kernel(device: torch.device) -> Callable[..., Any] | None:
        return None if unusable(device) else load(name)

    def call(*args: Any) -> Any:
        x = args[0]
        run = kernel(x.device) if x.numel() else None
        if run is None:
            return reference(*args)
        with torch.cuda.device(x.device):  # where Triton launches
            return run(*args)

    return call


def load(name: str) -> Callable[..., Any]:
    """The function of an operator; imports Triton."""
    return getattr(importlib.import_module(f".{MODULES[name]}", __name__), name)
