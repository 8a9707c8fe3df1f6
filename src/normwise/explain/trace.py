"""The computation of one norm on one batch, as immutable data: every number that a renderer shows stands here.

:class:`Norm` says what to compute, :func:`trace` computes it with the reference and keeps each step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import checks, reference
from ..definitions import Facts, Pattern, facts, parse_axes
from ..reference import Normalized, Rows, Statistics

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Running:
    """Running statistics, and how they came about.

    Attributes:
        mean: Running mean: for each kept axis, or of shape (C) if a layer brought it along.
        var: Running variance, shaped like ``mean``.
        momentum: The weight of each new batch; None for the plain average.
        steps: Training steps on this batch that led here; None if a layer brought them along.
    """

    mean: Array
    var: Array
    momentum: float | None
    steps: int | None


@dataclass(frozen=True, eq=False)
class Norm:
    """One normalization to compute: the pattern, its parameters and, in eval, the statistics to use.

    Attributes:
        name: ``"batch_norm"``, or ``"pattern"`` for one given by its axes alone.
        title: What the screen calls it.
        pattern: Which axes keep statistics of their own.
        affine: The axes of weight and bias.
        centred: False for RMSNorm.
        eps: Added to the variance, inside the root.
        given: The parts of split axes, such as the number of groups.
        weight: Over the affine axes, or None.
        bias: Over the affine axes, or None.
        running: Statistics for eval, where the norm keeps any.
        training: If False, and there are running statistics, they are used.
        fresh: False for a layer of the user's, which has its own running statistics or none.
    """

    name: str
    title: str
    pattern: Pattern
    affine: str = "c"
    centred: bool = True
    eps: float = 1e-5
    given: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    weight: Array | None = None
    bias: Array | None = None
    running: Running | None = None
    training: bool = True
    fresh: bool = True

    @property
    def uses_running(self) -> bool:
        """True if the batch itself is not looked at for statistics."""
        return not self.training and self.running is not None

    @property
    def channel(self) -> str:
        """What the pattern calls the channels; of a split axis the part that is averaged away."""
        if self.name != "pattern":
            return "c"
        (item,) = parse_axes(self.affine, "affine")
        return next((name for name in item if name in self.pattern.averaged), item[-1])

    def rows(self, x: Tensor) -> Rows:
        """How this norm maps ``x`` to rows."""
        return Rows.of(self.pattern, x.shape, self.affine, centred=self.centred, given=self.given)

    def run(self, x: Tensor) -> Normalized:
        """The reference on ``x``."""
        fixed: Statistics | None = None
        if self.uses_running and self.running is not None:
            fixed = reference.fixed_statistics(
                torch.tensor(self.running.mean), torch.tensor(self.running.var), self.eps
            )
        weight, bias = (None if p is None else torch.tensor(p) for p in (self.weight, self.bias))
        return reference.normalize(x, self.rows(x), weight, bias, self.eps, fixed=fixed)

    def refusal(self, x: Tensor) -> str:
        """Why this norm cannot train on ``x``, in one sentence; empty if it can."""
        rows = self.rows(x)
        if self.uses_running or self.pattern.values_per_statistic(rows.sizes) != 1:
            return ""
        channel = next(i for i, item in enumerate(self.pattern.left) if self.channel in item)
        moved = x.movedim(channel, 1)
        try:
            if self.name == "batch_norm":
                checks.check_values_per_channel(self.name, moved, None)
            elif self.name == "instance_norm":
                checks.check_values_per_instance(self.name, moved)
            elif self.name == "group_norm":
                checks.check_values_per_group(self.name, moved, self.given["g"])
            else:
                checks.check_affine(self.name, rows, None, None)
        except ValueError as error:
            return str(error)
        return ""


@dataclass(frozen=True, eq=False)
class Backward:
    """The gradient for one cotangent, with the three terms of dx = direct + through_mean + through_var."""

    dy: Array
    direct: Array
    through_mean: Array
    through_var: Array
    dx: Array
    dweight: Array
    dbias: Array


@dataclass(frozen=True, eq=False)
class Trace:
    """Each step of one norm on one batch; arrays are float64, read-only, and shaped as their comment says.

    Attributes:
        norm: What was computed.
        facts: What follows from its pattern at this size.
        sizes: The length of each axis of the pattern.
        refused: Why there is no result, or empty.
        mean: Mean for each kept axis, () if none is kept; zeros if the norm is not centred.
        var: Biased variance, or mean square, shaped like ``mean``.
        rstd: ``1 / sqrt(var + eps)``, shaped like ``mean``.
        xhat: Normalized input, shaped like it.
        y: The output, rounded to the input's type.
        backward: The gradient, if asked for.
    """

    norm: Norm
    facts: Facts
    sizes: Mapping[str, int]
    refused: str
    mean: Array
    var: Array
    rstd: Array
    xhat: Array
    y: Array
    backward: Backward | None = None


def trace(x: Tensor, norm: Norm, dy: Tensor | None = None) -> Trace:
    """Compute every step of ``norm`` on ``x``, and with ``dy`` its gradient."""
    rows = norm.rows(x)
    derived = facts(norm.pattern, rows.sizes, centred=norm.centred, channel=norm.channel)
    sizes = MappingProxyType(rows.sizes)
    refused = norm.refusal(x)
    if refused:
        none = frozen(torch.empty(0))
        return Trace(norm, derived, sizes, refused, none, none, none, none, none)
    y, xhat, stats = norm.run(x)
    backward = None if dy is None else _backward(x, dy, norm, rows, stats)
    kept = [rows.sizes[axis] for axis in norm.pattern.right]
    mean, var, rstd = (frozen(s.squeeze(-1).expand(kept)) for s in stats)
    return Trace(norm, derived, sizes, "", mean, var, rstd, frozen(xhat), frozen(y), backward)


def _backward(x: Tensor, dy: Tensor, norm: Norm, rows: Rows, stats: Statistics) -> Backward:
    ones = rows.gather(torch.ones_like(x, dtype=torch.float64))
    weight = torch.ones_like(ones) if norm.weight is None else torch.tensor(norm.weight)
    grads = reference.normalize_backward(dy, x, rows, weight, torch.float64, stats, fixed=norm.uses_running)
    full = rows.split(x)
    direct, through_mean, through_var = (frozen(rows.join(term.expand_as(full))) for term in grads.terms)
    dweight, dbias = (g if g is not None else ones for g in (grads.dweight, grads.dbias))
    return Backward(frozen(dy), direct, through_mean, through_var, frozen(grads.dx), frozen(dweight), frozen(dbias))


def running_after(t: Trace, steps: int, momentum: float) -> Running:
    """The running statistics of a fresh layer after ``steps`` training steps on the batch of this trace.

    On one batch, k steps with momentum m are one step with momentum ``1 - (1 - m)**k``.
    """
    shape = [t.sizes[axis] for axis in t.norm.pattern.right]
    running_mean, running_var = torch.zeros(math.prod(shape)).double(), torch.ones(math.prod(shape)).double()
    if steps and not t.refused:
        mean, var = (torch.tensor(a).reshape(-1) for a in (t.mean, t.var))
        share = momentum if steps == 1 else 1 - (1 - momentum) ** steps
        reference.update_running_(running_mean, running_var, None, mean, var, t.facts.values_per_statistic, share)
    return Running(frozen(running_mean.reshape(shape)), frozen(running_var.reshape(shape)), momentum, steps)


def frozen(values: Tensor) -> Array:
    """A read-only float64 copy."""
    array: Array = values.detach().to("cpu", torch.float64, copy=True).contiguous().numpy()
    array.setflags(write=False)
    return array
