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
from numpy.lib.stride_tricks import sliding_window_view

from training.toybox.backgrounds import background, still_background
from training.toybox.facts import ActorFacts, Facts
from training.toybox.render import ACTOR_LIGHT, add_actors, cut_out, paint
from training.toybox.scenes import COLOURS, FRAMES, KINDS, MOTIONS, PLACES, SIDE, SIZES, TIMES, Actor, Path, path
from training.toybox.sprites import PALETTE

# Every path is at a turning point or halfway between two of them at these frames, and on whole pixels.
_LOOKED_AT = (0, 4, 8, 12, 16)
_HAS_SIDES = ("boat", "car", "bird")
_GRID = np.linspace(0, 1, 9)
_MARGIN = 32  # pixels added around a frame so that a template may hang over its edge
# What an actor must explain: squared grey levels over the frames looked at, and a share of the difference it covers.
# Even at 24 dB nearly all true actors reach twice these, and what is imagined beside them stays at a third.
_LEAST_GAIN = 0.9e6
_LEAST_SHARE = 0.15


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
        fit = _find_actor(looked_at, model, time, found)
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
    share: float  # 0 until asked for


def _with_actors(empty: np.ndarray, found: list[_Fit], time: str) -> np.ndarray:
    frames = empty.copy()
    add_actors(frames, tuple(fit.actor for fit in found), time, _LOOKED_AT)
    return frames


def _find_actor(frames: np.ndarray, model: np.ndarray, time: str, found: list[_Fit]) -> _Fit | None:
    """The actor that best explains a coloured patch which the model so far does not; None if there is none."""
    views = _Views(frames, model, time)
    # What it is and how large it starts shows in the first frame; where it goes, in the others.
    trials = []
    for colour, x, y in _coloured_patches(frames[0], model[0], time, _around(found, time)):
        starts = []
        for motion in ("still", "grows", "shrinks"):
            for size in SIZES:
                starts += views.fit(_shapes_of(Actor("ball", colour, size, motion, x, y, False)), 0.5, 3, (0,))
        for start in sorted(starts, key=lambda fit: -fit.gain)[:3]:
            for motion in MOTIONS if start.actor.motion == "still" else (start.actor.motion,):
                walk = path(start.actor.size, motion)
                x, y = start.actor.x - walk.dx[0], start.actor.y - walk.dy[0]
                trials += views.fit([replace(start.actor, motion=motion, x=x, y=y)], 0.5, 2, (1, 3, 4))
    trials = [trial for trial in trials if not any(_covers(fit.actor, trial.actor) for fit in found)]
    trials.sort(key=lambda fit: -fit.gain)
    best = None
    while trials and (best is None or best.share < 0.6):  # a doubtful one may have been entered by the wrong colour
        colour = trials[0].actor.colour
        fit = _improve(views, trials[0].actor)
        best = fit if best is None or fit.gain > best.gain else best
        trials = [trial for trial in trials if trial.actor.colour != colour]
    if best is None or best.gain < _LEAST_GAIN or best.share < _LEAST_SHARE:
        return None
    return None if any(_covers(fit.actor, best.actor) for fit in found) else best


def _covers(actor: Actor, other: Actor) -> bool:
    """True if the two would overlap by more than a few pixels at some frame, which no scene allows."""
    a, b = path(actor.size, actor.motion), path(other.size, other.motion)
    (wide_a, tall_a), (wide_b, tall_b) = a.half_extent(actor.kind), b.half_extent(other.kind)
    across = np.abs(actor.x + a.dx - other.x - b.dx) - wide_a - wide_b
    down = np.abs(actor.y + a.dy - other.y - b.dy) - tall_a - tall_b
    return bool((np.maximum(across, down) < -5).any())


def _shapes_of(actor: Actor) -> list[Actor]:
    """The actor as every kind, facing both ways where that can be seen."""
    return [
        replace(actor, kind=kind, mirrored=mirrored)
        for kind in KINDS
        for mirrored in ((False, True) if kind in _HAS_SIDES else (False,))
    ]


def _around(found: list[_Fit], time: str) -> np.ndarray:
    """Where the actors found so far are in the first frame, and close to it: no other is there, but what is left of a
    clumsily drawn one can be larger than a small second actor and would be tried in its place."""
    black, white = np.zeros((1, SIDE, SIDE, 3), np.float32), np.full((1, SIDE, SIDE, 3), 255, np.float32)
    for frames in (black, white):
        add_actors(frames, tuple(fit.actor for fit in found), time, (0,))
    covered = (white - black)[0].min(-1) < 100  # a shadow lets more through
    return cv2.dilate(covered.astype(np.uint8), np.ones((5, 5), np.uint8)) > 0


