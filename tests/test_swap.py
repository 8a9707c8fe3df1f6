"""replace, restore and skipped: what a swap keeps, what it leaves alone, and that a model stays what it was."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normwise as nw
from normwise.nn.swap import TWINS

pytestmark = [
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning"),
]


def mixed() -> nn.Module:
    """A model of every norm, nested, with a norm that two places share."""
    shared = nn.LayerNorm(4)
    return nn.ModuleDict(
        {
            "flat": nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), shared, nn.RMSNorm(4), shared),
            "images": nn.Sequential(
                nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True)
            ),
            "rest": nn.ModuleList([nn.BatchNorm3d(4), nn.InstanceNorm1d(4), nn.InstanceNorm3d(4)]),
        }
    )


def norms(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, tuple(TWINS))]


def test_every_torch_norm_has_its_twin():
    """And a twin has the name of what it replaces."""
    assert {t.__name__: o.__name__ for t, o in TWINS.items()} == {
        name: name for name in nw.nn.__all__ if hasattr(nn, name) and name != "SyncBatchNorm"
    }
    assert all(issubclass(ours, theirs) for theirs, ours in TWINS.items())


def test_replace_and_restore_change_the_class_and_nothing_else():
    model = mixed()
    model["flat"].eval()
    model["images"][2].requires_grad_(False)
    model["rest"][0].bfloat16()
    model["flat"][1].tag = "kept"
    before = [
        (m, type(m), m.training, {k: id(v) for k, v in vars(m).items() if k != "__class__"}) for m in model.modules()
    ]
    tensors = {name: (t, t.requires_grad, t.dtype) for name, t in [*model.named_parameters(), *model.named_buffers()]}

    def same() -> None:
        for (module, _, training, attributes), now in zip(before, model.modules(), strict=True):
            assert now is module
            assert now.training == training
            assert {k: id(v) for k, v in vars(now).items()} == attributes
        for name, t in [*model.named_parameters(), *model.named_buffers()]:
            assert t is tensors[name][0]
            assert (t.requires_grad, t.dtype) == tensors[name][1:]

    assert nw.nn.replace(model) is model
    same()
    assert all(type(m) is TWINS.get(kind, kind) for m, kind, *_ in before)
    assert len([m for m in norms(model) if type(m) in TWINS.values()]) == 9
    assert nw.nn.restore(model) is model
    same()
    assert all(type(m) is kind for m, kind, *_ in before)


def test_shared_modules_stay_shared():
    model = nw.nn.replace(mixed())
    assert model["flat"][2] is model["flat"][4]
    assert type(model["flat"][2]) is nw.nn.LayerNorm


@pytest.mark.parametrize("kind", TWINS, ids=lambda k: k.__name__)
def test_a_model_that_is_itself_a_norm(kind: type[nn.Module]):
    norm = kind(2, 4) if kind is nn.GroupNorm else kind(4)
    assert nw.nn.replace(norm) is norm
    assert type(norm) is TWINS[kind]
    assert nw.nn.skipped(norm) == {}
    assert type(nw.nn.restore(norm)) is kind


def test_both_are_idempotent():
    once, twice = nw.nn.replace(mixed()), nw.nn.replace(nw.nn.replace(mixed()))
    assert repr(once) == repr(twice)
    assert [type(m) for m in once.modules()] == [type(m) for m in twice.modules()]
    assert [type(m) for m in nw.nn.restore(nw.nn.restore(once)).modules()] == [type(m) for m in mixed().modules()]


@pytest.mark.parametrize("swap", [nw.nn.replace, nw.nn.restore])
def test_what_is_no_module_is_refused(swap: Callable[[Any], Any]):
    with pytest.raises(TypeError, match=f"{swap.__name__}: model must be a torch.nn.Module; got dict; pass the model"):
        swap({})


def test_hooks_stay():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    calls: list[str] = []
    norm = model[1]
    handles = [
        norm.register_forward_pre_hook(lambda *a: calls.append("before")),
        norm.register_forward_hook(lambda *a: calls.append("after")),
        norm.register_full_backward_hook(lambda *a: calls.append("backward")),
        norm.register_full_backward_pre_hook(lambda *a: calls.append("before backward")),
        norm.weight.register_hook(lambda g: calls.append("weight")),
    ]
    norm.register_state_dict_pre_hook(lambda *a: calls.append("state"))
    nw.nn.replace(model)
    model(torch.randn(2, 4)).backward(torch.randn(2, 4))
    model.state_dict()
    assert sorted(calls) == ["after", "backward", "before", "before backward", "state", "weight"]
    for handle in handles:
        handle.remove()
    calls.clear()
    model(torch.randn(2, 4)).backward(torch.randn(2, 4))
    assert calls == []


def test_an_optimizer_goes_on():
    """Its parameters are the model's still: training half way, swapping, and training on equals not swapping."""
    plain = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 6), nn.LayerNorm(6)).double()
    swapped = copy.deepcopy(plain)
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.01) for m in (plain, swapped)]
    for step in range(10):
        if step == 4:
            nw.nn.replace(swapped)
        if step == 8:
            nw.nn.restore(swapped)
        x, target = torch.randn(8, 4).double(), torch.randn(8, 6).double()
        for model, optimizer in zip((plain, swapped), optimizers, strict=True):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), target).backward()
            optimizer.step()
    # Adam divides by the root of a gradient's square, which for a gradient of rounding alone is a step of its own
    torch.testing.assert_close(dict(swapped.state_dict()), dict(plain.state_dict()), rtol=1e-6, atol=1e-6)


