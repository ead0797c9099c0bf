"""Reads a clip back from its pixels alone: place, time, and every actor's kind, colour, size and motion.

Analysis by synthesis. The landscape that fits best is found first; then, up to twice, the patches in an actor's colour
that it does not explain each suggest an actor, and the one that removes most of the difference is kept. It uses the
renderer as a catalogue of appearances and knows nothing of any scene, seed or caption.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, lru_cache

import cv2
import numpy as np

from training.toybox.backgrounds import background, still_background
from training.toybox.facts import ActorFacts, Facts
from training.toybox.render import ACTOR_LIGHT, add_actors, cut_out, paint
from training.toybox.scenes import COLOURS, FRAMES, KINDS, MOTIONS, PLACES, SIDE, SIZES, TIMES, Actor, path
from training.toybox.sprites import PALETTE

# Every path is at a turning point or halfway between two of them at these frames, and on whole pixels.
_LOOKED_AT = (0, 4, 8, 12, 16)
_HAS_SIDES = ("boat", "car", "bird")
_GRID = np.linspace(0, 1, 9)
_MARGIN = 32  # pixels added around a frame so that a template may hang over its edge
_LEAST_GAIN = 0.6e6  # squared grey levels an actor must explain; a real one explains several times as much
_LEAST_SHARE = 0.45  # and this share of the difference it covers


@dataclass(frozen=True)
class Reading:
    """`facts`, and for each actor the share (0..1) of the difference it covers that it explains: low means doubtful."""

    facts: Facts
    explained: tuple[float, ...]


def read_facts(frames: np.ndarray) -> Facts:
    """The facts that a clip, uint8 (FRAMES, SIDE, SIDE, 3), shows."""
    return read(frames).facts


def read(frames: np.ndarray) -> Reading:
    """The facts a clip shows, with how well they explain it."""
    if frames.dtype != np.uint8 or frames.shape != (FRAMES, SIDE, SIDE, 3):
        raise ValueError(
            f"the oracle reads uint8 clips of shape {(FRAMES, SIDE, SIDE, 3)}, not {frames.dtype} {frames.shape}"
        )
    looked_at = frames[list(_LOOKED_AT)].astype(np.float32)
    place, time, sky_x, phase = _find_background(looked_at)
    empty = background(place, time, sky_x, phase)[list(_LOOKED_AT)]
    found: list[_Fit] = []
    model = empty
    for _ in range(2):
        fit = _find_actor(looked_at, model, time)
        if fit is None:
            break
        found.append(fit)
        model = _with_actors(empty, found, time)
    if len(found) == 2 and found[0].share < 0.9:  # it can be judged better now that the second is known
        found[0] = _improve(_Views(looked_at, _with_actors(empty, found[1:], time), time), found[0].actor)
    actors = tuple(ActorFacts(f.actor.kind, f.actor.colour, f.actor.size, f.actor.motion) for f in found)
    return Reading(Facts(place, time, len(actors), actors), tuple(f.share for f in found))


# ---- the landscape ----


@cache
def _landscapes() -> tuple[list[tuple[str, str, float, float]], np.ndarray]:
    keys = [(place, time, x, phase) for place in PLACES for time in TIMES for x in _GRID for phase in _GRID]
    pictures = [cv2.resize(still_background(*key)[..., :3], (16, 16), interpolation=cv2.INTER_AREA) for key in keys]
    return keys, np.stack(pictures).reshape(len(keys), -1)


def _find_background(frames: np.ndarray) -> tuple[str, str, float, float]:
    """Place, time and layout whose picture is nearest to the clip's median; far-off pixels (actors) count little."""
    median = np.median(frames, axis=0)
    keys, pictures = _landscapes()
    small = cv2.resize(median, (16, 16), interpolation=cv2.INTER_AREA).reshape(-1)
    place, time, *layout = keys[int(np.minimum(np.abs(pictures - small), 40).mean(1).argmin())]

    def distance(layout: list[float]) -> float:
        return float(np.minimum(np.abs(still_background(place, time, *layout)[..., :3] - median), 40).mean())

    least = distance(layout)
    for step in (1 / 16, 1 / 32, 1 / 64, 1 / 128):
        for axis in (0, 1):
            for sign in (1, -1):
                trial = list(layout)
                trial[axis] += sign * step
                if 0 <= trial[axis] <= 1 and (value := distance(trial)) < least:
                    layout, least = trial, value
                    break
    return place, time, layout[0], layout[1]


# ---- the actors ----


@dataclass(frozen=True)
class _Fit:
    actor: Actor
    gain: float
    share: float


