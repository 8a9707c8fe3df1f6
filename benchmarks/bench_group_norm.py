"""Group Norm with 32 groups, and Instance Norm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional as tf

from normwise import functional as nf
from normwise.reference import group_norm_rows

from .op import EPS, Node, Op, Tensors, Unavailable, affine, exact

GROUPS = 32


def group_truth(tensors: Tensors, cotangents: Tensors) -> Tensors:
    """The exact norm of each group of channels."""
    return exact(group_norm_rows(tensors["x"].shape, GROUPS), tensors, cotangents["dy"], EPS)


def instance_truth(tensors: Tensors, cotangents: Tensors) -> Tensors:
    """The exact norm of each channel of each example."""
    shape = tensors["x"].shape
    return exact(group_norm_rows(shape, shape[1]), tensors, cotangents["dy"], EPS)


def group_norm_by_jax(axis: int) -> Callable[..., Any]:
    """The channels are split in two axes, and all but the examples and groups averaged."""
    import jax

    def group_norm(x: Any, weight: Any, bias: Any) -> Any:
        at = axis % x.ndim
        split = x.reshape(*x.shape[:at], GROUPS, -1, *x.shape[at + 1 :]).astype("float32")
        averaged = tuple(i for i in range(1, split.ndim) if i != at)
        xhat = jax.nn.standardize(split, averaged, epsilon=EPS).reshape(x.shape)
        return (affine(xhat, x, axis, weight, bias),), ()

    return group_norm


def instance_norm_by_jax(axis: int) -> Callable[..., Any]:
    """All but the examples and channels are averaged."""
    import jax

    def instance_norm(x: Any, weight: Any, bias: Any) -> Any:
        averaged = tuple(i for i in range(1, x.ndim) if i != axis % x.ndim)
        xhat = jax.nn.standardize(x.astype("float32"), averaged, epsilon=EPS)
        return (affine(xhat, x, axis, weight, bias),), ()

    return instance_norm


def by_onnx(kind: str, **attributes: Any) -> Callable[[bool, torch.dtype], Sequence[Node]]:
    """One node, for channels that come second."""

    def nodes(channels_last: bool, dtype: torch.dtype) -> Sequence[Node]:
        if channels_last:
            raise Unavailable(f"{kind} of ONNX takes NCHW alone")
        return [Node(kind, "x weight bias", "y", {**attributes, "epsilon": EPS})]

    return nodes


OPS = [
    Op(
        "group_norm",
        ("x", "weight", "bias"),
        lambda x, w, b: nf.group_norm(x, GROUPS, w, b, EPS),
        lambda x, w, b: tf.group_norm(x, GROUPS, w, b, EPS),
        group_norm_by_jax,
        by_onnx("GroupNormalization", num_groups=GROUPS),
        group_truth,
        channels=1,
    ),
    Op(
        "instance_norm",
        ("x", "weight", "bias"),
        lambda x, w, b: nf.instance_norm(x, None, None, w, b, eps=EPS),
        lambda x, w, b: tf.instance_norm(x, None, None, w, b, eps=EPS),
        instance_norm_by_jax,
        by_onnx("InstanceNormalization"),
        instance_truth,
        channels=1,
        twice=True,
    ),
]
