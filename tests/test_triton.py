"""The Triton kernels: in Triton's interpreter where there is no GPU, on one where there is."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
from torch import Tensor

import normwise as nw
from normwise.kernels import triton as kernels
from normwise.ops.common import REFERENCE

pytest.importorskip("triton", reason="no Triton for this platform")

from gpu import DEVICE, GPU, ON_A_GPU, op, unaligned

if not GPU:
    import interpreter

from normwise.kernels.triton import layer_norm, rows

HERE = Path(__file__).parent
NORMS = [cases.BY_NAME["layer_norm"], cases.BY_NAME["rms_norm"]]
pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(params=[1, 128], ids=["one_row", "several_rows"])
def small_tiles(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Rows that take several tiles, and blocks of several tiles, at sizes that the interpreter can do."""
    if GPU:
        pytest.skip("tiles of the real size: long rows are tested there")
    monkeypatch.setattr(layer_norm, "LONGEST", 64)
    monkeypatch.setattr(layer_norm, "LONGEST_IN_BACKWARD", 32)
    monkeypatch.setattr(rows, "LONGEST_OF_POSITIONS", 16)
    monkeypatch.setattr(rows, "TILE", request.param)
    monkeypatch.setattr(layer_norm, "steps_of", lambda tiles, cols: 4)


def packed(x: Tensor) -> Tensor:
    return x


def planar(x: Tensor) -> Tensor:
    """The same values; those of a row stand apart, as the channels of an image do."""
    return x.movedim(-1, 1).contiguous().movedim(1, -1)


def both(name: str, x: Tensor, residual: Tensor | None, w: Tensor, b: Tensor, dy: Tensor, dh: Tensor | None) -> Any:
    """Every output of forward and of backward, by one name each."""
    centred = "layer" in name
    added = () if residual is None else (residual,)
    affine = (w, b) if centred else (w,)
    forward = op(f"{name}_forward")(x, *added, w.shape, *affine, cases.EPS, None)
    y, *h, rstd = forward if not centred else (*forward[:-2], forward[-1])
    mean = forward[-2:-1] if centred else ()
    kept = () if residual is None else (dh,)
    wanted = (w.shape, w, b.dtype, [True] * 3) if centred else (w.shape, w, [True] * 2)
    grads = op(f"{name}_backward")(dy, *kept, h[0] if h else x, *mean, rstd, *wanted)
    names = ["y", *(["h"] if h else []), "rstd", "dx", "dweight", *(["dbias"] if centred else [])]
    return dict(zip(names, [y, *h, rstd, *grads], strict=True))


def inputs(shape: tuple[int, ...], ratio: float, dtype: torch.dtype, parameter_dtype: torch.dtype) -> list[Tensor]:
    """x, a residual, weight, bias, dy and dh."""
    x, dy = cases.draw(shape, ratio, dtype)
    residual, dh = cases.draw(shape, ratio, dtype)
    weight, bias = NORMS[0].parameters(x, parameter_dtype)
    return [t.to(DEVICE) for t in (x, residual, weight, bias, dy, dh)]


def assert_right(name: str, got: dict[str, Tensor], given: list[Tensor]) -> None:
    """Within A1 or A2 of the reference on the same values, as `test_contract.py` has it."""
    x, residual, w, b, dy, dh = (t.cpu() for t in given)
    got = {key: value.cpu() for key, value in got.items()}
    fused, norm = name.startswith("fused"), cases.BY_NAME[name.removeprefix("fused_add_")]
    h = x + residual if fused else x
    if fused:
        assert torch.equal(got["h"], h)
    truth = norm.truth(h, w, b if norm.centred else None, dy)
    dx = truth.dx + (dh.double() if fused else 0)
    terms = {"y": truth.y_terms, "dx": (*truth.dx_magnitudes, *([dh.double()] if fused else []))}
    for key, exact in (("y", truth.y), ("dx", dx)):
        assert got[key].dtype == x.dtype
        assert got[key].stride() == torch.empty_like(x).stride()
        if x.dtype == torch.float32:  # of one or two values dx is what is left of terms that cancel
            scale = torch.stack(terms[key]) if key == "dx" and x.shape[-1] <= 2 else None
            assert cases.error(got[key], exact, scale) <= cases.A1[key], key
        else:
            assert ((got[key].double() - exact).abs() <= cases.a2_elementwise(exact, terms[key], x.dtype)).all(), key
    limit = cases.A2_SUMS.get(w.dtype, cases.A2_WIDE)
    for key in ("dweight", "dbias") if norm.centred else ("dweight",):
        exact = getattr(truth, key)
        scale = max(exact, truth.summands[key], key=torch.linalg.vector_norm)
        assert got[key].dtype == w.dtype
        assert cases.error(got[key], exact, scale) <= limit, key


