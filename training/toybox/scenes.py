"""What a toy scene is, how one is drawn from a seed, and which combinations training never sees.

A scene is plain data: attribute words plus a handful of continuous layout numbers. This file knows where an actor is at
every frame (its path), because two actors must never cover each other; it knows nothing of pixels, colours or captions.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import cache

import numpy as np

FRAMES = 17
SIDE = 64
FPS = 8

PLACES = ("meadow", "desert", "sea", "snow", "city", "moon")
TIMES = ("day", "sunset", "night")
KINDS = ("ball", "box", "star", "boat", "car", "bird", "balloon", "rocket")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "white")
SIZES = ("small", "large")
MOTIONS = ("left", "right", "rises", "falls", "bounces", "spins", "grows", "shrinks", "still")
SPLITS = ("train", "held_out")

# Width and height of each kind relative to its nominal size, so that all kinds show about the same area, and its width
# across the corners, which it needs when it turns.
EXTENT = {
    "ball": (1.02, 1.02, 1.04),
    "box": (0.99, 0.99, 1.32),
    "star": (1.14, 1.12, 1.24),
    "boat": (1.14, 1.12, 1.3),
    "car": (1.26, 0.88, 1.36),
    "bird": (1.26, 0.94, 1.34),
    "balloon": (0.96, 1.24, 1.28),
    "rocket": (0.94, 1.28, 1.33),
}
# Pixels. An actor that grows or shrinks runs through a range whose mean is a little above the size it is called by;
# nothing is ever smaller than 12 pixels, below which an 8x autoencoder no longer shows what it is.
SIZE_PIXELS = {"small": 15.0, "large": 25.0}
SCALE_RANGE = {"small": (12.0, 22.0), "large": (20.0, 34.0)}
# Everything stands on a grid as wide as the autoencoder's cells, where the same actor always has the same latents: it
# cannot be seen, and leaves a small model a hundred times fewer pictures to learn.
GRID = 8
PHASES = 8  # of sun or moon, and of hills
TRAVEL = 20.0
BOUNCE_HEIGHT = 14.0
TURN_DEGREES = 11.25
FLYING = ("bird", "balloon", "rocket", "star")


@dataclass(frozen=True)
class Actor:
    """One actor; `x`, `y` are the middle of its path in pixels, `mirrored` turns it to face left."""

    kind: str
    colour: str
    size: str
    motion: str
    x: float
    y: float
    mirrored: bool


@dataclass(frozen=True)
class Scene:
    """A whole clip; `sky_x` places sun or moon (0..1), `ground_phase` shifts the hills (0..1)."""

    place: str
    time: str
    actors: tuple[Actor, ...]
    sky_x: float
    ground_phase: float


@dataclass(frozen=True)
class Path:
    """Per frame, relative to the actor's (x, y): the centre, size in pixels, angle in degrees and vertical stretch."""

    dx: np.ndarray
    dy: np.ndarray
    size: np.ndarray
    angle: np.ndarray
    stretch: np.ndarray

    def half_extent(self, kind: str) -> tuple[np.ndarray, np.ndarray]:
        """Half width and half height of the actor's bounding box at every frame."""
        width, height, across = EXTENT[kind]
        if self.angle.any():
            width = height = across
        return self.size * width / 2 / self.stretch, self.size * height / 2 * np.maximum(self.stretch, 1.0)


@cache
def path(size: str, motion: str) -> Path:
    """The movement of an actor of this size and motion."""
    frame = np.arange(FRAMES, dtype=np.float64)
    progress = frame / (FRAMES - 1)
    dx, dy, angle = np.zeros(FRAMES), np.zeros(FRAMES), np.zeros(FRAMES)
    pixels, stretch = np.full(FRAMES, SIZE_PIXELS[size]), np.ones(FRAMES)
    low, high = SCALE_RANGE[size]
    match motion:
        case "left":
            dx = TRAVEL * (0.5 - progress)
        case "right":
            dx = TRAVEL * (progress - 0.5)
        case "rises":
            dy = TRAVEL * (0.5 - progress)
        case "falls":
            dy = TRAVEL * (progress - 0.5)
        case "bounces":
            phase = (frame / 8) % 1.0
            height = 4 * phase * (1 - phase)
            dy = BOUNCE_HEIGHT * (0.5 - height)
            stretch = np.where(height < 0.2, 0.92, 1.0)
        case "spins":
            angle = TURN_DEGREES * frame
        case "grows":
            pixels = low + (high - low) * progress
        case "shrinks":
            pixels = high - (high - low) * progress
        case "still":
            pass
        case _:
            raise ValueError(f"no motion {motion!r}; there is {', '.join(MOTIONS)}")
    return Path(dx, dy, pixels, angle, stretch)


