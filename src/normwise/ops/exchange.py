"""Operators that exchange values with the other processes of a group, so that compiled programs can hold them."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from .. import exchange
from .common import declare

Place = tuple[str, str, str]
"""Where processes meet: the name of their group, the layer, and the settings that must be alike."""


def _sum_over_processes(values: Tensor, group: str, layer: str, settings: str, direction: str) -> Tensor:
    return exchange.of_group(group).sum(values, layer, settings, direction)


def _gather_over_processes(values: Tensor, group: str, layer: str, settings: str, direction: str) -> Tensor:
    return torch.stack(exchange.of_group(group).gather(values, layer, settings, direction))


declare(
    "sum_over_processes(Tensor values, str group, str layer, str settings, str direction) -> Tensor",
    _sum_over_processes,
    lambda values, *args: torch.empty_like(values),
)
declare(
    "gather_over_processes(Tensor values, str group, str layer, str settings, str direction) -> Tensor",
    _gather_over_processes,
    lambda values, group, *args: values.new_empty(exchange.of_group(group).world, *values.shape),
)


def refuse_second_derivative(layer: str, instead: str) -> None:
    """Called in backward: what it would exchange has no gradient.

    Raises:
        RuntimeError: If autograd records this backward.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{layer}: a second derivative across processes is not there; create_graph was set; {instead}."
        )


def in_order(parts: Tensor) -> Tensor:
    """The sum of what was gathered, from the first rank to the last: the same bits on every process."""
    return reduce(torch.add, parts.unbind())
