"""Every layer: its torch twin's repr, state, modes and results, and what it adds."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normwise as nw
import normwise.functional as nf

DOUBLE = {"rtol": 1e-9, "atol": 1e-10}
"""torch sums in another order; what is left of 50 steps of it."""


@dataclass(frozen=True)
class Layer:
    """A layer by name, its arguments, and the shape of an input."""

    name: str
    args: tuple[Any, ...]
    shape: tuple[int, ...]
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{key}={value}" for key, value in self.options)])

    def ours(self, **kwargs: Any) -> nn.Module:
        return getattr(nw.nn, self.name)(*self.args, **{**dict(self.options), **kwargs})

    def theirs(self, **kwargs: Any) -> nn.Module:
        return getattr(nn, self.name)(*self.args, **{**dict(self.options), **kwargs})

    def pair(self, **kwargs: Any) -> tuple[Any, Any]:
        """Both, with the same random parameters."""
        ours, theirs = self.ours(**kwargs), self.theirs(**kwargs)
        with torch.no_grad():
            for parameter in ours.parameters():
                parameter.copy_(torch.randn_like(parameter))
        theirs.load_state_dict(ours.state_dict())
        return ours, theirs

    def draw(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        return (torch.randn(self.shape) * 2 + 1).to(dtype), (torch.randn(self.shape) + 0.5).to(dtype)


BATCH = [("BatchNorm1d", (6, 4)), ("BatchNorm2d", (5, 4, 3, 2)), ("BatchNorm3d", (5, 4, 3, 2, 2))]
INSTANCE = [("InstanceNorm1d", (5, 4, 3)), ("InstanceNorm2d", (5, 4, 3, 2)), ("InstanceNorm3d", (5, 4, 3, 2, 2))]

PLAIN = [
    Layer("LayerNorm", (4,), (5, 3, 4)),
    Layer("RMSNorm", (4,), (5, 3, 4)),
    Layer("GroupNorm", (2, 4), (5, 4, 3)),
    *(Layer(name, (4,), shape) for name, shape in BATCH + INSTANCE),
]
"""Each layer with torch's defaults."""

VARIED = [
    Layer("LayerNorm", ((3, 4),), (5, 3, 4), (("eps", 0.1), ("bias", False))),
    Layer("LayerNorm", (4,), (5, 3, 4), (("elementwise_affine", False),)),
    Layer("RMSNorm", ((3, 4),), (5, 3, 4), (("eps", 0.1),)),
    Layer("RMSNorm", (4,), (5, 3, 4), (("elementwise_affine", False),)),
    Layer("GroupNorm", (4, 4), (5, 4, 3, 2), (("eps", 0.1), ("affine", False))),
    Layer("GroupNorm", (1, 4), (5, 4, 3, 2), (("bias", False),)),
    Layer("BatchNorm1d", (4,), (6, 4, 3), (("eps", 0.1), ("momentum", 0.3))),
    *(Layer(name, (4,), shape, (("momentum", None),)) for name, shape in BATCH),
    *(Layer(name, (4,), shape, (("track_running_stats", False),)) for name, shape in BATCH),
    *(Layer(name, (4,), shape, (("affine", False),)) for name, shape in BATCH),
    *(Layer(name, (4,), shape, (("bias", False),)) for name, shape in BATCH),
    *(Layer(name, (4,), shape, (("affine", True), ("track_running_stats", True))) for name, shape in INSTANCE),
    Layer("InstanceNorm1d", (4,), (5, 4, 3), (("affine", True), ("bias", False), ("eps", 0.1))),
    Layer("InstanceNorm2d", (4,), (5, 4, 3, 2), (("track_running_stats", True), ("momentum", None))),
    Layer("InstanceNorm2d", (4,), (5, 4, 3, 2), (("track_running_stats", True), ("momentum", 0.7))),
]
LAYERS = PLAIN + [
    layer
    for layer in VARIED
    if dict(layer.options).keys() <= inspect.signature(getattr(nn, layer.name)).parameters.keys()
]
"""And with each option that the installed torch has; bias= of Group and Batch Norm is a young one."""

TRACKING = [layer for layer in LAYERS if "running_mean" in layer.ours().state_dict()]

every_layer = pytest.mark.parametrize("layer", LAYERS, ids=str)
plain_layers = pytest.mark.parametrize("layer", PLAIN, ids=str)


def test_every_layer_is_here():
    layers = {name for name in nw.nn.__all__ if inspect.isclass(getattr(nw.nn, name))}
    assert layers == {layer.name for layer in PLAIN} | {"LayerNorm2d", "SyncBatchNorm"}


# Twins


