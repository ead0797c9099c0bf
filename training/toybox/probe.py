"""What validation shows of a model of the toy world: does it see what is there, and show what it is told?

A few held-out clips are captioned from the clip alone, a few prompts become clips that the oracle reads; the figures
for publication, on many more, are in `training.evaluate`.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

import cv2
import numpy as np
import torch

from training.sampling import decode, sample
from training.toybox.captions import parse_caption
from training.toybox.facts import Facts, compare, facts
from training.toybox.oracle import read_facts
from training.toybox.prompts import brief_with_facts
from training.toybox.scenes import scene_at

_STEPS = 16
_GUIDANCE = 3.0
_SHOWN_FRAMES = range(0, 17, 4)


class ToyProbe:
    def __init__(self, latents, clips: int, prompts: int):
        """`latents`: the cached latents of the held-out scenes, of which the first `clips` are captioned and the
        prompts of the first `prompts` shown."""
        count, seed = min(clips, len(latents)), latents.settings["seed"]
        self.latents = torch.stack([latents[index] for index in range(count)]).float()
        scenes = [scene_at(seed, index, "held_out") for index in range(count)]
        self.facts = [facts(scene) for scene in scenes]
        self.prompts = [brief_with_facts(scene, np.random.default_rng([seed, i])) for i, scene in enumerate(scenes)]
        self.prompts = self.prompts[:prompts]

    def measure(self, pipeline) -> dict[str, float]:
        """Shares of attributes seen and shown; also remembers what `draw` draws."""
        figures: dict[str, float] = {}
        self.captions = None
        if pipeline.token_scheduler is not None:
            count = len(self.latents)
            _, self.captions = sample(
                pipeline, "understand", [""] * count, list(range(count)), _STEPS, clips=self.latents
            )
            stated = [parse_caption(text) for text in self.captions]
            figures["grammatical"] = float(np.mean([said is not None for said in stated]))
            figures |= score("seen", self.facts, stated)
        texts = [text for text, _ in self.prompts]
        made, _ = sample(pipeline, "generate", texts, list(range(len(texts))), _STEPS, _GUIDANCE)
        self.clips = decode(pipeline, made)
        figures |= score("shown", [named for _, named in self.prompts], [read_facts(clip) for clip in self.clips])
        return figures

    def draw(self, pipeline, folder: Path, step: int) -> None:
        """What `measure` has just made: clips with their prompts, held-out clips with what was said of them."""
        rows = [_row(clip, text, (30, 30, 60)) for clip, (text, _) in zip(self.clips, self.prompts, strict=True)]
        if self.captions is not None:
            for clip, text in zip(decode(pipeline, self.latents[: len(self.prompts)]), self.captions, strict=False):
                rows.append(_row(clip, text, (120, 60, 20)))
        cv2.imwrite(str(folder / f"step-{step:08d}.png"), np.vstack(rows)[..., ::-1])


def score(name: str, named: list[Facts], shown: list[Facts | None]) -> dict[str, float]:
    """Shares of namings that agree, by attribute and together, and of items in which all agree."""
    by_attribute: dict[str, list[bool]] = {}
    whole = []
    for one, other in zip(named, shown, strict=True):
        values = compare(one, other)
        whole.append(all(all(part) for part in values.values()))
        for attribute, part in values.items():
            by_attribute.setdefault(attribute, []).extend(part)
    result = {f"{name}_{attribute}": float(np.mean(values)) for attribute, values in by_attribute.items()}
    result[f"{name}_attributes"] = float(np.mean([value for values in by_attribute.values() for value in values]))
    result[f"{name}_whole"] = float(np.mean(whole))
    return result


def _row(clip: np.ndarray, text: str, colour: tuple[int, int, int]) -> np.ndarray:
    strip = np.hstack([clip[frame] for frame in _SHOWN_FRAMES])
    label = np.full((strip.shape[0], 330, 3), 250, np.uint8)
    for number, line in enumerate(textwrap.wrap(text, 52)[:4]):
        cv2.putText(label, line, (6, 14 + 15 * number), cv2.FONT_HERSHEY_SIMPLEX, 0.35, colour, 1, cv2.LINE_AA)
    return np.hstack([strip, label])
