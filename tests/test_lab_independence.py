"""Layer Norm keeps an example's bits, Batch Norm does not, and either half turns the verdict."""

from __future__ import annotations

import pytest
from torch import Tensor, nn
from trials import judged

from normwise.lab.experiment import CORRECTED, FAILS
from normwise.lab.experiments import independence

EXPERIMENT = independence.EXPERIMENT


def test_it_is_true_of_the_layer_in_training(tmp_path):
    verdict, finding = judged(EXPERIMENT, tmp_path)
    assert verdict == CORRECTED
    assert finding.effect.value == 100
    assert "Batch Norm in training only" in finding.correction
    assert {"layer_norm model", "none model"} <= set(finding.others)


class Leaking(nn.Module):
    """Centres over the batch in one mode."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.leaks = mode == "training"

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0) if self.training == self.leaks else x


@pytest.mark.parametrize(
    ("norm", "broken"),
    [
        ("layer_norm", lambda: Leaking("training")),
        ("layer_norm", lambda: Leaking("evaluation")),
        ("batch_norm", nn.Identity),
    ],
    ids=["leaks in training", "leaks in evaluation", "ignores the batch"],
)
def test_each_half_turns_the_verdict(monkeypatch, norm, broken):
    layer = independence._layer
    monkeypatch.setattr(independence, "_layer", lambda name, shape: broken() if name == norm else layer(name, shape))
    verdict, finding = judged(EXPERIMENT)
    assert verdict == FAILS
    assert finding.effect.value == 0
