"""Recording what the norms of a model see while it trains."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .. import dispatch, reference
from ..checks import check_module
from ..nn import LayerNorm2d
from .choose import KINDS
from .recording import OF_CHANNELS, Layer, Recording
from .trace import Array

CHANNELS = 8  # of a Batch Norm, evenly chosen
MOST = 250_000  # numbers; then every second step is dropped: a page of this many is 5 MB
BLOCK = 2**20  # values that are converted to float64 at a time

BatchNorm = nn.modules.batchnorm._BatchNorm


def record(model: nn.Module, *, every: int = 1) -> Recorder:
    """Record the statistics of every norm of a model while it trains.

    Each forward call of ``model`` in training mode counts as a step; calls in eval mode, calls of parts of the model,
    and what activation checkpointing repeats do not. A norm is a layer of `torch.nn` or :mod:`normwise.nn`, or a
    subclass: BatchNorm, SyncBatchNorm, LayerNorm, RMSNorm, GroupNorm, InstanceNorm. What is kept of its input:

    - Batch Norm: mean and biased variance of up to 8 channels, and their running mean and variance after the step. Of a
      synchronized one, mean and variance are of this process's examples.
    - The others: the average of the means and of the variances of all their groups, and their standard deviation over
      the groups.

    Outputs, gradients and random numbers keep their bits. On a GPU each norm of a recorded step waits for the device;
    ``every`` thins that out. Once 250,000 numbers have come together, every second step is dropped and ``every``
    doubles.

    Args:
        model: The model, or a DistributedDataParallel around it; if it is compiled, then after this, and each norm
            breaks the graph.
        every: Record one of so many steps, 1 or more.

    Returns:
        A recording that goes on until its ``with`` block ends or ``remove()`` is called.

    Raises:
        TypeError: If ``model`` is no module, or compiled already.
        ValueError: If it has no norm, or ``every`` is less than 1.

    Numerics:
        Means and variances are computed in float64. Of a layer that is called several times in a step the last call
        counts. Transforms of `torch.func` are not recorded.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
        >>> with record(model, every=2) as recording:
        ...     for _ in range(5):
        ...         y = model(torch.randn(16, 4))
        >>> recording
        recording of Sequential: 3 steps, 0 to 4, of 1 norm
        >>> recording.layers[0].of("running_var").shape
        (3, 6)
    """
    model = check_module("record", model)
    if every < 1:
        raise ValueError(f"record: every must be 1 or more; got {every}; use 1 for each step.")
    if any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) for m in model.modules()):
        raise TypeError(
            f"record: model must not be compiled yet; got {type(model).__name__}; record the model that you give to "
            "torch.compile."
        )
    root = model.module if isinstance(model, DistributedDataParallel) else model
    kinds = tuple(KINDS)
    norms = {name: module for name, module in root.named_modules() if isinstance(module, kinds)}
    if not norms:
        raise ValueError(
            f"record: model must have a norm of torch.nn or normwise.nn; {type(root).__name__} has none; record the "
            "part that has."
        )
    return Recorder(root, norms, every)


class Recorder(Recording):
    """A recording that goes on; :func:`record` makes it."""

    def __init__(self, root: nn.Module, norms: dict[str, nn.Module], every: int) -> None:
        super().__init__(type(root).__name__, [], [Layer(name, type(norm).__name__) for name, norm in norms.items()])
        self.every = every
        self._count = 0
        self._open = False
        self._root: nn.Module | None = root
        untraced = torch.compiler.disable  # a compiled model breaks its graph here
        self._handles = [
            root.register_forward_pre_hook(untraced(self._begin), prepend=True),
            *(
                norm.register_forward_hook(untraced(self._observer(layer)), with_kwargs=True)
                for layer, norm in zip(self.layers, norms.values(), strict=True)
            ),
            root.register_forward_hook(untraced(self._end), always_call=True),
        ]

    def remove(self) -> None:
        """Stop recording and leave the model as it was; what is recorded stays."""
        self._root, self._open = None, False
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def _begin(self, module: nn.Module, args: Any) -> None:
        """A step, if the model itself is called to train; a deep copy of it has the same hooks."""
        self._open = False
        if module is not self._root or not module.training or dispatch.recomputing() or dispatch.transformed():
            return
        self._open = self._count % self.every == 0
        if self._open:
            self.steps.append(self._count)
            for layer in self.layers:
                layer.rows.append(None)
        self._count += 1

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self._open:
            return
        self._open = False
        size = sum(next((row.size for row in layer.rows[-1:] if row is not None), 0) for layer in self.layers)
        if size * len(self.steps) > MOST:
            self._thin()

    def _thin(self) -> None:
        """Keep every second step, and record as many from now on."""
        self.every *= 2
        kept = [i for i, step in enumerate(self.steps) if step % self.every == 0]
        self.steps[:] = [self.steps[i] for i in kept]
        for layer in self.layers:
            layer.rows[:] = [layer.rows[i] for i in kept]

    def _observer(self, layer: Layer) -> Any:
        def observe(norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            x = args[0] if args else kwargs.get("input")
            if not self._open or not isinstance(x, Tensor) or not x.numel():
                return
            mask = args[1] if len(args) > 1 else kwargs.get("mask")
            with torch.no_grad():
                layer.kind = type(norm).__name__  # a lazy one has changed its class
                if isinstance(norm, BatchNorm):
                    layer.channels, layer.quantities = _chosen(norm)
                    layer.rows[-1] = _of_channels(norm, layer.channels, x, mask)
                else:
                    layer.rows[-1] = _of_groups(norm, x, mask)

        return observe


def _chosen(norm: BatchNorm) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Some channels, the first and the last among them, and what is recorded of them."""
    last = norm.num_features - 1
    few = min(CHANNELS, last + 1)
    channels = tuple(round(i * last / max(few - 1, 1)) for i in range(few))
    return channels, OF_CHANNELS if norm.running_mean is not None else OF_CHANNELS[:2]


