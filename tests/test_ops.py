"""The operators under all that PyTorch does to one: opcheck, compile, transforms, autocast, checkpoints, capture."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import cases
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as tf
from cases import Norm
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import normwise as nw
import normwise.functional as nf

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),  # torch's own jvp
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),  # and inductor
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # torch's own compiler
]

OPS = torch.ops.normwise

SCHEMAS = """
batch_norm(Tensor x, Tensor running_mean, Tensor running_var, Tensor? weight, Tensor? bias, float eps, Tensor? mask) -> Tensor
batch_norm_backward(Tensor dy, Tensor x, Tensor mean, Tensor var, float eps, bool training, Tensor? mask, bool reproducible, Tensor? weight, ScalarType? bias_dtype, bool[3] output_mask) -> (Tensor dx, Tensor dweight, Tensor dbias)
batch_norm_backward_of_sums(Tensor dy, Tensor x, Tensor mean, Tensor var, float eps, Tensor? mask, Tensor sums, Tensor count, Tensor? weight, ScalarType? bias_dtype, bool[3] output_mask) -> (Tensor dx, Tensor dweight, Tensor dbias)
batch_norm_forward(Tensor x, Tensor? weight, Tensor? bias, float eps, Tensor? mask, bool reproducible) -> (Tensor y, Tensor mean, Tensor var)
batch_norm_gradient_sums(Tensor dy, Tensor x, Tensor mean, Tensor var, float eps, Tensor? mask, bool reproducible) -> Tensor
batch_norm_moments(Tensor sums) -> (Tensor mean, Tensor var, Tensor count)
batch_norm_relu(Tensor x, Tensor running_mean, Tensor running_var, Tensor? weight, Tensor? bias, float eps, Tensor? mask, Tensor? residual) -> Tensor
batch_norm_relu_backward(Tensor dy, Tensor y, Tensor x, Tensor mean, Tensor var, float eps, bool training, Tensor? mask, bool reproducible, Tensor? weight, ScalarType? bias_dtype, bool[4] output_mask) -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)
batch_norm_relu_forward(Tensor x, Tensor? weight, Tensor? bias, float eps, Tensor? mask, Tensor? residual, bool reproducible) -> (Tensor y, Tensor mean, Tensor var)
batch_norm_sums(Tensor x, float eps, Tensor? mask, bool reproducible) -> Tensor
fused_add_layer_norm(Tensor x, Tensor residual, SymInt[] normalized_shape, Tensor? weight, Tensor? bias, float eps, ScalarType? out_dtype) -> (Tensor y, Tensor h)
fused_add_layer_norm_backward(Tensor dy, Tensor? dh, Tensor h, Tensor mean, Tensor rstd, SymInt[] normalized_shape, Tensor? weight, ScalarType? bias_dtype, bool[3] output_mask) -> (Tensor dx, Tensor dweight, Tensor dbias)
fused_add_layer_norm_forward(Tensor x, Tensor residual, SymInt[] normalized_shape, Tensor? weight, Tensor? bias, float eps, ScalarType? out_dtype) -> (Tensor y, Tensor h, Tensor mean, Tensor rstd)
fused_add_rms_norm(Tensor x, Tensor residual, SymInt[] normalized_shape, Tensor? weight, float eps, ScalarType? out_dtype) -> (Tensor y, Tensor h)
fused_add_rms_norm_backward(Tensor dy, Tensor? dh, Tensor h, Tensor rstd, SymInt[] normalized_shape, Tensor? weight, bool[2] output_mask) -> (Tensor dx, Tensor dweight)
fused_add_rms_norm_forward(Tensor x, Tensor residual, SymInt[] normalized_shape, Tensor? weight, float eps, ScalarType? out_dtype) -> (Tensor y, Tensor h, Tensor rstd)
gather_over_processes(Tensor values, str group, str layer, str settings, str direction) -> Tensor
group_norm(Tensor x, SymInt num_groups, Tensor? weight, Tensor? bias, float eps, Tensor? mask, ScalarType? out_dtype) -> Tensor
group_norm_backward(Tensor dy, Tensor x, Tensor mean, Tensor rstd, SymInt num_groups, float eps, Tensor? mask, Tensor? weight, ScalarType? bias_dtype, bool[3] output_mask) -> (Tensor dx, Tensor dweight, Tensor dbias)
group_norm_forward(Tensor x, SymInt num_groups, Tensor? weight, Tensor? bias, float eps, Tensor? mask, ScalarType? out_dtype) -> (Tensor y, Tensor mean, Tensor rstd)
layer_norm(Tensor x, SymInt[] normalized_shape, Tensor? weight, Tensor? bias, float eps, ScalarType? out_dtype) -> Tensor
layer_norm_backward(Tensor dy, Tensor x, Tensor mean, Tensor rstd, SymInt[] normalized_shape, Tensor? weight, ScalarType? bias_dtype, bool[3] output_mask) -> (Tensor dx, Tensor dweight, Tensor dbias)
layer_norm_forward(Tensor x, SymInt[] normalized_shape, Tensor? weight, Tensor? bias, float eps, ScalarType? out_dtype) -> (Tensor y, Tensor mean, Tensor rstd)
rms_norm(Tensor x, SymInt[] normalized_shape, Tensor? weight, float eps, ScalarType? out_dtype) -> Tensor
rms_norm_backward(Tensor dy, Tensor x, Tensor rstd, SymInt[] normalized_shape, Tensor? weight, bool[2] output_mask) -> (Tensor dx, Tensor dweight)
rms_norm_forward(Tensor x, SymInt[] normalized_shape, Tensor? weight, float eps, ScalarType? out_dtype) -> (Tensor y, Tensor rstd)
sum_over_processes(Tensor values, str group, str layer, str settings, str direction) -> Tensor
update_running_(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor(c!)? num_batches_tracked, Tensor mean, Tensor var, SymInt count, float? momentum, Tensor? mask, Tensor? total=None) -> ()
"""  # noqa: E501
"""What kernels in C++ and Triton are registered for, and saved programs call."""


def test_schemas_are_pinned():
    schemas = [str(s) for s in torch._C._jit_get_all_schemas() if s.name.startswith("normwise::")]
    assert sorted(schemas) == [f"normwise::{line}" for line in SCHEMAS.strip().splitlines()]


# opcheck, and shapes, types and strides of the fake outputs


def group() -> str:
    """The name of a group of this process alone."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return dist.group.WORLD.group_name


