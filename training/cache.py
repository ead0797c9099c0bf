"""Latents of clips and embeddings of prompts, made once and kept on disk: `python -m training cache`, then batches.

A latent is kept under the content of its clip and its size, an embedding under its text, each in a ledger that says
which autoencoder or prompt encoder made it; captions are kept as text, so that changing them costs nothing. Any number
of processes fill a cache together and may end at any moment. Training reads the cache alone, in an order that depends
on nothing but the seed and the position. It knows nothing of losses.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from diffusers import WanPipeline
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from training.data import DataConfig, Report, Row, Size, check, content_hash, read_clip
from training.ledger import Ledger, locked, replacing, writing
from training.stages import StageData
from univigu import UniViGUPipeline
from univigu.pipeline import clean_prompt
from univigu.video import write_video
from univigu.weights import _from_pretrained, find_model, pick_device

SHARD_BYTES = 256 << 20
SHARD_ITEMS = 64  # what a crash may cost
TIED = {"encoder.embed_tokens.weight": "shared.weight"}  # two names of one weight, of which a file may have either
SAMPLED = 4096  # elements of each weight that a fingerprint looks at
COMMAND = "python -m training cache"


# ---------------------------------------------------------------------------------------------------------- who made it


def fingerprint(module: torch.nn.Module, config: dict[str, Any] | None = None) -> str:
    """A name for a network's weights and settings, the same in float32 and bfloat16: training changes every weight, so
    a sample of each is enough."""
    state = {name: weight for name, weight in module.state_dict().items() if name not in TIED}
    return _fingerprint(config, sorted(state.items()))


def stored_fingerprint(folder: Path) -> str:
    """That of the network whose weights lie in a folder, one weight in memory at a time."""
    files = {}
    for path in sorted(folder.glob("*.safetensors")):
        handle = safe_open(path, "pt")
        files |= {TIED.get(name, name): (handle, name) for name in sorted(handle.keys())}
    if not files:
        raise ValueError(f"'{folder}' holds no weights in safetensors.")
    return _fingerprint(None, ((name, handle.get_tensor(key)) for name, (handle, key) in sorted(files.items())))


def _fingerprint(config: dict[str, Any] | None, weights: Iterable[tuple[str, torch.Tensor]]) -> str:
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weight in weights:
        flat = weight.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // SAMPLED)].to("cpu", torch.bfloat16).contiguous()
        digest.update(f"{name}{tuple(weight.shape)}".encode() + sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def latents_settings(pipeline: UniViGUPipeline) -> dict[str, Any]:
    config = {key: value for key, value in pipeline.vae.config.items() if not key.startswith("_")}
    return {"autoencoder": fingerprint(pipeline.vae, config), "normalized": pipeline.config.normalize_latents}


def tokenizer_version(tokenizer: PreTrainedTokenizerBase) -> str:
    """A name for a tokenizer's words and their ids."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()[:16]


def prompts_settings(pipeline: UniViGUPipeline, prompt_encoder: Path | None = None) -> dict[str, Any]:
    """`prompt_encoder`: the folder of the encoder that a pipeline was loaded without."""
    return {
        "prompt_encoder": stored_fingerprint(prompt_encoder) if prompt_encoder else fingerprint(pipeline.text_encoder),
        "tokenizer": tokenizer_version(pipeline.tokenizer),
        "max_prompt_tokens": pipeline.config.max_prompt_tokens,
        "zero_prompt_padding": pipeline.config.zero_prompt_padding,
    }


# --------------------------------------------------------------------------------------------------------- what is kept


