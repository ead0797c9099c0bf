"""The toy world as training sees it: clips encoded once, words drawn anew at every visit.

Scenes are numbered and repeatable, so a cache holds nothing but latents: shards of safetensors that say which world and
which autoencoder made them. Several processes may fill a cache at once and any of them may die. It knows the form of a
batch (`training.objective`) and nothing of what is learned from it.
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import time
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from training.cache import tokenizer_version
from training.ledger import locked, replacing
from training.stages import StageData
from training.toybox.captions import CAPTION_TOKENS, caption
from training.toybox.prompts import PROMPT_TOKENS, brief
from training.toybox.render import render
from training.toybox.scenes import SPLITS, Scene, scene_at
from training.vae import to_tensor
from univigu import UniViGUPipeline
from univigu.whole_clip import encode_clip

_BATCH = 8
_DRAWN, _AHEAD = 64, 8  # clips that a process draws at a time; shards that are drawn before they are needed
_WORDINGS = 4  # of each clip, where they are kept


@dataclass
class ToyDataConfig:
    cache: str = "cache/toybox"
    seed: int = 0  # of the order of clips and the wording of texts; that of the scenes is the cache's
    two_actors: float | None = None  # share of training's clips that show two; null: as they come, about half
    detailed_prompts: float = 0.0  # share of training's prompts that are detailed captions and leave nothing open
    # So many training clips are kept on the accelerator, with words drawn when they were cached (toybox-cache
    # --tokenizer), and the processor has nothing to do for a batch; 0 reads the disk.
    resident: int = 0
    # The cache is still being filled: the first step knows so many clips, each step so many more than the one before.
    resident_first: int = 0
    resident_growth: float = 0.0
    validation_clips: int = 64  # to caption
    validation_prompts: int = 8  # to show; the oracle needs a second for each clip


@cache
def world_version() -> str:
    """A fingerprint of how scenes are drawn and look, from a few of them."""
    digest = hashlib.sha256()
    for split in SPLITS:
        for index in range(6):
            scene = scene_at(0, index, split)
            digest.update(repr(scene).encode() + render(scene).tobytes())
    return digest.hexdigest()[:16]


def vae_version(folder: str | Path) -> str:
    """A fingerprint of an autoencoder's weights and latent statistics."""
    folder, digest = Path(folder), hashlib.sha256()
    config = _read_json(folder / "config.json")
    digest.update(json.dumps({key: config[key] for key in sorted(config) if not key.startswith("_")}).encode())
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ValueError(f"'{folder}' holds no weights of an autoencoder (*.safetensors).")
    for path in weights:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


# ---- writing a cache ----


def encode(vae: AutoencoderKLWan, clips: np.ndarray) -> torch.Tensor:
    """Normalised latents (B, C, F, H, W) of uint8 clips (B, F, H, W, 3), as the pipeline makes them."""
    shape = (1, -1, 1, 1, 1)
    mean, std = (torch.tensor(values).view(shape) for values in (vae.config.latents_mean, vae.config.latents_std))
    with torch.no_grad():
        latents = encode_clip(vae, to_tensor(clips).to(vae.device, vae.dtype)).chunk(2, dim=1)[0].float().cpu()
    return (latents - mean) / std


def fill_cache(
    vae_folder: Path,
    target: Path,
    counts: dict[str, int],
    seed: int = 0,
    processes: int = 1,
    shard_clips: int = 512,
    tokenizer: Path | None = None,
) -> None:
    """Encode the first scenes of every split, as many as `counts` says; shards that are there stay.

    With a `tokenizer`, its folder, each clip of a new shard is kept with words. Where there is an accelerator it
    encodes, and the processes draw; else each process does both."""
    settings = {"world": world_version(), "vae": vae_version(vae_folder), "seed": seed, "shard": shard_clips}
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"The cache's folder '{target}' cannot be made: {error.strerror}.") from None
    with locked(target / ".lock", wait=False):
        if not (target / "settings.json").is_file():
            with replacing(target / "settings.json", target / ".settings.partial") as partial:
                partial.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        _check_settings(target, settings)
        for leftover in target.glob(".*.partial"):
            leftover.unlink()
        jobs = []
        for split in sorted(counts):  # held_out first: it is small, and no run starts without it
            for start in range(0, counts[split], shard_clips):
                path = target / f"{split}-{start:07d}.safetensors"
                if not path.exists():
                    clips = range(start, min(start + shard_clips, counts[split]))
                    jobs.append((path, split, clips, settings, tokenizer))
        began, made = time.monotonic(), 0
        if torch.accelerator.is_available():
            pool, done = _by_accelerator(jobs, vae_folder, processes)
        elif processes == 1:
            _start_encoder(vae_folder)
            done = map(_write_shard, jobs)
            pool = nullcontext()
        else:
            spawn = multiprocessing.get_context("spawn")
            pool = ProcessPoolExecutor(processes, spawn, _start_encoder, (vae_folder,))
            done = pool.map(_write_shard, jobs)
        with pool:
            for number, (path, _, clips, *_) in enumerate(jobs, 1):
                next(done)
                made += len(clips)
                rate = made / (time.monotonic() - began)
                print(f"{path.name} ({number} of {len(jobs)}), {rate:.1f} clips a second", flush=True)


