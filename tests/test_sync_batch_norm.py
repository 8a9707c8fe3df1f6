"""SyncBatchNorm on real processes: each result is that of one process with the joined batch."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import cases
import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from processes import MORE, Processes
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import normwise as nw
from normwise import exchange
from normwise.nn.batch_norm import labelled

ON_KERNELS = not nw.backends()["cpu"].startswith("reference")
STEPS = 2
PLAIN = {2: nw.nn.BatchNorm1d, 3: nw.nn.BatchNorm1d, 4: nw.nn.BatchNorm2d, 5: nw.nn.BatchNorm3d}


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    pool = Processes(max(4, *MORE, 0))
    yield pool
    pool.close()


def layout(x: Tensor, last: bool) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if last else x


def layer_of(kind: type[nn.Module], channels: int, dtype: torch.dtype, **keywords: Any) -> nn.Module:
    layer = kind(channels, **keywords)
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(0.5, 1.5, channels))
        layer.bias.copy_(torch.linspace(-1, 1, channels))
    return layer.to(torch.float32 if dtype.itemsize == 2 else dtype)


def trained(layer: nn.Module, x: Tensor, dy: Tensor, mask: Tensor | None, last: bool, recompute: bool = False) -> Any:
    """y and dx of some steps, then running statistics and the parameters' gradients."""
    found = []
    for step in range(STEPS):
        leaf = layout(x * (step + 1), last).detach().requires_grad_()
        y = checkpoint(layer, leaf, mask, use_reentrant=False) if recompute else layer(leaf, mask)
        y.backward(dy)
        found += [y.detach(), leaf.grad]
    return (
        found,
        [layer.running_mean, layer.running_var, layer.num_batches_tracked],
        [layer.weight.grad, layer.bias.grad],
    )


def on_a_shard(
    group: dist.ProcessGroup,
    x: Tensor,
    dy: Tensor,
    mask: Tensor | None,
    shards: list[Tensor],
    last: bool,
    how: dict[str, Any],
) -> Any:
    mine = shards[dist.get_rank(group)]
    layer = layer_of(
        nw.nn.SyncBatchNorm, x.shape[1], x.dtype, process_group=group, reproducible=how.get("reproducible")
    )
    recompute = how.get("recompute", False)
    with nw.distributed.parameter_gradients(layer) as gradients:
        outputs, running, local = trained(
            layer, x[mine], dy[mine], None if mask is None else mask[mine], last, recompute
        )
    return outputs, running, local, [gradients["weight"], gradients["bias"]]


def joined(results: list[Any], shards: list[Tensor]) -> list[Tensor]:
    """The shards' outputs in the order of the whole batch."""
    back = torch.argsort(torch.cat(shards))
    return [torch.cat(parts)[back] for parts in zip(*(outputs for outputs, *_ in results), strict=True)]


def split(examples: int, world: int, seed: int) -> list[Tensor]:
    """A random permutation in shards of random sizes, empty ones too."""
    generator = torch.Generator().manual_seed(seed)
    cuts = torch.randint(0, examples + 1, (world - 1,), generator=generator).sort().values.tolist()
    order = torch.randperm(examples, generator=generator)
    return [order[a:b] for a, b in zip([0, *cuts], [*cuts, examples], strict=True)]


