"""Paints the world behind the actors: sky, sun or moon, and six landscapes, all as smooth layers.

Everything is a function of place, time of day and two layout numbers, plus the frame number for what moves gently
(waves, snowfall, twinkling stars). Layers are height fields with analytic anti-aliasing. It knows nothing of actors.
"""

from __future__ import annotations

import numpy as np

from training.toybox.scenes import FRAMES, SIDE

_Y, _X = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32) + 0.5
_COLUMN = _X[0]

# Top and bottom of the sky.
_SKY = {
    "day": ((86, 166, 232), (204, 234, 248)),
    "sunset": ((112, 78, 148), (255, 176, 124)),
    "night": ((14, 18, 52), (52, 60, 112)),
}
_MOON_SKY = {
    "day": ((120, 132, 206), (214, 206, 240)),
    "sunset": ((92, 40, 104), (240, 128, 128)),
    "night": ((10, 8, 30), (44, 30, 78)),
}
# What the hour does to the colour of the land: a factor and something added.
_LAND_LIGHT = {
    "day": ((1.0, 1.0, 1.0), (0, 0, 0)),
    "sunset": ((0.86, 0.68, 0.66), (34, 10, 14)),
    "night": ((0.34, 0.38, 0.52), (4, 6, 22)),
}
_STARS = tuple((7 + (i * 23.7) % 53, 3 + (i * 9.3) % 26, 0.5 + (i * 0.37) % 0.5) for i in range(11))


def _land(colour: tuple[int, int, int], time: str) -> np.ndarray:
    factor, added = _LAND_LIGHT[time]
    return np.asarray(colour, np.float32) * np.asarray(factor, np.float32) + np.asarray(added, np.float32)


def _over(picture: np.ndarray, colour: np.ndarray, alpha: np.ndarray) -> None:
    """Paint `colour` on `picture` in place. Its fourth channel, how much open sky is still seen, becomes zero there."""
    rows, columns = np.flatnonzero(alpha.any(1)), np.flatnonzero(alpha.any(0))
    if rows.size:
        box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        picture[box] += (np.append(colour, 0).astype(np.float32) - picture[box]) * alpha[box][..., None]


def _below(height: np.ndarray) -> np.ndarray:
    """Coverage of everything under the height field, anti-aliased across its slope."""
    slope = np.gradient(height, axis=-1)
    return np.clip((_Y - height[..., None, :]) / np.sqrt(1 + slope**2)[..., None, :] + 0.5, 0, 1)


def _disc(x: float, y: float, width: float, height: float, softness: float = 1.0) -> np.ndarray:
    distance = (1 - np.sqrt(((_X - x) / width) ** 2 + ((_Y - y) / height) ** 2)) * min(width, height)
    return np.clip(distance / softness + 0.5, 0, 1)


def _block(left: float, top: float, right: float, bottom: float) -> np.ndarray:
    across = np.clip(np.minimum(_X - left, right - _X) + 0.5, 0, 1)
    return across * np.clip(np.minimum(_Y - top, bottom - _Y) + 0.5, 0, 1)


