"""The public functions: torch's results, layouts and signatures; errors before any change of state; normalize."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import cases
import pytest
import torch
import torch.nn.functional as tf
from cases import Norm
from torch import Tensor

import normwise.functional as nf

NAMES = ["layer_norm", "rms_norm", "group_norm", "instance_norm", "batch_norm"]


# Equality with torch.nn.functional


def assert_like_torch(norm: Norm, x: Tensor, dy: Tensor, tolerance: dict[str, float], **kwargs: Any) -> None:
    """y and gradients within torch's own error, whose types and shapes they share."""
    weight, bias = norm.parameters(x, kwargs.pop("parameter_dtype", None))
    ours, theirs = (norm(x, weight, bias, dy, functions=functions) for functions in (nf, tf))
    for name in ("y", "dx", "dweight", "dbias"):
        got, want = getattr(ours, name), getattr(theirs, name)
        assert (got is None) == (want is None), name
        if want is not None:
            torch.testing.assert_close(got, want, **tolerance, msg=lambda m, name=name: f"{name}: {m}")


DOUBLE = {"rtol": 1e-10, "atol": 1e-10}
"""torch sums in another order; its gradients of weights are sums of thousands."""

SINGLE = {"rtol": 1e-4, "atol": 1e-4}
"""torch's own error: 1e-6 of each value, in gradients summed over thousands of them."""

PRECISIONS = [(torch.float64, DOUBLE), (torch.float32, SINGLE)]

HALF = {torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2}, torch.float16: {"rtol": 2e-3, "atol": 2e-3}}
"""Two roundings of torch to 8 and to 11 bits, before and after the affine step."""


@pytest.mark.parametrize("size", cases.SIZES[1:])
@pytest.mark.parametrize("norm", cases.TORCH_NORMS, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS, ids=["float64", "float32"])
def test_equals_torch_at_any_size(norm: Norm, size: int, dtype: torch.dtype, tolerance: dict[str, float]):
    x, dy = cases.draw(norm.shape(size), 0.5, dtype)
    if 0 < size < norm.smallest:
        for functions in (nf, tf):
            with pytest.raises(ValueError, match=r"1 value|more than 1"):
                norm(x, None, None, dy, functions=functions)
        return
    assert_like_torch(norm, x, dy, tolerance)


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("norm", cases.TORCH_NORMS, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS, ids=["float64", "float32"])
def test_equals_torch_in_any_layout(norm: Norm, layout: str, dtype: torch.dtype, tolerance: dict[str, float]):
    assert_like_torch(norm, *map(cases.LAYOUTS[layout], cases.draw(cases.IMAGE, 0.5, dtype)), tolerance)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")  # torch's rms_norm
@pytest.mark.parametrize(("dtype", "parameter_dtype"), cases.HALF_TYPES, ids=str)
@pytest.mark.parametrize("norm", cases.TORCH_NORMS, ids=str)
def test_y_equals_torch_in_half_precision(norm: Norm, dtype: torch.dtype, parameter_dtype: torch.dtype):
    """Only y: torch sums the gradients of bf16 in bf16. rms_norm of mixed types is torch's composite: two roundings."""
    x, _ = cases.draw(cases.IMAGE, 0.5, dtype)
    weight, bias = norm.parameters(x, parameter_dtype)
    ours, theirs = (norm.call(functions, x, weight, bias, 1e-5, norm.running(x, weight)) for functions in (nf, tf))
    torch.testing.assert_close(ours, theirs, **HALF[dtype])