_encoder: AutoencoderKLWan  # of this process


def _start_encoder(vae_folder: Path) -> None:
    global _encoder
    _encoder = AutoencoderKLWan.from_pretrained(vae_folder, torch_dtype=torch.float32).eval()
    for layer in _encoder.modules():
        if isinstance(layer, torch.nn.Conv3d):  # several times faster on CPUs
            layer.to(memory_format=torch.channels_last_3d)


def _by_accelerator(jobs: list[tuple], vae_folder: Path, processes: int) -> tuple[ProcessPoolExecutor, Iterator[None]]:
    device = torch.accelerator.current_accelerator()
    vae = AutoencoderKLWan.from_pretrained(vae_folder, torch_dtype=torch.float32).eval().to(device)
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"))

    def submit(job: tuple) -> list[Future]:
        _, split, clips, settings, tokenizer = job
        parts = [range(start, min(start + _DRAWN, clips.stop)) for start in range(clips.start, clips.stop, _DRAWN)]
        return [pool.submit(_draw, settings["seed"], split, part, tokenizer) for part in parts]

    def write() -> Iterator[None]:
        waiting = deque(submit(job) for job in jobs[:_AHEAD])
        for number, job in enumerate(jobs):
            if number + _AHEAD < len(jobs):
                waiting.append(submit(jobs[number + _AHEAD]))
            drawn = [part.result() for part in waiting.popleft()]
            latents = [encode(vae, clips).half() for clips, _ in drawn]
            _save_shard(job, torch.cat(latents), np.concatenate([words for _, words in drawn]))
            yield

    return pool, write()


def _write_shard(job: tuple) -> None:
    _, split, clips, settings, tokenizer = job
    parts, words = [], []
    for start in range(clips.start, clips.stop, _BATCH):
        part = range(start, min(start + _BATCH, clips.stop))
        drawn = _draw(settings["seed"], split, part, tokenizer)
        parts.append(encode(_encoder, drawn[0]).half())
        words.append(drawn[1])
    _save_shard(job, torch.cat(parts), np.concatenate(words))


