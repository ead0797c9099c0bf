"""Clips made on the spot, with texts in the words of tests/univigu/tiny.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from univigu.video import write_video

sys.path.append(str(Path(__file__).parents[1] / "univigu"))

COLOURS = {"red": (200, 40, 40), "green": (40, 180, 60), "blue": (40, 60, 210)}


def make_clips(folder: Path, count: int = 6, frames: int = 9, height: int = 32, width: int = 32) -> list[dict]:
    """Coloured boxes that move left or right, as rows of a manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        colour, way = list(COLOURS)[number % 3], ("left", "right")[number % 2]
        clip = np.full((frames, height, width, 3), 20 + 10 * number, np.uint8)
        for index in range(frames):
            x = (index if way == "right" else frames - 1 - index) * (width - 10) // (frames - 1)
            clip[index, height // 4 : height // 4 + 10, x : x + 10] = COLOURS[colour]
        write_video(folder / f"{number}.mp4", clip, 8)
        prompt = f"a {colour} box"
        rows.append({"video": f"{number}.mp4", "prompt": prompt, "caption": f"{prompt} moves {way} over the sea ."})
    return rows


def write_manifest(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
