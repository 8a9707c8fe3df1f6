"""Small batches: what is trained, the verdict and how it turns, and images from a folder."""

from __future__ import annotations

import gzip
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from normwise import functional
from normwise.lab import data as images
from normwise.lab import replicates
from normwise.lab.experiment import CORRECTED, FAILS, HOLDS, Plan
from normwise.lab.experiments import batch_size
from normwise.lab.replicates import NORMS, Setting, cnn, digits, mlp, train

PLAN = Plan("smoke")
EXPERIMENT = batch_size.EXPERIMENT


def verdict(results: dict[str, Any]) -> str:
    return EXPERIMENT.verdict(batch_size.judge(results))


def run(results: dict[str, Any], *, norm: str = "") -> dict[str, Any]:
    """The MLP's trials, or those of a norm over the results of others."""
    found = dict(results)
    for trial in batch_size.trials(PLAN):
        if "mlp" in trial.name and norm in trial.name:
            found[trial.name] = trial.run(found)
    return found


@pytest.fixture(scope="module")
def smoke() -> dict[str, Any]:
    return run({})


def test_the_smoke_run_decides(smoke: dict[str, Any]) -> None:
    assert verdict(smoke) == HOLDS
    finding = batch_size.judge(smoke)
    assert finding.effect.low > 10
    assert "refused" in finding.batch_norm
    assert any("1 value per channel in training has no variance" in sentence for sentence in finding.sentences)


