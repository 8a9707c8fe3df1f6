"""What only the kernels promise: R1, the same bits at any batch size, and R2, at any number of threads."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
from cases import Norm
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

import normwise as nw
from normwise import dispatch
from normwise.kernels import usable

pytestmark = pytest.mark.skipif(nw.backends()["cpu"].startswith("reference"), reason="the CPU kernels were not built")

HERE = Path(__file__).parent
OTHERS = [name for name in (*usable(), "reference") if name not in cases.BACKENDS]
INVARIANT = [norm for norm in cases.NORMS if norm.name != "batch_norm"]
SHAPES = [(7, 6, 33), (5, 64, 9, 11), (70, 40), (3, 2, 4099), (66, 8, 130)]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def results(norm: Norm, x: torch.Tensor, dy: torch.Tensor, threads: int = 2) -> cases.Results:
    torch.set_num_threads(threads)
    shape = [x.shape[axis] for axis in norm.affine]
    weight = torch.linspace(0.5, 1.5, torch.Size(shape).numel()).reshape(shape).to(x.dtype)
    bias = weight - 1 if norm.centred else None
    running = (torch.linspace(-1, 1, x.shape[1]), torch.linspace(1, 2, x.shape[1])) if norm.running(x) else None
    return norm(x, weight, bias, dy, running=running)


def same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return (a is None) == (b is None) and (a is None or torch.equal(a, b))


def fits(norm: Norm, shape: tuple[int, ...]) -> bool:
    if len(shape) == 2:
        return norm.name not in ("instance_norm", "layer_norm_of_two_axes")
    return True


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("norm", INVARIANT, ids=str)
def test_an_example_has_the_same_bits_alone_and_in_any_batch(norm, shape, layout, dtype):
    if not fits(norm, shape) or (layout == "channels_last" and len(shape) != 4):
        return
    x, dy = (t.to(dtype) for t in cases.draw(shape, 10.0))
    if layout == "channels_last":
        x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    whole = results(norm, x, dy)
    for i in (0, shape[0] // 2, shape[0] - 1):
        alone = results(norm, x[i : i + 1], dy[i : i + 1], threads=1)
        assert torch.equal(alone.y, whole.y[i : i + 1])
        assert torch.equal(alone.dx, whole.dx[i : i + 1])
    order = torch.randperm(shape[0])
    moved = results(norm, x[order], dy[order], threads=3)
    assert torch.equal(moved.y, whole.y[order])
    assert torch.equal(moved.dx, whole.dx[order])


@pytest.mark.parametrize("scale", [1e31, 1e-33, math.nan])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(40, 4, 7, 7), (40, 4, 14, 14), (40, 4, 17, 17)], ids=str)
@pytest.mark.parametrize("norm", cases.NORMS, ids=str)
def test_values_of_another_scale_elsewhere_change_no_bits(norm, shape, layout, scale):
    x, dy = cases.draw(shape)
    if layout == "channels_last":
        x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    ours = (slice(None), slice(2)) if norm.name == "batch_norm" else (slice(20),)
    mixed = torch.full_like(x, scale).mul_(x)
    mixed[ours] = x[ours]
    plain, beside = results(norm, x, dy), results(norm, mixed, dy)
    assert torch.equal(beside.y[ours], plain.y[ours])
    assert torch.equal(beside.dx[ours], plain.dx[ours])
    if norm.name == "batch_norm":
        assert torch.equal(beside.dweight[:2], plain.dweight[:2])


@pytest.mark.parametrize("offset", [1, 3, 5])
@pytest.mark.parametrize("norm", cases.NORMS, ids=str)
def test_bits_do_not_depend_on_alignment(norm, offset):
    x, dy = cases.draw((6, 8, 35), 3.0)
    shifted = []
    for t in (x, dy):
        room = torch.empty(t.numel() + offset)[offset:].view(t.shape)
        shifted.append(room.copy_(t))
    assert all(same(a, b) for a, b in zip(results(norm, x, dy)[:4], results(norm, *shifted)[:4], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(32, 16, 40, 40), (3000, 96), (4, 8, 9001)], ids=str)
@pytest.mark.parametrize("norm", cases.NORMS, ids=str)
def test_every_result_has_the_same_bits_at_any_number_of_threads(norm, shape, layout, dtype):
    if not fits(norm, shape) or (layout == "channels_last" and len(shape) != 4):
        return
    x, dy = (t.to(dtype) for t in cases.draw(shape, 3.0))
    if layout == "channels_last":
        x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    one, *others = (results(norm, x, dy, threads) for threads in (1, 2, 3, 2))
    for other in others:
        assert all(same(a, b) for a, b in zip(one[:4], other[:4], strict=True))


def test_running_statistics_have_the_same_bits_at_any_number_of_threads():
    x = torch.randn(64, 16, 20, 20) * 3 + 100
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        mean, var = torch.zeros(16), torch.ones(16)
        nw.functional.batch_norm(x, mean, var, training=True)
        found.append((mean, var))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_the_exact_mean_cancels_even_where_the_spread_is_below_its_last_digit():
    x = torch.full((3, 4097), 1e6)
    x[:, ::2] += 0.0625
    y = nw.functional.layer_norm(x, (4097,), eps=0.0)
    assert torch.allclose(y[0, :2], torch.tensor([1.0, -1.0]), atol=1e-3)


@pytest.mark.skipif("NORMWISE_CPU" in os.environ, reason="runs where no instruction set is forced")
@pytest.mark.parametrize("name", OTHERS)
def test_the_contract_holds_on_every_other_instruction_set(name):
    """Each in a process of its own: a library cannot be unloaded. `make test-instruction-sets` runs all of these."""
    strict = ["test_functional.py", "test_trace.py", "test_docs.py"]  # and the tests that ask more of exact sums
    chosen = ["test_contract.py", *(strict if name == "reference" else ["test_kernels.py", "--every", "3"])]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:cacheprovider", *chosen],
        cwd=HERE, env={**os.environ, "NORMWISE_CPU": name, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize(
    ("name", "words"),
    [("avx1024", "must be one of"), ("", None), ("reference", None)],
    ids=["unknown", "empty", "reference"],
)
def test_an_instruction_set_can_be_forced(name, words):
    code = "import normwise as nw; print(nw.backends()['cpu'])"
    env = {**os.environ, "NORMWISE_CPU": name}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    if words:
        assert words in done.stderr
        assert done.returncode == 1
    else:
        assert done.returncode == 0
        assert done.stdout.startswith(name or usable())


def test_statistics_may_lie_anyhow_in_memory():
    x, dy = cases.draw((6, 4, 12))
    weight = torch.ones(12)
    ops = torch.ops.normwise
    _, mean, rstd = ops.layer_norm_forward(x, [12], weight, None, 1e-5, None)
    _, means, rstds = ops.group_norm_forward(x, 2, None, None, 1e-5, None, None)
    for call, statistics in (
        (lambda m, r: ops.layer_norm_backward(dy, x, m, r, [12], weight, None, [True] * 3), (mean, rstd)),
        (lambda m, r: ops.group_norm_backward(dy, x, m, r, 2, 1e-5, None, None, None, [True] * 3), (means, rstds)),
    ):
        transposed = [t.T.contiguous().T for t in statistics]
        assert not transposed[0].is_contiguous()
        assert all(torch.equal(a, b) for a, b in zip(call(*statistics), call(*transposed), strict=True))


X, FOUR = torch.randn(2, 4, 3), torch.ones(4)
BAD_ROWS: dict[str, tuple[object, ...]] = {
    "long_weight": (X, (3,), FOUR),
    "short_weight": (X, (3,), torch.ones(1)),
    "weight_of_other_axes": (X, (4, 3), torch.ones(12)),
    "integer_weight": (X, (3,), torch.ones(3, dtype=torch.int64)),
    "integer_x": (X.long(), (3,), None),
    "another_shape": (X, (4,), None),
    "more_axes_than_x": (X, (1, 2, 4, 3), None),
    "no_axis": (X, (), None),
    "scalar_x": (torch.tensor(1.0), (1,), None),
}
BAD_CHANNELS: dict[str, tuple[object, ...]] = {
    "long_weight": (X, torch.ones(5), None),
    "short_weight": (X, torch.ones(1), None),
    "integer_weight": (X, FOUR.long(), None),
    "integer_x": (X.long(), None, None),
    "no_channels": (torch.ones(4), None, None),
    "long_mask": (X, None, torch.ones(3, dtype=torch.bool)),
    "number_mask": (X, None, torch.ones(2)),
    "scalar_mask": (X, None, torch.tensor(True)),
    "mask_of_other_positions": (X, None, torch.ones(2, 4, dtype=torch.bool)),
}


@pytest.mark.parametrize(("x", "shape", "weight"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_row_operators_stay_within_their_arguments(x: Any, shape: Any, weight: Any):
    ops = torch.ops.normwise
    with pytest.raises(RuntimeError, match="normwise:"):
        ops.layer_norm(x, shape, weight, None, 1e-5, None)
    with pytest.raises(RuntimeError, match="normwise:"):
        ops.layer_norm_forward(x, shape, None, weight, 1e-5, None)
    with pytest.raises(RuntimeError, match="normwise:"):
        ops.rms_norm(x, shape, weight, 1e-5, None)


@pytest.mark.parametrize("eps", [-1.0, math.nan, math.inf])
def test_operators_refuse_an_eps_that_is_none(eps: float):
    ops = torch.ops.normwise
    with pytest.raises(RuntimeError, match="normwise: eps"):
        ops.layer_norm(X, (3,), None, None, eps, None)
    with pytest.raises(RuntimeError, match="normwise: eps"):
        ops.group_norm(X, 2, None, None, eps, None, None)
    with pytest.raises(RuntimeError, match="normwise: eps"):
        ops.batch_norm(X, FOUR, FOUR, None, None, eps, None)


@pytest.mark.parametrize(("x", "weight", "mask"), BAD_CHANNELS.values(), ids=BAD_CHANNELS)
def test_channel_operators_stay_within_their_arguments(x: Any, weight: Any, mask: Any):
    ops = torch.ops.normwise
    with pytest.raises(RuntimeError, match="normwise:"):
        ops.group_norm(x, 2, weight, None, 1e-5, mask, None)
    with pytest.raises(RuntimeError, match="normwise:"):
        ops.batch_norm(x, FOUR, FOUR, weight, None, 1e-5, mask)
    with pytest.raises(RuntimeError, match="normwise:"):
        ops.batch_norm(X, FOUR, torch.ones(3), None, None, 1e-5, None)


class Marked(torch.Tensor):
    """A tensor with a type of its own."""


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "group_norm", "batch_norm"])
def test_a_kernel_is_not_called_at_once_where_something_else_sees_the_call(name: str, monkeypatch: pytest.MonkeyPatch):
    x = torch.randn(2, 3, 3) if name in ("layer_norm", "rms_norm") else torch.randn(2, 3)
    op = getattr(torch.ops.normwise, name).default
    arguments = {
        "layer_norm": lambda x, w: (x, (3,), w, None, 1e-5, None),
        "rms_norm": lambda x, w: (x, (3,), w, 1e-5, None),
        "group_norm": lambda x, w: (x, 1, w, None, 1e-5, None, None),
        "batch_norm": lambda x, w: (x, torch.zeros(3), torch.ones(3), w, None, 1e-5, None),
    }[name]

    def at_once(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor | None:
        return dispatch.at_once(op, (x, weight), *arguments(x, weight))

    one = torch.ones(3)
    assert torch.equal(at_once(x, one), op(*arguments(x, one)))  # type: ignore[arg-type]
    assert at_once(x, torch.ones(3, requires_grad=True)) is None
    with torch.no_grad():
        assert at_once(x, torch.nn.Parameter(one)) is not None
    assert at_once(x, one.to("meta")) is None
    assert at_once(x, one.as_subclass(Marked)) is None
    assert at_once(x, torch.ones(4)) is None
    with forward_ad.dual_level():
        assert at_once(x, one) is None
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert at_once(x, one) is None
    monkeypatch.setattr(dispatch, "HAS_KERNELS", False)
    assert at_once(x, one) is None
