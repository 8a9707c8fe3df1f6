"""Measure what gradient accumulation does to Batch Norm; prints the figures of gradient-accumulation.md.

A CNN on digits, trained for some steps, then one step on a batch of 64 as four micro-batches of 16. Relative L2 error
of the loss, the outputs and the gradients of all parameters against the same batch in one pass in float64.
"""

import copy
import re
import statistics
import sys
import time
import weakref
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import normwise as nw

PAGE = Path(__file__).with_name("gradient-accumulation.md")
RECIPE: dict[str, Any] = {"__name__": "recipe"}
exec(
    re.search(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)[1], RECIPE
)  # what the page shows

BATCH_NORM, IN_PARTS = nw.nn.BatchNorm2d, RECIPE["BatchNormInParts"]
BATCH, PART, CHANNELS = 64, 16, 16
DEPTHS = (1, 2, 4)
STEPS = 50

Result = tuple[Tensor, Tensor]
"""Loss and outputs; the gradients lie in the parameters."""
Approach = Callable[[nn.Module, Tensor, Tensor], Result]


class CNN(nn.Sequential):
    """Blocks of convolution, norm and ReLU, then the mean over the positions and a linear layer."""

    def __init__(self, depth: int, norm: Callable[[int], nn.Module]) -> None:
        blocks = [
            nn.Sequential(
                nn.Conv2d(CHANNELS if i else 1, CHANNELS, 3, padding=1, bias=False), norm(CHANNELS), nn.ReLU()
            )
            for i in range(depth)
        ]
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS, 10))
        super().__init__(*blocks, head)


def in_one(model: nn.Module, x: Tensor, target: Tensor) -> Result:
    """The whole batch in one pass."""
    outputs = model(x)
    loss = cross_entropy(outputs, target)
    loss.backward()
    return loss.detach(), outputs.detach()


def accumulated(model: nn.Module, x: Tensor, target: Tensor) -> Result:
    """One micro-batch after the other, each with its own statistics."""
    outputs, total = [], torch.zeros((), dtype=x.dtype)
    for part, labels in zip(x.split(PART), target.split(PART), strict=True):
        outputs.append(model(part))
        loss = cross_entropy(outputs[-1], labels, reduction="sum") / len(x)
        loss.backward()
        total += loss.detach()
    return total, torch.cat([out.detach() for out in outputs])


def frozen(model: nn.Module, x: Tensor, target: Tensor) -> Result:
    """The same with the running statistics."""
    model.eval()
    try:
        return accumulated(model, x, target)
    finally:
        model.train()


def statistics_first(model: nn.Module, x: Tensor, target: Tensor) -> Result:
    """A pass for the statistics of each norm, which the backward then takes for constants."""
    return in_parts(model, x, target, exact=False)


def exact(model: nn.Module, x: Tensor, target: Tensor) -> Result:
    """The same, and a pass for the sums of each norm's gradient."""
    return in_parts(model, x, target, exact=True)


def in_parts(model: nn.Module, x: Tensor, target: Tensor, exact: bool) -> Result:
    """The page's recipe, whose last forward calls give the outputs."""
    outputs, losses = [], []

    def share(part: tuple[Tensor, Tensor]) -> Tensor:
        y = model(part[0])
        outputs.append(y.detach())
        loss = cross_entropy(y, part[1], reduction="sum") / len(x)
        losses.append(loss.detach())
        return loss

    parts = list(zip(x.split(PART), target.split(PART), strict=True))
    norms = [module for module in model.modules() if isinstance(module, IN_PARTS)]
    RECIPE["backward"](norms, parts, share, exact)
    return torch.stack(losses[-len(parts) :]).sum(), torch.cat(outputs[-len(parts) :])


def checkpointed(model: nn.Module, x: Tensor, target: Tensor) -> Result:
    """The whole batch in one pass that keeps what enters each block, and runs the block again in the backward."""
    outputs = x
    for block in model:
        outputs = checkpoint(block, outputs, use_reentrant=False)
    loss = cross_entropy(outputs, target)
    loss.backward()
    return loss.detach(), outputs.detach()


APPROACHES: dict[str, tuple[Approach, Callable[[int], nn.Module]]] = {
    "plain accumulation": (accumulated, BATCH_NORM),
    "running statistics": (frozen, BATCH_NORM),
    "statistics passes": (statistics_first, IN_PARTS),
    "statistics and gradient passes": (exact, IN_PARTS),
    "activation checkpointing": (checkpointed, BATCH_NORM),
    "Group Norm, accumulated": (accumulated, lambda channels: nw.nn.GroupNorm(4, channels)),
    "Layer Norm, accumulated": (accumulated, nw.nn.LayerNorm2d),
}


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Images (1797, 1, 8, 8) from 0 to 1, and labels."""
    found = load_digits()
    return torch.tensor(found.images).unsqueeze(1) / 16, torch.tensor(found.target)


def train(model: nn.Module, approach: Approach, steps: int) -> list[float]:
    """Train with batches of 64; the loss of each step."""
    images, labels = digits()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        chosen = torch.randint(len(images), (BATCH,))
        losses.append(approach(model, images[chosen], labels[chosen])[0].item())
        optimizer.step()
    optimizer.zero_grad()
    return losses


@cache
def trained(depth: int, norm: Callable[[int], nn.Module], seed: int, steps: int = STEPS) -> nn.Module:
    """A network after some steps with the whole batch, in float64; its numbers are such as float32 has."""
    torch.manual_seed(seed)
    model = CNN(depth, norm).double()
    train(model, in_one, steps)
    return model.float().double()


def learned(approach: Approach, norm: Callable[[int], nn.Module], depth: int = 4, seeds: int = 4) -> float:
    """The mean loss of steps 91 to 100 of training with this approach from the start, median of some networks."""
    found = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        found.append(statistics.mean(train(CNN(depth, norm).double(), approach, 100)[-10:]))
    return statistics.median(found)


def batch(seed: int) -> tuple[Tensor, Tensor]:
    """64 digits."""
    images, labels = digits()
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(1000 + seed))[:BATCH]
    return images[chosen], labels[chosen]


def of_kind(model: nn.Module, depth: int, norm: Callable[[int], nn.Module], dtype: torch.dtype) -> nn.Module:
    """A copy with other norms, without gradients."""
    copied = CNN(depth, norm).to(dtype)
    copied.load_state_dict(model.state_dict())
    return copied


def results(approach: Approach, model: nn.Module, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, outputs and all gradients."""
    loss, outputs = approach(model, x, target)
    return loss, outputs, torch.cat([p.grad.flatten() for p in model.parameters()])


