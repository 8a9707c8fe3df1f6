"""Norms on a GPU, checked and timed beside their peers in one run of a few minutes: ``python -m benchmarks.gpu``.

Device time is between two events around a call, after the cache was filled with other data; the median of some calls,
libraries taking turns. Call time is what the processor spends on a call. Rates are those of the bytes that an operation
must move, beside a copy of as many bytes in the same run. Tables come last, losing cases like winning ones.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import click
import torch
from torch import Tensor

from . import machine
from .__main__ import RESULTS
from .bench_layer_norm import RMS_EPS
from .cases import OPS, Case, Problem, draw
from .measure import checked, figure, wrong
from .op import EPS, Unavailable
from .peers import eager, reason

TURNS = 25
"""Samples of one candidate."""

COLD = 256 * 2**20
"""Bytes that are written between two calls, several times what the cache of a GPU holds."""

CALLS = 200
"""Calls in a row whose time on the processor is measured."""

Shape = tuple[str, tuple[int, ...], str]
HALF, FULL = torch.bfloat16, torch.float32

TOKENS: list[Shape] = [
    ("Llama", (16384, 4096), ""),
    ("BERT-base", (65536, 768), ""),
    ("QK-norm", (524288, 128), ""),
    ("long row", (1024, 65536), ""),
]
IMAGES: list[Shape] = [(f"{name} {layout}", shape, layout) for name, shape in (
    ("ResNet-50 1", (256, 64, 56, 56)), ("ResNet-50 3", (1024, 256, 14, 14)),
) for layout in ("NCHW", "NHWC")]  # fmt: skip
UNET: list[Shape] = [(f"SD UNet 64 {layout}", (32, 320, 64, 64), layout) for layout in ("NCHW", "NHWC")]

GRID: dict[str, list[Shape]] = {
    "layer_norm": [*TOKENS, ("decode 16", (16, 4096), "")],
    "rms_norm": TOKENS,
    "fused_add_layer_norm": TOKENS[:1],
    "fused_add_rms_norm": TOKENS[:2],
    "layer_norm_2d": [("ConvNeXt-T 1 NCHW", (256, 96, 56, 56), "NCHW")],
    "group_norm": UNET,
    "instance_norm": [("nnU-Net 3", (16, 128, 32, 32, 32), "NCDHW")],
    "batch_norm training": IMAGES,
    "batch_norm eval": IMAGES[:2],
    "batch_norm_relu": IMAGES[:2],
    "batch_norm_relu residual": IMAGES[:2],
}


@dataclass(frozen=True)
class Timed:
    """One candidate on one pass of one case."""

    forward: Callable[[], Any]
    backward: Callable[[], Any]


def cases() -> Iterator[Case]:
    """Forward and backward of one are measured together."""
    for op, shapes in GRID.items():
        for model, shape, layout in shapes:
            for dtype in (HALF, FULL):
                yield Case(OPS[op], model, shape, dtype, layout, backward=True)


def liger(case: Case) -> Callable[..., Any]:
    """Liger-Kernel's functions."""
    from liger_kernel.transformers import functional as lf

    found = {
        "layer_norm": lambda x, w, b: lf.liger_layer_norm(x, w, b, EPS),
        "rms_norm": lambda x, w: lf.liger_rms_norm(x, w, RMS_EPS),
        "fused_add_rms_norm": lambda x, r, w: lf.liger_fused_add_rms_norm(x, r, w, RMS_EPS),
    }
    return known(found, case, "Liger-Kernel")


def quack(case: Case) -> Callable[..., Any]:
    """QuACK's functions."""
    import quack as q

    found = {"rms_norm": lambda x, w: q.rmsnorm(x, w, eps=RMS_EPS)}
    return known(found, case, "QuACK")


def apex(case: Case) -> Callable[..., Any]:
    """Apex's functions."""
    from apex.normalization import fused_layer_norm as fused

    found = {
        "layer_norm": lambda x, w, b: fused.fused_layer_norm_affine(x, w, b, w.shape, EPS),
        "rms_norm": lambda x, w: fused.fused_rms_norm_affine(x, w, w.shape, RMS_EPS),
    }
    return known(found, case, "apex")


def known(found: dict[str, Callable[..., Any]], case: Case, library: str) -> Callable[..., Any]:
    """A library's function for the case.

    Raises:
        Unavailable: If it has none.
    """
    if case.op.name not in found:
        raise Unavailable(f"{library} has no {case.op.name}")
    return found[case.op.name]


CANDIDATES: dict[str, Callable[[Case], Callable[..., Any]]] = {
    "normwise": lambda case: case.op.normwise,
    "torch": lambda case: case.op.torch,
    "compile": lambda case: torch.compile(case.op.torch, dynamic=False),
    "liger": liger,
    "quack": quack,
    "apex": apex,
}


def passes(function: Callable[..., Any], case: Case, problem: Problem) -> Timed:
    """Forward without and backward after a forward with gradients; what forward kept is kept between the calls."""
    leaves = set(case.op.leaves)
    tensors = {name: tensor.detach().clone().requires_grad_(name in leaves) for name, tensor in problem.tensors.items()}
    plain = [tensor.detach() for tensor in tensors.values()]
    outputs = function(*tensors.values())
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    wanted, dys = [tensors[name] for name in case.op.leaves], list(problem.cotangents.values())

    def forward() -> Any:
        with torch.no_grad():
            return function(*plain)

    def backward() -> Any:
        return torch.autograd.grad(outputs, wanted, dys, retain_graph=True)

    return Timed(forward, backward)