@plain_layers
def test_is_a_subclass_with_torchs_signature(layer: Layer):
    ours, theirs = getattr(nw.nn, layer.name), getattr(nn, layer.name)
    assert issubclass(ours, theirs)
    assert inspect.signature(ours) == inspect.signature(theirs)
    forward, twin = (list(inspect.signature(c.forward).parameters.values()) for c in (ours, theirs))
    assert [p.name for p in forward[: len(twin)]] == [p.name for p in twin]
    assert [(p.name, p.default) for p in forward[len(twin) :]] in ([], [("mask", None)])


@every_layer
def test_repr_is_torchs(layer: Layer):
    ours, theirs = layer.pair()
    assert repr(ours) == repr(theirs)


@every_layer
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_results_and_gradients_equal_torchs(layer: Layer, training: bool):
    results = []
    x, dy = layer.draw()
    for module in layer.pair(dtype=torch.float64):
        module.train(training)
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        results.append((y, torch.autograd.grad(y, (leaf, *module.parameters()), dy), dict(module.named_buffers())))
    torch.testing.assert_close(*results, **DOUBLE)


@every_layer
def test_state_dicts_go_both_ways(layer: Layer):
    ours, theirs = layer.ours(dtype=torch.float64), layer.theirs(dtype=torch.float64)
    assert [(n, t.shape, t.dtype) for n, t in ours.state_dict().items()] == [
        (n, t.shape, t.dtype) for n, t in theirs.state_dict().items()
    ]
    for source, target in ((ours, theirs), (theirs, ours)):
        with torch.no_grad():
            for tensor in source.state_dict().values():
                tensor.copy_(torch.randint_like(tensor, 1, 9))
        assert str(target.load_state_dict(source.state_dict())) == "<All keys matched successfully>"
        torch.testing.assert_close(dict(target.state_dict()), dict(source.state_dict()))
        assert getattr(target.state_dict(), "_metadata", None) == getattr(source.state_dict(), "_metadata", None)
    x, _ = layer.draw()
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), **DOUBLE)


@every_layer
@pytest.mark.parametrize("how", ["pickle", "deepcopy", "torch.save"])
def test_copies_are_the_same_layer(layer: Layer, how: str):
    module, x = layer.pair()[0], layer.draw(torch.float32)[0]
    module(x)  # so that there is a state
    if how == "pickle":
        other = pickle.loads(pickle.dumps(module))
    elif how == "deepcopy":
        other = copy.deepcopy(module)
    else:
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert type(other) is type(module)
    assert repr(other) == repr(module)
    torch.testing.assert_close(dict(other.state_dict()), dict(module.state_dict()), rtol=0, atol=0)
    assert torch.equal(other(x), module(x))
    assert all(a is not b for a, b in zip(other.parameters(), module.parameters(), strict=True))


@every_layer
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtype(layer: Layer, dtype: torch.dtype):
    for module in (layer.ours(dtype=dtype), layer.ours().to(dtype)):
        assert {p.dtype for p in module.parameters()} <= {dtype}
        y = module(layer.draw(dtype)[0])
        assert y.dtype == dtype
        assert y.isfinite().all()


@every_layer
def test_meta_device(layer: Layer):
    """Shapes without memory, then memory."""
    module = layer.ours(device="meta")
    assert all(t.is_meta for t in module.state_dict().values())
    x = layer.draw(torch.float32)[0]
    y = module(x.to("meta"))
    assert y.is_meta
    assert y.shape == x.shape
    real = layer.pair()[0]
    module = module.to_empty(device="cpu")
    module.load_state_dict(real.state_dict())
    assert torch.equal(module(x), real(x))


@every_layer
def test_reset_parameters(layer: Layer):
    module, x = layer.pair()[0], layer.draw(torch.float32)[0]
    module(x)
    module.reset_parameters()
    torch.testing.assert_close(dict(module.state_dict()), dict(layer.theirs().state_dict()))


@plain_layers
def test_inputs_that_torch_refuses_are_refused(layer: Layer):
    wrong = {"LayerNorm": (5, 3), "RMSNorm": (5, 3), "GroupNorm": (5, 3, 4)}.get(layer.name, (4,))
    with pytest.raises((ValueError, RuntimeError)):
        layer.theirs()(torch.randn(wrong))
    with pytest.raises(ValueError, match=r"must (be|have|divide)|expected \d"):
        layer.ours()(torch.randn(wrong))


# The state of Batch Norm and Instance Norm


@pytest.mark.parametrize("layer", TRACKING, ids=str)
def test_state_equals_torchs_over_50_steps(layer: Layer):
    ours, theirs = layer.pair(dtype=torch.float64)
    for step in range(51):
        if step in (0, 1, 2, 50):
            torch.testing.assert_close(dict(ours.named_buffers()), dict(theirs.named_buffers()), **DOUBLE)
            x, _ = layer.draw()
            torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), **DOUBLE)
            torch.testing.assert_close(ours(x), closed_form(ours, x), **DOUBLE)
            ours.train(), theirs.train()
        x, _ = layer.draw()
        torch.testing.assert_close(ours(x), theirs(x), **DOUBLE)
    assert layer.name.startswith("Instance") or ours.num_batches_tracked == 51


