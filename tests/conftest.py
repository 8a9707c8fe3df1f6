"""What all tests share."""

from __future__ import annotations

import zlib

import cases
import pytest
import torch


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    """The same numbers for a test whatever else runs, and others for each test."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(params=cases.BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each implementation that the contract holds for."""
    return request.param