@pytest.mark.parametrize("shape", [(0, 4, 5), (3, 4, 0), (0, 4, 0), (3, 0, 5), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("norm", cases.NORMS, ids=str)
def test_empty_inputs(norm: Norm, shape: tuple[int, ...]):
    """Sums over nothing are zero; torch gives NaN or an error for some of them."""
    x = torch.zeros(shape)
    parameters = norm.parameters(x)
    y, dx, dweight, dbias, *_ = norm(x, *parameters, x)
    assert y.shape == dx.shape == shape
    assert torch.equal(dweight, torch.zeros_like(parameters[0]))
    assert not norm.centred or torch.equal(dbias, torch.zeros_like(parameters[1]))


@pytest.mark.parametrize("dims", [2, 3, 4, 5])
@pytest.mark.parametrize("norm", cases.TORCH_NORMS, ids=str)
def test_any_number_of_dimensions(norm: Norm, dims: int):
    if norm.name == "instance_norm" and dims == 2:
        dims = 6
    x, dy = cases.draw((3, 4, 2, 5, 2, 2)[:dims], 0.5, torch.float64)
    assert_like_torch(norm, x, dy, DOUBLE)


def test_layer_norm_and_rms_norm_of_one_dimension():
    x = torch.randn(7, dtype=torch.float64)
    torch.testing.assert_close(nf.layer_norm(x, (7,)), tf.layer_norm(x, (7,)), **DOUBLE)
    torch.testing.assert_close(nf.rms_norm(x, (7,)), tf.rms_norm(x, (7,)), **DOUBLE)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rms_norm_takes_torchs_eps_for_none(dtype: torch.dtype):
    """Tiny values show which eps it was: float64's own, else float32's."""
    x = (torch.randn(3, 8, dtype=torch.float64) * 1e-4).to(dtype)
    torch.testing.assert_close(nf.rms_norm(x, (8,)), tf.rms_norm(x, (8,)), **HALF.get(dtype, SINGLE))
    assert not torch.allclose(nf.rms_norm(x, (8,)), nf.rms_norm(x, (8,), eps=1e-5), rtol=0.1)


# Layout of the result


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("norm", cases.TORCH_NORMS, ids=str)
def test_strides_equal_torchs(norm: Norm, layout: str):
    """Where x is channels_last y is, in layer_norm and instance_norm too, where torch makes it contiguous."""
    x = cases.LAYOUTS[layout](torch.randn(cases.IMAGE))
    ours, theirs = (norm.call(functions, x, None, None, 1e-5, norm.running(x)) for functions in (nf, tf))
    if layout.startswith("channels") and norm.name in ("layer_norm", "layer_norm_of_two_axes", "instance_norm"):
        assert ours.is_contiguous(memory_format=torch.channels_last)
    else:
        assert ours.stride() == theirs.stride()


@pytest.mark.parametrize("name", NAMES)
def test_channels_last_of_volumes_is_kept(name: str):
    x = torch.randn(2, 4, 3, 2, 5).contiguous(memory_format=torch.channels_last_3d)
    norm = cases.BY_NAME[name]
    assert norm.call(nf, x, None, None, 1e-5, None).is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("norm", cases.TORCH_NORMS, ids=str)
def test_y_of_a_transposed_input_can_be_viewed_as_in_torch(norm: Norm):
    tokens = torch.randn(2, 6, 4, requires_grad=True)
    y = norm.call(nf, tokens.transpose(1, 2), None, None, 1e-5, norm.running(tokens.detach().transpose(1, 2)))
    dy = torch.randn(2, 24)
    dx = torch.autograd.grad(y.view(2, 24), tokens, dy)[0]
    alone = tokens.detach().transpose(1, 2).contiguous()
    torch.testing.assert_close(dx.transpose(1, 2), norm(alone, None, None, dy.view(2, 4, 6)).dx)


# Modes


@pytest.mark.parametrize("norm", cases.NORMS, ids=str)
def test_modes_give_the_same_values(norm: Norm):
    x, _ = cases.draw(cases.IMAGE)
    weight, bias = norm.parameters(x)
    call = lambda *args: norm.call(nf, *args, 1e-5, norm.running(x))  # noqa: E731
    expected = call(x.clone().requires_grad_(), weight, bias)
    assert expected.requires_grad
    with torch.no_grad():
        assert torch.equal(call(x.clone().requires_grad_(), weight, bias), expected)
    with torch.inference_mode():
        inferred = call(x, weight, bias)
    assert inferred.is_inference()
    assert torch.equal(inferred, expected)
    assert torch.equal(call(inferred.clone(), weight, bias), call(expected.detach(), weight, bias))
    assert not call(x, weight, bias).requires_grad


@pytest.mark.parametrize("norm", cases.NORMS, ids=str)
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)], ids=str)
def test_only_the_wanted_gradients(norm: Norm, wanted: tuple[int, ...]):
    """Frozen weights, a frozen input, and every mixture, give the gradients of the whole."""
    x, dy = cases.draw(cases.IMAGE)
    inputs = [x, *norm.parameters(x)]
    full = norm(*inputs, dy)[1:4]
    leaves = [None if t is None else t.clone().requires_grad_(i in wanted) for i, t in enumerate(inputs)]
    chosen = [t for t in leaves if t is not None and t.requires_grad]
    y = norm.call(nf, *leaves, 1e-5, norm.running(x))
    if not chosen:
        assert not y.requires_grad  # rms_norm has no bias to want a gradient of
        return
    grads = torch.autograd.grad(y, chosen, dy)
    for grad, i in zip(grads, [i for i in wanted if inputs[i] is not None], strict=True):
        assert torch.equal(grad, full[i])


@pytest.mark.parametrize("norm", [n for n in cases.NORMS if n.centred], ids=str)
def test_weight_and_bias_are_each_optional(norm: Norm):
    x, dy = cases.draw(cases.IMAGE)
    weight, bias = norm.parameters(x)
    for w, b in ((weight, None), (None, bias), (None, None)):
        got, want = norm(x, w, b, dy), norm.truth(x, w, b, dy)
        cases.assert_a1(got, want)


