"""What becomes of a network whose batch is split over real processes."""

from __future__ import annotations

import pytest
from torch import nn
from trials import judged

from normwise.lab.experiment import CORRECTED, FAILS
from normwise.lab.experiments import data_parallel

EXPERIMENT = data_parallel.EXPERIMENT


def test_it_holds_of_local_batch_norm_only(tmp_path):
    verdict, finding = judged(EXPERIMENT, tmp_path)
    assert verdict == CORRECTED
    for name in ("no norm", "Layer Norm", "SyncBatchNorm"):
        assert finding.others[f"changed on 4 processes: {name}"].high < 0.1
    assert "0 collectives" in finding.layer_norm
    assert "for 2 collectives a norm and step" in finding.correction


class Free(nn.Identity):
    """A norm that nothing has to be known for."""

    def __init__(self, num_features, process_group, reproducible) -> None:
        super().__init__()


class Local(nn.BatchNorm1d):
    def __init__(self, num_features, process_group, reproducible) -> None:
        super().__init__(num_features)


@pytest.mark.parametrize(
    "broken",
    [
        {"batch_norm": ("batch_norm", Free)},
        {"layer_norm": ("batch_norm", Local), "sync_batch_norm": ("batch_norm", Local)},
    ],
    ids=["Batch Norm ignores the batch", "Layer Norm leaks and SyncBatchNorm is local"],
)
def test_a_broken_norm_turns_it(monkeypatch, broken):
    monkeypatch.setattr(data_parallel, "WORLDS", (1, 2))
    for name, layer in broken.items():
        monkeypatch.setitem(data_parallel.LAYERS, name, layer)
    verdict, finding = judged(EXPERIMENT)
    assert verdict == FAILS
    assert bool(finding.correction) == ("sync_batch_norm" not in broken)
