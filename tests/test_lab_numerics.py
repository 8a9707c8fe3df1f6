"""The experiment on right numbers: its verdict, and that it turns."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from trials import judged

from normwise import functional
from normwise.lab.experiment import CORRECTED, FAILS, HOLDS
from normwise.lab.experiments import numerics


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(numerics, "LAYOUTS", dict.fromkeys(("batch_norm", "layer_norm"), ("rows",)))


def test_normwise_is_right_and_torch_is_not(tmp_path):
    verdict, finding = judged(numerics.EXPERIMENT, tmp_path)
    assert verdict == CORRECTED
    assert finding.others["dx, normwise"].low > 6.3  # A1: 5e-7
    assert finding.others["y, torch"].high < 2
    assert "1e6 (rms_norm)" in finding.sentences[0]


@pytest.mark.usefixtures("small")
def test_where_torch_is_right_too_nothing_is_corrected(monkeypatch):
    monkeypatch.setattr(numerics, "LIBRARIES", {"normwise": functional, "torch": functional})
    assert judged(numerics.EXPERIMENT)[0] == HOLDS


def one_pass(x, shape, weight, bias, eps=1e-5):
    mean = x.mean(-1, keepdim=True)
    return (x - mean) * ((x * x).mean(-1, keepdim=True) - mean * mean + eps).rsqrt() * weight + bias


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("broken", [one_pass, lambda x, *_: x * float("nan"), lambda x, *_: x, F.layer_norm])
def test_one_wrong_norm_is_enough(monkeypatch, broken):
    if broken not in (one_pass, F.layer_norm):
        broken = lambda x, shape, w, b, made=broken: made(x) * w + b  # noqa: E731
    monkeypatch.setattr(functional, "layer_norm", broken)
    verdict, finding = judged(numerics.EXPERIMENT)
    assert verdict == FAILS
    assert finding.effect.high < 2


def test_digits():
    assert [numerics._digits(e) for e in (None, 0.0, 1e-7, 3.0)] == pytest.approx([0, 16, 7, 0])


def test_the_layouts_are_what_they_say():
    for layout, form in (("channels_last", torch.channels_last), ("NCHW", torch.contiguous_format)):
        dy, x, *_ = numerics._drawn(layout, (2, 3, 4, 4), 1.0, torch.bfloat16)
        assert dy.is_contiguous(memory_format=form)
        assert x.is_contiguous(memory_format=form)
        kept = numerics.F.batch_norm(x, None, None, training=True)
        assert kept.is_contiguous(memory_format=form)
