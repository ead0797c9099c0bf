"""Turns a scene into its clip: background, soft shadows, then the actors in their places frame by frame.

It knows what things look like and where they are, and nothing of captions or of reading a clip back.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from training.toybox.backgrounds import background
from training.toybox.scenes import FRAMES, SIDE, Actor, Path, Scene, path
from training.toybox.sprites import SPRITE_REACH, SPRITE_SIDE, sprite

ACTOR_LIGHT = {"day": (1.0, 1.0, 1.0), "sunset": (1.0, 0.93, 0.88), "night": (0.93, 0.93, 1.0)}
_SUPERSAMPLE = 3
cv2.setNumThreads(1)  # on pictures this small, handing work to threads takes longer than the work


def render(scene: Scene) -> np.ndarray:
    """The clip, uint8 (FRAMES, SIDE, SIDE, 3)."""
    frames = background(scene.place, scene.time, scene.sky_x, scene.ground_phase)
    add_actors(frames, scene.actors, scene.time, range(FRAMES))
    return np.clip(frames + 0.5, 0, 255).astype(np.uint8)


def add_actors(frames: np.ndarray, actors: tuple[Actor, ...], time: str, indices: Sequence[int]) -> None:
    """Draw actors and their shadows, in place, on float frames that show the clip's frames `indices`."""
    walks = [path(actor.size, actor.motion) for actor in actors]
    for actor, walk in zip(actors, walks, strict=True):
        _cast_shadow(frames, actor, walk, list(indices))
    for actor, walk in zip(actors, walks, strict=True):
        picture = paint(actor, time)
        for frame, index in zip(frames, indices, strict=True):
            _draw(frame, *cut_out(picture, actor, walk, index))


def paint(actor: Actor, time: str) -> np.ndarray:
    """The actor's sprite in the light of the hour, uint8 premultiplied RGBA."""
    light = np.float32((*ACTOR_LIGHT[time], 1.0))
    return np.clip(sprite(actor.kind, actor.colour, actor.mirrored) * light, 0, 255).astype(np.uint8)


def cut_out(picture: np.ndarray, actor: Actor, walk: Path, index: int) -> tuple[np.ndarray, int, int]:
    """A sprite as it looks at one frame, uint8 premultiplied RGBA, and where the left and top of that square lie."""
    size, stretch = walk.size[index], walk.stretch[index]
    x, y = actor.x + walk.dx[index], actor.y + walk.dy[index] + (1 - stretch) * size / 2
    reach = int(np.ceil(size * SPRITE_REACH / 2 / min(stretch, 1.0))) + 1
    left, top = int(np.floor(x)) - reach, int(np.floor(y)) - reach
    side = 2 * reach + 1
    # From sprite pixels to supersampled window pixels: scale, turn about the middle, then move to the actor's place.
    scale = size * SPRITE_REACH / SPRITE_SIDE * _SUPERSAMPLE
    angle = np.radians(walk.angle[index])
    cos, sin, half = scale * np.cos(angle), scale * np.sin(angle), (SPRITE_SIDE - 1) / 2
    wide, tall = 1 / stretch, stretch
    shift_x = (x - left) * _SUPERSAMPLE - 0.5 - wide * (cos - sin) * half
    shift_y = (y - top) * _SUPERSAMPLE - 0.5 - tall * (sin + cos) * half
    affine = np.array([[wide * cos, -wide * sin, shift_x], [tall * sin, tall * cos, shift_y]])
    window = cv2.warpAffine(picture, affine, (side * _SUPERSAMPLE, side * _SUPERSAMPLE))
    return cv2.resize(window, (side, side), interpolation=cv2.INTER_AREA), left, top


def _draw(frame: np.ndarray, window: np.ndarray, left: int, top: int) -> None:
    side = len(window)
    y0, y1, x0, x1 = max(top, 0), min(top + side, SIDE), max(left, 0), min(left + side, SIDE)
    part = window[y0 - top : y1 - top, x0 - left : x1 - left]
    frame[y0:y1, x0:x1] *= 1 - part[..., 3:] / 255
    frame[y0:y1, x0:x1] += part[..., :3]


def _cast_shadow(frames: np.ndarray, actor: Actor, walk: Path, indices: list[int]) -> None:
    """A soft ellipse on the ground under the actor, fainter the higher it hovers."""
    half_width, half_height = walk.half_extent(actor.kind)
    bottom = actor.y + walk.dy + half_height
    ground = min(max(bottom.max(), 52.0), SIDE - 1.0)
    bottom, half_width = bottom[indices], half_width[indices]
    strength = 0.4 * np.exp(-(ground - bottom) / 12)
    rows = slice(int(ground) - 5, SIDE)
    y, x = np.mgrid[rows, 0:SIDE].astype(np.float32) + 0.5
    across = (x[None] - (actor.x + walk.dx[indices])[:, None, None]) / (0.8 * half_width)[:, None, None]
    down = (y[None] - ground) / np.maximum(0.22 * half_width, 1.2)[:, None, None]
    shade = strength[:, None, None] * np.exp(-(across**2 + down**2))
    frames[:, rows] *= (1 - shade[..., None]).astype(np.float32)