def closed_form(module: Any, x: Tensor) -> Tensor:
    """Eval by its definition, with the state as it stands."""
    shape = (1, -1, *[1] * (x.dim() - 2))
    mean, var = (t.reshape(shape) for t in (module.running_mean, module.running_var))
    y = (x - mean) / (var + module.eps).sqrt()
    y = y if module.weight is None else y * module.weight.reshape(shape)
    return y if module.bias is None else y + module.bias.reshape(shape)


@pytest.mark.parametrize("layer", TRACKING, ids=str)
def test_running_statistics_after_50_steps_are_the_weighted_sum(layer: Layer):
    """Not torch's word for it: the sum over all batches, each with the weight it has by now."""
    module, batches = layer.ours(dtype=torch.float64), [layer.draw()[0] for _ in range(50)]
    for x in batches:
        module(x)
    m = module.momentum
    if m is None:  # the plain average; instance_norm takes None for 0 as in torch
        weights = [0.0 if layer.name.startswith("Instance") else 1 / 50] * 50
    else:
        weights = [m * (1 - m) ** (49 - t) for t in range(50)]
    rest = 1 - sum(weights)  # of the mean 0 and variance 1 at the start
    per_example = [[x] if layer.name.startswith("Batch") else list(x.split(1)) for x in batches]
    values = [[e.transpose(0, 1).flatten(1) for e in examples] for examples in per_example]
    means = torch.stack([torch.stack([v.mean(1) for v in vs]).mean(0) for vs in values])
    variances = torch.stack([torch.stack([v.var(1) for v in vs]).mean(0) for vs in values])
    w = torch.tensor(weights, dtype=torch.float64)[:, None]
    torch.testing.assert_close(module.running_mean, (w * means).sum(0), **DOUBLE)
    torch.testing.assert_close(module.running_var, (w * variances).sum(0) + rest, **DOUBLE)


@pytest.mark.parametrize("layer", TRACKING, ids=str)
def test_resuming_continues_to_the_bit(layer: Layer):
    straight = layer.pair()[0]
    batches = [layer.draw(torch.float32)[0] for _ in range(6)]
    resumed = None
    for step, x in enumerate(batches):
        if step == 3:
            file = io.BytesIO()
            torch.save(straight.state_dict(), file)
            file.seek(0)
            resumed = layer.ours()
            resumed.load_state_dict(torch.load(file))
        y = straight(x)
        assert resumed is None or torch.equal(resumed(x), y)
    assert resumed is not None
    for name, tensor in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


@pytest.mark.parametrize("layer", TRACKING, ids=str)
def test_eval_moves_nothing_and_needs_no_batch(layer: Layer):
    module = layer.pair()[0]
    module(layer.draw(torch.float32)[0])
    before = copy.deepcopy(module.state_dict())
    x = layer.draw(torch.float32)[0]
    y = module.eval()(x)
    assert torch.equal(module(x[:1]), y[:1])
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("layer", [layer for layer in TRACKING if layer.name.startswith("Batch")], ids=str)
def test_an_error_leaves_the_state(layer: Layer):
    module = layer.pair()[0]
    module(layer.draw(torch.float32)[0])
    before = copy.deepcopy(module.state_dict())
    one = torch.randn(1, 4, *[1] * (len(layer.shape) - 2))
    for wrong in (one, torch.randn(3, 5, *layer.shape[2:]), torch.randn(4)):
        with pytest.raises(ValueError, match=r"has no variance|must have shape|expected"):
            module(wrong)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("layer", [layer for layer in PLAIN if layer.name.startswith("Batch")], ids=str)
def test_tracking_that_is_switched_off_and_on(layer: Layer):
    """As torch's: in training off means that the state stays, in eval it is used all the same."""
    ours, theirs = layer.pair(dtype=torch.float64)
    for tracking in (True, False, True):
        for training in (True, False):
            x, _ = layer.draw()
            for module in (ours, theirs):
                module.train(training).track_running_stats = tracking
            torch.testing.assert_close(ours(x), theirs(x), **DOUBLE)
            torch.testing.assert_close(dict(ours.named_buffers()), dict(theirs.named_buffers()), **DOUBLE)
    assert ours.num_batches_tracked == 2


def test_a_frozen_layer_in_training_mode():
    """requires_grad and training are apart: statistics move, parameters take no gradient."""
    module = nw.nn.BatchNorm1d(4).requires_grad_(False)
    x = torch.randn(5, 4, requires_grad=True)
    y = module(x)
    assert torch.autograd.grad(y, x, torch.randn(5, 4))[0].any()
    assert module.num_batches_tracked == 1
    assert module.weight.grad is None