def _draw(seed: int, split: str, indices: range, tokenizer: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """Clips (B, F, H, W, 3) in uint8, and their words (B, wordings, ids): see `words_in_rows`."""
    scenes = [scene_at(seed, index, split) for index in indices]
    words = np.empty((len(scenes), 0, 0), dtype=np.int16)
    if tokenizer is not None:
        rngs = [np.random.default_rng([seed, index]) for index in indices]
        words = np.stack([words_in_rows(s, rng, _tokenizer(tokenizer)) for s, rng in zip(scenes, rngs, strict=True)])
    return np.stack([render(scene) for scene in scenes]), words


def _save_shard(job: tuple, latents: torch.Tensor, words: np.ndarray) -> None:
    path, split, clips, settings, tokenizer = job
    if not torch.isfinite(latents).all():
        raise ValueError("The autoencoder gives latents that are not finite: its training has failed.")
    latents = latents.contiguous()  # an encoder in another memory layout gives them in it too
    metadata, tensors = {**settings, "split": split, "start": clips.start}, {"latents": latents}
    if tokenizer is not None:
        tensors["words"] = torch.from_numpy(words)
        metadata["tokenizer"] = tokenizer_version(_tokenizer(tokenizer))
    metadata["crc32"] = _checksum(tensors)
    with replacing(path, path.with_name(f".{path.stem}.partial")) as partial:
        try:
            save_file(tensors, partial, {key: str(value) for key, value in metadata.items()})
        except SafetensorError as error:  # what a full disk looks like from there
            raise ValueError(f"'{path}' cannot be written: {' '.join(str(error).split())}.") from None


def _checksum(tensors: dict[str, torch.Tensor]) -> int:
    checksum = 0
    for name in sorted(tensors):
        checksum = zlib.crc32(tensors[name].numpy().tobytes(), checksum)
    return checksum


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise ValueError(f"'{path}' is missing: '{path.parent}' is not what it should be.") from None
    except ValueError:
        raise ValueError(f"'{path}' is damaged: it is not JSON.") from None


def _check_settings(folder: Path, wanted: dict) -> None:
    found = _read_json(folder / "settings.json")
    what = {
        "world": "another version of the toy world",
        "vae": "another autoencoder",
        "seed": "another seed",
        "shard": "another shard size",
    }
    for key, value in wanted.items():
        if found.get(key) != value:
            raise ValueError(
                f"The latents in '{folder}' were made with {what[key]} ({found.get(key)}, not {value}): "
                "give the one they were made with, or another folder for the cache."
            )


# ---- reading one ----


class LatentCache:
    """The latents of one split, (clips, C, F, H, W) in half precision, mapped from the disk."""

    def __init__(self, folder: Path, split: str):
        self.settings = _read_json(folder / "settings.json")
        self.shards: list[torch.Tensor] = []
        for path in sorted(folder.glob(f"{split}-*.safetensors")):
            self.shards.append(read_shard(path, {**self.settings, "split": split, "start": len(self)})["latents"])
        if not self.shards:
            raise ValueError(
                f"The cache '{folder}' holds no {split} clips: fill it with python -m training toybox-cache."
            )

    def __len__(self) -> int:
        return sum(map(len, self.shards))

    def __getitem__(self, index: int) -> torch.Tensor:
        shard, inside = divmod(index, self.settings["shard"])
        return self.shards[shard][inside]


def read_shard(path: Path, wanted: dict) -> dict[str, torch.Tensor]:
    """The tensors of a shard that is what its place in the cache says."""
    again = "remove it and run python -m training toybox-cache again"
    try:
        with safe_open(path, "pt") as file:
            tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"The shard '{path}' is damaged ({' '.join(str(error).split())}): {again}.") from None
    for key, value in wanted.items():
        if key == "tokenizer" and metadata.get(key) != value:
            raise ValueError(
                f"The shard '{path}' holds {'no words' if key not in metadata else 'the words of another tokenizer'}: "
                "fill a new cache with python -m training toybox-cache --tokenizer and the model's own."
            )
        if metadata.get(key) != str(value):
            raise ValueError(
                f"The shard '{path}' does not belong there (its {key} is {metadata.get(key)} instead of {value}): "
                f"{again}."
            )
    if metadata["crc32"] != str(_checksum(tensors)):
        raise ValueError(f"The shard '{path}' is damaged (its checksum is wrong): {again}.")
    return tensors


