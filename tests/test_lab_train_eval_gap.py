"""The gap between training and evaluation: its verdict, its causes, and causes planted by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from trials import judged

import normwise.nn.batch_norm as layers
from normwise import functional
from normwise.lab import replicates, switched
from normwise.lab.experiment import FAILS, HOLDS
from normwise.lab.experiments import train_eval_gap

EXPERIMENT = train_eval_gap.EXPERIMENT


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_it_holds_and_planted_causes_are_found(tmp_path):
    verdict, finding = judged(EXPERIMENT, tmp_path)
    assert verdict == HOLDS
    assert finding.layer_norm.startswith("0 % of predictions change")
    planted = [sentence for sentence in finding.sentences if sentence.startswith("planted")]
    assert len(planted) == 3
    assert all(sentence.endswith(": found") for sentence in planted), planted
    remainders = [float(part.split()[1]) for s in finding.sentences for part in s.split(", ") if "remainder" in part]
    assert len(remainders) == 2
    assert max(remainders) < 1e-9


def test_a_batch_norm_that_ignores_the_batch_turns_it(monkeypatch):
    def ignores(x, running_mean, running_var, weight, bias, training, momentum, eps, **_):
        return functional.layer_norm(x, x.shape[1:2], weight, bias, eps)

    monkeypatch.setattr(layers.functional, "batch_norm", ignores)
    assert judged(EXPERIMENT)[0] == FAILS


def test_a_layer_norm_that_depends_on_the_mode_turns_it(monkeypatch):
    class Leaking(replicates.LayerNorm):
        def forward(self, x):
            return super().forward(x - x.mean(0) if self.training else x)

    monkeypatch.setattr(replicates, "LayerNorm", Leaking)
    assert judged(EXPERIMENT)[0] != HOLDS


def test_all_off_is_evaluation_and_all_on_is_training():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8))
    for _ in range(5):
        model(3 + torch.randn(16, 5))
    x, y = torch.randn(12, 5), torch.randn(64, 5)
    with torch.no_grad():
        fixed = [(m.running_mean, m.running_var) for m in (model[1], model[4])], switched.population(model, y)
        one, two = switched.mixed(model, x, fixed, "", 4), switched.mixed(model, x, fixed, "lag shift noise bias", 4)
        assert torch.allclose(one, copy.deepcopy(model).eval()(x), atol=1e-5)
        assert torch.allclose(two, torch.cat([copy.deepcopy(model)(part) for part in x.split(4)]), atol=1e-5)


def test_shapley_shares_out_what_causes_do_together():
    """Worth by hand: lag 3, noise -5, lag and shift together 4 more."""
    worth = {
        on: [3.0 * ("lag" in on) - 5.0 * ("noise" in on) + 4.0 * ("lag" in on and "shift" in on)]
        for on in switched.subsets()
    }
    assert len(worth) == 16
    found = {cause: share[0] for cause, share in switched.shapley(worth).items()}
    assert found == pytest.approx({"lag": 5.0, "shift": 2.0, "noise": -5.0, "bias": 0.0})
