"""The brief prompt: part of a scene in the many ways visitors put things, with a record of what it names.

Which parts are named is random, always all actors by their kinds. The wordings are far richer than those of the
captions, because people type freely and a word the model never met is lost on it. This file knows nothing of pixels.
"""

from __future__ import annotations

import re

import numpy as np

from training.toybox.facts import ActorFacts, Facts
from training.toybox.scenes import Actor, Scene

PROMPT_TOKENS = 24  # words, commas, full stops and the end-of-sequence token

# What the actor is called: singular, plural.
_NOUNS = {
    "ball": (("ball", "balls"), ("ball", "balls"), ("beach ball", "beach balls")),
    "box": (("box", "boxes"), ("box", "boxes"), ("gift", "gifts"), ("present", "presents"), ("cube", "cubes")),
    "star": (("star", "stars"), ("star", "stars")),
    "boat": (
        ("boat", "boats"),
        ("boat", "boats"),
        ("sailboat", "sailboats"),
        ("sailing boat", "sailing boats"),
        ("ship", "ships"),
    ),
    "car": (("car", "cars"), ("car", "cars"), ("toy car", "toy cars"), ("automobile", "automobiles")),
    "bird": (("bird", "birds"), ("bird", "birds"), ("birdie", "birdies"), ("parrot", "parrots")),
    "balloon": (("balloon", "balloons"), ("balloon", "balloons"), ("hot air balloon", "hot air balloons")),
    "rocket": (
        ("rocket", "rockets"),
        ("rocket", "rockets"),
        ("spaceship", "spaceships"),
        ("rocket ship", "rocket ships"),
    ),
}
_COLOURS = {
    "red": ("red", "red", "red", "scarlet", "bright red"),
    "orange": ("orange",),
    "yellow": ("yellow", "yellow", "yellow", "golden", "bright yellow"),
    "green": ("green",),
    "blue": ("blue", "blue", "blue", "bright blue"),
    "purple": ("purple", "purple", "violet"),
    "white": ("white",),
}
_SIZES = {
    "small": ("small", "little", "tiny", "small", "mini"),
    "large": ("large", "big", "huge", "giant", "big"),
}
# Verbs with their -ing form. A kind has its own way of going somewhere.
_GO = (
    ("moves", "moving"),
    ("goes", "going"),
    ("travels", "travelling"),
    ("drifts", "drifting"),
    ("glides", "gliding"),
    ("heads", "heading"),
    ("slides", "sliding"),
)
_GO_LIKE = {
    "ball": (("rolls", "rolling"),),
    "box": (("slides", "sliding"), ("is pushed", "being pushed")),
    "star": (("flies", "flying"), ("shoots", "shooting"), ("floats", "floating")),
    "boat": (("sails", "sailing"), ("floats", "floating")),
    "car": (("drives", "driving"), ("races", "racing"), ("rides", "riding")),
    "bird": (("flies", "flying"),),
    "balloon": (("floats", "floating"), ("flies", "flying")),
    "rocket": (("flies", "flying"), ("zooms", "zooming")),
}
_LEFT = ("left", "to the left", "from right to left", "towards the left", "leftwards")
_RIGHT = ("right", "to the right", "from left to right", "towards the right", "rightwards")
_UP = ("up", "upwards", "up into the sky", "up into the air", "higher")
_DOWN = ("down", "downwards", "down from the sky", "to the ground", "lower")
_ACTIONS = {
    "rises": (
        ("rises", "rising"),
        ("rises up", "rising up"),
        ("climbs", "climbing"),
        ("ascends", "ascending"),
        ("takes off", "taking off"),
        ("lifts off", "lifting off"),
        ("floats up", "floating up"),
        ("flies up", "flying up"),
    ),
    "falls": (
        ("falls", "falling"),
        ("falls down", "falling down"),
        ("drops", "dropping"),
        ("sinks", "sinking"),
        ("descends", "descending"),
        ("comes down", "coming down"),
        ("floats down", "floating down"),
    ),
    "bounces": (
        ("bounces", "bouncing"),
        ("bounces up and down", "bouncing up and down"),
        ("hops", "hopping"),
        ("jumps", "jumping"),
        ("jumps up and down", "jumping up and down"),
        ("hops up and down", "hopping up and down"),
    ),
    "spins": (
        ("spins", "spinning"),
        ("spins around", "spinning around"),
        ("spins in circles", "spinning in circles"),
        ("rotates", "rotating"),
        ("turns around", "turning around"),
        ("twirls", "twirling"),
        ("tumbles", "tumbling"),
        ("whirls", "whirling"),
    ),
    "grows": (
        ("grows", "growing"),
        ("gets bigger", "getting bigger"),
        ("gets larger", "getting larger"),
        ("becomes bigger", "becoming bigger"),
        ("grows bigger", "growing bigger"),
        ("expands", "expanding"),
        ("swells", "swelling"),
        ("comes closer", "coming closer"),
    ),
    "shrinks": (
        ("shrinks", "shrinking"),
        ("gets smaller", "getting smaller"),
        ("becomes smaller", "becoming smaller"),
        ("shrinks away", "shrinking away"),
    ),
    "still": (
        ("stays still", "staying still"),
        ("stands still", "standing still"),
        ("sits still", "sitting still"),
        ("does not move", "not moving"),
        ("rests", "resting"),
        ("waits", "waiting"),
        ("stands", "standing"),
    ),
}
_WHERE = {
    "meadow": (
        "in a meadow",
        "over a meadow",
        "in the meadow",
        "on a meadow",
        "in a field",
        "over the fields",
        "on the grass",
        "in the grass",
        "in the hills",
        "among flowers",
        "in the park",
        "in the countryside",
        "in nature",
    ),
    "desert": (
        "in the desert",
        "in a desert",
        "over the desert",
        "across the desert",
        "in the sand",
        "on the sand",
        "over the dunes",
        "among the dunes",
        "near a cactus",
    ),
    "sea": (
        "on the sea",
        "at sea",
        "by the sea",
        "over the sea",
        "on the ocean",
        "over the ocean",
        "in the ocean",
        "on the water",
        "over the water",
        "over the waves",
        "on the waves",
        "at the beach",
        "near an island",
        "on a lake",
    ),
    "snow": (
        "in the snow",
        "over the snow",
        "on the snow",
        "in a snowy field",
        "in a snowy landscape",
        "in winter",
        "in the mountains",
        "over snowy mountains",
        "on the ice",
        "in the cold",
        "while it snows",
    ),
    "city": (
        "in the city",
        "in a city",
        "over the city",
        "in town",
        "in a town",
        "downtown",
        "on a city street",
        "on the street",
        "on the road",
        "on a road",
        "among buildings",
        "among skyscrapers",
        "between the houses",
    ),
    "moon": (
        "on the moon",
        "over the moon",
        "on another planet",
        "on a planet",
        "on an alien planet",
        "in space",
        "in outer space",
        "among craters",
    ),
}
_SPOTS = {
    "meadow": ("meadow", "field", "green hills", "countryside"),
    "desert": ("desert", "dunes", "sandy desert"),
    "sea": ("sea", "ocean", "beach", "sea"),
    "snow": ("snow", "winter landscape", "snowy mountains", "snowy field"),
    "city": ("city", "town", "street", "city street", "skyline"),
    "moon": ("moon", "planet", "moon landscape", "alien planet"),
}
_WHEN = {
    "day": (
        "during the day",
        "by day",
        "in the daytime",
        "on a sunny day",
        "in the sun",
        "in the sunshine",
        "in daylight",
        "at noon",
        "in the morning",
        "in the afternoon",
        "in summer light",
        "under a clear sky",
    ),
    "sunset": (
        "at sunset",
        "in the sunset",
        "at dusk",
        "in the evening",
        "at sundown",
        "as the sun sets",
        "as the sun goes down",
        "in the evening light",
        "at twilight",
        "at dawn",
    ),
    "night": (
        "at night",
        "in the night",
        "by night",
        "under the stars",
        "under a starry sky",
        "after dark",
        "in the dark",
        "at midnight",
        "in the moonlight",
        "late at night",
    ),
}
_HOURS = {
    "day": ("sunny", "bright", "daytime", "daylight", "day"),
    "sunset": ("sunset", "evening", "dusk", "twilight"),
    "night": ("night", "dark", "starry", "nighttime", "midnight"),
}
_OPENINGS = (
    "a video of",
    "video of",
    "a clip of",
    "a short film of",
    "show me",
    "show",
    "make",
    "i want",
    "i would like to see",
    "please show me",
    "can you show",
    "an animation of",
    "a cartoon of",
    "let us see",
    "imagine",
)
# Words that say nothing the world can show, but that people type.
_CHARMS = ("cute", "pretty", "shiny", "lovely", "beautiful", "nice", "funny", "happy", "colourful")
_MANNERS = ("slowly", "gently", "quickly", "happily", "quietly", "smoothly")
# Two actors, each with or without something to do.
_JOINTS = ("and", "and", "and", "with", "next to", "and also", "near", "beside", "together with", "plus")