@pytest.mark.parametrize("world", [1, 2, 3, 4, *MORE])
@pytest.mark.parametrize(
    ("shape", "dtype", "last", "masked"),
    [
        ((11, 5, 4, 5), torch.float32, False, False),
        ((11, 5, 4, 5), torch.float32, True, True),
        ((11, 5, 4, 5), torch.bfloat16, True, False),
        ((11, 5, 4, 5), torch.float64, False, True),
        ((12, 3, 300), torch.float16, False, False),
        ((6, 3, 2, 3, 4), torch.float32, False, False),
        ((30, 7), torch.float32, False, False),
    ],
    ids=str,
)
def test_shards_are_as_one_batch(processes, shape, dtype, last, masked, world):
    x, dy = (t.to(dtype) for t in cases.draw(shape, 3.0))
    mask = torch.rand(shape[0], *shape[2:]) < 0.7 if masked else None
    shards = split(shape[0], world, seed=world)
    results = processes.all(on_a_shard, x, dy, mask, shards, last, {"reproducible": True}, ranks=world)
    single = layer_of(PLAIN[len(shape)], shape[1], dtype)
    outputs, running, gradients = trained(single, x, dy, mask, last)
    exact = ON_KERNELS and len(shape) > 2  # there plain Batch Norm is reproducible too
    tolerance = {"rtol": 0.0, "atol": 0.0} if exact else {"rtol": 2e-2 if dtype.itemsize == 2 else 1e-5, "atol": 1e-5}
    for got, want in zip(joined(results, shards), outputs, strict=True):
        torch.testing.assert_close(got, want, **tolerance)
    for _, buffers, _, of_all in results:
        for got, want in zip(buffers, running, strict=True):
            torch.testing.assert_close(got, want, **tolerance)
        assert all(torch.equal(a, b) for a, b in zip(of_all, results[0][3], strict=True))
    for part, want in enumerate(gradients):
        torch.testing.assert_close(sum(local[part] for _, _, local, _ in results), want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(results[0][3][part], want, rtol=1e-5, atol=1e-5)


def many_splits(group: dist.ProcessGroup, x: Tensor, dy: Tensor, steps: int, seeds: list[int]) -> Any:
    """y and dx of all steps, the running statistics and global gradients, for a split a seed."""
    found = []
    for seed in seeds:
        mine = split(len(x), dist.get_world_size(group), seed)[dist.get_rank(group)]
        layer = layer_of(nw.nn.SyncBatchNorm, x.shape[1], x.dtype, process_group=group, reproducible=True)
        with nw.distributed.parameter_gradients(layer) as gradients:
            for step in range(steps):
                leaf = (x[mine] + step).requires_grad_()
                y = layer(leaf)
                y.backward(dy[mine])
        found.append((mine, y.detach(), leaf.grad, layer.running_mean, layer.running_var, *gradients.values()))
    return found


@pytest.mark.skipif(not ON_KERNELS, reason="the reference's one process does not sum exactly")
@settings(max_examples=30 if MORE else 6, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    world=st.sampled_from([1, 2, 3, 4, *MORE]),
    shape=st.sampled_from([(13, 4, 4, 4), (24, 3, 33), (37, 6)]),
    ratio=st.sampled_from([0.0, 1e2, 1e5]),
    seeds=st.lists(st.integers(0, 2**31), min_size=3, max_size=3),
)
def test_no_bit_depends_on_the_split(processes, world, shape, ratio, seeds):
    """R3: y, dx, running statistics over 20 batches, and the gradients of all processes."""
    x, dy = cases.draw(shape, ratio)
    x[::3] *= 7
    one = processes.all(many_splits, x, dy, 20, [0], ranks=1)[0][0]
    results = processes.all(many_splits, x, dy, 20, seeds, ranks=world)
    inverse = torch.argsort(one[0])
    for run in zip(*results, strict=True):
        back = torch.argsort(torch.cat([part[0] for part in run]))
        for k in (1, 2):
            assert torch.equal(torch.cat([part[k] for part in run])[back], one[k][inverse])
        for part in run:
            assert all(torch.equal(a, b) for a, b in zip(part[3:], one[3:], strict=True))


def test_recomputed_forwards_count_once(processes):
    x, dy = cases.draw((8, 3, 4, 4))
    shards = split(8, 2, 5)
    plain, again = (
        processes.all(on_a_shard, x, dy, None, shards, False, {"recompute": recompute}, ranks=2)
        for recompute in (False, True)
    )
    for a, b in zip(plain, again, strict=True):
        assert all(torch.equal(p, q) for k in range(3) for p, q in zip(a[k], b[k], strict=True))


def in_eval(group: dist.ProcessGroup, x: Tensor) -> Any:
    layer = layer_of(nw.nn.SyncBatchNorm, x.shape[1], x.dtype, process_group=group).eval()
    return layer(x).detach() if dist.get_rank(group) == 0 else None  # no exchange: the other need not come


def test_eval_exchanges_nothing(processes):
    x, _ = cases.draw((4, 3, 5))
    single = layer_of(nw.nn.BatchNorm1d, 3, x.dtype).eval()
    assert torch.equal(processes.all(in_eval, x, ranks=2)[0], single(x))


class Net(nn.Module):
    """Two norms; the second branch is used by even steps alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bn, self.head = nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.Linear(6, 3)
        self.other = nn.Conv2d(6, 6, 1)

    def forward(self, x: Tensor, branch: bool) -> Tensor:
        y = torch.relu(self.bn(self.first(x)))
        return self.head((self.other(y) if branch else y).mean((2, 3)))


def in_data_parallel(group: dist.ProcessGroup, model: nn.Module, x: Tensor, target: Tensor) -> Any:
    model = nw.nn.SyncBatchNorm.convert(copy.deepcopy(model), group)  # sent tensors share memory
    model = DistributedDataParallel(model, process_group=group, find_unused_parameters=True)
    mine = slice(dist.get_rank(group), None, dist.get_world_size(group))
    for step in range(3):
        model.zero_grad()
        nn.functional.cross_entropy(model(x[mine], step % 2 == 0), target[mine]).backward()
    return {name: p.grad for name, p in model.module.named_parameters()}, dict(model.module.named_buffers())


def test_data_parallel_training(processes):
    torch.manual_seed(0)
    model, x, target = Net().double(), torch.randn(12, 2, 8, 8, dtype=torch.float64), torch.randint(3, (12,))
    results = processes.all(in_data_parallel, model, x, target, ranks=3)
    single = nw.nn.replace(copy.deepcopy(model))
    for step in range(3):
        single.zero_grad()
        nn.functional.cross_entropy(single(x, step % 2 == 0), target).backward()
    for gradients, buffers in results:
        for name, p in single.named_parameters():
            want = torch.zeros_like(p) if p.grad is None else p.grad
            torch.testing.assert_close(gradients[name], want, rtol=1e-10, atol=1e-12)
        for name, b in single.named_buffers():
            torch.testing.assert_close(buffers[name], b, rtol=1e-10, atol=1e-12)


def in_sharded_data_parallel(group: dist.ProcessGroup, model: nn.Module, x: Tensor, target: Tensor) -> Any:
    model = nw.nn.SyncBatchNorm.convert(copy.deepcopy(model))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model, mesh=mesh)
    mine = slice(dist.get_rank(), None, dist.get_world_size())
    loss = nn.functional.cross_entropy(model(x[mine], True), target[mine], reduction="sum")
    (loss * dist.get_world_size() / len(x)).backward()  # shards may be of different size
    return {name: p.grad.full_tensor() for name, p in model.named_parameters()}


def test_sharded_data_parallel_training(processes):
    torch.manual_seed(0)
    model, x, target = Net().double(), torch.randn(12, 2, 8, 8, dtype=torch.float64), torch.randint(3, (12,))
    single = nw.nn.replace(copy.deepcopy(model))
    nn.functional.cross_entropy(single(x, True), target).backward()
    for gradients in processes.all(in_sharded_data_parallel, model, x, target):
        for name, p in single.named_parameters():
            torch.testing.assert_close(gradients[name], p.grad, rtol=1e-10, atol=1e-12)


def compiled(group: dist.ProcessGroup, x: Tensor, dy: Tensor) -> Any:
    found = []
    for compile_ in (False, True):
        torch._dynamo.reset()
        layer = layer_of(nw.nn.SyncBatchNorm, x.shape[1], x.dtype, process_group=group)
        call = torch.compile(layer, fullgraph=True) if compile_ else layer
        mine = slice(dist.get_rank(group), None, dist.get_world_size(group))
        for _ in range(2):
            leaf = x[mine].clone().requires_grad_()
            y = call(leaf)
            y.backward(dy[mine])
        found.append([y.detach(), leaf.grad, layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var])
    return found


def test_it_compiles_whole(processes):
    x, dy = cases.draw((6, 3, 4, 5))
    for eager, whole in processes.all(compiled, x, dy, ranks=2):
        assert all(torch.equal(a, b) for a, b in zip(eager, whole, strict=True))


def with_a_bad_gradient(group: dist.ProcessGroup, x: Tensor, dy: Tensor) -> Any:
    mine = slice(dist.get_rank(group), None, dist.get_world_size(group))
    layer, leaf = layer_of(nw.nn.SyncBatchNorm, x.shape[1], x.dtype, process_group=group), x[mine].requires_grad_()
    with nw.distributed.parameter_gradients(layer) as gradients:
        layer(leaf).backward(dy[mine])
    return leaf.grad, gradients["weight"], gradients["bias"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_gradient_spoils_its_channel_on_all_processes_and_no_other(processes, bad):
    x, dy = cases.draw((6, 3, 4, 5))
    clean = processes.all(with_a_bad_gradient, x, dy, ranks=2)
    dy[0, 1, 2, 3] = bad
    for before, after in zip(clean, processes.all(with_a_bad_gradient, x, dy, ranks=2), strict=True):
        assert not after[0][:, 1].isfinite().any()
        assert not after[1][1].isfinite()
        assert not after[2][1].isfinite()
        for one, other in (
            (before[0].transpose(0, 1), after[0].transpose(0, 1)),
            *zip(before[1:], after[1:], strict=True),
        ):
            assert torch.equal(one[[0, 2]], other[[0, 2]])


def of_two_lengths(group: dist.ProcessGroup) -> Tensor:
    layer = nw.nn.SyncBatchNorm(4, process_group=group)
    for positions in (20, 15 + dist.get_rank(group)):  # 15 are not summed exactly by default, 16 are
        y = layer(torch.randn(3, 4, positions))
    return y.isfinite().all()


def test_processes_may_have_different_lengths(processes):
    assert all(processes.all(of_two_lengths, ranks=2))


def anew(group: dist.ProcessGroup) -> Tensor:
    """The store knows where the first exchange listened, as after a group was destroyed and made anew."""
    for _ in range(2):
        y = nw.nn.SyncBatchNorm(4, process_group=group)(torch.randn(3, 4))
        exchange.group._exchanges.clear()
    return y.isfinite().all()


def test_a_store_may_outlive_its_group(processes):
    assert all(processes.all(anew, ranks=2))


def one_value(group: dist.ProcessGroup) -> Any:
    layer = nw.nn.SyncBatchNorm(3, process_group=group)
    return layer(torch.randn(1 if dist.get_rank(group) == 0 else 0, 3))


def test_one_value_over_all_processes_is_refused_by_all(processes):
    for error in processes.run(one_value, ranks=2):
        assert isinstance(error, ValueError)
        assert "1 value per channel over all processes" in str(error)


def test_training_without_a_process_group_is_refused():
    layer = nw.nn.SyncBatchNorm(3)
    with pytest.raises(RuntimeError, match=r"training needs a process group.*torchrun.*allow_local=True"):
        layer(torch.randn(4, 3))
    assert layer.num_batches_tracked == 0
    local, plain = nw.nn.SyncBatchNorm(3, allow_local=True), nw.nn.BatchNorm1d(3)
    x = torch.randn(4, 3)
    assert torch.equal(local(x), plain(x))
    assert torch.equal(local.running_var, plain.running_var)


def copies(group: dist.ProcessGroup) -> Any:
    layer = nw.nn.SyncBatchNorm(3, process_group=group)
    layers = [layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(nw.nn.SyncBatchNorm(3)))]
    layers[2].process_group = group
    never = labelled(layer)
    for one in layers:
        one(torch.randn(4, 3))
    return never, [labelled(one) for one in layers]


def test_every_copy_is_a_layer_of_its_own(processes):
    for never, names in processes.all(copies, ranks=2):
        assert never is None
        assert len(set(names)) == 3


# convert


class Fused(nn.BatchNorm2d):
    """A subclass with an activation of its own."""


def test_convert_changes_the_class_and_nothing_else():
    model = nn.ModuleDict(
        {"a": nn.BatchNorm1d(4), "b": nn.Sequential(nw.nn.BatchNorm2d(4).eval(), nn.SyncBatchNorm(4))}
    )
    model["a"].bfloat16().requires_grad_(False)
    model["c"] = model["a"]
    calls: list[str] = []
    model["a"].register_forward_hook(lambda *_: calls.append("hook"))
    before = {name: id(t) for name, t in [*model.named_parameters(), *model.named_buffers()]}
    modules = {name: (id(m), m.training) for name, m in model.named_modules()}
    assert nw.nn.SyncBatchNorm.convert(model) is model
    assert {name: id(t) for name, t in [*model.named_parameters(), *model.named_buffers()]} == before
    assert {name: (id(m), m.training) for name, m in model.named_modules()} == modules
    assert [type(m) for m in (model["a"], *model["b"])] == [nw.nn.SyncBatchNorm] * 3
    assert model["c"] is model["a"]
    model.eval()["a"](torch.zeros(2, 4, dtype=torch.bfloat16))
    assert calls == ["hook"]


def test_convert_keeps_what_a_synchronized_layer_has():
    model = nn.Sequential(nw.nn.SyncBatchNorm(3, reproducible=True, allow_local=True))
    model[0].process_group = group = object()
    nw.nn.SyncBatchNorm.convert(model)
    assert (model[0].process_group, model[0].reproducible, model[0].allow_local) == (group, True, True)


def test_convert_refuses_what_would_lose_behaviour_and_changes_nothing():
    model = nn.Sequential(nn.BatchNorm2d(3), Fused(3), nn.LazyBatchNorm2d(), nn.BatchNorm2d(3))
    model[3].forward = lambda x: x
    with pytest.raises(ValueError, match="3 would not") as caught:
        nw.nn.SyncBatchNorm.convert(model)
    assert "  1: Fused is a subclass" in str(caught.value)
    assert "  2: LazyBatchNorm2d is not initialized" in str(caught.value)
    assert "  3: its forward is patched" in str(caught.value)
    assert type(model[0]) is nn.BatchNorm2d


def test_a_copy_has_its_settings_and_state():
    layer = nw.nn.SyncBatchNorm(3, allow_local=True)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.allow_local
        assert torch.equal(other.weight, layer.weight)
    assert layer.state_dict().keys() == nn.SyncBatchNorm(3).state_dict().keys()
