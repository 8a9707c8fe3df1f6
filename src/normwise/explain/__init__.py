"""What norms do to a batch: computed once as data, then shown as text, JSON, a page or a figure."""

from .comparison import Comparison, compare
from .load import Batch, load_batch
from .recorder import record
from .recording import Recording, load_recording
from .sharing import cube

__all__ = ["Batch", "Comparison", "Recording", "compare", "cube", "load_batch", "load_recording", "record"]