@pytest.mark.parametrize("norm", cases.NORMS, ids=str)
def test_the_input_is_left_as_it_was(norm: Norm):
    x, dy = cases.draw(cases.IMAGE)
    weight, bias = norm.parameters(x)
    before = [None if t is None else t.clone() for t in (x, weight, bias, dy)]
    norm(x, weight, bias, dy)
    for t, was in zip((x, weight, bias, dy), before, strict=True):
        assert t is was or torch.equal(t, was)


# Running statistics


def statistics(channels: int = 4, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(channels, dtype=dtype), torch.rand(channels, dtype=dtype) + 0.5


@pytest.mark.parametrize("shape", [(5, 4, 3), (2, 4, 3, 3), (1, 4, 2)], ids=str)
@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, 0.73])
@pytest.mark.parametrize("name", ["batch_norm", "instance_norm"])
def test_running_statistics_equal_torchs(name: str, momentum: float, shape: tuple[int, ...]):
    ours = statistics()
    theirs = tuple(t.clone() for t in ours)
    for _ in range(3):
        x = torch.randn(shape, dtype=torch.float64) + 2
        getattr(nf, name)(x, *ours, None, None, True, momentum)
        getattr(tf, name)(x, *theirs, None, None, True, momentum)
        torch.testing.assert_close(ours, theirs, **DOUBLE)
    x = torch.randn(shape, dtype=torch.float64)
    got = getattr(nf, name)(x, *ours, None, None, False)
    torch.testing.assert_close(got, getattr(tf, name)(x, *theirs, None, None, False), **DOUBLE)


def test_running_statistics_of_an_empty_batch_stay():
    mean, var = statistics()
    before = mean.clone(), var.clone()
    count = torch.tensor(3)
    for x in (torch.zeros(0, 4), torch.zeros(0, 4, 3), torch.zeros(2, 4, 0)):
        nf.batch_norm(x, mean, var, training=True, num_batches_tracked=count)
    nf.instance_norm(torch.zeros(0, 4, 3), mean, var)
    nf.instance_norm(torch.zeros(0, 4, 3), mean, var, mask=torch.zeros(0, 3, dtype=torch.bool))
    assert torch.equal(mean, before[0])
    assert torch.equal(var, before[1])
    assert count == 6


def test_momentum_none_averages_all_batches():
    mean, var = statistics()
    count = torch.tensor(0)
    batches = torch.randn(4, 6, 4, dtype=torch.float64)
    for x in batches:
        nf.batch_norm(x, mean, var, training=True, momentum=None, num_batches_tracked=count)
    torch.testing.assert_close(mean, batches.mean((0, 1)))
    torch.testing.assert_close(var, batches.var(1).mean(0))
    assert count == 4
    before = mean.clone(), var.clone()
    nf.batch_norm(batches[0], mean, var, training=True, momentum=None)  # without a count, no average to join
    assert torch.equal(mean, before[0])
    assert torch.equal(var, before[1])


def test_eval_moves_nothing():
    mean, var = statistics()
    count, before = torch.tensor(5), (mean.clone(), var.clone())
    nf.batch_norm(torch.randn(3, 4), mean, var, num_batches_tracked=count)
    nf.instance_norm(torch.randn(3, 4, 2), mean, var, use_input_stats=False)
    assert torch.equal(mean, before[0])
    assert torch.equal(var, before[1])
    assert count == 5


@pytest.mark.parametrize("name", ["batch_norm", "instance_norm", "group_norm"])
def test_a_mask_of_ones_is_no_mask(name: str):
    x, dy = cases.draw((3, 4, 5), dtype=torch.float64)
    call = {
        "batch_norm": lambda x, m: nf.batch_norm(x, None, None, training=True, mask=m),
        "instance_norm": lambda x, m: nf.instance_norm(x, mask=m),
        "group_norm": lambda x, m: nf.group_norm(x, 2, mask=m),
    }[name]
    results = []
    for mask in (None, torch.ones(3, dtype=torch.bool), torch.ones(3, 5, dtype=torch.bool)):
        leaf = x.clone().requires_grad_()
        y = call(leaf, mask)
        results.append((y, *torch.autograd.grad(y, leaf, dy)))
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[2], results[0])


def test_a_mask_in_training_and_in_eval():
    """A padded batch ends with the running statistics, and eval the outputs, of the unpadded one."""
    x, mask = torch.randn(4, 3, 6, dtype=torch.float64), torch.rand(4, 6) < 0.6
    valid = mask[:, None].expand(x.shape)
    padded, dense = statistics(3), None
    dense = tuple(t.clone() for t in padded)
    values = x.movedim(1, -1)[mask]
    y = nf.batch_norm(x.masked_fill(~valid, math.nan), *padded, training=True, mask=mask)
    torch.testing.assert_close(y.movedim(1, -1)[mask], nf.batch_norm(values, *dense, training=True))
    torch.testing.assert_close(padded, dense)
    y = nf.batch_norm(x.masked_fill(~valid, math.nan), *padded, mask=mask)
    torch.testing.assert_close(y.movedim(1, -1)[mask], nf.batch_norm(values, *dense))
    assert (y[~valid] == 0).all()