def _sky(place: str, time: str, sky_x: float) -> np.ndarray:
    """The sky with sun or moon and, as a fourth channel, where stars may shine through."""
    top, bottom = (_MOON_SKY if place == "moon" else _SKY)[time]
    ramp = np.clip(_Y / 42, 0, 1)[..., None]
    picture = np.float32((*top, 1)) * (1 - ramp) + np.float32((*bottom, 1)) * ramp
    x = 12 + 40 * sky_x
    if time == "day":
        _over(picture, np.float32((255, 250, 214)), 0.5 * np.exp(-((_X - x) ** 2 + (_Y - 9) ** 2) / 90))
        _over(picture, np.float32((255, 246, 190)), _disc(x, 9, 4.6, 4.6, 1.5))
    elif time == "sunset":
        _over(picture, np.float32((255, 214, 130)), 0.75 * np.exp(-((_X - x) ** 2 + ((_Y - 36) * 1.3) ** 2) / 220))
        _over(picture, np.float32((255, 236, 168)), _disc(x, 36, 7.5, 7.5, 1.5))
    else:
        _over(picture, np.float32((150, 160, 220)), 0.35 * np.exp(-((_X - x) ** 2 + (_Y - 11) ** 2) / 80))
        moon = _disc(x, 11, 4.8, 4.8, 1.3) * (1 - _disc(x + 2.6, 9.6, 4.3, 4.3, 1.3))
        _over(picture, np.float32((246, 244, 222)), moon)
    if place == "moon":
        x = 52 - 40 * sky_x
        _over(picture, _land((232, 148, 120), time) * 0.5 + 80, _disc(x, 22, 5.4, 5.4, 1.3))
        ring = _disc(x, 22, 9.6, 2.8, 1.2) * (1 - _disc(x, 21.6, 7.0, 1.5, 1.2)) * np.clip(_Y - 21.4, 0, 1)
        _over(picture, _land((248, 220, 180), time) * 0.5 + 90, ring)
    if time == "day" and place != "moon":
        for cloud, depth in ((sky_x * 30 + 38) % 80 - 8, 17), ((sky_x * 30 + 82) % 80 - 8, 25):
            puff = np.maximum(_disc(cloud, depth, 8, 2.6, 2.5), _disc(cloud - 1.5, depth - 2, 4, 3, 2.5))
            _over(picture, np.float32((250, 252, 255)), 0.6 * puff)
    return picture


def _twinkle(frames: np.ndarray, open_sky: np.ndarray) -> None:
    x, y, size = np.float32(_STARS).T
    beat = 2 * np.pi * np.arange(FRAMES)[:, None] / (FRAMES - 1) + 2.1 * np.arange(len(_STARS))
    across = np.exp(-((_COLUMN - x[:, None]) ** 2) / (1.4 * size[:, None]))
    down = np.exp(-((_COLUMN - y[:, None]) ** 2) / (1.4 * size[:, None]))
    _glow(frames, np.float32((255, 250, 230)), _dots(0.75 + 0.25 * np.sin(beat), down, across) * open_sky)


def _dots(strength: np.ndarray, down: np.ndarray, across: np.ndarray) -> np.ndarray:
    """Coverage (FRAMES, SIDE, SIDE) of separable soft dots: one matrix product instead of a picture for each."""
    down = strength[..., None] * down
    return np.matmul(down.swapaxes(1, 2).astype(np.float32), np.broadcast_to(across, down.shape).astype(np.float32))


def _glow(frames: np.ndarray, colour: np.ndarray, alpha: np.ndarray) -> None:
    frames += (colour - frames) * alpha[..., None]


def _wave(amplitude: float, length: float, phase: float) -> np.ndarray:
    return (amplitude * np.sin(2 * np.pi * (_COLUMN / length + phase))).astype(np.float32)


def _meadow(picture: np.ndarray, time: str, phase: float) -> None:
    _over(picture, _land((142, 190, 178), time), _below(37 + _wave(4, 58, phase)))
    _over(picture, _land((110, 178, 104), time), _below(42 + _wave(3, 70, 0.45 - phase)))
    x = 8 + 8 * phase
    _over(picture, _land((112, 82, 62), time), _block(x - 1.1, 34, x + 1.1, 44))
    _over(picture, _land((64, 136, 84), time), np.maximum(_disc(x, 30, 5.4, 5.4), _disc(x + 3.4, 33, 3.8, 3.6)))
    _over(picture, _land((148, 206, 108), time), _below(49 + _wave(1.6, 90, phase + 0.3)))
    for number in range(6):
        flower = np.exp(-((_X - (6 + number * 10.7)) ** 2 + (_Y - (54 + (number * 5) % 9)) ** 2) / 1.6)
        _over(picture, _land(((250, 232, 240), (255, 214, 226))[number % 2], time), 0.8 * flower)


