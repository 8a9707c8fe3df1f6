"""Learning rates that work: the window, the verdict and how it turns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from normwise import functional
from normwise.lab import plots
from normwise.lab.experiment import CORRECTED, FAILS, HOLDS, Plan
from normwise.lab.experiments.speed_stability import EXPERIMENT, TRAP, judge, trials, window

PLAN = Plan("smoke")


def run(results: dict[str, Any], norm: str = "") -> dict[str, Any]:
    return results | {t.name: t.run(results) for t in trials(PLAN) if norm in t.name}


@pytest.fixture(scope="module")
def smoke() -> dict[str, Any]:
    return run({})


def test_the_smoke_run_decides(smoke: dict[str, Any], tmp_path: Path) -> None:
    finding = judge(smoke)
    plots.draw(EXPERIMENT, smoke, tmp_path)
    assert EXPERIMENT.verdict(finding) in (HOLDS, CORRECTED)
    assert any(sentence.startswith("the trap") for sentence in finding.sentences)
    others = {f"Batch Norm, 8 layers: window, {how}" for how in ("in training mode", "re-estimated")}
    assert others <= finding.others.keys()
    assert smoke["batch_norm 8"]["accuracies"].keys() == {"running", "in training mode", "re-estimated"}


def test_a_batch_norm_that_does_nothing_turns_the_verdict(
    smoke: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(x: Tensor, mean: Any, var: Any, weight: Tensor, bias: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x * weight + bias

    monkeypatch.setattr(functional, "batch_norm", broken)
    assert EXPERIMENT.verdict(judge(run(smoke, "batch_norm"))) == FAILS


@pytest.mark.parametrize(
    ("accuracies", "decades"),
    [([95, 95, 95], 2), ([0, 0, 0], 0), ([80, 100, 80], 1), ([95, 89, 95], 2 * 5 / 6), ([90, 0, 0], 0)],
    ids=str,
)
def test_windows(accuracies: list[float], decades: float) -> None:
    assert window([0.1, 1.0, 10.0], accuracies) == pytest.approx(decades)


def numbers(batch_norm: float, layer_norm: float) -> dict[str, Any]:
    """Windows of so many decades at 8 layers, of half a decade without a norm; 20 updates to the target, and 40."""
    found: dict[str, Any] = {}
    for name, decades in (("none 8", 0.5), (TRAP, 0.1), ("batch_norm 8", batch_norm), ("layer_norm 8", layer_norm)):
        found[name] = {
            "rates": [0.01, 1.0],
            "updates": 168,
            # 100 % at the first rate, and 90 % as far from it as the window is wide
            "first": [[40 if "none" in name else 20, None]] * 10,
            "accuracies": {"running": [[100.0, 100 - 20 / (decades + 0.001 * seed)] for seed in range(10)]},
        }
    return found


@pytest.mark.parametrize(("batch_norm", "expected"), [(0.6, FAILS), (0.9, FAILS), (1.5, HOLDS)])
def test_verdicts_follow_the_numbers(batch_norm: float, expected: str) -> None:
    assert EXPERIMENT.verdict(judge(numbers(batch_norm, 1.5))) == expected


def test_what_is_not_so_of_layer_norm_is_the_correction() -> None:
    found = judge(numbers(1.5, 0.7))
    assert found.effect.value == pytest.approx(1.0, abs=0.01)
    assert EXPERIMENT.verdict(found) == CORRECTED
    assert "Layer Norm at 8 layers" in found.correction
    assert "Batch Norm" not in found.correction
    assert "2 x as fast" in found.batch_norm
