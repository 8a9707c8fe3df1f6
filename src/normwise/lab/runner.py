"""Running experiments: what has run is kept, what has not is run."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from . import plots, results
from .experiment import Experiment, Numbers, Plan, Trial
from .results import Record

Progress = Callable[[Trial, float, float], None]
"""Called before each trial with the weight that is done and the weight of all."""


def run(
    experiment: Experiment,
    plan: Plan,
    folder: Path,
    *,
    fresh: bool = False,
    progress: Progress = lambda trial, done, total: None,
) -> Record:
    """Run what has not run yet; each trial's numbers are on disk before the next begins.

    Args:
        experiment: What to run.
        plan: Size and first seed.
        folder: Where the results and plots are.
        fresh: If True, forget an earlier run first.
        progress: Told of each trial before it runs.

    Returns:
        The complete record.

    Raises:
        ValueError: If the folder holds results of another size, seed or code, or cannot be written, or data is given
            that the experiment does not use.
        RuntimeError: If a package of the lab is missing.
    """
    results.need_packages()
    if plan.data is not None and not experiment.takes_data:
        raise ValueError(f"data: the experiment must use images; {experiment.name} has its own data; leave it out.")
    trials = experiment.trials(plan)
    record = Record(experiment.name, plan, results.fingerprint(experiment), len(trials))
    if fresh or results.load(folder, experiment.name) is None:
        results.save(folder, experiment, record)  # what cannot be written is told before an hour has passed
    total = sum(trial.weight for trial in trials)
    done = 0.0
    for trial in trials:
        record = _joined(record, folder, trials)
        if trial.name not in record.trials:
            progress(trial, done, total)
            start = time.perf_counter()
            numbers = trial.run(record.trials)
            record.trials[trial.name] = _finite(numbers, f"{experiment.name}, {trial.name}")
            record.seconds[trial.name] = round(time.perf_counter() - start, 3)
            record = _joined(record, folder, trials)
            results.save(folder, experiment, record)
        done += trial.weight
    try:
        plots.draw(experiment, record.trials, folder)
    except OSError as error:
        plot = folder / experiment.name
        raise ValueError(
            f"plot: {plot}.svg and .png must be writable; {error.strerror}; choose another folder."
        ) from None
    return record


def _joined(record: Record, folder: Path, trials: Sequence[Trial]) -> Record:
    """With what is on disk by now, of an earlier run or of one that runs beside this: no finished trial is lost."""
    found = results.load(folder, record.experiment)
    if found is None:
        return record
    if found.plan != record.plan or found.code != record.code:
        was, now = str(found.plan), str(record.plan) if found.plan != record.plan else "of other code"
        raise ValueError(
            f"run: {results.path_of(folder, record.experiment)} must be of this plan to go on; it is {was}, asked for "
            f"is {now}; use --fresh to run it anew, or another folder."
        )
    done = found.trials | record.trials
    seconds = found.seconds | record.seconds
    found.trials = {trial.name: done[trial.name] for trial in trials if trial.name in done}
    found.seconds = {name: seconds[name] for name in found.trials if name in seconds}
    return found


def _finite(numbers: Numbers, place: str) -> Numbers:
    """What JSON can hold: numbers that are not, or what is no number at all, would be lost or break the file."""
    try:
        return json.loads(json.dumps(numbers, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"run: {place}: every number must be finite; {error}; store null instead.") from None
