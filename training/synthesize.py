"""Makes training data from prompts alone (section 4.1): clips by a text-to-video pipeline, then a detailed caption of
each by a vision-language model.

Both phases resume by themselves: every finished item is one line on disk, written after its clip, so a crash costs the
items in work and nothing else. Each process appends to a part of its own and they share nothing but the folder, so any
number of them, on any machines, can work and stop at any time. It knows nothing of training.
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
import os
import re
import string
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from PIL import Image
from safetensors import SafetensorError
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from training.ledger import Ledger, locked, replacing, shard_of, writing
from univigu.video import VideoClip, probe, read_video, write_video
from univigu.weights import WAN_1_3B_REPO

TEMPLATE_FOLDER = Path(__file__).parent / "templates"
TOKENS_PER_WORD = 1.35  # of umT5 in English prose, punctuation included
FINGERPRINT_BYTES = 1 << 20  # read at both ends of every file of a model
LOADING_ERRORS = (OSError, ValueError, ImportError, RuntimeError, AttributeError, KeyError, TypeError, SafetensorError)
Dtype = Literal["auto", "float32", "bfloat16", "float16"]  # auto: bfloat16 on a GPU, float32 on a CPU


@dataclass
class ClipsConfig:
    model: str = WAN_1_3B_REPO  # a folder or a Hub id
    num_frames: int = 81
    height: int = 480
    width: int = 832
    fps: float = 16.0
    steps: int = 50
    guidance_scale: float = 5.0
    negative_prompt: str = ""
    dtype: Dtype = "auto"  # the autoencoder stays float32
    min_contrast: float = 2.0  # levels of 255 by which a frame's pixels differ from its mean; below, the clip is blank
    min_motion: float = 0.1  # levels of 255 by which one frame differs from the next; below, the clip is static
    attempts: int = 2
    batch_size: int = 1
    device_map: str | None = None  # such as balanced, to spread the parts over several GPUs
    cpu_offload: bool = False  # keeps on the GPU only the part at work


@dataclass
class CaptionsConfig:
    model: str = "Qwen/Qwen2.5-VL-7B-Instruct"  # a folder or a Hub id
    template: str = "detailed_caption"  # a name in training/templates, or a .txt file
    retry_template: str = "detailed_caption_retry"
    content: Literal["video", "images"] = "video"  # how the model takes frames; video needs torchvision
    frames: int = 17
    temperature: float = 0.7  # 0 takes the likeliest token
    top_p: float = 0.9
    max_new_tokens: int = 512
    dtype: Dtype = "auto"
    attempts: int = 4
    batch_size: int = 4
    device_map: str | None = None  # such as auto, to spread the model over several GPUs


@dataclass
class SynthesisConfig:
    prompts: str = ""
    folder: str = ""
    seed: int = 0
    device: str = ""  # empty: the process's own GPU, or the CPU
    tokenizer: str = ""  # what counts tokens, a folder or a Hub id; empty: the tokenizer of clips.model
    prompt_tokens: tuple[int, int] = (0, 128)  # section 4.1; the end-of-text token counts, as it fills a place
    caption_tokens: tuple[int, int] = (128, 256)
    clips: ClipsConfig = field(default_factory=ClipsConfig)
    captions: CaptionsConfig = field(default_factory=CaptionsConfig)


# What decides how fast or how often something is made, and not what is made, may change from one run to the next.
NOT_IN_SETTINGS = ("attempts", "batch_size", "device_map", "cpu_offload")


@dataclass(frozen=True)
class Item:
    """One prompt of the list. `id` names its clip and comes from its text, so the list may grow or be reordered."""

    id: str
    prompt: str
    tokens: int


def synthesize(
    config: SynthesisConfig, phase: Literal["all", "clips", "captions", "merge"] = "all", shard: str = "0/1"
) -> int:
    """Make what is missing of this process's share of the clips, then of the captions, then merge all there is.

    `shard` is "i/n" for the i-th of n independent launches; the processes of one `accelerate launch` share their
    launch's part. Returns an exit code; raises ValueError where the work cannot go on.
    """
    _check(config)
    process = PartialState()
    device = _device(config.device, process.device)
    index, count = shard_of(shard)
    index = index * process.num_processes + process.process_index
    count *= process.num_processes

    counter = _tokenizer(config.tokenizer or config.clips.model)
    items = read_prompts(Path(config.prompts), counter, config.prompt_tokens)
    mine, share = items[index::count], f", share {index} of {count}" if count > 1 else ""
    folder = Path(config.folder)
    clips = Ledger(folder / "clips", index, lambda record: (folder / record["video"]).is_file())
    captions = Ledger(folder / "captions", index)

    # Everything that can be wrong is looked at before the first clip, which may be days before the first caption.
    if phase in ("all", "clips"):
        generator_folder = _model_folder(config.clips.model, "clips.model")
        clips.begin({"seed": config.seed, **_settings(config.clips, generator_folder, device)})
    if phase in ("all", "captions"):
        captioner = Captioner(config, _model_folder(config.captions.model, "captions.model"), device, counter)
        captions.begin(captioner.description)

    if phase in ("all", "clips"):
        with clips.opened():
            make_clips(config, generator_folder, device, clips, mine, share)
    if phase in ("all", "captions"):
        with captions.opened():
            make_captions(config, captioner, clips, captions, mine, share)
    merge(folder, items, clips, captions)
    return 0


# ------------------------------------------------------------------------------------------------------------- prompts


def read_prompts(path: Path, tokenizer: Any, limits: tuple[int, int]) -> list[Item]:
    """The prompts of a text file, one a line, or of a JSONL file's "prompt" fields; all must be within the limits."""
    if not path.is_file():
        raise ValueError(
            f"There is no file of prompts '{path}'; give prompts= a text file, one prompt a line, or JSONL."
        )
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise ValueError(f"'{path}' is not UTF-8 text.") from None
    prompts: list[tuple[int, str]] = []
    for number, line in enumerate(lines, 1):
        if path.suffix == ".jsonl" and line.strip():
            try:
                prompt = json.loads(line)["prompt"]
            except (ValueError, KeyError, TypeError):
                prompt = None
            if not isinstance(prompt, str) or not prompt.strip():
                raise ValueError(f"Line {number} of '{path}' must be a JSON object with a text under \"prompt\".")
            line = prompt
        if line.strip():
            prompts.append((number, " ".join(line.split())))
    if not prompts:
        raise ValueError(f"'{path}' holds no prompts.")
    lengths = [len(ids) for ids in tokenizer([prompt for _, prompt in prompts])["input_ids"]]
    low, high = limits
    wrong = [f"{number} ({n})" for (number, _), n in zip(prompts, lengths, strict=True) if not low <= n <= high]
    if wrong:
        more = f" and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        raise ValueError(
            f"Prompts must have {low} to {high} tokens; these lines of '{path}' do not (their tokens in brackets): "
            f"{', '.join(wrong[:10])}{more}."
        )
    seen: dict[str, int] = {}
    items = []
    for (_, prompt), tokens in zip(prompts, lengths, strict=True):
        seen[prompt] = seen.get(prompt, -1) + 1
        items.append(Item(_digest("item", prompt, seen[prompt])[:16], prompt, tokens))
    return items