@pytest.fixture(scope="module", autouse=True)
def _no_group_is_left() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def variants(x: Tensor) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Every operator, with all of its optional arguments and with none."""
    n, c, d = x.shape[0], x.shape[1], x.shape[-1]
    last, channels = torch.randn(d), torch.randn(c)
    mask = torch.ones(n, *x.shape[2:], dtype=torch.bool)
    mask[0] = False
    dy, f32 = torch.randn_like(x), torch.float32
    plain = dy.contiguous()  # laid out otherwise than x where that is not contiguous
    rows = OPS.layer_norm_forward(x, [d], None, None, 1e-5, None)[1:]
    square = OPS.rms_norm_forward(x, [d], None, 1e-5, None)[1]
    groups = OPS.group_norm_forward(x, 2, None, None, 1e-5, None, None)[1:]
    batch = OPS.batch_norm_forward(x, None, None, 1e-5, None, True)[1:]
    for op in ("layer_norm", "layer_norm_forward"):
        yield op, (x, [d], last, last, 1e-5, f32)
        yield op, (x, list(x.shape[1:]), None, None, 1e-5, None)
    for op in ("rms_norm", "rms_norm_forward"):
        yield op, (x, [d], last, 1e-5, f32)
        yield op, (x, list(x.shape[1:]), None, 1e-5, None)
    for op in ("group_norm", "group_norm_forward"):
        yield op, (x, 2, channels, channels, 1e-5, mask, f32)
        yield op, (x, c, None, None, 1e-5, None, None)
    yield "batch_norm", (x, channels, channels.square(), channels, channels, 1e-5, mask)
    yield "batch_norm", (x, channels, channels.square(), None, None, 1e-5, None)
    yield "batch_norm_forward", (x, channels, channels, 1e-5, mask, True)
    yield "batch_norm_forward", (x, None, None, 1e-5, None, False)
    yield "batch_norm_relu", (x, channels, channels.square(), channels, channels, 1e-5, mask, plain)
    yield "batch_norm_relu", (x, channels, channels.square(), None, None, 1e-5, None, None)
    yield "batch_norm_relu_forward", (x, channels, channels, 1e-5, mask, plain, True)
    yield "batch_norm_relu_forward", (x, None, None, 1e-5, None, None, False)
    for op in ("fused_add_layer_norm", "fused_add_layer_norm_forward"):
        yield op, (x, dy, [d], last, last, 1e-5, f32)
        yield op, (x, plain, list(x.shape[1:]), None, None, 1e-5, None)
    for op in ("fused_add_rms_norm", "fused_add_rms_norm_forward"):
        yield op, (x, dy, [d], last, 1e-5, f32)
        yield op, (x, plain, list(x.shape[1:]), None, 1e-5, None)
    for wanted in ([True, True, True], [False, True, False], [True, False, False]):
        yield "layer_norm_backward", (dy, x, *rows, [d], last, f32, wanted)
        yield "rms_norm_backward", (dy, x, square, [d], last, wanted[:2])
        yield "group_norm_backward", (dy, x, *groups, 2, 1e-5, mask, channels, f32, wanted)
        for training in (True, False):
            yield "batch_norm_backward", (dy, x, *batch, 1e-5, training, mask, training, channels, f32, wanted)
            common = (dy, dy, x, *batch, 1e-5, training, mask, training, channels, f32)
            yield "batch_norm_relu_backward", (*common, [*wanted, wanted[0]])
        for dh in (plain, None):
            yield "fused_add_layer_norm_backward", (dy, dh, x, *rows, [d], last, f32, wanted)
            yield "fused_add_rms_norm_backward", (dy, dh, x, square, [d], last, wanted[:2])
    yield "layer_norm_backward", (dy, x, *rows, [d], None, None, [True, True, True])
    yield "rms_norm_backward", (dy, x, square, [d], None, [True, True])
    yield "group_norm_backward", (dy, x, *groups, 2, 1e-5, None, None, None, [True, True, True])
    yield "batch_norm_backward", (dy, x, *batch, 1e-5, True, None, False, None, None, [True, True, True])
    common = (dy, dy, x, *batch, 1e-5, True, None, False, None, None)
    yield "batch_norm_relu_backward", (*common, [True, True, True, True])
    yield "fused_add_layer_norm_backward", (dy, None, x, *rows, [d], None, None, [True, True, True])
    yield "fused_add_rms_norm_backward", (dy, None, x, square, [d], None, [True, True])
    sums = OPS.batch_norm_sums(x, 1e-5, mask, True)
    mean, var, count = OPS.batch_norm_moments(sums)
    yield "batch_norm_sums", (x, 1e-5, mask, True)
    yield "batch_norm_moments", (sums,)
    yield "batch_norm_gradient_sums", (dy, x, mean, var, 1e-5, mask, True)
    sums = OPS.batch_norm_gradient_sums(dy, x, mean, var, 1e-5, mask, True)
    common = (dy, x, mean, var, 1e-5, mask, sums, count, channels, f32)
    yield "batch_norm_backward_of_sums", (*common, [True, True, True])
    yield "batch_norm_backward_of_sums", (*common[:-2], None, None, [True, False, False])
    yield "sum_over_processes", (sums, group(), "layer", "settings", "forward")
    yield "gather_over_processes", (mean, group(), "layer", "settings", "forward")
    mean, var, count = torch.zeros(c), torch.ones(c), torch.tensor(0)
    yield "update_running_", (mean, var, count, *batch, x.numel() // c, None, mask)
    yield "update_running_", (mean, var, count, *batch, 0, 0.1, None, torch.full((c,), 8.0, dtype=torch.float64))
    yield "update_running_", (mean, var, None, batch[0].expand(n, c), batch[1].expand(n, c), x.numel() // c, 0.1, None)


def test_every_operator_has_variants():
    named = {line.partition("(")[0] for line in SCHEMAS.strip().splitlines()}
    assert {op for op, _ in variants(torch.randn(cases.IMAGE))} == named


@pytest.mark.parametrize("op", [line.partition("(")[0] for line in SCHEMAS.strip().splitlines()])
def test_opcheck(op: str):
    """Without gradients: they are attached outside, by the autograd functions, which have tests of their own."""
    for name, arguments in variants(torch.randn(2, 4, 3)):
        if name == op:
            torch.library.opcheck(getattr(OPS, op).default, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_fake_outputs_have_the_real_shapes_types_and_strides(layout: str, dtype: torch.dtype):
    for op, arguments in variants(cases.LAYOUTS[layout](torch.randn(cases.IMAGE).to(dtype))):
        real = getattr(OPS, op)(*arguments)
        with torch._subclasses.FakeTensorMode() as mode:
            fake_arguments = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments]
            fake = getattr(OPS, op)(*fake_arguments)
        real, fake = ((t,) if isinstance(t, Tensor) else t or () for t in (real, fake))
        assert len(real) == len(fake)
        for got, want in zip(fake, real, strict=True):
            assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride()), op


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float64, None], ids=str)
def test_out_dtype_is_the_type_of_y_alone(out_dtype: torch.dtype | None):
    """Rounded once, from the accumulated values, not from y in the type of x."""
    x = torch.randn(cases.IMAGE).half()
    wide = out_dtype or torch.float16
    for forward, alone, arguments in (
        (OPS.layer_norm_forward, OPS.layer_norm, (x, [7], None, None, 1e-5)),
        (OPS.rms_norm_forward, OPS.rms_norm, (x, [7], None, 1e-5)),
        (OPS.group_norm_forward, OPS.group_norm, (x, 2, None, None, 1e-5, None)),
    ):
        y, *statistics = forward(*arguments, out_dtype)
        assert y.dtype == wide
        assert torch.equal(y, alone(*arguments, out_dtype))
        # exactly so on the reference; kernels accumulate in float32, which may move the rounding by one step
        exact = forward(*arguments, torch.float64)[0]
        assert torch.equal(y, exact.to(wide)) or not cases.EXACT_SUMS
        torch.testing.assert_close(y.double(), exact, rtol=max(torch.finfo(wide).eps, 1e-6), atol=1e-6)
        assert {s.dtype for s in statistics} == {torch.float64}


@pytest.mark.parametrize("functions", [nw.ops.LayerNorm, nw.ops.RMSNorm, nw.ops.GroupNorm])
def test_the_gradient_of_a_wider_y_has_the_type_of_x(functions: type[torch.autograd.Function]):
    """What autocast on a GPU asks for: half in, float32 out, float32 gradient in, half out."""
    x, weight = torch.randn(2, 4, 6).half().requires_grad_(), torch.randn(6 if "Group" not in functions.__name__ else 4)
    weight = weight.half().requires_grad_()
    tail = {"LayerNorm": (None, [6], 1e-5), "RMSNorm": ([6], 1e-5), "GroupNorm": (None, 2, 1e-5, None)}
    y = functions.apply(x, weight, *tail[functions.__name__], torch.float32)
    y = y if isinstance(y, Tensor) else y[0]
    assert y.dtype == torch.float32
    dy = torch.randn(2, 4, 6)
    dx, dweight = torch.autograd.grad(y, (x, weight), dy)
    assert dx.dtype == dweight.dtype == torch.float16
    name = functions.__name__.replace("Norm", "_norm").lower()
    truth = cases.BY_NAME[name].truth(x.detach(), weight.detach(), None, dy)
    assert (dx.double() - truth.dx).abs().max() <= 2e-3 * truth.dx.abs().max()  # one rounding, to 11 bits
    torch.testing.assert_close(y.double(), truth.y, rtol=1e-6, atol=1e-6)


# Derivatives of every order


FLAVOURS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "layer_norm": lambda x, w, b: nf.layer_norm(x, x.shape[1:], w.expand(x.shape[1:]), b.expand(x.shape[1:])),
    "rms_norm": lambda x, w, b: nf.rms_norm(x, x.shape[1:], (w + b).expand(x.shape[1:])),
    "group_norm": lambda x, w, b: nf.group_norm(x, 2, w[:, 0], b[:, 0]),
    "group_norm masked": lambda x, w, b: nf.group_norm(x, 2, w[:, 0], b[:, 0], mask=MASK),
    "instance_norm": lambda x, w, b: nf.instance_norm(x, None, None, w[:, 0], b[:, 0]),
    "instance_norm masked": lambda x, w, b: nf.instance_norm(x, None, None, w[:, 0], b[:, 0], mask=MASK),
    "batch_norm": lambda x, w, b: nf.batch_norm(x, None, None, w[:, 0], b[:, 0], True),
    "batch_norm masked": lambda x, w, b: nf.batch_norm(x, None, None, w[:, 0], b[:, 0], True, mask=MASK),
    "batch_norm eval": lambda x, w, b: nf.batch_norm(x, *PAST, w[:, 0], b[:, 0]),
    "batch_norm eval masked": lambda x, w, b: nf.batch_norm(x, *PAST, w[:, 0], b[:, 0], mask=MASK),
    "batch_norm_relu": lambda x, w, b: nf.batch_norm_relu(x, None, None, w[:, 0], b[:, 0], True, residual=x.cos()),
    "batch_norm_relu masked": lambda x, w, b: nf.batch_norm_relu(
        x, None, None, w[:, 0], b[:, 0], True, residual=x.cos(), mask=MASK
    ),
    "batch_norm_relu eval": lambda x, w, b: nf.batch_norm_relu(x, *PAST, w[:, 0], b[:, 0], residual=x.cos()),
    "batch_norm_relu eval masked": lambda x, w, b: nf.batch_norm_relu(x, *PAST, w[:, 0], b[:, 0], mask=MASK),
    "fused_add_layer_norm": lambda x, w, b: torch.cat(
        nf.fused_add_layer_norm(x, x.cos(), x.shape[1:], w.expand(x.shape[1:]), b.expand(x.shape[1:]))
    ),
    "fused_add_rms_norm": lambda x, w, b: torch.cat(
        nf.fused_add_rms_norm(x, x.cos(), x.shape[1:], (w + b).expand(x.shape[1:]))
    ),
    "normalize": lambda x, w, b: nf.normalize(x, "n c l -> l", "c", w[:, 0], b[:, 0]),
}
MASK = torch.tensor([[True, True, False], [True, True, True]])
PAST = (torch.tensor([0.3, -0.2, 0.1, 0.0]).double(), torch.tensor([0.5, 1.0, 2.0, 0.7]).double())


def small() -> tuple[Tensor, Tensor, Tensor]:
    x, weight, bias = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 4, 3), (4, 1), (4, 1)))
    return x, weight, bias


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_gradcheck(flavour: str):
    assert torch.autograd.gradcheck(FLAVOURS[flavour], small(), check_forward_ad=True)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_gradgradcheck(flavour: str):
    assert torch.autograd.gradgradcheck(FLAVOURS[flavour], small())


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_gradient_that_is_itself_differentiable_has_the_same_value(flavour: str):
    inputs = small()
    y = FLAVOURS[flavour](*inputs)
    dy = torch.randn_like(y) + 0.5
    once = torch.autograd.grad(y, inputs, dy, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(y, inputs, dy, create_graph=True), once)


# Transforms, against torch's functions


Call = Callable[..., Any]


def transforms(norm: Call, x: Tensor, several: Tensor, dy: Tensor) -> dict[str, Call]:
    """The six, each a function of the parameters."""

    def scalar(x: Tensor, *parameters: Tensor) -> Tensor:
        return (norm(x, *parameters) * dy).sum()

    def mapped(several: Tensor, *parameters: Tensor) -> Tensor:
        return torch.vmap(lambda x: norm(x, *parameters))(several)

    def mapped_scalar(several: Tensor, *parameters: Tensor) -> Tensor:
        return (mapped(several, *parameters) * dy).sum()

    return {
        "grad": lambda *p: torch.func.grad(scalar, (0, 1))(x, *p),
        "vmap": lambda *p: mapped(several, *p),
        "grad of vmap": lambda *p: torch.func.grad(mapped_scalar, (0, 1))(several, *p),
        "vmap of grad": lambda *p: torch.vmap(lambda x: torch.func.grad(scalar, (0, 1))(x, *p))(several),
        "jvp": lambda *p: torch.func.jvp(lambda x, *p: norm(x, *p), (x, *p), (dy, *p)),
        "hessian": lambda *p: torch.func.hessian(lambda x: scalar(x, *p))(x),
    }


def both(norm: Norm) -> tuple[list[Tensor], dict[str, Call], dict[str, Call]]:
    """Parameters, and the transforms of normwise's function and of torch's."""
    x, dy = cases.draw((2, 4, 3), dtype=torch.float64)
    several, running = torch.randn(3, 2, 4, 3, dtype=torch.float64), norm.running(x)

    def function(functions: Any) -> Call:
        return lambda x, weight, bias=None: norm.call(functions, x, weight, bias, 1e-5, running)

    parameters = [p for p in norm.parameters(x) if p is not None]
    return parameters, *(transforms(function(functions), x, several, dy) for functions in (nf, tf))


@pytest.mark.parametrize("norm", cases.TORCH_NORMS, ids=str)
def test_transforms_equal_torchs(norm: Norm):
    parameters, ours, theirs = both(norm)
    for name in ours:
        torch.testing.assert_close(
            ours[name](*parameters), theirs[name](*parameters), msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("name", ["layer_norm", "group_norm", "batch_norm"])
def test_compiled_transforms_equal_torchs(name: str):
    parameters, ours, theirs = both(cases.BY_NAME[name])
    compiled = torch.compile(lambda *p: [f(*p) for f in ours.values()], backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*parameters), [f(*parameters) for f in theirs.values()])


@pytest.mark.parametrize("norm", cases.TORCH_NORMS, ids=str)
def test_forward_mode_equals_torchs(norm: Norm):
    x, tangent = cases.draw((2, 4, 3), dtype=torch.float64)
    parameters, running = norm.parameters(x), norm.running(x)
    parameters[0].requires_grad_()  # as a model's are: not an autograd function's business then
    results = []
    for functions in (nf, tf):
        with forward_ad.dual_level():
            y = norm.call(functions, forward_ad.make_dual(x, tangent), *parameters, 1e-5, running)
            results.append(tuple(forward_ad.unpack_dual(y)))
    torch.testing.assert_close(*results)
    assert results[0][1].abs().max() > 0.1


@pytest.mark.parametrize("name", ["batch_norm", "instance_norm"])
def test_running_statistics_move_under_a_transform(name: str):
    """By the values of the batch and not by their derivative, as torch's do."""
    x = torch.randn(6, 4, 5, dtype=torch.float64)
    state = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    results = []
    for functions in (nf, tf):

        def step(x: Tensor, mean: Tensor, var: Tensor, functions: Any = functions) -> tuple[Tensor, ...]:
            mean, var = mean.clone(), var.clone()
            return getattr(functions, name)(x, mean, var, None, None, True), mean, var

        primal, tangent = torch.func.jvp(step, (x, *state), (x.cos(), *map(torch.zeros_like, state)))
        gradient = torch.func.grad(lambda x: step(x, *state)[0].pow(3).sum())(x)
        several = torch.vmap(step)(x[None], *(s[None] for s in state))
        results.append((primal, tangent, gradient, several))
    torch.testing.assert_close(*results)
    assert results[0][0][1].any()
    assert not results[0][1][1].any()


