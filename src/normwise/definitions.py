"""What each normalization is, as data: the axes that share one mean and variance, and what follows from that.

A pattern such as ``n c h w -> n h w`` is written as in einops: the left side names the axes of the input, the right
side the axes that keep statistics of their own. Every axis missing on the right is averaged away. The first axis on
the left is the batch. Whether a norm depends on the other examples, needs running statistics or must communicate is
derived from the pattern here and typed nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

ELLIPSIS = "..."


@dataclass(frozen=True)
class Pattern:
    """Which axes share one mean and variance.

    Attributes:
        left: The axes of the input in order; an item of several names is one axis split into them, ``(g c)``.
        right: The names that keep statistics of their own.

    Example:
        >>> batch_norm = Pattern.parse("n c h w -> c")
        >>> batch_norm.averaged, batch_norm.averages_batch
        (('n', 'h', 'w'), True)
    """

    left: tuple[tuple[str, ...], ...]
    right: tuple[str, ...]

    @staticmethod
    def parse(text: str) -> Pattern:
        """Read ``"n (g c) ... -> n g"``.

        Raises:
            ValueError: If the text is not a pattern, names an axis twice, keeps an axis that the left side lacks, or
                averages no axis at all.
        """
        sides = text.split("->")
        if len(sides) != 2:
            raise ValueError(
                f"pattern: it must read 'axes -> axes that keep their own statistics'; got {text!r}; "
                "write for example 'n c h w -> n h w'."
            )
        left, right = parse_axes(sides[0], "pattern"), parse_axes(sides[1], "pattern")
        if any(len(item) > 1 for item in right):
            raise ValueError(f"pattern: the right side takes single axes; got {text!r}; write 'n g', not '(n g)'.")
        pattern = Pattern(left, tuple(name for item in right for name in item))
        unknown = [name for name in pattern.right if name not in pattern.names]
        if unknown:
            raise ValueError(
                f"pattern: every axis on the right must stand on the left; {unknown[0]!r} does not in {text!r}; "
                f"choose from {' '.join(pattern.names)}."
            )
        if not pattern.averaged:
            raise ValueError(
                f"pattern: at least one axis must be averaged; {text!r} keeps them all; drop one from the right side."
            )
        return pattern

    @property
    def names(self) -> tuple[str, ...]:
        """All axis names of the left side, split axes apart."""
        return tuple(name for item in self.left for name in item)

    @property
    def averaged(self) -> tuple[str, ...]:
        """The axes over which mean and variance are taken."""
        return tuple(name for name in self.names if name not in self.right)

    @property
    def batch(self) -> str:
        """The name of the first axis, the batch."""
        return self.names[0]

    @property
    def averages_batch(self) -> bool:
        """True if examples of the batch share statistics. Everything particular to Batch Norm follows from this."""
        return any(name in self.averaged for name in self.left[0])

    def expand(self, ndim: int) -> Pattern:
        """Replace ``...`` by as many named axes as an input of ``ndim`` dimensions has there.

        Raises:
            ValueError: If the pattern cannot describe ``ndim`` dimensions.
        """
        extra = ndim - len(self.left) + 1
        has_ellipsis = (ELLIPSIS,) in self.left
        if extra < 0 or (extra != 1 and not has_ellipsis):
            raise ValueError(
                f"pattern: {self} describes {len(self.left) - has_ellipsis}{' or more' if has_ellipsis else ''} "
                f"dimensions; the input has {ndim}; name each of its axes or use '...'."
            )
        names = tuple(f"x{i}" for i in range(extra))
        left = tuple(new for item in self.left for new in (((n,) for n in names) if item == (ELLIPSIS,) else (item,)))
        right = tuple(new for name in self.right for new in (names if name == ELLIPSIS else (name,)))
        return Pattern(left, right) if has_ellipsis else self

    def sizes(self, shape: Sequence[int], given: Mapping[str, int] = MappingProxyType({})) -> dict[str, int]:
        """The length of every axis of an input of this shape; ``given`` fixes the parts of split axes.

        Raises:
            ValueError: If the shape does not fit the pattern, a split axis cannot be resolved, or a name is no axis.
        """
        pattern = self.expand(len(shape))
        strange = [name for name in given if name not in pattern.names]
        if strange:
            raise ValueError(
                f"pattern: sizes must name axes of the pattern; {strange[0]!r} is none of {str(pattern)!r}; "
                f"choose from {' '.join(pattern.names)}."
            )
        found: dict[str, int] = {}
        for item, length in zip(pattern.left, shape, strict=True):
            unknown = [name for name in item if name not in given]
            known = math.prod([given[name] for name in item if name in given])
            if len(unknown) > 1:
                raise ValueError(
                    f"pattern: the parts of ({' '.join(item)}) must be known; only its product {length} is; "
                    f"give {item[0]}=..."
                )
            if known <= 0 or (length % known if unknown else known != length):
                parts = ", ".join(f"{name}={given[name]}" for name in item if name in given)
                raise ValueError(
                    f"pattern: ({' '.join(item)}) must multiply to {length}; {parts} does not; "
                    f"choose a divisor of {length}."
                )
            found.update({name: given.get(name, length // known if unknown else known) for name in item})
        return {name: found[name] for name in pattern.names}

    def values_per_statistic(self, sizes: Mapping[str, int]) -> int:
        """How many values each mean and variance is taken over."""
        return math.prod([sizes[name] for name in self.names if name not in self.right])

    def __str__(self) -> str:
        return f"{format_axes(self.left)} -> {' '.join(self.right)}".strip()


def parse_axes(text: str, where: str) -> tuple[tuple[str, ...], ...]:
    """Read ``"n (g c) ..."`` into ``(("n",), ("g", "c"), ("...",))``.

    Raises:
        ValueError: If parentheses do not match, a name is no identifier, or a name comes twice.
    """
    items: list[tuple[str, ...]] = []
    group: list[str] | None = None
    for word in text.replace("(", " ( ").replace(")", " ) ").split():
        if word == "(" and group is None:
            group = []
        elif word == ")" and group:
            items.append(tuple(group))
            group = None
        elif word.isidentifier() and word.isascii() and not word.startswith("_") and not word.endswith("_"):
            items.append((word,)) if group is None else group.append(word)
        elif word == ELLIPSIS and group is None:
            items.append((word,))
        else:
            raise ValueError(
                f"{where}: {word!r} in {text.strip()!r} is no axis; use names such as n c h w, (g c) or ..."
            )
    if group is not None:
        raise ValueError(f"{where}: a parenthesis is left open in {text.strip()!r}; close it.")
    names = [name for item in items for name in item]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"{where}: each axis must be named once; {twice[0]!r} comes twice in {text.strip()!r}.")
    return tuple(items)


def format_axes(items: Sequence[tuple[str, ...]]) -> str:
    """The inverse of :func:`parse_axes`."""
    return " ".join(item[0] if len(item) == 1 else f"({' '.join(item)})" for item in items)


LAYOUTS = {2: ("nc",), 3: ("nlc", "ncl"), 4: ("nchw", "nhwc"), 5: ("ncdhw", "ndhwc")}
"""The layouts for each number of dimensions, the default first. ``n`` is the batch, ``c`` the channel axis."""

AXIS_TITLES = {
    "n": "samples",
    "c": "features",
    "l": "positions",
    "h": "rows",
    "w": "columns",
    "d": "depth",
    "g": "groups",
}


@dataclass(frozen=True)
class Definition:
    """One normalization: its pattern for any layout, its affine axes, and whether it subtracts the mean.

    Attributes:
        name: The name of the function, ``"batch_norm"``.
        title: The name people use, ``"Batch Norm"``.
        pattern: The pattern with ``...`` for every axis besides batch and channels.
        affine: The axes of weight and bias.
        centred: False if the mean is not subtracted (RMSNorm).
        used_in: Where it is commonly found; the one fact here that no pattern implies.
    """

    name: str
    title: str
    pattern: str
    affine: str = "c"
    centred: bool = True
    used_in: str = ""

    def at(self, layout: str) -> Pattern:
        """The pattern for a layout such as ``"nhwc"``: its letters are the axes, in order.

        Example:
            >>> print(LAYER_NORM.at("nchw"))
            n c h w -> n h w
        """
        general = Pattern.parse(self.pattern)
        channel = next(item for item in general.left if "c" in item)
        positions = tuple(axis for axis in layout if axis not in "nc")
        left = tuple(channel if axis == "c" else (axis,) for axis in layout)
        right = tuple(new for name in general.right for new in (positions if name == ELLIPSIS else (name,)))
        return Pattern(left, right)


BATCH_NORM = Definition("batch_norm", "Batch Norm", "n c ... -> c", used_in="CNNs")
LAYER_NORM = Definition("layer_norm", "Layer Norm", "n ... c -> n ...", used_in="transformers, RNNs, ConvNeXt")
RMS_NORM = Definition("rms_norm", "RMSNorm", "n ... c -> n ...", centred=False, used_in="large language models")
GROUP_NORM = Definition(
    "group_norm", "Group Norm", "n (g c) ... -> n g", "(g c)", used_in="diffusion U-Nets, detection"
)
INSTANCE_NORM = Definition("instance_norm", "Instance Norm", "n c ... -> n c", used_in="style transfer, segmentation")

DEFINITIONS = {d.name: d for d in (BATCH_NORM, LAYER_NORM, RMS_NORM, GROUP_NORM, INSTANCE_NORM)}


@dataclass(frozen=True)
class Facts:
    """What a pattern implies; each field is observed on the running norm by a test.

    Attributes:
        normalizes_across: The axes averaged away.
        depends_on_other_examples: In training, an example's output changes when another example does.
        trains_on_one_value_per_channel: A single example with one value for each channel can be trained on.
        values_per_statistic: m, the number of values behind each mean and variance.
        statistic_error: Relative standard error of the variance for Gaussian values: √(2/(m-1)), or √(2/m) for a mean
            square about zero; infinite where there is no variance.
        needs_running_statistics: Inference needs statistics gathered in training.
        communicates: Data-parallel training must exchange statistics to equal one process.
    """

    normalizes_across: tuple[str, ...]
    depends_on_other_examples: bool
    trains_on_one_value_per_channel: bool
    values_per_statistic: int
    statistic_error: float
    needs_running_statistics: bool
    communicates: bool


def facts(pattern: Pattern, sizes: Mapping[str, int], *, centred: bool = True, channel: str = "c") -> Facts:
    """Derive the facts about a norm from its pattern, for an input of these sizes."""
    m = pattern.values_per_statistic(sizes)
    freedom = m - 1 if centred else m
    return Facts(
        normalizes_across=pattern.averaged,
        depends_on_other_examples=pattern.averages_batch,
        trains_on_one_value_per_channel=channel in pattern.averaged or not centred,
        values_per_statistic=m,
        statistic_error=math.sqrt(2 / freedom) if freedom > 0 else math.inf,
        needs_running_statistics=pattern.averages_batch,
        communicates=pattern.averages_batch,
    )