def read_template(name: str, fields: tuple[str, ...], needed: str | None = None) -> string.Template:
    """A prompt template: a name in training/templates or a .txt file, with $fields; $$ is a dollar sign."""
    path = Path(name) if name.endswith(".txt") else TEMPLATE_FOLDER / f"{name}.txt"
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in TEMPLATE_FOLDER.glob("*.txt")))
        raise ValueError(f"There is no prompt template {name!r}: give a .txt file or one of {names}.")
    template = string.Template(path.read_text(encoding="utf-8").strip())
    known = ", ".join(f"${name}" for name in fields)
    try:
        filled = template.substitute(dict.fromkeys(fields, ""))
    except (KeyError, ValueError) as error:
        raise ValueError(f"The prompt template '{path}' may use {known} and $$, but not {error}.") from None
    if needed and filled == template.substitute({**dict.fromkeys(fields, ""), needed: "x"}):
        raise ValueError(f"The prompt template '{path}' does not use ${needed}, which it is for.")
    return template


# --------------------------------------------------------------------------------------------------------------- clips


def make_clips(
    config: SynthesisConfig, model_folder: Path, device: torch.device, ledger: Ledger, items: list[Item], share: str
) -> None:
    settings, folder = config.clips, Path(config.folder)
    done, failed = ledger.read()
    todo = _todo(items, done, failed, settings.attempts)
    finished = len(items) - len(todo)
    print(f"Clips{share}: {finished} of {len(items)} are done.", flush=True)
    if not todo:
        return
    pipe = load_generator(settings, model_folder, device)
    queue = deque((item, failed.get(item.id, {}).get("attempts", 0)) for item in todo)
    while queue:
        batch = [queue.popleft() for _ in range(min(settings.batch_size, len(queue)))]
        seeds = [_seed("clip", config.seed, item.id, attempt) for item, attempt in batch]
        with _memory("clips.batch_size=1, a smaller clip or clips.cpu_offload=true"):
            clips = generate_clips(pipe, settings, [item.prompt for item, _ in batch], seeds)
        again = []
        for (item, attempt), seed, clip in zip(batch, seeds, clips, strict=True):
            reason = clip_problem(clip, settings.min_contrast, settings.min_motion)
            if reason and attempt + 1 < settings.attempts:
                again.append((item, attempt + 1))
                continue
            record = {"id": item.id, "prompt": item.prompt, "seed": seed, "attempts": attempt + 1}
            if reason:
                record["reason"] = reason
            else:
                record["video"] = f"videos/{item.id}.mp4"
                with replacing(folder / record["video"], ledger.partial) as partial:
                    write_video(partial, (clip * 255).round().astype(np.uint8), settings.fps)
            ledger.append(record)
            finished += 1
            print(f"clip {finished} of {len(items)}{share}: {item.id} {reason or 'done'}", flush=True)
        queue.extendleft(reversed(again))  # first, so that no more than a batch is ever in work
    del pipe
    gc.collect()
    torch.cuda.empty_cache()  # does nothing without a GPU


