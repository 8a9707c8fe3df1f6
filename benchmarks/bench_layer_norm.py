"""Layer Norm and RMSNorm: alone, over channels of an image, after a residual, and as a layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as tf

import normwise as nw
from normwise import functional as nf
from normwise.definitions import Pattern
from normwise.reference import Rows, layer_norm_rows

from .op import EPS, Node, Op, Tensors, affine, exact

RMS_EPS = 1e-6
"""Llama's; named in every call, for libraries have defaults of their own."""


def norm_truth(centred: bool) -> Callable[[Tensors, Tensors], Tensors]:
    """The exact norm over the last axis."""

    def truth(tensors: Tensors, cotangents: Tensors) -> Tensors:
        rows = layer_norm_rows(tensors["x"].shape, tensors["x"].shape[-1:], centred=centred)
        return exact(rows, tensors, cotangents["dy"], EPS if centred else RMS_EPS)

    return truth


def added_truth(centred: bool) -> Callable[[Tensors, Tensors], Tensors]:
    """The exact norm of ``h = x + residual``, h rounded as it is stored."""

    def truth(tensors: Tensors, cotangents: Tensors) -> Tensors:
        h = tensors["x"] + tensors["residual"]
        found = norm_truth(centred)({**tensors, "x": h}, cotangents)
        dh = found["dx"] + cotangents["dh"].double()
        return {**found, "h": h.double(), "dx": dh, "dresidual": dh}

    return truth


def channels_truth(tensors: Tensors, cotangents: Tensors) -> Tensors:
    """The exact norm over the channels at each position."""
    rows = Rows.of(Pattern.parse("n c h w -> n h w"), tensors["x"].shape, "c")
    return exact(rows, tensors, cotangents["dy"], EPS)


