"""Normalization for deep learning that you can trust, see through and measure."""

from . import functional, nn

__all__ = ["functional", "nn"]
__version__ = "0.1.0"
