"""The verdict on gradient accumulation, and what turns it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from trials import judged

from normwise.lab.experiment import FAILS, HOLDS
from normwise.lab.experiments import accumulation

EXPERIMENT = accumulation.EXPERIMENT


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(accumulation, "DEPTHS", (2, 4))
    yield
    torch.set_num_threads(threads)


def test_it_holds(tmp_path):
    verdict, finding = judged(EXPERIMENT, tmp_path)
    assert verdict == HOLDS
    assert float(finding.layer_norm.split()[2]) < 1e-12
    assert finding.others["Batch Norm, running statistics, 4 norms: log10 of the error"].value > -1


class PerExample(nn.BatchNorm2d):
    def forward(self, input):
        return nn.functional.instance_norm(input, weight=self.weight, bias=self.bias)


class Leaking(nn.Module):
    def forward(self, x):
        return x - 1e-3 * x.mean()


@pytest.mark.parametrize(
    ("name", "norm"), [("batch_norm", PerExample), ("layer_norm", lambda channels: Leaking())], ids=["ignores", "leaks"]
)
def test_a_broken_norm_turns_it(monkeypatch, name, norm):
    monkeypatch.setitem(accumulation.NORMS, name, norm)
    assert judged(EXPERIMENT)[0] == FAILS


def test_statistics_of_the_batch_make_its_outputs():
    torch.manual_seed(0)
    model, x = accumulation._network("batch_norm", 2).double(), torch.rand(64, 1, 8, 8, dtype=torch.float64)
    want = model(x)
    accumulation._take_statistics(model, x)
    assert torch.allclose(model.eval()(x), want, rtol=1e-12, atol=1e-12)
