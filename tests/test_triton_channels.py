"""The Triton kernels of batch_norm and group_norm: in Triton's interpreter where there is no GPU, else on it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import cases
import pytest
import torch
from torch import Tensor

from normwise.exact_sum import DIGITS, SLOTS
from normwise.ops.common import REFERENCE

pytest.importorskip("triton", reason="no Triton for this platform")

from gpu import DEVICE, GPU, ON_A_GPU, op, unaligned

from normwise.kernels.triton import batch_norm, channels, group_norm

pytestmark = pytest.mark.usefixtures("poisoned")

Shape = tuple[int, ...]
Layout = Callable[[Tensor], Tensor]


def contiguous(x: Tensor) -> Tensor:
    return x


def channels_last(x: Tensor) -> Tensor:
    """The same values; the channels of a position lie next to each other."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


LAYOUTS = [contiguous, channels_last]
KINDS = [
    (torch.float32, 0.0, "positions"),
    (torch.float32, 1e6, "no mask"),
    (torch.bfloat16, 0.0, "no mask"),
    (torch.float16, 10.0, "examples"),
]
"""Of the values, their mean/std, and of the mask: each in some cases, since the interpreter is slow."""
SHAPES = [(40, 3), (3, 4, 33), (5, 6, 5, 8), *([(64, 130, 7, 7), (7, 9, 70, 70)] if GPU else [])]
MODES = ["training", "exact", "eval"]


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples of several parts, parts of several tiles and channels of several merges, at sizes of the interpreter."""
    if GPU:
        pytest.skip("tiles of the real size: large images are tested there")
    for module, sizes in (
        (channels, {"TILE": 64, "SIDE": 4, "STEPS": 3}),
        (batch_norm, {"ROWS": 4, "MOST": 8}),
        (group_norm, {"ROWS": 2, "COLUMNS": 2, "LONGEST": 64}),
    ):
        for name, size in sizes.items():
            monkeypatch.setattr(module, name, size)


def inputs(shape: Shape, ratio: float = 0.0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x, dy, weight, bias and a residual."""
    x, dy = cases.draw(shape, ratio, dtype)
    weight, bias = 1 + torch.randn(shape[1]) / 4, torch.randn(shape[1])
    return [t.to(DEVICE) for t in (x, dy, weight, bias, torch.randn(shape).to(dtype))]


def mask_of(kind: str, shape: Shape) -> Tensor | None:
    """A mask by example or by position, which leaves out all of the last example."""
    if kind == "no mask":
        return None
    valid = torch.rand(shape[:1] if kind == "examples" else (shape[0], *shape[2:])) < 0.8
    valid[0], valid[-1] = True, False
    return valid.to(DEVICE)


Find = Callable[[str], Callable[..., Any]]


def batch(find: Find, mode: str, relu: bool, given: list[Tensor], mask: Tensor | None) -> dict[str, Tensor]:
    """Every output of Batch Norm, forward and backward, by the operators that ``find`` finds."""
    x, dy, w, b, residual = given
    name, exact, training = "batch_norm_relu" if relu else "batch_norm", mode == "exact", mode != "eval"
    added = [residual] if relu else []
    if training:
        y, mean, var = find(f"{name}_forward")(x, w, b, cases.EPS, mask, *added, exact)
    else:
        mean, var = b.double() / 3, 1.5 * w.double() ** 2 + 0.1
        y = find(name)(x, mean, var, w, b, cases.EPS, mask, *added)
    back = x, mean, var, cases.EPS, training, mask, exact, w, b.dtype, [True] * (4 if relu else 3)
    grads = find(f"{name}_backward")(dy, *([y] if relu else []), *back)
    names = ["dx", "dweight", "dbias", "dresidual"]
    return {"y": y, "mean": mean, "var": var, **dict(zip(names, grads, strict=False))}


