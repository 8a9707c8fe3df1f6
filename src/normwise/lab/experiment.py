"""What an experiment is: a claim, the trials that measure it, and how their numbers decide on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast, get_args

from .intervals import Effect

if TYPE_CHECKING:
    from matplotlib.figure import Figure

T = TypeVar("T")
Size = Literal["smoke", "standard", "full"]
Numbers = dict[str, Any]
"""What a trial finds, as JSON: every raw number, each finite."""

Results = Mapping[str, Numbers]
"""The numbers of each trial that has run, by its name."""

HOLDS, CORRECTED, FAILS, UNDECIDED = "holds", "holds corrected", "does not hold", "undecided"


@dataclass(frozen=True)
class Plan:
    """How much to do: a smoke test, what the evidence is made of, or more of it; from which seed on; on which images.

    Args:
        size: How much.
        seed_base: The first seed.
        data: The folder whose images are used in the place of the digits, where an experiment can; see `data.images`.
    """

    size: Size = "standard"
    seed_base: int = 0
    data: str | None = None

    def __str__(self) -> str:
        """Size, seeds and data."""
        return f"{self.size}, seeds from {self.seed_base}" + (f", data of {self.data}" if self.data else "")

    def choose(self, smoke: T, standard: T, full: T) -> T:
        """The one for this size."""
        return {"smoke": smoke, "standard": standard, "full": full}[self.size]

    def seeds(self, smoke: int = 3, standard: int = 10, full: int = 30) -> Sequence[int]:
        """So many different ones; runs whose bases are 1,000 apart share none."""
        return range(self.seed_base, self.seed_base + self.choose(smoke, standard, full))


def plan(size: str, seed_base: int = 0, data: str | None = None) -> Plan:
    """The plan of this size.

    Raises:
        ValueError: If the size is unknown.
    """
    if size not in get_args(Size):
        raise ValueError(f"size: it must be one of {', '.join(get_args(Size))}; got {size!r}; choose one of these.")
    return Plan(cast(Size, size), seed_base, data)


@dataclass(frozen=True)
class Trial:
    """A piece of work whose numbers are kept as soon as it is done.

    Args:
        name: Told by nothing else in the experiment.
        run: Called with the numbers of the trials before it.
        weight: Its time beside the others', for the time that is left.
    """

    name: str
    run: Callable[[Results], Numbers]
    weight: float = 1.0


@dataclass(frozen=True)
class Contrast:
    """The one comparison that decides on a claim, fixed before the trials run.

    Args:
        text: What is compared with what.
        smallest: The smallest effect of interest, in the effect's unit.
        equal: If True, the claim is that there is no effect of interest; else that there is one, above zero.
    """

    text: str
    smallest: float
    equal: bool = False

    def verdict(self, effect: Effect) -> str:
        """What the effect's interval says of the claim.

        Example:
            >>> Contrast("a - b", smallest=1.0).verdict(Effect(3.0, 2.0, 4.0)), HOLDS
            ('holds', 'holds')
        """
        if self.equal:
            holds = -self.smallest < effect.low and effect.high < self.smallest
            fails = effect.low >= self.smallest or effect.high <= -self.smallest
        else:
            holds, fails = effect.low >= self.smallest, effect.high < self.smallest
        return HOLDS if holds else FAILS if fails else UNDECIDED


@dataclass(frozen=True)
class Finding:
    """What the numbers say.

    Args:
        effect: Of the contrast.
        batch_norm: The table's cell: a few words with the measured figure.
        layer_norm: The same.
        sentences: What else they say, a sentence each.
        correction: Where the contrast holds but the claim's words reach further than the numbers: what is true instead.
        others: More effects with intervals, by what they compare.
    """

    effect: Effect
    batch_norm: str
    layer_norm: str
    sentences: Sequence[str] = ()
    correction: str = ""
    others: Mapping[str, Effect] = field(default_factory=dict)


@dataclass(frozen=True)
class Experiment:
    """One claim and its measurement.

    Args:
        name: What the command line calls it.
        aspect: The first column of the table.
        claim: In one sentence, as people say it.
        contrast: What decides.
        method: The question, an empty line, and how it is measured.
        trials: Everything to do, in order.
        judge: From the numbers of all trials to what they say.
        plot: Draws them.
        takes_data: Whether it can use a folder's images.
    """

    name: str
    aspect: str
    claim: str
    contrast: Contrast
    method: str
    trials: Callable[[Plan], list[Trial]]
    judge: Callable[[Results], Finding]
    plot: Callable[[Figure, Results], None]
    takes_data: bool = False

    def verdict(self, finding: Finding) -> str:
        """Holds, holds corrected, does not hold or undecided."""
        found = self.contrast.verdict(finding.effect)
        return CORRECTED if found == HOLDS and finding.correction else found
