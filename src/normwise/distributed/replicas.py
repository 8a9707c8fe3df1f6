"""Whether the processes' norms agree, and one set of running statistics where each process has kept its own."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.parameter import is_lazy

from ..checks import check_module
from ..exact_sum import carried, exact_sum, two_product
from ..exchange import few, in_words, initialized
from ..ops.common import OPS

NORMS = _NormBase, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm
"""torch's norms, and with them normwise's, which are subclasses."""

Kept = tuple[Tensor, Tensor, Tensor]
"""A Batch Norm's running mean, running variance and number of batches."""


def norms_of(model: nn.Module) -> dict[str, nn.Module]:
    """The norms of a model by their place in it; the model itself may be one."""
    return {name: module for name, module in model.named_modules() if isinstance(module, NORMS)}


def check_replicas(model: nn.Module, process_group: dist.ProcessGroup | None = None) -> dict[str, str]:
    """Compare the parameters and buffers of a model's norms, bit for bit, over all processes.

    Data-parallel training keeps replicas alike; a norm that is not tells of a seed, a checkpoint or running statistics
    that went separate ways. Every process of the group calls it. One gather of 8 bytes compares the names; one of
    8 bytes a tensor, the values.

    Args:
        model: A module whose norms, torch's or normwise's or subclasses, are compared; each process holds all of it.
        process_group: The processes; None for all. Without `torch.distributed` there is one, which agrees with itself.

    Returns:
        For each tensor that is not the same everywhere its name in the model and which ranks hold the same, in words;
        empty if all agree. The same on every process.

    Raises:
        TypeError: If ``model`` is no module.
        ValueError: On every process, if they have norms at different places or with different tensors.

    Numerics:
        Type, shape and bytes count: 0 and -0 differ, as do two NaN of different bits. Each tensor is known by 64 bits
        of its SHA-256, so two that differ pass for equal once in 2^64.

    Example:
        >>> check_replicas(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)))
        {}
    """
    held = _tensors(check_module("check_replicas", model))
    if not initialized():
        return {}
    _agree("check_replicas", held, process_group)
    kinds, values = (
        _gather([hashed(tensor) for tensor in held.values()], process_group).T.tolist() for hashed in (_kind, _value)
    )
    ranks = dist.get_process_group_ranks(process_group or dist.group.WORLD)
    return {
        name: _who_holds_what(*("type or shape", kind) if len({*kind}) > 1 else ("value", value), ranks)
        for name, kind, value in zip(held, kinds, values, strict=True)
        if len({*kind}) > 1 or len({*value}) > 1
    }


