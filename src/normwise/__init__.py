"""Normalization for deep learning that you can trust, see through and measure."""

from . import functional, nn
from .explain import Comparison, compare
from .kernels import backends

__all__ = ["Comparison", "backends", "compare", "functional", "nn"]
__version__ = "0.1.0"