def combination_is_held_out(kind: str, colour: str, motion: str, place: str) -> bool:
    """About one combination in eleven is kept from training; every pair of values still occurs there."""
    return zlib.crc32(f"{kind} {colour} {motion} {place}".encode()) % 11 == 0


def is_held_out(scene: Scene) -> bool:
    """True if any actor shows a combination that training never sees."""
    return any(combination_is_held_out(a.kind, a.colour, a.motion, scene.place) for a in scene.actors)


def sample_scene(rng: np.random.Generator, split: str) -> Scene:
    """A random scene of "train" or "held_out"."""
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}; there is {' and '.join(SPLITS)}")
    count = rng.integers(1, 3)  # two do not find room as often as one, so this is not drawn again
    while True:
        place, time = str(rng.choice(PLACES)), str(rng.choice(TIMES))
        looks = [tuple(str(rng.choice(values)) for values in (KINDS, COLOURS, SIZES, MOTIONS)) for _ in range(count)]
        if len({look[:2] for look in looks}) < len(looks):  # two actors can always be told apart by name
            continue
        held_out = any(combination_is_held_out(kind, colour, motion, place) for kind, colour, _, motion in looks)
        if held_out != (split == "held_out"):
            continue
        actors = _place_actors(looks)
        if actors is not None:
            sky_x, ground_phase = (float(value) / PHASES for value in rng.integers(PHASES, size=2))
            return Scene(place, time, actors, sky_x, ground_phase)


def scene_at(seed: int, index: int, split: str) -> Scene:
    """Scene number `index` of an endless list that the seed fixes."""
    return sample_scene(np.random.default_rng([seed, index, zlib.crc32(split.encode())]), split)


@cache
def _layout(looks: tuple[tuple[str, str, str], ...]) -> tuple[tuple[float, float], ...] | None:
    """Where actors of these kinds, sizes and motions stand: of all the points of the grid from which nothing leaves the
    frame or covers the other, those nearest to where one would look for them; None if there are none.

    A prompt does not say where, and a small model that has to choose one of thirty places paints a little of each."""
    boxes, points, distances = [], [], []
    for number, (kind, size, motion) in enumerate(looks):
        walk = path(size, motion)
        half_width, half_height = walk.half_extent(kind)
        xs = _grid(1 - (walk.dx - half_width).min(), SIDE - 1 - (walk.dx + half_width).max())
        ys = _grid(1 - (walk.dy - half_height).min(), SIDE - 1 - (walk.dy + half_height).max())
        x, y = (axis.ravel() for axis in np.meshgrid(xs, ys))
        height = 0.2 if kind in FLYING else 0.85  # flyers like the sky and the others the ground
        liked_x = SIDE / 2 if len(looks) == 1 else SIDE * (1 + 2 * number) / 4  # the first to the left of the second
        distances.append(np.abs(x - liked_x) + np.abs(y - (ys[0] + height * (ys[-1] - ys[0]))))
        points.append((x, y))
        boxes.append((x[:, None] + walk.dx, y[:, None] + walk.dy, half_width, half_height))
    if len(looks) == 1:
        chosen = (int(distances[0].argmin()),)
    else:
        (xa, ya, wa, ha), (xb, yb, wb, hb) = boxes
        gap = np.maximum(np.abs(xa[:, None] - xb) - wa - wb, np.abs(ya[:, None] - yb) - ha - hb)
        far = np.where((gap > 1.5).all(axis=2), distances[0][:, None] + distances[1], np.inf)
        chosen = np.unravel_index(far.argmin(), far.shape)
        if not np.isfinite(far[chosen]):
            return None
    return tuple((float(x[i]), float(y[i])) for (x, y), i in zip(points, chosen, strict=True))


def _grid(low: float, high: float) -> np.ndarray:
    """The points of the grid between two bounds."""
    return GRID * np.arange(np.ceil(low / GRID), np.floor(high / GRID) + 1)


def _place_actors(looks: list[tuple[str, ...]]) -> tuple[Actor, ...] | None:
    """The actors where they stand, from left to right, facing where they go or else one another."""
    where = _layout(tuple((kind, size, motion) for kind, _, size, motion in looks))
    if where is None:
        return None
    placed = sorted(zip(where, looks, strict=True))
    return tuple(
        Actor(*look, x, y, look[3] == "left" or (look[3] != "right" and number == 1))
        for number, ((x, y), look) in enumerate(placed)
    )
