"""The page in a real browser: its numbers, its links, what it refuses, and that anyone can use it."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pages import Open, numbers, opened
from playwright.sync_api import Page, expect

import normwise as nw

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "src" / "normwise" / "explain" / "page.html"
WEB = ROOT / "web"
MAIN = ("poke", "number", "cube", "size", "eval", "shards", "future", "padding")
SCENES = (*MAIN, "backward", "jacobian", "blind", "conventions", "numerics", "recording")
LARGEST = 150_000  # bytes of the page without data

__all__ = ["opened"]  # a fixture


def show(page: Page, link: str) -> None:
    """Follow a link within the page, as the address bar does."""
    page.evaluate("link => { location.hash = link }", link)
    tab = "document.querySelector(`nav [data-scene=${new URLSearchParams(location.hash.slice(1)).get('scene')}]`)"
    page.wait_for_function(f"() => {tab}?.ariaCurrent === 'page'")


def downloaded(page: Page, name: str) -> bytes:
    page.get_by_text("More", exact=True).click()
    with page.expect_download() as found:
        page.get_by_role("button", name=name).click()
    page.get_by_text("More", exact=True).click()
    return Path(found.value.path()).read_bytes()


def test_the_worked_batch(opened: Open) -> None:
    page = opened()
    column = [-0.447, 0.447, -1.342, 1.342]
    np.testing.assert_array_equal(numbers(page, "Input"), [[2, 4, 6], [3, 5, 7], [1, 3, 5], [4, 6, 8]])
    np.testing.assert_array_equal(numbers(page, "Batch Norm, output"), np.transpose([column] * 3))
    np.testing.assert_array_equal(numbers(page, "Layer Norm, output"), [[-1.225, 0, 1.225]] * 4)
    expect(page.locator("footer").last).to_contain_text("62 numbers of Python's comparison again")


def test_an_edit_moves_the_column_and_keeps_the_other_rows(opened: Open) -> None:
    page = opened()
    page.get_by_label("s3, f2", exact=True).first.fill("14")
    page.keyboard.press("Tab")
    moved = numbers(page, "Batch Norm, output")
    np.testing.assert_array_equal(moved[:, 2], [-0.566, -0.283, -0.849, 1.697])
    np.testing.assert_array_equal(numbers(page, "Layer Norm, output")[3], [-0.926, -0.463, 1.389])
    expect(page.get_by_text("kept every bit")).to_be_visible()
    page.get_by_role("button", name="Undo").click()
    assert numbers(page, "Input")[3, 2] == 8
    page.get_by_role("button", name="Redo").click()
    assert numbers(page, "Input")[3, 2] == 14


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_page_computes_what_python_computes(opened: Open, data: st.DataObject) -> None:
    shape = data.draw(st.sampled_from([(4, 3), (2, 1), (5, 7), (2, 3, 4), (2, 4, 2, 3)]))
    offset, scale = data.draw(st.sampled_from([(0, 1), (5, 1e-3), (100, 1), (-3, 1e6)]))
    seed = data.draw(st.integers(0, 2**31))
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * scale + offset * scale
    channels = shape[-1] if len(shape) == 3 else shape[1]
    named = ["batch_norm", "layer_norm", "rms_norm"] + (["instance_norm"] if len(shape) == 4 else [])
    weight, bias = [1.5] + [-0.5] * (channels - 1), [0.25] * channels
    found = nw.compare(x, named, weight=weight, bias=bias)
    page = opened(comparison=found)
    assert page.get_by_role("alert").count() == 0
    numbers = json.loads(downloaded(page, "Download JSON"))
    for trace, norm in zip(found.traces, numbers["norms"], strict=True):
        assert norm["pattern"] == str(trace.norm.pattern)
        for ours, theirs in ((norm["y"], trace.y), (norm["xhat"], trace.xhat), (norm["statistics"]["var"], trace.var)):
            np.testing.assert_allclose(ours, theirs.reshape(-1), rtol=1e-12, atol=1e-12 * np.abs(theirs).max())


def test_a_norm_that_refuses_the_batch_is_named(opened: Open) -> None:
    page = opened(comparison=nw.compare([[1, 5], [2, 5], [3, 5]], "all"))
    expect(page.locator("#scene")).to_contain_text("instance_norm: 1 value per channel of an example has no variance")
    np.testing.assert_array_equal(numbers(page, "Group Norm, output"), numbers(page, "Layer Norm, output"))


def test_a_large_batch_is_shown_in_parts(opened: Open) -> None:
    x = np.arange(64 * 64.0).reshape(64, 64)
    page = opened(comparison=nw.compare(x))
    assert numbers(page, "Batch Norm, output").shape == (16, 8)
    page.get_by_role("slider", name="of 64 rows").fill("48")
    np.testing.assert_array_equal(numbers(page, "Input"), x[48:, :8])
    page.get_by_label("s63, f7", exact=True).first.focus()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_label("s63, f8", exact=True).first).to_be_focused()
    page.keyboard.type("7")
    page.keyboard.press("Enter")
    assert numbers(page, "Input")[15, 7] == 7
    page.get_by_role("button", name="Undo").click()
    np.testing.assert_array_equal(numbers(page, "Input"), x[48:, 1:9])


def test_of_a_batch_that_is_too_large_a_corner_is_shown_as_such(opened: Open) -> None:
    x = torch.randn(100, 80, dtype=torch.float64)
    page = opened(comparison=nw.compare(x))
    expect(page.get_by_text("The batch has 100 × 80 values")).to_be_visible()
    np.testing.assert_allclose(numbers(page, "Input"), x[:8, :8], atol=6e-4)
    y = nw.functional.normalize(x[:8, :8], "n c -> c")
    np.testing.assert_allclose(numbers(page, "Batch Norm, output"), y, atol=6e-4)


def test_a_wrong_number_in_the_file_is_shown(opened: Open) -> None:
    text = nw.compare().to_html()
    broken = text.replace("-1.2247425750014138", "-1.2247425750014", 1)
    assert broken != text
    assert (
        "-1.22474257"
        in opened(text=text.replace("-1.2247425750014138", "-1.22474257", 1)).get_by_role("alert").inner_text()
    )


@pytest.mark.parametrize(
    ("link", "said"),
    [
        ("#v=2&x=1,2;3,4", "version"),
        ("#v=1&x=1,NaN;3,4", "must be a number"),
        ("#v=1&x=1,1e999;3,4", "must be a number"),
        ("#v=1&x=1,2;3", "every row must have 2"),
        ("#v=1&x=" + ";".join(["1,2"] * 5000), "may have 4096 values"),
        ("#v=1&x=" + "1" * 70_000, "characters"),
        ("#v=1&x=<script>alert(1)</script>", "must be a number"),
        ("#v=1&scene=<img src=x onerror=alert(1)>", "scene"),
        ("#v=1&scene=constructor", "scene"),
        ("#v=1&cell=12", "cell"),
        ("#v=1&ranks=0", "ranks"),
        ("#v=1&text=../../x", "text"),
        ("#v=1&pattern=n c -> n c", "at least one axis"),
        ("#v=1&layout=nchw&shape=1,2,3&x=1,2", "shape"),
        ("#v=1&momentum=0", "momentum"),
        ("#v=1&steps=99999999999", "steps"),
        ("#v=1&x=%E0%A4%A", "is no text"),
        ("#__proto__=1", "version"),
    ],
)
def test_a_link_that_makes_no_sense_changes_nothing(opened: Open, link: str, said: str) -> None:
    page = opened(link)
    expect(page.get_by_role("alert")).to_contain_text(said)
    np.testing.assert_array_equal(numbers(page, "Input"), [[2, 4, 6], [3, 5, 7], [1, 3, 5], [4, 6, 8]])


def test_a_link_brings_everything_back(opened: Open) -> None:
    page = opened("#v=1&x=2,4,6;3,5,7;1,3,5;4,6,14&cell=5&scene=poke&type=large")
    assert numbers(page, "Input")[3, 2] == 14
    page.get_by_label("s1, f0", exact=True).first.fill("-2.5")
    page.keyboard.press("Tab")
    link = page.evaluate("location.hash")
    again = opened(link)
    assert numbers(again, "Input")[1, 0] == -2.5
    assert again.evaluate("location.hash") == link
    assert again.evaluate("document.documentElement.dataset.type") == "large"


@pytest.mark.parametrize(("width", "theme"), [(1280, "light"), (1280, "dark"), (320, "light"), (320, "dark")])
def test_anyone_can_use_every_scene(opened: Open, width: int, theme: str) -> None:
    axe = WEB / "node_modules" / "axe-core" / "axe.min.js"
    if not axe.exists():
        pytest.skip("axe-core is not installed: make page")
    page = opened("#v=1&x=2,4,6;3,5,7;1,3,5;4,6,9")
    page.emulate_media(color_scheme=theme, reduced_motion="reduce")  # type: ignore[arg-type]
    page.set_viewport_size({"width": width, "height": 800})
    page.evaluate(axe.read_text(encoding="utf-8"))
    wrong = {}
    for scene in SCENES:
        show(page, f"#v=1&x=2,4,6;3,5,7;1,3,5;4,6,9&scene={scene}")
        found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
        wide = page.evaluate("document.documentElement.scrollWidth - innerWidth")
        if found or wide > 0:
            wrong[scene] = [(v["id"], [n["target"] for n in v["nodes"]][:3]) for v in found], wide
    assert wrong == {}


def test_no_number_is_cut(opened: Open) -> None:
    """A number that is cut reads as another one: -5.931 as -5.9."""
    page = opened(comparison=nw.compare([[-5.931, 12345.678], [0.125, -0.001], [3, 1e-7]]))
    assert (
        page.evaluate("[...document.querySelectorAll('input')].filter(e => e.scrollWidth > e.clientWidth).length") == 0
    )
    page = opened()
    page.set_viewport_size({"width": 320, "height": 640})
    tables = "[...document.querySelectorAll('[role=grid]')].map(t => t.parentElement)"
    assert page.evaluate(f"{tables}.filter(e => e.scrollWidth > e.clientWidth).length") == 0


def test_on_a_phone_all_lines_are_seen_while_one_pulls(opened: Open) -> None:
    page = opened()
    page.set_viewport_size({"width": 360, "height": 640})
    boxes = [
        page.get_by_role("group", name=f"{name}, f0").bounding_box() for name in ("Input", "Batch Norm", "Layer Norm")
    ]
    tops = [box["y"] for box in boxes if box]
    assert len(tops) == 3
    assert max(box["y"] + box["height"] for box in boxes if box) - min(tops) < 640


def test_beads_say_whose_they_are(opened: Open) -> None:
    page = opened("#v=1&layout=nchw&shape=2,2,1,2&x=1,2;3,4;5,6;7,9")
    bead = page.get_by_role("slider", name="s1,h0,w1")
    assert bead.text_content() == "s1"
    inside = "g => g.querySelector('text').getBBox().width < g.querySelector('circle:last-of-type').getBBox().width"
    assert bead.evaluate(inside)


def test_each_pull_is_undone_by_itself(opened: Open) -> None:
    page = opened()
    bead = page.get_by_role("slider", name="s3")
    seen = []
    for _ in range(2):
        bead.hover()  # waits until it stands still
        box = bead.bounding_box()
        assert box is not None
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        below = page.get_by_role("grid", name="Input").bounding_box()
        page.mouse.down()
        page.mouse.move(x + 41, y, steps=4)
        page.mouse.up()
        assert page.get_by_role("grid", name="Input").bounding_box() == below  # nothing jumps meanwhile
        seen.append(numbers(page, "Input")[3, 0])
    assert 4 < seen[0] < seen[1]
    assert re.fullmatch(r"#v=1&x=2,4,6;3,5,7;1,3,5;[\d.]{1,6},6,8", page.evaluate("location.hash"))
    for value in (seen[0], 4):
        page.get_by_role("button", name="Undo").click()
        assert numbers(page, "Input")[3, 0] == value


@pytest.mark.parametrize(
    "batch",
    [
        "#v=1&x=1,2",
        "#v=1&x=1;2;3",
        "#v=1&x=5,5;5,5",
        "#v=1&layout=nlc&shape=2,2,2&x=1,2;3,4;5,6;7,9",
        "#v=1&layout=nchw&shape=1,2,2,2&x=1,2;3,4;5,6;7,9",
        "#v=1&x=" + ";".join(["1,2,3,4"] * 30),
    ],
)
def test_every_scene_takes_every_batch(opened: Open, batch: str) -> None:
    page = opened(batch)
    for scene in SCENES:
        show(page, f"{batch}&scene={scene}")
        assert page.get_by_role("alert").count() == 0, scene
        assert len(page.locator("#scene").inner_text()) > 40, scene
        assert "undefined" not in page.locator("#scene").inner_text(), scene


def test_a_lesson_hides_the_answer_until_one_predicts(opened: Open) -> None:
    page = opened("#v=1&hide=answers")
    assert "0.447" not in page.locator("#scene").inner_text()
    page.get_by_role("button", name="Under Batch Norm only").click()
    assert "−0.447" in page.locator("#scene").inner_text()


TOLD = {  # what answers the question of a scene
    "poke": "0.447", "number": "of one feature", "cube": "averaged away", "size": "−1.000", "eval": "−0.387",
    "shards": "within the processes", "future": "seen the future", "padding": "kept every bit", "backward": "whatever",
    "jacobian": "reach", "blind": "sees it", "conventions": "10 %", "numerics": "−8",
}  # fmt: skip


def test_no_scene_tells_before_one_predicts(opened: Open) -> None:
    page = opened("#v=1&hide=answers&text=the_car/sat_mat")
    for scene, answer in TOLD.items():
        show(page, f"#v=1&hide=answers&text=the_car/sat_mat&scene={scene}")
        said = "document.querySelector('#scene').innerText + "
        said += "[...document.querySelectorAll('#scene [aria-label]')].map(e => e.ariaLabel).join()"
        before = page.evaluate(said)
        page.locator("#scene fieldset button").first.click()
        assert (answer in before, answer in page.evaluate(said)) == (False, True), scene


def test_a_lesson_prints_as_a_sheet(opened: Open) -> None:
    page = opened("#v=1&hide=answers")
    page.emulate_media(media="print")
    assert not page.get_by_role("navigation").is_visible()
    assert not page.get_by_role("button").first.is_visible()
    said = page.locator("#scene").inner_text()
    assert "Under Layer Norm only" in said
    assert "2.5" not in said
    assert "mean" in said


def test_paper_is_light(opened: Open) -> None:
    page = opened()
    page.emulate_media(color_scheme="dark")
    look = (
        "[document.documentElement.dataset.theme, document.querySelector('td[role=gridcell]:not(.input)').style.color]"
    )
    page.wait_for_function("() => document.documentElement.dataset.theme === 'dark'")
    assert page.evaluate(look) == ["dark", "rgb(255, 255, 255)"]
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate(look) == ["light", "rgb(21, 24, 29)"]
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    page.wait_for_function("() => document.documentElement.dataset.theme === 'dark'")


def test_what_is_no_number_does_not_stay(opened: Open) -> None:
    page = opened()
    field = page.get_by_label("s3, f0", exact=True).first
    for text in ("abc", "1e400", ""):
        field.fill(text)
        field.press("Enter")
        expect(field).to_have_attribute("aria-invalid", "true")
        assert field.evaluate("e => e.validationMessage") == "It must be a number of at most 1e12; write another."
        field.press("Tab")
        expect(field).to_have_value("4")
        expect(field).to_have_attribute("aria-invalid", "false")


def test_the_menu_closes(opened: Open) -> None:
    page = opened()
    item = page.get_by_role("button", name="Copy as PyTorch")
    for leave in (lambda: page.keyboard.press("Escape"), lambda: page.locator(".lead").click()):
        page.get_by_text("More", exact=True).click()
        expect(item).to_be_visible()
        leave()
        expect(item).to_be_hidden()


def test_what_can_be_taken_along(opened: Open) -> None:
    page = opened()
    page.get_by_label("s3, f2", exact=True).first.fill("14")
    page.keyboard.press("Tab")
    assert downloaded(page, "Download SVG").startswith(b"<svg")
    assert downloaded(page, "Download PNG").startswith(b"\x89PNG")
    copy = downloaded(page, "Download this page").decode()
    again = opened(text=copy)
    assert numbers(again, "Input")[3, 2] == 14


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("shape", [(4, 6), (3, 5, 6), (2, 6, 3, 2)], ids=str)
def test_its_code_computes_the_same(opened: Open, shape: tuple[int, ...], mode: str) -> None:
    parameters = {"weight": np.linspace(0.5, 2, 6), "bias": np.linspace(-1, 1, 6)}
    found = nw.compare(torch.randn(shape, dtype=torch.float64), "all", mode=mode, steps=3, **parameters)
    page = opened(comparison=found)
    page.evaluate("navigator.clipboard.writeText = text => { window.copied = text; return Promise.resolve() }")
    page.get_by_text("More", exact=True).click()
    page.get_by_role("button", name="Copy as PyTorch").click()
    space: dict[str, Any] = {}
    exec(compile(page.evaluate("copied").replace("print", "str"), "page", "exec"), space)
    shown = [trace for trace in found.traces if not trace.refused]
    assert shown
    for trace in shown:
        np.testing.assert_allclose(space[trace.norm.name], trace.y, rtol=1e-12, atol=1e-14)


def test_no_script_but_its_own_runs() -> None:
    text = PAGE.read_text(encoding="utf-8")
    loader = re.search(r'<script type="module">(.*?)</script>', text, re.DOTALL)
    packed = re.search(r'id="packed-script">(.*?)</script>', text)
    assert loader
    assert packed
    script = gzip.decompress(base64.b64decode(packed[1]))
    hashes = [base64.b64encode(hashlib.sha256(code).digest()).decode() for code in (loader[1].encode(), script)]
    policy = re.search(r'content="(default-src [^"]*)"', text)
    assert policy
    assert "default-src 'none'" in policy[1]
    assert "script-src " + " ".join(f"'sha256-{h}'" for h in hashes) + ";" in policy[1]
    assert len(text.encode()) <= LARGEST


def test_building_it_again_gives_the_committed_bytes(tmp_path: Path) -> None:
    programs = Path(sys.executable).parent
    if not (WEB / "node_modules").exists() or not (programs / "npx").exists():
        pytest.skip("the page's tools are not installed: make page")
    command = [programs / "npx", "vite", "build", "--outDir", tmp_path, "--logLevel", "warn"]
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(command, cwd=WEB, check=True, timeout=120, env={**os.environ, "PATH": path})
    assert (tmp_path / "index.html").read_bytes() == PAGE.read_bytes()