@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_a_mask_without_data(kind: str):
    """How many positions are valid is not known; the shape of the result is."""
    with torch._subclasses.FakeTensorMode() if kind == "fake" else torch.device("meta"):
        x, mask = torch.empty(3, 4, 5), torch.empty(3, 5, dtype=torch.bool)
        mean, var = torch.empty(4), torch.empty(4)
        for y in (
            nf.batch_norm(x, mean, var, training=True, mask=mask),
            nf.instance_norm(x, mean, var, mask=mask),
            nf.group_norm(x, 2, mask=mask),
        ):
            assert y.shape == x.shape


# Nested tensors


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors(name: str, layout: torch.layout):
    parts = [torch.randn(length, 4, dtype=torch.float64) for length in (3, 1, 5)]
    nested = torch.nested.nested_tensor(parts, layout=layout, requires_grad=True)
    norm, flat, dy = cases.BY_NAME[name], torch.cat(parts), torch.randn(9, 4, dtype=torch.float64)
    weight, bias = (t if t is None else t.requires_grad_() for t in norm.parameters(flat))
    y = nf.layer_norm(nested, (4,), weight, bias) if norm.centred else nf.rms_norm(nested, (4,), weight, 1e-5)
    assert y.is_nested
    assert y.layout == layout
    assert (y + nested).is_nested  # of the same ragged shape
    wanted = [t for t in (nested, weight, bias) if t is not None]
    dx, *grads = torch.autograd.grad(torch.cat(y.unbind()), wanted, dy)
    expected = norm(flat, weight, bias, dy)
    torch.testing.assert_close(torch.cat(y.unbind()), expected.y)
    torch.testing.assert_close(torch.cat(dx.unbind()), expected.dx)
    torch.testing.assert_close(grads, [g for g in expected[2:4] if g is not None])


def test_jagged_tensors_with_holes_and_other_ragged_axes():
    values = torch.randn(10, 4)
    holes = torch.nested.nested_tensor_from_jagged(values, torch.tensor([0, 4, 10]), torch.tensor([2, 5]))
    for y, x in zip(nf.layer_norm(holes, (4,)).unbind(), holes.unbind(), strict=True):
        assert torch.equal(y, nf.layer_norm(x, (4,)))
    with pytest.raises(ValueError, match=r"only the regular axes of a jagged tensor.*leave the batch and the jagged"):
        nf.layer_norm(holes, (10, 4))
    with pytest.raises(ValueError, match="ragged"):  # torch's nested tensor checks this name itself
        nf.rms_norm(holes, (10, 4))


# Signatures