def _coloured_patches(
    frame: np.ndarray, model: np.ndarray, time: str, taken: np.ndarray
) -> list[tuple[str, float, float]]:
    """The largest connected patches of one actor colour in a frame, outside what is `taken`: colour and centre, the
    largest first."""
    labels = _colour_labels(frame, model, time)
    labels[taken] = -1
    patches = []
    for number, colour in enumerate(COLOURS):
        mask = cv2.morphologyEx((labels == number).astype(np.uint8), cv2.MORPH_CLOSE, np.ones((3, 3), np.uint8))
        for left, top, width, height, area in cv2.connectedComponentsWithStats(mask, connectivity=8)[2][1:]:
            patches.append((int(area), colour, left + width / 2, top + height / 2))
    patches.sort(reverse=True)
    return [patch[1:] for patch in patches[:3] if patch[0] > max(8, patches[0][0] / 4)]


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
    best = views.fit([actor], 1.0, 3)[0]
    while True:
        trials = []
        for motion in MOTIONS:
            for size in SIZES:
                look = replace(best.actor, motion=motion, size=size)
                looks = [look]
                if motion == best.actor.motion:
                    looks = _shapes_of(look) + [replace(look, colour=colour) for colour in COLOURS]
                trials += views.fit(looks, 0.5, 2)
        trials.sort(key=lambda fit: -fit.gain)
        rivals = [views.fit([trial.actor], 1.0, 2)[0] for trial in trials[:6]]
        rival = max(rivals, key=lambda fit: fit.gain)
        if rival.gain < best.gain + 1:
            return replace(best, share=views.share(best))
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

    def fit(self, looks: list[Actor], scale: float, reach: int, seen: tuple[int, ...] = (0, 1, 2, 3, 4)) -> list[_Fit]:
        """Move each actor by up to `reach` pixels to where it explains most of the frames that `seen` numbers.

        The actors differ in kind, facing and colour alone, so that all are compared with the same cut-outs of the clip.
        """
        first, span = looks[0], 2 * reach + 1
        x, y = int(first.x * scale), int(first.y * scale)
        total = np.zeros((span * span, len(looks)), np.float32)
        for number in seen:
            templates, energies, side = self._templates(looks, scale, number)
            left, top = self._corner(first, x - reach, y - reach, scale, number, side)
            view = self.scales[scale][0][number, top : top + side + 2 * reach, left : left + side + 2 * reach]
            windows = sliding_window_view(view, (side, side, 4)).reshape(span * span, -1)
            total += windows @ templates.T - energies
        fits = []
        for look, gains in zip(looks, total.T.reshape(-1, span, span), strict=True):
            row, column = np.unravel_index(gains.argmax(), gains.shape)
            moved = replace(
                look,
                x=(x + 0.5 + column - reach + _vertex(gains[row], column)) / scale,
                y=(y + 0.5 + row - reach + _vertex(gains[:, column], row)) / scale,
            )
            fits.append(_Fit(moved, float(gains[row, column]), 0.0))
        return fits

    def share(self, fit: _Fit) -> float:
        """The fit's gain as a share of the difference that the actor covers."""
        covered = 1.0
        for number in range(len(_LOOKED_AT)):
            templates, _, side = self._templates([fit.actor], 1.0, number)
            left, top = self._corner(fit.actor, int(fit.actor.x), int(fit.actor.y), 1.0, number, side)
            coverage = templates[0].reshape(side, side, 4)[..., 0]
            covered += float(np.vdot(self.scales[1.0][1][number, top : top + side, left : left + side], coverage))
        return max(fit.gain, 0.0) / covered

    def _templates(self, looks: list[Actor], scale: float, number: int) -> tuple[np.ndarray, np.ndarray, int]:
        walk, index = path(looks[0].size, looks[0].motion), _LOOKED_AT[number]
        pose = walk.size[index] * scale, walk.angle[index], walk.stretch[index]
        entries = [_template(look.kind, look.colour, look.mirrored, self.time, *pose) for look in looks]
        templates = np.stack([template for template, _ in entries])
        return templates, np.float32([energy for _, energy in entries]), round((templates.shape[1] / 4) ** 0.5)

    def _corner(self, actor: Actor, x: int, y: int, scale: float, number: int, side: int) -> tuple[int, int]:
        """Left and top, in the padded frame, of the template whose path has its middle at (x, y)."""
        walk, index = path(actor.size, actor.motion), _LOOKED_AT[number]
        highest = self.scales[scale][0].shape[1] - side - 8
        left = x + round(walk.dx[index] * scale) - side // 2 + _MARGIN
        top = y + round(walk.dy[index] * scale) - side // 2 + _MARGIN
        return min(max(left, 0), highest), min(max(top, 0), highest)


def _vertex(values: np.ndarray, at: int) -> float:
    """How far from the largest of the values the parabola through it and its neighbours has its top."""
    if at in (0, len(values) - 1):
        return 0.0
    before, here, after = values[at - 1 : at + 2]
    return float(np.clip(0.5 * (after - before) / max(2 * here - before - after, 1e-9), -0.49, 0.49))


@lru_cache(maxsize=8192)
def _template(
    kind: str, colour: str, mirrored: bool, time: str, size: float, angle: float, stretch: float
) -> tuple[np.ndarray, float]:
    """(coverage, coverage x RGB) of an actor centred on a square's middle pixel, flat, and the energy it carries."""
    at = np.zeros(1)
    still = Path(dx=at, dy=at, size=at + size, angle=at + angle, stretch=at + stretch)
    actor = Actor(kind, colour, "small", "still", 0.5, 0.5, mirrored)
    window, _, _ = cut_out(paint(actor, time), actor, still, 0)
    window = window.astype(np.float32)
    coverage = window[..., 3:] / 255
    energy = float((window[..., :3] ** 2 / np.maximum(coverage, 1e-3)).sum())
    return np.concatenate([coverage, window[..., :3]], -1).reshape(-1), energy
