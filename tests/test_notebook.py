"""A comparison in a notebook: run, converted to HTML, looked at in a browser, and in a notebook that is not trusted."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import unescape
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbconvert import HTMLExporter
from playwright.sync_api import Page, expect

import normwise as nw

INLINE = "import matplotlib.pyplot\n%matplotlib inline"
BATCH = [[2, 4, 6], [3, 5, 7], [1, 3, 5], [4, 6, 14]]


@pytest.fixture(scope="module")
def notebook(tmp_path_factory: pytest.TempPathFactory) -> Iterator[nbformat.NotebookNode]:
    """One that has run, with nothing of this machine's settings."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HOME", "IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
            patch.setenv(name, str(home))
        book = nbformat.v4.new_notebook()
        sources = [
            f"import normwise as nw\nnw.compare({BATCH})",
            "nw.compare().plot()",
            INLINE,
            "nw.explain.cube('n c -> c')",
        ]
        book.cells = [nbformat.v4.new_code_cell(source) for source in sources]
        NotebookClient(book, timeout=60, kernel_name="python3").execute()
        yield book


def shown(book: nbformat.NotebookNode, cell: int = 0) -> nbformat.NotebookNode:
    (output,) = book.cells[cell].outputs
    return output.data


def test_what_a_notebook_stores(notebook: nbformat.NotebookNode) -> None:
    """Text for terminals, the page for browsers, and nothing that no notebook would show."""
    data = shown(notebook)
    assert sorted(data) == ["text/html", "text/plain"]
    assert data["text/plain"] == nw.compare(BATCH).to_text()
    nbformat.validate(notebook)


@pytest.mark.parametrize("cell", [1, 3], ids=["without pyplot", "with pyplot"])
def test_a_figure_is_shown_once(notebook: nbformat.NotebookNode, cell: int) -> None:
    assert sorted(shown(notebook, cell)) == ["image/png", "text/plain"]


def converted(book: nbformat.NotebookNode) -> str:
    return HTMLExporter(embed_images=True).from_notebook_node(book)[0]


@pytest.fixture
def offline(page: Page) -> Iterator[Page]:
    """A browser without a network; whatever goes wrong on the page fails the test."""
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.route(re.compile("^https?:"), lambda route: route.fulfill(body=""))
    yield page
    assert wrong == []


def test_converted_to_html_it_still_computes(notebook: nbformat.NotebookNode, offline: Page, tmp_path: Path) -> None:
    html = converted(notebook)
    (document,) = re.findall(r'<iframe class="nw-frame"[^>]* srcdoc="([^"]*)"', html)
    assert unescape(document) == nw.compare(BATCH).to_html()
    (tmp_path / "notebook.html").write_text(html, encoding="utf-8")
    offline.goto((tmp_path / "notebook.html").as_uri())
    frame = offline.frame_locator("iframe.nw-frame")
    value = frame.locator("input").locator("visible=true").first
    expect(value).to_be_visible()
    assert frame.locator("#static").count() == 0
    expect(offline.locator(".nw-static")).to_be_hidden()
    before = frame.locator("body").inner_text()
    value.fill("9")
    value.press("Enter")
    expect(frame.locator("body")).not_to_have_text(before, use_inner_text=True)


def untrusted(html: str, *tags: str) -> str:
    """Without these elements, as sanitizers leave them out."""
    for tag in tags:
        html = re.sub(rf"<{tag}\b.*?</{tag}>", "", html, flags=re.DOTALL)
        assert f"<{tag}" not in html
    return html


@pytest.mark.parametrize("removed", [["iframe", "style"], ["iframe"]], ids=" and ".join)
def test_not_trusted_it_still_holds_the_numbers(
    notebook: nbformat.NotebookNode, offline: Page, removed: list[str]
) -> None:
    """JupyterLab and GitHub remove frames and styles; the tables are there and seen."""
    offline.set_content(untrusted(shown(notebook)["text/html"], *removed))
    expect(offline.get_by_role("cell", name="-0.447", exact=True).first).to_be_visible()
    for t in nw.compare(BATCH).traces:
        for y in t.y.flat:
            expect(offline.get_by_role("cell", name=f"{y + 0:.3f}", exact=True).first).to_be_visible()
