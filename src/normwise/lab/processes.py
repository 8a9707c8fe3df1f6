"""Real gloo processes of one thread each, which the process that started them ends."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

LIMIT = 300.0
"""Seconds without a result after which the processes hang: importing torch takes some, a number of processes ten."""

Work = Callable[..., Iterator[Any]]


@contextmanager
def started(world: int, work: Work, *args: Any) -> Iterator[list[Connection]]:
    """Start processes that are one group, and end them when the block ends, by whatever.

    Args:
        world: How many.
        work: Called in each with its rank and ``args``, the default group being there; what it yields is sent. It and
            they are pickled.
        args: See there.

    Yields:
        A pipe to each, for `receive`.
    """
    context = multiprocessing.get_context("spawn")
    pipes: list[Connection] = []
    processes = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            with _not_interrupted():
                for rank in range(world):
                    ours, theirs = context.Pipe()
                    given = theirs, rank, world, str(Path(folder) / "store"), work, args
                    process = context.Process(target=_serve, args=given, daemon=True)
                    process.start()
                    theirs.close()
                    pipes.append(ours)
                    processes.append(process)
            yield pipes
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()
            for pipe in pipes:
                pipe.close()


def receive(pipes: list[Connection], name: str, advice: str) -> Any:
    """The next that one of them yields, as long as none sends what went wrong or ends.

    Raises:
        RuntimeError: If a process failed or ended, or all hang; with the caller's ``name`` and ``advice``.
    """
    ready = wait(pipes, LIMIT)
    if not ready:
        raise RuntimeError(f"{name}: it must take under {LIMIT:g} s; {len(pipes)} processes hung; {advice}.")
    results = []
    for pipe in (pipe for pipe in pipes if pipe in ready):
        try:
            failed, found = pipe.recv()
        except (EOFError, ConnectionError):
            failed, found = True, "it ended"
        if failed:
            raise RuntimeError(f"{name}: all processes must run; rank {pipes.index(pipe)}: {found}; {advice}.")
        results.append(found)
    (result,) = results
    return result


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


def _serve(pipe: Connection, rank: int, world: int, store: str, work: Work, args: tuple[Any, ...]) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # gloo writes there
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world,
            timeout=datetime.timedelta(seconds=LIMIT),
        )
        for found in work(rank, *args):
            pipe.send((False, found))
    except Exception as error:
        with suppress(OSError):
            pipe.send((True, str(error).partition("\n")[0]))
    pipe.poll(None)  # until the parent ends it, or ends
