"""The fused functions: a sum and its norm, Batch Norm and what follows it; and the flag for exact sums."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import cases
import pytest
import torch
import torch.nn.functional as tf
from cases import Norm
from test_functional import message, statistics
from test_ops import assert_compiled, transforms
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import normwise as nw
import normwise.functional as nf

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),  # torch's own jvp
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),  # and inductor
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # torch's own compiler
]

# The sum and its norm

NAMES = ["fused_add_layer_norm", "fused_add_rms_norm"]
Both = tuple[Tensor, Tensor]


def norm_of(name: str) -> Norm:
    return cases.BY_NAME[name.removeprefix("fused_add_")]


def fused(name: str, x: Tensor, residual: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Both:
    affine = (weight, bias) if name == "fused_add_layer_norm" else (weight, cases.EPS)
    return getattr(nf, name)(x, residual, tuple(x.shape[-1:]), *affine)


def unfused(
    name: str,
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    functions: Any = nf,
) -> Both:
    h = x + residual
    return norm_of(name).call(functions, h, weight, bias, cases.EPS, None), h


def inputs(name: str, shape: Sequence[int], ratio: float = 0.0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x, residual, weight and, where the norm has one, bias."""
    x, residual = cases.draw(shape, ratio, dtype)
    return [x, residual, *(p for p in norm_of(name).parameters(x) if p is not None)]


