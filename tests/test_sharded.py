"""Layer Norm where processes share rows, tokens or DTensors: each result is that of one process with all of it."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import cases
import pytest
import torch
import torch.distributed as dist
from cases import Results
from processes import Processes
from torch import Tensor, nn

import normwise as nw

ON_KERNELS = not cases.EXACT_SUMS
SHARDED = {"layer_norm": nw.distributed.layer_norm, "rms_norm": nw.distributed.rms_norm}


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    pool = Processes(4)
    yield pool
    pool.close()


# Rows in pieces


def columns(group: dist.ProcessGroup, widths: list[int]) -> slice:
    """Those of this process."""
    ends = list(itertools.accumulate(widths))
    rank = dist.get_rank(group)
    return slice(ends[rank] - widths[rank], ends[rank])


def apply(name: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, **how: Any) -> Tensor:
    parameters = (weight, bias) if name == "layer_norm" else (weight,)
    return SHARDED[name](x, *parameters, cases.EPS, **how)


def on_columns(group: dist.ProcessGroup, name: str, widths: list[int], batches: list[tuple[Any, ...]]) -> list[Any]:
    """y, dx, dweight and dbias of this process's columns, for each of some (x, weight, bias, dy)."""
    mine, found = columns(group, widths), []
    for tensors in batches:
        x, weight, bias, dy = (None if t is None else t[..., mine] for t in tensors)
        leaves = [None if t is None else t.detach().requires_grad_() for t in (x, weight, bias)]
        y = apply(name, *leaves, process_group=group, layer=f"{name} of {x.dtype}")
        y.backward(dy)
        with torch.no_grad():
            again = apply(name, *leaves, process_group=group, layer="without a gradient")
            torch.testing.assert_close(again, y.detach(), rtol=0, atol=0, equal_nan=True)
        assert y.dtype == x.dtype
        found.append([y.detach(), *(None if t is None else t.grad for t in leaves)])
    return found


def whole(parts: list[list[Tensor | None]]) -> Results:
    """The outputs with the columns of all processes."""
    return Results(*(None if pieces[0] is None else torch.cat(pieces, -1) for pieces in zip(*parts, strict=True)))


