"""The grid: operations, shapes named after the models they come from, types, layouts and passes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from . import bench_batch_norm, bench_group_norm, bench_layer_norm
from .op import Op, Tensors

OPS = {op.name: op for module in (bench_layer_norm, bench_group_norm, bench_batch_norm) for op in module.OPS}

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
IN_FLOAT16 = ("layer_norm", "rms_norm")

SMALL = "small call"
"""The name of the shape that times what a call costs rather than what its bytes do."""

Shape = tuple[str, tuple[int, ...]]

TOKENS: list[Shape] = [
    ("BERT-base", (4096, 768)),
    ("Llama", (2048, 4096)),
    ("ViT-L", (32, 197, 1024)),
    ("QK-norm", (65536, 128)),
    ("decode 1", (1, 4096)),
    ("decode 16", (16, 4096)),
    ("long row", (64, 65536)),
]
RESIDUAL_STREAM = [shape for shape in TOKENS if shape[0] in ("BERT-base", "Llama", "ViT-L", "decode 16")]
CONVNEXT: list[Shape] = [("ConvNeXt-T 1", (32, 96, 56, 56)), ("ConvNeXt-T 3", (32, 384, 14, 14))]
UNET: list[Shape] = [
    ("SD UNet 64", (2, 320, 64, 64)),
    ("SD UNet 32", (2, 640, 32, 32)),
    ("SD UNet 16", (2, 1280, 16, 16)),
]
NNUNET: list[Shape] = [
    ("nnU-Net 3", (2, 128, 32, 32, 32)),
    ("nnU-Net 4", (2, 256, 16, 16, 16)),
    ("nnU-Net 5", (2, 320, 8, 8, 8)),
]
RESNET: list[Shape] = [
    ("ResNet-50 1", (32, 64, 56, 56)),
    ("ResNet-50 2", (32, 128, 28, 28)),
    ("ResNet-50 3", (32, 256, 14, 14)),
    ("ResNet-50 4", (32, 512, 7, 7)),
]
RESNET_ENDS: list[Shape] = [("ResNet-50 1 out", (32, 256, 56, 56)), ("ResNet-50 4 out", (32, 2048, 7, 7))]
FEATURES: list[Shape] = [("MLP", (256, 1024))]

GRID: dict[str, tuple[list[Shape], tuple[str, ...]]] = {
    "layer_norm": (TOKENS, ("",)),
    "rms_norm": (TOKENS, ("",)),
    "fused_add_layer_norm": (RESIDUAL_STREAM, ("",)),
    "fused_add_rms_norm": (RESIDUAL_STREAM, ("",)),
    "layer_norm_2d": (CONVNEXT, ("NCHW", "NHWC")),
    "group_norm": (UNET, ("NCHW", "NHWC")),
    "instance_norm": (NNUNET, ("NCDHW",)),
    "batch_norm training": (RESNET + FEATURES, ("NCHW", "NHWC")),
    "batch_norm eval": (RESNET[::3] + FEATURES, ("NCHW", "NHWC")),
    "batch_norm_relu": (RESNET[::3], ("NCHW", "NHWC")),
    "batch_norm_relu residual": (RESNET_ENDS, ("NCHW", "NHWC")),
}
"""For each operation its shapes and their layouts; shapes without positions have none."""

QUICK = ("BERT-base", "ConvNeXt-T 3", "SD UNet 16", "nnU-Net 5", "ResNet-50 4", "ResNet-50 4 out", SMALL)
"""Shapes of a short run."""


@dataclass(frozen=True)
class Case:
    """One line of the table, but for the number of threads."""

    op: Op
    model: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str = ""
    backward: bool = False

    @property
    def type_name(self) -> str:
        """Such as float32."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def forward_only(self) -> Case:
        """The same case without its backward: what both passes have in common."""
        return Case(self.op, self.model, self.shape, self.dtype, self.layout)

    @property
    def channels_last(self) -> bool:
        """In memory the channels come last, though they are the second axis."""
        return self.layout == "NHWC"

    @property
    def size(self) -> int:
        """Bytes of x."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def moved(self) -> int:
        """Bytes that must be read and written: those of x, y, dy and dx; parameters and statistics are not counted."""
        return self.op.moved[self.backward] * self.size

    def __str__(self) -> str:
        """What progress reports call it."""
        sizes = "x".join(map(str, self.shape))
        return " ".join(filter(None, (self.op.name, self.model, sizes, self.layout, self.type_name, self.passes)))

    @property
    def passes(self) -> str:
        """What is timed."""
        return "forward+backward" if self.backward else "forward"


@dataclass(frozen=True)
class Selection:
    """What of the grid to run; an empty tuple is no restriction."""

    ops: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    passes: tuple[str, ...] = ()
    quick: bool = False

    def __contains__(self, case: Case) -> bool:
        wanted = (self.ops, case.op.name), (self.dtypes, case.type_name), (self.passes, case.passes)
        named = all(value in values for values, value in wanted if values)
        models = (*self.models, *(QUICK if self.quick and not self.models else ()))
        short = not self.quick or case.dtype != torch.float16
        return named and short and (not models or case.model in models)


def grid() -> Iterator[Case]:
    """Every case, forward and forward+backward of the same one after the other."""
    for name, (shapes, layouts) in GRID.items():
        for model, shape in shapes:
            for layout in layouts if len(shape) > 3 else ("",):
                for dtype in TYPES.values():
                    if dtype != torch.float16 or name in IN_FLOAT16:
                        for backward in (False, True):
                            yield Case(OPS[name], model, shape, dtype, layout, backward)
    for name in ("layer_norm", "LayerNorm"):
        for backward in (False, True):
            yield Case(OPS[name], SMALL, (1, 768), torch.float32, backward=backward)


@dataclass(frozen=True)
class Problem:
    """The numbers of a case: what the operation takes, the cotangents of what it gives, and what is right."""

    tensors: Tensors
    cotangents: Tensors
    truth: Tensors


@lru_cache(maxsize=1)
def draw(case: Case, seed: int, device: str = "cpu") -> Problem:
    """Random numbers for a case, the same for both of its passes.

    x has mean and standard deviation 1. The cotangents have a mean that is not zero: for the sums of many norms that is
    the only case in which a lost term shows.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(shape: tuple[int, ...], mean: float, std: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=generator, device=device).mul_(std).add_(mean).to(case.dtype)
        return values.to(memory_format=torch.channels_last) if case.channels_last and len(shape) == 4 else values

    channels = (case.shape[case.op.channels],)
    means = {"x": 1.0, "residual": 0.0, "weight": 1.0, "bias": 0.0, "running_mean": 1.0, "running_var": 1.0}
    full = ("x", "residual")
    tensors = {
        n: normal(case.shape, means[n]) if n in full else normal(channels, means[n], 0.25) for n in case.op.takes
    }
    if "running_var" in tensors:
        tensors["running_var"].abs_().add_(0.1)
    cotangents = {f"d{name}": normal(case.shape, 0.5) for name in case.op.gives}
    return Problem(tensors, cotangents, case.op.truth(tensors, cotangents))