class Store:
    """Tensors by id in safetensors shards, with a ledger of where each is."""

    def __init__(self, folder: Path, index: int = 0):
        self.folder = folder
        self.ledger = Ledger(folder, index, self._is_whole)
        self.pending: list[tuple[str, torch.Tensor]] = []
        self._sizes: dict[str, int] = {}

    def _is_whole(self, record: dict[str, Any]) -> bool:
        if record["shard"] not in self._sizes:
            path = self.folder / record["shard"]
            self._sizes[record["shard"]] = path.stat().st_size if path.is_file() else -1
        return self._sizes[record["shard"]] == record["bytes"]

    def records(self) -> dict[str, dict[str, Any]]:
        self._sizes.clear()
        return self.ledger.read()[0]

    def add(self, key: str, tensor: torch.Tensor) -> None:
        self.pending.append((key, tensor.contiguous().cpu()))
        if len(self.pending) >= SHARD_ITEMS or sum(t.nbytes for _, t in self.pending) >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """A shard first and its lines after it: a crash between the two costs the shard and leaves nothing wrong."""
        if not self.pending:
            return
        index = self.ledger.index
        used = [int(path.stem.split("-")[1]) for path in self.folder.glob(f"{index:05d}-*.safetensors")]
        name = f"{index:05d}-{max(used, default=-1) + 1:06d}.safetensors"
        with replacing(self.folder / name, self.ledger.partial) as partial:
            try:
                save_file(dict(self.pending), partial)
            except SafetensorError as error:  # its name for whatever the disk says
                raise OSError(str(error)) from None
            size = partial.stat().st_size
        for key, tensor in self.pending:
            self.ledger.append({"id": key, "shard": name, "bytes": size, "shape": list(tensor.shape)})
        self.pending = []


class Reader:
    """Reads tensors of a store by id."""

    def __init__(self, folder: Path, records: dict[str, dict[str, Any]]):
        self.folder, self.records = folder, records

    def __call__(self, key: str) -> torch.Tensor:
        path = self.folder / self.records[key]["shard"]
        try:
            return _handle(str(path)).get_tensor(key)
        except (OSError, SafetensorError, KeyError) as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise ValueError(
                f"'{path}' of the cache is gone or damaged ({reason}); run `{COMMAND}` again, which makes what is "
                "missing, and then the same training command."
            ) from None


@lru_cache(maxsize=64)
def _handle(path: str) -> Any:
    return safe_open(path, "pt")


def clip_key(content: str, row: Row, size: Size, config: DataConfig) -> str:
    return _digest(content, row.start, row.end, size.frames, size.height, size.width, config.fps, config.fit)


def prompt_key(prompt: str) -> str:
    return _digest(clean_prompt(prompt))


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


# -------------------------------------------------------------------------------------------------------------- filling


def load_encoders(name: str, settings: dict[str, Any]) -> UniViGUPipeline:
    """Autoencoder, prompt encoder and tokenizer of a pipeline, without its network; `settings` are the pipeline's."""
    found, device = find_model(name), PartialState().device
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    if found.kind == "released":
        raise ValueError(f"{name!r} holds no autoencoder: start from a Wan2.1 folder or one of ours.")
    kind = WanPipeline if found.kind == "wan" else UniViGUPipeline
    pipeline = _from_pretrained(kind, found.location, dtype, transformer=None)
    if found.kind == "wan":
        pipeline = UniViGUPipeline(pipeline.tokenizer, pipeline.text_encoder, None, pipeline.vae, pipeline.scheduler)
    pipeline.register_to_config(**settings)
    return pipeline.to(pick_device(device))


def load_tokenizer(name: str) -> Any:
    found = find_model(name)
    folder = Path(found.location)
    try:
        if (folder / "tokenizer").is_dir():
            return AutoTokenizer.from_pretrained(folder / "tokenizer")
        return AutoTokenizer.from_pretrained(found.location, subfolder="tokenizer")
    except (OSError, ValueError) as error:
        raise ValueError(f"{name!r} holds no tokenizer that can be read: {' '.join(str(error).split())}") from None


