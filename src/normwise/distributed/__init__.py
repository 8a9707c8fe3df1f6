"""Norms of models that run on many processes: what they share, whether they agree, and what it costs."""

from ._layer_norm import layer_norm, rms_norm
from .dtensor import register_dtensor
from .gradients import parameter_gradients
from .profiling import Profile, profile
from .replicas import check_replicas, synchronize_running_stats
from .sequence import sequence_parallel

__all__ = [
    "Profile",
    "check_replicas",
    "layer_norm",
    "parameter_gradients",
    "profile",
    "register_dtensor",
    "rms_norm",
    "sequence_parallel",
    "synchronize_running_stats",
]
