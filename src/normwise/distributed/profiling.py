"""What the norms of a model cost: calls, seconds forward and backward, and what they exchange."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import Node

from .. import exchange
from ..checks import check_module
from ..nn.batch_norm import SyncBatchNorm, labelled
from .replicas import norms_of

SCHEMA, VERSION = "normwise.profile", 1


@dataclass(frozen=True)
class LayerCost:
    """What one layer has cost this process.

    Attributes:
        name: Its place in the model, ``""`` for the model itself.
        kind: Its class.
        calls: Forward calls, those that activation checkpointing repeats among them.
        forward_seconds: In the forward calls, waiting included.
        backward_seconds: In the operators of its backward, waiting included.
        collectives: Those that it took part in.
        bytes_sent: What this process gave to them; what a backend makes of it on the wire is its own affair.
        waiting_seconds: From entering them to their end.
    """

    name: str
    kind: str
    calls: int = 0
    forward_seconds: float = 0.0
    backward_seconds: float = 0.0
    collectives: int = 0
    bytes_sent: int = 0
    waiting_seconds: float = 0.0


@dataclass(frozen=True, eq=False)
class Profile:
    """What :func:`profile` measured: empty until its block ends, immutable then.

    Attributes:
        layers: A cost for each norm, in the order of the model.
        seconds: From the begin of the block to its end.
        rank: Of this process.
        processes: How many there are.
    """

    layers: tuple[LayerCost, ...] = ()
    seconds: float = 0.0
    rank: int = 0
    processes: int = 1

    def to_text(self) -> str:
        """A table with a line for each layer and one for all of them."""
        total = LayerCost("all", "", *(sum(getattr(c, key) for c in self.layers) for key in NUMBERS))
        rows = [HEAD, *(_cells(cost) for cost in (*self.layers, total))]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        own = total.forward_seconds + total.backward_seconds
        share = f" ({own / self.seconds:.0%})" if self.seconds else ""
        lines = [
            f"{len(self.layers)} norms, rank {self.rank} of {self.processes}: {1e3 * own:.3f} ms of "
            f"{1e3 * self.seconds:.3f} ms{share}, of that {1e3 * total.waiting_seconds:.3f} ms waiting for others"
        ]
        for row in rows:
            texts = (c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
            lines.append("  ".join(texts).rstrip())
        return "\n".join(lines) + "\n"

    def to_json(self, *, indent: int | None = 2) -> str:
        """The profile as JSON; ``schema`` and ``version`` name its form."""
        return json.dumps({"schema": SCHEMA, "version": VERSION, **asdict(self)}, indent=indent)

    def __str__(self) -> str:
        return self.to_text()


NUMBERS = tuple(LayerCost.__dataclass_fields__)[2:]
HEAD = ("layer", "kind", "calls", "forward ms", "backward ms", "collectives", "bytes sent", "waiting ms")


def _cells(cost: LayerCost) -> tuple[str, ...]:
    return (
        cost.name or "the model itself",
        cost.kind,
        str(cost.calls),
        f"{1e3 * cost.forward_seconds:.3f}",
        f"{1e3 * cost.backward_seconds:.3f}",
        str(cost.collectives),
        str(cost.bytes_sent),
        f"{1e3 * cost.waiting_seconds:.3f}",
    )


@contextmanager
def profile(model: nn.Module, process_group: dist.ProcessGroup | None = None) -> Iterator[Profile]:
    """Measure what the norms of a model cost over the steps inside the block.

    Each process measures itself and sends nothing for it, so one may do it alone. Collectives are those of
    :class:`normwise.nn.SyncBatchNorm`: for each layer two a step, and one more at its first. What others send, such as
    torch's SyncBatchNorm or the averaging of gradients, is not counted.

    Args:
        model: A module, not compiled: a compiled one calls no layer whose time could be taken.
        process_group: A group, None for all processes, in which to count besides what
            :func:`normwise.functional.sync_batch_norm` sends outside the model's layers; listed by its ``layer``.

    Yields:
        A :class:`Profile`, filled when the block ends, by an error too.

    Raises:
        TypeError: If ``model`` is no module.

    Numerics:
        Seconds are of wall time. In a process that uses CUDA each measurement first waits for the device: the times are
        then true, and the steps slower. Backward is the time inside the operators that the layer's forward recorded:
        no operation in place is in the way, and no other user of its input is counted. What activation checkpointing
        repeats is in both, being a forward inside a backward.

    Example:
        >>> with profile(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))) as costs:
        ...     pass
        >>> costs.layers[0].name, costs.layers[0].calls
        ('1', 0)
    """
    norms = norms_of(check_module("profile", model))
    meters = {name: _Meter() for name in norms}
    handles = [handle for name, norm in norms.items() for handle in meters[name].attach(norm)]
    exchanges = _exchanges_of(norms.values(), process_group)
    before = {name: of.record for name, of in exchanges.items()}
    for of in exchanges.values():
        of.record = []
    found, start = Profile(), _now()
    try:
        yield found
    finally:
        seconds = _now() - start
        for handle in handles:
            handle.remove()
        sent = {name: of.record or [] for name, of in exchanges.items()}
        for name, of in exchanges.items():
            outer = of.record = before[name]
            if outer is not None:
                outer += sent[name]
        rank, processes = (dist.get_rank(), dist.get_world_size()) if exchanges else (0, 1)
        done = Profile(tuple(_costs(norms, meters, sent)), seconds, rank, processes)
        vars(found).update(vars(done))  # frozen for everyone else


def _costs(
    norms: dict[str, nn.Module], meters: dict[str, _Meter], sent: dict[str, list[exchange.Collective]]
) -> Iterator[LayerCost]:
    """The layers' costs, and those of labels that are no layer's."""
    of_label: dict[tuple[str, str], list[exchange.Collective]] = defaultdict(list)
    for group, collectives in sent.items():
        for collective in collectives:
            of_label[group, collective.layer].append(collective)
    for name, norm in norms.items():
        meter, mine = meters[name], []
        if isinstance(norm, SyncBatchNorm) and (known := labelled(norm)):
            mine = of_label.pop((exchange.name_of(norm.process_group, known), known), [])
        yield LayerCost(name, type(norm).__name__, meter.calls, meter.forward, meter.backward, *_totals(mine))
    for (_, name), rest in of_label.items():
        yield LayerCost(name, "", 0, 0.0, 0.0, *_totals(rest))


def _totals(collectives: list[exchange.Collective]) -> tuple[int, int, float]:
    return len(collectives), sum(c.bytes for c in collectives), sum(c.seconds for c in collectives)


def _exchanges_of(norms: Iterable[nn.Module], group: dist.ProcessGroup | None) -> dict[str, exchange.Exchange]:
    """The exchanges of a group and of the layers' own groups, by the groups' names."""
    if not exchange.initialized():
        return {}
    groups = {group, *(norm.process_group for norm in norms if isinstance(norm, SyncBatchNorm))}
    return {name: exchange.of_group(name) for name in (exchange.name_of(of, "profile") for of in groups)}


class _Meter:
    """The time of one layer: its calls, and the nodes of the autograd graph that they add."""

    def __init__(self) -> None:
        self.calls, self.forward, self.backward = 0, 0.0, 0.0
        self._entered: list[tuple[set[Node | None], float]] = []

    def attach(self, norm: nn.Module) -> list[torch.utils.hooks.RemovableHandle]:
        """Start; whatever other hooks do is outside."""
        return [
            norm.register_forward_pre_hook(self._enter, with_kwargs=True),
            norm.register_forward_hook(self._leave, prepend=True),
        ]

    def _enter(self, norm: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        outside = {t.grad_fn for t in (*args, *kwargs.values()) if isinstance(t, Tensor)}
        self._entered.append((outside, _now()))

    def _leave(self, norm: nn.Module, args: Any, output: Any) -> None:
        outside, start = self._entered.pop()
        self.forward += _now() - start
        self.calls += 1
        for node in _nodes_between(output if isinstance(output, tuple | list) else [output], outside):
            self._watch(node)

    def _watch(self, node: Node) -> None:
        starts: list[float] = []
        node.register_prehook(lambda dy: starts.append(_now()))
        node.register_hook(lambda dx, dy: self._passed(starts))

    def _passed(self, starts: list[float]) -> None:
        self.backward += _now() - starts.pop()


def _nodes_between(outputs: Iterable[Any], outside: set[Node | None]) -> list[Node]:
    """The nodes of the graph from outputs to inputs, and to leaves, whose gradients are added up elsewhere."""
    found: dict[Node, None] = {}
    waiting = [t.grad_fn for t in outputs if isinstance(t, Tensor)]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in outside and node not in found and node.next_functions:
            found[node] = None
            waiting += [before for before, _ in node.next_functions]
    return list(found)


def _now() -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
