"""Images to classify: the digits that come with scikit-learn, or MNIST or CIFAR-10 from a folder; and their folds."""

from __future__ import annotations

import gzip
import itertools
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

FOLDS = 5
EXAMPLES = 2000
"""As many of a folder's images are used, about as many as there are digits."""


@dataclass(frozen=True)
class Data:
    """Images of all classes, (N, channels side side) in 0..1; digits are (1797, 64)."""

    x: Tensor
    y: Tensor
    channels: int = 1

    @property
    def side(self) -> int:
        """How many pixels an image, which is square, is high."""
        return math.isqrt(self.x.shape[1] // self.channels)

    @property
    def classes(self) -> int:
        """How many labels there are."""
        return int(self.y.max()) + 1


def digits() -> Data:
    """scikit-learn's 1,797 images of 8 x 8, which come with it."""
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    x, y = load_digits(return_X_y=True)
    return Data(torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y))


@dataclass(frozen=True)
class Split:
    """Indices of a replicate's examples; over the folds of a seed each example is tested once."""

    train: Tensor
    validation: Tensor
    test: Tensor

    @staticmethod
    def of(examples: int, seed: int, fold: int) -> Split:
        """A fifth to test, the next to validate, the rest, of the same size in all folds, to train."""
        order = torch.randperm(examples, generator=torch.Generator().manual_seed(seed))
        ends = [examples * k // FOLDS for k in range(FOLDS + 1)]
        parts = [order[a:b] for a, b in itertools.pairwise(ends)]
        test, validation, *rest = parts[fold:] + parts[:fold]
        return Split(torch.cat(rest)[: examples * (FOLDS - 2) // FOLDS - 1], validation, test)


def images(folder: str | None) -> Data:
    """The digits, or of a folder the first images of MNIST or CIFAR-10, averaged over 2 x 2 pixels to save time.

    Args:
        folder: With MNIST's training files, idx3 and idx1, gzipped or not, or with CIFAR-10's binary version; None for
            the digits.

    Raises:
        ValueError: If the folder holds neither, or a file is not what its name says.
    """
    if folder is None:
        return digits()
    path = Path(folder)
    found = [sorted(path.glob(pattern)) for pattern in ("train-images*", "train-labels*", "data_batch_1.bin")]
    try:
        if found[0] and found[1]:
            x, y = _idx(found[0][0], 3), _idx(found[1][0], 1)
            x = x[:, None]
        elif found[2]:
            rows = np.frombuffer(found[2][0].read_bytes(), np.uint8).reshape(-1, 3073)
            x, y = rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0]
        else:
            raise ValueError("there are none")
        if not len(x) == len(y) >= EXAMPLES or x.shape[2] != x.shape[3] or y.max() > 9:
            raise ValueError(f"there are {len(x)} images of {x.shape[2]} x {x.shape[3]} and {len(y)} labels")
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(
            f"data: {folder} must hold MNIST's train-images-idx3-ubyte and train-labels-idx1-ubyte, gzipped or not, or "
            f"CIFAR-10's data_batch_1.bin, with {EXAMPLES:,} images or more; {error}; give their folder."
        ) from None
    small = F.avg_pool2d(torch.tensor(x[:EXAMPLES], dtype=torch.float32) / 255, 2)
    return Data(small.flatten(1), torch.tensor(y[:EXAMPLES], dtype=torch.int64), channels=x.shape[1])


def _idx(path: Path, axes: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """A file of MNIST: 0, 0, 8 for bytes, the number of axes, their sizes in four bytes each, the values."""
    data = path.read_bytes()
    if path.suffix == ".gz":
        data = gzip.decompress(data)
    start = 4 + 4 * axes
    if data[:4] != bytes((0, 0, 8, axes)) or len(data) < start:
        raise ValueError(f"{path.name} is no idx file of {axes} axes")
    sizes = [int(n) for n in np.frombuffer(data[4:start], ">u4")]
    if len(data) - start != math.prod(sizes):
        raise ValueError(f"{path.name} must have {math.prod(sizes):,} values, it has {len(data) - start:,}")
    return np.frombuffer(data[start:], np.uint8).reshape(sizes)
