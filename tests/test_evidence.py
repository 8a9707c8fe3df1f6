"""The committed evidence: complete, and what the pages say is what the numbers say."""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from normwise.lab import plots, results, table
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


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_no_words_of_a_plot_cover_others_or_leave_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Any] = []
    set_apart = plots.set_apart
    monkeypatch.setattr(plots, "set_apart", lambda figure: (figures.append(figure), set_apart(figure)))
    monkeypatch.setattr(plots.files, "write", lambda path, data: None)
    record = results.load(FOLDER, name)
    assert record is not None
    plots.draw(EXPERIMENTS[name], record.trials, FOLDER)
    (figure,) = figures
    figure.canvas.draw()
    for axes in figure.axes:
        words = [text.get_window_extent() for text in axes.texts if text.get_text()]
        ticks = [label.get_window_extent() for label in axes.get_xticklabels() if label.get_text()]
        for boxes in (words, ticks):
            assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
        assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in words)


def test_the_pages_are_written_from_the_results(writer: ModuleType) -> None:
    first, second = (table.rows(folder, list(EXPERIMENTS.values())) for folder in (FOLDER, FOLDER / "again"))
    page = re.sub(r"\n{3,}", "\n\n", writer.page(first, second))
    assert (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8") == page
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme == writer.readme(readme, first)
    assert (ROOT / "web" / "src" / "evidence.json").read_text(encoding="utf-8") == writer.quoted(first)


def test_a_readme_without_a_place_for_the_table_is_told(writer: ModuleType) -> None:
    with pytest.raises(ValueError, match="must have the lines"):
        writer.readme("# nothing\n", [])
