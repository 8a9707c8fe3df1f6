"""The time that norms spend on messages: a model of collectives, and what the norms of a training step send.

A message takes `latency` seconds to set out and arrive, whatever its size, and its bytes at `bandwidth`. Computation,
waiting for the slowest process and contention for the wires are not in the model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..exact_sum import SLOTS

RING = "2 (P-1) latency + 2 (P-1)/P bytes / bandwidth"
TREE = "2 log2(P) latency + 2 (P-1)/P bytes / bandwidth"

FORWARD, BACKWARD = (2 * SLOTS + 1) * 8, 2 * SLOTS * 8
"""Bytes a channel of SyncBatchNorm: two sums and the count, then two sums."""

PROCESSES = tuple(2**k for k in range(3, 15))
"""What times are predicted for: 8 to 16,384."""


@dataclass(frozen=True)
class Link:
    """What joins any two processes.

    Args:
        name: For people.
        latency: Seconds a message takes besides its bytes.
        bandwidth: Bytes per second that a process sends while it receives as many.
        bandwidth_source: Where the figure is from.
        latency_source: The same; data sheets give none, so it is often an assumption.
    """

    name: str
    latency: float
    bandwidth: float
    bandwidth_source: str = "given"
    latency_source: str = "given"


PRESETS = {
    "nvlink4": Link(
        "NVLink 4",
        2e-6,
        450e9,
        "NVIDIA H100 data sheet: 900 GB/s a GPU in total, so 450 GB/s each way; it joins the 8 GPUs of an HGX H100, "
        "rows of more processes are hypothetical",
        "assumption; NCCL's src/graph/tuning.cc counts from 0.5 us a step",
    ),
    "infiniband-ndr": Link(
        "InfiniBand NDR",
        5e-6,
        50e9,
        "NVIDIA ConnectX-7 data sheet: 400 Gbit/s a port, so 50 GB/s each way",
        "assumption; NCCL's src/graph/tuning.cc counts from 2.7 us a step",
    ),
    "ethernet-100g": Link(
        "100 Gbit/s Ethernet",
        30e-6,
        12.5e9,
        "IEEE 802.3ba-2010: 100 Gbit/s a port, so 12.5 GB/s each way",
        "assumption, for TCP",
    ),
}


def links(presets: Sequence[str] = (), latency: str | None = None, bandwidth: str | None = None) -> list[Link]:
    """The presets of these names, then the link of a latency and a bandwidth; one of them alone changes the presets.

    Raises:
        ValueError: If a name is unknown, or one of latency and bandwidth comes alone and there is no preset.
    """
    for name in presets:
        if name not in PRESETS:
            raise ValueError(f"preset: it must be one of {', '.join(PRESETS)}; got {name!r}; choose one of these.")
    found = [PRESETS[name] for name in presets]
    if latency is not None and bandwidth is not None:
        found.append(Link("the given link", seconds(latency), bytes_per_second(bandwidth)))
    elif latency is not None:
        _need_presets(found, "latency", "bandwidth")
        found = [replace(link, latency=seconds(latency), latency_source="given") for link in found]
    elif bandwidth is not None:
        _need_presets(found, "bandwidth", "latency")
        found = [replace(link, bandwidth=bytes_per_second(bandwidth), bandwidth_source="given") for link in found]
    return found


def _need_presets(found: list[Link], given: str, missing: str) -> None:
    if not found:
        raise ValueError(f"{missing}: it must come with {given}; got {given} alone; give both, or a preset.")


def ring_all_reduce(link: Link, processes: int, size: float) -> float:
    """Seconds to add up ``size`` bytes over all processes in a ring: gloo's algorithm, and NCCL's for long messages.

    Example:
        >>> ring_all_reduce(Link("", latency=1e-6, bandwidth=1e9), processes=4, size=4000)
        1.2e-05

    References:
        Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations".
    """
    return 2 * (processes - 1) * link.latency + 2 * (processes - 1) / processes * size / link.bandwidth


def tree_all_reduce(link: Link, processes: int, size: float) -> float:
    """The same by recursive halving and doubling, whose latency grows with log2 of the processes, as in NCCL's trees.

    References:
        Thakur, Rabenseifner and Gropp 2005, "Optimization of Collective Communication Operations in MPICH".
    """
    return 2 * math.log2(processes) * link.latency + 2 * (processes - 1) / processes * size / link.bandwidth


def ring_all_gather(link: Link, processes: int, size: float) -> float:
    """Seconds until every process has the ``size`` bytes of each."""
    return (processes - 1) * (link.latency + size / link.bandwidth)


def resnet50_channels() -> list[int]:
    """The channels of each Batch Norm of ResNet-50: three a bottleneck block, one more where a stage changes the shape.

    References:
        He et al. 2015, "Deep Residual Learning for Image Recognition", arXiv:1512.03385, table 1.
    """
    channels = [64]
    for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
        channels += [4 * width] + blocks * [width, width, 4 * width]
    return channels


def transformer_norms(layers: int = 32) -> int:
    """Layer Norms of a transformer: before attention and before the MLP of each layer, and a last one."""
    return 2 * layers + 1


SHARDS = 8
"""Processes that split the features of a Layer Norm between them, however many there are in all."""

TOKENS = 4096
ROW = (3 * 8, 2 * 8)
"""Bytes that a process sends of a token whose features are split, forward and backward: three and two float64."""


@dataclass(frozen=True)
class Prediction:
    """Seconds of one training step that the norms of a model spend on messages, by the model, not by a clock."""

    processes: int
    batch_norm: float
    sync_batch_norm_ring: float
    sync_batch_norm_tree: float
    layer_norm: float
    sharded_layer_norm: float


def predict(link: Link, processes: int, tokens: int = TOKENS) -> Prediction:
    """SyncBatchNorm in ResNet-50, Layer Norm in a transformer of 32 layers, and Batch Norm of each process alone.

    Example:
        >>> predict(PRESETS["infiniband-ndr"], processes=8).layer_norm
        0.0
    """
    sent = [channels * each for channels in resnet50_channels() for each in (FORWARD, BACKWARD)]
    gathers = [ring_all_gather(link, SHARDS, tokens * row) for row in ROW]
    return Prediction(
        processes,
        batch_norm=0.0,
        sync_batch_norm_ring=sum(ring_all_reduce(link, processes, size) for size in sent),
        sync_batch_norm_tree=sum(tree_all_reduce(link, processes, size) for size in sent),
        layer_norm=0.0,
        sharded_layer_norm=transformer_norms() * sum(gathers),
    )


@dataclass(frozen=True)
class Case:
    """A measured all-reduce: the median of its repeats and their quartiles, in seconds; ``size`` in bytes."""

    processes: int
    size: int
    median: float
    quartiles: tuple[float, float]


def fit(cases: Sequence[Case]) -> Link:
    """The latency and bandwidth of a ring that make the relative errors' squares least; neither is negative.

    Raises:
        ValueError: If the cases do not tell latency and bandwidth apart.
    """
    rows = [(2 * (c.processes - 1) / c.median, 2 * (c.processes - 1) / c.processes * c.size / c.median) for c in cases]
    aa, ab, bb = sum(a * a for a, _ in rows), sum(a * b for a, b in rows), sum(b * b for _, b in rows)
    a1, b1, det = sum(a for a, _ in rows), sum(b for _, b in rows), aa * bb - ab * ab
    if len(rows) < 2 or det <= 1e-12 * aa * bb:
        raise ValueError(f"fit: there must be messages of 2 or more sizes; got {len(rows)} cases; measure more sizes.")
    latency, per_byte = (a1 * bb - b1 * ab) / det, (b1 * aa - a1 * ab) / det
    if latency < 0:
        latency, per_byte = 0.0, b1 / bb
    elif per_byte <= 0:
        latency, per_byte = a1 / aa, 0.0
    bandwidth = 1 / per_byte if per_byte else math.inf
    return Link(
        "this machine's loopback", latency, bandwidth, "fitted", "fitted; for a network give a link or a preset"
    )


def error(link: Link, case: Case) -> float:
    """How far the model is off, relative to what was measured; negative where it is too low."""
    return ring_all_reduce(link, case.processes, case.size) / case.median - 1


SECONDS = {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ns": 1e-9}
BYTES = {"": 1.0, "B/s": 1.0, "kB/s": 1e3, "MB/s": 1e6, "GB/s": 1e9, "TB/s": 1e12}
BITS = {"Mbit/s": 1e6 / 8, "Gbit/s": 1e9 / 8, "Tbit/s": 1e12 / 8}


def seconds(text: str) -> float:
    """A time: ``5us``, ``0.3 ms``, ``5e-6``.

    Raises:
        ValueError: If it is none, or not positive.
    """
    return _quantity("latency", text, SECONDS, "5us or 5e-6")


def bytes_per_second(text: str) -> float:
    """A bandwidth each way: ``25GB/s``, ``100Gbit/s``, ``2.5e10``.

    Raises:
        ValueError: If it is none, or not positive.
    """
    return _quantity("bandwidth", text, BYTES | BITS, "25GB/s, 100Gbit/s or 2.5e10")


def _quantity(name: str, text: str, units: dict[str, float], examples: str) -> float:
    found = re.fullmatch(r"\s*(\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+)\s*(\S*)\s*", text)
    value = float(found[1]) * units.get(found[2], math.nan) if found else math.nan
    if not 0 < value < math.inf:
        known = ", ".join(unit for unit in units if unit and unit.isascii())
        raise ValueError(
            f"{name}: it must be a positive number, alone or in {known}; got {text!r}; write for example {examples}."
        )
    return value
