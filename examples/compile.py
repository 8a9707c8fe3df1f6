"""Under torch.compile: a norm that the kernels compute faster than Inductor's code, and one best left to Inductor.

Inductor fuses a torch norm with its neighbours; a normwise kernel it calls as it is. Where the norm is most of the
work, the kernel wins; where what follows lets Inductor skip writing the normalized values, fusion does, and
``nn.restore`` before ``torch.compile`` gives Inductor the norms back. ``--train`` times forward and backward.
"""

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._inductor import config

import normwise as nw


class Score(nn.Module):
    """One number for each token: Layer Norm, then the product with a vector. Fused, y is never written."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.direction = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (N, L, width) -> (N, L)."""
        return (self.norm(x) * self.direction).sum(-1)


def call(model: nn.Module, x: Tensor, train: bool) -> Callable[[], None]:
    """One pass through the compiled ``model``, and back if ``train``."""
    compiled = torch.compile(model, dynamic=False)
    leaf, dy = x.clone().requires_grad_(train), torch.randn_like(model(x))

    def run() -> None:
        with torch.set_grad_enabled(train):
            y = compiled(leaf)
        if train:
            model.zero_grad()
            leaf.grad = None
            y.backward(dy)

    return run


def medians(calls: list[Callable[[], None]], turns: int) -> list[float]:
    """Milliseconds of each of ``calls``, which take turns."""
    seconds: list[list[float]] = [[] for _ in calls]
    for turn in range(turns + 3):
        for run, times in zip(calls, seconds, strict=True):
            start = time.perf_counter()
            run()
            if turn > 2:
                times.append(time.perf_counter() - start)
    return [statistics.median(times) * 1e3 for times in seconds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", action="store_true", help="forward and backward")
    parser.add_argument("--turns", type=int, default=30, help="timed calls of each")
    parser.add_argument("--threads", type=int, default=1, help="one is the least disturbed by what else runs")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config.cpp.vec_isa_ok = True  # Inductor need not compile programs to learn which instructions run
    torch.manual_seed(0)
    print(f"normwise on {nw.backends()['cpu']}; {'forward and backward' if arguments.train else 'forward'}, compiled")
    print("model                                    Inductor ms   normwise ms   Inductor/normwise")
    for name, model, x in (
        ("Batch Norm, training, (16, 64, 56, 56)", nn.BatchNorm2d(64), torch.randn(16, 64, 56, 56)),
        ("score of a token, (8, 512, 768)", Score(768), torch.randn(8, 512, 768)),
    ):
        ours = nw.nn.replace(copy.deepcopy(nn.Sequential(model)))
        restored = nw.nn.restore(copy.deepcopy(ours))  # what Inductor fuses
        try:
            calls = [call(restored, x, arguments.train), call(ours, x, arguments.train)]
            theirs, mine = medians(calls, arguments.turns)
        except torch._inductor.exc.InductorError as error:  # it needs a C++ compiler and Python's headers
            sys.exit(f"{name}: Inductor cannot compile here: {str(error).splitlines()[0]}")
        with torch.no_grad():
            assert torch.allclose(ours(x), restored(x), atol=1e-4)
        print(f"{name:38} {theirs:13.2f} {mine:13.2f} {theirs / mine:19.2f}")


if __name__ == "__main__":
    main()