def gradients(
    outputs: Sequence[Tensor], leaves: Sequence[Tensor], grads: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """As autograd gives them; None for what the outputs do not depend on."""
    return torch.autograd.grad(outputs, leaves, grads, allow_unused=True)


def assert_bits_of_the_pair(name: str, tensors: Sequence[Tensor], strides: bool = True) -> None:
    """Without and with a gradient."""
    (y, h), (want_y, want_h) = fused(name, *tensors), unfused(name, *tensors)
    leaves = [t.detach().requires_grad_() for t in tensors]
    for got_y, got_h in ((y, h), fused(name, *leaves)):
        assert got_y.dtype == want_y.dtype
        assert got_h.dtype == want_h.dtype
        assert torch.equal(got_h, want_h)
        assert torch.equal(got_y, want_y)
        assert not strides or (got_y.stride(), got_h.stride()) == (want_y.stride(), want_h.stride())


@pytest.mark.parametrize("ratio", cases.RATIOS)
@pytest.mark.parametrize("size", cases.SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_the_bits_are_those_of_the_unfused_pair_at_any_size(name: str, size: int, ratio: float):
    assert_bits_of_the_pair(name, inputs(name, (5, size), ratio))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_the_bits_are_those_of_the_unfused_pair_in_any_layout(name: str, layout: str, dtype: torch.dtype):
    """Both tensors laid out alike keep their layout; two layouts give one of them."""
    x, residual, *parameters = inputs(name, cases.IMAGE, 1.0, dtype)
    change = cases.LAYOUTS[layout]
    assert_bits_of_the_pair(name, [change(x), change(residual), *parameters], strides=layout != "expanded")
    assert_bits_of_the_pair(name, [x, change(residual), *parameters], strides=False)
    assert_bits_of_the_pair(name, [change(x), residual, *parameters], strides=False)


@pytest.mark.parametrize("types", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_mixed_types_are_promoted_as_by_addition(name: str, types: tuple[torch.dtype, torch.dtype]):
    x, residual, *parameters = inputs(name, (6, 33))
    x, residual = x.to(types[0]), residual.to(types[1])
    assert_bits_of_the_pair(name, [x, residual, *parameters])
    leaves = [t.requires_grad_() for t in (x, residual)]
    grads = [torch.randn(6, 33) + 0.5 for _ in range(2)]
    got = gradients(fused(name, x, residual, *parameters), leaves, grads)
    assert [g.dtype for g in got] == list(types)
    expected = gradients(unfused(name, x, residual, *parameters), leaves, grads)
    # dx is rounded once more to float32 in the unfused pair; that may move the rounding to 8 or 11 bits by one step
    torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("types", [(torch.float32, torch.float32), (torch.float32, torch.float64)], ids=str)
def test_eps_none_is_that_of_the_type_of_h(types: tuple[torch.dtype, torch.dtype]):
    """Tiny values show which eps it was."""
    x, residual = ((torch.randn(3, 8) * 1e-4).to(dtype) for dtype in types)
    y, h = nf.fused_add_rms_norm(x, residual, (8,))
    assert torch.equal(y, nf.rms_norm(h, (8,)))
    assert not torch.allclose(y, nf.rms_norm(h, (8,), eps=1e-5), rtol=0.1)


@pytest.mark.parametrize("ratio", cases.RATIOS)
@pytest.mark.parametrize("shape", [(5, 0), (0, 7), (1, 1), (5, 33), (3, 4, 130), (2, 1023)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_within_a1(name: str, shape: tuple[int, ...], ratio: float):
    leaves = [t.requires_grad_() for t in inputs(name, shape, ratio)]
    y, h = fused(name, *leaves)
    dy, dh = cases.draw(shape)
    dx, dresidual, *rest = gradients((y, h), leaves, (dy, dh))
    assert torch.equal(dx, dresidual)
    parameters = [*(p.detach() for p in leaves[2:]), None][:2]
    truth = norm_of(name).truth(h.detach(), *parameters, dy)
    few = {"dx": torch.stack((*truth.dx_terms, dh.double()))} if shape[-1] <= 2 else {}  # terms that cancel
    cases.assert_a1(cases.Results(y, dx, *[*rest, None][:2]), truth._replace(dx=truth.dx + dh), **few)


@pytest.mark.parametrize(("dtype", "parameter_dtype"), cases.HALF_TYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_within_a2(name: str, dtype: torch.dtype, parameter_dtype: torch.dtype):
    """The gradient of h is added before the one rounding."""
    norm, (x, residual), (dy, dh) = norm_of(name), *(cases.draw((65, 130), 0.5, dtype) for _ in range(2))
    weight, bias = norm.parameters(x, parameter_dtype)
    leaves = [t.requires_grad_() for t in (x, residual, weight, bias) if t is not None]
    y, h = fused(name, *leaves)
    dx, _, *rest = gradients((y, h), leaves, (dy, dh))
    truth = norm.truth(h.detach(), *(t if t is None else t.detach() for t in (weight, bias)), dy)
    assert ((y - truth.y).abs() <= cases.a2_elementwise(truth.y, truth.y_terms, dtype)).all()
    terms = truth.dx_terms if cases.EXACT_SUMS else truth.dx_magnitudes
    exact = truth.dx + dh
    assert dx.dtype == dtype
    assert ((dx - exact).abs() <= cases.a2_elementwise(exact, (*terms, dh.double()), dtype)).all()
    limit = cases.A2_SUMS.get(parameter_dtype, cases.A2_WIDE)
    for got, key in zip(rest, ("dweight", "dbias"), strict=False):
        want = getattr(truth, key)
        scale = None if cases.EXACT_SUMS else max(want, truth.summands[key], key=torch.linalg.vector_norm)
        assert got.dtype == parameter_dtype
        assert cases.error(got, want, scale) <= limit


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("used", [(0,), (1,), (0, 1)], ids=["y", "h", "y and h"])
@pytest.mark.parametrize("name", NAMES)
def test_unused_outputs_and_unwanted_gradients(name: str, used: tuple[int, ...], wanted: tuple[int, ...]):
    """As of the unfused pair: None where nothing flows, the same values elsewhere."""
    tensors = inputs(name, (3, 5), dtype=torch.float64)
    leaves = [t.requires_grad_(i in wanted) for i, t in enumerate(tensors)]
    chosen = [t for t in leaves if t.requires_grad]
    grads = [torch.randn(3, 5, dtype=torch.float64) + 0.5 for _ in used]
    results = []
    for call in (fused, unfused):
        outputs = [call(name, *leaves)[i] for i in used]
        flows = [(t, g) for t, g in zip(outputs, grads, strict=True) if t.requires_grad]
        outputs, cotangents = zip(*flows, strict=True) if flows else ((), ())
        results.append(gradients(outputs, chosen, cotangents) if flows else None)
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_h_changed_in_place_is_noticed(name: str):
    x, residual, weight, *_ = (t.requires_grad_() for t in inputs(name, (3, 5)))
    y, h = fused(name, x, residual, weight)
    with torch.no_grad():
        h.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(torch.ones(3, 5))


@pytest.mark.parametrize("name", NAMES)
def test_the_sum_of_a_tensor_with_itself(name: str):
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    grads = [torch.randn(3, 5, dtype=torch.float64) + 0.5 for _ in range(2)]
    results = [gradients(call(name, x, x), (x,), grads) for call in (fused, unfused)]
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck_of_all_inputs_and_both_outputs(name: str):
    leaves = [t.requires_grad_() for t in inputs(name, (3, 5), dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda *t: fused(name, *t), leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda *t: fused(name, *t), leaves)
    assert torch.autograd.gradgradcheck(lambda *t: fused(name, *t)[0], leaves)


@pytest.mark.parametrize("name", NAMES)
def test_transforms_of_the_fused_sum_equal_torchs(name: str):
    x, _, *parameters = inputs(name, (2, 4, 3), dtype=torch.float64)
    several, dy = torch.randn(3, 2, 4, 3, dtype=torch.float64), torch.randn(2, 4, 3, dtype=torch.float64) + 0.5

    def ours(x: Tensor, *parameters: Tensor) -> Tensor:
        y, h = fused(name, x, x.cos(), *parameters)
        return y + 2 * h

    def theirs(x: Tensor, *parameters: Tensor) -> Tensor:
        y, h = unfused(name, x, x.cos(), *parameters, functions=tf)
        return y + 2 * h

    expected = transforms(theirs, x, several, dy)
    for key, transformed in transforms(ours, x, several, dy).items():
        torch.testing.assert_close(
            transformed(*parameters), expected[key](*parameters), msg=lambda m, key=key: f"{key}: {m}"
        )


@pytest.mark.parametrize("used", ["y", "h", "both"])
@pytest.mark.parametrize("name", NAMES)
def test_the_fused_sum_compiles(name: str, used: str):
    """With shapes that vary; transposed, so that the layout is compiled too."""
    x, residual, *parameters = inputs(name, (3, 5, 4))
    if used == "h":
        parameters = []  # of an unused one the compiler makes the gradient zeros, where eager has none

    def function(x: Tensor, residual: Tensor, *parameters: Tensor) -> Tensor:
        y, h = fused(name, x.transpose(0, 1), residual.transpose(0, 1), *parameters)
        return {"y": y, "h": h, "both": y + 2 * h}[used]

    compiled = assert_compiled(function, x, residual, *parameters, dynamic=True)
    larger = [torch.randn(7, 6, 4, requires_grad=True) for _ in range(2)]
    parameters = [p.requires_grad_() for p in parameters]
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(compiled(*larger, *parameters), function(*larger, *parameters))


@pytest.mark.parametrize("name", NAMES)
def test_the_fused_sum_compiles_with_frozen_inputs(name: str):
    x, residual, *parameters = inputs(name, (3, 4))
    assert_compiled(lambda *p: fused(name, x, residual, *p)[0], *parameters)


class Fused(torch.nn.Module):
    """A module around a function, for export."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: Tensor) -> Any:
        return self.function(*tensors)


@torch.no_grad()
def assert_exported(function: Callable[..., Any], *tensors: Tensor, operator: str) -> None:
    """For any batch size, as one operator."""
    batch = {0: torch.export.Dim("batch", min=2)}
    exported = torch.export.export(
        Fused(function), tensors, dynamic_shapes={"tensors": tuple(batch for _ in tensors)}, strict=False
    )
    assert [str(node.target) for node in exported.graph.nodes if "normwise" in str(node.target)] == [operator]
    larger = [torch.cat([t, t]) for t in tensors]
    torch.testing.assert_close(exported.module()(*larger), function(*larger))


@pytest.mark.parametrize("name", NAMES)
def test_the_fused_sum_is_exported(name: str):
    x, residual, *parameters = inputs(name, (3, 4))
    assert_exported(lambda x, r: fused(name, x, r, *parameters), x, residual, operator=f"normwise.{name}.default")


@pytest.mark.parametrize("name", NAMES)
def test_fx_keeps_the_fused_sum_whole(name: str):
    x, residual = torch.randn(2, 3, 4)
    traced = torch.fx.symbolic_trace(lambda x, residual: getattr(nf, name)(x, residual, (4,)))
    assert [node.target for node in traced.graph.nodes if node.op == "call_function"] == [getattr(nf, name)]
    torch.testing.assert_close(traced(x, residual), getattr(nf, name)(x, residual, (4,)))


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_autocast_of_the_fused_sum_is_that_of_the_pair(name: str, dtype: torch.dtype, enabled: bool):
    """On a GPU, shown without its data, y comes out in float32 and h does not; on the CPU nothing changes."""
    with torch._subclasses.FakeTensorMode():
        torch.set_autocast_enabled("cuda", enabled)
        try:
            tensors = [torch.empty(3, 4, device="cuda", dtype=dtype) for _ in range(2)]
            ours, theirs = fused(name, *tensors), unfused(name, *tensors, functions=tf)
        finally:
            torch.set_autocast_enabled("cuda", False)
    assert [t.dtype for t in ours] == [t.dtype for t in theirs]
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        assert_bits_of_the_pair(name, inputs(name, (3, 4), dtype=dtype))


def test_the_gradient_of_a_wider_y_and_of_h():
    """What autocast on a GPU asks for: half in, float32 out, a float32 and a half gradient in, half out."""
    leaves = [t.requires_grad_() for t in inputs("fused_add_layer_norm", (6, 33), dtype=torch.float16)]
    x, residual, weight, bias = leaves
    y, h = nw.ops.FusedAddLayerNorm.apply(x, residual, weight, bias, (33,), cases.EPS, torch.float32)
    assert (y.dtype, h.dtype) == (torch.float32, torch.float16)
    dy, dh = torch.randn(6, 33) + 0.5, (torch.randn(6, 33) + 0.5).half()
    grads = gradients((y, h), leaves, (dy, dh))
    assert {g.dtype for g in grads} == {torch.float16}
    truth = cases.BY_NAME["layer_norm"].truth(h.detach(), weight.detach(), bias.detach(), dy)
    exact = truth.dx + dh
    assert ((grads[0] - exact).abs() <= 2e-3 * exact.abs().max()).all()  # one rounding, to 11 bits
    torch.testing.assert_close(y.double(), truth.y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_the_fused_sum_of_nested_tensors(name: str):
    x, residual = (
        torch.nested.nested_tensor_from_jagged(torch.randn(9, 4), torch.tensor([0, 3, 4, 9])) for _ in range(2)
    )
    residual = torch.nested.nested_tensor_from_jagged(residual.values(), x.offsets())
    y, h = getattr(nf, name)(x, residual, (4,))
    want_y, want_h = getattr(nf, name)(x.values(), residual.values(), (4,))
    assert torch.equal(y.values(), want_y)
    assert torch.equal(h.values(), want_h)


X, R = torch.randn(2, 4, 3), torch.randn(2, 4, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "problem"),
    [
        ({"x": [[1.0]]}, TypeError, "x must be a torch.Tensor; got list"),
        ({"x": X.long()}, TypeError, "x must be floating point; got int64"),
        ({"residual": None}, TypeError, "residual must be a torch.Tensor; got NoneType; convert it"),
        ({"residual": R.int()}, TypeError, "residual must be floating point; got int32; convert it with .float()"),
        ({"residual": R[:1]}, ValueError, r"have the shape of x, \(2, 4, 3\); got \(1, 4, 3\); expand it with"),
        ({"residual": R[0]}, ValueError, r"have the shape of x, \(2, 4, 3\); got \(4, 3\); expand it with"),
        ({"residual": R.to("meta")}, ValueError, "residual must be on x's device cpu; it is on meta; move one"),
        ({"normalized_shape": (4,)}, ValueError, r"the last 1 axes of x must be normalized_shape \(4,\)"),
        ({"normalized_shape": 3}, TypeError, "normalized_shape must be a sequence of sizes; got 3"),
        ({"eps": -1.0}, ValueError, "eps must be 0 or more and finite; got -1.0"),
        ({"eps": math.nan}, ValueError, "eps must be 0 or more and finite; got nan"),
        ({"weight": torch.ones(4)}, ValueError, r"weight must have shape \(3,\)"),
        ({"weight": torch.ones(3).int()}, TypeError, "weight must be floating point; got int32"),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", NAMES)
def test_wrong_arguments_of_the_fused_sum(name: str, arguments: dict[str, Any], error: type[Exception], problem: str):
    arguments = {"x": X, "residual": R, "normalized_shape": (3,), **arguments}
    assert re.search(problem, message(error, name, getattr(nf, name), **arguments))


# Batch Norm, the residual and ReLU

MODES = ["batch_norm", "batch_norm_eval"]
"""In training and in eval, as `cases` names them."""


def norm_relu(
    mode: str, x: Tensor, running: tuple[Tensor, Tensor], *affine: Tensor, functions: Any = nf, **more: Any
) -> Tensor:
    """By one function, or in three steps by those of torch or of normwise."""
    training = mode == "batch_norm"
    if functions is nf:
        return nf.batch_norm_relu(x, *running, *affine, training=training, **more)
    residual = more.pop("residual", None)
    y = tf.batch_norm(x, *running, *affine, training=training)
    return (y if residual is None else y + residual).relu()


def batch(
    shape: Sequence[int], dtype: torch.dtype = torch.float32, ratio: float = 0.0
) -> tuple[list[Tensor], tuple[Tensor, Tensor], Tensor]:
    """x, weight, bias and residual; running statistics near those of x; a cotangent."""
    (x, dy), norm = cases.draw(shape, ratio, dtype), cases.BY_NAME["batch_norm_eval"]
    weight, bias = norm.parameters(x)
    return [x, weight, bias, torch.randn(shape).to(dtype)], norm.running(x), dy


def run(
    mode: str, tensors: Sequence[Tensor], running: tuple[Tensor, Tensor], dy: Tensor, **more: Any
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, Tensor]]:
    """y, the gradients of x, weight, bias and residual, and running statistics, moved from those given."""
    x, weight, bias, residual = leaves = [t.detach().requires_grad_() for t in tensors]
    running = running[0].clone(), running[1].clone()
    y = norm_relu(mode, x, running, weight, bias, residual=residual, **more)
    return y, torch.autograd.grad(y, leaves, dy), running


@pytest.mark.parametrize("shape", [(0, 4, 5), (1, 4, 3), (2, 4), (5, 1, 1), (31, 3), (4, 6, 33), (3, 5, 4, 7)], ids=str)
@pytest.mark.parametrize("ratio", cases.RATIOS)
@pytest.mark.parametrize("mode", MODES)
def test_batch_norm_relu_is_within_a1(mode: str, shape: tuple[int, ...], ratio: float):
    (x, weight, bias, residual), running, dy = batch(shape, ratio=ratio)
    y, (dx, dweight, dbias, dresidual), _ = run(mode, (x, weight, bias, residual), running, dy)
    norm = cases.BY_NAME[mode]
    past = running if mode == "batch_norm_eval" else None
    # the sign is that of y as it came out: where it is all but 0, its rounding decides
    passed = dy.where(y > 0, 0.0)
    truth = norm.truth(x, weight, bias, passed, running=past)
    before = truth.y + residual
    # what ReLU leaves is as good as what it was given, and dx of one example as its terms, which cancel
    scales = {"y": torch.stack([*truth.y_terms, residual.double().expand_as(before)])}
    if len(x) <= 2:
        scales |= {"dx": torch.stack(truth.dx_terms), "dweight": dy.double(), "dbias": dy.double()}
    got = cases.Results(y.detach(), dx, dweight, dbias)
    cases.assert_a1(got, truth._replace(y=before.relu()), **scales)
    assert torch.equal(dresidual, passed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
def test_batch_norm_relu_in_half_precision_rounds_once(mode: str, layout: str, dtype: torch.dtype):
    """The residual is added before the rounding, so the bound is that of one."""
    tensors, running, dy = batch(cases.IMAGE, dtype, ratio=3.0)
    x, weight, bias, residual = (t if t.dim() < 4 else cases.LAYOUTS[layout](t) for t in tensors)
    y, (dx, *_, dresidual), _ = run(mode, (x, weight, bias, residual), running, dy)
    past = running if mode == "batch_norm_eval" else None
    passed = dy.where(y > 0, 0.0)
    truth = cases.BY_NAME[mode].truth(x, weight, bias, passed, running=past)
    exact = (truth.y + residual).relu()
    bound = cases.a2_elementwise(exact, (*truth.y_terms, residual.double()), dtype)
    assert ((y - exact).abs() <= bound).all()
    terms = truth.dx_terms if cases.EXACT_SUMS else truth.dx_magnitudes
    assert ((dx - truth.dx).abs() <= cases.a2_elementwise(truth.dx, terms, dtype)).all()
    assert torch.equal(dresidual, passed)


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_batch_norm_relu_equals_torchs_three_steps(mode: str, with_residual: bool, layout: str):
    (x, weight, bias, residual), running, dy = batch(cases.IMAGE, torch.float64)
    results = []
    for functions in (nf, tf):
        state = running[0].clone(), running[1].clone()
        leaves = [
            cases.LAYOUTS[layout](t).detach().requires_grad_() if t.dim() == 4 else t.requires_grad_()
            for t in (x, weight, bias, residual)
        ]
        more = {"residual": leaves[3]} if with_residual else {}
        y = norm_relu(mode, leaves[0], state, *leaves[1:3], functions=functions, **more)
        results.append((y, torch.autograd.grad(y, leaves if with_residual else leaves[:3], dy), state))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)  # torch sums in another order
    assert results[0][0].stride() == nf.batch_norm(leaves[0], *running).stride()


@pytest.mark.parametrize("mode", MODES)
def test_batch_norm_relu_without_a_residual_is_relu_of_batch_norm(mode: str):
    (x, weight, bias, _), running, _ = batch(cases.IMAGE)
    ours, theirs = ((running[0].clone(), running[1].clone()) for _ in range(2))
    y = norm_relu(mode, x, ours, weight, bias)
    expected = nf.batch_norm(x, *theirs, weight, bias, training=mode == "batch_norm").relu()
    torch.testing.assert_close(y, expected, rtol=0 if cases.EXACT_SUMS else 1e-6, atol=0 if cases.EXACT_SUMS else 1e-6)
    for got, want in zip(ours, theirs, strict=True):
        assert torch.equal(got, want)  # the running statistics are those of batch_norm to the bit


@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_norm_relu_moves_the_running_statistics_of_batch_norm(momentum: float | None):
    ours, theirs = (statistics(4, torch.float32) for _ in range(2))
    theirs = tuple(t.clone() for t in ours)
    counts = torch.tensor(0), torch.tensor(0)
    for step in range(1, 4):
        x = torch.randn(5, 4, 3) + 2
        nf.batch_norm_relu(
            x, *ours, training=True, momentum=momentum, residual=torch.randn_like(x), num_batches_tracked=counts[0]
        )
        nf.batch_norm(x, *theirs, training=True, momentum=momentum, num_batches_tracked=counts[1])
        for got, want in zip(ours, theirs, strict=True):
            assert torch.equal(got, want)
        assert counts == (step, step)


@pytest.mark.parametrize("by_example", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_masked_positions_give_zero_and_pass_nothing(mode: str, by_example: bool):
    """Whatever stands in them, in x, in the residual and in dy; the others are as if those were not there."""
    (x, weight, bias, residual), running, dy = batch((4, 3, 6), torch.float64)
    mask = torch.tensor([True, False, True, True]) if by_example else torch.rand(4, 6) < 0.6
    valid = (mask[:, None, None] if by_example else mask[:, None]).expand(x.shape)
    spoilt = [t.masked_fill(~valid, math.nan) for t in (x, residual, dy)]
    y, (dx, dweight, dbias, dresidual), moved = run(
        mode, (spoilt[0], weight, bias, spoilt[1]), running, spoilt[2], mask=mask
    )
    for t in (y, dx, dresidual):
        assert (t[~valid] == 0).all()

    def pack(t: Tensor) -> Tensor:
        return t.movedim(1, -1)[valid[:, 0]]

    want_y, want, want_moved = run(mode, (pack(x), weight, bias, pack(residual)), running, pack(dy))
    torch.testing.assert_close((pack(y), moved), (want_y, want_moved))
    torch.testing.assert_close((pack(dx), dweight, dbias, pack(dresidual)), want)


def test_nan_stays_and_passes_the_gradient_as_in_torch():
    (x, weight, bias, residual), running, dy = batch((4, 3, 40))
    residual[1, 2, 3] = x[0, 1, 5] = math.nan
    results = []
    for functions in (nf, tf):
        leaf = residual.clone().requires_grad_()
        y = norm_relu("batch_norm_eval", x, running, weight, bias, functions=functions, residual=leaf)
        results.append((y.isnan(), torch.autograd.grad(y, leaf, dy)[0]))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert results[0][0].sum() == 2
    assert results[0][1][1, 2, 3] == dy[1, 2, 3]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (0, 3), (1, 2), (0, 1, 2, 3)], ids=str)
def test_only_the_wanted_gradients_of_batch_norm_relu(mode: str, wanted: tuple[int, ...]):
    tensors, running, dy = batch((4, 3, 6))
    _, full, _ = run(mode, tensors, running, dy)
    leaves = [t.requires_grad_(i in wanted) for i, t in enumerate(tensors)]
    y = norm_relu(mode, leaves[0], running, *leaves[1:3], residual=leaves[3])
    grads = torch.autograd.grad(y, [t for t in leaves if t.requires_grad], dy)
    for grad, i in zip(grads, wanted, strict=True):
        assert torch.equal(grad, full[i])


@pytest.mark.parametrize("mode", MODES)
def test_y_changed_in_place_is_noticed(mode: str):
    (x, *affine, residual), running, dy = batch((4, 3, 6))
    y = norm_relu(mode, x.requires_grad_(), running, *affine, residual=residual)
    with torch.no_grad():
        y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(dy)


@pytest.mark.parametrize("mode", MODES)
def test_transforms_of_batch_norm_relu_equal_torchs(mode: str):
    (x, *parameters, _), running, dy = batch((2, 4, 3), torch.float64)
    several = torch.randn(3, 2, 4, 3, dtype=torch.float64)
    past = running if mode == "batch_norm_eval" else (None, None)

    def function(functions: Any) -> Callable[..., Tensor]:
        return lambda x, *p: norm_relu(mode, x, past, *p, functions=functions, residual=x.cos())

    expected = transforms(function(tf), x, several, dy)
    for key, transformed in transforms(function(nf), x, several, dy).items():
        torch.testing.assert_close(
            transformed(*parameters), expected[key](*parameters), msg=lambda m, key=key: f"{key}: {m}"
        )


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_batch_norm_relu_compiles(mode: str, masked: bool):
    tensors, running, _ = batch((3, 4, 5))
    mask = torch.rand(3, 5) < 0.7 if masked else None
    past = running if mode == "batch_norm_eval" else (None, None)
    assert_compiled(lambda x, w, b, r: norm_relu(mode, x, past, w, b, residual=r, mask=mask), *tensors)


@pytest.mark.parametrize("mode", MODES)
def test_batch_norm_relu_is_exported(mode: str):
    (x, *affine, residual), running, _ = batch((3, 4, 5))
    past = running if mode == "batch_norm_eval" else (None, None)
    suffix = "" if mode == "batch_norm_eval" else "_forward"
    assert_exported(
        lambda x, r: norm_relu(mode, x, past, *affine, residual=r),
        x,
        residual,
        operator=f"normwise.batch_norm_relu{suffix}.default",
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_leaves_batch_norm_relu_alone(dtype: torch.dtype):
    (x, *affine, residual), running, _ = batch((3, 4, 5), dtype)
    with torch.autocast("cpu", torch.float16 if dtype == torch.bfloat16 else torch.bfloat16):
        y = norm_relu("batch_norm_eval", x, running, *affine, residual=residual)
    assert torch.equal(y, norm_relu("batch_norm_eval", x, running, *affine, residual=residual))
    assert y.dtype == dtype


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_batch_norm_relu_counts_once(reentrant: bool):
    mean, var, count = torch.zeros(4), torch.ones(4), torch.tensor(0)
    x = torch.randn(5, 4, requires_grad=True)
    call = lambda x: nf.batch_norm_relu(x, mean, var, training=True, num_batches_tracked=count)  # noqa: E731
    checkpoint(call, x, use_reentrant=reentrant).backward(torch.randn(5, 4) + 0.5)
    assert count == 1
    torch.testing.assert_close(mean, 0.1 * x.detach().mean(0))


@pytest.mark.parametrize(
    ("change", "error", "problem"),
    [
        ({"x": X.long()}, TypeError, "x must be floating point; got int64"),
        ({"x": X[0, 0]}, ValueError, r"x must have \(N, C, ...\)"),
        ({"x": X[:1, :, :1], "residual": None}, ValueError, "1 value per channel in training has no variance"),
        ({"residual": [1.0]}, TypeError, "residual must be a torch.Tensor; got list"),
        ({"residual": R[:, :1]}, ValueError, r"have the shape of x, \(2, 4, 3\); got \(2, 1, 3\); expand it with"),
        ({"residual": R.double()}, TypeError, "residual must have the type of x, float32; got float64; convert one"),
        ({"residual": R.int()}, TypeError, "residual must be floating point; got int32"),
        ({"residual": R.to("meta")}, ValueError, "residual must be on x's device cpu; it is on meta"),
        ({"mask": torch.ones(2, 3)}, TypeError, "mask must be boolean"),
        ({"running_var": None}, ValueError, "must come together; running_var is None"),
        ({"training": False, "running_mean": None, "running_var": None}, ValueError, "eval needs running statistics"),
    ],
    ids=str,
)
def test_wrong_arguments_of_batch_norm_relu_change_nothing(
    change: dict[str, Any], error: type[Exception], problem: str
):
    mean, var, count = torch.zeros(4), torch.ones(4), torch.tensor(7)
    arguments = {"x": X, "running_mean": mean, "running_var": var, "residual": R, "training": True}
    text = message(
        error, "batch_norm_relu", nf.batch_norm_relu, **{**arguments, "num_batches_tracked": count, **change}
    )
    assert re.search(problem, text)
    assert (mean == 0).all()
    assert (var == 1).all()
    assert count == 7


# The flag for exact sums


class Recorded(TorchDispatchMode):
    """The operators that are called, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        self.calls.append((func, args))
        return func(*args, **(kwargs or {}))

    def flags(self) -> list[bool]:
        """What the operators of Batch Norm were given for ``reproducible``."""
        found = []
        for func, args in self.calls:
            names = [argument.name for argument in func._schema.arguments]
            found += [args[names.index("reproducible")]] if "reproducible" in names else []
        return found


@pytest.mark.parametrize("positions", [(), (15,), (16,), (3, 5), (4, 4), (0,)], ids=str)
@pytest.mark.parametrize("reproducible", [None, True, False])
@pytest.mark.parametrize("function", [nf.batch_norm, nf.batch_norm_relu])
def test_exact_sums_by_default_where_an_example_has_values_to_pay_for_them(
    function: Callable[..., Tensor], reproducible: bool | None, positions: tuple[int, ...]
):
    x = torch.randn(3, 2, *positions, requires_grad=True)
    with Recorded() as recorded:
        y = function(x, None, None, training=True, reproducible=reproducible)
        y.backward(torch.randn_like(y))
    expected = math.prod(positions) >= 16 if reproducible is None else reproducible
    assert recorded.flags() == [expected, expected]  # forward and backward


@pytest.mark.parametrize("function", [nf.batch_norm, nf.batch_norm_relu])
def test_exact_sums_change_no_result_beyond_rounding(function: Callable[..., Tensor]):
    x, dy = cases.draw((6, 4, 5), 3.0)
    results = []
    for reproducible in (None, True, False):
        leaf, state = x.clone().requires_grad_(), (torch.zeros(4), torch.ones(4))
        y = function(leaf, *state, training=True, reproducible=reproducible)
        results.append((y.detach(), *torch.autograd.grad(y, leaf, dy), *state))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-5, atol=1e-6)
