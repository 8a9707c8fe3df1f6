import pytest
import torch

from normwise import functional
from normwise.lab.experiment import CORRECTED, FAILS, HOLDS, Plan
from normwise.lab.experiments import padding

BATCH_NORM, LAYER_NORM = functional.batch_norm, functional.layer_norm


def results():
    found = {}
    for trial in padding.trials(Plan("smoke")):
        found[trial.name] = trial.run(found)
    return found


def verdict(found):
    return padding.EXPERIMENT.verdict(padding.judge(found))


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(padding, "train", lambda setting, runs: TRAIN(padding.Setting("layer_norm", 2, 1), runs))


TRAIN = padding.train


def test_padding_changes_batch_norm_unless_there_is_a_mask():
    found = results()
    assert verdict(found) == CORRECTED
    assert "mask" in padding.judge(found).correction
    assert max(found["text"]["layer_norm 75"]["other bits"]) == 0


def test_a_mask_that_does_nothing_leaves_no_correction(monkeypatch):
    monkeypatch.setattr(functional, "batch_norm", lambda *args, mask=None, **named: BATCH_NORM(*args, **named))
    found = results()
    assert verdict(found) == HOLDS
    assert not padding.judge(found).correction


def test_a_batch_norm_that_ignores_the_batch_fails(monkeypatch):
    def broken(x, *args, mask=None, **named):
        y = (x - 0.1) * 0.7
        return y if mask is None else y * mask[:, None]

    monkeypatch.setattr(functional, "batch_norm", broken)
    assert verdict(results()) == FAILS


def test_a_layer_norm_that_sees_the_padding_fails(monkeypatch):
    def leaky(x, shape, *args):
        return BATCH_NORM(x.transpose(1, 2), None, None, training=True).transpose(1, 2) if x.ndim == 3 else x

    monkeypatch.setattr(functional, "layer_norm", leaky)
    assert verdict(results()) == FAILS


def test_zeros_are_counted_by_the_closed_form():
    x = torch.randn(16, 64, 64, generator=torch.Generator().manual_seed(0))
    x -= x.mean((0, 1))
    plain, half = (padding._normalized("batch_norm", x, count)[0] for count in (0, 64))
    torch.testing.assert_close(half, plain * 2**0.5, rtol=1e-4, atol=1e-5)