def load_generator(settings: ClipsConfig, folder: Path, device: torch.device) -> DiffusionPipeline:
    dtypes = {"default": _dtype(settings.dtype, device), "vae": torch.float32}
    try:
        pipe = DiffusionPipeline.from_pretrained(
            folder, dtype=dtypes, device_map=settings.device_map, use_safetensors=True, local_files_only=True
        )
    except LOADING_ERRORS as error:
        raise ValueError(f"The text-to-video pipeline in '{folder}' cannot be loaded: {_sentence(error)}") from error
    pipe.set_progress_bar_config(disable=True)
    if settings.cpu_offload:
        pipe.enable_model_cpu_offload(device=device)
    elif settings.device_map is None:
        pipe.to(device)
    return pipe


def generate_clips(pipe: DiffusionPipeline, settings: ClipsConfig, prompts: list[str], seeds: list[int]) -> np.ndarray:
    """Clips (B, F, H, W, 3) in [0, 1], each from its own seed, so that neighbours in a batch do not matter."""
    clips = pipe(
        prompt=prompts,
        negative_prompt=[settings.negative_prompt] * len(prompts),
        num_frames=settings.num_frames,
        height=settings.height,
        width=settings.width,
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance_scale,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="np",
    ).frames
    wanted = (len(prompts), settings.num_frames, settings.height, settings.width, 3)
    if clips.shape != wanted:  # some pipelines round sizes to what their patches allow
        raise ValueError(
            f"The text-to-video pipeline makes clips of {clips.shape[1]} frames of {clips.shape[2]}x{clips.shape[3]} "
            f"where {wanted[1]} of {wanted[2]}x{wanted[3]} were asked for; choose a size that it can make."
        )
    return clips