def _with_actors(empty: np.ndarray, found: list[_Fit], time: str) -> np.ndarray:
    frames = empty.copy()
    add_actors(frames, tuple(fit.actor for fit in found), time, _LOOKED_AT)
    return frames


def _find_actor(frames: np.ndarray, model: np.ndarray, time: str) -> _Fit | None:
    """The actor that best explains a coloured patch which the model so far does not; None if there is none."""
    views = _Views(frames, model, time)
    best = None
    for colour, x, y in _coloured_patches(frames, model, time)[:3]:
        here = Actor("ball", colour, "small", "still", x, y, False)
        # What it is and how large it starts shows in the first frame; where it goes, in the others.
        starts = [look for motion in ("still", "grows", "shrinks") for look in _shapes_of(replace(here, motion=motion))]
        starts = sorted((views.fit(look, 0.5, 3, (0,)) for look in starts), key=lambda fit: -fit.gain)
        trials = []
        for start in starts[:5]:
            looks = [replace(start.actor, motion=motion) for motion in MOTIONS]
            if start.actor.motion != "still":
                looks = [start.actor]
            for look in looks:
                walk = path(look.size, look.motion)
                look = replace(look, x=look.x - walk.dx[0], y=look.y - walk.dy[0])
                trials.append(views.fit(look, 0.5, 2))
        fit = _improve(views, max(trials, key=lambda fit: fit.gain).actor)
        if best is None or fit.gain > best.gain:
            best = fit
        if best.share > 0.8:
            break
    return best if best is not None and best.gain > _LEAST_GAIN and best.share > _LEAST_SHARE else None


def _shapes_of(actor: Actor) -> list[Actor]:
    """The actor as every kind, in both sizes, facing both ways where that can be seen."""
    return [
        replace(actor, kind=kind, size=size, mirrored=mirrored)
        for kind in KINDS
        for size in SIZES
        for mirrored in ((False, True) if kind in _HAS_SIDES else (False,))
    ]


def _coloured_patches(frames: np.ndarray, model: np.ndarray, time: str) -> list[tuple[str, float, float]]:
    """Per colour its largest connected patch in the first frame: colour and centre, the largest patch first."""
    labels = _colour_labels(frames[0], model[0], time)
    patches = []
    for number, colour in enumerate(COLOURS):
        mask = cv2.morphologyEx((labels == number).astype(np.uint8), cv2.MORPH_CLOSE, np.ones((3, 3), np.uint8))
        count, _, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
        if count > 1:
            left, top, width, height, area = stats[1 + stats[1:, cv2.CC_STAT_AREA].argmax()]
            if area > 12:
                patches.append((int(area), colour, left + width / 2, top + height / 2))
    return [(colour, x, y) for _, colour, x, y in sorted(patches, reverse=True)]


def _colour_labels(frame: np.ndarray, model: np.ndarray, time: str) -> np.ndarray:
    """For every pixel the number of the actor colour it shows, or -1: as in the model, its shadow, or another."""
    shades, owners = _shades(time)
    distances = ((frame[..., None, :] - shades) ** 2).sum(-1)
    expected = np.min([((frame - shade * model) ** 2).sum(-1) for shade in (1.0, 0.8, 0.62)], axis=0)
    labels = owners[distances.argmin(-1)]
    labels[(expected < distances.min(-1)) | (np.abs(frame - model).max(-1) < 24)] = -1
    return labels


@cache
def _shades(time: str) -> tuple[np.ndarray, np.ndarray]:
    """Colours that actors' parts have in the light of the hour, and the number of the actor colour each speaks for."""
    light = np.float32(ACTOR_LIGHT[time])
    shades, owners = [], []
    for number, colour in enumerate(COLOURS):
        for factor in (0.84, 1.0, 1.14):
            shades.append(np.clip(np.float32(PALETTE[colour]) * factor, 0, 255) * light)
            owners.append(number)
    for other in ((38, 34, 52), (150, 98, 58), (186, 226, 246), (74, 80, 110)):  # ink, wood, glass, pale outline
        shades.append(np.float32(other) * light)
        owners.append(-1)
    return np.stack(shades), np.array(owners)


