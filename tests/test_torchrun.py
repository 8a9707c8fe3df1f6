"""The distributed example under torchrun: the same training at any number of processes, and after a restart."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import MORE

SCRIPT = Path(__file__).parents[1] / "examples" / "distributed_digits.py"
STEPS = 4
Run = tuple[list[float], str]


def trained(world: int, *arguments: str, steps: int = STEPS) -> Run:
    """The losses of the steps, and the fingerprint of one norm's statistics."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"] if world > 1 else []
    result = subprocess.run(
        [sys.executable, *torchrun, str(SCRIPT), f"--steps={steps}", *arguments],
        capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return [float(loss) for loss in re.findall(r"loss (\S+)", result.stdout)], result.stdout.split()[-1]


@pytest.fixture(scope="module")
def one() -> Run:
    return trained(1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("whole") / "checkpoint"


@pytest.fixture(scope="module")
def two(checkpoint: Path) -> Run:
    return trained(2, f"--checkpoint={checkpoint}")


def alike(run: Run, one: Run) -> bool:
    return len(run[0]) == STEPS and max(abs(a - b) for a, b in zip(run[0], one[0], strict=True)) < 1e-10


@pytest.mark.parametrize("world", [2, *MORE])
def test_any_number_of_processes_trains_alike(world, one, two):
    run = two if world == 2 else trained(world)
    assert alike(run, one)
    assert run[1] == one[1]


def test_plain_batch_norm_drifts(one):
    losses, fingerprint = trained(2, "--norm=local")
    assert max(abs(a - b) for a, b in zip(losses, one[0], strict=True)) > 1e-4
    assert fingerprint != one[1]


def test_a_restart_goes_on_to_the_same_bits(tmp_path, two, checkpoint):
    parts = tmp_path / "checkpoint"
    trained(2, f"--checkpoint={parts}", steps=STEPS // 2)
    trained(2, f"--checkpoint={parts}")
    a, b = (torch.load(path) for path in (checkpoint, parts))
    assert a["step"] == b["step"] == STEPS
    assert all(torch.equal(t, b["model"][name]) for name, t in a["model"].items())
    momenta = [[s["momentum_buffer"] for s in f["optimizer"]["state"].values()] for f in (a, b)]
    assert all(torch.equal(p, q) for p, q in zip(*momenta, strict=True))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]  # written whole
