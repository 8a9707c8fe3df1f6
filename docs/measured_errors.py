"""Measure the errors that the pages state beside torch's; prints the tables as they stand there.

Relative L2 error against the same formulas in float64 on the same rounded inputs, for inputs with standard deviation 1,
a cotangent drawn from N(0.5, 1) and weights from U(0.5, 1.5).
"""

import sys
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

import normwise as nw

Norm = Callable[[ModuleType, Tensor, Tensor, "Tensor | None"], Tensor]

RATIOS = (0.0, 1e2, 1e4, 1e6)
FLOAT32: dict[str, dict[str, tuple[Norm, tuple[int, ...], bool]]] = {
    "layer_norm": {
        "layer_norm, (4096, 768)": (lambda m, x, w, b: m.layer_norm(x, (768,), w, b), (4096, 768), False),
        "layer_norm over the channels, (16, 96, 56, 56)": (
            lambda m, x, w, b: m.layer_norm(x.permute(0, 2, 3, 1), (96,), w, b).permute(0, 3, 1, 2),
            (16, 96, 56, 56),
            False,
        ),
        "rms_norm, (4096, 768)": (lambda m, x, w, b: m.rms_norm(x, (768,), w, 1e-5), (4096, 768), False),
    },
    "group_norm": {
        "group_norm, 8 groups, (16, 64, 56, 56)": (
            lambda m, x, w, b: m.group_norm(x, 8, w, b),
            (16, 64, 56, 56),
            False,
        ),
        "the same, channels_last": (lambda m, x, w, b: m.group_norm(x, 8, w, b), (16, 64, 56, 56), True),
    },
    "batch_norm": {
        "batch_norm, (16, 64, 56, 56)": (
            lambda m, x, w, b: m.batch_norm(x, None, None, w, b, training=True),
            (16, 64, 56, 56),
            False,
        ),
        "the same, channels_last": (
            lambda m, x, w, b: m.batch_norm(x, None, None, w, b, training=True),
            (16, 64, 56, 56),
            True,
        ),
    },
}
HALF = {"layer_norm": (65536, 256), "group_norm": (64, 64, 32, 32), "batch_norm": (64, 64, 32, 32)}


def results(norm: Norm, module: ModuleType, x: Tensor, dy: Tensor, w: Tensor, b: Tensor) -> list[Tensor]:
    """y, dx, dweight, and dbias where there is one."""
    leaves = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, w, b)]
    y = norm(module, *leaves)
    y.backward(dy)
    return [y.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def errors(norm: Norm, x: Tensor, dy: Tensor, w: Tensor, b: Tensor) -> list[str]:
    """For each result: ours / torch's."""
    exact_x, exact_dy = (t.double().contiguous() for t in (x, dy))  # torch takes E[x²] − E[x]² of channels_last
    truth = results(norm, F, exact_x, exact_dy, w.double(), b.double())
    found = []
    for module in (nw.functional, F):
        for exact, value in zip(truth, results(norm, module, x, dy, w, b), strict=True):
            found.append(f"{((value.double() - exact).norm() / exact.norm()).item():.0e}".replace("e-0", "e-"))
    half = len(truth)
    return [f"{ours} / {theirs}" for ours, theirs in zip(found[:half], found[half:], strict=True)]


def inputs(shape: tuple[int, ...], ratio: float, last: bool, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """X, dy, and a weight and a bias in float32."""
    x = (torch.randn(shape, dtype=torch.float64) + ratio).to(dtype)
    dy = (torch.randn(shape, dtype=torch.float64) + 0.5).to(dtype)
    if last:
        x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    channels = shape[-1] if len(shape) == 2 else shape[1]
    return x, dy, torch.rand(channels) + 0.5, torch.randn(channels)


def main() -> None:
    """Print all tables."""
    torch.manual_seed(0)
    print(f"normwise on {nw.backends()['cpu']}, torch {torch.__version__}; each cell: normwise / torch\n")
    for page, norms in FLOAT32.items():
        print(f"docs/{page}.md\n\n| float32 | mean/std | y | dx | dweight | dbias |\n|---|---|---|---|---|---|")
        for name, (norm, shape, last) in norms.items():
            for ratio in RATIOS:
                cells = errors(norm, *inputs(shape, ratio, last, torch.float32))
                print(f"| {name} | {ratio:.0e} |".replace("0e+00", "0").replace("e+0", "e"), end=" ")
                print(" | ".join([*cells, "none"][:4]), "|")
                sys.stdout.flush()
        norm, last = next(iter(norms.values()))[0], False
        shape = HALF[page]
        if page == "layer_norm":
            norm = lambda m, x, w, b: m.layer_norm(x, (256,), w, b)  # noqa: E731
        print(f"\n| bfloat16, {shape} | dweight | dbias |\n|---|---|---|")
        for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
            x, dy, w, b = inputs(shape, 0.0, last, torch.bfloat16)
            cells = errors(norm, x, dy, w.to(dtype), b.to(dtype))  # of one type with x, or mixed as autocast has it
            print(f"| {name} parameters | {cells[2]} | {cells[3]} |")
        print()


if __name__ == "__main__":
    main()