# torch.compile


def assert_compiled(function: Callable[..., Tensor], *inputs: Tensor, **options: Any) -> Callable[..., Tensor]:
    """y, its strides and its gradients are those of eager."""
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, **{"backend": "aot_eager", **options})
    results = []
    for f in (function, compiled):
        leaves = [t.detach().clone().requires_grad_() for t in inputs]
        y = f(*leaves)
        torch.manual_seed(0)
        results.append((y, torch.autograd.grad(y, leaves, torch.randn(y.shape) + 0.5, allow_unused=True)))
    torch.testing.assert_close(*results)
    assert results[0][0].stride() == results[1][0].stride()
    return compiled


@pytest.mark.parametrize("norm", cases.NORMS, ids=str)
def test_compiled_functions(norm: Norm):
    """With shapes that vary and no recompilation; transposed, so that the layout is compiled too."""
    x = torch.randn(3, 5, 4)
    weight, bias = norm.parameters(x.transpose(1, 2))
    running, parameters = norm.running(x.transpose(1, 2)), [p for p in (weight, bias) if p is not None]

    def function(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return norm.call(nf, x.transpose(1, 2), weight, bias, 1e-5, running)

    compiled = assert_compiled(function, x, *parameters, dynamic=True)
    larger = torch.randn(7, 5, 4, requires_grad=True)
    parameters = [p.requires_grad_() for p in parameters]
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(compiled(larger, *parameters), function(larger, *parameters))


@pytest.mark.parametrize(
    ("pattern", "affine", "sizes"),
    [("n (g c) l -> n g", "(g c)", {"g": 2}), ("n c l -> c l", "c", {}), ("n (g c) l -> g", "(g c)", {"g": 2})],
)
def test_compiled_patterns(pattern: str, affine: str, sizes: dict[str, int]):
    assert_compiled(
        lambda x, w, b: nf.normalize(x, pattern, affine, w, b, **sizes),
        torch.randn(3, 4, 5),
        torch.randn(4),
        torch.randn(4),
    )


def test_compiled_with_an_eps_that_is_an_argument():
    """A symbol, to the compiler, until the operator fixes it."""
    compiled = torch.compile(
        lambda x, eps: nf.layer_norm(x, (4,), eps=eps), backend="aot_eager", fullgraph=True, dynamic=True
    )
    x = torch.randn(3, 4)
    for eps in (0.25, 0.5):
        torch.testing.assert_close(compiled(x, eps), nf.layer_norm(x, (4,), eps=eps))


@pytest.mark.parametrize("name", ["group_norm", "instance_norm", "batch_norm"])
def test_compiled_masks(name: str):
    mask = torch.rand(3, 5) < 0.7
    call = {
        "group_norm": lambda x: nf.group_norm(x, 2, mask=mask),
        "instance_norm": lambda x: nf.instance_norm(x, mask=mask),
        "batch_norm": lambda x: nf.batch_norm(x, None, None, training=True, mask=mask),
    }[name]
    assert_compiled(call, torch.randn(3, 4, 5))


LAYERS: dict[str, tuple[Callable[[], torch.nn.Module], tuple[int, ...]]] = {
    "LayerNorm": (lambda: nw.nn.LayerNorm(6), (4, 3, 6)),
    "RMSNorm": (lambda: nw.nn.RMSNorm(6), (4, 3, 6)),
    "LayerNorm2d": (lambda: nw.nn.LayerNorm2d(6), (4, 6, 3, 3)),
    "GroupNorm": (lambda: nw.nn.GroupNorm(2, 6), (4, 6, 3)),
    "InstanceNorm1d": (lambda: nw.nn.InstanceNorm1d(6, affine=True, track_running_stats=True), (4, 6, 3)),
    "InstanceNorm2d": (lambda: nw.nn.InstanceNorm2d(6, affine=True, track_running_stats=True), (4, 6, 3, 3)),
    "InstanceNorm3d": (lambda: nw.nn.InstanceNorm3d(6, affine=True, track_running_stats=True), (4, 6, 3, 3, 2)),
    "BatchNorm1d": (lambda: nw.nn.BatchNorm1d(6), (4, 6)),
    "BatchNorm2d": (lambda: nw.nn.BatchNorm2d(6), (4, 6, 3, 3)),
    "BatchNorm3d": (lambda: nw.nn.BatchNorm3d(6, momentum=None), (4, 6, 3, 3, 2)),
}


def randomized(layer: torch.nn.Module) -> torch.nn.Module:
    """With parameters that are neither ones nor zeros."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return layer


def test_every_layer_is_here():
    layers = {n for n in nw.nn.__all__ if isinstance(getattr(nw.nn, n), type)}
    assert set(LAYERS) | {"SyncBatchNorm"} == layers  # that is compiled where there are processes


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", LAYERS)
def test_compiled_layers(name: str, training: bool):
    """Results, gradients and state, over three steps."""
    make, shape = LAYERS[name]
    eager = randomized(make()).train(training)
    other = copy.deepcopy(eager)
    torch.compiler.reset()
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        x, dy = cases.draw(shape)
        results = []
        for layer, parameters in ((eager, eager.parameters()), (compiled, other.parameters())):
            leaf = x.clone().requires_grad_()
            y = layer(leaf)
            results.append((y, torch.autograd.grad(y, (leaf, *parameters), dy)))
        torch.testing.assert_close(*results)
        torch.testing.assert_close(dict(other.named_buffers()), dict(eager.named_buffers()))


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
def test_compiled_by_inductor():
    """A block with everything in it, from two layouts to a running statistic."""

    def block() -> torch.nn.Module:
        return torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 3),
            nw.nn.BatchNorm2d(4),
            torch.nn.ReLU(),
            nw.nn.LayerNorm2d(4),
            nw.nn.GroupNorm(2, 4),
            torch.nn.Flatten(),
            nw.nn.LayerNorm(64),
            nw.nn.RMSNorm(64),
        )

    torch.compiler.reset()
    eager = block()
    other = copy.deepcopy(eager)
    compiled = torch.compile(other, fullgraph=True)
    x, dy = torch.randn(2, 3, 6, 6).contiguous(memory_format=torch.channels_last), torch.randn(2, 64) + 0.5
    results = []
    for model, parameters in ((eager, eager.parameters()), (compiled, other.parameters())):
        y = model(x)
        results.append((y, torch.autograd.grad(y, tuple(parameters), dy)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)  # the convolution's own order of sums
    torch.testing.assert_close(dict(other.named_buffers()), dict(eager.named_buffers()))


# Autocast


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("parameter_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("norm", cases.TORCH_NORMS, ids=str)
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")  # torch's rms_norm
def test_autocast_on_cpu_follows_torchs_policy(
    norm: Norm, dtype: torch.dtype, parameter_dtype: torch.dtype, enabled: bool
):
    """It leaves the norms alone: the type of y is that of x."""
    x, _ = cases.draw(cases.IMAGE, dtype=dtype)
    weight, bias = norm.parameters(x, parameter_dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        y = norm.call(nf, x, weight, bias, 1e-5, norm.running(x, weight))
        if parameter_dtype in (dtype, torch.float32):  # others torch refuses
            theirs = norm.call(tf, x, weight, bias, 1e-5, norm.running(x, weight))
            assert y.dtype == theirs.dtype
            tolerance = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]  # torch's roundings
            torch.testing.assert_close(y, theirs, rtol=tolerance, atol=tolerance)
    assert y.dtype == dtype
    exact = norm.truth(x, weight, bias, x)
    if dtype == torch.float32 and not cases.EXACT_SUMS:
        assert cases.error(y, exact.y) <= cases.A1["y"]
    else:
        assert ((y.double() - exact.y).abs() <= cases.a2_elementwise(exact.y, exact.y_terms, dtype)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(("device", "enabled"), [("cuda", True), ("cuda", False), ("cpu", True)])
@pytest.mark.parametrize("norm", cases.TORCH_NORMS, ids=str)
def test_autocast_on_a_gpu_follows_torchs_policy(norm: Norm, device: str, enabled: bool, dtype: torch.dtype):
    """On tensors without data, which need no GPU: layer_norm, rms_norm and group_norm come out in float32.

    It is none of the CPU's business.
    """
    with torch._subclasses.FakeTensorMode():
        x = torch.empty(cases.IMAGE, device=device, dtype=dtype)
        running = (torch.empty(6, device=device), torch.empty(6, device=device))
        torch.set_autocast_enabled("cuda", enabled)
        try:
            ours, theirs = (norm.call(functions, x, None, None, 1e-5, running) for functions in (nf, tf))
        finally:
            torch.set_autocast_enabled("cuda", False)
        assert (ours.dtype, ours.device, ours.shape) == (theirs.dtype, theirs.device, theirs.shape)


def test_autocast_in_a_model():
    """After a layer that autocast runs in bf16, and with its gradients."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), nw.nn.LayerNorm(6), torch.nn.Linear(6, 4), nw.nn.BatchNorm1d(4))
    x, dy = torch.randn(5, 4), torch.randn(5, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    grads = torch.autograd.grad(y, tuple(model.parameters()), dy)
    assert {g.dtype for g in grads} == {torch.float32}
    assert all(g.isfinite().all() for g in grads)
    assert model[3].num_batches_tracked == 1


# Activation checkpointing


def checkpointed_model() -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Linear(4, 6), nw.nn.BatchNorm1d(6), torch.nn.Tanh(), nw.nn.LayerNorm(6), nw.nn.BatchNorm1d(6)
    ).double()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("nested", [False, True])
def test_a_checkpointed_step_counts_once(reentrant: bool, nested: bool):
    plain = checkpointed_model()
    saving = copy.deepcopy(plain)

    def inner(x: Tensor) -> Tensor:
        if not nested:
            return saving(x)
        return saving[2:](checkpoint(saving[:2], x, use_reentrant=reentrant))

    for step in range(1, 4):
        x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
        dy = torch.randn(5, 6, dtype=torch.float64) + 0.5
        for model, run in ((plain, plain), (saving, lambda x: checkpoint(inner, x, use_reentrant=reentrant))):
            model.zero_grad()
            x.grad = None
            run(x).backward(dy)
            model.x_grad = x.grad
        torch.testing.assert_close(saving.x_grad, plain.x_grad)
        for (name, ours), theirs in zip(saving.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, msg=name)
        torch.testing.assert_close(dict(saving.named_buffers()), dict(plain.named_buffers()))
        assert saving[1].num_batches_tracked == step


def test_a_checkpointed_step_counts_once_when_compiled():
    plain = checkpointed_model()
    saving = copy.deepcopy(plain)
    torch.compiler.reset()
    compiled = torch.compile(lambda x: checkpoint(saving, x, use_reentrant=False), backend="aot_eager", fullgraph=True)
    for step in range(1, 3):
        x, dy = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64) + 0.5
        grads = [
            torch.autograd.grad(run(x), tuple(model.parameters()), dy)
            for run, model in ((plain, plain), (compiled, saving))
        ]
        torch.testing.assert_close(*grads)
        torch.testing.assert_close(dict(saving.named_buffers()), dict(plain.named_buffers()))
        assert saving[1].num_batches_tracked == step


