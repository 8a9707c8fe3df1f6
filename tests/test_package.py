"""What the package is from outside: its names, what importing it costs, who imports whom, and its docstrings."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import normwise as nw

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "normwise"


FUNCTIONS = {name: getattr(nw.functional, name) for name in nw.functional.__all__}


def test_names_of_the_package() -> None:
    assert nw.__all__ == ["Comparison", "backends", "compare", "distributed", "functional", "nn", "record"]


def test_names_of_functional() -> None:
    assert nw.functional.__all__ == [
        "batch_norm",
        "batch_norm_relu",
        "fused_add_layer_norm",
        "fused_add_rms_norm",
        "group_norm",
        "instance_norm",
        "layer_norm",
        "normalize",
        "rms_norm",
        "sync_batch_norm",
    ]
    defined = {name for name, value in vars(nw.functional).items() if inspect.isfunction(value)}
    assert defined == set(FUNCTIONS)


def test_names_of_nn() -> None:
    assert nw.nn.__all__ == [
        "BatchNorm1d",
        "BatchNorm2d",
        "BatchNorm3d",
        "GroupNorm",
        "InstanceNorm1d",
        "InstanceNorm2d",
        "InstanceNorm3d",
        "LayerNorm",
        "LayerNorm2d",
        "RMSNorm",
        "SyncBatchNorm",
        "replace",
        "restore",
        "skipped",
    ]


@pytest.mark.parametrize("module", [nw, nw.functional, nw.nn], ids=["normwise", "normwise.functional", "normwise.nn"])
def test_names_exist(module: Any) -> None:
    assert all(hasattr(module, name) for name in module.__all__)


def test_version_is_the_one_of_the_changelog_and_citation() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    version, date = re.findall(r"^## \[(\d.*)\] - (\S+)$", changelog, re.MULTILINE)[0]
    assert version == nw.__version__
    assert f"\nversion: {version}\n" in citation
    assert f"\ndate-released: {date}\n" in citation


HEAVY = (
    "matplotlib",
    "pandas",
    "scipy",
    "sklearn",
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.tensor",
    "transformers",
    "triton",
)


def test_import_brings_in_nothing_heavy() -> None:
    """Only what `import torch` does not bring in by itself is counted."""
    code = "import sys, torch; before = set(sys.modules); import normwise; print(*set(sys.modules) - before)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    new = result.stdout.split()
    assert "normwise.functional" in new
    assert [name for name in new for heavy in HEAVY if f"{name}.".startswith(f"{heavy}.")] == []
    assert result.stderr == ""


FLOORS = [
    {"definitions", "exact_sum", "files"},
    {"exchange", "kernels", "reference"},
    {"ops"},
    {"checks", "dispatch"},
    {"functional"},
    {"nn"},
    {"distributed"},
    {"explain"},
    {""},
    {"lab"},
    {"cli"},
]
"""Who may import whom: a room imports those of the floors below it, never its own floor or one above.

``""`` is the package itself, whose ``__init__`` imports the rooms below and which those above may use like anyone.
"""

HEIGHT = {room: height for height, floor in enumerate(FLOORS) for room in floor}


def imported(path: Path) -> set[str]:
    """The rooms of the project that a file imports, wherever in the file it does so."""
    package = ["normwise", *path.relative_to(SOURCE).parts[:-1]]
    found: list[list[str]] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            found += [[*base, alias.name] for alias in node.names]
    return {parts[1] if len(parts) > 1 and parts[1] in HEIGHT else "" for parts in found if parts[0] == "normwise"}


def test_imported_understands_every_form() -> None:
    assert imported(SOURCE / "dispatch.py") == {"kernels", "ops", "reference", "definitions"}
    assert imported(SOURCE / "ops" / "layer_norm.py") >= {"ops", "reference"}


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_down_only(path: Path) -> None:
    room = path.relative_to(SOURCE).parts[0].removesuffix(".py").removesuffix("__init__")
    assert room in HEIGHT, f"{room} has no floor in the house"
    others = imported(path) - {room}
    assert [other for other in others if HEIGHT[other] >= HEIGHT[room]] == []
    if room == "reference":
        assert others == {"definitions"}


SECTIONS = ["Args", "Returns", "Raises", "Numerics", "Example", "References"]


def sections(value: Any) -> list[str]:
    return re.findall(r"^([A-Z]\w+):$", inspect.getdoc(value) or "", re.MULTILINE)


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_docstring_sections_of_functional(function: Callable[..., Any]) -> None:
    assert sections(function) == SECTIONS
    arguments = (inspect.getdoc(function) or "").partition("\nArgs:\n")[2].partition("\nReturns:\n")[0]
    documented = re.findall(r"^    \**(\w+):", arguments, re.MULTILINE)
    assert documented == list(inspect.signature(function).parameters)
    assert "arXiv:" in function.__doc__ or "https://" in function.__doc__


PUBLIC = {
    **{f"normwise.{name}": getattr(nw, name) for name in nw.__all__},
    **{f"normwise.nn.{name}": getattr(nw.nn, name) for name in nw.nn.__all__},
}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_have_docstrings(name: str) -> None:
    value = PUBLIC[name]
    assert value.__doc__
    assert value.__doc__[0].isupper()
    if inspect.isfunction(value):
        assert "Returns" in sections(value)
        assert ("Args" in sections(value)) == bool(inspect.signature(value).parameters) or name.endswith("skipped")
