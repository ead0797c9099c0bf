"""What can be said about a clip, and how two statements about it are compared attribute by attribute.

A scene, a caption, a prompt and the oracle all end in `Facts`; this file knows nothing of how any of them got there.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

from training.toybox.scenes import Scene

ACTOR_ATTRIBUTES = ("kind", "colour", "size", "motion")
ATTRIBUTES = ("place", "time", "count", *ACTOR_ATTRIBUTES)


@dataclass(frozen=True)
class ActorFacts:
    """What is said of one actor; None where nothing is said."""

    kind: str | None = None
    colour: str | None = None
    size: str | None = None
    motion: str | None = None


@dataclass(frozen=True)
class Facts:
    """What is said of a clip; None where nothing is said. `actors` in any order."""

    place: str | None
    time: str | None
    count: int | None
    actors: tuple[ActorFacts, ...]


def facts(scene: Scene) -> Facts:
    """Everything there is to say about a scene."""
    actors = tuple(ActorFacts(actor.kind, actor.colour, actor.size, actor.motion) for actor in scene.actors)
    return Facts(scene.place, scene.time, len(actors), actors)


def compare(stated: Facts, shown: Facts | None) -> dict[str, tuple[bool, ...]]:
    """For every attribute that `stated` names: whether `shown` agrees, one truth value per naming (two for two actors).

    Attributes that `stated` leaves open are absent. Actors are paired so that most agrees; one that `shown` lacks, or a
    `shown` of None (a caption that cannot be parsed), agrees in nothing.
    """
    result: dict[str, tuple[bool, ...]] = {}
    for name in ("place", "time", "count"):
        value = getattr(stated, name)
        if value is not None:
            result[name] = (shown is not None and getattr(shown, name) == value,)
    others = list(shown.actors) if shown is not None else []
    others += [ActorFacts()] * (len(stated.actors) - len(others))
    pairings = [
        [
            (name, getattr(actor, name) == getattr(other, name))
            for actor, other in zip(stated.actors, order, strict=True)
            for name in ACTOR_ATTRIBUTES
            if getattr(actor, name) is not None
        ]
        for order in permutations(others, len(stated.actors))
    ]
    for name, agrees in max(pairings, key=lambda pairing: sum(agrees for _, agrees in pairing)):
        result[name] = (*result.get(name, ()), agrees)
    return result


def agrees(stated: Facts, shown: Facts | None) -> bool:
    """True if `shown` agrees with everything that `stated` names."""
    return all(all(values) for values in compare(stated, shown).values())