def test_a_forward_after_a_backward_counts():
    """Only a forward inside a backward is a repetition."""
    layer = nw.nn.BatchNorm1d(3)
    for step in range(1, 4):
        layer(torch.randn(4, 3)).backward(torch.randn(4, 3))
        assert layer.num_batches_tracked == step


# Capture: export, fx, functional_call


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_export(name: str, training: bool):
    """For any batch size, with the running statistics that move."""
    make, shape = LAYERS[name]
    layer = randomized(make()).train(training)
    exported = torch.export.export(
        layer, (torch.randn(shape),), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},), strict=False
    )
    assert any(str(node.target).startswith("normwise.") for node in exported.graph.nodes)
    module = exported.module()
    for size in (shape[0], 9):
        x = torch.randn(size, *shape[1:])
        torch.testing.assert_close(module(x), layer(x))
        torch.testing.assert_close(dict(module.named_buffers()), dict(layer.named_buffers()))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", LAYERS)
def test_fx_symbolic_trace(name: str, training: bool):
    make, shape = LAYERS[name]
    model = torch.nn.Sequential(randomized(make()), torch.nn.ReLU()).train(training)
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(dict(model.named_buffers()), buffers)  # not moved by the trace
    other = copy.deepcopy(model)
    for _ in range(2):
        x, dy = cases.draw(shape)
        results = []
        for module in (traced, other):
            leaf = x.clone().requires_grad_()
            y = module(leaf)
            results.append((y, torch.autograd.grad(y, (leaf, *module.parameters()), dy)))
        torch.testing.assert_close(*results)
    for buffer_name, buffer in traced.named_buffers():  # those that the mode and the norm use
        torch.testing.assert_close(buffer, other.get_buffer(buffer_name))
        assert training != torch.equal(buffer, buffers[buffer_name])