def _desert(picture: np.ndarray, time: str, phase: float) -> None:
    x = 44 + 8 * phase
    mesa = (
        44
        - 13 * np.clip((12 - np.abs(_COLUMN - x)) / 3.5, 0, 1)
        - 6 * np.clip((8 - np.abs(_COLUMN - x + 28)) / 3.5, 0, 1)
    )
    _over(picture, _land((206, 142, 116), time), _below(mesa))
    _over(picture, _land((226, 186, 134), time), _below(43 + _wave(2.6, 54, phase)))
    x = 10 + 6 * phase
    for part in (
        _block(x - 1.6, 32, x + 1.6, 48),
        _block(x - 5, 36, x - 2.6, 41),
        _block(x - 5, 39.6, x, 41.6),
        _block(x + 3, 34, x + 5.4, 40),
        _block(x, 38, x + 5.4, 40),
    ):
        _over(picture, _land((98, 142, 92), time), part)
    _over(picture, _land((240, 208, 154), time), _below(48 + _wave(2.4, 76, 0.6 - phase)))
    _over(picture, _land((230, 192, 138), time), _below(57 + _wave(1.8, 64, phase + 0.2)))


def _sea(picture: np.ndarray, time: str, phase: float, sky_x: float) -> None:
    x = 50 - 8 * phase
    _over(picture, _land((214, 190, 140), time), _disc(x, 40.5, 11, 3.4))
    _over(picture, _land((112, 84, 60), time), _block(x - 0.9, 30, x + 0.9, 39))
    leaves = np.maximum(
        _disc(x - 3, 30.4, 4.2, 1.7), np.maximum(_disc(x + 3, 30.4, 4.2, 1.7), _disc(x, 28.8, 2.4, 2.2))
    )
    _over(picture, _land((78, 142, 96), time), leaves)
    water = np.clip(_Y - 40 + 0.5, 0, 1)
    depth = np.clip((_Y - 40) / 24, 0, 1)[..., None]
    _over(picture, _land((122, 196, 208), time), water)
    _over(picture, _land((48, 138, 166), time), depth[..., 0])
    light = {"day": (236, 250, 240), "sunset": (255, 206, 130), "night": (150, 164, 214)}[time]
    path = (
        np.exp(-(((_X - 12 - 40 * sky_x) / (3 + (_Y - 40) * 0.16)) ** 2)) * water * np.clip(1.3 - depth[..., 0], 0, 1)
    )
    _over(picture, np.float32(light), (0.2 if time == "day" else 0.45) * path)


def _waves(frames: np.ndarray, time: str, phase: float) -> None:
    step = np.arange(FRAMES, dtype=np.float32)[:, None] / (FRAMES - 1)
    for row, speed, length in ((45.5, 0.35, 24), (51.5, -0.35, 32), (58, 0.35, 42)):
        crest = row + 0.9 * np.sin(2 * np.pi * (_COLUMN[None] / length + phase + speed * step))
        band = slice(int(row) - 4, min(int(row) + 5, SIDE))
        line = np.exp(-((_Y[band] - crest[:, None, :]) ** 2) / 1.3)
        _glow(frames[:, band], _land((190, 228, 230), time), 0.45 * line)


def _snow(picture: np.ndarray, time: str, phase: float) -> None:
    x = 16 + 10 * phase
    peaks = np.minimum(22 + 0.8 * np.abs(_COLUMN - x), 27 + 0.8 * np.abs(_COLUMN - x - 27))
    _over(picture, _land((150, 172, 206), time), _below(peaks))
    caps = np.maximum(peaks, np.minimum(29 + _wave(1.2, 9, phase), 60))
    _over(picture, _land((228, 238, 248), time), _below(peaks) * (1 - _below(caps)))
    _over(picture, _land((196, 216, 236), time), _below(41 + _wave(2, 60, phase + 0.2)))
    for tree, foot, size in ((7 + 4 * phase, 46, 1.0), (15 + 4 * phase, 44, 0.7), (57 - 4 * phase, 46, 0.9)):
        for level in range(3):
            top, width = foot - size * (15 - 4 * level), size * (3 + 0.9 * level)
            ramp = np.clip((_Y - top) / (6 * size), 0, 1) * width
            part = np.clip(ramp - np.abs(_X - tree) + 0.5, 0, 1) * np.clip(top + 6 * size - _Y + 0.5, 0, 1)
            part *= np.clip(_Y - top + 0.5, 0, 1)
            _over(picture, _land((86, 136, 128), time), part)
    _over(picture, _land((218, 230, 244), time), _below(48 + _wave(1.8, 84, phase + 0.6)))


