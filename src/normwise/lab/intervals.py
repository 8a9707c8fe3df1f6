"""Estimates with 95 % confidence intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Effect:
    """An estimate.

    Args:
        value: The estimate.
        low: Where its interval begins.
        high: Where it ends.
        unit: Of all three: ``"points"``, ``"nats"``, ``"x"``.
        error: The standard error, 0 of what is known exactly.
        freedom: Degrees of freedom of the standard error, infinite where none is estimated.
    """

    value: float
    low: float
    high: float
    unit: str = ""
    error: float = 0.0
    freedom: float = math.inf

    def __str__(self) -> str:
        """The estimate and its interval, rounded to what the interval tells."""
        unit = f" {self.unit}" if self.unit else ""
        if self.low == self.high:
            return f"{self.value:.6g}{unit}"
        spread = self.high - self.low
        decimals = max(0, 1 - math.floor(math.log10(spread))) if math.isfinite(spread) and spread > 0 else 3
        value, low, high = (f"{round(v, decimals) + 0.0:.{decimals}f}" for v in (self.value, self.low, self.high))
        return f"{value} [{low}, {high}]{unit}"


def exact(value: float, unit: str = "") -> Effect:
    """What has no error of sampling, as a count of bits in one run."""
    return Effect(value, value, value, unit)


def mean(values: Sequence[float], unit: str = "") -> Effect:
    """The mean over seeds; of paired seeds, give the differences.

    Raises:
        ValueError: If there are fewer than two values.

    Numerics:
        Student's interval: the mean, plus and minus the quantile of the t distribution times the standard error.

    Example:
        >>> print(mean([1.0, 2.0, 3.0], "points"))
        2.0 [-0.5, 4.5] points
    """
    if len(values) < 2:
        raise ValueError(f"mean: an interval needs 2 or more seeds; got {len(values)}; run more.")
    center, error = statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
    half = quantile(len(values) - 1) * error
    return Effect(center, center - half, center + half, unit, error, len(values) - 1)


def share(hits: int, of: int, unit: str = "%") -> Effect:
    """How often something happens, in percent.

    Raises:
        ValueError: If nothing was tried.

    Numerics:
        The interval of Clopper and Pearson, which covers the truth at least as often as it says.

    Example:
        >>> print(share(0, 100))
        0.0 [0.0, 3.6] %
    """
    from scipy.stats import binomtest  # type: ignore[import-untyped]

    if of < 1:
        raise ValueError(f"share: it needs 1 or more tries; got {of}; run more.")
    low, high = binomtest(hits, of).proportion_ci(CONFIDENCE, "exact")
    p = hits / of
    return Effect(100 * p, 100 * low, 100 * high, unit, 100 * math.sqrt(p * (1 - p) / of))


def agrees(first: Effect, second: Effect) -> bool:
    """Whether a second run's estimate is where the first says: 95 of 100 are, if the intervals are honest.

    Numerics:
        The difference against its own interval, since both runs err; degrees of freedom by Welch and Satterthwaite.
        Where neither has a standard error both intervals must meet.
    """
    error = math.hypot(first.error, second.error)
    if error == 0:
        return first.low <= second.high and second.low <= first.high
    shares = sum((e.error / error) ** 4 / e.freedom for e in (first, second))
    return abs(first.value - second.value) <= quantile(1 / shares if shares else math.inf) * error


def quantile(freedom: float) -> float:
    """What a t variable of so many degrees of freedom stays within, in 95 of 100 draws."""
    from scipy.stats import norm, t

    upper = (1 + CONFIDENCE) / 2
    return float(norm.ppf(upper) if math.isinf(freedom) else t.ppf(upper, freedom))
