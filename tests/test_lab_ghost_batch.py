"""Small groups hurt, and a Batch Norm that knows no groups turns the verdict."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from normwise.lab.experiment import FAILS, HOLDS, Plan, Results
from normwise.lab.experiments import ghost_batch
from normwise.lab.replicates import mlp


def run() -> Results:
    found: dict[str, Any] = {}
    for trial in ghost_batch.trials(Plan("smoke")):
        if "none" not in trial.name:
            found[trial.name] = trial.run(found)
    return found


def test_small_groups_hurt() -> None:
    found = run()
    assert ghost_batch.EXPERIMENT.verdict(ghost_batch.judge(found)) == HOLDS
    assert all(numbers["inside"] for name, numbers in found.items() if name.startswith("tune batch_norm"))


def test_a_batch_norm_that_ignores_its_groups_turns_the_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    def whole(norm: str, generators: Any, group: int | None = None, **settings: Any) -> nn.Module:
        return mlp(norm, generators, **settings)

    monkeypatch.setattr(ghost_batch, "mlp", whole)
    found = run()
    assert found["train batch_norm 2"]["running"] == found["train batch_norm 64"]["running"]
    assert ghost_batch.EXPERIMENT.verdict(ghost_batch.judge(found)) == FAILS