@torch.no_grad()
def synchronize_running_stats(
    model: nn.Module,
    process_group: dist.ProcessGroup | None = None,
    counts: int | Mapping[str, int] | None = None,
) -> None:
    """Merge the running statistics that the processes' Batch Norms have kept apart, and give all of them the result.

    ``mean = Σ n_i mean_i / N`` and ``var = Σ n_i (var_i + (mean_i - mean)²) / N``, over the processes i, N = Σ n_i. An
    average of the variances alone would leave out how far apart the means are. Every process of the group calls it,
    once before evaluation or a checkpoint. One gather of 8 bytes compares the layers; one sum, of 360 bytes a channel
    however many the processes, has the statistics of the whole model.

    ``num_batches_tracked`` becomes the processes' mean, rounded up: the replicas are then alike and together count as
    many batches as before, by which ``momentum=None`` weighs what follows, another merge too. The sum would count each
    batch once for every process in the next merge; the largest, those of a process that had seen fewer.

    Args:
        model: A module. Its Batch Norms that have running statistics, torch's or normwise's, are merged.
        process_group: The processes; None for all. Without `torch.distributed` nothing is changed.
        counts: n_i: how many values, or batches, are behind this process's statistics, for all layers or for each by
            its name in the model. None for each layer's ``num_batches_tracked``, which is right where batches are of
            one size. Of a process with 0 nothing is taken; with 0 everywhere a layer stays as it is.

    Raises:
        TypeError: If ``model`` is no module; on every process, if a count is no integer.
        ValueError: On every process, if their Batch Norms differ in place, channels or type, or if a count is negative,
            missing, or of no layer.

    Numerics:
        Sums are exact, so no bit depends on the order of the processes; the formulas of the statistics as they stand
        are right to float64 and then rounded to the buffers' type. In float32 and narrower what was the same everywhere
        stays so to the bit. What is not exact is what went in: exponential averages forget, so the mean is that of the
        joined data only with ``momentum=None`` and true counts; unbiased variances, which Batch Norm keeps, enter as if
        biased, and average ones lack the variance between the means of a process's own batches. The variance is that of
        the joined data if each process saw one batch and made its own biased, times (n_i - 1) / n_i.

    Example:
        >>> synchronize_running_stats(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    """
    layers = _with_running_stats(check_module("synchronize_running_stats", model))
    known, refusal = _counts(layers, counts)
    if not initialized():
        if refusal:
            raise type(refusal)(f"synchronize_running_stats: {refusal}")
        return
    lines = [f"{name} of {mean.numel()} channels, {mean.dtype}" for name, (mean, _, _) in layers.items()]
    _agree("synchronize_running_stats", lines, process_group, refusal)
    if not layers:
        return
    kept, device, world = list(layers.values()), _device(process_group), dist.get_world_size(process_group)
    sums = _sums(kept, known, device)
    tracked = torch.stack([batches.to(device, torch.int64) for _, _, batches in kept])
    message = torch.cat([sums.flatten(), tracked])
    dist.all_reduce(message, group=process_group)
    mean, var, count = OPS.batch_norm_moments.default(message[: sums.numel()].view_as(sums))
    _write(kept, mean, var, count, (message[sums.numel() :] + world - 1) // world)


def _sums(kept: list[Kept], known: list[int], device: torch.device) -> Tensor:
    """Exact sums of n mean and of n (var + mean²), and n: a row for each channel, as for a batch's values."""
    mean, var = (torch.cat([of[i].to(device, torch.float64) for of in kept]) for i in (0, 1))
    sizes = torch.tensor([of[0].numel() for of in kept], device=device)
    count = torch.tensor(known, device=device).repeat_interleave(sizes)
    n, nothing = count.double(), count == 0
    mean, var = mean.masked_fill(nothing, 0), var.masked_fill(nothing, 0)  # 0 times NaN would be NaN
    square, rest = two_product(mean, mean)
    squares = torch.stack([*two_product(n, var), *two_product(n, square), *two_product(n, rest)])
    total = torch.stack(two_product(n, mean))
    return torch.cat([carried(exact_sum(total)), carried(exact_sum(squares)), count.unsqueeze(1)], 1)


def _write(kept: list[Kept], mean: Tensor, var: Tensor, count: Tensor, tracked: Tensor) -> None:
    sizes = [running_mean.numel() for running_mean, _, _ in kept]
    parts = (values.split(sizes) for values in (mean, var, count))
    for (running_mean, running_var, batches), m, v, n, merged in zip(kept, *parts, tracked, strict=True):
        if n[0] > 0:
            running_mean.copy_(m)
            running_var.copy_(v.clamp(max=torch.finfo(running_var.dtype).max))
            batches.copy_(merged)


def _counts(layers: Mapping[str, Kept], counts: int | Mapping[str, int] | None) -> tuple[list[int], Exception | None]:
    """The values behind each layer's statistics, or why there are none."""
    if counts is None:
        return [int(batches) for _, _, batches in layers.values()], None
    named = counts if isinstance(counts, Mapping) else dict.fromkeys(layers, counts)
    if named.keys() != layers.keys():
        which = ", ".join(sorted(named.keys() ^ layers.keys()))
        return [], ValueError(
            "counts must have an integer for each Batch Norm with running statistics and for nothing else; it is "
            f"otherwise for {which}; take the names from named_modules(), or give one integer for all."
        )
    try:
        found = [operator.index(named[name]) for name in layers]
    except TypeError:
        return [], TypeError(
            f"counts must be integers; got {counts!r}; give how many values are behind the statistics."
        )
    if any(n < 0 for n in found):
        return [], ValueError(f"counts must be 0 or more; got {counts!r}; give 0 where a process knows nothing.")
    return found, None


def _with_running_stats(model: nn.Module) -> dict[str, Kept]:
    """What the Batch Norms keep, for those that keep something, in the order of their names."""
    found: dict[str, Kept] = {}
    for name, module in sorted(model.named_modules(), key=operator.itemgetter(0)):
        keys = ("running_mean", "running_var", "num_batches_tracked")
        kept = [b for key in keys if (b := getattr(module, key, None)) is not None and not is_lazy(b)]
        if isinstance(module, _BatchNorm) and len(kept) == len(keys):
            found[name] = kept[0], kept[1], kept[2]
    return found


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of the norms, in the order of their names."""
    found: dict[str, Tensor] = {}
    for name, norm in norms_of(model).items():
        for held in (norm.named_parameters(prefix=name), norm.named_buffers(prefix=name)):
            found.update(held)
    return dict(sorted(found.items()))


def _kind(tensor: Tensor) -> int:
    """A hash of type and shape."""
    text = "lazy" if is_lazy(tensor) else f"{tensor.dtype} {tuple(tensor.shape)}"
    return _leading_bits(hashlib.sha256(text.encode()).digest())


def _value(tensor: Tensor) -> int:
    """A hash of the bytes."""
    if is_lazy(tensor):
        return 0
    values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return _leading_bits(hashlib.sha256(values.numpy().data).digest())


def _leading_bits(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "big", signed=True)


def _agree(what: str, lines: Iterable[str], group: dist.ProcessGroup | None, refusal: Exception | None = None) -> None:
    """Raise on every process unless they have the same lines, and none has a reason to refuse.

    Lines travel only where they differ: collectives whose sizes differ may end the process, so a hash goes first.
    """
    mine = list(lines)
    hashes = _gather([_leading_bits(hashlib.sha256(repr((mine, refusal)).encode()).digest())], group)
    if refusal is None and (hashes == hashes[0]).all():
        return
    everyone: list[tuple[list[str], Exception | None]] = [(mine, refusal)] * len(hashes)
    dist.all_gather_object(everyone, (mine, refusal), group=group)
    ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
    for rank, (_, reason) in zip(ranks, everyone, strict=True):
        if reason is not None:
            raise type(reason)(f"{what}, rank {rank}: {reason}")
    found: dict[frozenset[str], list[int]] = {}
    for rank, (theirs, _) in zip(ranks, everyone, strict=True):
        found.setdefault(frozenset(theirs), []).append(rank)
    common = frozenset.intersection(*found)
    where = "; ".join(f"{in_words(of)} besides: {few(sorted(has - common), 3)}" for has, of in [*found.items()][:4])
    raise ValueError(
        f"{what}: all processes must have the same norms; {len(common)} are the same everywhere, {where}; "
        "build the model alike on all."
    )


def _gather(values: list[int], group: dist.ProcessGroup | None) -> Tensor:
    """The integers of all processes, (processes, values)."""
    mine = torch.tensor(values, dtype=torch.int64, device=_device(group))
    found = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    if values:
        dist.all_gather(found, mine, group=group)
    return torch.stack(found).cpu()


def _who_holds_what(what: str, hashes: list[int], ranks: list[int]) -> str:
    """As in "ranks 0, 2 hold one value, rank 1 another"."""
    found: dict[int, list[int]] = {}
    for rank, value in zip(ranks, hashes, strict=True):
        found.setdefault(value, []).append(rank)
    first, *others = found.values()
    parts = [f"{in_words(first)} {'hold' if len(first) > 1 else 'holds'} one {what}"]
    parts += [f"{in_words(same)} another" for same in others[:3]]
    return ", ".join(parts) + (f", the others {len(others) - 3} more" if len(others) > 3 else "")


def _device(group: dist.ProcessGroup | None) -> torch.device:
    """Where the group's backend takes its messages."""
    return torch.device(dist.distributed_c10d._get_object_coll_device(group))