# Instance Norm without a batch axis


@pytest.mark.parametrize("layer", [layer for layer in LAYERS if layer.name.startswith("Instance")], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_unbatched_instance_norm_equals_torchs(layer: Layer, training: bool):
    x, dy = (t[0] for t in layer.draw())
    results = []
    for module in layer.pair(dtype=torch.float64):
        leaf = x.clone().requires_grad_()
        y = module.train(training)(leaf)
        results.append((y, torch.autograd.grad(y, leaf, dy), dict(module.named_buffers())))
    torch.testing.assert_close(*results, **DOUBLE)
    assert results[0][0].shape == x.shape


# LayerNorm2d


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"bias": False}, {"elementwise_affine": False}, {"eps": 0.1}], ids=lambda o: "-".join(o) or "plain"
)
def test_layer_norm_2d_equals_a_permuted_layer_norm(options: dict[str, Any], memory_format: torch.memory_format):
    layer, twin = nw.nn.LayerNorm2d(6, **options).double(), nn.LayerNorm(6, **options).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter))
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(2, 6, 5, 3, dtype=torch.float64).contiguous(memory_format=memory_format).requires_grad_()
    dy = torch.randn_like(x) + 0.5
    y, expected = layer(x), twin(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(y, expected)
    assert y.stride() == x.stride()
    ours, theirs = (
        torch.autograd.grad(out, (x, *module.parameters()), dy) for out, module in ((y, layer), (expected, twin))
    )
    torch.testing.assert_close(ours, theirs)
    assert ours[0].stride() == x.stride()


def test_layer_norm_2d_is_a_layer_norm_of_channels():
    layer = nw.nn.LayerNorm2d(6, eps=1e-6)
    assert repr(layer) == repr(nn.LayerNorm(6, eps=1e-6)).replace("LayerNorm", "LayerNorm2d")
    assert torch.equal(copy.deepcopy(layer)(x := torch.randn(2, 6, 3, 3)), layer(x))
    assert type(pickle.loads(pickle.dumps(layer))) is nw.nn.LayerNorm2d
    assert nw.nn.LayerNorm2d(6, device="meta", dtype=torch.bfloat16).weight.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="pattern"):
        layer(torch.randn(2, 6, 3))
    with pytest.raises(ValueError, match="weight must have shape"):
        layer(torch.randn(2, 5, 3, 3))


# Masks


MASKABLE: dict[str, Callable[[nn.Module, Tensor, Tensor], Tensor]] = {
    "GroupNorm": lambda m, x, mask: nf.group_norm(x, 2, m.weight, m.bias, mask=mask),
    "InstanceNorm1d": lambda m, x, mask: nf.instance_norm(x, None, None, m.weight, m.bias, mask=mask),
    "InstanceNorm2d": lambda m, x, mask: nf.instance_norm(x, None, None, m.weight, m.bias, mask=mask),
    "InstanceNorm3d": lambda m, x, mask: nf.instance_norm(x, None, None, m.weight, m.bias, mask=mask),
    "BatchNorm1d": lambda m, x, mask: nf.batch_norm(x, None, None, m.weight, m.bias, True, mask=mask),
    "BatchNorm2d": lambda m, x, mask: nf.batch_norm(x, None, None, m.weight, m.bias, True, mask=mask),
    "BatchNorm3d": lambda m, x, mask: nf.batch_norm(x, None, None, m.weight, m.bias, True, mask=mask),
}


@pytest.mark.parametrize("layer", [layer for layer in PLAIN if layer.name in MASKABLE], ids=str)
def test_mask(layer: Layer):
    """Of examples and of positions; padding has no part in the result or in the state."""
    for shape in ((layer.shape[0],), (layer.shape[0], *layer.shape[2:])):
        module = layer.pair()[0]
        other = copy.deepcopy(module)
        x, mask = layer.draw(torch.float32)[0], torch.rand(shape) < 0.7
        y = module(x, mask=mask)
        torch.testing.assert_close(y, MASKABLE[layer.name](module, x, mask))
        valid = mask.unsqueeze(1) if mask.dim() > 1 else mask.reshape(-1, *[1] * (x.dim() - 1))
        torch.testing.assert_close(other(x.masked_fill(~valid, torch.nan), mask), y, rtol=0, atol=0)
        torch.testing.assert_close(dict(other.named_buffers()), dict(module.named_buffers()), rtol=0, atol=0)
        if layer.name.startswith("Batch"):
            values = x.movedim(1, -1)[valid.movedim(1, -1).squeeze(-1).expand(x.movedim(1, -1).shape[:-1])]
            torch.testing.assert_close(module.running_mean, 0.1 * values.mean(0))
            torch.testing.assert_close(module.running_var, 0.9 + 0.1 * values.var(0))
