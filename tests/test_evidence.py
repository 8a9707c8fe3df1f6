"""The committed evidence: complete, and what the pages say is what the numbers say."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

from normwise.lab import results, table
from normwise.lab.experiments import EXPERIMENTS

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "evidence"


@pytest.fixture
def writer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("write_evidence", ROOT / "docs" / "write_evidence.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_has_run_at_standard_size(name: str) -> None:
    record = results.load(FOLDER, name)
    assert record is not None
    assert record.complete
    assert record.plan.size == "standard"
    assert {path.suffix for path in FOLDER.glob(f"{name}.*")} == {".json", ".svg", ".png"}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_verdict_in_the_file_is_the_one_of_its_numbers(name: str) -> None:
    (row,) = table.rows(FOLDER, [EXPERIMENTS[name]])
    found = json.loads(results.path_of(FOLDER, name).read_text(encoding="utf-8"))
    assert found["verdict"] == row.verdict
    assert found["finding"]["effect"]["value"] == pytest.approx(row.finding.effect.value)


def test_the_pages_are_written_from_the_results(writer: ModuleType) -> None:
    first, second = (table.rows(folder, list(EXPERIMENTS.values())) for folder in (FOLDER, FOLDER / "again"))
    page = re.sub(r"\n{3,}", "\n\n", writer.page(first, second))
    assert (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8") == page
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme == writer.readme(readme, first)


def test_a_readme_without_a_place_for_the_table_is_told(writer: ModuleType) -> None:
    with pytest.raises(ValueError, match="must have the lines"):
        writer.readme("# nothing\n", [])
