"""Normalization for deep learning that you can trust, see through and measure."""

from . import distributed, functional, nn
from .explain import Comparison, compare, record
from .kernels import backends

__all__ = ["Comparison", "backends", "compare", "distributed", "functional", "nn", "record"]
__version__ = "0.1.0"