def _improve(views: _Views, actor: Actor) -> _Fit:
    """Change motion, shape or colour for as long as more of the clip gets explained."""
    best = views.fit(actor, 1.0, 3)
    while True:
        trials = [replace(best.actor, motion=motion, size=size) for motion in MOTIONS for size in SIZES]
        trials += _shapes_of(best.actor)
        trials += [replace(best.actor, colour=colour) for colour in COLOURS]
        coarse = sorted((views.fit(trial, 0.5, 2) for trial in trials), key=lambda fit: -fit.gain)
        rival = max((views.fit(fit.actor, 1.0, 2) for fit in coarse[:6]), key=lambda fit: fit.gain)
        if rival.gain < best.gain + 1:
            return best
        best = rival


class _Views:
    """A clip and a model of it, prepared at full and half size for the question how much an actor would explain.

    The gain of an actor with coverage a and colour T over the model B of frame F is the drop in squared difference,
    sum a (|F - B|^2 - |F - T|^2) = sum a (|B|^2 - 2 F.B) + aT . 2F - a |T|^2: one correlation with four channels.
    """

    def __init__(self, frames: np.ndarray, model: np.ndarray, time: str):
        self.time = time
        self.scales = {}
        for scale in (1.0, 0.5):
            if scale < 1:
                halves = [
                    np.stack([cv2.resize(f, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) for f in clip])
                    for clip in (frames, model)
                ]
                frames, model = halves
            linear = (model**2 - 2 * frames * model).sum(-1, keepdims=True)
            difference = ((frames - model) ** 2).sum(-1)
            pad = ((0, 0), (_MARGIN, _MARGIN), (_MARGIN, _MARGIN))
            stacked = np.pad(np.concatenate([linear, 2 * frames], -1), (*pad, (0, 0)))
            self.scales[scale] = stacked, np.pad(difference, pad)

    def fit(self, actor: Actor, scale: float, reach: int, seen: tuple[int, ...] = (0, 1, 2, 3, 4)) -> _Fit:
        """Move the actor by up to `reach` pixels to where it explains most of the frames `seen` among those looked at."""
        stacked, difference = self.scales[scale]
        walk = path(actor.size, actor.motion)
        x, y = int(actor.x * scale), int(actor.y * scale)
        total = np.zeros((2 * reach + 1, 2 * reach + 1))
        places = []
        for number in seen:
            index = _LOOKED_AT[number]
            template, energy, middle = _template(
                actor.kind,
                actor.colour,
                actor.mirrored,
                self.time,
                walk.size[index] * scale,
                walk.angle[index],
                walk.stretch[index],
            )
            side = len(template) + 2 * reach
            left = x + round(walk.dx[index] * scale) - middle + _MARGIN - reach
            top = y + round(walk.dy[index] * scale) - middle + _MARGIN - reach
            left, top = (min(max(start, 0), stacked.shape[1] - side) for start in (left, top))
            view = stacked[number, top : top + side, left : left + side]
            total += cv2.matchTemplate(view, template, cv2.TM_CCORR) - energy
            places.append((difference[number], top, left, template[..., 0]))
        row, column = np.unravel_index(total.argmax(), total.shape)
        covered = 1.0
        for squares, top, left, coverage in places:
            side = len(coverage)
            covered += float(np.vdot(squares[top + row :, left + column :][:side, :side], coverage))
        gain = float(total[row, column])
        moved = replace(
            actor,
            x=(x + 0.5 + column - reach + _vertex(total[row], column)) / scale,
            y=(y + 0.5 + row - reach + _vertex(total[:, column], row)) / scale,
        )
        return _Fit(moved, gain, max(gain, 0.0) / covered)


def _vertex(values: np.ndarray, at: int) -> float:
    """How far from the largest of the values the parabola through it and its neighbours has its top."""
    if at in (0, len(values) - 1):
        return 0.0
    before, here, after = values[at - 1 : at + 2]
    return float(np.clip(0.5 * (after - before) / max(2 * here - before - after, 1e-9), -0.49, 0.49))


@lru_cache(maxsize=8192)
def _template(
    kind: str, colour: str, mirrored: bool, time: str, size: float, angle: float, stretch: float
) -> tuple[np.ndarray, float, int]:
    """(coverage, coverage x RGB) of an actor centred on a pixel, the energy it carries, and that pixel's index."""
    at = np.zeros(1)
    still = replace(path("small", "still"), dx=at, dy=at, size=at + size, angle=at + angle, stretch=at + stretch)
    actor = Actor(kind, colour, "small", "still", 0.5, 0.5, mirrored)
    window, left, _ = cut_out(paint(actor, time), actor, still, 0)
    window = window.astype(np.float32)
    coverage = window[..., 3:] / 255
    energy = float((window[..., :3] ** 2 / np.maximum(coverage, 1e-3)).sum())
    return np.concatenate([coverage, window[..., :3]], -1), energy, -left