# What is left alone, and listed


class Scaled(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def patched() -> nn.Module:
    norm = nn.LayerNorm(4)
    norm.forward = lambda x: x
    return norm


def parametrized() -> nn.Module:
    norm = nn.LayerNorm(4)
    torch.nn.utils.parametrize.register_parametrization(norm, "weight", nn.Softplus())
    return norm


LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "subclass": (lambda: Scaled(4), "Scaled is a subclass and may add behaviour"),
    "lazy": (nn.LazyBatchNorm1d, "LazyBatchNorm1d is not initialized; run one batch first"),
    "synchronized": (lambda: nn.SyncBatchNorm(4), "normwise.nn.SyncBatchNorm.convert takes it"),
    "patched": (patched, "its forward is patched on the instance"),
    "parametrized": (parametrized, "ParametrizedLayerNorm is a subclass and may add behaviour"),
}


@pytest.mark.parametrize("which", LEFT)
def test_what_cannot_be_replaced_is_left_and_listed(which: str):
    make, why = LEFT[which]
    model = nn.Sequential(nn.Linear(4, 4), make(), nn.LayerNorm(4))
    kind = type(model[1])
    with pytest.warns(UserWarning, match=f"replace: 1 norms were left as they are:\n  1: {re.escape(why)}") as caught:
        nw.nn.replace(model)
    assert caught[0].filename == __file__  # it points at the caller
    assert type(model[1]) is kind
    assert type(model[2]) is nw.nn.LayerNorm
    assert nw.nn.skipped(model) == {"1": why}
    alone = make()
    with pytest.warns(UserWarning, match="the model itself: "):
        nw.nn.replace(alone)
    assert nw.nn.skipped(alone) == {"": why}
    nw.nn.restore(model)
    assert type(model[1]) is kind
    assert type(model[2]) is nn.LayerNorm


def test_all_that_is_left_is_in_one_warning():
    model = nn.ModuleDict({name: make() for name, (make, _) in LEFT.items()})
    with pytest.warns(UserWarning, match="5 norms were left") as caught:
        nw.nn.replace(model)
    assert len(caught) == 1
    assert nw.nn.skipped(model) == {name: why for name, (_, why) in LEFT.items()}
    assert all(f"  {name}: {why}" in str(caught[0].message) for name, (_, why) in LEFT.items())


def test_nothing_is_said_where_nothing_is_left():
    assert nw.nn.skipped(mixed()) == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nw.nn.replace(nn.Sequential(nw.nn.LayerNorm2d(4), nn.LayerNorm(4), nn.Linear(4, 4), nn.LocalResponseNorm(2)))
    assert nw.nn.skipped(nn.Sequential(nw.nn.LayerNorm2d(4), nw.nn.LayerNorm(4), nn.LocalResponseNorm(2))) == {}


def test_a_lazy_layer_after_its_first_batch_is_replaced():
    model = nn.Sequential(nn.LazyBatchNorm1d())
    model(torch.randn(3, 4))
    nw.nn.replace(model)
    assert type(model[0]) is nw.nn.BatchNorm1d


def test_layer_norm_2d_stays_when_torchs_layers_are_put_back():
    model = nn.Sequential(nw.nn.LayerNorm2d(4), nw.nn.LayerNorm(4))
    nw.nn.restore(model)
    assert [type(m) for m in model] == [nw.nn.LayerNorm2d, nn.LayerNorm]


# TransformerEncoderLayer: its fused inference path reads the norms' parameters and never calls them


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    calls: list[str] = []
    function = nw.functional.layer_norm
    monkeypatch.setattr(nw.functional, "layer_norm", lambda *a: calls.append("layer_norm") or function(*a))
    fused = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *a: calls.append("fused") or fused(*a))
    return calls


def encoder_layer(**options: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, **options)


