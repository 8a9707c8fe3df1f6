"""Measure what SyncBatchNorm costs beside Batch Norm of one process; prints the table as docs/distributed.md has it.

    torchrun --nproc-per-node 2 docs/measured_exchange.py

Each process has one thread and a batch of the shape. The exact message is what SyncBatchNorm sends each way; the plain
one, count, mean and variance of each channel in float64, gathered, is what a merge without exact sums would send.
"""

import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

import normwise as nw

SHAPES = ((32, 64, 56, 56), (32, 256, 14, 14), (32, 512, 7, 7), (32, 2048, 7, 7), (256, 1024))
REPEATS = 41


def median_of_turns(candidates: list[Callable[[], object]]) -> list[float]:
    """Milliseconds of each, which take turns; the slowest process counts."""
    seconds: list[list[float]] = [[] for _ in candidates]
    for _ in range(REPEATS):
        for call, found in zip(candidates, seconds, strict=True):
            dist.barrier()
            start = time.perf_counter()
            call()
            found.append(time.perf_counter() - start)
    medians = torch.tensor([statistics.median(found[2:]) for found in seconds])
    dist.all_reduce(medians, dist.ReduceOp.MAX)
    return (1e3 * medians).tolist()


def candidates(shape: tuple[int, ...]) -> list[Callable[[], object]]:
    """Both layers' forward and backward, and both messages one way."""
    channels = shape[1]
    x, dy = torch.randn(shape, requires_grad=True), torch.randn(shape) + 0.5
    plain = nw.nn.BatchNorm2d(channels) if len(shape) == 4 else nw.nn.BatchNorm1d(channels)
    synchronized = nw.nn.SyncBatchNorm(channels)
    exact, few = torch.zeros(channels * 45 + 1, dtype=torch.int64), torch.zeros(3 * channels, dtype=torch.float64)
    theirs = [torch.empty_like(few) for _ in range(dist.get_world_size())]
    return [
        lambda: torch.autograd.grad(plain(x), x, dy),
        lambda: torch.autograd.grad(synchronized(x), x, dy),
        lambda: dist.all_reduce(exact),
        lambda: dist.all_gather(theirs, few),
    ]


def main() -> None:
    """Print a line for each shape."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    torch.manual_seed(dist.get_rank())
    if dist.get_rank() == 0:
        print(f"normwise on {nw.backends()['cpu']}, torch {torch.__version__}, {dist.get_world_size()} processes")
        print("| x of each process, float32 | Batch Norm, ms | SyncBatchNorm | exact message | plain message |")
        print("|---|---|---|---|---|")
    for shape in SHAPES:
        found = median_of_turns(candidates(shape))
        if dist.get_rank() == 0:
            print(f"| {shape} | " + " | ".join(f"{ms:.2f}" for ms in found) + " |")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
