"""Byte-level transformers trained side by side on source text of Python's standard library.

As in `replicates`, replicate r owns the channels r C to (r + 1) C of what is normalized, here (N L, R C), so the
library's own layers normalize all replicates at once: Batch Norm over all positions of all sequences.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import functional
from . import replicates

LENGTH, WIDTH, HEADS = 64, 64, 4
GUESS = math.log(256)
NORMS = ("layer_norm", "rms_norm", "batch_norm", "none")
FILES = {
    "train": "argparse ast bdb cmd codecs contextlib copy dataclasses difflib dis doctest enum fileinput fractions "
    "functools gettext imaplib inspect ipaddress locale mailbox mimetypes ntpath numbers optparse os pdb pickle "
    "pickletools platform plistlib poplib pprint pydoc queue selectors shelve shlex smtplib socketserver ssl tarfile "
    "tempfile threading trace traceback typing warnings webbrowser",
    "validation": "calendar csv heapq shutil socket textwrap",
    "test": "configparser ftplib random statistics subprocess tokenize uuid weakref",
}
"""Modules of the standard library, one file each in every Python from 3.10 on."""


@dataclass(frozen=True)
class Corpus:
    """Bytes, split by file, and the files' sha256, for their text differs between versions of Python."""

    parts: dict[str, Tensor]
    hashes: dict[str, str]


@functools.cache
def corpus() -> Corpus:
    """The text of `FILES`, from the Python that runs.

    Raises:
        ValueError: If this Python's library has no source text.
    """
    folder, parts, hashes = Path(os.__file__).parent, dict[str, Tensor](), dict[str, str]()
    for part, names in FILES.items():
        try:
            texts = {f"{name}.py": (folder / f"{name}.py").read_bytes() for name in names.split()}
        except OSError as error:
            raise ValueError(
                f"corpus: Python's library must be source text; {error.filename}: {error.strerror}; use another Python."
            ) from None
        hashes |= {name: hashlib.sha256(text).hexdigest() for name, text in texts.items()}
        parts[part] = torch.frombuffer(bytearray(b"".join(texts.values())), dtype=torch.uint8).long()
    return Corpus(parts, hashes)


def windows(text: Tensor, generators: Sequence[torch.Generator], sequences: int) -> Tensor:
    """(sequences, R, LENGTH + 1) of the text, each replicate's places by its own generator."""
    starts = [torch.randint(len(text) - LENGTH, (sequences, 1), generator=g) for g in generators]
    return text[torch.stack(starts, dim=1) + torch.arange(LENGTH + 1)]


class RMSNorm(nn.Module):
    """RMSNorm of each replicate's features, with its own weight, (R, C)."""

    def __init__(self, replicates: int, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(replicates, channels))

    def forward(self, x: Tensor) -> Tensor:
        """(N, R C) -> (N, R C)."""
        rows = x.view(len(x), *self.weight.shape)
        return (functional.rms_norm(rows, rows.shape[-1:]) * self.weight).flatten(1)


def norm_layer(norm: str, count: int) -> nn.Module:
    """The norm of so many replicates."""
    if norm == "rms_norm":
        return RMSNorm(count, WIDTH)
    return replicates.norm_layer(norm, count, WIDTH, spatial=False)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): the norm before, as in GPT-2."""

    def __init__(self, norm: str, generators: Sequence[torch.Generator], depth: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(norm_layer(norm, len(generators)) for _ in range(2))
        inner, outer = 1 / math.sqrt(WIDTH), 1 / math.sqrt(2 * depth * WIDTH)
        self.qkv = Linear(_normal(generators, (3 * WIDTH, WIDTH), inner))
        self.project = Linear(_normal(generators, (WIDTH, WIDTH), outer))
        self.widen = Linear(_normal(generators, (4 * WIDTH, WIDTH), inner))
        self.narrow = Linear(_normal(generators, (WIDTH, 4 * WIDTH), outer / 2))

    def forward(self, x: Tensor) -> Tensor:
        """(N L, R, C) -> the same."""
        heads = self.qkv(self.norms[0](x.flatten(1)).view(x.shape).transpose(0, 1))
        q, k, v = heads.view(-1, LENGTH, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        x = x + self.project(mixed.reshape(x.shape[1], len(x), WIDTH)).transpose(0, 1)
        rows = self.norms[1](x.flatten(1)).view(x.shape).transpose(0, 1)
        return x + self.narrow(F.gelu(self.widen(rows))).transpose(0, 1)


class Linear(nn.Module):
    """(R, N, I) -> (R, N, O), each replicate with its own weight, (R, O, I)."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(weight.shape[:2]))

    def forward(self, x: Tensor) -> Tensor:
        """(R, N, I) -> (R, N, O)."""
        return torch.baddbmm(self.bias[:, None], x, self.weight.mT)


