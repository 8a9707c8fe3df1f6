"""The experiment on what becomes alike: its verdict, and that it turns."""

from __future__ import annotations

import pytest
import torch
from trials import judged

from normwise import functional
from normwise.lab.experiment import FAILS, HOLDS
from normwise.lab.experiments import intuition

layer_norm = functional.layer_norm


def test_batch_norm_makes_features_alike_not_samples(tmp_path):
    verdict, finding = judged(intuition.EXPERIMENT, tmp_path)
    assert verdict == FAILS
    assert "the features alike" in finding.sentences[0]
    assert "the samples alike" in finding.sentences[1]
    worked = finding.others["worked batch: spread of the samples' means after Batch Norm"]
    # Samples spread by √1.25 of values with variance 1.25 + 8/3; after Batch Norm they are all the spread there is.
    assert worked.value == pytest.approx(100 * ((1.25 + 8 / 3) / 1.25) ** 0.5, abs=0.01)


def test_a_batch_norm_that_does_it_turns_the_verdict(monkeypatch):
    monkeypatch.setattr(functional, "batch_norm", lambda x, *_, training: layer_norm(x, x.shape[1:]))
    verdict, finding = judged(intuition.EXPERIMENT)
    assert verdict == HOLDS
    assert "the samples alike" in finding.sentences[0]


def test_norms_that_do_nothing_make_nothing_alike(monkeypatch):
    monkeypatch.setattr(functional, "batch_norm", lambda x, *_, training: x)
    monkeypatch.setattr(functional, "layer_norm", lambda x, _: x)
    verdict, finding = judged(intuition.EXPERIMENT)
    assert verdict == FAILS
    assert finding.effect.value == 0
    assert all("neither alike" in sentence for sentence in finding.sentences)


def test_spreads_have_no_scale():
    x = torch.randn(16, 4, 3, 3) + torch.randn(16, 1, 1, 1)
    assert intuition._spreads(x) == pytest.approx(intuition._spreads(1000 * x + 7), rel=1e-4)
