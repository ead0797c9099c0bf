"""One picture of many scenes, to see the world as a whole: a film strip each, with prompt and caption beside it."""

from __future__ import annotations

import textwrap

import cv2
import numpy as np

from training.toybox.captions import caption
from training.toybox.prompts import brief
from training.toybox.render import render
from training.toybox.scenes import FRAMES, SIDE, scene_at

_SHOWN = range(0, FRAMES, 4)
_ZOOM = 2
_TEXT_WIDTH = 470


def contact_sheet(seed: int, count: int, split: str = "train") -> np.ndarray:
    """RGB picture with the first `count` scenes of this seed and split, one row each."""
    rows = []
    for index in range(count):
        scene = scene_at(seed, index, split)
        rng = np.random.default_rng([seed, index])
        strip = np.hstack([render(scene)[frame] for frame in _SHOWN])
        strip = cv2.resize(strip, None, fx=_ZOOM, fy=_ZOOM, interpolation=cv2.INTER_CUBIC)
        text = np.full((SIDE * _ZOOM, _TEXT_WIDTH, 3), 250, np.uint8)
        lines = [(line, (30, 30, 60)) for line in textwrap.wrap(brief(scene, rng), 54)]
        lines += [(line, (110, 110, 120)) for line in textwrap.wrap(caption(scene, rng), 54)]
        for number, (line, colour) in enumerate(lines):
            at = (12, 24 + 21 * number)
            cv2.putText(text, line, at, cv2.FONT_HERSHEY_SIMPLEX, 0.48, colour, 1, cv2.LINE_AA)
        rows.append(np.hstack([strip, text]))
    return np.vstack(rows)