def channels_by_torch(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As ConvNeXt does it."""
    return tf.layer_norm(x.permute(0, 2, 3, 1), weight.shape, weight, bias, EPS).permute(0, 3, 1, 2)


def add_layer_norm_by_torch(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """As a transformer block does it: the sum goes on as the next residual."""
    h = x + residual
    return tf.layer_norm(h, h.shape[-1:], weight, bias, EPS), h


def add_rms_norm_by_torch(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """As a transformer block does it: the sum goes on as the next residual."""
    h = x + residual
    return tf.rms_norm(h, h.shape[-1:], weight, RMS_EPS), h


def layer_norm_by_jax(axis: int) -> Callable[..., Any]:
    """Over the channels, wherever they are."""
    import jax

    def layer_norm(x: Any, weight: Any, bias: Any) -> Any:
        xhat = jax.nn.standardize(x.astype("float32"), axis, epsilon=EPS)
        return (affine(xhat, x, axis, weight, bias),), ()

    return layer_norm


def rms_norm_by_jax(axis: int) -> Callable[..., Any]:
    """Over the last axis."""
    import jax

    def rms_norm(x: Any, weight: Any) -> Any:
        wide = x.astype("float32")
        rstd = jax.lax.rsqrt(jax.numpy.square(wide).mean(axis, keepdims=True) + RMS_EPS)
        return (affine(wide * rstd, x, axis, weight),), ()

    return rms_norm


def added_by_jax(norm: Callable[[int], Callable[..., Any]]) -> Callable[[int], Callable[..., Any]]:
    """The norm of ``h = x + residual``, and h."""

    def build(axis: int) -> Callable[..., Any]:
        inner = norm(axis)

        def added(x: Any, residual: Any, *parameters: Any) -> Any:
            h = x + residual
            return (*inner(h, *parameters)[0], h), ()

        return added

    return build


def layer_norm_by_onnx(_: bool, dtype: torch.dtype) -> Sequence[Node]:
    """LayerNormalization, since opset 17."""
    return [Node("LayerNormalization", "x weight bias", "y", {"axis": -1, "epsilon": EPS})]


def rms_norm_by_onnx(_: bool, dtype: torch.dtype) -> Sequence[Node]:
    """RMSNormalization is of opset 23; for bfloat16 the runtime has only its own, older operator."""
    kind = "SimplifiedLayerNormalization" if dtype == torch.bfloat16 else "RMSNormalization"
    return [Node(kind, "x weight", "y", {"axis": -1, "epsilon": RMS_EPS})]


def channels_by_onnx(channels_last: bool, dtype: torch.dtype) -> Sequence[Node]:
    """ONNX normalizes last axes alone, so NCHW is transposed and back."""
    if channels_last:
        return layer_norm_by_onnx(channels_last, dtype)
    return [
        Node("Transpose", "x", "rows", {"perm": [0, 2, 3, 1]}),
        Node("LayerNormalization", "rows weight bias", "normalized", {"axis": -1, "epsilon": EPS}),
        Node("Transpose", "normalized", "y", {"perm": [0, 3, 1, 2]}),
    ]


def add_layer_norm_by_onnx(_: bool, dtype: torch.dtype) -> Sequence[Node]:
    """One fused operator of the runtime; its second and third output, mean and rstd, are not asked for."""
    kind, inputs = "SkipLayerNormalization", "x residual weight bias"
    return [Node(kind, inputs, "y - - h", {"epsilon": EPS}, "com.microsoft")]


def add_rms_norm_by_onnx(_: bool, dtype: torch.dtype) -> Sequence[Node]:
    """One fused operator of the runtime."""
    kind, inputs = "SkipSimplifiedLayerNormalization", "x residual weight"
    return [Node(kind, inputs, "y - - h", {"epsilon": RMS_EPS}, "com.microsoft")]


OPS = [
    Op(
        "layer_norm",
        ("x", "weight", "bias"),
        lambda x, w, b: nf.layer_norm(x, x.shape[-1:], w, b, EPS),
        lambda x, w, b: tf.layer_norm(x, x.shape[-1:], w, b, EPS),
        layer_norm_by_jax,
        layer_norm_by_onnx,
        norm_truth(centred=True),
    ),
    Op(
        "LayerNorm",  # the layer
        ("x", "weight", "bias"),
        nw.nn.LayerNorm,
        torch.nn.LayerNorm,
        layer_norm_by_jax,
        layer_norm_by_onnx,
        norm_truth(centred=True),
    ),
    Op(
        "rms_norm",
        ("x", "weight"),
        lambda x, w: nf.rms_norm(x, x.shape[-1:], w, RMS_EPS),
        lambda x, w: tf.rms_norm(x, x.shape[-1:], w, RMS_EPS),
        rms_norm_by_jax,
        rms_norm_by_onnx,
        norm_truth(centred=False),
        twice=True,
    ),
    Op(
        "layer_norm_2d",
        ("x", "weight", "bias"),
        lambda x, w, b: nf.normalize(x, "n c h w -> n h w", "c", w, b, EPS),
        channels_by_torch,
        layer_norm_by_jax,
        channels_by_onnx,
        channels_truth,
        channels=1,
    ),
    Op(
        "fused_add_layer_norm",
        ("x", "residual", "weight", "bias"),
        lambda x, r, w, b: nf.fused_add_layer_norm(x, r, x.shape[-1:], w, b, EPS),
        add_layer_norm_by_torch,
        added_by_jax(layer_norm_by_jax),
        add_layer_norm_by_onnx,
        added_truth(centred=True),
        gives=("y", "h"),
        moved=(4, 8),  # x, residual -> y, h; then dy, dh, h -> dx, which is dresidual too
        twice=True,
    ),
    Op(
        "fused_add_rms_norm",
        ("x", "residual", "weight"),
        lambda x, r, w: nf.fused_add_rms_norm(x, r, x.shape[-1:], w, RMS_EPS),
        add_rms_norm_by_torch,
        added_by_jax(rms_norm_by_jax),
        add_rms_norm_by_onnx,
        added_truth(centred=False),
        gives=("y", "h"),
        moved=(4, 8),
        twice=True,
    ),
]
