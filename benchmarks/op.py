"""What an operation is to the benchmark: how each library is asked for it, and its exact result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normwise import reference
from normwise.reference import Rows

EPS = 1e-5
DIFFERENTIABLE = ("x", "residual", "weight", "bias")
"""Of the tensors that an operation takes, those that backward gives a gradient for."""

Tensors = dict[str, Tensor]


class Unavailable(Exception):
    """A library cannot run a case; the message says why."""


class Node(NamedTuple):
    """One node of an ONNX graph; inputs and outputs are names between blanks."""

    kind: str
    inputs: str
    outputs: str
    attributes: Mapping[str, Any]
    domain: str = ""


@dataclass(frozen=True)
class Op:
    """One operation, as each library is asked for it.

    Attributes:
        name: What it is called in the tables.
        takes: Names of the tensors it is called with, in order.
        normwise: Ours: a function of these tensors, or a layer class.
        torch: The same in PyTorch, as its users write it.
        jax: ``axis -> function``; ``axis`` is where the array has its channels. The function gives its outputs and
            what else changed, two tuples.
        onnx: ``(channels last?, dtype) -> nodes``; raises Unavailable.
        truth: ``(tensors, cotangents) -> outputs and gradients``, exact.
        gives: Names of the outputs.
        channels: The axis that weight and bias have.
        moved: How often the bytes of x must cross the memory bus, in forward and in forward+backward.
        twice: P1 promises at least twice the speed of eager PyTorch, in float32 too.
    """

    name: str
    takes: tuple[str, ...]
    normwise: Callable[..., Any]
    torch: Callable[..., Any]
    jax: Callable[[int], Callable[..., Any]]
    onnx: Callable[[bool, torch.dtype], Sequence[Node]]
    truth: Callable[[Tensors, Tensors], Tensors]
    gives: tuple[str, ...] = ("y",)
    channels: int = -1
    moved: tuple[int, int] = field(default=(2, 5))
    twice: bool = False

    @property
    def leaves(self) -> tuple[str, ...]:
        """Names of the tensors that backward gives a gradient for."""
        return tuple(name for name in self.takes if name in DIFFERENTIABLE)


def exact(
    rows: Rows, tensors: Tensors, dy: Tensor, eps: float, *, fixed: bool = False, residual: bool = False
) -> Tensors:
    """A norm by the reference in float64, and its gradients; then, if asked for, plus ``residual`` and ReLU.

    Args:
        rows: Which values share statistics.
        tensors: What the operation takes.
        dy: The cotangent of y.
        eps: Added to the variance.
        fixed: Normalize by the running statistics.
        residual: Add ``tensors["residual"]`` if there is one, and cut below zero.
    """
    tensors = {name: tensor.double() for name, tensor in tensors.items()}
    x, weight, bias, dy = tensors["x"], tensors["weight"], tensors.get("bias"), dy.double()
    kept = reference.fixed_statistics(tensors["running_mean"], tensors["running_var"], eps) if fixed else None
    y, _, stats = reference.normalize(x, rows, weight, bias, eps, fixed=kept)
    if residual:
        y = (y + tensors["residual"] if "residual" in tensors else y).clamp(min=0)
        dy = dy * (y > 0)
    dtype = None if bias is None else bias.dtype
    dx, dweight, dbias, _ = reference.normalize_backward(dy, x, rows, weight, dtype, stats, fixed=fixed)
    found = {"y": y, "dx": dx, "dresidual": dy if residual else None, "dweight": dweight, "dbias": dbias}
    return {name: value for name, value in found.items() if value is not None}


def spread(parameter: Any, x: Any, axis: int) -> Any:
    """Weight or bias, shaped to broadcast against the array ``x`` along its channels."""
    return parameter.reshape([-1 if i == axis % x.ndim else 1 for i in range(x.ndim)])


def affine(xhat: Any, like: Any, axis: int, weight: Any, bias: Any = None) -> Any:
    """Scale and shift an array of JAX in float32, and round once."""
    y = xhat * spread(weight, like, axis)
    return (y if bias is None else y + spread(bias, like, axis)).astype(like.dtype)