def clip_problem(clip: np.ndarray, min_contrast: float, min_motion: float) -> str | None:
    """Why a clip (F, H, W, 3) in [0, 1] is of no use, if it is of none."""
    if not np.isfinite(clip).all():
        return "the clip holds values that are not numbers"
    contrast = 255 * float(clip.std(axis=(1, 2)).mean())
    if contrast < min_contrast:
        shade = "black" if clip.mean() < 0.1 else "blank"
        return f"the clip is {shade}: its contrast is {contrast:.2f} of 255, under {min_contrast:g}"
    motion = 255 * float(np.abs(np.diff(clip, axis=0)).mean()) if len(clip) > 1 else math.inf
    if motion < min_motion:
        return f"the clip is static: frames differ by {motion:.3f} of 255, under {min_motion:g}"
    return None


# ------------------------------------------------------------------------------------------------------------ captions


class SeededSampling(LogitsProcessor):
    """Turns the argmax into a draw from the model's distribution (the Gumbel-max trick).

    Sampling by `generate` itself draws a batch from one global state; here every row has a generator of its own, so a
    caption depends on its seed and not on its neighbours.
    """

    def __init__(self, seeds: list[int], temperature: float, top_p: float):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.warpers = [TemperatureLogitsWarper(temperature), TopPLogitsWarper(top_p)]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.float()
        for warper in self.warpers:
            scores = warper(input_ids, scores)
        noise = [torch.empty(scores.shape[-1]).exponential_(generator=generator) for generator in self.generators]
        return scores - torch.stack(noise).log().to(scores.device)