def errors(name: str, depth: int, seed: int, dtype: torch.dtype, steps: int = STEPS) -> list[float]:
    """Of loss, outputs and gradients, against the batch in one pass in float64."""
    approach, norm = APPROACHES[name]
    model = trained(depth, BATCH_NORM if norm is IN_PARTS else norm, seed, steps)
    x, target = batch(seed)
    truth = results(in_one, copy.deepcopy(model), x, target)
    found = results(approach, of_kind(model, depth, norm, dtype), x.to(dtype), target)
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, truth, strict=True)]


def passes(name: str, depth: int) -> tuple[float, float]:
    """How often the batch goes forward and backward through the network, by its convolutions."""
    approach, norm = APPROACHES[name]
    model = CNN(depth, norm)
    examples = [0, 0]

    def run(module: nn.Module, args: tuple[Tensor], y: Tensor) -> None:
        examples[0] += len(y)
        if y.requires_grad:
            y.register_hook(back)

    def back(dy: Tensor) -> None:
        examples[1] += len(dy)

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(run)
    x, target = batch(0)
    approach(model, x.float(), target)
    return examples[0] / BATCH / depth, examples[1] / BATCH / depth


def storages(values: Any) -> list[torch.UntypedStorage]:
    """The memory of the tensors among values, however nested."""
    return [t.untyped_storage() for t in tree_leaves(values) if isinstance(t, Tensor) and t.numel()]


class Peak(TorchDispatchMode):
    """The most bytes that tensors made meanwhile held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        old = {storage.data_ptr() for storage in storages(args)}
        out = func(*args, **(kwargs or {}))
        for storage in storages(out):
            where, size = storage.data_ptr(), storage.nbytes()
            if where not in old | self.known:
                self.known.add(where)
                self.now += size
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.gone, where, size)
        return out

    def gone(self, where: int, size: int) -> None:
        """A tensor's memory was freed."""
        self.known.discard(where)
        self.now -= size


def costs(name: str, depth: int, repeats: int = 31) -> tuple[float, float, float, float]:
    """Passes forward and backward; peak memory and CPU time of a step in float32, over one pass over the batch."""
    steps, peaks = [], []
    x, target = batch(0)
    for approach, norm in (APPROACHES[name], (in_one, BATCH_NORM)):
        model = CNN(depth, norm)
        step = partial(approach, model, x.float(), target)
        step()  # gradients are there from now on
        with Peak() as peak:
            step()
        steps.append(step)
        peaks.append(peak.most)
    ratios = []
    for _ in range(repeats):
        times = [time.process_time()]
        for step in steps:
            step()
            times.append(time.process_time())
        ratios.append((times[1] - times[0]) / (times[2] - times[1]))
    return *passes(name, depth), peaks[0] / peaks[1], statistics.median(ratios)


HEAD = ("", "loss", "outputs", "gradients", "gradients, float32", "forward", "backward", "memory", "time")


def cells(name: str, depth: int, seeds: int) -> list[str]:
    """One column of numbers for each of the table's."""
    found = []
    for dtype in (torch.float64, torch.float32):
        runs = [errors(name, depth, seed, dtype) for seed in range(seeds)]
        found.append([statistics.median(run) for run in zip(*runs, strict=True)])
    rounded = [f"{float(f'{error:.0e}'):g}".replace("e-0", "e-") for error in (*found[0], found[1][2])]
    return [*rounded, *(f"{cost:.2g}" for cost in costs(name, depth))]


def main(seeds: int = 8) -> None:
    """Print the page's table, and the losses below it."""
    torch.set_num_threads(1)
    print(f"normwise on {nw.backends()['cpu']}, torch {torch.__version__}; each cell: 1 / 2 / 4 norms\n")
    print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}")
    for name in APPROACHES:
        columns = zip(*(cells(name, depth, seeds) for depth in DEPTHS), strict=True)
        print(f"| {name} |", " | ".join(" / ".join(column) for column in columns), "|")
        sys.stdout.flush()
    print("\nLoss after 100 steps of training with 4 norms")
    for name in ("one pass over the batch", "plain accumulation", "statistics passes"):
        print(f"{name}: {learned(*APPROACHES.get(name, (in_one, BATCH_NORM))):.2g}")


if __name__ == "__main__":
    main()