NAMES = ["layer_norm", "rms_norm", "fused_add_layer_norm", "fused_add_rms_norm"]
TYPES = [types for types in cases.TYPES if types[0] != torch.float64]
SIZES = [1, 2, 31, 33, 1023, 4099] + ([20_000, 65_536, 100_001] if GPU else [])


def call(name: str, given: list[Tensor]) -> dict[str, Tensor]:
    x, residual, w, b, dy, dh = given
    fused = name.startswith("fused")
    return both(name, x, residual if fused else None, w, b, dy, dh if fused else None)


@pytest.mark.parametrize(("dtype", "parameter_dtype"), TYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_whole_rows(name: str, size: int, dtype: torch.dtype, parameter_dtype: torch.dtype):
    given = inputs((3, size), 10.0, dtype, parameter_dtype)
    assert_right(name, call(name, given), given)


@pytest.mark.parametrize(("dtype", "parameter_dtype"), cases.TYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_type_where_rows_lie_next_to_each_other(name: str, dtype: torch.dtype, parameter_dtype: torch.dtype):
    x, residual, w, b, dy, dh = inputs((2, 5, 40), 1.0, dtype, parameter_dtype)
    given = [planar(x), planar(residual), w, b, planar(dy), planar(dh)]
    assert_right(name, call(name, given), given)


@pytest.mark.parametrize(
    ("dtype", "ratio"), [(torch.float32, 0.0), (torch.float32, 1e6), (torch.bfloat16, 0.0)], ids=str
)
@pytest.mark.parametrize(("layout", "shape"), [(packed, (3, 5, 100)), (planar, (2, 34, 40))])
@pytest.mark.parametrize("name", NAMES)
def test_rows_of_several_tiles(name, layout, shape, dtype, ratio, small_tiles):
    x, residual, w, b, dy, dh = inputs(shape, ratio, dtype, torch.float32)
    given = [layout(x), layout(residual), w, b, layout(dy), layout(dh)]
    assert_right(name, call(name, given), given)


@pytest.mark.parametrize("layout", [packed, planar])
@pytest.mark.parametrize(
    "shape", [(5, 37, 1), (5, 37, 40), (3, 3, 700), *([(3, 3, 3000), (3, 3, 20_000)] if GPU else [])]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_an_example_has_the_same_bits_alone_and_in_any_batch(name, dtype, shape, layout):
    x, residual, w, b, dy, dh = inputs(shape, 3.0, dtype, torch.float32)
    batch = [layout(x), layout(residual), w, b, layout(dy), layout(dh)]
    whole = call(name, batch)
    for part in (slice(1, 2), slice(2, shape[0])):
        some = [t if t is w or t is b else t[part] for t in batch]
        moved = [t if t is w or t is b else unaligned(t) for t in some]
        for given in (some, moved):
            alone = call(name, given)
            assert torch.equal(alone["y"], whole["y"][part])
            assert torch.equal(alone["dx"], whole["dx"][part])


@pytest.mark.parametrize("gap", [lambda x: x[:, :300], lambda x: x[::2]], ids=["channels", "examples"])
def test_gaps_between_examples_change_no_bits(gap):
    """As of a chunk of channels, or of every second example."""
    x, _, w, b, dy, _ = inputs((4, 600, 3, 3), 30.0, torch.float32, torch.float32)
    x, dy = (gap(t.reshape(4, 600, 3, 3)).movedim(1, -1) for t in (x, dy))
    w, b = (torch.linspace(0.5, 1.5, x.shape[-1], device=DEVICE) for _ in "wb")
    whole = both("layer_norm", x, None, w, b, dy, None)
    for i in range(len(x)):
        alone = both("layer_norm", x[i : i + 1], None, w, b, dy[i : i + 1], None)
        assert torch.equal(alone["y"], whole["y"][i : i + 1])
        assert torch.equal(alone["dx"], whole["dx"][i : i + 1])


def test_a_row_of_several_tiles_has_the_same_bits_in_any_batch(small_tiles):
    for layout, shape in ((packed, (3, 3, 100)), (planar, (3, 34, 40))):
        x, _, w, b, dy, _ = inputs(shape, 3.0, torch.float32, torch.float32)
        whole, alone = (
            both("layer_norm", layout(x)[s], None, w, b, layout(dy)[s], None) for s in (slice(4), slice(2, 3))
        )
        assert torch.equal(alone["y"], whole["y"][2:3])
        assert torch.equal(alone["dx"], whole["dx"][2:3])


def test_the_sum_has_the_bits_of_the_unfused_pair():
    x, residual, w, b, dy, dh = inputs((6, 300), 3.0, torch.bfloat16, torch.float32)
    fused = both("fused_add_layer_norm", x, residual, w, b, dy, torch.zeros_like(dh))
    alone = both("layer_norm", x + residual, None, w, b, dy, None)
    assert all(torch.equal(fused[key], alone[key]) for key in alone)


@pytest.mark.parametrize(
    "wanted", [(False, True, True), (True, False, True), (True, True, False), (False,) * 3], ids=str
)
def test_unwanted_gradients_come_back_empty(wanted: tuple[bool, ...]):
    x, _, w, b, dy, _ = inputs((40, 33), 0.0, torch.float32, torch.float32)
    _, mean, rstd = op("layer_norm_forward")(x, [33], w, b, cases.EPS, None)
    every = op("layer_norm_backward")(dy, x, mean, rstd, [33], w, b.dtype, [True] * 3)
    some = op("layer_norm_backward")(dy, x, mean, rstd, [33], w, b.dtype, list(wanted))
    for want, one, two in zip(wanted, every, some, strict=True):
        assert torch.equal(one, two) if want else two.numel() == 0


@pytest.mark.parametrize("out_dtype", [None, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_the_types_of_the_reference(dtype: torch.dtype, out_dtype: torch.dtype | None):
    x, residual, w, b, _, dh = inputs((5, 33), 3.0, dtype, dtype)
    args = x, residual, [33], w, b, cases.EPS, out_dtype
    ours, theirs = op("fused_add_layer_norm_forward")(*args), REFERENCE["fused_add_layer_norm_forward"](*args)
    dy = torch.randn_like(ours[0]) + 0.5
    wanted = dy, dh, *ours[1:], [33], w, dtype, [True] * 3
    ours += tuple(op("fused_add_layer_norm_backward")(*wanted))
    theirs += REFERENCE["fused_add_layer_norm_backward"](*wanted)
    for a, e in zip(ours, theirs, strict=True):
        assert (a.dtype, a.shape, a.stride()) == (e.dtype, e.shape, e.stride())
        wide = a.dtype == torch.float64 and torch.float64 in (dtype, out_dtype)
        assert cases.error(a, e.double()) <= (1e-15 if wide else 3e-7 if a.dtype.itemsize > 2 else 5e-4)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 0, 3)], ids=str)
def test_empty_inputs_take_the_reference(shape: tuple[int, ...]):
    x = torch.empty(shape, device=DEVICE)
    y, mean, rstd = op("layer_norm_forward")(x, shape[-1:], None, None, cases.EPS, None)
    assert y.shape == shape
    assert mean.shape == rstd.shape == shape[:-1]


BAD = {
    "long_weight": ((3,), torch.ones(4)), "weight_of_other_axes": ((4, 3), torch.ones(12)),
    "integer_weight": ((3,), torch.ones(3, dtype=torch.int64)), "another_shape": ((4,), None),
    "more_axes_than_x": ((1, 2, 4, 3), None), "no_axis": ((), None),
}  # fmt: skip


@pytest.mark.parametrize(("shape", "weight"), BAD.values(), ids=BAD)
def test_operators_stay_within_their_arguments(shape: Any, weight: Tensor | None):
    x = torch.randn(2, 4, 3, device=DEVICE)
    with pytest.raises(RuntimeError, match="normwise:"):
        op("layer_norm")(x, shape, None if weight is None else weight.to(DEVICE), None, 1e-5, None)


def test_what_goes_with_x_has_its_shape():
    x, s = torch.randn(2, 3, device=DEVICE), torch.ones(2, dtype=torch.float64, device=DEVICE)
    with pytest.raises(RuntimeError, match=r"normwise: residual must be floating-point, \(2, 3\).*\(1, 3\)"):
        op("fused_add_layer_norm")(x, x[:1], [3], None, None, 1e-5, None)
    for dy, mean in ((x[:1], s), (x, s[:1])):
        with pytest.raises(RuntimeError, match=r"normwise: (dy|mean) must be"):
            op("layer_norm_backward")(dy, x, mean, s, [3], None, None, [True] * 3)


def test_offsets_beyond_2_to_31():
    if GPU:
        x = torch.randn(2**20 + 7, 2048, device="cuda", dtype=torch.bfloat16)
        y, mean, rstd = op("layer_norm_forward")(x, [2048], None, None, cases.EPS, None)
        assert torch.equal(y[-9:], op("layer_norm")(x[-9:], [2048], None, None, cases.EPS, None))
        dx = op("layer_norm_backward")(y, x, mean, rstd, [2048], None, None, [True] * 3)[0]
        some = op("layer_norm_backward")(y[-9:], x[-9:], mean[-9:], rstd[-9:], [2048], None, None, [True] * 3)[0]
        assert torch.equal(dx[-9:], some)
    else:  # the first row lies at 2**33 behind a pointer that points as far before it
        x = torch.randn(4, 8)
        at = rows.Rows(2, 2, 8, 2**33, 8, 1)
        tile, block, _ = at.tile(layer_norm.LONGEST)
        offsets = torch.zeros(2 * tile, block, dtype=torch.int64)
        interpreter.offsets_of[(2,)](offsets, *at[1:], ROWS=tile, BLOCK=block)
        assert offsets[tile, 0] == 2**33
        assert offsets[tile + 1, 7] == 2**33 + 15


@pytest.mark.parametrize("cols", [1, 33, 768, 16_384, 100_000])
def test_tiles_depend_on_the_row_alone(cols: int):
    """On a GPU the order of summation follows the tile; the interpreter sums each row by itself."""
    for longest in (layer_norm.LONGEST, layer_norm.LONGEST_IN_BACKWARD):
        assert len({rows.Rows(1, count, cols, 0, cols, 1).tile(longest) for count in (1, 2, 33, 10**6)}) == 1
        if cols > 1:
            assert len({rows.Rows(n, 49, cols, 49 * cols, 1, 49).tile(longest) for n in (1, 2, 33, 10**6)}) == 1


def test_blocks_depend_on_the_shape_alone_and_are_few():
    assert layer_norm.steps_of(1, 768) == 1
    assert layer_norm.steps_of(8192, 4096) == 32
    assert layer_norm.steps_of(2**31, 4096) == 64  # after as many additions in float32 a sum moves to float64


def test_every_operator_of_the_list_exists():
    for name in kernels.MODULES:
        assert name in REFERENCE
        assert callable(kernels.load(name))


@pytest.mark.parametrize(
    ("capability", "installed", "built", "words"),
    [
        ((9, 0), True, "13.0", "triton "),
        ((7, 5), True, "13.0", "reference (the GPU's compute capability must be 8.0 or more; it is 7.5)"),
        ((9, 0), False, "13.0", "reference (triton is not installed)"),
        ((9, 0), True, None, "reference (torch is built without CUDA)"),
    ],
)
def test_backends_say_what_runs_on_a_gpu(capability, installed, built, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "cuda", built)
    if not installed:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    kernels.missing.cache_clear()
    try:
        assert nw.backends()["cuda"].startswith(words)
    finally:
        monkeypatch.undo()
        kernels.missing.cache_clear()


def test_a_gpu_that_is_too_old_takes_the_reference(monkeypatch):
    monkeypatch.setattr(kernels, "unusable", lambda device: "too old")
    call = kernels.at_first_call("rms_norm", REFERENCE["rms_norm"])
    x = torch.randn(2, 3)
    assert torch.equal(call(x, [3], None, 1e-5, None), REFERENCE["rms_norm"](x, [3], None, 1e-5, None))


def test_triton_is_not_imported_before_it_is_called():
    code = "import sys, normwise; assert 'triton' not in sys.modules; print(normwise.backends()['cuda'])"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.skipif(GPU, reason="the interpreter is for machines without a GPU")
def test_the_contract_holds_in_the_interpreter():
    """Autograd, layouts, scales and bad values: the tests of the contract, of which it can do one in so many."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "interpreted", "-q", "-x", "--no-header", "-p", "no:cacheprovider",
         "--every", "15", "test_contract.py"],
        cwd=HERE, env={**os.environ, "NORMWISE_CPU": "reference", "OMP_NUM_THREADS": "1"}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]


def test_the_compiler_spills_nothing_and_loads_16_bytes_at_once():
    """For the GPUs of compute capability 8.0 and 9.0, which need not be here."""
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, HERE / "compiled.py", "80", "90"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    of_rows = {"_forward", "_forward_parts", "_backward", "_backward_parts"}
    of_channels = {"_moments_of_parts", "_normalize", "_gradients_of_parts", "_dx"}
    assert of_rows | of_channels <= {one["kernel"] for one in found}
    for one in found:
        assert one["stack"] <= (64 if one["case"] == "float64 channels" else 32), one
        packed = one["kernel"] in of_rows and one["case"].split()[1:2] != ["1"]
        if packed or (one["kernel"] in of_channels and one["case"].startswith(("planar 56", "between"))):
            assert one["load"] == 128, one
        alike = [
            other["sums"] for other in found if (other["case"], other["capability"]) == ("forward", one["capability"])
        ]
        if one["case"] in ("forward alone", "forward of a sum"):
            assert [one["sums"]] == alike  # the same order of summation


# What only a GPU can show


@ON_A_GPU
def test_another_number_of_rows_compiles_nothing_anew():
    def compiled() -> int:
        functions = layer_norm._forward, layer_norm._backward
        return sum(len(caches[0]) for function in functions for caches in function.device_caches.values())

    counts = []
    for count in (1, 2, 16, 1000, 4096):
        given = inputs((count, 768), 0.0, torch.bfloat16, torch.bfloat16)
        call("layer_norm", given)
        counts.append(compiled())
    assert len(set(counts)) == 1


@ON_A_GPU
def test_graphs_capture_the_kernels():
    given = inputs((64, 768), 1.0, torch.bfloat16, torch.float32)
    want = call("fused_add_layer_norm", given)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call("fused_add_layer_norm", given)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(got[key], want[key]) for key in want)


@ON_A_GPU
def test_every_result_has_the_same_bits_from_run_to_run():
    given = inputs((5000, 1024), 3.0, torch.bfloat16, torch.float32)
    one, two = (call("layer_norm", given) for _ in range(2))
    assert all(torch.equal(one[key], two[key]) for key in one)
