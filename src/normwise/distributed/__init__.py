"""Norms of models that run on many processes: what they share, whether they agree, and what it costs."""

from .gradients import parameter_gradients

__all__ = ["parameter_gradients"]
