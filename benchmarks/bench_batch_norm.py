"""Batch Norm in training and in eval, and in training with the ReLU, and the residual, that follow it in a ResNet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as tf

from normwise import functional as nf
from normwise.reference import batch_norm_rows

from .op import EPS, Node, Op, Tensors, Unavailable, affine, exact, spread

MOMENTUM = 0.1
TAKES = ("x", "weight", "bias", "running_mean", "running_var")
TAKES_RESIDUAL = ("x", "residual", "weight", "bias", "running_mean", "running_var")


def truth(tensors: Tensors, cotangents: Tensors, **how: bool) -> Tensors:
    """The exact norm of each channel."""
    return exact(batch_norm_rows(tensors["x"].shape), tensors, cotangents["dy"], EPS, **how)


def relu_truth(tensors: Tensors, cotangents: Tensors) -> Tensors:
    """The exact norm, plus the residual if there is one, and ReLU."""
    found = truth(tensors, cotangents, residual=True)
    return {name: value for name, value in found.items() if name != "dresidual" or "residual" in tensors}


def relu_by_torch(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """As ResNets do it: ReLU in place."""
    return tf.relu(tf.batch_norm(x, mean, var, weight, bias, True, MOMENTUM, EPS), inplace=True)


def add_relu_by_torch(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """As ResNets do it: the sum and ReLU in place."""
    return tf.relu(tf.batch_norm(x, mean, var, weight, bias, True, MOMENTUM, EPS).add_(residual), inplace=True)


def training_by_jax(axis: int) -> Callable[..., Any]:
    """The norm, and the running statistics moved."""
    import jax

    def batch_norm(x: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any) -> Any:
        wide, averaged = x.astype("float32"), tuple(i for i in range(x.ndim) if i != axis % x.ndim)
        mean = wide.mean(averaged, keepdims=True)
        var = jax.numpy.square(wide).mean(averaged, keepdims=True) - jax.numpy.square(mean)
        xhat = jax.nn.standardize(wide, averaged, mean, var, EPS)
        count = x.size // x.shape[axis]
        moments = (running_mean, mean), (running_var, var * (count / (count - 1)))
        state = [(1 - MOMENTUM) * old + MOMENTUM * new.reshape(-1).astype(old.dtype) for old, new in moments]
        return (affine(xhat, x, axis, weight, bias),), jax.lax.stop_gradient(tuple(state))

    return batch_norm


def eval_by_jax(axis: int) -> Callable[..., Any]:
    """The norm by running statistics."""
    import jax

    def batch_norm(x: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any) -> Any:
        mean, var = (spread(t.astype("float32"), x, axis) for t in (running_mean, running_var))
        xhat = (x.astype("float32") - mean) * jax.lax.rsqrt(var + EPS)
        return (affine(xhat, x, axis, weight, bias),), ()

    return batch_norm


def relu_by_jax(axis: int) -> Callable[..., Any]:
    """The norm and ReLU."""
    import jax

    norm = training_by_jax(axis)

    def batch_norm_relu(*tensors: Any) -> Any:
        (y,), state = norm(*tensors)
        return (jax.nn.relu(y),), state

    return batch_norm_relu


def add_relu_by_jax(axis: int) -> Callable[..., Any]:
    """The norm, plus the residual, and ReLU."""
    import jax

    norm = training_by_jax(axis)

    def batch_norm_add_relu(x: Any, residual: Any, *tensors: Any) -> Any:
        (y,), state = norm(x, *tensors)
        return (jax.nn.relu(y + residual),), state

    return batch_norm_add_relu


def training_by_onnx(channels_last: bool, dtype: torch.dtype) -> Sequence[Node]:
    """Not on the CPU."""
    raise Unavailable("ONNX Runtime has Batch Norm for inference alone")


def eval_by_onnx(channels_last: bool, dtype: torch.dtype) -> Sequence[Node]:
    """One node, for channels that come second."""
    if channels_last:
        raise Unavailable("BatchNormalization of ONNX takes NCHW alone")
    return [Node("BatchNormalization", " ".join(TAKES), "y", {"epsilon": EPS})]


OPS = [
    Op(
        "batch_norm training",
        TAKES,
        lambda x, w, b, mean, var: nf.batch_norm(x, mean, var, w, b, True, MOMENTUM, EPS),
        lambda x, w, b, mean, var: tf.batch_norm(x, mean, var, w, b, True, MOMENTUM, EPS),
        training_by_jax,
        training_by_onnx,
        truth,
        channels=1,
        twice=True,
    ),
    Op(
        "batch_norm eval",
        TAKES,
        lambda x, w, b, mean, var: nf.batch_norm(x, mean, var, w, b, False, MOMENTUM, EPS),
        lambda x, w, b, mean, var: tf.batch_norm(x, mean, var, w, b, False, MOMENTUM, EPS),
        eval_by_jax,
        eval_by_onnx,
        partial(truth, fixed=True),
        channels=1,
        twice=True,
    ),
    Op(
        "batch_norm_relu",
        TAKES,
        lambda x, w, b, mean, var: nf.batch_norm_relu(x, mean, var, w, b, True, MOMENTUM, EPS),
        relu_by_torch,
        relu_by_jax,
        training_by_onnx,
        relu_truth,
        channels=1,
        twice=True,
    ),
    Op(
        "batch_norm_relu residual",
        TAKES_RESIDUAL,
        lambda x, r, w, b, mean, var: nf.batch_norm_relu(x, mean, var, w, b, True, MOMENTUM, EPS, residual=r),
        add_relu_by_torch,
        add_relu_by_jax,
        training_by_onnx,
        relu_truth,
        channels=1,
        moved=(3, 8),  # x, residual -> y; then dy, x, y (where it is zero) -> dx, dresidual
        twice=True,
    ),
]
