"""What the families share: declaring an operator, and the layout, shape and selection of its outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels import triton
from ..reference import Gradients, Normalized, Statistics

AFFINE = "Tensor? weight, Tensor? bias, float eps"
GRADIENTS = "Tensor? weight, ScalarType? bias_dtype, bool[3] output_mask"

OPS = torch.ops.normwise
"""The operators, each called by its one overload: PyTorch then has none to choose."""

REFERENCE: dict[str, Callable[..., Any]] = {}
"""What implements each operator for any device."""

_library = torch.library.Library("normwise", "DEF")


def declare(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Declare an operator with its implementation for any device, that for CUDA, and its rule of shapes and types."""
    name = schema.partition("(")[0]
    REFERENCE[name] = implementation
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    if name in triton.MODULES and not triton.missing():
        _library.impl(name, triton.at_first_call(name, implementation), "CUDA")
    torch.library.register_fake(f"normwise::{name}", fake, lib=_library)


class Function(torch.autograd.Function):
    """An autograd function for calls outside functorch's transforms, which are not looked for a second time."""

    apply = torch._C._FunctionBase.__dict__["apply"]


def like(x: Tensor, values: Tensor) -> Tensor:
    """The values in the memory layout of ``x``."""
    return torch.empty_like(x, dtype=values.dtype).copy_(values)


def forward_outputs(x: Tensor, result: Normalized) -> tuple[Tensor, Tensor, Tensor]:
    """Lay y out like x; mean and rstd lose the row axis."""
    return like(x, result.y), result.statistics.mean.squeeze(-1), result.statistics.rstd.squeeze(-1)


def saved_statistics(mean: Tensor, rstd: Tensor) -> Statistics:
    """The statistics that backward needs, from what forward returned."""
    return Statistics(mean.unsqueeze(-1), rstd.new_zeros(()), rstd.unsqueeze(-1))


def backward_outputs(x: Tensor, grads: Gradients, output_mask: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Lay dx out like x; gradients that are not wanted come back empty."""
    dx, dweight, dbias = (
        g if want and g is not None else x.new_empty(0) for g, want in zip(grads[:3], output_mask, strict=True)
    )
    return like(x, dx) if output_mask[0] else dx, dweight, dbias


def fake_y(x: Tensor, *args: Any) -> Tensor:
    """The fake y of an operator whose last argument may be ``out_dtype``."""
    out_dtype = args[-1] if isinstance(args[-1], torch.dtype) else None
    return torch.empty_like(x, dtype=out_dtype or x.dtype)


def fake_statistics(x: Tensor, shape: Sequence[int]) -> Tensor:
    """A fake mean, variance or rstd."""
    return x.new_empty(shape, dtype=torch.float64)


def fake_gradients(
    x: Tensor, shape: Sequence[int], weight: Tensor | None, bias_dtype: torch.dtype | None, output_mask: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Fake dx, dweight and dbias, the latter two of the given shape."""
    return (
        torch.empty_like(x) if output_mask[0] else x.new_empty(0),
        x.new_empty(shape, dtype=weight.dtype) if weight is not None and output_mask[1] else x.new_empty(0),
        x.new_empty(shape, dtype=bias_dtype) if bias_dtype is not None and output_mask[2] else x.new_empty(0),
    )


def fake_channel_gradients(dy: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Fake gradients of an operator with parameters (C), whose last arguments are :data:`GRADIENTS`."""
    return fake_gradients(x, x.shape[1:2], *args[-3:])


def select(wanted: Sequence[bool], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """None for each gradient that autograd does not want."""
    return [g if want else None for g, want in zip(grads, wanted, strict=True)]
