"""Experiments that measure a claim about norms instead of repeating it."""

from .distributed import Report, distributed_cost

__all__ = ["Report", "distributed_cost"]
