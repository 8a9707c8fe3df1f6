"""The experiment on single examples: its verdict, and that it turns."""

from __future__ import annotations

import pytest
import torch
from trials import judged

from normwise import functional
from normwise.lab.experiment import CORRECTED, FAILS, HOLDS
from normwise.lab.experiments import one_at_a_time

batch_norm, layer_norm = functional.batch_norm, functional.layer_norm


@pytest.fixture(autouse=True)
def untimed(monkeypatch):
    monkeypatch.setattr(one_at_a_time, "_seconds", lambda module, x: 1.0)


def test_both_norms_infer_and_one_trains(tmp_path):
    verdict, finding = judged(one_at_a_time.EXPERIMENT, tmp_path)
    assert verdict == CORRECTED
    assert finding.others["training, layer_norm"].value == 0
    assert finding.others["training, batch_norm"].value == 100
    assert finding.sentences[0].startswith("Batch Norm refuses to train on 100.0 [")
    assert "training refuses 100 %" in finding.batch_norm


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(one_at_a_time, "SHAPES", {"features": (32,), "image": (4, 6, 6)})


def leaks(x, *arguments):
    return layer_norm(x - x.mean(0), *arguments)


def refuses(x, *arguments):
    if len(x) == 1:
        raise ValueError("layer_norm: it must have two examples.")
    return layer_norm(x, *arguments)


def spoils(x, *arguments):
    return layer_norm(x, *arguments) * (float("nan") if len(x) == 1 else 1)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("broken", [leaks, refuses, spoils])
def test_a_layer_norm_that_needs_others_turns_the_verdict(monkeypatch, broken):
    monkeypatch.setattr(functional, "layer_norm", broken)
    assert judged(one_at_a_time.EXPERIMENT)[0] == FAILS


@pytest.mark.usefixtures("small")
def test_a_batch_norm_that_needs_others_in_evaluation_corrects_nothing(monkeypatch):
    def always_of_the_batch(x, mean, var, weight, bias, training, *rest, **named):
        if len(x) == 1:
            raise ValueError("batch_norm: it must have two examples.")
        return batch_norm(x, mean, var, weight, bias, True, *rest, **named)

    monkeypatch.setattr(functional, "batch_norm", always_of_the_batch)
    verdict, finding = judged(one_at_a_time.EXPERIMENT)
    assert verdict == HOLDS
    assert finding.others["norm, batch_norm"].low > 99


def test_the_folded_model_computes_the_same():
    for shape in one_at_a_time.SHAPES.values():
        x = one_at_a_time._drawn(4, shape)
        torch.manual_seed(0)
        model = one_at_a_time._model("batch_norm", shape)
        torch.manual_seed(0)
        folded = one_at_a_time._model("folded", shape)
        assert len(folded) == len(model) - 1
        torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-4)
