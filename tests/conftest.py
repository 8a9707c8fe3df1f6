"""What all tests share."""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, which torch's compiler does too

import cases

collect_ignore = [
    "compiled.py",
    "gpu.py",
    "interpreted.py",
    "interpreter.py",
]  # they change what triton does when imported

torch.manual_seed(0)  # for what is drawn while tests are collected


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every", type=int, default=1, help="run one of so many tests, in equal steps")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    step = config.getoption("--every")
    if step > 1:
        config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i % step])
        items[:] = items[::step]


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    """The same numbers for a test whatever else runs, and others for each test."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory of ``torch.empty`` holds NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def _one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """Experiments run small operations: beside another test's threads, their own would mostly wait."""
    before = torch.get_num_threads()
    if request.node.path.name.startswith("test_lab_"):
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def backend() -> str:
    """The implementation that the contract is tested on here; not in a test's name, which sets its random numbers."""
    return cases.BACKENDS[0]


@pytest.fixture(scope="session")
def browser_type_launch_args(browser_type_launch_args: dict[str, Any]) -> dict[str, Any]:
    """The machine's own Chromium, which looks for nothing on the network by itself."""
    quiet = ["--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update"]
    return {
        **browser_type_launch_args,
        "executable_path": shutil.which("chromium"),
        "chromium_sandbox": False,
        "args": [*quiet, "--disable-sync"],
    }


@pytest.fixture(scope="session")
def base_url() -> None:
    """Pages are files; in place of pytest-playwright's own, which pytest 9 warns of."""