@pytest.mark.parametrize("name", NAMES)
def test_signatures_are_torchs(name: str):
    """But for x, and for what is added after the star."""
    ours, theirs = (inspect.signature(getattr(f, name)).parameters.values() for f in (nf, tf))
    positional = [(p.name, p.default) for p in ours if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == [("x" if p.name == "input" else p.name, p.default) for p in theirs]
    added = {
        "batch_norm": ["mask", "num_batches_tracked", "reproducible"],
        "group_norm": ["mask"],
        "instance_norm": ["mask"],
    }
    keyword_only = [p for p in ours if p.kind is p.KEYWORD_ONLY]
    assert [p.name for p in keyword_only] == added.get(name, [])
    assert all(p.default is None for p in keyword_only)


# Errors: one line that starts with the function's name, before anything is changed


X = torch.randn(2, 4, 3)
INTEGER, COMPLEX = torch.zeros(2, 4, 3, dtype=torch.int64), torch.zeros(2, 4, 3, dtype=torch.complex64)
ELSEWHERE = torch.zeros(4, device="meta")
MINIMAL: dict[str, Callable[..., Tensor]] = {
    "layer_norm": lambda x=X, **kw: nf.layer_norm(x, (3,), **kw),
    "rms_norm": lambda x=X, **kw: nf.rms_norm(x, (3,), **kw),
    "group_norm": lambda x=X, **kw: nf.group_norm(x, 2, **kw),
    "instance_norm": lambda x=X, **kw: nf.instance_norm(x, **kw),
    "batch_norm": lambda x=X, **kw: nf.batch_norm(x, None, None, training=True, **kw),
    "normalize": lambda x=X, **kw: nf.normalize(x, "n c l -> n l", "c", **kw),
}


def message(error: type[Exception], name: str, call: Callable[..., Any], **arguments: Any) -> str:
    with pytest.raises(error) as caught:
        call(**arguments)
    text = str(caught.value)
    assert text.startswith((f"{name}: ", "pattern: "))
    assert text.endswith(".")
    assert "; " in text
    assert "\n" not in text
    return text


@pytest.mark.parametrize("name", MINIMAL)
@pytest.mark.parametrize(
    ("arguments", "error", "problem"),
    [
        ({"x": [[1.0]]}, TypeError, "x must be a torch.Tensor; got list"),
        ({"x": INTEGER}, TypeError, "x must be floating point; got int64"),
        ({"x": COMPLEX}, TypeError, "x must be floating point; got complex64"),
        ({"x": INTEGER.bool()}, TypeError, "x must be floating point; got bool"),
        ({"eps": -1e-5}, ValueError, "eps must be 0 or more and finite; got -1e-05"),
        ({"eps": math.nan}, ValueError, "eps must be 0 or more and finite; got nan"),
        ({"eps": math.inf}, ValueError, "eps must be 0 or more and finite; got inf"),
        ({"weight": torch.ones(5)}, ValueError, r"weight must have shape \((3|4),\) to fit x \(2, 4, 3\); got \(5,\)"),
        ({"weight": torch.ones(1)}, ValueError, r"weight must have shape"),
        ({"weight": torch.ones(())}, ValueError, r"weight must have shape"),
        ({"weight": torch.ones(4, 3)}, ValueError, r"weight must have shape"),
    ],
    ids=str,
)
def test_wrong_input_eps_or_weight(name: str, arguments: dict[str, Any], error: type[Exception], problem: str):
    assert re.search(problem, message(error, name, MINIMAL[name], **arguments))


@pytest.mark.parametrize(
    ("name", "parameter"),
    [
        (name, parameter)
        for name in MINIMAL
        for parameter in ("weight", "bias")
        if (name, parameter) != ("rms_norm", "bias")
    ],
)
def test_wrong_type_or_device_of_a_parameter(name: str, parameter: str):
    size = 3 if name in ("layer_norm", "rms_norm") else 4
    integer, elsewhere = torch.ones(size, dtype=torch.int32), torch.ones(size, device="meta")
    text = message(TypeError, name, MINIMAL[name], **{parameter: integer})
    assert f"{parameter} must be floating point; got int32" in text
    text = message(ValueError, name, MINIMAL[name], **{parameter: elsewhere})
    assert f"{parameter} must be on x's device cpu; it is on meta; move one with .to()" in text


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize(
    ("shape", "error", "problem"),
    [
        ((4,), ValueError, r"the last 1 axes of x must be normalized_shape \(4,\); x is \(2, 4, 3\)"),
        ((3, 4), ValueError, "the last 2 axes"),
        ((2, 2, 4, 3), ValueError, "the last 4 axes"),
        ((), ValueError, "must name at least one axis"),
        (3, TypeError, r"must be a sequence of sizes; got 3; write \(3,\)"),
    ],
    ids=str,
)
def test_wrong_normalized_shape(name: str, shape: Any, error: type[Exception], problem: str):
    text = message(error, name, lambda: getattr(nf, name)(X, shape))
    assert re.search(problem, text)


@pytest.mark.parametrize(
    ("name", "call", "problem"),
    [
        ("group_norm", lambda: nf.group_norm(X, 3), "num_groups must divide the 4 channels; got 3"),
        ("group_norm", lambda: nf.group_norm(X, 0), "num_groups must divide the 4 channels; got 0"),
        ("group_norm", lambda: nf.group_norm(X, -2), "num_groups must divide the 4 channels; got -2"),
        ("group_norm", lambda: nf.group_norm(X[0, 0], 1), r"x must have \(N, C, ...\); got shape \(3,\)"),
        ("group_norm", lambda: nf.group_norm(X[:1, :, 0], 4), "1 value per group has no variance"),
        ("instance_norm", lambda: nf.instance_norm(X[:, :, 0]), "1 value per channel of an example has no variance"),
        ("instance_norm", lambda: nf.instance_norm(X[:, :, :1]), "1 value per channel of an example has no variance"),
        ("instance_norm", lambda: nf.instance_norm(X, use_input_stats=False), "eval needs running statistics"),
        ("batch_norm", lambda: nf.batch_norm(X, None, None), "eval needs running statistics; running_mean is None"),
        ("batch_norm", lambda: nf.batch_norm(X, X[0, :, 0], None), "must come together; running_var is None"),
        (
            "batch_norm",
            lambda: nf.batch_norm(X, None, X[0, :, 0], training=True),
            "must come together; running_mean is None",
        ),
        (
            "batch_norm",
            lambda: nf.batch_norm(X[:1, :, :1], None, None, training=True),
            r"1 value per channel in training has no variance \(x is \(1, 4, 1\)\); use a larger batch",
        ),
        (
            "batch_norm",
            lambda: nf.batch_norm(
                X, None, None, training=True, mask=torch.eye(2, 3).bool() & torch.eye(2, 3)[0].bool()
            ),
            "1 valid value per channel in training has no variance",
        ),
        ("batch_norm", lambda: nf.batch_norm(X[0, 0], None, None, training=True), r"x must have \(N, C, ...\)"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_wrong_channels_values_or_statistics(name: str, call: Callable[[], Tensor], problem: str):
    assert re.search(problem, message(ValueError, name, call))


WRONG_IN_TRAINING: list[tuple[type[Exception], dict[str, Any]]] = [
    (ValueError, {"x": torch.randn(2, 5, 3)}),
    (ValueError, {"x": torch.randn(1, 4, 1)}),
    (TypeError, {"x": INTEGER}),
    (ValueError, {"eps": -1.0}),
    (ValueError, {"weight": torch.ones(5)}),
    (ValueError, {"bias": ELSEWHERE}),
    (ValueError, {"running_var": torch.ones(5)}),
    (ValueError, {"running_var": ELSEWHERE}),
    (TypeError, {"running_var": torch.ones(4, dtype=torch.int64)}),
    (ValueError, {"running_var": None}),
    (TypeError, {"mask": torch.ones(2, 3)}),
    (ValueError, {"mask": torch.ones(3, dtype=torch.bool)}),
    (ValueError, {"mask": torch.ones(2, 4, dtype=torch.bool)}),
    (ValueError, {"mask": torch.ones(2, 4, 3, dtype=torch.bool)}),
    (ValueError, {"mask": torch.ones(2, 3, dtype=torch.bool, device="meta")}),
]


@pytest.mark.parametrize("name", ["batch_norm", "instance_norm"])
@pytest.mark.parametrize(("error", "change"), WRONG_IN_TRAINING, ids=str)
def test_state_is_unchanged_after_an_error(name: str, error: type[Exception], change: dict[str, Any]):
    mean, var = statistics(4, torch.float32)
    count = torch.tensor(7)
    before = mean.clone(), var.clone()
    counted = {"num_batches_tracked": count, "training": True} if name == "batch_norm" else {}
    arguments = {"x": X, "running_mean": mean, "running_var": var, **counted, **change}
    message(error, name, getattr(nf, name), **arguments)
    assert torch.equal(mean, before[0])
    assert torch.equal(var, before[1])
    assert count == 7


@pytest.mark.parametrize("name", ["group_norm", "instance_norm", "batch_norm"])
@pytest.mark.parametrize(
    ("mask", "error", "problem"),
    [
        (torch.ones(2, 3), TypeError, "mask must be boolean, True where valid; got float32"),
        (torch.ones(3).bool(), ValueError, r"mask must have shape \(2,\) or \(2, 3\) for x \(2, 4, 3\); got \(3,\)"),
        (torch.ones(2, 4).bool(), ValueError, "mark examples or positions, not channels"),
        (torch.ones(2, 3, device="meta").bool(), ValueError, "mask must be on x's device cpu; it is on meta"),
    ],
    ids=["type", "length", "channels", "device"],
)
def test_wrong_mask(name: str, mask: Tensor, error: type[Exception], problem: str):
    assert re.search(problem, message(error, name, MINIMAL[name], mask=mask))


# normalize


N, C, H, W = cases.IMAGE
FAMILIES: list[tuple[str, str, tuple[int, ...], dict[str, int], Callable[[Tensor, Tensor, Tensor], Tensor]]] = [
    ("n c h w -> c", "c", (C,), {}, lambda x, w, b: nf.batch_norm(x, None, None, w, b, True)),
    ("b f y x -> f", "f", (C,), {}, lambda x, w, b: nf.batch_norm(x, None, None, w, b, True)),
    ("n c h w -> n c", "c", (C,), {}, lambda x, w, b: nf.instance_norm(x, None, None, w, b)),
    ("n (g c) h w -> n g", "(g c)", (C,), {"g": 2}, lambda x, w, b: nf.group_norm(x, 2, w, b)),
    ("n (g c) h w -> n g", "(g c)", (C,), {"c": 2}, lambda x, w, b: nf.group_norm(x, 3, w, b)),
    ("n c h w -> n", "c", (C,), {}, lambda x, w, b: nf.group_norm(x, 1, w, b)),
    ("n c h w -> n c h", "w", (W,), {}, lambda x, w, b: nf.layer_norm(x, (W,), w, b)),
    ("n ... w -> n ...", "w", (W,), {}, lambda x, w, b: nf.layer_norm(x, (W,), w, b)),
    ("n c h w -> n", "c h w", (C, H, W), {}, lambda x, w, b: nf.layer_norm(x, (C, H, W), w, b)),
    (
        "n c h w -> n h w",
        "c",
        (C,),
        {},
        lambda x, w, b: nf.layer_norm(x.movedim(1, -1), (C,), w, b).movedim(-1, 1),
    ),
    (
        "n h w c -> c",
        "c",
        (W,),
        {},
        lambda x, w, b: nf.batch_norm(x.movedim(-1, 1), None, None, w, b, True).movedim(1, -1),
    ),
    (
        "n h w (g c) -> n g",
        "(g c)",
        (W,),
        {"g": 7},
        lambda x, w, b: nf.group_norm(x.movedim(-1, 1), 7, w, b).movedim(1, -1),
    ),
]


@pytest.mark.parametrize(
    ("pattern", "affine", "shape", "sizes", "family"), FAMILIES, ids=lambda v: None if callable(v) else str(v)
)
def test_normalize_equals_each_family(
    pattern: str, affine: str, shape: tuple[int, ...], sizes: dict[str, int], family: Callable[..., Tensor]
):
    """To the bit: it is the same operator. Without parameters several fit, and the one over whole rows is taken."""
    x, dy = cases.draw(cases.IMAGE)
    weight, bias = torch.randn(shape), torch.randn(shape)
    for layout in ("contiguous", "channels_last", "transposed"):
        leaf = cases.LAYOUTS[layout](x).requires_grad_()
        ours, theirs = nf.normalize(leaf, pattern, affine, weight, bias, **sizes), family(leaf, weight, bias)
        assert torch.equal(ours, theirs)
        assert torch.equal(*(torch.autograd.grad(y, leaf, dy)[0] for y in (ours, theirs)))
        ours, theirs = nf.normalize(leaf, pattern, **sizes), family(leaf, None, None)
        assert torch.equal(ours, theirs) or not cases.EXACT_SUMS
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


SPLIT = (N, 2, C // 2, H, W)
PATTERNS: list[tuple[str, dict[str, int], tuple[int, ...], tuple[int, ...]]] = [
    ("n c h w -> n h", {}, cases.IMAGE, (1, 3)),
    ("n c h w -> h n", {}, cases.IMAGE, (1, 3)),
    ("n c h w -> c h", {}, cases.IMAGE, (0, 3)),
    ("n c h w -> w h", {}, cases.IMAGE, (0, 1)),
    ("n c h w -> n c w", {}, cases.IMAGE, (2,)),
    ("n c h w -> c h w", {}, cases.IMAGE, (0,)),
    ("n c h w -> w", {}, cases.IMAGE, (0, 1, 2)),
    ("n c h w -> n", {}, cases.IMAGE, (1, 2, 3)),
    ("n c h w ->", {}, cases.IMAGE, (0, 1, 2, 3)),
    ("n (g c) h w -> n g", {"g": 2}, SPLIT, (2, 3, 4)),
    ("n (g c) h w -> n c", {"g": 2}, SPLIT, (1, 3, 4)),
    ("n (g c) h w -> g", {"g": 2}, SPLIT, (0, 2, 3, 4)),
    ("n (g c) h w -> n g h w", {"g": 2}, SPLIT, (2,)),
]
AFFINE: list[tuple[str | None, tuple[int, ...], tuple[int, ...]]] = [
    (None, (), ()),
    ("h", (H,), (H, 1)),
    ("w h", (W, H), (H, W)),
    ("n", (N,), (N, 1, 1, 1)),
]
"""The affine axes, the shape of weight and bias, and the shape that broadcasts against the input (h before w)."""


@pytest.mark.parametrize(("pattern", "sizes", "split", "dims"), PATTERNS, ids=str)
@pytest.mark.parametrize(("affine", "shape", "spread"), AFFINE, ids=str)
def test_normalize_equals_the_formula(
    pattern: str,
    sizes: dict[str, int],
    split: tuple[int, ...],
    dims: tuple[int, ...],
    affine: str | None,
    shape: tuple[int, ...],
    spread: tuple[int, ...],
):
    x, dy = cases.draw(cases.IMAGE, 3.0, torch.float64)
    x.requires_grad_()
    weight, bias = (torch.randn(shape, dtype=torch.float64, requires_grad=True) if affine else None for _ in range(2))
    values = x.reshape(split)
    mean, var = values.mean(dims, keepdim=True), values.var(dims, correction=0, keepdim=True)
    expected = ((values - mean) / (var + 1e-5).sqrt()).reshape(x.shape)
    wanted = [x]
    if weight is not None and bias is not None:
        w, b = ((t.T if affine == "w h" else t).reshape(spread) for t in (weight, bias))
        expected, wanted = expected * w + b, [x, weight, bias]
    y = nf.normalize(x, pattern, affine, weight, bias, **sizes)
    torch.testing.assert_close(y, expected, **DOUBLE)
    torch.testing.assert_close(
        torch.autograd.grad(y, wanted, dy), torch.autograd.grad(expected, wanted, dy), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize(
    ("short", "long", "sizes"),
    [
        ("n c ... -> n ...", "n c h w -> n h w", {}),
        ("n ... -> n", "n c h w -> n", {}),
        ("n ... c -> c", "n h w c -> c", {}),
        ("n c ... -> ...", "n c h w -> h w", {}),
        ("... -> ", "n c h w ->", {}),
        ("n (g c) ... -> n g ...", "n (g c) h w -> n g h w", {"g": 3}),
    ],
)
def test_normalize_with_an_ellipsis(short: str, long: str, sizes: dict[str, int]):
    x = torch.randn(cases.IMAGE)
    assert torch.equal(nf.normalize(x, short, **sizes), nf.normalize(x, long, **sizes))


def test_normalize_with_a_split_batch():
    """Ghost Batch Norm: groups of the batch, each with statistics of its own."""
    x, weight = torch.randn(6, 4, 5), torch.randn(4)
    y = nf.normalize(x, "(g n) c l -> g c", "c", weight, g=2)
    parts = [nf.batch_norm(part, None, None, weight, training=True) for part in x.chunk(2)]
    torch.testing.assert_close(y, torch.cat(parts))


@pytest.mark.parametrize("pattern", ["n c h w -> n h w", "n c h w -> c", "n c h w -> n c", "n (g c) h w -> n g"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_normalize_keeps_the_memory_format(pattern: str, memory_format: torch.memory_format):
    x = torch.randn(cases.IMAGE).contiguous(memory_format=memory_format)
    y = nf.normalize(x, pattern, **({"g": 2} if "g" in pattern else {}))
    assert y.stride() == x.stride()


@pytest.mark.parametrize(
    ("pattern", "arguments", "problem"),
    [
        ("n c -> n", {}, "describes 2 dimensions; the input has 3"),
        ("n c h w ... -> n", {}, "describes 4 or more dimensions; the input has 3"),
        ("n c l", {}, "must read 'axes -> axes"),
        ("n c l -> d", {}, "'d' does not"),
        ("n c l -> n c l", {}, "at least one axis must be averaged"),
        ("n (g c) l -> n g", {}, r"the parts of \(g c\) must be known; only its product 4 is; give g="),
        ("n (g c) l -> n g", {"g": 3}, "must multiply to 4; g=3 does not"),
        ("n c l -> n l", {"groups": 2}, "'groups' is none of 'n c l -> n l'; choose from n c l"),
        ("n c l -> n l", {"wieght": torch.ones(4)}, "'wieght' is none of"),
        ("n c l -> n l", {"weight": torch.ones(4)}, "affine must name the axes of weight and bias; got none"),
        ("n c l -> n l", {"bias": torch.ones(4)}, "affine must name the axes of weight and bias; got none"),
        (
            "n c l -> n l",
            {"affine": "d", "weight": torch.ones(4)},
            "affine axes must stand in the pattern; 'd' does not",
        ),
        ("n c l -> n l", {"affine": "c -> l"}, "'->' in 'c -> l' is no axis"),
        ("n c l -> n l", {"affine": "c c"}, "'c' comes twice"),
        ("n c l -> n l", {"affine": "c l", "weight": torch.ones(4)}, r"weight must have shape \(4, 3\)"),
        ("n c l -> n l", {"affine": "...", "weight": torch.ones(4)}, "affine axes must stand in the pattern"),
    ],
    ids=str,
)
def test_wrong_patterns(pattern: str, arguments: dict[str, Any], problem: str):
    text = message(ValueError, "normalize", lambda: nf.normalize(X, pattern, **arguments))
    assert re.search(problem, text)


def test_normalize_refuses_one_value_per_statistic_of_a_batch():
    text = message(ValueError, "normalize", lambda: nf.normalize(X[:1, :, :1], "n c l -> c"))
    assert "1 value per statistic in training has no variance" in text
    assert nf.normalize(X[:, :1], "n c l -> n l").abs().max() == 0  # of its own example it is 0, as in layer_norm


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm", "group_norm", "batch_norm"])
def test_the_reference_agrees_with_the_functions(norm: str):
    """The functions add checks and layout to the reference, and nothing to its numbers."""
    x, dy = cases.draw(cases.IMAGE, dtype=torch.float64)
    case = cases.BY_NAME[norm]
    parameters = case.parameters(x)
    torch.testing.assert_close(case(x, *parameters, dy)[:4], case.truth(x, *parameters, dy)[:4], rtol=1e-13, atol=1e-13)


def test_results_under_a_transform_can_be_viewed_as_torchs_can():
    x = torch.randn(3, 4, 5, 6)
    assert torch.func.vmap(lambda t: nf.batch_norm(t, None, None, training=True).view(-1))(x).shape == (3, 120)
