"""The benchmark: that every operation is asked for rightly and judged rightly. How fast it is, is not tested."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from benchmarks import bench_group_norm, cases, gpu, measure, peers, report, verdict
from benchmarks.__main__ import main
from benchmarks.cases import OPS, Case, Selection

IMAGES = {"layer_norm_2d", "group_norm", "instance_norm"} | {name for name in OPS if name.startswith("batch_norm")}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(op: str, **what: Any) -> Case:
    shape = (2, 2 * bench_group_norm.GROUPS, 3, 3) if op in IMAGES else (5, 32)
    return Case(OPS[op], "tiny", shape, **{"dtype": torch.float32, **what})


def record(case: Case, **seconds: float) -> dict[str, Any]:
    quartiles = {name: {"median": t, "first_quartile": t, "third_quartile": t} for name, t in seconds.items()}
    return measure.description(case, 1) | {"candidates": quartiles}


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("op", "layout"), [(op, layout) for op in OPS for layout in (("NCHW", "NHWC") if op in IMAGES else ("",))]
)
def test_ours_and_torch_give_what_the_reference_gives(op: str, layout: str, dtype: torch.dtype, backward: bool) -> None:
    case = tiny(op, dtype=dtype, layout=layout, backward=backward)
    problem, leaves = cases.draw(case.forward_only, 7), [f"d{name}" for name in case.op.leaves]
    for name in ("normwise", "torch"):
        errors = measure.checked(peers.candidate(name, case, problem, 1), problem)
        assert list(errors) == [*case.op.gives, *(leaves if backward else [])]
        half = name == "torch" and dtype == torch.bfloat16  # some of its own steps are rounded to 8 bits
        assert half or not measure.wrong(case, errors), errors


def test_what_is_measured() -> None:
    found = measure.measure(tiny("layer_norm"), ["normwise", "torch", "copy"], 1, 0.0, seed=7)["candidates"]
    for name in found:
        assert found[name]["samples"] == measure.FEWEST
        assert 0 < found[name]["first_quartile"] <= found[name]["median"] <= found[name]["third_quartile"]


def test_the_truth_is_that_of_torch_in_float64() -> None:
    for op in OPS:
        case = tiny(op, dtype=torch.float64)
        problem = cases.draw(case, 3)
        found = peers.torch_eager(Case(**{**vars(case), "backward": True}), problem, 1).results()
        assert set(found) == set(problem.truth), op
        assert all(measure.error(found[name], problem.truth[name]) < 1e-12 for name in found), op


def test_a_wrong_result_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def off(case: Case, problem: cases.Problem, threads: int) -> peers.Candidate:
        right = peers.torch_eager(case, problem, threads)
        return peers.Candidate(right.call, lambda: {name: 1.001 * y for name, y in right.results().items()})

    monkeypatch.setitem(peers.CANDIDATES, "normwise", off)
    found = measure.measure(tiny("layer_norm"), ["normwise", "torch"], 1, 0.0, seed=7)
    assert found["candidates"]["normwise"]["wrong"]
    assert verdict.time(found, "normwise") is None
    assert "WRONG" in shown([found])


def test_a_peer_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(case: Case, problem: cases.Problem, threads: int) -> peers.Candidate:
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setitem(peers.CANDIDATES, "jax", fail)
    found = measure.measure(tiny("layer_norm"), ["normwise", "jax"], 1, 0.0, seed=7)
    assert found["candidates"]["jax"] == {"unavailable": "RuntimeError: no such kernel"}


def test_not_a_number_is_wrong() -> None:
    assert measure.error(torch.tensor([float("nan")]), torch.ones(1).double()) is None
    assert measure.wrong(tiny("layer_norm"), {"y": None})


def test_the_grid_has_every_operation_type_and_layout() -> None:
    grid = list(cases.grid())
    assert {case.op.name for case in grid} == set(OPS)
    assert {case.type_name for case in grid if case.op.name == "rms_norm"} == {"float32", "bfloat16", "float16"}
    assert {case.layout for case in grid if case.op.name == "group_norm"} == {"NCHW", "NHWC"}
    assert len(set(grid)) == len(grid)
    assert all(case.forward_only == before for before, case in zip(grid[::2], grid[1::2], strict=True))
    quick = [case for case in grid if case in Selection(quick=True)]
    assert {case.op.name for case in quick} == set(OPS)


def test_bytes() -> None:
    assert tiny("layer_norm").moved == 2 * 5 * 32 * 4
    assert tiny("rms_norm", dtype=torch.bfloat16, backward=True).moved == 5 * 5 * 32 * 2
    assert tiny("fused_add_layer_norm", backward=True).moved == 8 * 5 * 32 * 4


def test_what_is_promised() -> None:
    large = Case(OPS["layer_norm"], "large", (4096, 768), torch.float32)
    found = verdict.promises(record(large, normwise=1.0, torch=0.96, copy=0.8))
    assert {name: promise["holds"] for name, promise in found.items()} == {"eager": True, "copies": False}
    half = record(Case(OPS["layer_norm"], "large", (4096, 768), torch.bfloat16), normwise=1.0, torch=1.9, copy=0.9)
    assert {name: promise["holds"] for name, promise in verdict.promises(half).items()} == {
        "eager": True,
        "twice": False,
    }
    assert verdict.promises(record(tiny("layer_norm"), normwise=1.0, torch=0.5)) == {}


def test_means_are_geometric_and_know_the_fastest_peer() -> None:
    large = Case(OPS["layer_norm"], "large", (4096, 768), torch.float32)
    found = verdict.classes([record(large, normwise=1.0, torch=4.0, jax=2.0), record(large, normwise=1.0, torch=1.0)])
    assert found[0]["times_eager"] == pytest.approx(2.0)
    assert found[0]["times_fastest"] == pytest.approx(2**0.5)


def shown(records: list[dict[str, Any]]) -> str:
    console = Console(file=io.StringIO(), width=300)
    report.show(console, records)
    return console.file.getvalue()


def test_losing_cases_are_shown_like_the_others() -> None:
    large = Case(OPS["layer_norm"], "large", (4096, 768), torch.float32)
    text = shown([record(large, normwise=1e-3, torch=5e-4, copy=1e-3)])
    assert "1.00 ms" in text
    assert "0.50 ms" in text
    assert "<0.50" in text
    assert "FAIL eager 0.50<0.95" in text


def test_the_command_line(tmp_path: Path) -> None:
    asked = ["--only", "layer_norm", "--model", cases.SMALL, "--pass", "f", "--threads", "1", "--peers", "torch,copy"]
    result = CliRunner().invoke(main, [*asked, "--budget", "0", "--seed", "1", "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "torch eager" in result.stdout
    (path,) = tmp_path.glob("*-partial.json")
    found = json.loads(path.read_text())
    assert found["settings"]["seed"] == 1
    assert found["backends"]["cpu"]
    assert [set(case["candidates"]) for case in found["cases"]] == [{"normwise", "torch", "copy"}]


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        (["--only", "no_norm"], "it must be among layer_norm"),
        (["--threads", "0"], "it must be from 1 to"),
        (["--only", "instance_norm", "--dtype", "float16"], "no case is left"),
    ],
)
def test_what_cannot_be_run(asked: list[str], complaint: str) -> None:
    result = CliRunner().invoke(main, asked)
    assert result.exit_code == 2
    assert complaint in result.stderr


class Clock:
    """An event of a GPU, on the processor's clock."""

    def __init__(self, enable_timing: bool) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: Clock) -> float:
        return 1e3 * (end.at - self.at)