class Captioner:
    """A vision-language model behind a chat. Its weights wait for `load`: a finished run needs none."""

    def __init__(self, config: SynthesisConfig, folder: Path, device: torch.device, counter: Any):
        self.settings, self.folder, self.device, self.counter = config.captions, folder, device, counter
        self.limits = config.caption_tokens
        self.request = read_template(self.settings.template, ("prompt", "min_words", "max_words"), "prompt")
        self.retry = read_template(self.settings.retry_template, ("words", "min_words", "max_words"))
        # Aim a little inside the limits: a model keeps to a number of words only roughly.
        self.min_words = math.ceil(1.15 * self.limits[0] / TOKENS_PER_WORD)
        self.max_words = max(self.min_words, int(0.88 * self.limits[1] / TOKENS_PER_WORD))
        self.description = {
            "seed": config.seed,
            **_settings(self.settings, folder, device),
            "caption_tokens": self.limits,
            "template_text": self.request.template,
            "retry_template_text": self.retry.template,
        }

    def load(self) -> None:
        try:
            self.processor = AutoProcessor.from_pretrained(self.folder, local_files_only=True)
            self.model = AutoModelForImageTextToText.from_pretrained(
                self.folder,
                dtype=_dtype(self.settings.dtype, self.device),
                device_map=self.settings.device_map,
                use_safetensors=True,
                local_files_only=True,
            ).eval()
        except LOADING_ERRORS as error:
            raise ValueError(
                f"The vision-language model in '{self.folder}' cannot be loaded: {_sentence(error)}"
            ) from error
        if getattr(self.processor, "chat_template", None) is None:
            raise ValueError(
                f"The vision-language model in '{self.folder}' has no chat template; choose one made to chat."
            )
        if self.settings.device_map is None:
            self.model.to(self.device)
        tokenizer, generation = self.processor.tokenizer, self.model.generation_config
        tokenizer.padding_side = "left"  # a batch's answers begin side by side
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        # Drawing is ours (SeededSampling), so the model's own preferences for it would only raise warnings.
        generation.do_sample, generation.temperature, generation.top_p, generation.top_k = False, None, None, None
        if generation.eos_token_id is None:
            generation.eos_token_id = tokenizer.eos_token_id
        generation.pad_token_id = tokenizer.pad_token_id
        self.control_tokens = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]

    def check_prompt(self, prompt: str) -> None:
        """One of the model's control tokens in a prompt would break the chat, or count as a picture."""
        found = next((token for token in self.control_tokens if token in prompt), None)
        if found:
            raise ValueError(f"The prompt holds {found}, a control token of the captioner.")

    @torch.inference_mode()
    def __call__(
        self, clips: list[VideoClip], prompts: list[str], previous: list[str | None], seeds: list[int]
    ) -> list[tuple[str, int, str | None]]:
        """For every clip a caption, its tokens, and why it does not fit the limits, if it does not.

        `previous` holds the caption that did not fit the last time, to be answered with the retry template.
        """
        settings = self.settings
        words = {"min_words": self.min_words, "max_words": self.max_words}
        chats, metadata = [], []
        for clip, prompt, last in zip(clips, prompts, previous, strict=True):
            if settings.content == "video":
                content = [{"type": "video", "video": clip.frames}]
                frames = range(len(clip.frames))
                metadata.append({"total_num_frames": len(frames), "fps": clip.fps, "frames_indices": list(frames)})
            else:
                content = [{"type": "image", "image": Image.fromarray(frame)} for frame in clip.frames]
            content.append({"type": "text", "text": self.request.substitute(words, prompt=prompt)})
            chat = [{"role": "user", "content": content}]
            if last is not None:
                retry = self.retry.substitute(words, words=len(last.split()))
                chat.append({"role": "assistant", "content": [{"type": "text", "text": last}]})
                chat.append({"role": "user", "content": [{"type": "text", "text": retry}]})
            chats.append(chat)
        inputs = self.processor.apply_chat_template(
            chats,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={
                "padding": True,
                **({"video_metadata": metadata, "do_sample_frames": False} if metadata else {}),
            },
        ).to(self.model.device, self.model.dtype)
        sampling = []
        if settings.temperature > 0:
            sampling = [SeededSampling(seeds, settings.temperature, settings.top_p)]
        output = self.model.generate(
            **inputs, max_new_tokens=settings.max_new_tokens, logits_processor=LogitsProcessorList(sampling)
        )[:, inputs["input_ids"].shape[1] :]
        ends = torch.tensor(self.model.generation_config.eos_token_id, device=output.device).reshape(-1)
        whole = torch.isin(output, ends).any(dim=1).tolist()
        texts = [" ".join(text.split()) for text in self.processor.batch_decode(output, skip_special_tokens=True)]
        return [(text, *self._measure(text, complete)) for text, complete in zip(texts, whole, strict=True)]

    def _measure(self, text: str, complete: bool) -> tuple[int, str | None]:
        tokens = len(self.counter(text)["input_ids"])
        low, high = self.limits
        if not complete:
            return tokens, f"the caption did not end within {self.settings.max_new_tokens} tokens of the captioner"
        if tokens < low or not text:
            return tokens, f"the caption is too short: {tokens} tokens, under {low}"
        if tokens > high:
            return tokens, f"the caption is too long: {tokens} tokens, over {high}"
        return tokens, None