def test_functional_call_with_buffers():
    """The buffers that are passed move; the layer's own stay."""
    layer = nw.nn.BatchNorm1d(4).double()
    twin = torch.nn.BatchNorm1d(4).double()
    own = {n: b.clone() for n, b in layer.named_buffers()}
    x = torch.randn(5, 4, dtype=torch.float64)
    results = []
    for module in (layer, twin):
        state = {n: t.detach().clone() for n, t in module.state_dict().items()}
        parameters = {n: state.pop(n) for n in ("weight", "bias")}

        def loss(parameters: dict[str, Tensor], state: dict[str, Tensor], module: Any = module) -> Tensor:
            return torch.func.functional_call(module, (parameters, state), (x,)).pow(3).sum()

        results.append((torch.func.grad(loss)(parameters, state), state))
    torch.testing.assert_close(*results)
    assert results[0][1]["running_mean"].any()
    torch.testing.assert_close(dict(layer.named_buffers()), own)


def test_ensembles_of_layers_by_vmap():
    """Stacked parameters and buffers, as torch.func documents for torch's layers, in eval and without running state."""
    models = [randomized(nw.nn.BatchNorm1d(4)).eval() for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(models)
    x = torch.randn(3, 5, 4)
    y = torch.vmap(lambda p, b, x: torch.func.functional_call(models[0], (p, b), (x,)))(parameters, buffers, x)
    torch.testing.assert_close(y, torch.stack([m(t) for m, t in zip(models, x, strict=True)]))
