"""Does a network become another one when its batch is split over processes?

An MLP (64, 128, 128, 10) learns the digits with batches of 64, on one process and split over 2 and 4 real ones (gloo),
which add up their gradients: equal updates, equal examples, the same initial weights and order. SGD, momentum 0.9,
cosine, no weight decay, 10 epochs, 5-fold cross-validation; the rate is tuned for each norm on validation data, on one
process and with seeds of its own. All in float64, so that rounding alone does not grow until it shows. Batch Norm takes
each process's own statistics (local) or those of all (SyncBatchNorm, reproducible). Counted are the test predictions
that are not those of the network trained on one process, those that are not the same on all processes, since local
running statistics differ, and what the norms send in a step; all score with running statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ... import distributed
from ...nn import SyncBatchNorm
from .. import plots, processes
from ..crossval import batch_norms, tune
from ..data import FOLDS, Data, digits
from ..experiment import Contrast, Experiment, Finding, Numbers, Plan, Results, Trial
from ..intervals import Effect, mean
from ..replicates import GRID, NORMS, Setting, mlp, train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BATCH, CHUNK = 64, 5
WORLDS = (1, 2, 4)
LAYERS: dict[str, tuple[str, Callable[..., nn.Module] | None]] = {
    "none": ("none", None),
    "layer_norm": ("layer_norm", None),
    "batch_norm": ("batch_norm", None),
    "sync_batch_norm": ("batch_norm", SyncBatchNorm),
}
"""The norm whose weights and rate it has, and what takes the place of Batch Norm."""

NAMES = plots.NAMES | {"batch_norm": "Batch Norm, local", "sync_batch_norm": "SyncBatchNorm"}


def _updates(data: Data, epochs: int) -> int:
    return epochs * (len(data.x) * (FOLDS - 2) // FOLDS // BATCH)


def _tune(norm: str, seeds: Sequence[int], grid: Sequence[float], epochs: int, _: Results) -> Numbers:
    data = digits()
    model = partial(mlp, norm, data=data)
    return tune(model, data, seeds, batch=BATCH, updates=_updates(data, epochs), grid=grid)


def _train(seeds: Sequence[int], worlds: Sequence[int], epochs: int, results: Results) -> Numbers:
    """All norms on all numbers of processes; see `_compare`."""
    if not (dist.is_available() and dist.is_gloo_available()):
        raise RuntimeError("data_parallel: torch must have gloo; this one has not; choose other experiments.")
    rates = {name: results[f"tune {norm}"]["best"] for name, (norm, _) in LAYERS.items()}
    data = digits()
    data = Data(data.x.double(), data.y)
    with processes.started(max(worlds), _serve, LAYERS, rates, data, tuple(seeds), tuple(worlds), epochs) as pipes:
        return processes.receive(pipes, "data_parallel", "choose other experiments")


def _serve(
    rank: int,
    layers: Mapping[str, tuple[str, Callable[..., nn.Module] | None]],
    rates: Mapping[str, float],
    data: Data,
    seeds: Sequence[int],
    worlds: Sequence[int],
    epochs: int,
) -> Iterator[Numbers]:
    """Take part in the training on enough processes; rank 0 tells what comes of it."""
    groups = {world: dist.new_group(list(range(world))) for world in worlds}
    found: Numbers = {}
    for name, (norm, layer) in layers.items():
        runs, alone = [(seed, fold, rates[name]) for seed in seeds for fold in range(FOLDS)], None
        for world, group in groups.items():
            if rank < world:
                model = partial(_model, norm, layer, group, data)
                trained, splits = train(Setting(model, runs, BATCH, _updates(data, epochs)), data, group=group)
                predicted, rows = _predict(trained, data, [split.test for split in splits])
                weights = torch.cat([p.detach().flatten() for p in trained.parameters()])
                alone = alone or (predicted, weights.clone())
                numbers = _compare(predicted, alone[0], data.y[rows], [len(split.test) for split in splits], group)
                numbers["weights"] = float((weights - alone[1]).norm() / alone[1].norm())
                found[f"{name} {world}"] = numbers | _cost(model([torch.Generator()]).to(data.x.dtype), data, group)
            dist.barrier()
    if rank == 0:
        yield found


def _model(norm: str, layer: Callable[..., nn.Module] | None, group: Any, data: Data, generators: Any) -> nn.Module:
    model = mlp(norm, generators, data)
    for i, child in enumerate(model):
        if layer and child in batch_norms(model):
            model[i] = layer(child.num_features, process_group=group, reproducible=True)
    return model


@torch.no_grad()
def _predict(model: nn.Module, data: Data, tests: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Predictions (N, R) and their examples; shorter tests are filled with their first ones."""
    rows = torch.stack([test.repeat(2)[: max(map(len, tests))] for test in tests], 1)
    return model(data.x[rows].flatten(1)).view(*rows.shape, -1).argmax(-1), rows


