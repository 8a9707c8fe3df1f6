"""The page: what was built into ``page.html``, with data put into it, and static tables for where no script runs."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from html import escape, unescape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import as_json, html, labels

if TYPE_CHECKING:
    from .comparison import Comparison

HEIGHT = "46rem"  # of the frame in a notebook, whose corner can be dragged


def render(c: Comparison, recording: Mapping[str, Any] | None = None) -> str:
    """The whole page about a comparison; ``recording`` is one to replay, as plain data."""
    data = ["the batch" if c.x.size <= as_json.WHOLE else "a corner of the batch", "what was computed from it"]
    static = html.fragment(c) + embeds(*data, *([] if recording is None else ["a recording"]))
    return document(c.name, static, as_json.render(c, indent=None), recording)


def document(name: str, static: str, comparison: str, recording: Mapping[str, Any] | None) -> str:
    """The page with this name in its title, these tables where no script runs, and this JSON to show."""
    found = built()
    for before, after in (
        ("<title>normwise</title>", f"<title>{escape(f'normwise: {name}')}</title>"),
        ('<div id="static"></div>', f'<div id="static">{static}</div>'),
        (_data("comparison", "null"), _data("comparison", comparison)),
        (_data("recording", "null"), _data("recording", json.dumps(recording, allow_nan=False))),
    ):
        found = found.replace(before, after)
    return found


def embeds(*what: str) -> str:
    """What the reader must know before passing a page on."""
    return (
        f'<p class="nw notes">This file embeds {labels.listed(what)} (as JSON): '
        "share it only where you would share the data.</p>"
    )


def in_notebook(page: str, static: str, title: str) -> str:
    """The page in a frame of its own, and static tables that show where a notebook is not trusted with frames.

    The rule that hides the tables needs the frame beside them: whatever a notebook removes, one of both is seen.
    """
    return (
        "<style>.nw-frame + .nw-static { display: none }</style>"
        f'<iframe class="nw-frame" title="{escape(title)}" sandbox="allow-scripts allow-downloads" '
        f'style="width: 100%; height: {HEIGHT}; border: 0; resize: vertical" srcdoc="{escape(page)}"></iframe>'
        f'<div class="nw-static">{static}</div>'
    )


def policy() -> str:
    """The Content-Security-Policy that the page states: its own script by its hash, and nothing from outside."""
    stated = re.search(r'http-equiv="Content-Security-Policy"\s+content="([^"]*)"', built())
    assert stated is not None  # a test holds the built page to it
    return unescape(stated[1])


@cache
def built() -> str:
    """The page without data."""
    return Path(__file__).with_name("page.html").read_text(encoding="utf-8")


def _data(name: str, json_text: str) -> str:
    """A script element with JSON that cannot end it."""
    escaped = json_text.replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{escaped}</script>'