def brief(scene: Scene, rng: np.random.Generator) -> str:
    """A prompt that names part of the scene."""
    return brief_with_facts(scene, rng)[0]


def brief_with_facts(scene: Scene, rng: np.random.Generator) -> tuple[str, Facts]:
    """A prompt and what it names; everything it leaves open is None."""
    while True:
        text, named = _compose(scene, rng)
        if len(re.findall(r"[a-z]+|[,.]", text)) < PROMPT_TOKENS:
            return text, named


def _compose(scene: Scene, rng: np.random.Generator) -> tuple[str, Facts]:
    def choose(options):
        return options[rng.integers(len(options))]

    actors = list(scene.actors)  # all of them, from left to right: who asks for a ball wants to see one, and no other
    place = scene.place if rng.random() < 0.6 else None
    time = scene.time if rng.random() < 0.45 else None
    where = choose(_WHERE[place]) if place else ""
    when = choose(_WHEN[time]) if time else ""
    setting = f"{when} {where}" if rng.random() < 0.25 else f"{where} {when}"

    alike = len(actors) == 2 and actors[0].kind == actors[1].kind
    if alike and rng.random() < 0.6:
        a, b = actors
        noun = choose(_NOUNS[a.kind])[1]
        same_size = a.size == b.size and rng.random() < 0.3
        same_motion = a.motion == b.motion
        subject = choose(("two", "two", "a pair of", "a couple of"))
        subject += f" {choose(_SIZES[a.size])} {noun}" if same_size else f" {noun}"
        said = ActorFacts(a.kind, None, a.size if same_size else None, a.motion if same_motion else None)
        if same_motion:
            subject += f" {_action(a, rng)[1]}"
        text, named_actors = f"{subject} {setting}", (said, said)
    else:
        named_actors = tuple(
            ActorFacts(
                actor.kind,
                actor.colour if rng.random() < 0.9 else None,
                actor.size if rng.random() < 0.4 else None,
                actor.motion if rng.random() < 0.8 else None,
            )
            for actor in actors
        )
        form = rng.random()
        if form < 0.1:  # words in a row, as if for a search engine
            words = [
                f"{_name(a, s, rng, '')} {_action(a, rng)[1] if s.motion else ''}"
                for a, s in zip(actors, named_actors, strict=True)
            ]
            words += [choose(_SPOTS[place]) if place else "", choose(_HOURS[time]) if time else ""]
            text = choose((", ", " ")).join(word for word in words if word)
        elif form < 0.22 and place:  # "night sea with a small yellow boat"
            hour = f"{choose(_HOURS[time])} " if time else ""
            spot = choose(_SPOTS[place])
            article = "" if spot.endswith("s") or rng.random() < 0.4 else choose(("a ", "the "))
            text = f"{article}{hour}{spot} with {_clauses(actors, named_actors, rng, finite=False)}"
        else:
            finite = rng.random() < 0.5
            clauses = _clauses(actors, named_actors, rng, finite)
            if rng.random() < 0.2 and setting.strip():
                text = f"{setting}{choose((',', ''))} {'there is ' if not finite else ''}{clauses}"
            else:
                opening = "" if finite or rng.random() < 0.6 else choose(_OPENINGS)
                text = f"{opening} {clauses} {setting}"
    text = " ".join(text.split()).replace(" ,", ",") + ("." if rng.random() < 0.1 else "")
    text = re.sub(r"\ba(?= [aeio])", "an", text)
    return text, Facts(place, time, 2 if len(actors) == 2 else None, named_actors)