def _compare(own: Tensor, alone: Tensor, truth: Tensor, lengths: Sequence[int], group: Any) -> Numbers:
    """In percent and by seed: right predictions, those that are not one process's, those not alike on all processes."""

    def percent(hits: Tensor) -> list[float]:
        shares = [100 * hits[:length, r].double().mean().item() for r, length in enumerate(lengths)]
        return [sum(shares[i : i + FOLDS]) / FOLDS for i in range(0, len(shares), FOLDS)]

    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, own, group=group)
    unlike = torch.stack([each != own for each in everyone]).any(0)
    return {"right": percent(own == truth), "changed": percent(own != alone), "unlike": percent(unlike)}


def _cost(model: nn.Module, data: Data, group: Any) -> Numbers:
    """What the norms of a network send in a step, and all gradients in float32."""
    share = BATCH // dist.get_world_size(group)
    for _ in range(2):  # at its first, a layer checks that all agree
        with distributed.profile(model, group) as profile:
            cross_entropy(model(data.x[:share]), data.y[:share]).backward()
    return {
        "collectives": sum(layer.collectives for layer in profile.layers),
        "bytes": sum(layer.bytes_sent for layer in profile.layers),
        "norms": len(profile.layers),
        "gradient bytes": sum(4 * p.numel() for p in model.parameters()),
    }


def trials(plan: Plan) -> list[Trial]:
    """Rates, then all norms on all numbers of processes, some seeds at a time."""
    epochs, grid = plan.choose(3, 10, 10), plan.choose(GRID[3:6], GRID[:-2], GRID[:-2])
    tuning = range(plan.seed_base + 900, plan.seed_base + 900 + plan.choose(1, 2, 5))
    seeds, worlds = plan.seeds(), plan.choose((1, WORLDS[-1]), WORLDS, WORLDS)
    return [
        *(Trial(f"tune {norm}", partial(_tune, norm, tuning, grid, epochs)) for norm in NORMS),
        *(
            Trial(f"train, from seed {some[0]}", partial(_train, some, worlds, epochs), weight=20)
            for some in (seeds[i : i + CHUNK] for i in range(0, len(seeds), CHUNK))
        ),
    ]


def _joined(results: Results) -> dict[str, Numbers]:
    """By norm and number of processes, over all seeds."""
    parts = [found for name, found in results.items() if name.startswith("train")]
    joined: dict[str, Numbers] = {}
    for case, numbers in parts[0].items():
        lists = {what: [x for part in parts for x in part[case][what]] for what in ("right", "changed", "unlike")}
        joined[case] = numbers | lists | {"weights": max(part[case]["weights"] for part in parts)}
    return joined


def _less(a: Sequence[float], b: Sequence[float]) -> Effect:
    return mean([x - y for x, y in zip(a, b, strict=True)], "points")


