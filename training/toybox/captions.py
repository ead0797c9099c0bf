"""The detailed caption of a scene, which names everything, and the strict parser that reads one back.

Both are built from the same templates and tables, so what can be written can be read and nothing else can. This file
knows nothing of pixels, and nothing of the free wordings of prompts.
"""

from __future__ import annotations

import re
from functools import cache

import numpy as np

from training.toybox.facts import ActorFacts, Facts
from training.toybox.scenes import Actor, Scene

CAPTION_TOKENS = 32  # words, commas, full stops and the end-of-sequence token

# A caption flow chooses all words at once. So no slot's words depend on another's, and all phrases of a slot have as
# many words: where one ends and the next begins is then settled by the template alone.
_KINDS = {
    "ball": ("ball",),
    "box": ("box", "gift"),
    "star": ("star",),
    "boat": ("boat",),
    "car": ("car",),
    "bird": ("bird",),
    "balloon": ("balloon",),
    "rocket": ("rocket",),
}
_COLOURS = {name: (name,) for name in ("red", "orange", "yellow", "green", "blue", "purple", "white")}
_SIZES = {"small": ("small", "little"), "large": ("large", "big")}
_DOES = {
    "left": ("moves left", "goes left"),
    "right": ("moves right", "goes right"),
    "rises": ("is rising", "moves up"),
    "falls": ("is falling", "moves down"),
    "bounces": ("is bouncing", "is hopping"),
    "spins": ("is spinning", "turns around"),
    "grows": ("is growing", "gets bigger"),
    "shrinks": ("is shrinking", "gets smaller"),
    "still": ("stays still", "stands still"),
}
_WHERE = {
    "meadow": ("in a meadow", "over a meadow"),
    "desert": ("in the desert", "over the desert"),
    "sea": ("on the sea", "over the sea"),
    "snow": ("in the snow", "over the snow"),
    "city": ("in the city", "over the city"),
    "moon": ("on the moon", "over the moon"),
}
_SPOT = {
    "meadow": ("a meadow",),
    "desert": ("the desert",),
    "sea": ("the sea",),
    "snow": ("the snow",),
    "city": ("the city",),
    "moon": ("the moon",),
}
_WHEN = {
    "day": ("by day", "in daylight"),
    "sunset": ("at sunset", "at dusk"),
    "night": ("at night", "by night"),
}
_JOINS = ("and", "while")
_TEMPLATES = {
    1: (
        "{actor1} {does1} {where} {when}.",
        "{when}, {actor1} {does1} {where}.",
        "{where} {when}, {actor1} {does1}.",
        "{spot} {when}. {actor1} {does1}.",
    ),
    2: (
        "{actor1} {does1} {joins} {actor2} {does2} {where} {when}.",
        "{when}, {actor1} {does1} {where} {joins} {actor2} {does2}.",
        "{where} {when}, {actor1} {does1} {joins} {actor2} {does2}.",
        "{spot} {when}. {actor1} {does1}, {actor2} {does2}.",
    ),
}
_SLOTS = {"where": ("place", _WHERE), "spot": ("place", _SPOT), "when": ("time", _WHEN)}
_ACTOR_SLOTS = {"size": _SIZES, "colour": _COLOURS, "kind": _KINDS, "does": _DOES}


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Names place, time and every actor's size, colour, kind and motion in one of many wordings, left to right."""

    def say(phrases: dict[str, tuple[str, ...]], value: str) -> str:
        return str(rng.choice(phrases[value]))

    def name(actor: Actor) -> str:
        return f"a {say(_SIZES, actor.size)} {say(_COLOURS, actor.colour)} {say(_KINDS, actor.kind)}"

    slots = {"where": say(_WHERE, scene.place), "spot": say(_SPOT, scene.place), "when": say(_WHEN, scene.time)}
    slots["joins"] = str(rng.choice(_JOINS))
    # Were any actor first, a caption flow could bind one's colour to the other's shape before it has settled on either.
    for number, actor in enumerate(sorted(scene.actors, key=lambda actor: (actor.x, actor.y)), start=1):
        slots[f"actor{number}"] = name(actor)
        slots[f"does{number}"] = say(_DOES, actor.motion)
    return str(rng.choice(_TEMPLATES[len(scene.actors)])).format(**slots)


def parse_caption(text: str) -> Facts | None:
    """The facts that a caption states, or None if it is not exactly one that `caption` could have written."""
    text = re.sub(r"\s+([,.])", r"\1", " ".join(text.lower().split()))
    for count, pattern in _patterns():
        found = pattern.fullmatch(text)
        if found is None:
            continue
        said = {slot: _meaning(slot.rstrip("12"))[phrase] for slot, phrase in found.groupdict().items()}
        actors = tuple(
            ActorFacts(said[f"kind{n}"], said[f"colour{n}"], said[f"size{n}"], said[f"does{n}"])
            for n in range(1, count + 1)
        )
        return Facts(said["where"] if "where" in said else said["spot"], said["when"], count, actors)
    return None


def caption_phrases() -> list[str]:
    """Every piece of text a caption can contain, for the tokenizer."""
    tables = [table for _, table in _SLOTS.values()] + list(_ACTOR_SLOTS.values())
    phrases = [phrase for table in tables for variants in table.values() for phrase in variants]
    templates = [re.sub(r"{\w+}", " ", template) for group in _TEMPLATES.values() for template in group]
    return ["a", *_JOINS, *phrases, *templates]


@cache
def _meaning(slot: str) -> dict[str, str]:
    """From each phrase of a slot to the attribute value it stands for."""
    table = _SLOTS[slot][1] if slot in _SLOTS else _ACTOR_SLOTS[slot]
    return {phrase: value for value, variants in table.items() for phrase in variants}


@cache
def _patterns() -> list[tuple[int, re.Pattern[str]]]:
    """One expression per template, with a named group per slot."""

    def expand(slot: str) -> str:
        if slot.startswith("actor"):
            number = slot[-1]
            return "a " + " ".join(expand(f"{part}{number}") for part in ("size", "colour", "kind"))
        if slot == "joins":
            return f"(?:{'|'.join(_JOINS)})"
        return f"(?P<{slot}>{'|'.join(map(re.escape, _meaning(slot.rstrip('12'))))})"

    return [
        (count, re.compile(re.sub(r"\\{(\w+)\\}", lambda slot: expand(slot[1]), re.escape(template))))
        for count, templates in _TEMPLATES.items()
        for template in templates
    ]
