"""The page in a real browser, for tests: open it, read its tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Page

import normwise as nw

Open = Callable[..., Page]


@pytest.fixture
def opened(page: Page, tmp_path: Path) -> Iterator[Open]:
    """Opens the page of a comparison from disk, and fails if anything is fetched or goes to the console as an error."""
    wrong: list[str] = []
    page.context.set_offline(True)
    page.on("console", lambda m: wrong.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda r: wrong.append(r.url) if not r.url.startswith(("file:", "data:", "blob:")) else None)

    def go(link: str = "", comparison: Any = None, text: str = "") -> Page:
        path = tmp_path / "page.html"
        path.write_text(text or (comparison or nw.compare()).to_html(), encoding="utf-8")
        page.goto("about:blank")
        page.goto(f"{path.as_uri()}{link}")
        page.wait_for_selector("main")
        return page

    yield go
    assert not wrong


def numbers(page: Page, label: str) -> np.ndarray:
    """The table that a screen reader would call so."""
    rows = page.get_by_role("grid", name=label, exact=True).first.evaluate(
        "t => [...t.tBodies[0].rows].map(r => [...r.querySelectorAll('[role=gridcell]')]"
        ".map(c => c.querySelector('input')?.value ?? c.textContent))"
    )
    return np.array([[float(v.replace("\u2212", "-")) for v in row] for row in rows])