def words_of(scene: Scene, rng: np.random.Generator, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Ids of a caption, of a brief prompt, and of a prompt that names all, brief again where that would be too long."""
    said, brief_prompt = (tokenizer(text(scene, rng)).input_ids for text in (caption, brief))
    whole = tokenizer(caption(scene, rng)).input_ids
    return [said, brief_prompt, whole if len(whole) <= PROMPT_TOKENS else brief_prompt]


def words_in_rows(scene: Scene, rng: np.random.Generator, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Each wording is a row: caption, brief prompt and whole one, each padded, and how many actors there are."""
    sizes = CAPTION_TOKENS, PROMPT_TOKENS, PROMPT_TOKENS
    rows = np.full((_WORDINGS, sum(sizes) + 1), tokenizer.pad_token_id, dtype=np.int16)
    for row in rows:
        start = 0
        for ids, size in zip(words_of(scene, rng, tokenizer), sizes, strict=True):
            row[start : start + len(ids)] = ids
            start += size
        row[-1] = len(scene.actors)
    return rows


_tokenizer = cache(PreTrainedTokenizerFast.from_pretrained)


def check_share(two_actors: float | None) -> None:
    if two_actors is not None and not 0 <= two_actors <= 1:
        raise ValueError(f"data.two_actors is a share between 0 and 1, not {two_actors}.")


def by_actors(two: np.ndarray, share: float | None) -> list[np.ndarray]:
    """The clips' numbers in kinds that are drawn from apart: all, or those of one actor and those of two."""
    if share is None:
        return [np.arange(len(two))]
    if (share < 1 and two.all()) or (share > 0 and not two.any()):
        raise ValueError(f"data.two_actors is {share}, and the cache has no such clips.")
    return [np.flatnonzero(~two), np.flatnonzero(two)]


class ToyLatents(Dataset):
    """Cached clips with words of the moment; item i is the same whenever it is asked for.

    Endless when shuffled: every clip comes once in each round, in an order of its own; with `two_actors` those of one
    actor and those of two each in rounds of their own.
    """

    def __init__(
        self,
        latents: LatentCache,
        split: str,
        seed: int,
        tokenizer,
        shuffled: bool,
        count: int | None = None,
        two_actors: float | None = None,
        detailed_prompts: float = 0.0,
    ):
        self.latents, self.split, self.seed, self.tokenizer, self.shuffled = latents, split, seed, tokenizer, shuffled
        self.count = 2**62 if shuffled else min(count or len(latents), len(latents))
        self.detailed_prompts = detailed_prompts
        self.two_actors = two_actors
        check_share(two_actors)
        two = np.zeros(len(latents), dtype=bool)
        if two_actors is not None:
            two[:] = [len(_scene(latents.settings["seed"], i, split).actors) == 2 for i in range(len(latents))]
        self.clips = by_actors(two, two_actors)

    def __len__(self) -> int:
        return self.count

    def scene_index(self, position: int) -> int:
        if not self.shuffled:
            return position
        clips = self.clips[0]
        if self.two_actors is not None:
            # of the first n positions floor(n * share) show two, so each kind counts on by itself
            before, after = (math.floor(n * self.two_actors) for n in (position, position + 1))
            clips = self.clips[after - before]
            position = before if after > before else position - before
        around, inside = divmod(position, len(clips))
        return int(clips[_order(self.seed, around, len(clips))[inside]])

    def __getitem__(self, position: int) -> dict[str, torch.Tensor]:
        index = self.scene_index(position)
        scene = _scene(self.latents.settings["seed"], index, self.split)
        rng = np.random.default_rng([self.seed, position, zlib.crc32(self.split.encode())])
        detailed, prompt, whole = words_of(scene, rng, self.tokenizer)
        if rng.random() < self.detailed_prompts:
            prompt = whole
        padded = prompt + [self.tokenizer.pad_token_id] * (PROMPT_TOKENS - len(prompt))
        return {
            "latents": self.latents[index],
            "caption_ids": torch.tensor(fill(detailed, self.tokenizer)),
            "prompt_ids": torch.tensor(fill(prompt, self.tokenizer)),
            "prompt_encoder_ids": torch.tensor(padded),
            "prompt_encoder_mask": torch.tensor([1] * len(prompt) + [0] * (PROMPT_TOKENS - len(prompt))),
            "position": torch.tensor(position),
        }


def fill(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end with EOS, filled with EOS to the length of the caption stream."""
    return ids + [tokenizer.eos_token_id] * (CAPTION_TOKENS - len(ids))


@lru_cache(maxsize=4)
def _order(seed: int, around: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, around]).permutation(count)


_scene = lru_cache(maxsize=100_000)(scene_at)  # placing actors takes longer than all the rest of an item


def open_toybox(config: ToyDataConfig, pipeline: UniViGUPipeline, batch_size: int) -> StageData:
    """Training and validation clips for a pipeline whose autoencoder made them."""
    from training.toybox.probe import ToyProbe
    from training.toybox.resident import ResidentToyLatents

    folder, tokenizer = Path(config.cache), pipeline.tokenizer
    held_out = LatentCache(folder, "held_out")
    _check_settings(folder, {"world": world_version()})
    if config.resident:
        train = ResidentToyLatents(config, held_out.settings, tokenizer, batch_size)
        first = train.first["latents"][0]
    else:
        latents = LatentCache(folder, "train")
        first = latents[0]
        train = ToyLatents(
            latents,
            "train",
            config.seed,
            tokenizer,
            shuffled=True,
            two_actors=config.two_actors,
            detailed_prompts=config.detailed_prompts,
        )
    example = encode(pipeline.vae.float(), render(scene_at(held_out.settings["seed"], 0, "train"))[None])[0]
    if (example - first.float()).abs().max() > 0.05:
        raise ValueError(
            f"The latents in '{folder}' were made by another autoencoder than the model's: give the model's own cache, "
            "or fill a new one with python -m training toybox-cache."
        )
    empty = tokenizer("", padding="max_length", max_length=PROMPT_TOKENS, return_tensors="pt")
    return StageData(
        train=train,
        held_out=ToyLatents(held_out, "held_out", config.seed, tokenizer, False, config.validation_clips),
        empty_prompt=(empty.input_ids[0], empty.attention_mask[0]),
        probe=ToyProbe(held_out, config.validation_clips, config.validation_prompts),
    )
