import hashlib
import math
import os
from pathlib import Path

import pytest
import torch

from normwise import functional
from normwise.lab import language
from normwise.lab.experiment import CORRECTED, FAILS, HOLDS, UNDECIDED, Plan
from normwise.lab.experiments import language_model

TEXT = {"python": "3", "bytes": {"test": 1}, "sha256": {}, "n-grams": {"3": {"nats": 2.05}}, "updates": {"2": 1000}}
CURVE = {"rates": [0.001, 0.01, 0.1], "nats": [3.0, 2.0, 4.0], "best": 0.01, "inside": True}


def judged(batch_norm, none):
    """From test losses of three seeds beside Layer Norm's 2 nats."""
    losses = {"layer_norm": 0.0, "rms_norm": 0.5, "batch_norm": batch_norm, "none": none}
    results = {"text": TEXT} | {f"tune {norm} 2": CURVE for norm in losses}
    for norm, gap in losses.items():
        results[f"train {norm} 2"] = {"running": [2 + gap + 0.001 * gap * seed for seed in range(3)]}
    finding = language_model.judge(results)
    return language_model.EXPERIMENT.verdict(finding), finding.correction


def test_it_says_what_counting_does_and_the_gap_at_6_layers():
    losses = {"2": {"layer_norm": 2.0, "batch_norm": 2.01}, "6": {"layer_norm": 2.1, "batch_norm": 2.2}}
    results = {"text": TEXT | {"updates": {"2": 1000, "6": 250}}}
    for depth, of in losses.items():
        for norm in language_model.NORMS:
            loss = of.get(norm, of["layer_norm"])
            results[f"tune {norm} {depth}"] = CURVE
            results[f"train {norm} {depth}"] = {"running": [loss, loss + 0.01]}
    finding = language_model.judge(results)
    assert finding.batch_norm.endswith("; at 6 layers 0.1 nats over Layer Norm")
    assert ", 1,000 updates; " in finding.layer_norm
    assert "2 layers, 1,000 updates: all models predict better than counting 3 bytes; the worst by +0.035 nats" in (
        finding.sentences
    )
    assert "6 layers, 250 updates: not all models predict better than counting 3 bytes; the worst by -0.155 nats" in (
        finding.sentences
    )


def test_the_verdict_follows_the_losses():
    assert judged(0.1, 0.1) == (HOLDS, "")
    assert judged(-0.1, 0.1) == (FAILS, "")
    assert judged(0.02, 0.1) == (UNDECIDED, "")
    verdict, correction = judged(0.1, 0.001)
    assert verdict == CORRECTED
    assert "no norm is as good" in correction


def test_the_smoke_run_and_one_whose_batch_norm_is_layer_norm(monkeypatch):
    monkeypatch.setattr(language_model, "GRIDS", {2: (0.001, 0.003, 0.01)})
    monkeypatch.setattr(language_model, "tune", lambda *args: CURVE | {"best": 0.003})
    trials = [t for t in language_model.trials(Plan("smoke")) if "batch_norm" in t.name or "layer_norm" in t.name]
    results = {"text": TEXT, "tune none 2": CURVE}
    for trial in trials:
        results[trial.name] = trial.run(results)
    results["train none 2"] = results["train layer_norm 2"]
    assert language_model.judge(results).effect.value > 0
    assert set(results["train batch_norm 2"]) == {"running", "re-estimated", "training mode"}

    def broken(x, mean, var, weight, bias, *args, **named):
        rows = functional.normalize(x.unflatten(1, (-1, language.WIDTH)), "n r c -> n r").flatten(1)
        return rows * weight + bias

    monkeypatch.setattr(functional, "batch_norm", broken)
    for trial in trials:
        results[trial.name] = trial.run(results)
    finding = language_model.judge(results)
    assert language_model.EXPERIMENT.verdict(finding) == FAILS
    assert abs(finding.effect.value) < 1e-4


@pytest.mark.parametrize("norm", language.NORMS)
def test_replicates_are_as_good_as_apart(norm):
    setting = language.Setting(norm, 3, 2)
    text = language.drawn("test", [0, 1], 4)
    together = language.mean_nats(language.train(setting, [(0, 0.01), (1, 0.003)]), text)
    for i, run in enumerate([(0, 0.01), (1, 0.003)]):
        alone = language.mean_nats(language.train(setting, [run]), text[:, i : i + 1])
        assert alone == pytest.approx([together[i]], abs=1e-3)


def test_what_diverges_counts_as_a_guess():
    model = language.train(language.Setting("none", 3, 1), [(0, 1e6)])
    assert language.mean_nats(model, language.drawn("test", [0], 2)) == [math.log(256)]


def test_counted_bytes():
    text = torch.tensor([97, 98, 99] * 2000)
    found = language_model._ngrams(dict.fromkeys(("train", "validation", "test"), text))
    assert found["1"]["nats"] == pytest.approx(math.log(3), abs=1e-2)
    assert found["2"]["nats"] == pytest.approx(0, abs=1e-2)


def test_the_files_are_apart_and_hashed():
    names = [name for part in language.FILES.values() for name in part.split()]
    assert len(names) == len(set(names)) == len(language.corpus().hashes)
    text = (Path(os.__file__).parent / "random.py").read_bytes()
    assert language.corpus().hashes["random.py"] == hashlib.sha256(text).hexdigest()


def test_a_python_without_source_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(language.os, "__file__", str(tmp_path / "os.py"))
    with pytest.raises(ValueError, match=r"source text; .*argparse\.py: No such file"):
        language.corpus.__wrapped__()