class Transformer(nn.Module):
    """Predicts each next byte from those before it; one generator for each replicate's weights."""

    def __init__(self, norm: str, generators: Sequence[torch.Generator], depth: int) -> None:
        super().__init__()
        self.bytes = nn.Parameter(_normal(generators, (256, WIDTH), 1 / math.sqrt(2)))
        self.places = nn.Parameter(_normal(generators, (LENGTH, WIDTH), 1 / math.sqrt(2)))
        self.blocks = nn.Sequential(*(Block(norm, generators, depth) for _ in range(depth)))
        self.norm = norm_layer(norm, len(generators))
        self.head = Linear(_normal(generators, (256, WIDTH), 1 / math.sqrt(WIDTH)))

    def embed(self, text: Tensor) -> Tensor:
        """(N, R, L) -> (N L, R, C)."""
        count = text.shape[1]
        index = text.transpose(1, 2) + 256 * torch.arange(count)
        return (F.embedding(index, self.bytes.flatten(0, 1)) + self.places.transpose(0, 1)).view(-1, count, WIDTH)

    def forward(self, text: Tensor) -> Tensor:
        """(N, R, L) -> (R, N, L, 256) logits."""
        x = self.blocks(self.embed(text))
        logits = self.head(self.norm(x.flatten(1)).view(x.shape).transpose(0, 1))
        return logits.view(text.shape[1], len(text), LENGTH, 256)


def nats(model: nn.Module, text: Tensor) -> Tensor:
    """(N, R, L + 1) -> (R, N, L): what each byte but the first costs, given those before it."""
    logits, next_ones = model(text[..., :-1]), text[..., 1:].transpose(0, 1)
    return F.cross_entropy(logits.flatten(0, 2), next_ones.flatten(), reduction="none").view(next_ones.shape)


@dataclass(frozen=True)
class Setting:
    """How a set of replicates is trained."""

    norm: str
    updates: int
    sequences: int = 16
    depth: int = 2


def train(setting: Setting, runs: Sequence[tuple[int, float]]) -> Transformer:
    """One replicate for each run, (seed, learning rate).

    Adam (0.9, 0.99), no weight decay; a tenth of the updates warm up, then the rate falls to zero along a cosine.

    Returns:
        The model in evaluation mode. Initial weights and order depend on the seed alone.
    """
    generators = [torch.Generator().manual_seed(1_000_003 * (seed + 1)) for seed, _ in runs]
    model = Transformer(setting.norm, generators, setting.depth).train()
    rates, text = torch.tensor([rate for _, rate in runs])[:, None], corpus().parts["train"]
    flat = [p.detach().view(len(runs), -1) for p in model.parameters()]
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in flat]
    warm = setting.updates // 10
    for step in range(1, setting.updates + 1):
        nats(model, windows(text, generators, setting.sequences)).mean((1, 2)).sum().backward()
        share = (1 + math.cos(math.pi * (step - warm) / (setting.updates - warm))) / 2 if step > warm else step / warm
        now = rates * share * math.sqrt(1 - 0.99**step) / (1 - 0.9**step)
        for p, values, (first, second) in zip(model.parameters(), flat, moments, strict=True):
            assert p.grad is not None
            gradient = p.grad.view(values.shape)
            first.lerp_(gradient, 0.1)
            second.lerp_(gradient.square(), 0.01)
            values.sub_(now * first / (second.sqrt() + 1e-8))
            p.grad = None
    return model.eval()


def drawn(part: str, seeds: Sequence[int], sequences: int) -> Tensor:
    """Windows of a part of the corpus, the same for all models of a seed."""
    generators = [torch.Generator().manual_seed(7_000_003 * (seed + 1)) for seed in seeds]
    return windows(corpus().parts[part], generators, sequences)


@torch.no_grad()
def mean_nats(model: nn.Module, text: Tensor, sequences: int = 16) -> list[float]:
    """Each replicate's nats per byte, so many sequences a batch; what diverged counts as a guess, ln 256."""
    costs = torch.cat([nats(model, batch).double().mean(2) for batch in text.split(sequences)], dim=1).mean(1)
    return costs.nan_to_num(GUESS, GUESS).clamp(max=GUESS).tolist()


@contextmanager
def training_mode(model: nn.Module) -> Iterator[None]:
    """The model in training mode; after it, in evaluation with the running statistics of before."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    model.train()
    yield
    model.eval()
    for buffer, value in before:
        buffer.copy_(value)


@torch.no_grad()
def reestimate(model: nn.Module, text: Tensor, sequences: int = 16) -> None:
    """Set the running statistics to averages over batches of the text, under the final weights."""
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm1d):
            norm.reset_running_stats()
            norm.momentum = None
    model.train()
    for batch in text.split(sequences):
        model(batch[..., :-1])
    model.eval()


def tune(setting: Setting, seeds: Sequence[int], grid: Sequence[float]) -> dict[str, Any]:
    """The learning rate that costs least on the validation files, in evaluation mode.

    Returns:
        As `replicates.tuned`, with ``nats`` for the accuracies.
    """

    def validate(rates: Sequence[float]) -> list[float]:
        runs = [(seed, rate) for rate in rates for seed in seeds]
        text = drawn("validation", [seed for seed, _ in runs], 128)
        found = mean_nats(train(setting, runs), text)
        return [-sum(found[i : i + len(seeds)]) / len(seeds) for i in range(0, len(found), len(seeds))]

    found = replicates.tuned(validate, grid)
    return found | {"nats": [-a for a in found.pop("accuracies")]}


def _normal(generators: Sequence[torch.Generator], shape: Sequence[int], std: float) -> Tensor:
    return torch.stack([torch.randn(shape, generator=g) * std for g in generators])
