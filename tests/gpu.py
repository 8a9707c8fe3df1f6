"""The operators that have Triton kernels, where these run here: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from normwise.ops.common import OPS

GPU = torch.cuda.is_available()
ON_A_GPU = pytest.mark.skipif(not GPU, reason="no CUDA device")
DEVICE = "cuda" if GPU else "cpu"

if not GPU:
    import interpreter


def op(name: str) -> Callable[..., Any]:
    """An operator where it runs here: on the GPU by the dispatcher, in the interpreter called at once."""
    return getattr(OPS, name).default if GPU else interpreter.implementation(name)


def unaligned(t: Tensor) -> Tensor:
    """The same values one place beyond what the kernels were compiled for."""
    room = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)
    return room[1:].as_strided(t.shape, t.stride()).copy_(t)
