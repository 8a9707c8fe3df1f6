"""All-reduces of real gloo processes on this machine, timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist

from . import processes
from .cost import Case

WORLDS = (2, 4, 8)
SIZES = tuple(64 * 4**k for k in range(9))
"""Bytes: 64 to 4 Mi."""

CALLS, REPEATS, WARM_UP = 5, 11, 2
"""A repeat is the mean of some calls back to back: a call alone is timed by when this process was woken."""


def measure(
    worlds: Sequence[int] = WORLDS,
    sizes: Sequence[int] = SIZES,
    repeats: int = REPEATS,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Case]:
    """Time all-reduces of int64 over gloo processes of one thread each, which end with the measurement.

    Args:
        worlds: How many processes take part; the largest number is started, and part of them wait.
        sizes: Bytes of a message, multiples of 8.
        repeats: How often each case is timed, 2 or more.
        progress: Called with a line of text before each number of processes.

    Returns:
        For each number of processes and size what rank 0 measured.

    Raises:
        RuntimeError: If this torch has no gloo, or a process ended or hung.
    """
    if not (dist.is_available() and dist.is_gloo_available()):
        raise RuntimeError("measure: torch must have gloo; this one has not; give --latency and --bandwidth instead.")
    progress(f"starting {max(worlds)} processes")
    with processes.started(max(worlds), _serve, tuple(worlds), tuple(sizes), repeats) as pipes:
        return _collect(pipes, worlds, progress)


def _collect(pipes: list[Connection], worlds: Sequence[int], progress: Callable[[str], None]) -> list[Case]:
    """What rank 0 finds, one number of processes after the other."""
    cases: list[Case] = []
    for world in worlds:
        progress(f"all-reduces of {world} processes")
        cases += processes.receive(pipes, "measure", "try fewer --processes")
    return cases


def _serve(rank: int, worlds: tuple[int, ...], sizes: tuple[int, ...], repeats: int) -> Iterator[list[Case]]:
    """Take part in every measurement of enough processes; rank 0 tells what it finds."""
    groups = [dist.new_group(list(range(world))) for world in worlds]
    for world, group in zip(worlds, groups, strict=True):
        cases = _time(world, sizes, repeats, group) if rank < world else []
        if rank == 0:
            yield cases
        dist.barrier()


def _time(world: int, sizes: tuple[int, ...], repeats: int, group: dist.ProcessGroup) -> list[Case]:
    """The sizes take turns, so that what else runs on the machine meets all of them."""
    messages = [torch.ones(size // 8, dtype=torch.int64) for size in sizes]
    for values in messages:
        dist.all_reduce(values, group=group)
        if not (values == world).all():
            raise RuntimeError(f"the sum of {world} ones was {values[0]}")
        values.zero_()  # and stays
    found: list[list[float]] = [[] for _ in sizes]
    for _ in range(WARM_UP + repeats):
        for values, times in zip(messages, found, strict=True):
            start = time.perf_counter()
            for _ in range(CALLS):
                dist.all_reduce(values, group=group)
            times.append((time.perf_counter() - start) / CALLS)
    cases = []
    for size, times in zip(sizes, found, strict=True):
        low, median, high = statistics.quantiles(times[WARM_UP:], n=4, method="inclusive")
        cases.append(Case(world, size, median, (low, high)))
    return cases
