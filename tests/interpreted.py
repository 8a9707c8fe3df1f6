"""A plugin of pytest that lets every operator which has a Triton kernel run on it, for tensors on the CPU.

NORMWISE_CPU=reference python -m pytest -p interpreted test_contract.py
"""

import interpreter
import torch

from normwise import kernels
from normwise.kernels import triton

if kernels.instruction_set() != "reference":
    raise ValueError(f"interpreted: NORMWISE_CPU must be 'reference'; {kernels.instruction_set()} is loaded.")
library = torch.library.Library("normwise", "IMPL")
for name in triton.MODULES:
    library.impl(name, interpreter.implementation(name), "CPU")
kernels._cpu = "triton"

import cases  # noqa: E402  asks what runs the operators

cases.MANY_ROWS = {name: (shape[0] // 16, *shape[1:]) for name, shape in cases.MANY_ROWS.items()}
