"""What the page on gradient accumulation says of Batch Norm: what is exact, what is not, and in how many passes."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("sklearn")  # the digits

DOCS = Path(__file__).parents[1] / "docs"
STEPS = 5
EXACT = 1e-13
"""For float64: convolutions of 16 and of 64 examples add in another order."""


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("measured_accumulation", DOCS / "measured_accumulation.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


measured = script()
ROWS = {
    row[0].strip(" *"): row[1:]
    for line in (DOCS / "gradient-accumulation.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("| ") and len(row := [cell.strip() for cell in line.strip("|").split("|")]) == len(measured.HEAD)
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """For networks so small that threads wait for each other longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def errors(name: str, depth: int, dtype: torch.dtype = torch.float64) -> list[float]:
    return measured.errors(name, depth, 0, dtype, STEPS)


@pytest.mark.parametrize("depth", measured.DEPTHS)
@pytest.mark.parametrize(
    "name",
    [
        "statistics and gradient passes",
        "activation checkpointing",
        "Group Norm, accumulated",
        "Layer Norm, accumulated",
    ],
)
def test_exact(name: str, depth: int) -> None:
    assert max(errors(name, depth)) < EXACT
    assert max(errors(name, depth, torch.float32)) < 1e-5


@pytest.mark.parametrize("depth", measured.DEPTHS)
def test_not_exact(depth: int) -> None:
    plain, constant = errors("plain accumulation", depth), errors("statistics passes", depth)
    assert min(plain[1:]) > 1e-2
    assert max(constant[:2]) < EXACT
    assert constant[2] > 2 * plain[2]  # an exact forward, and a gradient worse than without it
    assert errors("running statistics", depth)[2] > plain[2]


@pytest.mark.parametrize("depth", measured.DEPTHS)
def test_running_statistics_move_once_as_by_the_big_batch(depth: int) -> None:
    model = measured.trained(depth, measured.BATCH_NORM, 0, STEPS)
    in_parts = measured.of_kind(model, depth, measured.IN_PARTS, torch.float64)
    model = copy.deepcopy(model)
    x, target = measured.batch(0)
    measured.in_one(model, x, target)
    measured.exact(in_parts, x, target)
    for expected, found in zip(model.buffers(), in_parts.buffers(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("name", measured.APPROACHES)
def test_the_page_counts_the_passes(name: str) -> None:
    forward, backward = zip(*(measured.passes(name, depth) for depth in measured.DEPTHS), strict=True)
    where = measured.HEAD.index("forward") - 1
    assert ROWS[name][where : where + 2] == [" / ".join(f"{n:g}" for n in count) for count in (forward, backward)]
    if name == "statistics and gradient passes":
        assert forward == tuple((n + 1) / 2 + n + 1 for n in measured.DEPTHS)
        assert backward == tuple((n + 1) / 2 for n in measured.DEPTHS)
