"""One sum over all processes of a group, and an error that names layer and step when one of them is not there.

A message is a sum's integers and a tag made of layer, settings and step. Before the first sum of a layer its settings
are compared on all processes; after that the tag alone tells. Gloo ends the process where messages of two sizes meet,
so each size has a group of its own there: a process that left out a layer is waited for, and the wait times out.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import time
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., object])

HEADER = 512
"""Bytes of a layer's name and settings, the same for every layer."""


class Collective(NamedTuple):
    """One that has taken place; bytes are those that this process gave to it, seconds those that it waited."""

    layer: str
    direction: str
    bytes: int
    seconds: float


_exchanges: weakref.WeakKeyDictionary[dist.ProcessGroup, Exchange] = weakref.WeakKeyDictionary()


def initialized() -> bool:
    """Whether there are processes to exchange with."""
    return dist.is_available() and dist.is_initialized()


def constant(function: Function) -> Function:
    """`torch.compiler.assume_constant_result`, which would import the compiler: traced, the function is called once."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant
def name_of(
    group: dist.ProcessGroup | None,
    what: str,
    otherwise: str = "allow it to be local with SyncBatchNorm(..., allow_local=True)",
) -> str:
    """The name under which operators know the group, None for that of all processes.

    Args:
        group: The group.
        what: What needs it, for the error.
        otherwise: What to do without one.

    Raises:
        ValueError: If this process does not belong to the group.
        RuntimeError: If there is no process group.
    """
    if not initialized():
        raise RuntimeError(
            f"{what} needs a process group; torch.distributed is not initialized; start with torchrun and call "
            f"init_process_group, or {otherwise}."
        )
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise ValueError(
            f"{what}: process_group must be one to which this process belongs; got {group!r}; call it on its members."
        )
    return str((group or dist.distributed_c10d._get_default_group()).group_name)


def of_group(name: str) -> Exchange:
    """The exchange of the group with this name, which lives as long as the group."""
    group = _group(name)
    if group not in _exchanges:
        _exchanges[group] = Exchange(group)
    return _exchanges[group]


class Exchange:
    """What this process has agreed on with the others of one group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._ranks = dist.get_process_group_ranks(group)
        self.world = len(self._ranks)
        self._name = group.group_name
        self._agreed: set[tuple[str, str]] = set()
        self._steps: Counter[tuple[str, str]] = Counter()
        self._lanes: dict[int, Any] = {}
        self._token: int | None = None  # a store may outlive its groups, and knows where old ones listened
        self._numbers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._next = itertools.count(1)
        self.record: list[Collective] | None = None
        """Where collectives are written down, while someone wants to know."""

    def number(self, layer: object) -> int:
        """The place of a layer in the order in which they first come here, on every process the same."""
        if layer not in self._numbers:
            self._numbers[layer] = next(self._next)
        return self._numbers[layer]

    def __contains__(self, layer: object) -> bool:
        return layer in self._numbers

    def sum(self, values: Tensor, layer: str, settings: str, direction: str) -> Tensor:
        """Add up the int64 ``values`` of all processes.

        Args:
            values: The same shape on every process.
            layer: The layer's name and number, the same on every process.
            settings: What must be alike besides.
            direction: ``"forward"`` or ``"backward"``.

        Returns:
            The sums, like ``values``; the same on every process.

        Raises:
            ValueError: If the processes are at different layers or settings.
            RuntimeError: If one is at another step, ended, or did not come in time.
        """
        place, tag = self._arrive(values, layer, settings, direction)
        message = self._message(values, tag)
        self._with_others(place, layer, direction, message, lambda lane: lane.allreduce([message]))
        self._check(place, message[-1:], tag * self.world)
        return message[: values.numel()].view_as(values)

    def gather(self, values: Tensor, layer: str, settings: str, direction: str) -> list[Tensor]:
        """The float64 ``values`` of all processes, in the order of their ranks; else as :meth:`sum`."""
        place, tag = self._arrive(values, layer, settings, direction)
        place = f"{place} with values {tuple(values.shape)}"
        message = self._message(values.view(torch.int64), tag)
        found = [torch.empty_like(message) for _ in self._ranks]
        self._with_others(place, layer, direction, message, lambda lane: lane.allgather([found], [message]))
        self._check(place, torch.stack([theirs[-1] for theirs in found]), tag)
        return [theirs[: values.numel()].view(torch.float64).view_as(values) for theirs in found]

    def _arrive(self, values: Tensor, layer: str, settings: str, direction: str) -> tuple[str, int]:
        """Where this process is, for people and as a tag."""
        if (layer, settings) not in self._agreed:
            self._agree(layer, settings, values.device)
        self._steps[layer, direction] += 1
        place = f"{direction} {self._steps[layer, direction]} of {layer}"
        what = f"{place}: {settings}, {tuple(values.shape)}"
        return place, int.from_bytes(hashlib.blake2b(what.encode(), digest_size=7).digest(), "big")

    def _message(self, values: Tensor, tag: int) -> Tensor:
        message = values.new_zeros(self._padded(values.numel(), values.device) + 1)
        message[: values.numel()], message[-1] = values.flatten(), tag
        return message

    def _check(self, place: str, tags: Tensor, expected: int) -> None:
        right = (tags == (expected + 2**63) % 2**64 - 2**63).all()  # sums of int64 wrap around
        error = self._elsewhere(place, "another process is at another layer or step, or has other sizes")
        if not tags.is_cpu:
            torch._assert_async(right, error)
        elif not right:
            raise RuntimeError(error)

    def _agree(self, layer: str, settings: str, device: torch.device) -> None:
        """Compare name and settings on all processes."""
        end = b": " + settings.encode()
        header = (layer.encode()[: max(HEADER - len(end), 0)] + end)[:HEADER]  # a long name gives way
        mine = torch.frombuffer(bytearray(header.ljust(HEADER, b"\0")), dtype=torch.uint8).to(device)
        gathered = [torch.empty_like(mine) for _ in self._ranks]
        place = f"the first step of {layer}"
        self._with_others(place, layer, "agreement", mine, lambda lane: lane.allgather([gathered], [mine]))
        found: dict[str, list[int]] = {}
        for rank, theirs in zip(self._ranks, gathered, strict=True):
            found.setdefault(bytes(theirs.tolist()).rstrip(b"\0").decode(errors="replace"), []).append(rank)
        if len(found) > 1:
            where = "; ".join(f"{in_words(ranks)} at {text}" for text, ranks in found.items())
            raise ValueError(
                f"{layer}: all processes must run the same layers in the same order with the same settings; {where}; "
                "build the model and call it alike everywhere."
            )
        self._agreed.add((layer, settings))

    def _with_others(
        self, place: str, layer: str, direction: str, message: Tensor, collective: Callable[[Any], Any]
    ) -> None:
        start = time.perf_counter()
        try:
            collective(self._lane(message.numel(), message.device)).wait()
        except RuntimeError as error:
            raise RuntimeError(self._elsewhere(place, str(error).partition("\n")[0])) from error
        if self.record is not None:
            self.record.append(Collective(layer, direction, message.nbytes, time.perf_counter() - start))

    def _elsewhere(self, place: str, what: str) -> str:
        return (
            f"{place}: all {self.world} processes of the group must come here; one ended, hung, or left out a "
            f"layer ({what}); this is rank {dist.get_rank()}, see what the others say."
        )

    def _padded(self, size: int, device: torch.device) -> int:
        """The size of a message, one of few where each has its own group: of sums for a power of two of channels."""
        if not self._is_gloo(device):
            return size
        padded = 48
        while padded < size:
            padded *= 2
        return padded

    def _lane(self, size: int, device: torch.device) -> Any:
        """What adds up and gathers messages of this size."""
        group = _group(self._name)
        if not self._is_gloo(device):
            return group
        if size not in self._lanes:
            from torch._C._distributed_c10d import PrefixStore, ProcessGroupGloo  # builds of torch without it exist

            if self._token is None:
                drawn = torch.tensor([int.from_bytes(os.urandom(7), "big")])
                dist.broadcast(drawn, self._ranks[0], group)
                self._token = int(drawn)
            store = PrefixStore(f"normwise/{self._token}/{size}", dist.distributed_c10d._get_process_group_store(group))
            timeout = group._get_backend(device).options._timeout
            self._lanes[size] = ProcessGroupGloo(store, group.rank(), group.size(), timeout)
        return self._lanes[size]

    def _is_gloo(self, device: torch.device) -> bool:
        return dist.get_backend_config(_group(self._name)).find(f"{device.type}:gloo") >= 0


def _group(name: str) -> dist.ProcessGroup:
    return torch._C._distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def in_words(ranks: list[int]) -> str:
    """The ranks with neighbours drawn together: "ranks 0-6, 8"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    texts = [text for run in runs for text in ([f"{run[0]}-{run[-1]}"] if len(run) > 2 else map(str, run))]
    return f"rank{'s' if len(ranks) > 1 else ''} {few(texts, 8)}"


def few(texts: list[str], most: int) -> str:
    """The first ones, and whether there are others."""
    return (", ".join(texts[:most]) or "nothing") + (" and others" if len(texts) > most else "")
