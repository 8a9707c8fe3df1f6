"""Helpers on models, on real processes: whether replicas agree, merged running statistics, and what the norms cost."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import Processes
from torch import Tensor, nn

import normwise as nw
from normwise.distributed import check_replicas, profile, synchronize_running_stats
from normwise.exchange.group import HEADER


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    pool = Processes(3)
    yield pool
    pool.close()


# check_replicas


class Own(nn.LayerNorm):
    """A subclass."""


def replica() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nw.nn.SyncBatchNorm(4),
        nn.GroupNorm(2, 4),
        nw.nn.InstanceNorm2d(4, affine=True),
        nn.RMSNorm(5),
        nn.Sequential(Own(5), nw.nn.LayerNorm2d(4)),
    )


def payload(t: Tensor, bits: int) -> None:
    t.view(torch.int32)[0] = bits


CHANGES: dict[str, Callable[[nn.Sequential, int], Any]] = {
    "nothing": lambda model, rank: None,
    "no norm": lambda model, rank: model[0].weight.data.fill_(rank),
    "weight": lambda model, rank: model[6][0].weight.data[2].nextafter_(torch.tensor(2.0)),
    "running_var": lambda model, rank: model[1].running_var[3].mul_(2),
    "num_batches_tracked": lambda model, rank: model[2].num_batches_tracked.add_(1),
    "nan": lambda model, rank: payload(model[3].bias.data, 0x7FC00000),
    "other nan": lambda model, rank: payload(model[3].bias.data, 0x7FC00001 + rank),
    "zero": lambda model, rank: model[4].bias.data[0].neg_(),
    "dtype": lambda model, rank: model[5].double(),
    "dtype of zeros": lambda model, rank: setattr(
        model[3], "bias", nn.Parameter(torch.zeros(4, dtype=torch.bfloat16 if rank == 1 else torch.float16))
    ),
    "shape": lambda model, rank: setattr(model[5], "weight", nn.Parameter(torch.ones(1, 5))),
}


def differences(group: dist.ProcessGroup, change: str, ranks: list[int]) -> dict[str, str]:
    model = replica()
    if dist.get_rank(group) in ranks:
        CHANGES[change](model, dist.get_rank(group))
    return check_replicas(model, group)


ONE_OTHER = "ranks 0, 2 hold one value, rank 1 another"
OTHER_KIND = "ranks 0, 2 hold one type or shape, rank 1 another"


@pytest.mark.parametrize(
    ("change", "ranks", "expected"),
    [
        ("nothing", [], {}),
        ("no norm", [0, 1], {}),
        ("running_var", [0, 1, 2], {}),
        ("running_var", [1], {"1.running_var": ONE_OTHER}),
        ("num_batches_tracked", [0, 2], {"2.num_batches_tracked": ONE_OTHER}),
        ("nan", [0, 1, 2], {}),
        ("nan", [2], {"3.bias": "ranks 0, 1 hold one value, rank 2 another"}),
        ("other nan", [0, 1, 2], {"3.bias": "rank 0 holds one value, rank 1 another, rank 2 another"}),
        ("zero", [1], {"4.bias": ONE_OTHER}),
        ("dtype", [1], {"5.weight": OTHER_KIND}),
        ("dtype of zeros", [0, 1, 2], {"3.bias": OTHER_KIND}),
        ("shape", [1], {"5.weight": OTHER_KIND}),
        ("weight", [1, 2], {"6.0.weight": "rank 0 holds one value, ranks 1, 2 another"}),
    ],
    ids=str,
)
def test_a_tensor_that_differs_is_named_with_its_ranks(processes, change, ranks, expected):
    assert processes.all(differences, change, ranks, ranks=3) == [expected] * 3


def test_one_process_agrees_with_itself(processes):
    assert processes.all(differences, "weight", [0], ranks=1) == [{}]
    assert check_replicas(replica()) == {}
    assert check_replicas(nn.Linear(2, 2)) == {}


def other_structure(group: dist.ProcessGroup, index: int, other: nn.Module) -> dict[str, str]:
    model = replica()
    if dist.get_rank(group) == 1:
        model[index] = other
    return check_replicas(model, group)


@pytest.mark.parametrize(
    ("index", "other", "words"),
    [
        (5, nn.Identity(), "ranks 0, 2 besides: 5.weight; rank 1 besides: nothing"),
        (3, nn.GroupNorm(2, 4, affine=False), "ranks 0, 2 besides: 3.bias, 3.weight; rank 1 besides: nothing"),
        (0, nn.LayerNorm(4, bias=False), "ranks 0, 2 besides: nothing; rank 1 besides: 0.weight"),
    ],
    ids=["left out", "not affine", "one more"],
)
def test_another_structure_is_refused_by_all(processes, index, other, words):
    errors = processes.run(other_structure, index, other, ranks=3)
    assert len({str(error) for error in errors}) == 1
    assert all(isinstance(error, ValueError) for error in errors)
    assert "check_replicas: all processes must have the same norms" in str(errors[0])
    assert words in str(errors[0])
    assert processes.all(differences, "nothing", [], ranks=3) == [{}] * 3  # nobody is left waiting


def test_many_ranks_are_told_in_few_words():
    from normwise.distributed.replicas import _who_holds_what

    ranks = list(range(1024))
    one_other = _who_holds_what("value", [int(r == 7) for r in ranks], ranks)
    assert one_other == "ranks 0-6, 8-1023 hold one value, rank 7 another"
    assert _who_holds_what("value", ranks, ranks).endswith("rank 3 another, the others 1020 more")
    assert len(_who_holds_what("value", [r % 2 for r in ranks], ranks)) < 120


# synchronize_running_stats


def filled(stats: dict[str, tuple[Tensor, Tensor, int]]) -> nn.Module:
    model = nn.ModuleDict({name: nn.BatchNorm1d(len(mean), dtype=mean.dtype) for name, (mean, _, _) in stats.items()})
    for name, (mean, var, batches) in stats.items():
        model[name].running_mean.copy_(mean)
        model[name].running_var.copy_(var)
        model[name].num_batches_tracked.fill_(batches)
    return model


def merged(group: dist.ProcessGroup, stats: list[Any], counts: list[Any] | None, times: int = 1) -> dict[str, Tensor]:
    rank = dist.get_rank(group)
    model = filled(stats[rank])
    for _ in range(times):
        synchronize_running_stats(model, group, None if counts is None else counts[rank])
    assert check_replicas(model, group) == {}
    return dict(model.named_buffers())


def closed_form(means: list[Tensor], variances: list[Tensor], counts: list[int]) -> tuple[Tensor, Tensor]:
    """In fractions, rounded to float64."""
    mean, var = [], []
    for c in range(len(means[0])):
        m, v = ([Fraction(float(t[c])) for t in of] for of in (means, variances))
        centre = sum(n * a for n, a in zip(counts, m, strict=True)) / sum(counts)
        mean.append(float(centre))
        var.append(float(sum(n * (b + (a - centre) ** 2) for n, a, b in zip(counts, m, v, strict=True)) / sum(counts)))
    return torch.tensor(mean, dtype=torch.float64), torch.tensor(var, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ratio", [0.0, 1e6])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_merge_is_its_formula(processes, world, ratio, dtype):
    counts = [3, 5, 11][:world]
    stats = [
        {
            name: ((torch.randn(c) + ratio).to(dtype), torch.rand(c).add(0.1).to(dtype), n)
            for name, c in (("a", 7), ("b", 4))
        }
        for n in counts
    ]
    results = processes.all(merged, stats, None, ranks=world)
    for name in ("a", "b"):
        mean, var = closed_form(*([of[name][i] for of in stats] for i in (0, 1)), counts)
        tolerance = {"rtol": 4e-16 if dtype is torch.float64 else 0.0, "atol": 0.0}
        torch.testing.assert_close(results[0][f"{name}.running_mean"], mean.to(dtype), **tolerance)
        torch.testing.assert_close(results[0][f"{name}.running_var"], var.to(dtype), **tolerance)
        assert results[0][f"{name}.num_batches_tracked"] == -(-sum(counts) // world)
    alike = [{n: (r[f"{n}.running_mean"], r[f"{n}.running_var"], 6) for n in ("a", "b")} for r in results]
    for before, after in zip(results, processes.all(merged, alike, None, 2, ranks=world), strict=True):
        for key in ("a.running_mean", "a.running_var", "b.running_mean", "b.running_var"):
            torch.testing.assert_close(after[key], before[key], **tolerance)
        assert after["a.num_batches_tracked"] == 6


def test_no_bit_depends_on_the_order_of_the_processes(processes):
    stats = [{"a": (torch.randn(50) * 10**k, torch.rand(50), 3 + k)} for k in range(3)]
    results = [processes.all(merged, [stats[i] for i in order], None) for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0])]
    assert all(torch.equal(r["a.running_var"], results[0][0]["a.running_var"]) for run in results for r in run)
    assert all(torch.equal(r["a.running_mean"], results[0][0]["a.running_mean"]) for run in results for r in run)


def merged_apart(group: dist.ProcessGroup, stats: list[Any], counts: list[Any] | None) -> dict[str, Tensor]:
    model = filled(stats[dist.get_rank(group)])
    synchronize_running_stats(model, group, None if counts is None else counts[dist.get_rank(group)])
    return dict(model.named_buffers())


def test_a_process_that_knows_nothing_gives_nothing(processes):
    good, bad = torch.tensor([1.0, -0.0]), torch.tensor([float("nan"), float("inf")])
    stats = [{"a": (bad, bad, 0), "b": (good * r, good + r, 0)} for r in range(3)]
    stats[1] = {"a": (good, good + 2, 5), "b": (good, good + 1, 0)}
    for result in processes.all(merged_apart, stats, None):
        assert torch.equal(result["a.running_mean"], good)
        assert torch.equal(result["a.running_var"], good + 2)
        assert result["a.num_batches_tracked"] == 2  # 5 of three processes, rounded up
    for of, result in zip(stats, processes.all(merged_apart, stats, [0, 0, 0]), strict=True):  # nor does any other
        kept = [(result[f"{n}.running_mean"], result[f"{n}.running_var"]) for n in ("a", "b")]
        for (mean, var), (before, other, _) in zip(kept, of.values(), strict=True):
            torch.testing.assert_close((mean, var), (before, other), rtol=0, atol=0, equal_nan=True)
    for result in processes.all(merged_apart, stats, [{"a": 0, "b": 0}, {"a": 7, "b": 0}, {"a": 0, "b": 1}]):
        assert torch.equal(result["a.running_mean"], good)
        assert torch.equal(result["b.running_mean"], stats[2]["b"][0])
    bad_on_one = processes.all(merged_apart, stats, [0, 1, 1])
    assert all(r["a.running_mean"].isnan().all() for r in bad_on_one)  # a NaN that counts is not hidden


def trained_apart(group: dist.ProcessGroup, batches: list[list[list[Tensor]]], biased: bool) -> list[nn.Module]:
    """The layer after each round of batches and the merge that follows."""
    rank, found = dist.get_rank(group), []
    kind = nw.nn.BatchNorm1d if rank else nn.BatchNorm1d
    layer = kind(batches[0][0][0].shape[1], momentum=None, dtype=torch.float64)
    for of_ranks in batches:
        for x in of_ranks[rank]:
            layer(x)
        values = sum(len(x) for x in of_ranks[rank])
        if biased:
            layer.running_var.mul_((values - 1) / values)
        synchronize_running_stats(layer, group, values if biased else None)
        found.append(copy.deepcopy(layer))
    return found


def seen(batches: list[Tensor]) -> nn.BatchNorm1d:
    layer = nn.BatchNorm1d(batches[0].shape[1], momentum=None, dtype=torch.float64)
    for x in batches:
        layer(x)
    return layer


def test_one_batch_each_is_one_process_with_the_joined_batch(processes):
    batches = [torch.randn(n, 5, dtype=torch.float64) * (n + 1) + n for n in (4, 9, 30)]
    single, n = seen([torch.cat(batches)]), 43
    for [layer] in processes.all(trained_apart, [[[x] for x in batches]], True):
        torch.testing.assert_close(layer.running_mean, single.running_mean, rtol=1e-13, atol=0)
        torch.testing.assert_close(layer.running_var, single.running_var * (n - 1) / n, rtol=1e-13, atol=0)
        assert layer.num_batches_tracked == single.num_batches_tracked == 1


def test_the_mean_of_many_batches_is_that_of_one_process_merge_after_merge(processes):
    rounds = [
        [[torch.randn(8, 5, dtype=torch.float64) + 3 * rank for _ in range(k)] for rank, k in enumerate(of_ranks)]
        for of_ranks in ([4, 2, 3], [1, 6, 2])
    ]
    first = [x for of_rank in rounds[0] for x in of_rank]
    every = first + [x for of_rank in rounds[1] for x in of_rank]
    apart = torch.stack([seen(of_rank).running_mean for of_rank in rounds[0]])
    weight = torch.tensor([4, 2, 3], dtype=torch.float64).unsqueeze(1)
    between = (weight * (apart - seen(first).running_mean) ** 2).sum(0) / 9
    for one, two in processes.all(trained_apart, rounds, False):
        torch.testing.assert_close(one.running_mean, seen(first).running_mean, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(one.running_var, seen(first).running_var + between, rtol=1e-12, atol=0)
        torch.testing.assert_close(two.running_mean, seen(every).running_mean, rtol=1e-12, atol=1e-14)
        assert (one.num_batches_tracked, two.num_batches_tracked) == (3, 6)


def collectives(group: dist.ProcessGroup) -> dict[str, int]:
    called: Counter[str] = Counter()
    names = "all_reduce", "all_gather_into_tensor", "all_gather", "all_gather_object", "broadcast"
    before = {name: getattr(dist, name) for name in names}

    def counted(name: str) -> Callable[..., Any]:
        return lambda *args, **keywords: (called.update([name]), before[name](*args, **keywords))[1]

    try:
        for name in names:
            setattr(dist, name, counted(name))
        model = replica()
        model[1].num_batches_tracked += dist.get_rank(group)
        model.add_module("untracked", nn.BatchNorm1d(3, track_running_stats=False))
        model.add_module("lazy", nn.LazyBatchNorm1d())
        model.add_module("instance", nn.InstanceNorm1d(3, track_running_stats=True))
        model.instance.running_mean += dist.get_rank(group)
        synchronize_running_stats(model, group)
        assert model.instance.running_mean[0] == dist.get_rank(group)  # it is no Batch Norm
    finally:
        for name in names:
            setattr(dist, name, before[name])
    return dict(called)


def test_the_whole_model_takes_one_sum(processes):
    assert processes.all(collectives, ranks=3) == [{"all_gather": 1, "all_reduce": 1}] * 3


def refused(group: dist.ProcessGroup, stats: list[Any], counts: list[Any]) -> Any:
    rank = dist.get_rank(group)
    model = filled(stats[rank])
    before = copy.deepcopy(model.state_dict())
    try:
        synchronize_running_stats(model, group, counts[rank])
    except (TypeError, ValueError) as error:
        assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
        return type(error), str(error)


STATS = {"a": (torch.zeros(3), torch.ones(3), 1)}


@pytest.mark.parametrize(
    ("of_1", "count", "kind", "words"),
    [
        ({"a": (torch.zeros(5), torch.ones(5), 1)}, 1, ValueError, "rank 1 besides: a of 5 channels, torch.float32"),
        ({"a": (torch.zeros(3).double(), torch.ones(3), 1)}, 1, ValueError, "a of 3 channels, torch.float64"),
        ({**STATS, "b": STATS["a"]}, 1, ValueError, "rank 1 besides: b of 3 channels"),
        (STATS, -1, ValueError, "rank 1: counts must be 0 or more; got -1"),
        (STATS, 0.5, TypeError, "rank 1: counts must be integers; got 0.5"),
        (STATS, {}, ValueError, "rank 1: counts must have an integer for each Batch Norm"),
        (STATS, {"a": 1, "c": 2}, ValueError, "otherwise for c"),
    ],
    ids=["channels", "dtype", "names", "negative", "fraction", "missing", "of no layer"],
)
def test_processes_that_do_not_fit_are_refused_by_all(processes, of_1, count, kind, words):
    results = processes.all(refused, [STATS, of_1], [1, count], ranks=2)
    assert results[0] == results[1]
    assert results[0][0] is kind
    assert "synchronize_running_stats" in results[0][1]
    assert words in results[0][1]


def test_without_a_process_group_nothing_changes():
    model = filled(STATS)
    synchronize_running_stats(model)
    assert torch.equal(model["a"].running_mean, STATS["a"][0])
    with pytest.raises(ValueError, match="counts must be 0 or more"):
        synchronize_running_stats(model, counts=-1)
    for function in (check_replicas, synchronize_running_stats, lambda model: profile(model).__enter__()):
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module; got int"):
            function(3)


# profile


def network() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 5, 3),
        nn.BatchNorm2d(5),
        nn.ReLU(inplace=True),
        nw.nn.LayerNorm2d(5),
    )


def costs_of_steps(group: dist.ProcessGroup, steps: int) -> list[str]:
    """Three profiles: the first steps, further ones, and the functional."""
    model, found = nw.nn.SyncBatchNorm.convert(network(), group), []
    for _ in range(2):
        with profile(model, group) as costs:
            for _ in range(steps):
                model(torch.randn(3, 2, 8, 8)).backward(torch.randn(3, 5, 4, 4) + 0.5)
        found.append(costs.to_json())
    x = torch.randn(3, 4, requires_grad=True)
    with profile(model, group) as outer, profile(model, group) as costs:
        y = nw.functional.sync_batch_norm(x, None, None, training=True, process_group=group, layer="mine")
        y.backward(torch.randn(3, 4))
    assert [(c.name, c.collectives) for c in outer.layers] == [(c.name, c.collectives) for c in costs.layers]
    found.append(costs.to_json())
    model(torch.randn(3, 2, 8, 8))
    assert costs.to_json() == found[-1]
    return found


def message(integers: int) -> int:
    """Bytes of a sum: a power of two times 48, and the tag."""
    padded = 48
    while padded < integers:
        padded *= 2
    return 8 * (padded + 1)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_collectives_and_bytes_are_those_that_the_layers_send(processes, world):
    steps = 4
    for rank, texts in enumerate(processes.all(costs_of_steps, steps, ranks=world)):
        first, further, functional = map(json.loads, texts)
        assert (first["rank"], first["processes"]) == (rank, 3)
        for found, agreements in ((first, 1), (further, 0)):
            layers = {layer["name"]: layer for layer in found["layers"]}
            assert list(layers) == ["1", "4", "6"]
            for name, channels in (("1", 6), ("4", 5)):
                assert layers[name]["calls"] == steps
                assert layers[name]["collectives"] == agreements + 2 * steps
                one_step = message(45 * channels) + message(44 * channels)
                assert layers[name]["bytes_sent"] == agreements * HEADER + steps * one_step
                within = layers[name]["forward_seconds"] + layers[name]["backward_seconds"]
                assert 0 < layers[name]["waiting_seconds"] < within < found["seconds"]
            assert layers["6"]["collectives"] == layers["6"]["bytes_sent"] == layers["6"]["waiting_seconds"] == 0
        mine = functional["layers"][-1]
        assert (mine["name"], mine["collectives"]) == ("mine", 3)
        assert mine["bytes_sent"] == HEADER + message(45 * 4) + message(44 * 4)


class Inplace(nn.LayerNorm):
    """A subclass of several operators, one of them in place."""

    def forward(self, input: Tensor, scale: Tensor | None = None) -> Tensor:
        y = super().forward(input)
        return (y if scale is None else y * scale).mul_(2).neg()


class Uses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first = Inplace(4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.norm(self.norm(h).add_(1), scale=h).mul_(3) + h


@pytest.mark.parametrize("build", [network, Uses], ids=["images", "in place"])
def test_a_profile_changes_no_bit(build):
    x = torch.randn(3, 2, 8, 8) if build is network else torch.randn(3, 4)
    found = []
    for measured in (False, True):
        torch.manual_seed(3)
        model, leaf = build(), x.clone().requires_grad_()
        torch.manual_seed(4)
        if measured:
            with profile(model) as costs:
                y = model(leaf)
                y.backward(torch.randn_like(y))
        else:
            y = model(leaf)
            y.backward(torch.randn_like(y))
        found.append([y, leaf.grad, *(p.grad for p in model.parameters()), *model.buffers()])
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert {c.calls for c in costs.layers} == ({1} if build is network else {2})
    assert all(c.forward_seconds > 0 and c.backward_seconds > 0 and c.collectives == 0 for c in costs.layers)
    assert sum(c.forward_seconds + c.backward_seconds for c in costs.layers) < costs.seconds


def test_only_the_nodes_of_the_layer_are_timed():
    from normwise.distributed.profiling import _nodes_between

    x = torch.randn(3, 4, requires_grad=True) * 2
    norm = Inplace(4)
    y = norm(x, scale=x)
    names = {node.name() for node in _nodes_between([y, 3], {x.grad_fn})}
    assert names == {"NegBackward0", "MulBackward0", "NativeLayerNormBackward0"}
    assert _nodes_between([x], {x.grad_fn}) == []


def test_a_profile_is_data():
    model = network()
    with profile(model) as costs, torch.no_grad():
        assert costs.layers == ()
        model(torch.randn(3, 2, 8, 8))
    assert [(c.name, c.kind, c.calls, c.backward_seconds) for c in costs.layers] == [
        ("1", "BatchNorm2d", 1, 0.0),
        ("4", "BatchNorm2d", 1, 0.0),
        ("6", "LayerNorm2d", 1, 0.0),
    ]
    with pytest.raises(dataclasses.FrozenInstanceError):
        costs.seconds = 0.0
    lines = costs.to_text().splitlines()
    assert lines[0].startswith("3 norms, rank 0 of 1: ")
    assert " ".join(lines[1].split()) == "layer kind calls forward ms backward ms collectives bytes sent waiting ms"
    assert [line.split()[0] for line in lines[2:]] == ["1", "4", "6", "all"]
    assert lines[-1].split()[1] == "3"
    assert str(costs) == costs.to_text()
    data = json.loads(costs.to_json(indent=None))
    assert (data["schema"], data["version"], len(data["layers"])) == ("normwise.profile", 1, 3)
    empty = profile(nn.Linear(2, 2))
    with pytest.raises(RuntimeError, match="stop"), empty as costs:
        raise RuntimeError("stop")
    assert costs.seconds > 0
    assert costs.to_text().splitlines()[-1].split()[:2] == ["all", "0"]
