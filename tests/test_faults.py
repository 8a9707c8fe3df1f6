"""What the others hear when a process ends, hangs, leaves out a layer or has another model; nothing is lost."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import Processes
from torch import Tensor, nn

import normwise as nw

TIMEOUT = 2.0
"""Seconds of the process group; a fault that needs it is heard soon after."""

model: nn.Sequential
"""Of this process, between two pieces of work."""


@pytest.fixture
def processes() -> Iterator[Processes]:
    """For a fault after which a group is of no use."""
    pool = Processes(2, TIMEOUT)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def reused() -> Iterator[Processes]:
    pool = Processes(2, TIMEOUT)
    yield pool
    pool.close()


def build(group: dist.ProcessGroup, channels: list[int], other: dict[str, Any] | None = None) -> None:
    """Linear layers and Batch Norms; the last process's norms are otherwise."""
    global model
    torch.manual_seed(0)
    last = dist.get_rank(group) == dist.get_world_size(group) - 1
    other = other if other and last else {}
    layers: list[nn.Module] = []
    for before, after in zip([4, *channels], channels, strict=False):
        layers += [nn.Linear(before, after), nn.BatchNorm1d(after, eps=other.get("eps", 1e-5))]
    if "channels" in other:
        width = other["channels"]
        layers[1:3] = [nn.Linear(channels[0], width), nn.BatchNorm1d(width), nn.Linear(width, channels[1])]
    model = nw.nn.SyncBatchNorm.convert(nn.Sequential(*layers), group)
    if "dtype" in other:
        model.to(other["dtype"])


def step(group: dist.ProcessGroup, skip: int | None = None, wait: float = 0.0) -> float:
    """A step of training; the last process leaves out a module, or comes late. Returns the seconds that it took."""
    start = time.monotonic()
    last = dist.get_rank(group) == dist.get_world_size(group) - 1
    if last:
        time.sleep(wait)
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(dist.get_rank(group)), dtype=model[0].weight.dtype)
    for i, module in enumerate(model):
        if not (last and i == skip):
            x = module(x)
    x.square().mean().backward()
    return time.monotonic() - start


def state(group: dist.ProcessGroup) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


def timed(processes: Processes, work: Any, *args: Any) -> list[Any]:
    start = time.monotonic()
    results = processes.run(work, *args)
    assert time.monotonic() - start < 4 * TIMEOUT
    return results


@pytest.mark.parametrize("channels", [[8, 8, 8], [8, 300, 8]], ids=str)
def test_a_left_out_layer_is_named_with_its_step(processes, channels):
    processes.all(build, channels)
    processes.all(step)
    before = processes.all(state)
    errors = timed(processes, step, 3)
    assert all(isinstance(error, RuntimeError) for error in errors), errors
    assert "forward 2 of SyncBatchNorm 2 (3)" in str(errors[0])
    assert "left out a layer" in str(errors[0])
    assert "forward 2 of SyncBatchNorm 3 (5)" in str(errors[1]) or channels[1] != channels[2]
    after = processes.all(state)
    for name in ("3.running_mean", "3.running_var", "3.num_batches_tracked", "0.weight"):
        assert torch.equal(before[0][name], after[0][name])  # what was not reached is as it was


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"eps": 1e-3}, ("eps 1e-05", "eps 0.001")),
        ({"dtype": torch.float64}, ("float32", "float64")),
        ({"channels": 5}, ("8 channels", "5 channels")),
    ],
    ids=str,
)
def test_another_model_is_refused_at_the_first_step(reused, other, words):
    reused.all(build, [8, 8], other)
    before = reused.all(state)
    for error in timed(reused, step):
        assert isinstance(error, ValueError), error
        assert "all processes must run the same layers" in str(error)
        assert all(word in str(error) for word in (*words, "rank 0", "rank 1"))
    for a, b in zip(before, reused.all(state), strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_process_that_ends_is_noticed(processes):
    processes.all(build, [8, 8])
    processes.all(step)
    before = processes.all(state)[0]
    processes.pipes[0].send((step, (), 2))
    time.sleep(0.5)  # rank 0 waits in the first layer
    os.kill(processes.processes[1].pid, signal.SIGKILL)
    assert processes.pipes[0].poll(4 * TIMEOUT)
    error = processes.pipes[0].recv()
    assert isinstance(error, RuntimeError)
    assert "forward 2 of SyncBatchNorm 1 (1)" in str(error)
    assert "ended, hung" in str(error)
    processes.pipes[0].send((state, (), 2))
    assert all(torch.equal(before[name], t) for name, t in processes.pipes[0].recv().items())


def test_a_process_that_hangs_is_noticed(processes):
    processes.all(build, [8, 8])
    processes.all(step)
    error, _ = processes.run(step, None, 2 * TIMEOUT)
    assert isinstance(error, RuntimeError)
    assert "forward 2 of SyncBatchNorm 1 (1)" in str(error)
    assert "2000ms" in str(error)
