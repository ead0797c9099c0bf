"""Draws each kind of actor once, large and anti-aliased, as a premultiplied RGBA picture in its colour.

Shapes live in unit coordinates: x to the right, y down, the nominal size spans -1..1. This file knows nothing of
scenes, paths or backgrounds; `render.py` scales, turns and places what it draws.
"""

from __future__ import annotations

from functools import cache

import cv2
import numpy as np

PALETTE = {
    "red": (228, 44, 50),
    "orange": (255, 138, 22),
    "yellow": (255, 222, 44),
    "green": (52, 184, 66),
    "blue": (44, 92, 232),
    "purple": (158, 66, 204),
    "white": (246, 246, 250),
}
SPRITE_SIDE = 96
SPRITE_REACH = 1.4  # the picture spans -1.4..1.4 in unit coordinates
_DRAW_SIDE = SPRITE_SIDE * 4
_OUTLINE = 0.1


def _mix(colour: tuple[int, ...], other: tuple[int, ...], share: float) -> tuple[float, ...]:
    return tuple(a * (1 - share) + b * share for a, b in zip(colour, other, strict=True))


def _ellipse(x: float, y: float, width: float, height: float, turn: float = 0.0) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    points = np.stack([width * np.cos(angle), height * np.sin(angle)], 1)
    cos, sin = np.cos(np.radians(turn)), np.sin(np.radians(turn))
    return points @ np.array([[cos, sin], [-sin, cos]]) + (x, y)


def _rounded(points: list[tuple[float, float]], radius: float) -> np.ndarray:
    """The polygon with each corner replaced by a smooth curve that starts `radius` away from it."""
    corners = np.asarray(points, dtype=np.float64)
    out = []
    for before, corner, after in zip(np.roll(corners, 1, 0), corners, np.roll(corners, -1, 0), strict=True):
        start = corner + (before - corner) * min(0.5, radius / np.linalg.norm(before - corner))
        end = corner + (after - corner) * min(0.5, radius / np.linalg.norm(after - corner))
        for t in np.linspace(0, 1, 8):
            out.append((1 - t) ** 2 * start + 2 * t * (1 - t) * corner + t**2 * end)
    return np.asarray(out)


