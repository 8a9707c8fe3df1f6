"""`normwise.record`: what it keeps of a training run, that it changes nothing, and its files."""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_compare import HOSTILE, Page
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import normwise as nw
from normwise.explain import Recording, load_recording, recorder
from normwise.explain.recording import OF_CHANNELS, OF_GROUPS, QUANTITIES, Layer


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.Dropout(), nn.GroupNorm(3, 12), nn.Flatten(), nn.Linear(12 * 36, 5),
        nw.nn.LayerNorm(5),
    )  # fmt: skip


def images() -> Tensor:
    return torch.randn(4, 3, 8, 8) + 2


# What is recorded


CASES: list[tuple[nn.Module, tuple[int, ...], str]] = [
    (nn.LayerNorm(6), (4, 5, 6), "n l c -> n l"),
    (nn.LayerNorm(6), (6,), "c -> "),
    (nn.LayerNorm((5, 6)), (4, 5, 6), "n l c -> n"),
    (nw.nn.RMSNorm(6), (4, 6), "n c -> n"),
    (nw.nn.LayerNorm2d(6), (4, 6, 3, 2), "n c h w -> n h w"),
    (nn.GroupNorm(2, 6), (4, 6, 3, 2), "n (g c) h w -> n g"),
    (nn.InstanceNorm2d(6), (4, 6, 3, 2), "n c h w -> n c"),
    (nn.InstanceNorm1d(6, track_running_stats=True), (6, 5), "c l -> c"),
]