def _of_channels(norm: BatchNorm, channels: tuple[int, ...], x: Tensor, mask: Tensor | None) -> Array:
    """Mean and variance of these channels of ``x`` (N, C, ...), and the running ones: (quantities, channels)."""
    valid = None if mask is None else _columns(reference.valid_positions(mask, x), channels)
    found = list(_moments(_columns(x, channels), valid))
    if norm.running_mean is not None and norm.running_var is not None:
        found += [kept[list(channels)].double() for kept in (norm.running_mean, norm.running_var)]
    return torch.stack(found).cpu().numpy()


def _columns(x: Tensor, channels: tuple[int, ...]) -> Tensor:
    """(N, C, ...) -> (channels, values)."""
    return x.movedim(1, 0)[list(channels)].flatten(1)


def _of_groups(norm: nn.Module, x: Tensor, mask: Tensor | None) -> Array:
    """Average and spread of the means and variances of all groups: (mean, var, mean_spread, var_spread), one column."""
    valid = None if mask is None else reference.valid_positions(mask, x)
    rows, fits = _rows(norm, x), None if valid is None else _rows(norm, valid)
    step = max(1, BLOCK // max(rows.shape[1], 1))
    parts = [
        _moments(rows[i : i + step], None if fits is None else fits[i : i + step]) for i in range(0, len(rows), step)
    ]
    moments = torch.cat([torch.stack(part) for part in parts] or [rows.new_empty(2, 0, dtype=torch.float64)], 1)
    moments = moments if fits is None else moments[:, fits.any(1)]  # where all is masked, nothing is seen
    center = moments.sum(1, keepdim=True) / moments.shape[1]
    spread = ((moments - center).square().sum(1, keepdim=True) / moments.shape[1]).sqrt()
    return torch.cat([center, spread]).cpu().numpy()


def _rows(norm: Any, x: Tensor) -> Tensor:
    """A row for each group of values that share statistics."""
    if isinstance(norm, LayerNorm2d):
        return x.movedim(1, -1).reshape(-1, x.shape[1])
    if isinstance(norm, nn.GroupNorm):
        return x.reshape(len(x) * norm.num_groups, -1)
    if isinstance(norm, nn.modules.instancenorm._InstanceNorm):
        return x.flatten(1 - norm._get_no_batch_dim()).flatten(0, -2)
    return x.reshape(-1, math.prod(norm.normalized_shape))


def _moments(rows: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each row's valid values, in float64; nan where there are none."""
    rows = rows.detach().double()
    if valid is None:
        var, mean = torch.var_mean(rows, 1, correction=0)
        return mean, var
    count = valid.sum(1)
    mean = rows.masked_fill(~valid, 0).sum(1) / count
    return mean, (rows - mean[:, None]).masked_fill(~valid, 0).square().sum(1) / count
