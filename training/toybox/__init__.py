"""The toy world: scenes drawn from a seed, their clips, their captions, and an oracle that reads a clip back."""

from training.toybox.captions import CAPTION_TOKENS, caption, parse_caption
from training.toybox.facts import ACTOR_ATTRIBUTES, ATTRIBUTES, ActorFacts, Facts, agrees, compare, facts
from training.toybox.oracle import Reading, read, read_facts
from training.toybox.prompts import PROMPT_TOKENS, brief, brief_with_facts
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
from training.toybox.sheet import contact_sheet
from training.toybox.tokenizer import build_tokenizer, caption_vocabulary_size

__all__ = [
    "ACTOR_ATTRIBUTES",
    "ATTRIBUTES",
    "CAPTION_TOKENS",
    "COLOURS",
    "FPS",
    "FRAMES",
    "KINDS",
    "MOTIONS",
    "PLACES",
    "PROMPT_TOKENS",
    "SIDE",
    "SIZES",
    "SPLITS",
    "TIMES",
    "Actor",
    "ActorFacts",
    "Facts",
    "Reading",
    "Scene",
    "agrees",
    "brief",
    "brief_with_facts",
    "build_tokenizer",
    "caption",
    "caption_vocabulary_size",
    "compare",
    "contact_sheet",
    "facts",
    "is_held_out",
    "parse_caption",
    "read",
    "read_facts",
    "render",
    "sample_scene",
    "scene_at",
]