def make_captions(
    config: SynthesisConfig, captioner: Captioner, clips: Ledger, ledger: Ledger, items: list[Item], share: str
) -> None:
    settings, folder = config.captions, Path(config.folder)
    made, _ = clips.read()
    done, failed = ledger.read()
    items = [item for item in items if item.id in made]
    todo = _todo(items, done, failed, settings.attempts)
    finished = len(items) - len(todo)
    print(f"Captions{share}: {finished} of {len(items)} are done.", flush=True)
    if not todo:
        return
    captioner.load()

    def settle(item: Item, record: dict[str, Any]) -> None:
        nonlocal finished
        ledger.append({"id": item.id, "prompt": item.prompt, **record})
        finished += 1
        print(f"caption {finished} of {len(items)}{share}: {item.id} {record.get('reason', 'done')}", flush=True)

    queue = deque((item, (last := failed.get(item.id, {})).get("attempts", 0), last.get("caption")) for item in todo)
    while queue:
        batch, frames = [], []
        while queue and len(batch) < settings.batch_size:
            item, attempt, last = queue.popleft()
            try:
                captioner.check_prompt(item.prompt)
                size = probe(folder / made[item.id]["video"])
                clip = read_video(folder / made[item.id]["video"], settings.frames, size.height, size.width)
            except ValueError as error:
                settle(item, {"attempts": settings.attempts, "reason": str(error)})
                continue
            batch.append((item, attempt, last))
            frames.append(clip)
        if not batch:
            break
        seeds = [_seed("caption", config.seed, item.id, attempt) for item, attempt, _ in batch]
        with _memory("captions.batch_size=1, fewer captions.frames or captions.device_map=auto"):
            answers = captioner(frames, [item.prompt for item, _, _ in batch], [last for *_, last in batch], seeds)
        again = []
        for (item, attempt, _), seed, (caption, tokens, reason) in zip(batch, seeds, answers, strict=True):
            if reason and attempt + 1 < settings.attempts:
                again.append((item, attempt + 1, caption))
                continue
            record = {"caption": caption, "tokens": tokens, "seed": seed, "attempts": attempt + 1}
            settle(item, {**record, "reason": reason} if reason else record)
        queue.extendleft(reversed(again))  # first, so that no more than a batch is ever in work


# ------------------------------------------------------------------------------------------------------------ manifests


