"""All-reduces of real gloo processes on this machine, timed."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch
import torch.distributed as dist

from .cost import Case

WORLDS = (2, 4, 8)
SIZES = tuple(64 * 4**k for k in range(9))
"""Bytes: 64 to 4 Mi."""

CALLS, REPEATS, WARM_UP = 5, 11, 2
"""A repeat is the mean of some calls back to back: a call alone is timed by when this process was woken."""

LIMIT = 300.0
"""Seconds without a result after which the processes hang: importing torch takes some, a number of processes ten."""


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
    context = multiprocessing.get_context("spawn")
    pipes: list[Connection] = []
    processes = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            progress(f"starting {max(worlds)} processes")
            with _not_interrupted():
                for rank in range(max(worlds)):
                    ours, theirs = context.Pipe()
                    arguments = theirs, rank, str(Path(folder) / "store"), tuple(worlds), tuple(sizes), repeats
                    process = context.Process(target=_serve, args=arguments, daemon=True)
                    process.start()
                    theirs.close()
                    pipes.append(ours)
                    processes.append(process)
            return _collect(pipes, worlds, progress)
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()
            for pipe in pipes:
                pipe.close()


def _collect(pipes: list[Connection], worlds: Sequence[int], progress: Callable[[str], None]) -> list[Case]:
    """What rank 0 sends, as long as no process sends what went wrong or ends."""
    cases: list[Case] = []
    for world in worlds:
        progress(f"all-reduces of {world} processes")
        ready = wait(pipes, LIMIT)
        if not ready:
            raise RuntimeError(f"measure: it must take under {LIMIT:g} s; {world} hung; try fewer --processes.")
        for pipe in (pipe for pipe in pipes if pipe in ready):
            try:
                found = pipe.recv()
            except (EOFError, ConnectionError):
                found = "it ended"
            if isinstance(found, str):
                where = f"rank {pipes.index(pipe)}"
                raise RuntimeError(f"measure: all processes must run; {where}: {found}; try fewer --processes.")
            cases += found
    return cases


@contextmanager
def _not_interrupted() -> Iterator[None]:
    """Processes that start here ignore Ctrl-C, which a terminal sends to them too: this one ends them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _serve(
    pipe: Connection, rank: int, store: str, worlds: tuple[int, ...], sizes: tuple[int, ...], repeats: int
) -> None:
    """Take part in every measurement of enough processes; rank 0 sends what it finds."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # gloo writes there
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=max(worlds),
            timeout=datetime.timedelta(seconds=LIMIT),
        )
        groups = [dist.new_group(list(range(world))) for world in worlds]
        for world, group in zip(worlds, groups, strict=True):
            cases = _time(world, sizes, repeats, group) if rank < world else []
            if rank == 0:
                pipe.send(cases)
            dist.barrier()
    except Exception as error:
        with suppress(OSError):
            pipe.send(str(error).partition("\n")[0])
    pipe.poll(None)  # until the parent ends it, or ends


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
