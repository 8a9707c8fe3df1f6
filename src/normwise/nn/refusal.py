"""Why a norm cannot change its class without losing behaviour."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn


def why_not(norm: nn.Module, known: Collection[type[nn.Module]]) -> str:
    """The reason against it, or ``""``; ``known`` are the classes whose behaviour is kept."""
    kind = type(norm).__name__
    if isinstance(norm, nn.modules.batchnorm._LazyNormBase):
        return f"{kind} is not initialized; run one batch first"
    if type(norm) not in known:
        return f"{kind} is a subclass and may add behaviour"
    return "its forward is patched on the instance" if "forward" in vars(norm) else ""


def in_lines(reasons: Mapping[str, str]) -> str:
    """A line for each norm's name in its model."""
    return "\n".join(f"  {name or 'the model itself'}: {why}" for name, why in reasons.items())
