"""The toy world: scenes drawn from a seed, their clips, their captions, and an oracle that reads a clip back."""

from training.toybox.render import render
from training.toybox.scenes import (
    COLOURS,
    FPS,
    FRAMES,
    KINDS,
    MOTIONS,
    PLACES,
    SIDE,
    SIZES,
    SPLITS,
    TIMES,
    Actor,
    Scene,
    is_held_out,
    sample_scene,
    scene_at,
)

__all__ = [
    "COLOURS",
    "FPS",
    "FRAMES",
    "KINDS",
    "MOTIONS",
    "PLACES",
    "SIDE",
    "SIZES",
    "SPLITS",
    "TIMES",
    "Actor",
    "Scene",
    "is_held_out",
    "render",
    "sample_scene",
    "scene_at",
]
