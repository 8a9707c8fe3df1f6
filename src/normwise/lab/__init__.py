"""Experiments that measure a claim about norms instead of repeating it."""

from .distributed import Report, distributed_cost
from .experiment import Experiment, Plan, plan
from .runner import run

__all__ = ["Experiment", "Plan", "Report", "distributed_cost", "plan", "run"]
