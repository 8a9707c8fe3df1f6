"""Draw who shares a mean, for docs/index.md: `python docs/draw_cubes.py`."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

import normwise as nw

FOLDER = Path(__file__).parent / "cubes"
PATTERNS = {
    "batch_norm": "n c h w -> c",
    "layer_norm": "n c h w -> n h w",
    "layer_norm_of_samples": "n c h w -> n",
    "group_norm": "n (g c) h w -> n g",
}

if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, pattern in PATTERNS.items():
        drawn = io.BytesIO()
        nw.explain.cube(pattern).savefig(drawn, dpi=130)
        few = Image.open(drawn).convert("RGB").quantize(64, dither=Image.Dither.NONE)  # a quarter of the bytes
        few.save(FOLDER / f"{name}.png", optimize=True)
