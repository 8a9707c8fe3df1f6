"""The page as pictures: three scenes for docs/page.md and a short loop of the first for the README. Needs Chromium."""

from __future__ import annotations

import io
import shutil
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

import normwise as nw

SCREENS = Path(__file__).parent / "screens"
SHOWN = {
    "poke": "#v=1&x=2,4,6;3,5,7;1,3,5;9,6,8",
    "future": "#v=1&scene=future&text=the_car/sat_mat",
    "cube": "#v=1&scene=cube",
}
PULLED = 240.0  # pixels that s3 is pulled
FRAMES = 14


def loop(page: Page, path: Path) -> None:
    """s3 is pulled to the right and back: under Batch Norm the others move, under Layer Norm they stay."""
    page.get_by_role("slider", name="s3").hover()
    bead = page.get_by_role("slider", name="s3").bounding_box()
    box = page.locator("#scene .card").first.bounding_box()
    assert box is not None
    assert bead is not None
    x, y = bead["x"] + bead["width"] / 2, bead["y"] + bead["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    clip = {"x": box["x"] - 16, "y": box["y"] - 12, "width": box["width"] + 32, "height": box["height"] + 24}
    size = 760, round(760 * clip["height"] / clip["width"])
    frames = []
    for i in range(FRAMES):
        shot = page.screenshot(clip=clip)  # type: ignore[arg-type]
        frames.append(Image.open(io.BytesIO(shot)).convert("RGB").resize(size))
        if i + 1 < FRAMES:
            page.mouse.move(x + (i + 1) * PULLED / (FRAMES - 1), y)
            page.wait_for_timeout(220)
    frames = [frames[0]] * 3 + frames + [frames[-1]] * 6 + frames[::-1]
    palette = [frame.quantize(128, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE) for frame in frames]
    palette[0].save(path, save_all=True, append_images=palette[1:], duration=110, loop=0, optimize=True)


def main() -> None:
    """Write them all."""
    SCREENS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        path = Path(folder) / "page.html"
        path.write_text(nw.compare().to_html(), encoding="utf-8")
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1160, "height": 860})
        for name, link in SHOWN.items():
            page.goto("about:blank")
            page.goto(path.as_uri() + link)
            page.wait_for_timeout(2000)  # until what is drawn has been drawn
            page.screenshot(path=SCREENS / f"{name}.png", full_page=True)
        page.goto("about:blank")
        page.goto(path.as_uri())
        page.wait_for_timeout(1000)
        loop(page, SCREENS / "poke.gif")
        browser.close()


if __name__ == "__main__":
    main()