def fill(config: DataConfig, pipeline: UniViGUPipeline, needs: tuple[str, ...], shard: tuple[int, int] = (0, 1)) -> int:
    """Make what is missing of this process's share, then list all there is. Returns an exit code.

    Rows with something wrong are all told, and stop everything before the first clip is encoded; a clip that turns out
    unreadable on the way is told at the end.
    """
    folder = _cache_folder(config)
    _check_sizes(config, pipeline)
    process = PartialState()
    index, count = shard[0] * process.num_processes + process.process_index, shard[1] * process.num_processes
    latents, prompts = Store(folder / "latents", index), Store(folder / "prompts", index)
    contents = Ledger(folder / "contents", index)
    latents.ledger.begin(latents_settings(pipeline))
    prompts.ledger.begin(prompts_settings(pipeline))
    contents.begin({"format": 1})

    report = check(config, pipeline.tokenizer, needs, decode=False)
    if report.problems:
        report.print(config.source)
        return 1
    problems = []
    with contents.opened(), latents.ledger.opened(), prompts.ledger.opened():
        known, made, encoded = contents.read()[0], latents.records(), prompts.records()
        mine = report.rows[index::count]
        for number, (row, size) in enumerate(mine, 1):
            try:
                if row.place not in known:
                    known[row.place] = {"id": row.place, "content": content_hash(row)}
                    contents.append(known[row.place])
                key = clip_key(known[row.place]["content"], row, size, config)
                if key not in made:
                    made[key] = {}
                    latents.add(key, pipeline.encode_video(read_clip(row, size, config))[0].half())
            except (ValueError, FileNotFoundError) as error:
                if "cannot be written" in str(error):  # of the cache, not of the clip
                    raise
                problems.append(f"{row.where}: {str(error).rstrip('.')}")
                continue
            if number % 20 == 0 or number == len(mine):
                print(f"cache {index} of {count}: {number} of {len(mine)} clips", flush=True)
        latents.flush()
        texts = {prompt_key(row.prompt): row.prompt for row, _ in mine} | {prompt_key(""): ""}
        for key, text in texts.items():
            if key not in encoded:
                prompts.add(key, encode_prompt(pipeline, text))
        prompts.flush()
    missing = _list(folder, config, report, latents, prompts, contents)
    for problem in problems:
        print(problem)
    print(f"{folder}: {len(report.rows) - missing} of {len(report.rows)} clips are in the cache.")
    return 1 if problems else 0


@torch.no_grad()
def encode_prompt(pipeline: UniViGUPipeline, prompt: str) -> torch.Tensor:
    """A prompt's embeddings, (length, width); all positions where the model looks at those after the end too."""
    device, length = pipeline._execution_device, pipeline.config.max_prompt_tokens
    inputs = pipeline.tokenizer(
        clean_prompt(prompt), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).to(device)
    embeds = pipeline.text_encoder(inputs.input_ids, inputs.attention_mask).last_hidden_state[0]
    embeds = embeds if embeds.dtype == torch.bfloat16 else embeds.half()
    return embeds[: int(inputs.attention_mask.sum())] if pipeline.config.zero_prompt_padding else embeds


def _list(folder: Path, config: DataConfig, report: Report, latents: Store, prompts: Store, contents: Ledger) -> int:
    """Write examples.jsonl, what training reads: every row of the source whose parts are there, in its order."""
    with locked(folder / ".lock", wait=True):
        made, encoded, known = latents.records(), prompts.records(), contents.read()[0]
        lines = []
        for row, size in report.rows:
            content = known.get(row.place)
            key, prompt = content and clip_key(content["content"], row, size, config), prompt_key(row.prompt)
            if key in made and prompt in encoded:
                texts = {"prompt": row.prompt, "caption": row.caption}
                lines.append({"where": row.where, "latents": key, "prompt_key": prompt, **texts})
        head = {"source": config.source, "rows": len(report.rows), "asked_for": _asked_for(config)}
        with replacing(folder / "examples.jsonl", folder / f"examples.{contents.index}.partial") as partial:
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in [head, *lines])
            partial.write_text(text, encoding="utf-8")
    return len(report.rows) - len(lines)


