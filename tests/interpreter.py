"""The Triton kernels in Triton's interpreter, which needs no GPU. Import this before triton."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, and by each kernel when it is defined

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton import jit
from triton.runtime import interpreter

from normwise.kernels import triton
from normwise.kernels.triton.rows import tile_of_rows
from normwise.ops.common import REFERENCE

np.seterr(all="ignore")  # a GPU warns of no overflow

_convert_float = interpreter._convert_float


def _rounded(values: np.ndarray, source: Any, target: Any, mode: Any) -> np.ndarray:
    """The interpreter cuts to bfloat16, where a GPU rounds to nearest even, and loses its subnormal numbers."""
    types = {"fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16}
    if "bf16" not in (source.name, target.name) or not {source.name, target.name} <= types.keys():
        return _convert_float(values, source, target, mode)
    t = torch.from_numpy(np.ascontiguousarray(values)).view(types[source.name]).to(types[target.name])
    return t.view(torch.uint16).numpy() if target.name == "bf16" else t.numpy()


interpreter._convert_float = _rounded


def implementation(name: str) -> Callable[..., Any]:
    """What an operator does on CUDA, on the CPU."""

    def call(*args: Any) -> Any:
        return (triton.load(name) if args[0].numel() else REFERENCE[name])(*args)

    return call


@jit
def offsets_of(out, rows, cols, outer_stride, row_stride, col_stride, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The offsets of a tile's values."""
    program = tl.program_id(0)
    _, _, col, offsets, _ = tile_of_rows(program, rows, cols, outer_stride, row_stride, col_stride, ROWS, BLOCK, False)
    row = program * ROWS + tl.arange(0, ROWS)
    tl.store(out + row[:, None] * BLOCK + col[None, :], offsets)
