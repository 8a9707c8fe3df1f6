"""Train a small CNN on digits with SyncBatchNorm, with as many processes as torchrun starts.

    torchrun --nproc-per-node 2 examples/distributed_digits.py

Every process takes each n-th example of the same global batches. The losses are those of one process, but for the order
in which other layers and the optimizer add; with ``--norm local`` each process normalizes its own examples, and they
drift. ``--checkpoint FILE`` goes on where a run before it ended, to the same bits.
"""

import argparse
import gc
import hashlib
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.nn  # before there is a group: it keeps the group that it finds, and its threads past the end
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import normwise as nw


def build() -> nn.Module:
    """Two convolutions with Batch Norm, in float64."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    ).double()  # fmt: skip


def save(path: Path, state: dict[str, object]) -> None:
    """Write the file whole or not at all."""
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


def fingerprint(tensors: list[Tensor]) -> str:
    return hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in tensors)).hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--norm", choices=("sync", "local"), default="sync", help="whose examples are one batch")
    parser.add_argument("--steps", type=int, default=20, help="of training")
    parser.add_argument("--batch", type=int, default=96, help="examples of all processes together")
    parser.add_argument("--checkpoint", type=Path, help="written after every step, read at the start if it is there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    else:  # without torchrun, one process
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    train(arguments)
    gc.collect()  # DistributedDataParallel is a cycle, and holds the group
    dist.destroy_process_group()  # joins the threads of a group that nothing holds; one left at the end could abort


def train(arguments: argparse.Namespace) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    digits = load_digits()
    images, labels = torch.tensor(digits.images).unsqueeze(1) / 16, torch.tensor(digits.target)
    model = build()
    model = nw.nn.SyncBatchNorm.convert(model) if arguments.norm == "sync" else nw.nn.replace(model)
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    first = 0
    if arguments.checkpoint and arguments.checkpoint.exists():
        state = torch.load(arguments.checkpoint)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]

    for step in range(first, arguments.steps):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(step))[: arguments.batch]
        mine = order[rank::world]
        loss = cross_entropy(parallel(images[mine]), labels[mine], reduction="sum") * world / arguments.batch
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total = loss.detach() / world
        dist.all_reduce(total)
        if rank == 0:
            print(f"step {step + 1:3} loss {total.item():.15f}")
            if arguments.checkpoint:
                done = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
                save(arguments.checkpoint, done)
        dist.barrier()

    norm = build()[1] if arguments.norm == "local" else nw.nn.SyncBatchNorm.convert(build())[1]
    x, dy = torch.randn(2, 96, 8, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x.requires_grad_()
    y = torch.zeros_like(dy)
    mine = norm(x[rank::world])
    mine.backward(dy[rank::world])
    y[rank::world] = mine.detach()
    for part in (y, x.grad):  # each process has its examples' and zeros
        dist.all_reduce(part)
    if rank == 0:
        print(f"{world} processes, {arguments.norm}; one norm on the same input: y, dx and running statistics", end=" ")
        print(fingerprint([y, x.grad, norm.running_mean, norm.running_var]))


if __name__ == "__main__":
    main()