def _asked_for(config: DataConfig) -> str:
    """Changes when the source or what is asked of it does; of shards and folders, when a file comes, goes or grows."""
    path = Path(config.source)
    if path.is_file():
        state: Any = hashlib.sha256(path.read_bytes()).hexdigest()
    elif path.is_dir():
        state = sorted((str(p.relative_to(path)), p.stat().st_size) for p in path.rglob("*") if p.is_file())
    else:
        state = config.split
    names = ("source", "video_column", "prompt_column", "caption_column", "sizes", "fps", "fit", "enlarge")
    return _digest(state, *(getattr(config, name) for name in names))


def _cache_folder(config: DataConfig) -> Path:
    if not config.cache:
        raise ValueError("data.cache is empty: name the folder that the cache is kept in.")
    folder = Path(config.cache)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def _check_sizes(config: DataConfig, pipeline: UniViGUPipeline) -> None:
    multiple = 2 * pipeline.vae_scale_factor_spatial  # patches of two by two latents
    for frames, height, width in config.sizes:
        if height % multiple or width % multiple or (frames - 1) % pipeline.vae_scale_factor_temporal:
            raise ValueError(
                f"data.sizes: {frames} frames of {height}x{width} do not fit this model, which takes multiples of "
                f"{multiple} pixels and {pipeline.vae_scale_factor_temporal}k + 1 frames."
            )


# -------------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Example:
    where: str
    latents: str
    prompt_key: str
    prompt: str
    caption: str


