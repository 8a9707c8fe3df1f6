"""One process for each number of threads: libraries take theirs when they are imported, or with their first call."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import click
import torch

from . import machine
from .cases import Selection, grid
from .measure import measure


@dataclass(frozen=True)
class Settings:
    """What a process is asked to measure."""

    selection: Selection
    candidates: list[str]
    budget: float
    seed: int


def measured(threads: int, settings: Settings) -> Iterator[dict[str, Any] | None]:
    """The lines of a process with so many threads, as they come; None if it ended early.

    JAX takes as many threads as the process may use processors, which it must know before it is imported.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(threads, settings, theirs))
    cores = machine.cores()
    pinned = hasattr(os, "sched_setaffinity") and threads < min(len(cores), torch.get_num_threads())
    try:
        if pinned:
            os.sched_setaffinity(0, cores[-threads:])  # a child inherits it; the first processors serve interrupts
        process.start()
    finally:
        if pinned:
            os.sched_setaffinity(0, cores)
    theirs.close()
    finished = False
    while not finished:
        try:
            record = ours.recv()
        except EOFError:
            click.echo(f"The run with {threads} threads ended early.", err=True)
            yield None
            break
        finished = record is None
        if not finished:
            yield record
    process.join()


def work(threads: int, settings: Settings, connection: Connection) -> None:
    """Measure the selected cases and send each line; None at the end."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    torch.set_num_threads(threads)
    cases = [case for case in grid() if case in settings.selection]
    start = time.perf_counter()
    for i, case in enumerate(cases):
        seconds = time.perf_counter() - start
        of = f"{threads} thread{'s' if threads > 1 else ''}"
        click.echo(f"{of} {i + 1}/{len(cases)} {seconds:.0f} s  {case}", err=True)
        connection.send(measure(case, settings.candidates, threads, settings.budget, settings.seed + i // 2))
    connection.send(None)