def judge(results: Results) -> Finding:
    """Predictions that are not one process's, on the most processes."""
    found = _joined(results)
    most = max(int(case.split()[1]) for case in found)
    last = {name: found[f"{name} {most}"] for name in LAYERS}
    changed = {name: mean(numbers["changed"], "%") for name, numbers in last.items()}
    gained = {name: _less(last[name]["right"], found[f"{name} 1"]["right"]) for name in LAYERS}
    sync, local = last["sync_batch_norm"], last["batch_norm"]
    price = f"{sync['collectives'] / sync['norms']:g} collectives a norm and step, {sync['bytes']:,} bytes in all"
    right = mean(found["batch_norm 1"]["right"], "%")
    free = last["layer_norm"]["collectives"]
    return Finding(
        effect=_less(local["changed"], last["layer_norm"]["changed"]),
        batch_norm=f"{changed['batch_norm']} of predictions change on {most} processes",
        layer_norm=f"{changed['layer_norm']} change; {free} collectives for the norms",
        sentences=[
            f"SyncBatchNorm: {changed['sync_batch_norm']} change, for {price}; gradients in float32 are "
            f"{sync['gradient bytes']:,}",
            f"local Batch Norm on {most} processes of {BATCH // most} examples: {gained['batch_norm']} of accuracy "
            f"more than the {right} on one; {mean(local['unlike'], '%')} of predictions are not alike on all processes",
            *(f"{NAMES[n]}: weights are off by {last[n]['weights']:.1g} of their length at most" for n in LAYERS),
            *(
                f"the best learning rate lies at the end of the grid: {name}"
                for name, numbers in results.items()
                if not numbers.get("inside", True)
            ),
        ],
        correction=f"easy with SyncBatchNorm too: {changed['sync_batch_norm']} of predictions change, for {price}; and "
        f"local Batch Norm on {BATCH // most} examples a process changes accuracy by {gained['batch_norm']}"
        if changed["sync_batch_norm"].high < EXPERIMENT.contrast.smallest
        else "",
        others={
            **{f"changed on {case.split()[1]} processes: {NAMES[case.split()[0]]}": mean(numbers["changed"], "%")
               for case, numbers in found.items() if not case.endswith(" 1")},
            **{f"right on {most} processes less on one: {NAMES[name]}": effect for name, effect in gained.items()},
            **{f"right on one process: {NAMES[name]}": mean(found[f"{name} 1"]["right"], "%") for name in LAYERS},
        },
    )  # fmt: skip


def plot(figure: Figure, results: Results) -> None:
    """Predictions that are not one process's, by the number of processes."""
    found = _joined(results)
    worlds = sorted({int(case.split()[1]) for case in found})
    axes = figure.subplots()
    colors = {"none": "none", "layer_norm": "layer_norm", "batch_norm": "batch_norm", "sync_batch_norm": "light"}
    heights = {"none": 21, "layer_norm": 9, "sync_batch_norm": 33}
    for name, color in colors.items():
        effects = [mean(found[f"{name} {world}"]["changed"]) for world in worlds]
        plots.curve(axes, worlds, effects, color, "")
        axes.annotate(
            f"{NAMES[name]}, {found[f'{name} {worlds[-1]}']['bytes']:,} bytes a step",
            (worlds[-1], effects[-1].value),
            (6, heights.get(name, 0)),
            textcoords="offset points",
            color=plots.COLORS[color],
            va="center",
        )
    axes.set_xticks(worlds, [f"{world} x {BATCH // world}" for world in worlds])
    axes.set_xlim(0.8, worlds[-1] * 1.75)
    axes.set_xlabel("processes x examples of each")
    axes.set_ylabel("predictions that change, %")


EXPERIMENT = Experiment(
    name="data_parallel",
    aspect="Distributed training",
    claim="Distributed training is complicated with Batch Norm and easy with Layer Norm.",
    contrast=Contrast(
        "test predictions other than those after training on one process: Batch Norm on all less Layer Norm", 1.0
    ),
    method=__doc__,
    trials=trials,
    judge=judge,
    plot=plot,
)
