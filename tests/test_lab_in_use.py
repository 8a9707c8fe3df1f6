"""Norms are known by what they do, and the verdict by the architectures that are there."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from trials import judged

import normwise as nw
from normwise.lab import kinds
from normwise.lab.experiment import FAILS, HOLDS, UNDECIDED, Plan
from normwise.lab.experiments import in_use

EXPERIMENT = in_use.EXPERIMENT


class T5LayerNorm(nn.Module):
    """An RMSNorm with a misleading name."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return self.weight * x * x.square().mean(-1, keepdim=True).add(1e-6).rsqrt()


class GatedNorm(T5LayerNorm):
    def forward(self, x, gate=None):
        return super().forward(x * gate.sigmoid())


class PlainNorm(nn.Module):
    def forward(self, x):
        return x / 2


class LengthNorm(T5LayerNorm):
    """(N, C, L), channels normalized."""

    def forward(self, x):
        assert x.ndim == 3
        return nn.functional.layer_norm(x.mT, x.shape[1:2], self.weight).mT


class FrozenNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(size))


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: nn.LayerNorm(24), "layer_norm"),
        (lambda: nn.LayerNorm((3, 8), elementwise_affine=False), "layer_norm"),
        (lambda: nw.nn.LayerNorm(24), "layer_norm"),
        (lambda: nw.nn.LayerNorm2d(24), "layer_norm"),
        (lambda: nn.RMSNorm(24), "rms_norm"),
        (lambda: T5LayerNorm(24), "rms_norm"),
        (lambda: GatedNorm(24), "rms_norm"),
        (lambda: LengthNorm(24), "layer_norm"),
        (lambda: nn.BatchNorm1d(24), "batch_norm"),
        (lambda: nn.BatchNorm2d(24, track_running_stats=False), "batch_norm"),
        (lambda: FrozenNorm(24), "batch_norm"),
        (lambda: nn.GroupNorm(4, 24), "group_norm"),
        (lambda: nn.GroupNorm(1, 24), "group_norm"),
        (lambda: nn.InstanceNorm2d(24), "group_norm"),
        (PlainNorm, None),
    ],
)
def test_a_norm_is_what_it_does(make, kind):
    with torch.device("meta"):
        layer = make()
    assert kinds.kind_of(layer) == kind


def test_norms_are_counted():
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.Sequential(nn.LayerNorm(8), T5LayerNorm(8)), PlainNorm())
    assert kinds.norms_in(model, {}) == {"layer_norm": 2, "rms_norm": 1}


class Attention(nn.Identity):
    pass


@pytest.fixture
def registry(monkeypatch):
    """160 of each, of whatever norm each is given."""
    chosen: dict[str, type[nn.Module]] = {}

    def build(package, task, model_type):
        if model_type == "broken 0":
            raise RuntimeError("\nno such thing\nat all")
        norm = chosen[model_type.split()[0]]
        return nn.Sequential(norm(8), nn.Identity() if task == "images" else Attention())

    names = {"causal language": ["llm", "broken"], "images": ["cnn"], "image backbones": []}
    listed = lambda task: [f"{name} {i}" for name in names[task] for i in range(160 if name != "broken" else 1)]  # noqa: E731
    monkeypatch.setattr(in_use, "_architectures", listed)
    monkeypatch.setattr(in_use, "_build", build)
    monkeypatch.setitem(sys.modules, "transformers", PACKAGE)
    return chosen


PACKAGE = SimpleNamespace(
    __version__="0", logging=SimpleNamespace(get_verbosity=int, set_verbosity=bool, set_verbosity_error=int)
)


@pytest.mark.parametrize(
    ("cnn", "llm", "verdict"),
    [
        (nn.BatchNorm2d, nn.LayerNorm, HOLDS),
        (nn.BatchNorm2d, T5LayerNorm, FAILS),
        (nn.BatchNorm2d, nn.BatchNorm1d, FAILS),
        (nn.BatchNorm2d, lambda size: nn.Identity(), FAILS),
        (nn.LayerNorm, nn.LayerNorm, FAILS),
    ],
)
def test_each_half_turns_the_verdict(registry, cnn, llm, verdict, tmp_path):
    registry |= {"llm": llm, "cnn": cnn}
    found, finding = judged(EXPERIMENT, tmp_path)
    assert found == verdict
    assert finding.effect.value == (100 if verdict == HOLDS else 0)


def test_without_a_convolutional_network_nothing_is_decided(registry):
    registry |= {"llm": nn.LayerNorm}
    found = {"causal language": in_use._count("causal language", 1, {})}
    assert EXPERIMENT.verdict(EXPERIMENT.judge(found)) == UNDECIDED


def test_what_cannot_be_built_is_named_and_counted(registry):
    registry |= {"llm": nn.LayerNorm, "cnn": nn.LayerNorm}
    found = {task: in_use._count(task, 1, {}) for task in ("causal language", "images")}
    assert found["causal language"]["failed"] == {"broken 0": "RuntimeError: no such thing"}
    text = "\n".join(EXPERIMENT.judge(found).sentences)
    assert (
        "had the 1 language models that cannot be built another norm, Layer Norm were that of 99.4 [96.6, 100.0] %"
        in text
    )
    assert "causal language, not built: broken 0" in text


def test_without_the_package_it_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(RuntimeError, match=r"^in_use: transformers must be installed; it is not; run `[^`]+`\.$"):
        EXPERIMENT.trials(Plan("smoke"))[0].run({})


def test_of_the_real_package():
    pytest.importorskip("transformers")
    found = in_use._count("images", 8, {})
    norms = {name: model["norms"] for name, model in found["built"].items()}
    assert sum(found.get("layer_norm", 0) > 0 for found in norms.values()) > 1
    assert not (set(in_use._architectures("causal language")) & set(in_use._architectures("masked language")))
