"""Norms of models that run on many processes: what they share, whether they agree, and what it costs."""

from .gradients import parameter_gradients
from .profiling import Profile, profile
from .replicas import check_replicas, synchronize_running_stats

__all__ = ["Profile", "check_replicas", "parameter_gradients", "profile", "synchronize_running_stats"]
