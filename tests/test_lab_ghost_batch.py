"""Small groups hurt, and a Batch Norm that knows no groups turns the verdict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from normwise.lab import plots
from normwise.lab.experiment import FAILS, HOLDS, Plan, Results
from normwise.lab.experiments import ghost_batch
from normwise.lab.replicates import mlp


def run(but: str | None = None) -> Results:
    found: dict[str, Any] = {}
    for trial in ghost_batch.trials(Plan("smoke")):
        if but is None or but not in trial.name:
            found[trial.name] = trial.run(found)
    return found


def test_small_groups_hurt(tmp_path: Path) -> None:
    found = run()
    plots.draw(ghost_batch.EXPERIMENT, found, tmp_path)
    assert ghost_batch.EXPERIMENT.verdict(ghost_batch.judge(found)) == HOLDS
    others = ghost_batch.judge(found).others
    assert {"64 - 2 examples, re-estimated", "64 - 2 examples, in training mode"} <= others.keys()
    assert all(numbers["inside"] for name, numbers in found.items() if name.startswith("tune batch_norm"))


def test_a_batch_norm_that_ignores_its_groups_turns_the_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    def whole(norm: str, generators: Any, group: int | None = None, **settings: Any) -> nn.Module:
        return mlp(norm, generators, **settings)

    monkeypatch.setattr(ghost_batch, "mlp", whole)
    found = run(but="none")
    assert found["train batch_norm 2"]["running"] == found["train batch_norm 64"]["running"]
    assert ghost_batch.EXPERIMENT.verdict(ghost_batch.judge(found)) == FAILS