def _shapes(kind: str, colour: str) -> list[tuple[np.ndarray, tuple[float, ...]]]:
    """Polygons and their colours, back to front."""
    main = PALETTE[colour]
    light = _mix(main, (255, 255, 255), 0.4)
    dark = _mix(main, (20, 10, 40), 0.34)
    accent = (128, 140, 172) if colour == "white" else (255, 246, 226)
    if colour == "white":
        dark = (196, 202, 220)
    ink, glass, wood = (38, 34, 52), (186, 226, 246), (150, 98, 58)
    match kind:
        case "ball":
            # The ends of the band follow the circle.
            angle = np.arcsin(0.2 / 0.9)
            arc = np.linspace(-angle, angle, 12)
            band = np.concatenate(
                [
                    0.9 * np.stack([np.cos(arc), np.sin(arc)], 1),
                    0.9 * np.stack([np.cos(arc + np.pi), np.sin(arc + np.pi)], 1),
                ]
            )
            return [
                (_ellipse(0, 0, 0.9, 0.9), main),
                (_ellipse(-0.28, -0.42, 0.36, 0.24, -30), light),
                (band, accent),
                (_ellipse(0, 0, 0.2, 0.2), dark),
            ]
        case "box":
            return [
                (_rounded([(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)], 0.14), main),
                (_rounded([(-0.86, -0.86), (0.86, -0.86), (0.86, -0.4), (-0.86, -0.4)], 0.14), dark),
                (np.array([(-0.2, -0.86), (0.2, -0.86), (0.2, 0.86), (-0.2, 0.86)]), accent),
            ]
        case "star":
            points = []
            for i in range(10):
                radius = 1.12 if i % 2 == 0 else 0.56
                turn = np.pi * i / 5
                points.append((radius * np.sin(turn), -radius * np.cos(turn) + 0.06))
            return [
                (_rounded(points, 0.16), main),
                (_ellipse(-0.12, -0.4, 0.16, 0.26, 20), light),
                (_ellipse(-0.22, 0.0, 0.1, 0.15), ink),
                (_ellipse(0.22, 0.0, 0.1, 0.15), ink),
            ]
        case "boat":
            return [
                (np.array([(-0.06, -1.0), (0.08, -1.0), (0.08, 0.4), (-0.06, 0.4)]), wood),
                (_rounded([(0.14, -0.98), (0.98, 0.2), (0.14, 0.2)], 0.1), main),
                (_rounded([(-0.14, -0.72), (-0.14, 0.2), (-0.78, 0.2)], 0.1), accent),
                (_rounded([(-1.06, 0.34), (1.06, 0.34), (0.66, 0.98), (-0.66, 0.98)], 0.16), main),
                (np.array([(-1.0, 0.36), (1.0, 0.36), (0.9, 0.54), (-0.9, 0.54)]), dark),
            ]
        case "car":
            return [
                (_rounded([(-0.74, 0.0), (-0.5, -0.74), (0.36, -0.74), (0.72, 0.0)], 0.2), main),
                (_rounded([(-1.14, -0.12), (0.9, -0.12), (1.16, 0.1), (1.16, 0.5), (-1.14, 0.5)], 0.16), main),
                (_rounded([(-0.52, -0.12), (-0.38, -0.56), (-0.1, -0.56), (-0.1, -0.12)], 0.08), glass),
                (_rounded([(0.06, -0.12), (0.06, -0.56), (0.28, -0.56), (0.5, -0.12)], 0.08), glass),
                (np.array([(-1.12, 0.22), (1.14, 0.22), (1.14, 0.46), (-1.12, 0.46)]), dark),
                (_ellipse(1.04, 0.08, 0.1, 0.1), (255, 240, 170)),
                (_ellipse(-0.6, 0.48, 0.3, 0.3), ink),
                (_ellipse(0.62, 0.48, 0.3, 0.3), ink),
                (_ellipse(-0.6, 0.48, 0.12, 0.12), (214, 214, 224)),
                (_ellipse(0.62, 0.48, 0.12, 0.12), (214, 214, 224)),
            ]
        case "bird":
            return [
                (_rounded([(-0.4, 0.1), (-1.16, -0.28), (-1.1, 0.3)], 0.12), dark),
                (_rounded([(0.86, -0.5), (1.2, -0.28), (0.84, -0.12)], 0.08), (250, 170, 40)),
                (_ellipse(-0.04, 0.2, 0.76, 0.58, 8), main),
                (_ellipse(0.52, -0.34, 0.44, 0.42), main),
                (_ellipse(0.1, 0.46, 0.44, 0.26, 8), light),
                (_ellipse(0.64, -0.42, 0.11, 0.13), ink),
                (_rounded([(0.24, -0.06), (-0.3, -0.86), (-0.72, -0.8), (-0.5, 0.24)], 0.24), dark),
            ]
        case "balloon":
            return [
                (np.array([(-0.36, 0.4), (-0.28, 0.4), (-0.18, 0.86), (-0.26, 0.86)]), wood),
                (np.array([(0.36, 0.4), (0.28, 0.4), (0.18, 0.86), (0.26, 0.86)]), wood),
                (_ellipse(0, -0.3, 0.84, 0.8), main),
                (_rounded([(-0.76, 0.0), (0.76, 0.0), (0.34, 0.56), (-0.34, 0.56)], 0.12), main),
                (_ellipse(0, -0.3, 0.3, 0.8), accent),
                (_rounded([(-0.28, 0.0), (0.28, 0.0), (0.15, 0.56), (-0.15, 0.56)], 0.05), accent),
                (_rounded([(-0.3, 0.76), (0.3, 0.76), (0.24, 1.12), (-0.24, 1.12)], 0.08), wood),
            ]
        case "rocket":
            return [
                (_rounded([(-0.26, 0.62), (0.26, 0.62), (0, 1.2)], 0.1), (255, 196, 60)),
                (_rounded([(-0.3, -0.06), (-0.82, 0.5), (-0.82, 0.94), (-0.3, 0.66)], 0.1), dark),
                (_rounded([(0.3, -0.06), (0.82, 0.5), (0.82, 0.94), (0.3, 0.66)], 0.1), dark),
                (
                    _rounded(
                        [
                            (0, -1.3),
                            (0.48, -0.6),
                            (0.48, 0.3),
                            (0.34, 0.72),
                            (-0.34, 0.72),
                            (-0.48, 0.3),
                            (-0.48, -0.6),
                        ],
                        0.3,
                    ),
                    main,
                ),
                (_rounded([(0, -1.22), (0.36, -0.7), (-0.36, -0.7)], 0.12), accent),
                (_ellipse(0, -0.14, 0.27, 0.27), dark),
                (_ellipse(0, -0.14, 0.19, 0.19), glass),
            ]
    raise ValueError(f"no kind of actor called {kind!r}")


@cache
def sprite(kind: str, colour: str, mirrored: bool) -> np.ndarray:
    """Premultiplied RGBA, float32 in 0..255, SPRITE_SIDE square, with a dark outline and light from the upper left."""
    scale = _DRAW_SIDE / (2 * SPRITE_REACH)
    paint = np.zeros((_DRAW_SIDE, _DRAW_SIDE, 3), np.float32)
    alpha = np.zeros((_DRAW_SIDE, _DRAW_SIDE), np.uint8)
    for points, fill in _shapes(kind, colour):
        corners = np.round((points + SPRITE_REACH) * scale * 16).astype(np.int32)
        cv2.fillPoly(paint, [corners], fill, shift=4)
        cv2.fillPoly(alpha, [corners], 255, shift=4)
    ramp = np.linspace(-1, 1, _DRAW_SIDE, dtype=np.float32) * SPRITE_REACH
    light = 1.05 - 0.1 * (ramp[None, :] + ramp[:, None])
    paint = np.clip(paint * light[..., None], 0, 255)
    thickness = int(2 * round(_OUTLINE * scale) + 1)
    outline = cv2.dilate(alpha, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (thickness, thickness)))
    edge = (74, 80, 110) if colour == "white" else _mix(PALETTE[colour], (16, 8, 40), 0.68)
    paint[alpha == 0] = edge
    picture = np.dstack([paint * (outline[..., None] / 255.0), outline.astype(np.float32)])
    picture = cv2.resize(picture, (SPRITE_SIDE, SPRITE_SIDE), interpolation=cv2.INTER_AREA)
    return picture[:, ::-1].copy() if mirrored else picture
