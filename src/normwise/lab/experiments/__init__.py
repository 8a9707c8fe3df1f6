"""The experiments, in the order of the table."""

from __future__ import annotations

from collections.abc import Sequence

from ..experiment import Experiment
from . import (
    accumulation,
    batch_noise,
    batch_size,
    data_parallel,
    ghost_batch,
    in_use,
    independence,
    intuition,
    language_model,
    leak,
    numerics,
    one_at_a_time,
    padding,
    speed_stability,
    train_eval_gap,
)

EXPERIMENTS: dict[str, Experiment] = {
    module.EXPERIMENT.name: module.EXPERIMENT
    for module in (
        speed_stability,
        intuition,
        independence,
        batch_noise,
        ghost_batch,
        batch_size,
        train_eval_gap,
        one_at_a_time,
        language_model,
        leak,
        padding,
        in_use,
        data_parallel,
        accumulation,
        numerics,
    )
}


def chosen(names: Sequence[str]) -> list[Experiment]:
    """The experiments of these names, in the order of the table; all of them for ``"all"``.

    Raises:
        ValueError: If a name is unknown.
    """
    for name in names:
        if name not in EXPERIMENTS and name != "all":
            raise ValueError(f"name: it must be all or one of {', '.join(EXPERIMENTS)}; got {name!r}; choose of these.")
    return [experiment for name, experiment in EXPERIMENTS.items() if name in names or "all" in names]