def measure(case: Case, seed: int, device: str = "cuda") -> dict[str, Any]:
    """Check every candidate, then time all in turns."""
    problem = draw(case, seed, device)
    found: dict[str, dict[str, Any]] = {}
    ready: dict[str, Timed] = {}
    for name, function_of in CANDIDATES.items():
        torch._dynamo.reset()
        try:
            function = function_of(case)
            errors = checked(eager(function, case, problem), problem)
            found[name] = {"errors": errors, "wrong": wrong(case, errors)}
            if name != "normwise" or not found[name]["wrong"]:  # what is not right has no time
                ready[name] = passes(function, case, problem)
        except ImportError as error:
            found[name] = {"unavailable": f"not installed ({error})"}
        except Exception as error:  # what a library throws is why it cannot
            found[name] = {"unavailable": str(error) if isinstance(error, Unavailable) else reason(error)}
    forward, both = case.op.moved
    moved = {"forward": forward * case.size, "backward": (both - forward) * case.size}
    for which, count in moved.items():
        calls = {name: getattr(timed, which) for name, timed in ready.items()} | {"copy": copying(count, device)}
        for name, seconds in device_seconds(calls, device).items():
            found.setdefault(name, {})[which] = {
                "median": figure(statistics.median(seconds)),
                "quartiles": [figure(s) for s in statistics.quantiles(seconds, n=4)[::2]],
                "call": figure(call_seconds(calls[name])),
            }
    return {
        "op": case.op.name,
        "model": case.model,
        "shape": list(case.shape),
        "dtype": case.type_name,
        "input_bytes": case.size,
        "moved_bytes": moved,
        "candidates": found,
    }


def copying(count: int, device: str) -> Callable[[], Any]:
    """A copy that reads and writes so many bytes together."""
    source = torch.empty(count // 2, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def device_seconds(calls: dict[str, Callable[[], Any]], device: str) -> dict[str, list[float]]:
    """Seconds on the device of each call, in turns, each with a cold cache."""
    other = torch.empty(COLD, dtype=torch.uint8, device=device)
    events: dict[str, list[tuple[Any, Any]]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(TURNS):
        for name, call in calls.items():
            other.zero_()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    return {name: [start.elapsed_time(end) / 1e3 for start, end in pairs] for name, pairs in events.items()}


def call_seconds(call: Callable[[], Any]) -> float:
    """Seconds of the processor for a call; those of the device if these are more."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    seconds = (time.perf_counter() - start) / CALLS
    torch.cuda.synchronize()
    return seconds


def table(records: list[dict[str, Any]], which: str) -> Iterator[str]:
    """One pass: our time, rate and share of the copy's, then the others' time as a multiple of ours."""
    peers = [name for name in CANDIDATES if name != "normwise"]
    yield f"{which:44}{'ours, us':>10}{'GB/s':>8}{'of copy':>9}" + "".join(f"{name:>9}" for name in peers)
    for record in records:
        found = record["candidates"]
        label = f"{record['op']}, {record['model']}, {record['dtype']}"
        if which not in found["normwise"]:
            yield label.ljust(46) + (found["normwise"].get("unavailable") or f"wrong: {found['normwise']['errors']}")
            continue
        ours = found["normwise"][which]["median"]
        share = found["copy"][which]["median"] / ours
        ratios = (
            f"{found[name][which]['median'] / ours:>8.2f}{'!' if found[name].get('wrong') else ' '}"
            if which in found[name] else f"{'-':>9}"
            for name in peers
        )  # fmt: skip
        rate = record["moved_bytes"][which] / ours / 1e9
        yield f"{label:44}{1e6 * ours:>10.1f}{rate:>8.0f}{100 * share:>8.0f}%" + "".join(ratios)


@click.command()
@click.option("--minutes", default=7.0, help="After so many no further case begins; those left out are named.")
@click.option("--only", default="", help="Operations, between commas.")
@click.option("--seed", default=0, help="Of the random numbers.")
def main(minutes: float, only: str, seed: int) -> None:
    """Check and time every norm on this machine's GPU beside its peers."""
    if not torch.cuda.is_available():
        click.echo("bench-gpu: a CUDA device must be there; none is; run it on a machine that has one.", err=True)
        sys.exit(2)
    start, records, left = time.perf_counter(), [], []
    names = [name.strip() for name in only.split(",") if name.strip()]
    for i, case in enumerate(cases()):
        if names and case.op.name not in names:
            continue
        if time.perf_counter() - start > 60 * minutes:
            left.append(str(case))
            continue
        click.echo(f"{time.perf_counter() - start:4.0f} s  {case}", err=True)
        records.append(measure(case, seed + i))
        torch.cuda.empty_cache()
    device = torch.cuda.get_device_name()
    found = {**machine.describe(), "gpu": device, "left_out": left, "records": records}
    path = RESULTS / f"{'-'.join(device.lower().split())}.json"
    path.write_text(f"{json.dumps(found, indent=1)}\n", encoding="utf-8")
    reasons = {
        f"{record['op']}: {name}: {why}"
        for record in records
        for name, candidate in record["candidates"].items()
        if (why := candidate.get("unavailable"))
    }
    click.echo("\n".join(sorted(reasons)), err=True)
    for case_left in left:
        click.echo(f"left out: {case_left}", err=True)
    for which in ("forward", "backward"):
        click.echo("\n".join(table(records, which)) + "\n")
    click.echo(f"{device}; peers: their time by ours; ! a result that is further off than rounding explains")


if __name__ == "__main__":
    main()
