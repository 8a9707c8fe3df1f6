"""Train small models with torch's norms and with normwise's in their place, and print the time of a step with each.

Both copies of a model start from the same parameters and see the same batches, and their steps take turns, so that
whatever else the machine does slows both. The losses stay nearly equal. ``--steps 50`` for steadier figures,
``--width 512 --length 256`` for transformers whose norms have more to do than Python around them.
"""

import argparse
import copy
import functools
import statistics
import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normwise as nw

CLASSES = 10
VOCABULARY = 256


class BasicBlock(nn.Module):
    """Two convolutions with Batch Norm and a way around them (He et al. 2016, arXiv:1512.03385)."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride > 1 or before != width:
            self.shortcut = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (N, C, H, W)."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """Three stages of one block each."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.stages = nn.Sequential(BasicBlock(16, 16, 1), BasicBlock(16, 32, 2), BasicBlock(32, 64, 2))
        self.head = nn.Linear(64, CLASSES)

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy of ``images`` (N, 3, H, W)."""
        return F.cross_entropy(self.head(self.stages(self.stem(images)).mean((2, 3))), labels)


class Block(nn.Module):
    """Attention, then two linear layers, each after a norm (Xiong et al. 2020, arXiv:2002.04745)."""

    def __init__(self, width: int, heads: int, norm: type[nn.Module]) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = norm(width), norm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (N, L, width)."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).movedim(2, 0).transpose(2, 3)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """A causal language model of two blocks."""

    def __init__(self, norm: type[nn.Module], width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.Sequential(*(Block(width, 4, norm) for _ in range(2)))
        self.norm, self.head = norm(width), nn.Linear(width, VOCABULARY)

    def loss(self, tokens: Tensor) -> Tensor:
        """Cross entropy of the next one of ``tokens`` (N, L)."""
        logits = self.head(self.norm(self.blocks(self.embedding(tokens[:, :-1]))))
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


class Run:
    """A model, its optimizer, and the time of each of its steps."""

    def __init__(self, model: nn.Module, autocast: bool) -> None:
        self.model, self.autocast = model.train(), autocast
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        self.seconds: list[float] = []
        self.last = 0.0

    def step(self, *batch: Tensor) -> None:
        """Forward, backward, update."""
        start = time.perf_counter()
        self.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            loss = self.model.loss(*batch)
        loss.backward()
        self.optimizer.step()
        self.seconds.append(time.perf_counter() - start)
        self.last = loss.item()

    def median(self) -> float:
        """Milliseconds, without the first two steps, in which memory is found."""
        return statistics.median(self.seconds[2:]) * 1e3


def images() -> tuple[Tensor, Tensor]:
    return torch.randn(32, 3, 32, 32), torch.randint(CLASSES, (32,))


def tokens(length: int) -> tuple[Tensor]:
    return (torch.randint(VOCABULARY, (8, length + 1)),)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each copy")
    parser.add_argument("--threads", type=int, default=1, help="one is the least disturbed by what else runs")
    parser.add_argument("--width", type=int, default=256, help="of the transformers, a multiple of 4")
    parser.add_argument("--length", type=int, default=128, help="tokens of each of their 8 sequences")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    steps = arguments.steps
    if steps < 1:
        parser.error("--steps must be 1 or more")
    if arguments.width < 4 or arguments.width % 4 or arguments.length < 1:
        parser.error("--width must be a multiple of 4 and --length 1 or more")
    width, draw_tokens = arguments.width, functools.partial(tokens, arguments.length)
    torch.manual_seed(0)
    print(f"normwise on {nw.backends()['cpu']}; median of {steps} steps that take turns")
    print("model                            torch ms   normwise ms   torch/normwise   losses after the last step")
    for name, model, draw, autocast in (
        ("ResNet", ResNet(), images, False),
        ("transformer, LayerNorm", Transformer(nn.LayerNorm, width), draw_tokens, False),
        ("transformer, RMSNorm", Transformer(nn.RMSNorm, width), draw_tokens, False),
        ("transformer, LayerNorm, bfloat16", Transformer(nn.LayerNorm, width), draw_tokens, True),
    ):
        ours = copy.deepcopy(model)
        nw.nn.replace(ours)
        runs = [Run(model, autocast), Run(ours, autocast)]
        for turn in range(steps + 2):
            batch = draw()
            for run in runs if turn % 2 else reversed(runs):
                run.step(*batch)
        theirs, mine = (run.median() for run in runs)
        print(f"{name:32} {theirs:8.1f} {mine:13.1f} {theirs / mine:16.2f}   {runs[0].last:.4f} {runs[1].last:.4f}")
        assert abs(runs[0].last - runs[1].last) < 0.05


if __name__ == "__main__":
    main()