ACTIVATIONS = {"relu": 1, "gelu": 2, nn.GELU(): 2, nn.ReLU(): 1, torch.tanh: 0}


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: getattr(a, "__name__", str(a)))
@torch.no_grad()
def test_the_fused_path_of_an_encoder_layer(activation: Any, monkeypatch: pytest.MonkeyPatch):
    layer, x = encoder_layer(activation=activation).eval(), torch.randn(2, 5, 8)
    calls = count_calls(monkeypatch)
    first = ["fused"] if ACTIVATIONS[activation] else []
    expected = layer(x)
    assert calls == first
    nw.nn.replace(layer)
    calls.clear()
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)  # another order of sums in the fused path
    assert calls == ["layer_norm", "layer_norm"]
    nw.nn.restore(layer)
    calls.clear()
    assert torch.equal(layer(x), expected)
    assert calls == first
    assert layer.activation_relu_or_gelu == ACTIVATIONS[activation]


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("padding", [True, False])
@torch.no_grad()
def test_the_fused_path_of_an_encoder(padding: bool, norm_first: bool, monkeypatch: pytest.MonkeyPatch):
    """With padding, torch packs the batch into a nested tensor before the layers see it."""
    model = nn.TransformerEncoder(encoder_layer(norm_first=norm_first), 2, norm=nn.LayerNorm(8)).eval()
    x, mask = torch.randn(3, 5, 8), torch.zeros(3, 5, dtype=torch.bool)
    mask[1, 3:], mask[2, 1:] = True, True
    arguments = {"src_key_padding_mask": mask} if padding else {}
    calls = count_calls(monkeypatch)
    expected = model(x, **arguments)
    assert calls == ["fused", "fused"]
    nw.nn.replace(model)
    calls.clear()
    y = model(x, **arguments)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert calls.count("layer_norm") >= 5
    assert "fused" not in calls
    nw.nn.restore(model)
    calls.clear()
    assert torch.equal(model(x, **arguments), expected)
    assert calls == ["fused", "fused"]


def test_an_encoder_in_training_is_as_before():
    plain = nn.TransformerEncoder(encoder_layer(), 2).double()
    swapped = nw.nn.replace(copy.deepcopy(plain))
    x, mask = torch.randn(3, 5, 8).double(), torch.zeros(3, 5, dtype=torch.bool)
    mask[1, 3:] = True
    dy = torch.randn_like(x) + 0.5
    results = []
    for model in (plain, swapped):
        y = model(x, src_key_padding_mask=mask)
        results.append((y, torch.autograd.grad(y, tuple(model.parameters()), dy)))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_a_fused_path_that_was_switched_off_stays_off():
    """By its owner, in a layer without a norm of ours."""
    layer = encoder_layer()
    layer.activation_relu_or_gelu = 0
    layer.norm1, layer.norm2 = Scaled(8), Scaled(8)
    with pytest.warns(UserWarning, match="2 norms were left"):
        nw.nn.replace(layer)
    nw.nn.restore(layer)
    assert layer.activation_relu_or_gelu == 0


# Whole models


def tiny_resnet() -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        num_channels=3, embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic", num_labels=5
    )
    return ResNetForImageClassification(config), {"pixel_values": torch.randn(4, 3, 32, 32)}


def tiny_bert() -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, 5:] = 0
    return BertModel(config, add_pooling_layer=False), {"input_ids": torch.randint(50, (3, 9)), "attention_mask": mask}


def tiny_swin() -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import SwinConfig, SwinModel

    config = SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=4)
    return SwinModel(config, add_pooling_layer=False), {"pixel_values": torch.randn(2, 3, 16, 16)}


def tiny_llama() -> tuple[nn.Module, dict[str, Tensor]]:
    """With torch's RMSNorm for its own, which is a class of transformers and not ours to replace."""
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = LlamaModel(config)
    assert nw.nn.skipped(nw.nn.replace(model)) == {}
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "LlamaRMSNorm":
            parent, _, child = name.rpartition(".")
            norm = nn.RMSNorm(16, eps=module.variance_epsilon)
            norm.weight = module.weight
            setattr(model.get_submodule(parent), child, norm)
    return model, {"input_ids": torch.randint(50, (3, 9))}


MODELS: dict[str, tuple[Callable[[], tuple[nn.Module, dict[str, Tensor]]], int]] = {
    "ResNet": (tiny_resnet, 10),
    "BERT": (tiny_bert, 5),
    "Swin": (tiny_swin, 11),
    "Llama": (tiny_llama, 5),
}
"""Random ones from small configurations, with the number of norms that each has."""


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_the_same_with_our_norms(name: str, training: bool):
    """In float64, where torch's norms are exact too, so that only the order of sums is left: 1e-16 for each of them,
    times what the layers above make of it.
    """
    make, norms = MODELS[name]
    model, inputs = make()
    plain = model.double().train(training)
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    swapped = nw.nn.replace(copy.deepcopy(plain))
    assert sum(type(m) in TWINS.values() for m in swapped.modules()) == norms
    results = []
    for m in (plain, swapped):
        y = m(**inputs)[0]
        torch.manual_seed(1)
        grads = torch.autograd.grad(y, tuple(m.parameters()), torch.randn_like(y) + 0.5, allow_unused=True)
        results.append((y, grads, dict(m.named_buffers())))
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-9)
    counts = {int(b) for n, b in swapped.named_buffers() if n.endswith("num_batches_tracked")}
    assert counts == ({int(training)} if name == "ResNet" else set())


def test_a_view_after_a_norm_of_a_transposed_input_still_works():
    """torch's norms give back contiguous results, and models rely on it."""

    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.norm = nn.Conv2d(3, 8, 2, 2), nn.LayerNorm(8)

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.norm(self.patches(x).flatten(2).transpose(1, 2))
            return tokens.view(len(x), 2, -1)

    model, x = Patches(), torch.randn(2, 3, 8, 8)
    expected = model(x)
    torch.testing.assert_close(nw.nn.replace(model)(x), expected)