def _snowfall(frames: np.ndarray) -> None:
    step, number = np.arange(FRAMES, dtype=np.float32)[:, None], np.arange(8)
    drop = (number * 17.3 + 1.5 * step) % 72 - 4
    side = 4 + number * 8.1 + 1.5 * np.sin(0.35 * step + number)
    across = np.exp(-((_COLUMN - side[..., None]) ** 2) / 1.6)
    down = np.exp(-((_COLUMN - drop[..., None]) ** 2) / 1.6)
    _glow(frames, np.float32((255, 255, 255)), _dots(np.full((FRAMES, 8), 0.6), down, across))


_FAR_HOUSES = ((0, 22, 9), (9, 27, 8), (17, 18, 8), (25, 25, 10), (35, 16, 8), (43, 24, 9), (52, 20, 12))
_NEAR_HOUSES = ((-2, 33, 11), (12, 29, 10), (25, 35, 12), (40, 30, 10), (53, 34, 12))


def _city(picture: np.ndarray, time: str, phase: float) -> None:
    shift = 4 * phase - 2
    for left, top, width in _FAR_HOUSES:
        _over(picture, _land((158, 170, 196), time), _block(left + shift, top, left + width + shift, 50))
    window = {"day": (206, 226, 238), "sunset": (255, 214, 140), "night": (255, 216, 130)}[time]
    for number, (left, top, width) in enumerate(_NEAR_HOUSES):
        wall = ((176, 150, 146), (146, 156, 172), (186, 170, 148))[number % 3]
        _over(picture, _land(wall, time), _block(left - shift, top, left + width - shift, 50))
        for column in range(2):
            for row in range(2):
                x, y = left - shift + 1.8 + column * (width - 2.6) / 2, top + 2.6 + row * 5.4
                _over(picture, np.float32(window), 0.85 * _block(x, y, x + 2.6, y + 2.8))
    _over(picture, _land((196, 196, 198), time), _below(np.full(SIDE, 47, np.float32)))
    _over(picture, _land((126, 130, 142), time), _below(np.full(SIDE, 51, np.float32)))
    for number in range(5):
        _over(
            picture,
            _land((226, 222, 206), time),
            _block(number * 14 - 2 + 6 * phase, 56.6, number * 14 + 5 + 6 * phase, 58.4),
        )


def _moon(picture: np.ndarray, time: str, phase: float) -> None:
    _over(picture, _land((150, 138, 184), time), _below(38 + _wave(3.4, 40, phase)))
    _over(picture, _land((184, 172, 206), time), _below(44 + _wave(2.0, 74, 0.5 - phase)))
    _over(picture, _land((206, 196, 220), time), _below(52 + _wave(1.4, 90, phase)))
    for x, y, size in ((14, 50, 5.5), (44, 48.5, 4), (31, 58, 7), (57, 57, 4.5)):
        x += 5 * phase - 2.5
        _over(picture, _land((226, 218, 236), time), _disc(x, y + 0.8, size + 0.9, size * 0.42 + 0.7))
        _over(picture, _land((162, 150, 188), time), _disc(x, y, size, size * 0.42))


def still_background(place: str, time: str, sky_x: float, ground_phase: float) -> np.ndarray:
    """All that does not move, float32 (SIDE, SIDE, 4): RGB in 0..255 and how much open sky shows."""
    picture = _sky(place, time, sky_x)
    match place:
        case "sea":
            _sea(picture, time, ground_phase, sky_x)
        case "snow":
            _snow(picture, time, ground_phase)
        case "meadow":
            _meadow(picture, time, ground_phase)
        case "desert":
            _desert(picture, time, ground_phase)
        case "city":
            _city(picture, time, ground_phase)
        case "moon":
            _moon(picture, time, ground_phase)
    return picture


def background(place: str, time: str, sky_x: float, ground_phase: float) -> np.ndarray:
    """Float32 (FRAMES, SIDE, SIDE, 3), values 0..255."""
    picture = still_background(place, time, sky_x, ground_phase)
    frames = np.repeat(picture[None, ..., :3], FRAMES, 0)
    if time == "night":
        _twinkle(frames, picture[..., 3])
    if place == "sea":
        _waves(frames, time, ground_phase)
    if place == "snow":
        _snowfall(frames)
    return frames