class CachedClips:
    """What a cache holds for a model, after checking that it was made for it and is complete."""

    def __init__(self, config: DataConfig, pipeline: UniViGUPipeline, prompt_encoder: Path | None = None):
        self.folder = _cache_folder(config)
        self.config, self.tokenizer = config, pipeline.tokenizer
        self.prompt_length, self.caption_length = pipeline.config.max_prompt_tokens, pipeline.config.max_caption_tokens
        latents, prompts = Store(self.folder / "latents"), Store(self.folder / "prompts")
        made_by = ((latents, latents_settings(pipeline)), (prompts, prompts_settings(pipeline, prompt_encoder)))
        for store, needed in made_by:
            there = store.ledger.settings()
            if there is None:
                raise ValueError(f"'{self.folder}' holds no cache; run `{COMMAND}` with the same configuration first.")
            changed = [name for name in needed if there.get(name) != needed[name]]
            if changed:
                what = ", ".join(f"{n.replace('_', ' ')} {there.get(n)} there, {needed[n]} now" for n in changed)
                raise ValueError(
                    f"'{store.folder}' was made for another model ({what}): name another data.cache, or start from the "
                    "model that it was made for."
                )
        self.latents = Reader(latents.folder, latents.records())
        self.prompts = Reader(prompts.folder, prompts.records())
        self.examples = self._examples()
        self.width = self.prompts(prompt_key("")).shape[-1]

    def _examples(self) -> list[Example]:
        path = self.folder / "examples.jsonl"
        try:
            head, *lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError):
            raise ValueError(f"'{self.folder}' is not finished: run `{COMMAND}` to its end.") from None
        if head["asked_for"] != _asked_for(self.config):
            raise ValueError(
                f"'{self.folder}' is stale: {self.config.source!r} or the settings of data changed after it was made; "
                f"run `{COMMAND}` again, which makes only what is new."
            )
        examples = [Example(**line) for line in lines]
        missing = (
            head["rows"]
            - len(examples)
            + sum(e.latents not in self.latents.records or e.prompt_key not in self.prompts.records for e in examples)
        )
        if missing:
            raise ValueError(
                f"{missing} of {head['rows']} clips are not in '{self.folder}'; run `{COMMAND}` again, which makes "
                "only what is missing."
            )
        return examples

    @cached_property
    def split(self) -> tuple[list[Example], list[Example]]:
        """Training and held-out examples; which are held out depends on the clips, not on their order."""
        if not 0 <= self.config.held_out < len(self.examples):
            raise ValueError(
                f"data.held_out must leave clips for training: it is {self.config.held_out} of {len(self.examples)}."
            )
        ranked = sorted({e.latents for e in self.examples}, key=lambda key: _digest("held out", key))
        kept = set(ranked[: self.config.held_out])
        return ([e for e in self.examples if e.latents not in kept], [e for e in self.examples if e.latents in kept])

    def shape(self, example: Example) -> tuple[int, ...]:
        return tuple(self.latents.records[example.latents]["shape"])

    def item(self, example: Example, position: int) -> dict[str, torch.Tensor]:
        embeds = self.prompts(example.prompt_key)
        return {
            "latents": self.latents(example.latents),
            "caption_ids": self.ids(example.caption, example.where),
            "prompt_ids": self.ids(example.prompt, example.where),
            "prompt_embeds": self.padded(embeds),
            "position": torch.tensor(position),
        }

    def ids(self, text: str, where: str) -> torch.Tensor:
        """A text as the token stream carries it: its words, the end, and the end again to the full length."""
        end, room = self.tokenizer.eos_token_id, self.caption_length
        ids = self.tokenizer(clean_prompt(text), add_special_tokens=False)["input_ids"]
        if len(ids) >= room:
            raise ValueError(
                f"{where}: a text of {len(ids) + 1} tokens does not fit the caption stream's {room}; lower the limits "
                "of data or raise model.pipeline.max_caption_tokens."
            )
        return torch.tensor(ids + [end] * (room - len(ids)))

    def padded(self, embeds: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(embeds.float(), (0, 0, 0, self.prompt_length - len(embeds)))

    @property
    def empty_prompt(self) -> torch.Tensor:
        return self.padded(self.prompts(prompt_key("")))


class TrainingBatches(Dataset):
    """Endless micro-batches: item i is micro-batch i, whoever reads it.

    A batch holds clips of one size, as many as the budget of tokens allows. All micro-batches of one optimiser step are
    of the same size too, so that processes do equal work and make the same passes. Every epoch shows every clip; a
    batch that the last clips of a size do not fill takes the first of the same epoch again.
    """

    gives_batches = True

    def __init__(self, clips: CachedClips, examples: list[Example]):
        self.clips, self.examples = clips, examples
        self.micro_batches = 1  # of a step; the trainer sets it
        self.buckets: dict[tuple[int, ...], list[int]] = {}
        for number, example in enumerate(examples):
            self.buckets.setdefault(clips.shape(example), []).append(number)
        for shape in self.buckets:
            if tokens_of(shape, clips.caption_length) > clips.config.tokens_per_batch:
                raise ValueError(
                    f"data.tokens_per_batch={clips.config.tokens_per_batch} is less than one clip with latents of "
                    f"{'x'.join(map(str, shape[1:]))} needs: {tokens_of(shape, clips.caption_length)}."
                )
        self._epochs: dict[int, list[list[int]]] = {}

    def batch_size(self, shape: tuple[int, ...]) -> int:
        budget = self.clips.config.tokens_per_batch // tokens_of(shape, self.clips.caption_length)
        return min(budget, len(self.buckets[shape]))

    def __len__(self) -> int:
        return 2**62

    def numbers(self, position: int) -> list[int]:
        """The examples of a micro-batch."""
        group, member = divmod(position, self.micro_batches)
        groups = sum(-(-self._batches(shape) // self.micro_batches) for shape in self.buckets)
        epoch, group = divmod(group, groups)
        if epoch not in self._epochs:
            self._epochs = {epoch: self._epoch(epoch)}
        return self._epochs[epoch][group * self.micro_batches + member]

    def _batches(self, shape: tuple[int, ...]) -> int:
        return -(-len(self.buckets[shape]) // self.batch_size(shape))

    def _epoch(self, epoch: int) -> list[list[int]]:
        random = np.random.default_rng([self.clips.config.seed, epoch])
        groups = []
        for shape, numbers in sorted(self.buckets.items()):
            size, order = self.batch_size(shape), random.permutation(numbers).tolist()
            wanted = math.ceil(self._batches(shape) / self.micro_batches) * self.micro_batches
            order = (order * math.ceil(wanted * size / len(order)))[: wanted * size]
            batches = [order[start : start + size] for start in range(0, len(order), size)]
            groups += [batches[i : i + self.micro_batches] for i in range(0, wanted, self.micro_batches)]
        return [batch for group in random.permutation(len(groups)) for batch in groups[group]]

    def __getitem__(self, position: int) -> dict[str, torch.Tensor]:
        numbers = self.numbers(position)
        items = [self.clips.item(self.examples[n], position * len(numbers) + i) for i, n in enumerate(numbers)]
        return {name: torch.stack([item[name] for item in items]) for name in items[0]}


class HeldOutClips(Dataset):
    """The clips that validation keeps, those of one size together."""

    def __init__(self, clips: CachedClips, examples: Iterable[Example]):
        self.clips, self.examples = clips, sorted(examples, key=lambda e: (clips.shape(e), e.latents))

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.clips.item(self.examples[index], index)


def tokens_of(shape: tuple[int, ...], caption_length: int) -> int:
    """Positions of the shared attention for latents (C, F, H, W) in patches of 1 x 2 x 2."""
    _, frames, height, width = shape
    return frames * (height // 2) * (width // 2) + caption_length


def open_clips(config: DataConfig, pipeline: UniViGUPipeline, prompt_encoder: Path | None = None) -> StageData:
    clips = CachedClips(config, pipeline, prompt_encoder)
    train, held_out = clips.split
    held_out = HeldOutClips(clips, held_out)
    return StageData(TrainingBatches(clips, train), held_out, clips.empty_prompt, ClipProbe(held_out, clips))


class ClipProbe:
    """Shows on a few held-out clips what the model makes of their prompts and says of their pictures."""

    SHOWN = 4
    STEPS = 20

    def __init__(self, held_out: HeldOutClips, clips: CachedClips):
        self.held_out, self.clips = held_out, clips

    def measure(self, pipeline: UniViGUPipeline) -> dict[str, float]:
        return {}

    def draw(self, pipeline: UniViGUPipeline, folder: Path, step: int) -> None:
        """A clip of each prompt, and a line of texts: the prompt, the caption, and what the model says."""
        device, empty = next(pipeline.transformer.parameters()).device, self.clips.empty_prompt[None]
        # without the prompt encoder, which may be larger than the network and has done its work
        parts = {**pipeline.components, "text_encoder": None, "vae": pipeline.vae.to(device)}
        settings = {k: v for k, v in pipeline.config.items() if not k.startswith("_") and k not in parts}
        shown = UniViGUPipeline(**parts, **settings)
        shown.set_progress_bar_config(disable=True)
        lines = []
        for number, example in enumerate(self.held_out.examples[: self.SHOWN]):
            item = self.held_out[number]
            frames = shown.decode_latents(item["latents"][None].float())
            common = {"num_inference_steps": self.STEPS, "seed": number, "negative_prompt_embeds": empty}
            common |= dict(zip(("num_frames", "height", "width"), frames.shape, strict=False))
            said = shown(task="understand", video=frames, prompt_embeds=empty, **common).text
            lines.append({"step": step, "prompt": example.prompt, "caption": example.caption, "said": said})
            embeds = item["prompt_embeds"][None]
            made = shown(task="generate", prompt=example.prompt, prompt_embeds=embeds, **common).frames
            write_video(folder / f"step-{step:08d}-{number}.mp4", made, self.clips.config.fps or 16)
        with (folder / "captions.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