def _clauses(actors: list[Actor], said: tuple[ActorFacts, ...], rng: np.random.Generator, finite: bool) -> str:
    """Each actor with what it does: "a ball bounces", or "a ball bouncing" and "a ball that bounces"."""
    pieces = []
    for actor, named in zip(actors, said, strict=True):
        article = (
            ("a", "a", "the", "one", "")[rng.integers(5)] if finite else ("a", "a", "a", "one", "the")[rng.integers(5)]
        )
        does, doing = _action(actor, rng)
        if not named.motion:
            act = ""
        elif finite:
            act = does if rng.random() < 0.7 or does.startswith("is ") else f"is {doing}"
        else:
            act = doing if rng.random() < 0.85 else f"that {does}"
        if act and rng.random() < 0.08:
            act += f" {_MANNERS[rng.integers(len(_MANNERS))]}"
        pieces.append(f"{_name(actor, named, rng, article)} {act}")
    moving = [named.motion is not None for named in said]
    joints = ("and", "and", "while", "as") if finite and all(moving) else _JOINTS
    return f" {joints[rng.integers(len(joints))]} ".join(pieces)


def _name(actor: Actor, named: ActorFacts, rng: np.random.Generator, article: str) -> str:
    nouns = _NOUNS[actor.kind]
    noun = nouns[rng.integers(len(nouns))][0]
    size = _SIZES[actor.size][rng.integers(len(_SIZES[actor.size]))] if named.size else ""
    colour = _COLOURS[actor.colour][rng.integers(len(_COLOURS[actor.colour]))] if named.colour else ""
    charm = _CHARMS[rng.integers(len(_CHARMS))] if rng.random() < 0.06 else ""
    return f"{article} {charm} {size} {colour} {noun}"