def grouped(x: Tensor, pattern: str) -> Tensor:
    """A row for each group of a pattern, by einsum-like axes and nothing of the recorder's."""
    left, right = ([*side.replace("(g c)", "g c").split()] for side in pattern.split("->"))
    sizes = [n for letter, n in zip(pattern.replace("(g c)", "G").split(), x.shape, strict=False)
             for n in ((2, n // 2) if letter == "G" else (n,))]  # fmt: skip
    order = [left.index(a) for a in right] + [i for i, a in enumerate(left) if a not in right]
    return x.double().reshape(sizes).permute(order).reshape(math.prod(sizes[left.index(a)] for a in right), -1)


@pytest.mark.parametrize(("layer", "shape", "pattern"), CASES, ids=[f"{i}-{c[0]}" for i, c in enumerate(CASES)])
@pytest.mark.parametrize("block", [2**20, 7])
def test_groups(
    layer: nn.Module, shape: tuple[int, ...], pattern: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "BLOCK", block)
    x = torch.randn(shape) * 3 + 100
    with nw.record(layer) as recording:
        layer(x)
    rows = grouped(x, pattern)
    means, variances = rows.mean(1), rows.var(1, correction=0)
    (found,) = recording.layers
    assert (found.name, found.kind, found.channels) == ("", type(layer).__name__, (0,))
    expected = [means.mean(), variances.mean(), means.std(correction=0), variances.std(correction=0)]
    np.testing.assert_allclose(found.rows[0][:, 0], expected, rtol=1e-9, atol=1e-10)
    assert found.of("running_mean") is None


@pytest.mark.parametrize(
    "make", [nn.BatchNorm2d, nw.nn.BatchNorm2d, lambda c: nw.nn.SyncBatchNorm(c, allow_local=True)]
)
def test_channels(make: Callable[[int], nn.Module]) -> None:
    layer = make(20).to(torch.bfloat16)
    x = (torch.randn(4, 20, 3, 2) * 3 + torch.arange(20)[:, None, None]).bfloat16()
    with nw.record(layer) as recording:
        for i in range(3):
            layer(x + i)
    (found,) = recording.layers
    chosen = list(found.channels)
    assert (len(chosen), chosen[0], chosen[-1]) == (8, 0, 19)
    assert set(np.diff(chosen)) <= {2, 3}
    exact = (x + 2).double()[:, chosen].movedim(1, 0).flatten(1)
    np.testing.assert_allclose(found.of("mean")[2], exact.mean(1), rtol=1e-12)
    np.testing.assert_allclose(found.of("var")[2], exact.var(1, correction=0), rtol=1e-12)
    assert found.of("running_mean")[2].tolist() == layer.running_mean[chosen].double().tolist()
    assert found.of("running_var")[2].tolist() == layer.running_var[chosen].double().tolist()
    assert (found.of("running_mean")[0] != found.of("running_mean")[2]).all()


@pytest.mark.parametrize(("channels", "chosen"), [(1, (0,)), (3, (0, 1, 2)), (8, tuple(range(8)))])
def test_all_of_few_channels(channels: int, chosen: tuple[int, ...]) -> None:
    layer = nn.LazyBatchNorm1d(track_running_stats=False)
    with nw.record(layer) as recording:
        layer(torch.randn(4, channels))
    (found,) = recording.layers
    assert (found.channels, found.kind) == (chosen, "BatchNorm1d")
    assert found.of("running_mean") is None
    assert found.of("mean_spread") is None


@pytest.mark.parametrize("layer", [nw.nn.BatchNorm1d(3), nw.nn.GroupNorm(1, 3), nw.nn.InstanceNorm1d(3)], ids=repr)
@pytest.mark.parametrize("keyword", [False, True])
def test_masked_values_take_no_part(layer: nn.Module, keyword: bool) -> None:
    x, lengths = torch.randn(2, 3, 6), torch.tensor([6, 4])
    mask = torch.arange(6) < lengths[:, None]
    x[1, :, 4:] = math.nan
    with nw.record(layer) as recording:
        layer(input=x, mask=mask) if keyword else layer(x, mask)
    (row,) = recording.layers[0].rows
    if isinstance(layer, nn.BatchNorm1d):
        values = torch.cat([x[0], x[1, :, :4]], 1).double()
        np.testing.assert_allclose(row[:2], [values.mean(1), values.var(1, correction=0)], rtol=1e-12)
    else:
        groups = 1 if isinstance(layer, nn.GroupNorm) else 3
        parts = [*x[0].double().reshape(groups, -1), *x[1, :, :4].double().reshape(groups, -1)]
        assert row[0, 0] == pytest.approx(float(torch.stack([p.mean() for p in parts]).mean()), rel=1e-9)
        assert row[1, 0] == pytest.approx(float(torch.stack([p.var(correction=0) for p in parts]).mean()), rel=1e-9)


def test_a_masked_example_has_no_statistics() -> None:
    layer, x = nw.nn.GroupNorm(1, 3), torch.randn(2, 3, 6)
    with nw.record(layer) as recording:
        layer(x, torch.tensor([True, False]))
    exact = x[0].double()
    expected = [exact.mean(), exact.var(correction=0), 0, 0]
    np.testing.assert_allclose(recording.layers[0].rows[0][:, 0], expected, rtol=1e-9, atol=1e-12)


# What counts as a step


def test_steps() -> None:
    """Training forwards of the model itself, every third of them."""
    model, x = net(), images()
    with nw.record(model, every=3) as recording:
        for _ in range(7):
            model.train()(x)
            model.eval()(x)
            model[1](model[0](x))
            with torch.no_grad():
                copy.deepcopy(model).train()(x)
    assert recording.steps == [0, 3, 6]
    assert [len(layer.rows) for layer in recording.layers] == [3, 3, 3]
    assert [layer.name for layer in recording.layers] == ["1", "3", "6"]


class Twice(nn.Module):
    """One norm called twice, and one only where it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.seldom, self.never = nn.BatchNorm1d(2), nn.LayerNorm(2), nn.LayerNorm(2)

    def forward(self, x: Tensor, more: bool = False, fail: bool = False) -> Tensor:
        x = self.shared(x + 5) * 0 + self.shared(x)
        if fail:
            raise RuntimeError("no")
        return self.seldom(x) if more else x


def test_layers_that_are_called_twice_or_not() -> None:
    model, x = Twice(), torch.randn(8, 2)
    with nw.record(model) as recording:
        model(x)
        model(x, more=True)
        with pytest.raises(RuntimeError, match="no"):
            model(x, fail=True)
        model.seldom(x)
    assert recording.steps == [0, 1, 2]
    shared, seldom, _ = recording.layers
    np.testing.assert_allclose(shared.of("mean")[0], x.double().mean(0), rtol=1e-12)
    assert [math.isnan(mean) for (mean,) in seldom.of("mean")] == [True, False, True]
    data = json.loads(recording.to_json())
    assert [layer["name"] for layer in data["layers"]] == ["shared", "seldom"]
    assert data["layers"][1]["mean"][0] == ["NaN"]


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.part, self.reentrant = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.part, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_checkpointing_repeats_does_not_count(reentrant: bool) -> None:
    model, x = Checkpointed(reentrant), torch.randn(8, 3)
    with nw.record(model) as recording, nw.record(model.part) as part:
        for _ in range(2):
            model(x.clone().requires_grad_()).square().sum().backward()
    assert recording.steps == part.steps == [0, 1]
    exact = model.part[0](x).double().mean(0)
    for found in (recording, part):
        np.testing.assert_allclose(found.layers[0].of("mean"), [exact.detach()] * 2, rtol=1e-6)


def test_every_doubles_when_much_has_come_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "MOST", 8 * 4 * 10)
    model = nn.BatchNorm1d(8)
    with nw.record(model, every=3) as recording:
        for i in range(200):
            model(torch.full((2, 8), float(i)))
            assert sum(row.size for row in recording.layers[0].rows) <= 320
    assert recording.every == 24
    assert recording.steps == list(range(0, 200, 24))
    assert recording.layers[0].of("mean")[:, 0].tolist() == recording.steps


# What it changes: nothing


def run(record: bool) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(0)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    recording = nw.record(model) if record else None
    found = []
    for _ in range(3):
        y = model(images())
        optimizer.zero_grad()
        (y * torch.linspace(0, 1, y.numel()).reshape(y.shape)).sum().backward()
        optimizer.step()
        found += [y.detach(), *(p.grad.clone() for p in model.parameters())]
    if recording is not None:
        assert len(recording.steps) == 3
        assert not any(isinstance(value, Tensor) for layer in recording.layers for value in layer.rows)
    return [*found, *model.state_dict().values()], torch.get_rng_state()


def test_no_bit_changes() -> None:
    (plain, state), (recorded, other) = run(False), run(True)
    assert all(torch.equal(a, b) for a, b in zip(plain, recorded, strict=True))
    assert torch.equal(state, other)


def test_remove() -> None:
    model = net()
    before = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    recording = nw.record(model)
    model(images())
    recording.remove()
    recording.remove()
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == before
    model(images())
    assert recording.steps == [0]
    with pytest.raises(KeyError), nw.record(model) as other:
        raise KeyError
    model(images())
    assert other.steps == []


def test_transforms_run_and_are_not_recorded() -> None:
    model = nn.LayerNorm(4)
    with nw.record(model) as recording:
        y = torch.vmap(model)(torch.randn(3, 4))
    assert y.shape == (3, 4)
    assert recording.steps == []


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # what the compiler imports
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # the compiler's own look at what enters a graph
def test_compiled_afterwards_the_graph_breaks_and_all_is_recorded() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU()), torch.randn(8, 3)
    plain = copy.deepcopy(model)(x)
    with nw.record(model) as recording:
        compiled = torch.compile(model, backend="eager")
        assert torch.equal(compiled(x), plain)
        compiled(x)
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported):
            torch.compile(model, backend="eager", fullgraph=True)(x)
    assert recording.steps == [0, 1]
    np.testing.assert_allclose(recording.layers[0].of("mean")[1], model[0](x).double().mean(0).detach(), rtol=1e-6)
    compiled(x)
    assert recording.steps == [0, 1]


def test_compiled_before_is_refused() -> None:
    in_place = net()
    in_place.compile(backend="eager")
    for model in (
        torch.compile(net(), backend="eager"),
        in_place,
        nn.Sequential(torch.compile(net(), backend="eager")),
    ):
        with pytest.raises(TypeError, match="record: model must not be compiled yet; got"):
            nw.record(model)


def test_distributed_data_parallel() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = DistributedDataParallel(net())
        with nw.record(model) as recording:
            for _ in range(2):
                model(images()).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert (recording.model, recording.steps) == ("Sequential", [0, 1])
    assert [layer.name for layer in recording.layers] == ["1", "3", "6"]


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((3,), TypeError, "record: model must be a torch.nn.Module; got int"),
        ((nn.Linear(2, 2),), ValueError, "record: model must have a norm of torch.nn or normwise.nn; Linear has none"),
        ((nn.LayerNorm(2), 0), ValueError, "record: every must be 1 or more; got 0"),
    ],
)
def test_wrong_arguments(arguments: tuple[Any, ...], error: type[Exception], words: str) -> None:
    model, *every = arguments
    with pytest.raises(error, match=r"\A[^\n]+\.\Z") as caught:
        nw.record(model, **dict(zip(["every"], every, strict=False)))
    assert words in str(caught.value)


# Files


def recorded() -> Recording:
    model = net()
    with nw.record(model, every=2) as recording:
        for _ in range(4):
            model(images())
    return recording


def same(a: Recording, b: Recording) -> None:
    assert (a.model, a.steps) == (b.model, b.steps)
    for one, other in zip(a.layers, b.layers, strict=True):
        assert (one.name, one.kind, one.channels, one.quantities) == (
            other.name, other.kind, other.channels, other.quantities,
        )  # fmt: skip
        for quantity in one.quantities:
            np.testing.assert_array_equal(one.of(quantity), other.of(quantity))


def test_json_is_what_the_page_reads() -> None:
    recording = recorded()
    data = json.loads(recording.to_json(), parse_constant=pytest.fail)
    assert (data["schema"], data["version"], data["model"]) == ("normwise.recording", 1, "Sequential")
    assert data["steps"] == [0, 2]
    norm, groups, _ = data["layers"]
    assert norm.keys() == groups.keys() == {"name", "kind", "channels", *QUANTITIES}
    assert (norm["name"], norm["kind"], len(norm["channels"])) == ("1", "BatchNorm2d", 8)
    assert [len(row) for row in norm["running_var"]] == [8, 8]
    assert norm["mean_spread"] is None
    assert (groups["channels"], groups["running_mean"]) == ([0], None)
    assert [len(row) for row in groups["var_spread"]] == [1, 1]


def test_saved_and_loaded(tmp_path: Path) -> None:
    recording, path = recorded(), tmp_path / "run.json"
    path.write_text("before")
    path.chmod(0o600)
    recording.save(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["run.json"]
    same(load_recording(path), recording)
    assert str(load_recording(str(path))) == "recording of Sequential: 2 steps, 0 to 2, of 3 norms"
    with pytest.raises(ValueError, match=r"\Arecording: \S+ must be writable; Is a directory; choose another path\.\Z"):
        recording.save(tmp_path)


numbers = st.floats(width=64)


@st.composite
def recordings(draw: st.DrawFn) -> Recording:
    steps = sorted(draw(st.sets(st.integers(0, 2**53 - 1), max_size=4)))
    layers = []
    for name in draw(st.lists(st.text(max_size=8), max_size=3)):
        quantities = draw(st.sampled_from([OF_CHANNELS, OF_CHANNELS[:2], OF_GROUPS]))
        channels = tuple(draw(st.lists(st.integers(0, 99), min_size=1, max_size=3)))
        size = len(quantities) * len(channels)
        rows = [np.array(draw(st.lists(numbers, min_size=size, max_size=size))) for _ in steps]
        shaped = [None if np.isnan(row).all() else row.reshape(len(quantities), -1) for row in rows]
        if any(row is not None for row in shaped):
            layers.append(Layer(name, "Norm", channels, quantities, shaped))
    return Recording(draw(st.text(max_size=8)), steps, layers)


@settings(max_examples=40, deadline=None)
@given(recording=recordings())
def test_any_recording_comes_back(recording: Recording, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    recording.save(path)
    same(load_recording(path), recording)
    str(recording)
    Page(recording.to_html())


def changed(change: Callable[[dict[str, Any]], Any]) -> str:
    data = {
        "schema": "normwise.recording", "version": 1, "model": "Net", "steps": [0, 1],
        "layers": [{
            "name": "a", "kind": "BatchNorm1d", "channels": [0, 3],
            "mean": [[1, 2], [3, 4.5]], "var": [[1, 2], [3, "NaN"]],
            "running_mean": None, "running_var": None, "mean_spread": None, "var_spread": None,
        }],
    }  # fmt: skip
    change(data)
    return json.dumps(data)


def layer_with(**fields: Any) -> str:
    return changed(lambda data: data["layers"][0].update(fields))


BAD: dict[str, tuple[str, str]] = {
    "empty": ("", "must be JSON; it is not"),
    "list": ("[]", "must hold an object; it holds a list"),
    "deep": ("[" * 100_000, "must be JSON; it is not"),
    "nan": ('{"schema": NaN}', "must be JSON; it is not"),
    "bytes": ("\udcff", "must be JSON; it is not"),
    "schema": ('{"schema": "other"}', "must be normwise.recording version 1; it is 'other' version None"),
    "version": (changed(lambda data: data.update(version=2)), "version 2"),
    "no steps": (changed(lambda data: data.pop("steps")), "its form (KeyError: 'steps')"),
    "steps back": (changed(lambda data: data.update(steps=[1, 0])), "steps is not as it was written"),
    "steps of text": (changed(lambda data: data.update(steps=["0", "1"])), "steps is not"),
    "steps negative": (changed(lambda data: data.update(steps=[-1, 0])), "steps is not"),
    "model": (changed(lambda data: data.update(model=3)), "model is not"),
    "long name": (layer_with(name="a" * 1001), "name is not"),
    "layers": (changed(lambda data: data.update(layers=3)), "its form (TypeError"),
    "layer": (changed(lambda data: data.update(layers=[[]])), "its form (TypeError"),
    "no channel": (layer_with(channels=[]), "channels of 'a' is not"),
    "a step less": (layer_with(mean=[[1, 2]]), "mean of 'a' is not"),
    "a channel less": (layer_with(mean=[[1, 2], [3]]), "mean of 'a' is not"),
    "text": (layer_with(mean=[[1, 2], [3, "4"]]), "mean of 'a' is not"),
    "true": (layer_with(mean=[[1, 2], [3, True]]), "mean of 'a' is not"),
    "huge": (layer_with(mean=[[1, 2], [3, 10**400]]), "mean of 'a' is not"),
    "endless": (layer_with(mean=[[1, 2], [3, 4]]).replace("4", "4" * 5000), "must be JSON; it is not"),
    "nested": (layer_with(mean=[[1, 2], [3, []]]), "mean of 'a' is not"),
    "mixture": (layer_with(mean_spread=[[1, 2], [3, 4]]), "the choice of quantities of 'a' is not"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_recording(name: str, tmp_path: Path) -> None:
    content, words = BAD[name]
    (tmp_path / "bad.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"\Arecording: \S+bad.json must [^\n]+\.\Z") as caught:
        load_recording(tmp_path / "bad.json")
    assert words in str(caught.value)


def test_good_neighbour_of_the_bad(tmp_path: Path) -> None:
    (tmp_path / "good.json").write_text(changed(lambda data: None))
    found = load_recording(tmp_path / "good.json")
    np.testing.assert_array_equal(found.layers[0].of("var"), [[1, 2], [3, math.nan]])


def test_too_large_a_file_and_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("normwise.explain.recording.LARGEST", 100)
    (tmp_path / "long.json").write_text(changed(lambda data: None))
    with pytest.raises(ValueError, match="must be of at most 100 bytes; it is larger"):
        load_recording(tmp_path / "long.json")
    with pytest.raises(ValueError, match="must be readable; No such file"):
        load_recording(tmp_path / "none.json")


# Shown


def test_page_of_a_recording() -> None:
    recording = Recording(HOSTILE, [3], [Layer(HOSTILE, "<b>", rows=[np.array([[1.5], [2], [0], [math.inf]])])])
    found = Page(recording.to_html())
    assert found.texts["title"] == [f"normwise: recording of {HOSTILE}"]
    assert json.loads("".join(found.texts["recording"])) == recording.to_data()
    assert found.texts["comparison"] == ["null"]
    assert len([tag for tag, _ in found.elements if tag == "script"]) == 5
    assert "This file embeds a recording (as JSON)" in "".join(found.texts["p"])
    assert found.texts["th"][3:] == [f"{HOSTILE}, mean", f"{HOSTILE}, var"]
    assert found.texts["td"] == ["<b>", "1.5", "1.5", "<b>", "2", "2"]


def test_recording_in_a_notebook() -> None:
    recording = recorded()
    bundle = recording._repr_mimebundle_()
    assert bundle["text/plain"] == str(recording) == repr(recording)
    shown = Page(bundle["text/html"])
    (frame,) = [attributes for tag, attributes in shown.elements if tag == "iframe"]
    assert frame["srcdoc"] == recording.to_html()
