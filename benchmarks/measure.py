"""How a case is measured: checked first, then timed in turns."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .cases import Case, Problem, draw
from .op import Tensors, Unavailable
from .peers import Candidate, candidate, reason

SAMPLE = 200e-6
"""Seconds that one sample lasts at least, so that the clock does not matter: short calls are repeated within it."""

PAUSE = 2e-3
"""Seconds between two candidates, in which the threads of the one before stop waiting actively."""

LONG = 5e-3
"""Seconds of a call beside which waking threads takes no time."""

FEWEST, MOST = 7, 200
"""Samples of one candidate."""

RIGHT = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}
"""Relative L2 error above which a result is wrong rather than inexact: twenty times what rounding once costs in half
precision; in float32 more, for sums over 10^5 values that cancel. Tests hold normwise to far lower bounds."""

FLIPPED = {torch.float32: 5e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""The same for gradients behind ReLU, which jump: a rounding turns one value in 10^7, or one in 10^3 if each step of a
library rounds to bfloat16, to the other side of zero."""

Samples = dict[str, list[float]]


def measure(case: Case, names: list[str], threads: int, budget: float, seed: int) -> dict[str, Any]:
    """Check and time every candidate on one case.

    Args:
        case: What to run.
        names: The candidates; ``normwise`` is one of them.
        threads: How many each may use.
        budget: Seconds for each candidate.
        seed: Of the random numbers.

    Returns:
        The case's line as JSON: for each candidate the quartiles of its time and its errors, or why it has none.
    """
    problem = draw(case.forward_only, seed)
    found: dict[str, dict[str, Any]] = {}
    ready: dict[str, Candidate] = {}
    for name in names:
        try:
            ready[name] = candidate(name, case, problem, threads)
            found[name] = {"errors": checked(ready[name], problem)}
        except Exception as error:  # what a library throws when it is first called is why it cannot
            ready.pop(name, None)
            found[name] = {"unavailable": str(error) if isinstance(error, Unavailable) else reason(error)}
            continue
        found[name]["wrong"] = wrong(case, found[name]["errors"])
        if name == "normwise" and found[name]["wrong"]:
            del ready[name]  # what is not right has no time
    for name, (samples, loops) in timed(ready, budget).items():
        found[name] |= summary(samples) | {"calls_a_sample": loops}
    return description(case, threads) | {"candidates": found}


def description(case: Case, threads: int) -> dict[str, Any]:
    """What a line of the table is about."""
    return {
        "op": case.op.name,
        "model": case.model,
        "shape": list(case.shape),
        "layout": case.layout,
        "dtype": case.type_name,
        "pass": case.passes,
        "threads": threads,
        "input_bytes": case.size,
        "moved_bytes": case.moved,
    }


def checked(candidate: Candidate, problem: Problem) -> dict[str, float | None]:
    """Relative L2 error of everything that a call gives, against the float64 reference; None if not finite."""
    results: Tensors = candidate.results()
    return {name: error(value, problem.truth[name]) for name, value in results.items()}


def error(value: Tensor, truth: Tensor) -> float | None:
    """Relative L2, or None where a value is not finite."""
    found = (torch.linalg.vector_norm(value.double() - truth) / torch.linalg.vector_norm(truth)).item()
    return figure(found, 3) if math.isfinite(found) else None


def wrong(case: Case, errors: dict[str, float | None]) -> bool:
    """Whether a result is further off than any rounding explains."""
    gradients = FLIPPED if "relu" in case.op.name else RIGHT
    bounds = {name: (gradients if name.startswith("d") else RIGHT)[case.dtype] for name in errors}
    return any(value is None or value > bounds[name] for name, value in errors.items())


def timed(candidates: dict[str, Candidate], budget: float) -> dict[str, tuple[list[float], int]]:
    """Seconds of a call in each sample of each candidate, and how many calls made a sample; they take turns."""
    calls = {name: candidate.call for name, candidate in candidates.items()}
    loops = {name: calls_a_sample(call) for name, call in calls.items()}
    wake = {name: elapsed(call, 1) < LONG for name, call in calls.items()}
    samples: Samples = {name: [] for name in calls}
    collects = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        end = time.perf_counter() + budget * len(calls)
        for turn in range(MOST):
            if turn >= FEWEST and time.perf_counter() > end:
                break
            for name, call in calls.items():
                samples[name].append(sample(call, loops[name], wake[name]))
    finally:
        if collects:
            gc.enable()
    return {name: (samples[name], loops[name]) for name in calls}


def calls_a_sample(call: Callable[[], Any]) -> int:
    """How many calls last as long as a sample should."""
    for _ in range(2):
        call()
    loops = 1
    while True:
        seconds = elapsed(call, loops)
        if seconds * loops >= SAMPLE or loops >= 4096:
            return loops
        loops = max(loops + 1, min(10 * loops, round(1.2 * SAMPLE / max(seconds, 1e-9))))


def sample(call: Callable[[], Any], loops: int, wake: bool) -> float:
    """Seconds of a call, after a pause and, if it is short, a call that wakes the candidate's threads."""
    time.sleep(PAUSE)
    if wake:
        call()
    return elapsed(call, loops)


def elapsed(call: Callable[[], Any], loops: int) -> float:
    """Seconds of a call, the average of some in a row; what each gives is freed before the next."""
    turns = range(loops)
    start = time.perf_counter()
    for _ in turns:
        call()
    return (time.perf_counter() - start) / loops


def figure(value: float, digits: int = 5) -> float:
    """The digits that mean something."""
    return float(f"{value:.{digits}g}")


def summary(samples: list[float]) -> dict[str, Any]:
    """Median and quartiles in seconds."""
    first, median, third = (figure(seconds) for seconds in statistics.quantiles(samples, n=4, method="inclusive"))
    return {"median": median, "first_quartile": first, "third_quartile": third, "samples": len(samples)}
