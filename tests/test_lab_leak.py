import pytest
import torch

from normwise import functional
from normwise.lab import language
from normwise.lab.experiment import FAILS, Plan
from normwise.lab.experiments import leak

BATCH_NORM = functional.batch_norm


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    short = lambda setting, runs: TRAIN(language.Setting(setting.norm, 10, 2), runs)  # noqa: E731
    monkeypatch.setattr(leak, "train", short)
    monkeypatch.setattr(leak, "tune", lambda *args: {"best": 0.003, "inside": True})


TRAIN = leak.train


def finding():
    found = {}
    for trial in leak.trials(Plan("smoke")):
        found[trial.name] = trial.run(found)
    return leak.judge(found)


def test_batch_norm_moves_in_training_alone_and_layer_norm_never():
    found = finding()
    assert found.effect.value > 0.01
    assert leak.EXPERIMENT.verdict(found) != FAILS
    for case in ("layer_norm 8, training", "layer_norm 8, evaluation", "batch_norm 8, evaluation"):
        assert found.others[case].high == 0
    assert "training" in found.correction


def test_a_batch_norm_that_ignores_the_batch_sees_nothing(monkeypatch):
    def broken(x, mean, var, weight, bias, *args, **named):
        return BATCH_NORM(x, mean, var, weight, bias, False)

    monkeypatch.setattr(functional, "batch_norm", broken)
    found = finding()
    assert leak.EXPERIMENT.verdict(found) == FAILS
    assert found.effect.value == 0


def test_a_layer_norm_that_leaks_takes_the_difference_away(monkeypatch):
    def leaky(x, *args):
        return functional.normalize(x, "n r c -> r c")

    monkeypatch.setattr(functional, "layer_norm", leaky)
    assert leak.EXPERIMENT.verdict(finding()) == FAILS


def test_running_statistics_that_move_in_evaluation_leave_no_correction(monkeypatch):
    def always_training(x, mean, var, weight, bias, training, *args, **named):
        return BATCH_NORM(x, mean, var, weight, bias, True, *args, **named)

    monkeypatch.setattr(functional, "batch_norm", always_training)
    assert not finding().correction


def test_training_mode_leaves_the_running_statistics():
    model = TRAIN(language.Setting("batch_norm", 2, 2), [(0, 0.003)])
    before = [buffer.clone() for buffer in model.buffers()]
    with language.training_mode(model):
        language.mean_nats(model, language.drawn("test", [0], 4))
    assert not model.training
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))
