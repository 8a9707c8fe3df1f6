"""Gradients of norms that every process has, and that see only some of the tokens on each."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .. import exchange
from ..checks import check_module
from ..ops.common import OPS
from ..ops.exchange import in_order, refuse_second_derivative

NORMS = (nn.LayerNorm, nn.RMSNorm)
"""Norms of single tokens, with normwise's, which subclass them."""


class SequenceParallel:
    """What :func:`sequence_parallel` has set up; :meth:`remove` undoes it."""

    def __init__(self, handles: list[RemovableHandle]) -> None:
        self._handles = handles

    def remove(self) -> None:
        """Leave the gradients from now on as they are on each process."""
        for handle in self._handles:
            handle.remove()


def sequence_parallel(module: nn.Module, process_group: dist.ProcessGroup | None = None) -> SequenceParallel:
    """Sum the gradients of replicated norms over processes that each see some of the tokens.

    In sequence parallelism a norm needs no exchange in forward, since a token's statistics are its own; but its weight
    and bias are the same on all processes, so that their gradients are sums over all tokens. Here each is summed over
    the group when it is computed and before it is added to ``.grad``: right under gradient accumulation, for a norm
    that is called more than once, and beneath DistributedDataParallel, whose average over other groups comes after.

    Args:
        module: A norm or a model. The weights and biases of its LayerNorm, LayerNorm2d and RMSNorm, torch's and
            normwise's, that require a gradient now; other layers are left alone.
        process_group: The processes that share the tokens; None for all.

    Returns:
        A handle, whose ``remove()`` ends it.

    Raises:
        TypeError: If ``module`` is no module.
        ValueError: If the module has no such norm with parameters to train, or one is summed already.
        RuntimeError: Without a process group. In backward, on every process, if another one ended, hung, or has no
            gradient for the parameter.

    Numerics:
        Summed in float64 in the order of the ranks, rounded once to the type of the parameter: the same bits on every
        process. The part of each process has been rounded to that type before.

    Example:
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> handle = sequence_parallel(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)))
        >>> handle.remove()
        >>> dist.destroy_process_group()
    """
    check_module("sequence_parallel", module)
    group = exchange.name_of(process_group, "sequence_parallel", "leave it out on one process")
    parameters = {
        parameter: f"{name}.{key}" if name else key
        for name, norm in module.named_modules()
        if isinstance(norm, NORMS)
        for key, parameter in norm.named_parameters(recurse=False)
        if parameter.requires_grad
    }
    if not parameters:
        raise ValueError(
            "sequence_parallel: the module must hold a LayerNorm or RMSNorm with parameters to train; "
            f"{type(module).__name__} holds none; pass a model that does, before anything is frozen."
        )
    twice = [name for parameter, name in parameters.items() if _summed(parameter)]
    if twice:
        raise ValueError(
            f"sequence_parallel: a gradient must be summed once; that of {twice[0]} is summed already; "
            "remove the first handle."
        )
    number = exchange.of_group(group).number(module)
    return SequenceParallel(
        [
            parameter.register_hook(_Sum(group, f"sequence_parallel {number} ({name})", parameter))
            for parameter, name in parameters.items()
        ]
    )


def _summed(parameter: Tensor) -> bool:
    return any(isinstance(hook, _Sum) for hook in (parameter._backward_hooks or {}).values())


class _Sum:
    """From the gradient of one process's tokens to that of all."""

    def __init__(self, group: str, layer: str, parameter: Tensor) -> None:
        dtype = str(parameter.dtype).removeprefix("torch.")
        self._place = group, layer, f"{tuple(parameter.shape)}, {dtype}", "backward"

    def __call__(self, gradient: Tensor) -> Tensor:
        refuse_second_derivative(self._place[1], "remove the handle")
        return in_order(OPS.gather_over_processes.default(gradient.double(), *self._place)).to(gradient.dtype)
