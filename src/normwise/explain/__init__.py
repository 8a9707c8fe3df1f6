"""What norms do to a batch: computed once as data, then shown as text, JSON or HTML."""

from .comparison import Comparison, compare
from .load import Batch, load_batch

__all__ = ["Batch", "Comparison", "compare", "load_batch"]