def batch(
    name: str, shape: tuple[int, ...], ratio: float, dtype: torch.dtype, wide: bool = False
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    x, dy = cases.draw(shape, ratio, dtype)
    weight, bias = cases.BY_NAME[name].parameters(x, torch.float32 if wide else dtype)
    return x, weight, bias, dy


WIDTHS = [[33], [20, 13], [0, 33], [30, 0, 3], [1, 12, 0, 20], [300, 1, 700, 22]]


@pytest.mark.parametrize("name", SHARDED)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_columns_in_pieces_keep_the_contract(processes, name, widths):
    norm, size = cases.BY_NAME[name], sum(widths)
    batches = [batch(name, (5, size), ratio, torch.float32) for ratio in cases.RATIOS]
    batches += [batch(name, (2, 3, size), ratio, torch.float64) for ratio in (0.0, 1e4)]
    batches += [batch(name, (5, size), 3.0, dtype, w) for dtype in cases.A2_SUMS for w in (False, True)]
    batches += [batch(name, (size,), 3.0, torch.float32), batch(name, (0, 2, size), 0.0, torch.float32)]
    batches += [(x, None, None, dy) for x, _, _, dy in batches[:1]]
    results = processes.all(on_columns, name, widths, batches, ranks=len(widths))
    for (x, weight, bias, dy), parts in zip(batches, zip(*results, strict=True), strict=True):
        got, truth = whole(list(parts)), norm.truth(x, weight, bias, dy)
        if x.dtype == torch.float32:
            cases.assert_a1(got, truth)
        elif x.dtype == torch.float64:
            for output, bound in (("y", 1e-10), ("dx", 1e-10), ("dweight", cases.REFERENCE), ("dbias", 1e-12)):
                if getattr(got, output) is not None:
                    assert cases.error(getattr(got, output), getattr(truth, output)) <= bound, output
        else:
            for output, terms in (("y", truth.y_terms), ("dx", truth.dx_terms)):
                bound = cases.a2_elementwise(getattr(truth, output), terms, x.dtype)
                assert ((getattr(got, output).double() - getattr(truth, output)).abs() <= bound).all(), output
            limit = cases.A2_SUMS.get(weight.dtype, cases.A2_WIDE)
            assert cases.error(got.dweight, truth.dweight, truth.summands["dweight"]) <= limit


@pytest.mark.parametrize("name", SHARDED)
def test_other_numbers_of_rows_and_one_exchange_each_way(processes, name):
    """From batch to batch, with the messages counted."""
    batches = [batch(name, (rows, 9), 1e2, torch.float32) for rows in (3, 0, 17, 200, 1, 3)]
    results = processes.all(counted, name, [4, 5], batches, ranks=2)
    assert [messages for _, messages in results] == [2 * len(batches) + 1] * 2  # and once the settings
    for (x, weight, bias, dy), parts in zip(batches, zip(*(found for found, _ in results), strict=True), strict=True):
        cases.assert_a1(whole(list(parts)), cases.BY_NAME[name].truth(x, weight, bias, dy))


def counted(group: dist.ProcessGroup, name: str, widths: list[int], batches: list[Any]) -> tuple[Any, int]:
    from normwise.exchange import of_group

    exchange = of_group(str(group.group_name))
    send, sent = exchange._with_others, []
    exchange._with_others = lambda place, *args: (sent.append(place), send(place, *args))
    mine, found = columns(group, widths), []
    try:
        for tensors in batches:
            x, weight, bias, dy = (None if t is None else t[..., mine] for t in tensors)
            leaves = [None if t is None else t.detach().requires_grad_() for t in (x, weight, bias)]
            y = apply(name, *leaves, process_group=group, layer=f"counted {name}")
            y.backward(dy)
            found.append([y.detach(), *(None if t is None else t.grad for t in leaves)])
    finally:
        del exchange._with_others
    return found, len(sent)


def test_bits_of_a_row_depend_on_no_other_row_and_no_threads(processes):
    x, weight, bias, dy = batch("layer_norm", (40, 1500), 1e2, torch.float32)
    bits = processes.all(in_many_batches, x, weight, bias, dy, ranks=2)
    assert bits == [True, True]


def in_many_batches(group: dist.ProcessGroup, *tensors: Tensor) -> bool:
    x, weight, bias, dy = (t[..., columns(group, [1100, 400])] for t in tensors)
    found = []
    for rows, threads in ((slice(None), 1), (slice(7, 8), 1), (slice(7, 8), 2), (slice(5, 8), 2), (slice(None), 2)):
        torch.set_num_threads(threads)
        leaf = x[rows].clone().requires_grad_()
        y = nw.distributed.layer_norm(leaf, weight, bias, process_group=group)
        y.backward(dy[rows])
        found.append((y[7 - (rows.start or 0)], leaf.grad[7 - (rows.start or 0)]))
    torch.set_num_threads(1)
    return all(torch.equal(a, b) for other in found for a, b in zip(other, found[0], strict=True))


def test_values_that_are_not_finite_stay_in_their_row(processes):
    x, weight, bias, dy = batch("layer_norm", (4, 9), 0.0, torch.float32)
    spoilt = x.clone()
    spoilt[1, 0], spoilt[2, 8] = float("nan"), float("inf")
    results = processes.all(
        on_columns, "layer_norm", [4, 5], [(x, weight, bias, dy), (spoilt, weight, bias, dy)], ranks=2
    )
    clean, other = (whole(list(parts)) for parts in zip(*results, strict=True))
    for a, b in ((clean.y, other.y), (clean.dx, other.dx)):
        assert torch.equal(a[[0, 3]], b[[0, 3]])
        assert b[[1, 2]].isnan().all()


def only_parameters(group: dist.ProcessGroup, x: Tensor, dy: Tensor) -> list[Tensor]:
    """x needs no gradient: nothing is exchanged in backward, so that one process may leave it out."""
    mine = columns(group, [4, 5])
    weight, bias = torch.ones(9)[mine].requires_grad_(), torch.zeros(9)[mine].requires_grad_()
    y = nw.distributed.layer_norm(x[..., mine], weight, bias, process_group=group, layer="only parameters")
    if dist.get_rank(group) == 1:
        y.backward(dy[..., mine])
    return [weight.grad, bias.grad]


def test_gradients_of_parameters_alone(processes):
    x, dy = cases.draw((6, 9))
    truth = cases.BY_NAME["layer_norm"].truth(x, torch.ones(9), torch.zeros(9), dy)
    dweight, dbias = processes.all(only_parameters, x, dy, ranks=2)[1]
    torch.testing.assert_close(dweight, truth.dweight[4:].float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(dbias, truth.dbias[4:].float(), rtol=1e-6, atol=1e-6)


def compiled(group: dist.ProcessGroup, batches: list[Any]) -> list[Any]:
    torch._dynamo.reset()
    mine, found = columns(group, [4, 0, 5]), []

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return nw.distributed.layer_norm(x * 2, weight, bias, process_group=group, layer="compiled").tanh()

    whole_graph = torch.compile(function, backend="aot_eager", fullgraph=True)
    for tensors in batches:
        x, weight, bias, dy = (t[..., mine] for t in tensors)
        results = []
        for call in (function, whole_graph):
            leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
            y = call(*leaves)
            results.append([y.detach(), *torch.autograd.grad(y, leaves, dy)])
        found.append(results)
    return found


def test_it_compiles_whole(processes):
    batches = [batch("layer_norm", (rows, 9), 1e2, torch.float32) for rows in (6, 4, 11)]
    for steps in processes.all(compiled, batches, ranks=3):
        for eager, whole_graph in steps:
            assert all(torch.equal(a, b) for a, b in zip(eager, whole_graph, strict=True))


def checked(group: dist.ProcessGroup) -> bool:
    """Shapes, types and effects of the operators, by PyTorch's own check."""
    OPS, place = torch.ops.normwise, (str(group.group_name), "checked", "alike", "forward")
    torch.library.opcheck(OPS.gather_over_processes.default, (torch.randn(4, 3, dtype=torch.float64), *place))
    torch.library.opcheck(OPS.sum_over_processes.default, (torch.arange(5), *place))
    return True


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_opcheck(processes):
    assert all(processes.all(checked, ranks=2))


# Faults


def with_rows(group: dist.ProcessGroup, rows: list[int], eps: tuple[float, float] = (1e-5, 1e-5)) -> Tensor:
    rank = dist.get_rank(group)
    layer = "block 3" if eps[0] == eps[1] else "block 2"
    return nw.distributed.layer_norm(torch.ones(rows[rank], 4), eps=eps[rank], process_group=group, layer=layer)


def test_other_rows_are_refused_by_all_and_the_next_step_works(processes):
    processes.all(with_rows, [2, 2], ranks=2)
    for rank, error in enumerate(processes.run(with_rows, [3, 5], ranks=2)):
        assert isinstance(error, RuntimeError)
        assert f"forward 2 of block 3 with values ({[3, 5][rank]}, 3): all 2 processes" in str(error)
        assert "or has other sizes" in str(error)
    processes.all(with_rows, [7, 7], ranks=2)


def test_very_other_rows_are_refused_within_the_timeout():
    """Gloo would end the process where such messages meet, so that they wait for their like elsewhere."""
    pool = Processes(2, timeout=2)
    pool.all(with_rows, [2, 2])
    for rank, error in enumerate(pool.run(with_rows, [3, 500])):
        assert isinstance(error, RuntimeError)
        assert f"forward 2 of block 3 with values ({[3, 500][rank]}, 3): all 2 processes" in str(error)
    pool.close()


def test_other_settings_are_refused(processes):
    for error in processes.run(with_rows, [2, 2], (1e-5, 1e-3), ranks=2):
        assert isinstance(error, ValueError)
        assert (
            "rank 0 at block 2: layer_norm, float32, eps 1e-05; rank 1 at block 2: layer_norm, float32, eps 0.001"
            in str(error)
        )


def second_derivative(group: dist.ProcessGroup) -> None:
    x = torch.randn(2, 3, requires_grad=True)
    y = nw.distributed.rms_norm(x, process_group=group, layer="block 4")
    torch.autograd.grad(y, x, torch.randn(2, 3), create_graph=True)


def transform(group: dist.ProcessGroup) -> None:
    torch.vmap(lambda x: nw.distributed.layer_norm(x, process_group=group))(torch.randn(2, 3))


def test_what_does_not_cross_processes(processes):
    for error in processes.run(second_derivative, ranks=2):
        assert "block 4: a second derivative across processes is not there" in str(error)
    for error in processes.run(transform, ranks=2):
        assert "no transform of torch.func crosses processes" in str(error)


def test_wrong_arguments_are_refused_before_anything_is_sent():
    with pytest.raises(RuntimeError, match=r"block 1 needs a process group.*torchrun.*functional.rms_norm"):
        nw.distributed.rms_norm(torch.randn(2, 3), layer="block 1")
    with pytest.raises(ValueError, match=r"^distributed.layer_norm: weight must have shape"):
        nw.distributed.layer_norm(torch.randn(2, 3), torch.ones(4))
    with pytest.raises(ValueError, match="eps must be 0 or more"):
        nw.distributed.layer_norm(torch.randn(2, 3), eps=-1.0)
    with pytest.raises(TypeError, match="must be floating point"):
        nw.distributed.rms_norm(torch.ones(2, 3, dtype=torch.int64))


# Tokens on many processes


class Block(nn.Module):
    """A norm that is called twice, one of another kind, one that is frozen, and a layer that is no norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.linear, self.second = nw.nn.LayerNorm(6), nn.Linear(6, 6), nn.RMSNorm(6)
        self.frozen = nn.LayerNorm(6).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(self.second(self.frozen(self.linear(self.first(x)))))


NORM_PARAMETERS = ["first.weight", "first.bias", "second.weight"]


def on_tokens(group: dist.ProcessGroup, model: nn.Module, x: Tensor, dy: Tensor, removed: bool) -> dict[str, Tensor]:
    """Gradients after two micro-batches over this process's tokens."""
    handle = nw.distributed.sequence_parallel(model, group)
    if removed:
        handle.remove()
    mine = slice(dist.get_rank(group), None, dist.get_world_size(group))
    for some_x, some_dy in zip(x.chunk(2), dy.chunk(2), strict=True):
        model(some_x[:, mine]).backward(some_dy[:, mine])
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("removed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_gradients_of_norms_are_of_all_tokens(processes, dtype, removed):
    torch.manual_seed(0)
    model = Block().to(dtype)
    x, dy = cases.draw((4, 7, 6), dtype=dtype)
    results = processes.all(on_tokens, model, x, dy, removed, ranks=3)
    one = copy.deepcopy(model)
    one(x).backward(dy)
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 5e-2, "atol": 0.3}
    for name, p in one.named_parameters():
        gradients = [of[name] for of in results] if p.grad is not None else []
        if gradients and name in NORM_PARAMETERS and not removed:
            assert all(torch.equal(gradients[0], gradient) for gradient in gradients)
            torch.testing.assert_close(gradients[0], p.grad, **tolerance)
        elif gradients:
            torch.testing.assert_close(sum(gradients), p.grad, **tolerance)


def left_out(group: dist.ProcessGroup) -> None:
    model = nn.ModuleDict({"a": nn.LayerNorm(3), "b": nn.LayerNorm(3, bias=False)})
    nw.distributed.sequence_parallel(model, group)
    x, dy = torch.randn(2, 2, 3)
    for name in ("a", "b", "b" if dist.get_rank(group) else "a"):  # agreed on at the first step of each
        model[name](x).backward(dy)


def test_another_parameter_is_named(processes):
    errors = processes.run(left_out, ranks=2)
    assert all(isinstance(error, RuntimeError) for error in errors)
    assert "backward 2 of sequence_parallel" in str(errors[1])
    assert "(b.weight) with values (3,)" in str(errors[1])


def test_a_module_without_norms_or_with_summed_gradients_is_refused():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="must hold a LayerNorm or RMSNorm with parameters to train; Linear holds"):
            nw.distributed.sequence_parallel(nn.Linear(2, 2))
        with pytest.raises(ValueError, match="before anything is frozen"):
            nw.distributed.sequence_parallel(nn.LayerNorm(2).requires_grad_(False))
        handle = nw.distributed.sequence_parallel(norm := nn.LayerNorm(2))
        with pytest.raises(ValueError, match="must be summed once; that of weight"):
            nw.distributed.sequence_parallel(norm)
        handle.remove()
        nw.distributed.sequence_parallel(norm)
    finally:
        dist.destroy_process_group()


# DTensor

LAYERS = {
    "LayerNorm": (lambda: nw.nn.LayerNorm(6), (7, 5, 6), 2),
    "LayerNorm of two axes": (lambda: nw.nn.LayerNorm((5, 6)), (7, 5, 6), 1),
    "without bias": (lambda: nw.nn.LayerNorm(6, bias=False), (7, 5, 6), 2),
    "without parameters": (lambda: nw.nn.LayerNorm(6, elementwise_affine=False), (7, 5, 6), 2),
    "RMSNorm": (lambda: nw.nn.RMSNorm(6), (7, 5, 6), 2),
    "GroupNorm": (lambda: nw.nn.GroupNorm(2, 6), (7, 6, 5), 1),
    "InstanceNorm1d": (lambda: nw.nn.InstanceNorm1d(6, affine=True), (7, 6, 5), 1),
    "LayerNorm2d": (lambda: nw.nn.LayerNorm2d(6), (7, 6, 5, 4), 1),
}
"""How to make a layer, a shape for it, and how many of its axes are rows."""


def as_dtensors(group: dist.ProcessGroup, names: list[str], sizes: tuple[int, ...]) -> list[Any]:
    """On each row axis: whether placements are as they should be, communication, and outputs beside plain ones."""
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
    from torch.distributed.tensor import Partial, Replicate, Shard, distribute_module, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    nw.distributed.register_dtensor()
    mesh = DeviceMesh.from_group(group, "cpu") if sizes == (2,) else init_device_mesh("cpu", sizes)
    found = []
    for name in names:
        make, shape, axes = LAYERS[name]
        for placements in itertools.product([Replicate(), *map(Shard, range(axes))], repeat=len(sizes)):
            torch.manual_seed(0)
            plain = make().requires_grad_()
            layer = distribute_module(copy.deepcopy(plain), mesh)
            x, dy = cases.draw(shape, 3.0)
            leaf, other = distribute_tensor(x, mesh, placements).requires_grad_(), x.clone().requires_grad_()
            cotangent = distribute_tensor(dy, mesh, placements)
            with CommDebugMode() as communication:
                y = layer(leaf)
                y.backward(cotangent)
                sent = communication.get_total_counts()
            plain(other).backward(dy)
            sums = tuple(Partial() if p.is_shard() else p for p in placements)
            alike = y.placements == leaf.grad.placements == placements
            alike &= all(p.grad.placements == sums for p in layer.parameters())
            pairs = [(y, plain(x)), (leaf.grad, other.grad)]
            pairs += [(p.grad, q.grad) for p, q in zip(layer.parameters(), plain.parameters(), strict=True)]
            found.append((alike, sent, [(got.full_tensor().detach(), want.detach()) for got, want in pairs]))
    return found


@pytest.mark.parametrize("sizes", [(2,), (2, 2)], ids=str)
def test_dtensors_sharded_over_rows_stay_where_they_are(processes, sizes):
    names = list(LAYERS) if sizes == (2,) else ["LayerNorm", "GroupNorm"]
    for results in processes.all(as_dtensors, names, sizes, ranks=2 * len(sizes)):
        assert len(results) >= len(names)
        for alike, sent, pairs in results:
            assert alike
            assert sent == 0
            for got, want in pairs[:2]:
                assert torch.equal(got, want) or not ON_KERNELS
                torch.testing.assert_close(got, want)
            for got, want in pairs[2:]:
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def in_training(group: dist.ProcessGroup, x: Tensor, dy: Tensor) -> Tensor:
    """The weight after steps with a frozen, then a trained weight, and a cotangent that lies otherwise than x."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor

    nw.distributed.register_dtensor()
    mesh = DeviceMesh.from_group(group, "cpu")
    layer = distribute_module(nw.nn.LayerNorm(6), mesh)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    for step in range(3):
        layer.weight.requires_grad_(step > 0)
        optimizer.zero_grad()
        y = layer(distribute_tensor(x + step, mesh, [Shard(1)]))
        y.backward(distribute_tensor(dy, mesh, [Replicate() if step == 1 else Shard(1)]))
        optimizer.step()
    return layer.weight.full_tensor().detach()


def test_dtensors_in_training(processes):
    x, dy = cases.draw((3, 5, 6))
    plain = nw.nn.LayerNorm(6)
    for step in (1, 2):
        plain.zero_grad()
        plain(x + step).backward(dy)
        with torch.no_grad():
            plain.weight -= 0.1 * plain.weight.grad
    for weight in processes.all(in_training, x, dy, ranks=2):
        torch.testing.assert_close(weight, plain.weight.detach())


def refused(group: dist.ProcessGroup) -> list[str]:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Shard, distribute_module, distribute_tensor

    nw.distributed.register_dtensor()
    mesh = DeviceMesh.from_group(group, "cpu")

    def on(axis: int) -> Tensor:
        return distribute_tensor(torch.randn(1, 4, 6), mesh, [Shard(axis)])

    nw.functional.layer_norm(on(1), (6,))  # what is refused below is not taken for this
    calls = [
        lambda: nw.functional.layer_norm(on(2), (6,)),
        lambda: nw.functional.layer_norm(on(1), (4, 6)),
        lambda: nw.functional.rms_norm(on(2).requires_grad_(), (6,)),
        lambda: nw.functional.group_norm(on(1), 2),
        lambda: nw.functional.layer_norm(on(0), (6,)),
        lambda: nw.functional.batch_norm(on(0), None, None, training=True),
        lambda: distribute_module(nw.nn.BatchNorm1d(4), mesh).eval()(on(2)),
    ]
    found = []
    for call in calls:
        with pytest.raises(NotImplementedError) as caught:
            call()
        found.append(str(caught.value))
    return found


def test_dtensors_are_never_gathered_in_silence(processes):
    features = "values that share statistics must be on one process; x (1, 4, 6) is sharded over axis"
    words = [f"layer_norm: {features} 2", f"layer_norm: {features} 1", f"rms_norm: {features} 2"]
    words += [f"group_norm: {features} 1", "x (1, 4, 6) is sharded over axis 0 on 2 processes", "SyncBatchNorm"]
    for messages in processes.all(refused, ranks=2):
        for word, message in zip([*words, "SyncBatchNorm"], messages, strict=True):
            assert word in message
