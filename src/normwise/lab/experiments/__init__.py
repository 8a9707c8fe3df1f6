"""The experiments, in the order of the table."""

from ..experiment import Experiment
from . import ghost_batch, independence

EXPERIMENTS: dict[str, Experiment] = {
    module.EXPERIMENT.name: module.EXPERIMENT for module in (independence, ghost_batch)
}
