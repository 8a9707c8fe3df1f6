"""Running experiments in tests, without files."""

from __future__ import annotations

import json
from pathlib import Path

from normwise.lab import plots
from normwise.lab.experiment import Experiment, Finding, Numbers, Plan


def judged(experiment: Experiment, draw: Path | None = None, size: str = "smoke") -> tuple[str, Finding]:
    """Verdict and finding of a run whose numbers are JSON, and its plot where asked for."""
    results: dict[str, Numbers] = {}
    for trial in experiment.trials(Plan(size)):
        results[trial.name] = trial.run(results)
    results = json.loads(json.dumps(results, allow_nan=False))
    finding = experiment.judge(results)
    for cell in (finding.batch_norm, finding.layer_norm):
        assert len(cell) <= 90, cell
    if draw:
        plots.draw(experiment, results, draw)
        assert {path.suffix for path in draw.iterdir()} == {".svg", ".png"}
    return experiment.verdict(finding), finding
