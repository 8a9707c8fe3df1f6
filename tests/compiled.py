"""Compile the Triton kernels for GPUs that are not here, as the operators would launch them, and say what came out.

python tests/compiled.py 80 90
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from normwise.kernels.triton import load

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
FLOAT, HALF = torch.float32, torch.bfloat16


class Driver:
    """Stands for a GPU of one compute capability."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def facts(kernel: Any) -> dict[str, Any]:
    """Registers, bytes of the stack (spilled registers), the widest load in bits, and the layouts of all sums."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        used = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", used.stdout).groups()  # type: ignore[union-attr]
    widths = [int(v or 1) * int(b) for v, b in re.findall(r"ld\.global[a-z.]*?(?:\.v(\d))?\.b(\d+)", kernel.asm["ptx"])]
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", kernel.asm["ttgir"], re.M))
    sums = re.findall(r"^ *}\) : \(tensor<[^#]*(#\w+)>.*\) ->", kernel.asm["ttgir"], re.M)
    return {
        "kernel": kernel.name, "registers": int(registers), "stack": int(stack), "load": max(widths),
        "sums": [layouts[layout] for layout in sums],
    }  # fmt: skip


def layer_norms() -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    """Calls of the operators of layer_norm, each with a name."""
    for cols, dtype in ((1, HALF), (64, HALF), (768, HALF), (4096, HALF), (4096, FLOAT), (8192, HALF), (40000, HALF)):
        x, w = torch.empty(3, cols, dtype=dtype), torch.empty(cols, dtype=dtype)
        s = torch.empty(3, dtype=torch.float64)
        yield f"forward {cols} {dtype}", "layer_norm_forward", (x, [cols], w, w, 1e-5, None)
        yield f"backward {cols} {dtype}", "layer_norm_backward", (x, x, s, s, [cols], w, dtype, [True] * 3)
    x, w = torch.empty(3, 4096, dtype=HALF), torch.empty(4096)
    s = torch.empty(3, dtype=torch.float64)
    yield "forward", "layer_norm_forward", (x, [4096], w, w, 1e-5, None)
    yield "forward alone", "layer_norm", (x, [4096], None, None, 1e-5, FLOAT)
    yield "forward of a sum", "fused_add_layer_norm_forward", (x, x, [4096], w, w, 1e-5, None)
    yield "backward of a sum", "fused_add_layer_norm_backward", (x, x, x, s, s, [4096], w, FLOAT, [True] * 3)
    yield "rms forward", "rms_norm_forward", (x, [4096], w, 1e-5, None)
    yield "rms backward", "rms_norm_backward", (x, x, s, [4096], w, [True] * 2)
    yield "float64", "layer_norm", (x.double(), [4096], w, w, 1e-5, None)
    for cols in (96, 768):
        x, w = torch.empty(2, cols, 64, 64).movedim(1, -1), torch.empty(cols)
        s = torch.empty(2, 64, 64, dtype=torch.float64)
        yield f"planar forward {cols}", "layer_norm_forward", (x, [cols], w, w, 1e-5, None)
        yield f"planar backward {cols}", "layer_norm_backward", (x, x, s, s, [cols], w, FLOAT, [True] * 3)


def channels() -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    """Calls of the operators of batch_norm and group_norm, each with a name."""
    every = [True] * 3
    for layout, size, dtype in (("planar", 56, HALF), ("planar", 7, FLOAT), ("between", 28, HALF)):
        x, w = torch.empty(2, 96, size, size, dtype=dtype), torch.empty(96)
        x = x if layout == "planar" else x.contiguous(memory_format=torch.channels_last)
        s, g = torch.empty(96, dtype=torch.float64), torch.empty(2, 32, dtype=torch.float64)
        case = f"{layout} {size}"
        for exact in (True, False):
            back = x, x, s, s, 1e-5, True, None, exact, w, FLOAT, every
            yield f"{case} exact {exact} forward", "batch_norm_forward", (x, w, w, 1e-5, None, exact)
            yield f"{case} exact {exact} backward", "batch_norm_backward", back
        back = x, x, x, s, s, 1e-5, True, None, False, w, FLOAT, [True] * 4
        yield f"{case} relu", "batch_norm_relu", (x, w, w, w, w, 1e-5, None, x)
        yield f"{case} relu backward", "batch_norm_relu_backward", back
        yield f"{case} groups", "group_norm_forward", (x, 32, w, w, 1e-5, None, None)
        yield f"{case} groups backward", "group_norm_backward", (x, x, g, g, 32, 1e-5, None, w, FLOAT, every)
    x, s, n = torch.empty(2, 64, 9, 9), torch.empty(64, dtype=torch.float64), torch.empty(2, dtype=torch.bool)
    large = torch.empty(2, 96, 50, 50, dtype=HALF)
    yield "large groups", "group_norm_forward", (large, 32, None, None, 1e-5, None, None)
    yield "masked channels", "batch_norm_relu_forward", (x, None, None, 1e-5, n, None, True)
    yield "float64 channels", "batch_norm_forward", (x.double(), None, None, 1e-5, None, True)
    yield "sums", "batch_norm_sums", (x, 1e-5, None, True)
    yield "moments", "batch_norm_moments", (torch.empty(64, 45, dtype=torch.int64),)
    yield "running", "update_running_", (s.float(), s.float(), torch.zeros((), dtype=torch.int64), s, s, 9, None, None)


def main(capabilities: list[int]) -> None:
    compiled: list[Any] = []

    def compile_only(self: Any, grid: Any) -> Any:
        return lambda *args, **options: compiled.append(self.run(*args, grid=grid, warmup=True, **options))

    JITFunction.__getitem__ = compile_only
    for capability in capabilities:
        triton.runtime.driver.set_active(Driver(capability))
        for case, name, args in (*layer_norms(), *channels()):
            load(name)(*args)
            for kernel in compiled:
                print(json.dumps({"case": case, "capability": capability, **facts(kernel)}))
            compiled.clear()


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]])