def test_a_batch_norm_that_ignores_the_batch_turns_the_verdict(
    smoke: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(x: Tensor, mean: Any, var: Any, weight: Tensor, bias: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return F.layer_norm(x.unflatten(1, (-1, 64)), (64,)).flatten(1) * weight + bias

    monkeypatch.setattr(functional, "batch_norm", broken)
    found = smoke | run(smoke, norm="batch_norm 2") | {"tune mlp batch_norm 1": {}, "train mlp batch_norm 1": {}}
    assert verdict(found) == FAILS


def numbers(mlp_at_2: float, cnn_at_2: float, batches: tuple[int, ...] = (64, 2)) -> dict[str, Any]:
    """Results in which Layer Norm is so far ahead at batch 2, and Batch Norm two points at others."""
    found: dict[str, Any] = {"train mlp batch_norm 1": {"refused": "batch_norm: 1 value per channel."}}
    for model, lead in (("mlp", mlp_at_2), ("cnn", cnn_at_2)):
        for batch in batches:
            for norm in NORMS:
                score = 90 - (lead if batch == 2 else -2) * (norm == "batch_norm")
                seeds = [score + 0.01 * (i - 4.5) * (norm == "batch_norm") for i in range(10)]
                found[f"train {model} {norm} {batch}"] = {"running": seeds, "values": 16 * batch}
    return found


@pytest.mark.parametrize(
    ("mlp_at_2", "cnn_at_2", "expected"), [(20, 5, HOLDS), (20, 0, CORRECTED), (0, 0, FAILS), (-3, 5, FAILS)]
)
def test_verdicts_follow_the_numbers(mlp_at_2: float, cnn_at_2: float, expected: str) -> None:
    assert verdict(numbers(mlp_at_2, cnn_at_2)) == expected


def test_where_batch_norm_is_ahead_is_said() -> None:
    found = batch_size.judge(numbers(20, 0))
    assert found.sentences[0] == (
        "Batch Norm is ahead of Layer Norm in the MLP at batch 64 (2.0 points), CNN at batch 64 (2.0 points)"
    )
    assert "CNN at batch 2 (32 values: " in found.correction


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("model", [partial(mlp, hidden=(16, 16)), partial(cnn, channels=(4, 8))], ids=("mlp", "cnn"))
def test_replicates_do_not_touch_each_other(model: Any, norm: str) -> None:
    data, runs = digits(), [(0, 0, 0.1), (1, 3, 0.03), (2, 1, 1e4)]
    together, _ = train(Setting(partial(model, norm, data=data), runs, 8, 5), data)
    for r, run in enumerate(runs[:2]):
        alone, _ = train(Setting(partial(model, norm, data=data), [run], 8, 5), data)
        for p, q in zip(together.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(p.view(len(runs), -1)[r], q.flatten(), rtol=1e-4, atol=1e-5)


def test_training_is_torchs_sgd() -> None:
    data = digits()
    setting = Setting(partial(mlp, "none", data=data, hidden=(16,)), [(0, 0, 0.1)], 8, 5, cosine=False)
    ours, splits = train(setting, data)
    model = mlp("none", [g := torch.Generator().manual_seed(1_000_003)], data, hidden=(16,))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _, i in zip(range(5), replicates._batches(splits, [g], 8), strict=False):
        optimizer.zero_grad()
        F.cross_entropy(model(data.x[i[:, 0]]), data.y[i[:, 0]]).backward()
        optimizer.step()
    for p, q in zip(ours.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def idx(values: np.ndarray) -> bytes:
    return bytes((0, 0, 8, values.ndim)) + np.array(values.shape, ">u4").tobytes() + values.tobytes()


def mnist(folder: Path, zipped: bool = False, count: int = 60) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    x = draw.integers(0, 256, (count, 28, 28), np.uint8)
    y = np.arange(count, dtype=np.uint8) % 10
    for name, values in (("images-idx3", x), ("labels-idx1", y)):
        path = folder / f"train-{name}-ubyte{'.gz' * zipped}"
        path.write_bytes(gzip.compress(idx(values)) if zipped else idx(values))
    return x, y


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "EXAMPLES", 50)


@pytest.mark.parametrize("zipped", [False, True])
def test_mnist_is_read(tmp_path: Path, zipped: bool) -> None:
    x, y = mnist(tmp_path, zipped)
    found = images.images(str(tmp_path))
    assert (found.x.shape, found.side, found.channels, found.classes) == ((50, 196), 14, 1, 10)
    assert found.x[7].reshape(14, 14)[2, 3] == pytest.approx(x[7, 4:6, 6:8].mean() / 255)
    assert found.y.tolist() == y[:50].tolist()


def test_cifar_is_read_and_trained_on(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).integers(0, 256, (60, 3073), np.uint8)
    rows[:, 0] = np.arange(60) % 10
    (tmp_path / "data_batch_1.bin").write_bytes(rows.tobytes())
    found = images.images(str(tmp_path))
    assert (found.x.shape, found.side, found.channels) == ((50, 768), 16, 3)
    assert found.x[3, 256] == pytest.approx(rows[3, 1 + 1024 :].reshape(2, 32, 32)[0, :2, :2].mean() / 255)
    assert found.y.tolist() == rows[:50, 0].tolist()
    plan = Plan("smoke", data=str(tmp_path))
    trained = batch_size._train("cnn batch_norm 2", plan, {"tune cnn batch_norm 2": {"best": 0.01}})
    assert len(trained["running"]) == 3


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", ["nothing", "short", "few", "kind", "gzip", "cifar"])
def test_a_wrong_folder_is_one_sentence(tmp_path: Path, damage: str) -> None:
    if damage not in ("nothing", "cifar"):
        mnist(tmp_path, damage == "gzip", 40 if damage == "few" else 60)
    if damage == "short":
        shorten(tmp_path / "train-images-idx3-ubyte")
    if damage == "gzip":
        (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(b"no gzip")
    if damage == "kind":
        (tmp_path / "train-images-idx3-ubyte").write_bytes(b"\x80\x04pickle")
    if damage == "cifar":
        (tmp_path / "data_batch_1.bin").write_bytes(bytes(3074))
    with pytest.raises(ValueError, match=r"^data: [^\n]* must hold MNIST's [^\n]*; give their folder\.$"):
        images.images(str(tmp_path))