def groups(find: Find, count: int, given: list[Tensor], mask: Tensor | None) -> dict[str, Tensor]:
    """Every output of Group Norm, forward and backward."""
    x, dy, w, b, _ = given
    y, mean, rstd = find("group_norm_forward")(x, count, w, b, cases.EPS, mask, None)
    grads = find("group_norm_backward")(dy, x, mean, rstd, count, cases.EPS, mask, w, b.dtype, [True] * 3)
    return {"y": y, "mean": mean, "rstd": rstd, **dict(zip(["dx", "dweight", "dbias"], grads, strict=True))}


def in_float64(name: str) -> Callable[..., Any]:
    """The reference of an operator on the same values in float64."""
    wide = lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t  # noqa: E731
    return lambda *args: REFERENCE[name](*map(wide, args))


def assert_right(got: dict[str, Tensor], want: dict[str, Tensor], given: list[Tensor]) -> None:
    """Within A1, or rounded once from there; sums may cancel, and are good to their terms."""
    x, dy = given[:2]
    half = x.dtype.itemsize == 2
    for key, exact in want.items():
        if key in ("y", "dx", "dresidual"):
            assert got[key].dtype == x.dtype
            assert got[key].stride() == torch.empty_like(x).stride()
            limit = torch.finfo(x.dtype).eps / 2 if half else cases.A1["y" if key == "y" else "dx"]
        else:
            limit = 1e-10 if key in ("mean", "var", "rstd") else cases.A1["dweight"]
            limit = cases.A2_SUMS.get(got[key].dtype, limit)
        scale = max(exact, dy.double(), key=torch.linalg.vector_norm) if key in ("dweight", "dbias") else None
        assert cases.error(got[key], exact, scale) <= limit, key


