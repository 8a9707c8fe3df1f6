"""The experiment on the noise of batch statistics: its verdict, and that it turns."""

from __future__ import annotations

import pytest
import torch
from trials import judged

from normwise import functional
from normwise.lab.experiment import FAILS, HOLDS
from normwise.lab.experiments import batch_noise
from normwise.lab.intervals import agrees, exact

batch_norm, layer_norm = functional.batch_norm, functional.layer_norm


@pytest.fixture
def untrained(monkeypatch):
    """Normal activations of the models' shapes."""

    def activations(kind, norm, seeds, epochs):
        shapes = [(32,), (32,)] if kind == "MLP" else [(4, 8, 8), (8, 4, 4)]
        return [torch.randn(500, len(seeds), *shape) for shape in shapes], [10.0 for _ in seeds]

    monkeypatch.setattr(batch_noise, "activations", activations)


def test_noise_is_what_the_formula_says(tmp_path):
    verdict, finding = judged(batch_noise.EXPERIMENT, tmp_path)
    assert verdict == HOLDS
    assert finding.others["normal, sd of the variance at 2"].value == pytest.approx(100 * 2**0.5, rel=0.05)
    known = batch_noise._pools("smooth", [0], 1)[1]["counts"]
    assert finding.others["smooth, independent values an example"].value == pytest.approx(known, rel=0.1)
    assert str(finding.others["an example's y, Layer Norm at 2"]) == "0 %"
    assert not agrees(finding.others["an example's y, Batch Norm at 2"], exact(0.0, "%"))


def ignores_the_batch(x, mean, var, training, momentum=0.1):
    return x


def remembers_the_biased_variance(x, mean, var, training, momentum=0.1):
    y = batch_norm(x, mean, var, training=training, momentum=momentum)
    if var is not None:
        var *= (len(x) - 1) / len(x)
    return y


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize("broken", [ignores_the_batch, remembers_the_biased_variance])
def test_wrong_statistics_are_seen(monkeypatch, broken):
    monkeypatch.setattr(functional, "batch_norm", broken)
    assert judged(batch_noise.EXPERIMENT)[0] == FAILS


@pytest.mark.usefixtures("untrained")
def test_a_layer_norm_that_leaks_is_seen(monkeypatch):
    monkeypatch.setattr(functional, "layer_norm", lambda x, shape: layer_norm(x, shape) - 0.1 * x.roll(1, 0))
    finding = judged(batch_noise.EXPERIMENT)[1]
    assert finding.others["an example's y, Layer Norm at 2"].low > 1
    assert "moves by 0 %" not in finding.layer_norm