def merge(folder: Path, items: list[Item], clips: Ledger, captions: Ledger) -> None:
    """Write what all processes have made so far as manifests for training, in the order of the prompts.

    Every process does so after its work; whoever comes last has everything before it.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / ".lock", wait=True):
        made, no_clip = clips.read()
        captioned, no_caption = captions.read()
        hidden = ("template_text", "retry_template_text")
        made_by = {
            name: {key: value for key, value in (ledger.settings() or {}).items() if key not in hidden}
            for name, ledger in (("clips", clips), ("captions", captions))
        }
        pairs, triples, failures = [], [], []
        for item in items:
            if item.id in made:
                clip = {"id": item.id, "video": made[item.id]["video"], "prompt": item.prompt}
                origin = {"prompt_tokens": item.tokens, "seed": made[item.id]["seed"]}
                pairs.append({**clip, **origin, "made_by": {"clips": made_by["clips"]}})
                if item.id in captioned:
                    caption = captioned[item.id]
                    tokens = {"caption_tokens": caption["tokens"], "caption_seed": caption["seed"]}
                    triples.append({**clip, "caption": caption["caption"], **origin, **tokens, "made_by": made_by})
                elif item.id in no_caption:
                    failures.append({**no_caption[item.id], "phase": "captions", "video": made[item.id]["video"]})
            elif item.id in no_clip:
                failures.append({**no_clip[item.id], "phase": "clips"})
        for name, rows in (("pairs", pairs), ("manifest", triples), ("failures", failures)):
            with replacing(folder / f"{name}.jsonl", folder / f"{name}.partial") as partial:
                lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                partial.write_text("".join(lines), encoding="utf-8")
    missing = len(items) - len(triples) - len(failures)
    others = len(made.keys() - {item.id for item in items})
    print(
        f"{folder / 'manifest.jsonl'}: {len(triples)} clips with captions, {len(failures)} failures, "
        f"{missing} of {len(items)} prompts not finished yet"
        + (f"; left out: {others} clips of prompts that are no longer listed." if others else "."),
        flush=True,
    )


# ------------------------------------------------------------------------------------------------------- small matters


def _todo(items: list[Item], done: dict, failed: dict, attempts: int) -> list[Item]:
    """What is not made and has attempts left: with more attempts than last time, failures are taken up again."""
    return [i for i in items if i.id not in done and failed.get(i.id, {}).get("attempts", 0) < attempts]


def _settings(config: ClipsConfig | CaptionsConfig, folder: Path, device: torch.device) -> dict[str, Any]:
    """What decides how the results look: the model, by name and content, and its settings."""
    content = hashlib.sha256()
    for name in sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()):
        if name.startswith(".") or "/." in name:  # what download tools leave behind
            continue
        path = folder / name
        content.update(f"{name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            content.update(file.read(FINGERPRINT_BYTES))
            file.seek(-min(FINGERPRINT_BYTES, path.stat().st_size), os.SEEK_END)
            content.update(file.read())
    settings = {key: value for key, value in asdict(config).items() if key not in NOT_IN_SETTINGS}
    dtype = str(_dtype(config.dtype, device)).removeprefix("torch.")
    return {**settings, "dtype": dtype, "model_sha256": content.hexdigest()[:16]}


def _model_folder(name: str, setting: str, patterns: list[str] | None = None) -> Path:
    """A local folder, or the files of a Hub repository, fetched or found in the cache."""
    if os.path.isdir(name):
        return Path(name)
    unknown = f"There is no model {name!r}; set {setting} to a folder or a Hub id such as {WAN_1_3B_REPO}."
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):  # no Hub id: do not ask the network about a slip of the pen
        raise ValueError(unknown)
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except HFValidationError:
        raise ValueError(unknown) from None
    except OSError as error:  # no such repository, no access to it, or no network
        raise ValueError(
            f"The model {name!r} of {setting} is no folder here, and the Hub could not give it: {_sentence(error)}"
        ) from error


def _tokenizer(name: str) -> Any:
    folder = _model_folder(name, "tokenizer or clips.model", ["*tokenizer*", "*spiece*", "*.json"])
    folder = folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except LOADING_ERRORS as error:
        raise ValueError(f"The tokenizer in '{folder}' cannot be loaded: {_sentence(error)}") from error


def _check(config: SynthesisConfig) -> None:
    if not config.prompts:
        raise ValueError("prompts is empty: name a text file with one prompt a line, or a .jsonl file.")
    if not config.folder:
        raise ValueError("folder is empty: name the folder that receives the clips.")
    for name, (low, high) in (("prompt_tokens", config.prompt_tokens), ("caption_tokens", config.caption_tokens)):
        if not 0 <= low <= high:
            raise ValueError(f"{name} must be two rising numbers of tokens, not {low} and {high}.")
    for name, frames in (("clips.num_frames", config.clips.num_frames), ("captions.frames", config.captions.frames)):
        if frames < 1 or frames % 4 != 1:
            raise ValueError(f"{name} must be 4k + 1 (1, 5, 9, 13, 17, …), not {frames}.")
    for section in ("clips", "captions"):
        for name in ("attempts", "batch_size"):
            if (value := getattr(getattr(config, section), name)) < 1:
                raise ValueError(f"{section}.{name} must be 1 or more, not {value}.")
    if config.captions.temperature < 0:
        raise ValueError(f"captions.temperature must be 0 or more, not {config.captions.temperature:g}.")
    if not 0 < config.captions.top_p <= 1:
        raise ValueError(f"captions.top_p must be above 0 and at most 1, not {config.captions.top_p:g}.")


def _device(name: str, default: torch.device) -> torch.device:
    try:
        device = torch.device(name) if name else default
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise ValueError(f"There is no device {name!r} here; give cpu, cuda or cuda:0.") from None
    return device


def _dtype(name: Dtype, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return getattr(torch, name)


def _digest(*parts: str | int) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _seed(*parts: str | int) -> int:
    return int(_digest(*parts)[:12], 16)  # 48 bits, which every JSON reader keeps


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") + "."


@contextmanager
def _memory(remedy: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise ValueError(f"The memory of the GPU is full; try {remedy}.") from None
