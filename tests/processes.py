"""Real processes, joined by gloo, that stay alive and do what they are sent."""

from __future__ import annotations

import datetime
import faulthandler
import multiprocessing
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

MORE = [int(count) for count in os.environ.get("NORMWISE_PROCESSES", "").split()]
"""Numbers of processes that `make test-distributed` tries besides."""

LIMIT = 60.0
"""Seconds after which processes hang: a piece of work needs a few."""


class Processes:
    """``world`` processes of one group, each with one thread; ``timeout`` seconds is the group's."""

    def __init__(self, world: int, timeout: float = 30.0) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        store = Path(self._folder.name) / "store"
        self.pipes, self.processes = [], []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, world, str(store), timeout), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, work: Callable[..., Any], *args: Any, ranks: int | None = None) -> list[Any]:
        """``work(group, *args)`` on the first ``ranks`` processes; what each returned, or the exception it raised."""
        chosen = list(range(len(self.pipes) if ranks is None else ranks))
        for rank in chosen:
            self.pipes[rank].send((work, args, len(chosen)))
        results: list[Any] = []
        for rank in chosen:
            try:
                if not self.pipes[rank].poll(LIMIT):
                    self.close()
                    raise AssertionError(f"rank {rank} did not answer within {LIMIT} s")
                results.append(self.pipes[rank].recv())
            except EOFError:
                self.processes[rank].join(LIMIT)
                results.append(f"ended with {self.processes[rank].exitcode}")
        return results

    def all(self, work: Callable[..., Any], *args: Any, ranks: int | None = None) -> list[Any]:
        """The same where none may fail."""
        results = self.run(work, *args, ranks=ranks)
        for rank, result in enumerate(results):
            if isinstance(result, BaseException):
                raise AssertionError(f"rank {rank}: {result}\n{getattr(result, 'text', '')}") from result
        return results

    def close(self) -> None:
        """End the processes, by their own ids."""
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
        self._folder.cleanup()


def _serve(pipe: Connection, rank: int, world: int, store: str, timeout: float) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error", FutureWarning)  # what torch has deprecated
    faulthandler.dump_traceback_later(LIMIT - 5)
    limit = datetime.timedelta(seconds=timeout)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=limit)
    groups = {ranks: dist.new_group(range(ranks), timeout=limit) for ranks in range(1, world + 1)}
    while True:
        try:
            work, args, ranks = pipe.recv()
        except EOFError:
            break
        try:
            result = work(groups[ranks], *args)
        except Exception as error:
            result = error
            result.text = traceback.format_exc()  # type: ignore[attr-defined]
        pipe.send(result)
        faulthandler.dump_traceback_later(LIMIT - 5)
