"""The toy world in the accelerator's own memory: a batch is drawn there and costs the processor nothing.

Clips and their words come from a cache that may still be growing while training goes on. What a batch may draw from
depends on its number alone, so it is the same batch however fast the cache was filled: where that is late, training
waits. It knows nothing of what is learned.
"""

from __future__ import annotations

import math
import threading
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from training.cache import tokenizer_version
from training.toybox.captions import CAPTION_TOKENS
from training.toybox.dataset import by_actors, check_share, read_shard
from training.toybox.prompts import PROMPT_TOKENS

_PATIENCE = 120.0  # seconds for which no new shard may come


class ResidentToyLatents(Dataset):
    """Item i is micro-batch i, with clips drawn evenly from those that its step knows."""

    gives_batches = resident = True

    def __init__(self, config, settings: dict, tokenizer, batch_size: int):
        """`config`: a ToyDataConfig; `settings`: what the cache says of its shards."""
        check_share(config.two_actors)
        self.config, self.settings, self.batch_size, self.micro_batches = config, settings, batch_size, 1
        self.pad, self.end = tokenizer.pad_token_id, tokenizer.eos_token_id
        self.wanted = {**settings, "split": "train", "tokenizer": tokenizer_version(tokenizer)}
        self.first = self.read(0)
        self.latents = self.words = None
        self.loaded, self.failure, self.news = 0, None, threading.Condition()
        self.known, self.kinds = 0, []

    def __len__(self) -> int:
        return 2**62

    def known_at(self, step: int) -> int:
        """How many clips a step may draw from, in whole shards."""
        config, shard = self.config, self.settings["shard"]
        if not config.resident_first:
            return config.resident
        known = math.ceil((config.resident_first + config.resident_growth * step) / shard) * shard
        return min(known, config.resident)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        self._wait_for(self.known_at(number // self.micro_batches))
        device, size, seed = self.latents.device, self.batch_size, self.config.seed
        generator = torch.Generator(device).manual_seed(seed * 1_000_003 + number)
        drawn = torch.rand(4, size, device=device, generator=generator)
        first = number * size
        if self.config.two_actors is None:
            counts = [size]
        else:
            share = self.config.two_actors
            two = math.floor((first + size) * share) - math.floor(first * share)
            counts = [size - two, two]
        parts, start = [], 0
        for kind, count in zip(self.kinds, counts, strict=True):
            at = (drawn[0, start : start + count] * len(kind)).long().clamp_(max=len(kind) - 1)
            parts.append(kind[at])
            start += count
        index = torch.cat(parts)[drawn[1].argsort()]  # tasks share out a batch from its front
        wording = (drawn[2] * self.words.shape[1]).long().clamp_(max=self.words.shape[1] - 1)
        words = self.words[index, wording].long()
        caption, brief, whole = words[:, :-1].split([CAPTION_TOKENS, PROMPT_TOKENS, PROMPT_TOKENS], dim=1)
        prompt = torch.where((drawn[3] < self.config.detailed_prompts)[:, None], whole, brief)
        filler = torch.full((size, CAPTION_TOKENS - PROMPT_TOKENS), self.pad, device=device)
        as_caption = torch.cat([prompt, filler], dim=1)
        return {
            "latents": self.latents[index],
            "caption_ids": torch.where(caption == self.pad, self.end, caption),
            "prompt_ids": torch.where(as_caption == self.pad, self.end, as_caption),
            "prompt_encoder_ids": prompt,
            "prompt_encoder_mask": (prompt != self.pad).long(),
            "position": torch.arange(first, first + size, device=device),
        }

    # ---- the cache ----

    def _wait_for(self, count: int) -> None:
        if self.latents is None:
            device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
            latents, words = (self.first[name] for name in ("latents", "words"))
            self.latents = torch.empty((self.config.resident, *latents.shape[1:]), dtype=latents.dtype, device=device)
            self.words = torch.empty((self.config.resident, *words.shape[1:]), dtype=words.dtype, device=device)
            self.actors = np.empty(self.config.resident, dtype=np.int16)
            threading.Thread(target=self._follow, daemon=True).start()
        if count == self.known:
            return
        with self.news:
            self.news.wait_for(lambda: self.loaded >= count or self.failure is not None)
        if self.loaded < count:
            raise ValueError(str(self.failure))
        clips = by_actors(self.actors[:count] == 2, self.config.two_actors)
        self.known, self.kinds = count, [torch.from_numpy(kind).to(self.latents.device) for kind in clips]

    def _follow(self) -> None:
        """Take up shard after shard as they come, in a thread of its own."""
        failure: Exception | None = None
        try:
            for start in range(0, self.config.resident, self.settings["shard"]):
                tensors = self.read(start) if start else self.first
                part = slice(start, min(start + len(tensors["latents"]), self.config.resident))
                for kept, name in ((self.latents, "latents"), (self.words, "words")):
                    kept[part].copy_(tensors[name][: part.stop - start])
                self.actors[part] = tensors["words"][: part.stop - start, 0, -1].numpy()
                with self.news:
                    self.loaded = part.stop
                    self.news.notify_all()
        except Exception as error:  # told where a batch is asked for
            failure = error
        with self.news:
            self.failure = failure
            self.news.notify_all()

    def read(self, start: int) -> dict[str, torch.Tensor]:
        path = Path(self.config.cache) / f"train-{start:07d}.safetensors"
        until = time.monotonic() + (_PATIENCE if start and self.config.resident_first else 0)
        while not path.is_file():
            if time.monotonic() >= until:
                raise ValueError(
                    f"data.resident is {self.config.resident}, and the cache '{path.parent}' ends after {start} "
                    "training clips: fill it with python -m training toybox-cache --tokenizer, or lower data.resident."
                )
            time.sleep(0.1)
        return read_shard(path, {**self.wanted, "start": start})
