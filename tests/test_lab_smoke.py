"""The smoke size, whole, of the experiments of which other tests run parts; half a minute for all."""

from __future__ import annotations

from pathlib import Path

import pytest
from trials import judged

from normwise.lab.experiment import CORRECTED, FAILS, HOLDS, UNDECIDED
from normwise.lab.experiments import EXPERIMENTS

IN_PARTS = (
    "batch_noise", "batch_size", "one_at_a_time", "language_model", "leak", "padding", "in_use",
    "accumulation", "numerics",
)  # fmt: skip


@pytest.mark.parametrize("name", IN_PARTS)
def test_the_smoke_size_runs_decides_and_draws(name: str, tmp_path: Path) -> None:
    verdict, finding = judged(EXPERIMENTS[name], tmp_path)
    assert verdict in (HOLDS, CORRECTED, FAILS, UNDECIDED)
    assert finding.effect.low <= finding.effect.value <= finding.effect.high
