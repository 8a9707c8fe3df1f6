"""How far a run is, on stderr: a bar with the time left on a terminal, a line for each trial elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from .experiment import Experiment, Trial

Show = Callable[[Experiment, Trial, float, float], None]
"""The trial that begins, the weight of its experiment that is done, and the weight of all of it."""


@contextmanager
def shown(experiments: Sequence[Experiment]) -> Iterator[Show]:
    """Show the trials of these experiments as they begin; the time left is the current experiment's."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    places = {e.name: f"{e.name} ({i} of {len(experiments)})" for i, e in enumerate(experiments, 1)}
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda experiment, trial, done, total: print(
            f"{places[experiment.name]}: {trial.name}, {done / total:.0%} done", file=sys.stderr, flush=True
        )
        return
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task("")
        current = None

        def show(experiment: Experiment, trial: Trial, done: float, total: float) -> None:
            nonlocal current
            if experiment is not current:
                current = experiment
                bars.reset(task)
            bars.update(task, description=f"{places[experiment.name]}: {trial.name}", completed=done, total=total)

        yield show
