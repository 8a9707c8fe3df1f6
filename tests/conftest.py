"""What all tests share."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import cases
import pytest
import torch

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