@pytest.mark.parametrize(("dtype", "ratio", "mask"), KINDS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES[:1] + SHAPES[2:], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_batch_norm(mode, shape, layout, dtype, ratio, mask):
    given = inputs(shape, ratio if mode != "eval" else min(ratio, 100.0), dtype)
    given = [layout(t) if t.dim() > 1 else t for t in given]
    valid = mask_of(mask, shape)
    assert_right(batch(op, mode, False, given, valid), batch(in_float64, mode, False, given, valid), given)


@pytest.mark.parametrize(("dtype", "parameter_dtype"), cases.TYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm", [*MODES, "relu", "group"])
def test_every_type_and_layout(norm, layout, dtype, parameter_dtype):
    given = [layout(t) if t.dim() > 1 else t.to(parameter_dtype) for t in inputs((4, 4, 3, 5), 1.0, dtype)]
    mode = "exact" if norm == "relu" else norm
    outputs = [
        groups(find, 2, given, None) if norm == "group" else batch(find, mode, norm == "relu", given, None)
        for find in (op, in_float64)
    ]
    assert_right(*outputs, given)


@pytest.mark.parametrize("mask", ["no mask", "positions"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
def test_batch_norm_relu(mode, layout, mask):
    shape = (5, 6, 5, 8)
    given = [layout(t) if t.dim() > 1 else t for t in inputs(shape, 3.0)]
    valid = mask_of(mask, shape)
    assert_right(batch(op, mode, True, given, valid), batch(in_float64, mode, True, given, valid), given)


@pytest.mark.parametrize(("dtype", "ratio", "mask"), KINDS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
@pytest.mark.parametrize("of_one", [True, False])
def test_group_norm(of_one, shape, layout, dtype, ratio, mask):
    given = [layout(t) if t.dim() > 1 else t for t in inputs(shape, ratio, dtype)]
    count, valid = shape[1] if of_one else shape[1] // (2 if shape[1] % 2 == 0 else 3), mask_of(mask, shape)
    assert_right(groups(op, count, given, valid), groups(in_float64, count, given, valid), given)


@pytest.mark.parametrize("mask", ["no mask", "positions"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm", [*MODES, "group"])
def test_examples_of_several_parts(norm, layout, mask, small_tiles):
    shape = (3, 5, 11, 13)
    given = [layout(t) if t.dim() > 1 else t for t in inputs(shape, 1e3)]
    valid = mask_of(mask, shape)
    if norm == "group":
        assert_right(groups(op, 1, given, valid), groups(in_float64, 1, given, valid), given)
    else:
        assert_right(batch(op, norm, False, given, valid), batch(in_float64, norm, False, given, valid), given)


@pytest.mark.parametrize("mask", ["no mask", "positions"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(5, 6, 49), (5, 6, 5, 8), *([(9, 64, 56, 56)] if GPU else [])], ids=str)
@pytest.mark.parametrize("norm", ["group", "eval"])
def test_an_example_has_the_same_bits_alone_and_in_any_batch(norm, shape, layout, mask):
    given, valid = inputs(shape, 3.0), mask_of(mask, shape)

    def outputs(of: slice, moved: bool) -> dict[str, Tensor]:
        some = [layout(t)[of] if t.dim() > 1 else t for t in given]
        some = [unaligned(t) for t in some] if moved else some
        kept = None if valid is None else valid[of]
        return groups(op, 2, some, kept) if norm == "group" else batch(op, "eval", False, some, kept)

    whole = outputs(slice(None), False)
    for of in (slice(1, 2), slice(2, 5)):
        for moved in (False, True):
            alone = outputs(of, moved)
            assert all(torch.equal(alone[key], whole[key][of]) for key in ("y", "dx"))


def test_gaps_between_rows_change_no_bits():
    x = (torch.randn(5, 300) * 3 + 100).to(DEVICE)[:, :256]
    whole = op("group_norm")(x, 2, None, None, cases.EPS, None, None)
    for i in range(5):
        assert torch.equal(op("group_norm")(x[i : i + 1], 2, None, None, cases.EPS, None, None), whole[i : i + 1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_exact_sums_of_single_values_are_the_references_integers(layout):
    """Of parts of one value nothing is rounded before it is split into digits."""
    x = torch.randn(70, 5) * torch.logspace(-18, 18, 70).unsqueeze(1)
    x[3, 1], x[4, 2] = float("nan"), float("inf")
    x = x.repeat_interleave(2, 0)[::2] if layout is channels_last else x  # rows with gaps
    got = op("batch_norm_sums")(x.to(DEVICE), cases.EPS, None, True).cpu()
    want = REFERENCE["batch_norm_sums"](x, cases.EPS, None, True)
    good = torch.tensor([0, 3, 4])
    assert torch.equal(got[good], want[good])
    assert (got[1:3, [DIGITS, SLOTS + DIGITS]] > 0).all()
    for ours, exact in zip(
        op("batch_norm_moments")(got.to(DEVICE)), REFERENCE["batch_norm_moments"](want), strict=True
    ):
        assert torch.equal(ours.cpu()[good], exact[good])
        assert ours.shape == exact.shape


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(24, 5, 4, 4), (40, 7)], ids=str)
def test_a_batch_in_parts_has_the_bits_of_the_whole(shape, layout):
    x, dy, w, b, residual = inputs(shape, 1e4)
    x[::3] *= 7
    whole = batch(op, "exact", False, [layout(x), layout(dy), w, b, residual], None)
    order = torch.randperm(len(x))
    for cuts in ([5], [3, 20]):
        pieces = [i for i in torch.tensor_split(order, cuts) if len(i)]
        parts = [(layout(x[i]), layout(dy[i])) for i in pieces]
        sums = sum(op("batch_norm_sums")(x, cases.EPS, None, True) for x, _ in parts)
        mean, var, count = op("batch_norm_moments")(sums)
        assert torch.equal(mean, whole["mean"])
        assert torch.equal(var, whole["var"])
        sums = sum(op("batch_norm_gradient_sums")(dy, x, mean, var, cases.EPS, None, True) for x, dy in parts)
        for i, (x_part, dy_part) in zip(pieces, parts, strict=True):
            dx, dweight, dbias = op("batch_norm_backward_of_sums")(
                dy_part, x_part, mean, var, cases.EPS, None, sums, count, w, b.dtype, [True] * 3
            )
            assert torch.equal(dx, whole["dx"][i])
            assert torch.equal(dweight, whole["dweight"])
            assert torch.equal(dbias, whole["dbias"])


def test_float64_off_the_grid_of_exact_sums_is_merged():
    x, dy = (t.double().to(DEVICE) for t in cases.draw((6, 3, 20)))
    x[:, 1] *= 1e100
    x[:, 2] *= 1e-90
    w = torch.ones(3, dtype=torch.float64, device=DEVICE)
    given = [x, dy, w, w, x]
    got, want = batch(op, "exact", False, given, None), batch(in_float64, "exact", False, given, None)
    for key, exact in want.items():
        for channel in range(3):
            ours, theirs = (t[:, channel] if t.dim() > 1 else t[channel] for t in (got[key], exact))
            assert (ours - theirs).abs().max() <= 1e-12 * theirs.abs().max(), key


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("norm", [*MODES, "group"])
def test_a_bad_value_spoils_what_shares_its_statistics_alone(norm, value):
    given = inputs((4, 6, 33))
    outputs = [groups(op, 3, given, None) if norm == "group" else batch(op, norm, False, given, None)]
    given[0][1, 2, 3] = value
    outputs.append(groups(op, 3, given, None) if norm == "group" else batch(op, norm, False, given, None))
    clean, spoilt = outputs
    shared = torch.zeros(4, 6, 33, dtype=torch.bool)
    shared[(1, slice(2, 4)) if norm == "group" else (1, 2, 3) if norm == "eval" else (slice(None), 2)] = True
    for key in ("y", "dx"):
        assert torch.equal(clean[key].cpu()[~shared], spoilt[key].cpu()[~shared])
        assert not spoilt[key].cpu()[shared].isfinite().any() or (norm == "eval" and key == "dx")


@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["channels", "rows", "masked rows", "total"])
def test_running_statistics(kind, dtype, momentum):
    rows = () if kind in ("channels", "total") else (9,)
    mean, var = (torch.rand(*rows, 20, dtype=torch.float64) for _ in range(2))
    var.view(-1)[5] = 1e300
    mask = torch.rand(9, 12) < 0.1 if kind == "masked rows" else None
    if mask is not None:
        mask[2], mask[3, 1:] = False, False
        mean[2] = float("nan")  # of no value at all
    total = torch.arange(20.0).double() if kind == "total" else None
    found = []
    for update, device in ((REFERENCE["update_running_"], "cpu"), (op("update_running_"), DEVICE)):
        running = torch.stack([torch.linspace(-1, 1, 20), torch.linspace(0.5, 2, 20)], 1).to(device, dtype)
        tracked = torch.tensor(3, device=device)
        given = (t if t is None else t.to(device) for t in (mean, var))
        more = (t if t is None else t.to(device) for t in (mask, total))
        columns = running[:, 0], running[:, 1]  # not contiguous
        mask_on, total_on = more
        update(*columns, tracked, *given, 12, momentum, mask_on, total_on)
        found.append((running.cpu(), tracked.item()))
    (want, steps), (got, ours) = found
    assert steps == ours == 4
    assert want.isfinite().all()
    assert torch.equal(got, want) if dtype == torch.bfloat16 else torch.allclose(got, want, rtol=3e-7, atol=0)


@pytest.mark.parametrize(
    "wanted", [(False, True, True), (True, False, True), (True, True, False), (False,) * 3], ids=str
)
@pytest.mark.parametrize("exact", [True, False])
def test_unwanted_gradients_come_back_empty(exact: bool, wanted: tuple[bool, ...]):
    x, dy, w, b, _ = inputs((5, 4, 20))
    _, mean, var = op("batch_norm_forward")(x, w, b, cases.EPS, None, exact)
    of_batch = lambda mask: op("batch_norm_backward")(  # noqa: E731
        dy, x, mean, var, cases.EPS, True, None, exact, w, b.dtype, mask
    )
    _, mean_of_group, rstd = op("group_norm_forward")(x, 2, w, b, cases.EPS, None, None)
    of_group = lambda mask: op("group_norm_backward")(  # noqa: E731
        dy, x, mean_of_group, rstd, 2, cases.EPS, None, w, b.dtype, mask
    )
    for gradients in (of_batch, of_group):
        for want, every, some in zip(wanted, gradients([True] * 3), gradients(list(wanted)), strict=True):
            assert torch.equal(every, some) if want else some.numel() == 0


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float64], ids=str)
def test_the_output_of_group_norm_may_be_wider(out_dtype):
    x, dy, w, b, _ = inputs((3, 4, 50), 0.0, torch.bfloat16)
    args = x, 2, w, b, cases.EPS, None, out_dtype
    for ours, theirs in zip(op("group_norm_forward")(*args), REFERENCE["group_norm_forward"](*args), strict=True):
        assert (ours.dtype, ours.shape, ours.stride()) == (theirs.dtype, theirs.shape, theirs.stride())
        assert cases.error(ours, theirs.double()) <= cases.A1["dx"]
    _, mean, rstd = REFERENCE["group_norm_forward"](*args)
    back = dy.to(out_dtype), x, mean, rstd, 2, cases.EPS, None, w, b.dtype, [True] * 3
    for ours, theirs in zip(op("group_norm_backward")(*back), REFERENCE["group_norm_backward"](*back), strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        assert cases.error(ours, theirs.double()) <= cases.A2_SUMS[torch.bfloat16]


X, FOUR = torch.randn(2, 4, 3), torch.ones(4)
BAD = {
    "long_weight": (X, torch.ones(5), None), "integer_weight": (X, torch.ones(4, dtype=torch.int64), None),
    "one_axis": (torch.randn(3), None, None), "long_mask": (X, FOUR, torch.ones(3, dtype=torch.bool)),
    "mask_of_channels": (X, FOUR, torch.ones(2, 4, 3, dtype=torch.bool)), "float_mask": (X, FOUR, torch.ones(2)),
}  # fmt: skip


@pytest.mark.parametrize(("x", "weight", "mask"), BAD.values(), ids=BAD)
def test_operators_stay_within_their_arguments(x: Tensor, weight: Tensor | None, mask: Tensor | None):
    x, weight, mask, four = (t if t is None else t.to(DEVICE) for t in (x, weight, mask, FOUR))
    with pytest.raises(RuntimeError, match="normwise:"):
        op("group_norm")(x, 2, weight, None, 1e-5, mask, None)
    with pytest.raises(RuntimeError, match="normwise:"):
        op("batch_norm")(x, four, four, weight, None, 1e-5, mask)
    with pytest.raises(RuntimeError, match="normwise:"):
        op("batch_norm_forward")(x, weight, None, 1e-5, mask, True)


@pytest.mark.parametrize("count", [0, 3, 5])
def test_groups_must_divide_the_channels(count: int):
    with pytest.raises(RuntimeError, match="num_groups must divide the 4 channels"):
        op("group_norm")(X.to(DEVICE), count, None, None, 1e-5, None, None)


def test_sums_and_statistics_have_the_shapes_of_their_channels():
    x, four = X.to(DEVICE), FOUR.to(DEVICE)
    with pytest.raises(RuntimeError, match="normwise: the sums must be int64"):
        op("batch_norm_moments")(torch.zeros(4, 44, dtype=torch.int64, device=DEVICE))
    sums = torch.zeros(3, 44, dtype=torch.int64, device=DEVICE)
    with pytest.raises(RuntimeError, match=r"normwise: the sums must be int64, \(4, 44\)"):
        op("batch_norm_backward_of_sums")(x, x, four, four, 1e-5, None, sums, four, None, None, [True] * 3)
    with pytest.raises(RuntimeError, match="normwise: mean must be"):
        op("group_norm_backward")(x, x, four, four, 2, 1e-5, None, None, None, [True] * 3)
    with pytest.raises(RuntimeError, match="normwise: running_var must be"):
        op("update_running_")(four, four[:3], None, four, four, 6, 0.1, None)


def test_running_statistics_of_no_example_stay():
    mean, var, none = torch.zeros(4, device=DEVICE), torch.ones(4, device=DEVICE), torch.empty(0, 4, device=DEVICE)
    op("update_running_")(mean, var, None, none, none, 3, 0.1, torch.empty(0, 3, dtype=torch.bool, device=DEVICE))
    assert (mean == 0).all()
    assert (var == 1).all()


@pytest.mark.parametrize("planar", [True, False])
@pytest.mark.parametrize(("count", "positions"), [(3, 1), (64, 49), (2048, 49), (96, 3136), (5, 10**6)])
def test_tiles_and_parts_depend_on_an_example_alone(count: int, positions: int, planar: bool):
    of = [channels.Channels(examples, count, positions, planar) for examples in (1, 2, 33, 10**6)]
    assert len({(at.tile, at.steps, at.chunks(at.steps)) for at in of}) == 1
    joined = [channels.Channels(1, count, positions * examples, False, True) for examples in (1, 2, 33, 10**6)]
    assert len({at.tile for at in joined}) == 1
    values, side = of[0].tile
    assert values * side <= channels.TILE
    assert values * of[0].steps * of[0].chunks(of[0].steps) >= positions


# What only a GPU can show


@ON_A_GPU
def test_another_number_of_examples_compiles_nothing_anew():
    kernels = [
        *(channels._moments_of_parts, channels._normalize, channels._gradients_of_parts, channels._dx),
        *(batch_norm._merge, batch_norm._deposit_moments, batch_norm._deposit_gradients),
    ]

    def compiled() -> int:
        return sum(len(caches[0]) for kernel in kernels for caches in kernel.device_caches.values())

    for layout, shape, mode in itertools.product(LAYOUTS, [(64, 14, 14), (64,)], MODES):
        counts = []
        for examples in (2, 3, 16, 100):
            given = [layout(t) if t.dim() > 1 else t for t in inputs((examples, *shape))]
            batch(op, mode, False, given, None)
            counts.append(compiled())
        assert len(set(counts)) == 1


@ON_A_GPU
def test_a_channel_may_have_millions_of_parts():
    x = torch.randn(4_300_000, 2, 16, device="cuda", dtype=torch.bfloat16)
    _, mean, var = op("batch_norm_forward")(x, None, None, cases.EPS, None, True)
    exact = torch.var_mean(x.double(), (0, 2), correction=0)
    assert torch.allclose(torch.stack([var, mean]), torch.stack(exact), rtol=1e-9, atol=1e-12)


@ON_A_GPU
@pytest.mark.parametrize("norm", ["training", "exact", "group"])
def test_graphs_capture_the_kernels(norm):
    given = inputs((16, 64, 28, 28), 1.0, torch.bfloat16)
    call = lambda: groups(op, 32, given, None) if norm == "group" else batch(op, norm, False, given, None)  # noqa: E731
    want = call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(got[key], want[key]) for key in want)


@ON_A_GPU
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm", ["training", "exact", "group"])
def test_every_result_has_the_same_bits_from_run_to_run(norm, layout):
    given = [layout(t) if t.dim() > 1 else t for t in inputs((64, 64, 28, 28), 3.0, torch.bfloat16)]
    one, two = (groups(op, 32, given, None) if norm == "group" else batch(op, norm, False, given, None) for _ in "12")
    assert all(torch.equal(one[key], two[key]) for key in one)


@ON_A_GPU
def test_offsets_beyond_2_to_31():
    x = torch.randn(1100, 64, 200, 160, device="cuda", dtype=torch.bfloat16)
    assert x.numel() > 2**31
    y, mean, rstd = op("group_norm_forward")(x, 8, None, None, cases.EPS, None, None)
    assert torch.equal(y[-2:], op("group_norm")(x[-2:], 8, None, None, cases.EPS, None, None))
    dx = op("group_norm_backward")(y, x, mean, rstd, 8, cases.EPS, None, None, None, [True, False, False])[0]
    some = y[-2:], x[-2:], mean[-2:], rstd[-2:]
    assert torch.equal(
        dx[-2:], op("group_norm_backward")(*some, 8, cases.EPS, None, None, None, [True, False, False])[0]
    )