def _action(actor: Actor, rng: np.random.Generator) -> tuple[str, str]:
    """What the actor does, as "moves left" and as "moving left"."""
    ways = {"left": _LEFT, "right": _RIGHT, "rises": _UP, "falls": _DOWN}.get(actor.motion)
    if ways is None or (actor.motion in _ACTIONS and rng.random() < 0.6):
        return _ACTIONS[actor.motion][rng.integers(len(_ACTIONS[actor.motion]))]
    verbs = _GO_LIKE[actor.kind] if rng.random() < 0.5 else _GO
    does, doing = verbs[rng.integers(len(verbs))]
    # The plain word is what most people type.
    way = ways[0] if rng.random() < 0.5 else ways[rng.integers(len(ways))]
    return f"{does} {way}", f"{doing} {way}"


def prompt_phrases() -> list[str]:
    """Every piece of text a prompt can contain, for the tokenizer."""
    tables = (_COLOURS, _SIZES, _WHERE, _SPOTS, _WHEN, _HOURS)
    phrases = [phrase for table in tables for variants in table.values() for phrase in variants]
    phrases += [word for nouns in _NOUNS.values() for pair in nouns for word in pair]
    verbs = [_GO, *_GO_LIKE.values(), *_ACTIONS.values()]
    phrases += [word for group in verbs for pair in group for word in pair]
    phrases += [*_LEFT, *_RIGHT, *_UP, *_DOWN, *_OPENINGS, *_JOINTS, *_CHARMS, *_MANNERS]
    return [
        *phrases,
        "two",
        "a pair of",
        "a couple of",
        "with",
        "there is",
        "a an the one",
        "while as",
        "that is",
        ",.",
    ]