@pytest.mark.parametrize("op", gpu.GRID)
def test_the_script_for_a_gpu_measures(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Clock)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(gpu, "COLD", 1)
    monkeypatch.setattr(gpu, "CALLS", 2)
    monkeypatch.setattr(gpu, "TURNS", 3)
    monkeypatch.delitem(gpu.CANDIDATES, "compile")
    found = gpu.measure(tiny(op, backward=True), 7, "cpu")
    for which in ("forward", "backward"):
        for name in ("normwise", "torch", "copy"):
            low, high = found["candidates"][name][which]["quartiles"]
            assert 0 < low <= found["candidates"][name][which]["median"] <= high
        header, line = gpu.table([found], which)
        assert line.startswith(f"{op}, tiny, float32")
        assert header.split()[-2:] == ["quack", "apex"]
    assert found["moved_bytes"]["forward"] == cases.OPS[op].moved[0] * found["input_bytes"]
    assert "not installed" in found["candidates"]["apex"]["unavailable"]


def test_the_script_for_a_gpu_gives_no_time_to_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Clock)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setitem(gpu.CANDIDATES, "normwise", lambda case: lambda x, w, b: case.op.torch(x, w, b) * 1.1)
    for name in ("compile", "liger", "quack", "apex"):
        monkeypatch.delitem(gpu.CANDIDATES, name)
    found = gpu.measure(tiny("layer_norm", backward=True), 7, "cpu")
    assert "forward" not in found["candidates"]["normwise"]
    assert "wrong: " in list(gpu.table([found], "forward"))[1]


def test_the_script_for_a_gpu_needs_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(gpu.main, [])
    assert result.exit_code == 2
    assert "a CUDA device must be there" in result.output


def test_every_case_of_the_script_for_a_gpu_is_large_enough_to_measure_rates() -> None:
    small = {case.model for case in gpu.cases() if case.size < 64 * 2**20}
    assert small == {"decode 16"}
