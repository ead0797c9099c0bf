"""The three stages as data, and how each starts from the last: pretrain -> recall -> refine (section 3.4).

`pretrain` makes the small text-to-video generator that stands in for Wan; `recall` grows the caption stream on a
generator, Wan or ours, and learns to say the prompt again; `refine` learns the detailed caption. `StageObjective` is
what the trainer runs: the loss of `objective.py` with data, validation, samples and export around it. This file knows
nothing of where clips come from: that is behind `StageData`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from torch.utils.data import Dataset, default_collate
from transformers import PreTrainedTokenizerBase, UMT5Config, UMT5EncoderModel

from training.config import OptimConfig, RunConfig
from training.lora import ATTENTION, add_lora, has_lora, merged, save_adapters
from training.objective import FlowObjective, ObjectiveConfig
from univigu import UniViGUPipeline, UniViGUTransformer3DModel
from univigu.sampler import video_scheduler
from univigu.weights import find_model, load_wan, model_folder


@dataclass(frozen=True)
class Stage:
    target: Literal["prompt_ids", "caption_ids"] | None  # what the caption stream learns to say
    starts_from: Literal["generator", "captioner"]  # the one may also be new, the other not
    trains_prompt_encoder: bool


STAGES = {
    "pretrain": Stage(None, "generator", True),
    "recall": Stage("prompt_ids", "generator", False),  # Knowledge Recall
    "refine": Stage("caption_ids", "captioner", False),  # Capability Refinement
}


@dataclass
class StageConfig:
    name: Literal["pretrain", "recall", "refine"]
    start: str = ""  # the pipeline folder or Hub id that the stage begins with
    from_scratch: bool = False  # that pipeline's network with new weights, to see what the old ones are worth
    # Also the prompt encoder, which pretraining has trained and these stages leave alone: a small one has more to learn
    # of where words stand. Big ones are not there to be trained; their embeddings come from a cache.
    train_prompt_encoder: bool = False
    # token_branch: the generator stands still, bit for bit. lora: it changes through adapters beside the token branch.
    trained: Literal["all", "token_branch", "lora"] = "all"
    lora_rank: int = 64
    lora_alpha: float = 64.0
    lora_layers: list[str] = field(default_factory=lambda: list(ATTENTION))


@dataclass
class ModelConfig:
    """What the stage builds anew; everything else is in the pipeline it starts from."""

    vae: str = ""  # pretrain: the folder of a finished autoencoder
    # pretrain: arguments of UniViGUTransformer3DModel; with a start of ours: those to change, for parts that start at
    # nothing, such as more layers
    transformer: dict[str, Any] = field(default_factory=dict)
    prompt_encoder: dict[str, Any] = field(default_factory=dict)  # pretrain: arguments of UMT5Config
    video_shift: float = 3.0  # of the clip's time, in training and sampling; Wan's for 480p
    video_sampling: Literal["euler", "stochastic"] = "euler"  # see sampler.video_scheduler
    caption_flow: Literal["embedding", "mixture"] = "embedding"  # recall
    tokens: dict[str, Any] = field(default_factory=dict)  # recall: arguments of UniViGUTransformer3DModel.from_wan
    token_flow: dict[str, Any] = field(default_factory=dict)  # recall, refine: arguments of the caption's flow
    pipeline: dict[str, Any] = field(default_factory=dict)  # settings of UniViGUPipeline, such as max_caption_tokens


@dataclass
class StageRun:
    stage: StageConfig
    run: RunConfig = field(default_factory=RunConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    data: dict[str, Any] = field(default_factory=dict)  # see `open_data`


class Probe(Protocol):
    """Looks at what a model can do, beyond its loss."""

    def measure(self, pipeline: UniViGUPipeline) -> dict[str, float]: ...

    def draw(self, pipeline: UniViGUPipeline, folder: Path, step: int) -> None: ...


@dataclass
class StageData:
    """`train`: endless, item i is example i; `held_out`: what validation sees. Both give the items of objective.py.
    `empty_prompt`: what the prompt becomes when it is dropped, ids and mask or embeddings, as the items hold it."""

    train: Dataset
    held_out: Dataset
    empty_prompt: tuple[torch.Tensor, torch.Tensor] | torch.Tensor
    probe: Probe | None = None


class StageObjective(torch.nn.Module):
    """What the trainer trains: a pipeline's network, and in pretraining its prompt encoder, under equation 11."""

    def __init__(
        self, config: StageRun, pipeline: UniViGUPipeline, data: StageData, prompt_encoder: Path | None = None
    ):
        """`prompt_encoder`: the folder of the encoder that the pipeline was loaded without, for its export."""
        super().__init__()
        stage = STAGES[config.stage.name]
        self.pipeline, self.data, self.stage, self.prompt_encoder = pipeline, data, stage, prompt_encoder
        self.train_data, self.batch_size = data.train, config.run.batch_size
        encoder = pipeline.text_encoder if isinstance(data.empty_prompt, tuple) else None
        if encoder is not None:
            encoder.requires_grad_(stage.trains_prompt_encoder or config.stage.train_prompt_encoder)
        elif config.stage.train_prompt_encoder:
            raise ValueError("stage.train_prompt_encoder needs data whose prompts are not embedded beforehand.")
        network = pipeline.transformer.requires_grad_(True).train()
        if config.stage.trained == "token_branch":
            for name, parameter in network.named_parameters():
                parameter.requires_grad_(is_token_branch(name))
        elif config.stage.trained == "lora":
            stage_config = config.stage
            add_lora(
                network,
                stage_config.lora_rank,
                stage_config.lora_alpha,
                stage_config.lora_layers,
                config.run.seed,
                also_trained=is_token_branch,
            )
        self.flow = FlowObjective(
            network,
            config.objective,
            stage.target,
            config.model.video_shift,
            pipeline.token_scheduler,
            encoder,
            data.empty_prompt,
        )

    def forward(
        self, batch: dict[str, torch.Tensor], generator: torch.Generator
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return self.flow(batch, generator)

    def validate(self) -> dict[str, float]:
        device = next(self.parameters()).device
        totals: dict[str, float] = {}
        count = len(self.data.held_out)
        for start in range(0, count, self.batch_size):
            items = [self.data.held_out[index] for index in range(start, min(start + self.batch_size, count))]
            for item in items:  # in half precision they could not be stacked under autocast
                item["latents"] = item["latents"].float()
            batch = {name: value.to(device) for name, value in default_collate(items).items()}
            for name, value in self.flow.losses_on_grid(batch, seed=start).items():
                totals[name] = totals.get(name, 0.0) + value * len(items) / count
        if self.data.probe is not None:
            self.pipeline.vae.to(device)
            totals.update(self.data.probe.measure(self.pipeline))
        return totals

    def draw_samples(self, folder: Path, step: int) -> None:
        if self.data.probe is not None:
            self.data.probe.draw(self.pipeline, folder, step)

    def export(self, folder: Path) -> None:
        """The pipeline with the weights as they are: after pretraining a Wan pipeline where it is one, else ours."""
        if self.stage.target is None and not _beyond_wan(self.pipeline.transformer):
            save_whole(as_wan(self.pipeline).save_pretrained, folder)
        elif has_lora(self.pipeline.transformer):  # merged for use, and the adapters by themselves
            network = self.pipeline.transformer
            self.pipeline.register_modules(transformer=merged(network))
            try:
                save_whole(self._save, folder)
            finally:
                self.pipeline.register_modules(transformer=network)
            save_adapters(network, folder.with_name("lora"))
        else:
            save_whole(self._save, folder)

    def _save(self, folder: Path) -> None:
        self.pipeline.save_pretrained(folder)
        if self.prompt_encoder is not None:  # its files serve as they are
            shutil.copytree(self.prompt_encoder, folder / "text_encoder", copy_function=_link)
            index = json.loads((folder / "model_index.json").read_text())
            index["text_encoder"] = ["transformers", "UMT5EncoderModel"]
            (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def _link(source: str, target: str) -> None:
    try:
        os.link(os.path.realpath(source), target)
    except OSError:  # another disk, or one that knows no links
        shutil.copyfile(source, target)


def is_token_branch(parameter_name: str) -> bool:
    """True for what the caption stream adds to the generator."""
    return parameter_name.startswith("token_") or ".token_ffn." in parameter_name


def build_stage(config: StageRun) -> StageObjective:
    """The model of a stage, from the weights of the stage before it, and its data."""
    torch.manual_seed(config.run.seed)
    pipeline, prompt_encoder = build_pipeline(config), None
    if pipeline.text_encoder is None:
        prompt_encoder = model_folder(config.stage.start, ["text_encoder/*"]) / "text_encoder"
    data = open_data(config.data, pipeline, prompt_encoder, config.run.batch_size)
    return StageObjective(config, pipeline, data, prompt_encoder)


def build_pipeline(config: StageRun) -> UniViGUPipeline:
    """A new generator, or the pipeline that the stage starts from, changed as the stage says.

    Where the prompts' embeddings are in a cache, it has no prompt encoder: in every process that would be gigabytes.
    """
    stage, model = STAGES[config.stage.name], config.model
    is_cached = config.data.get("kind") == "clips"
    if stage.target is None:
        if not config.stage.start:
            from training.toybox import build_tokenizer

            pipeline = new_generator(model, build_tokenizer())
            if part := _beyond_wan(pipeline.transformer):
                raise ValueError(f"model.transformer has {part}, which Wan does not know: leave it to refine.")
            return pipeline
        pipeline = _generator(config.stage.start)
        if model.transformer:
            pipeline.register_modules(transformer=grown(pipeline.transformer, model.transformer))
    elif not config.stage.start:
        raise ValueError(f"stage.start is empty: name the {stage.starts_from} that {config.stage.name} starts from.")
    elif stage.starts_from == "generator":
        pipeline = load_wan(
            config.stage.start,
            caption_flow=model.caption_flow,
            flow_shift=model.video_shift,
            seed=config.run.seed,
            prompt_encoder=not is_cached,
            **model.tokens,
        )
    else:
        left_out = {"text_encoder": None} if is_cached else {}
        # published in half precision, and the prompt encoder would stay in it
        pipeline = UniViGUPipeline.from_pretrained(config.stage.start, torch_dtype=torch.float32, **left_out)
    if model.transformer and stage.starts_from == "captioner":
        pipeline.register_modules(transformer=grown(pipeline.transformer, model.transformer))
    if model.token_flow and stage.starts_from:
        flow = pipeline.token_scheduler
        pipeline.register_modules(token_scheduler=type(flow).from_config(flow.config, **model.token_flow))
    if config.stage.from_scratch:
        pipeline.register_modules(transformer=UniViGUTransformer3DModel.from_config(pipeline.transformer.config))
    pipeline.register_modules(scheduler=_scheduler(model))
    pipeline.register_to_config(**model.pipeline)
    return pipeline


def _generator(start: str) -> UniViGUPipeline:
    """The video stream alone, of a Wan pipeline or of one of ours."""
    if find_model(start).kind == "univigu":
        pipeline = UniViGUPipeline.from_pretrained(start, torch_dtype=torch.float32)
        both = pipeline.transformer
        alone = UniViGUTransformer3DModel.from_config(both.config, vocab_size=None)
        alone.load_state_dict({n: value for n, value in both.state_dict().items() if not is_token_branch(n)})
        pipeline.register_modules(transformer=alone, token_scheduler=None)
        return pipeline
    wan = WanPipeline.from_pretrained(start)
    transformer = UniViGUTransformer3DModel.from_wan(wan.transformer, vocab_size=None)
    return UniViGUPipeline(wan.tokenizer, wan.text_encoder, transformer, wan.vae, wan.scheduler)


def new_generator(model: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> UniViGUPipeline:
    """A text-to-video pipeline of random weights around a trained autoencoder."""
    if not Path(model.vae, "config.json").is_file():
        raise ValueError(f"model.vae names no autoencoder: {model.vae!r} holds no config.json.")
    vae = AutoencoderKLWan.from_pretrained(model.vae, torch_dtype=torch.float32)
    encoder = UMT5EncoderModel(UMT5Config(vocab_size=len(tokenizer), **model.prompt_encoder))
    channels = vae.config.z_dim
    transformer = UniViGUTransformer3DModel(
        in_channels=channels, out_channels=channels, text_dim=encoder.config.d_model, **model.transformer
    )
    return UniViGUPipeline(tokenizer, encoder, transformer, vae, _scheduler(model), **model.pipeline)


def grown(transformer: UniViGUTransformer3DModel, changed: dict[str, Any]) -> UniViGUTransformer3DModel:
    """The network with parts that it did not have; what it knew, it still knows."""
    new = UniViGUTransformer3DModel.from_config(transformer.config, **changed)
    for block in new.blocks[len(transformer.blocks) :]:  # a new block adds nothing at first
        for part in (block.attn1.to_out[0], block.attn2.to_out[0], block.ffn.net[-1]):
            _silence(part)
        if block.token_ffn is not None:
            _silence(block.token_ffn.net[-1])
    lost = new.load_state_dict(transformer.state_dict(), strict=False).unexpected_keys
    if lost:
        raise ValueError(f"model.transformer leaves no place for {lost[0]}, which stage.start has.")
    return new


def _silence(layer: torch.nn.Linear) -> None:
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)


def _scheduler(model: ModelConfig) -> FlowMatchEulerDiscreteScheduler:
    return video_scheduler(model.video_sampling, FlowMatchEulerDiscreteScheduler(shift=model.video_shift))


def _beyond_wan(transformer: UniViGUTransformer3DModel) -> str | None:
    """A part of the video stream that Wan has no place for, if there is one."""
    return next((n for n in ("video_places", "video_skip") if transformer.config[n] is not None), None)


def as_wan(pipeline: UniViGUPipeline) -> WanPipeline:
    """The generator without its captions, as what it is weight for weight: a Wan pipeline."""
    ours = pipeline.transformer
    if part := _beyond_wan(ours):
        raise ValueError(f"The network has {part}, which Wan does not know.")
    keys = WanTransformer3DModel._get_init_keys(WanTransformer3DModel)
    transformer = WanTransformer3DModel(**{name: value for name, value in ours.config.items() if name in keys})
    shared = {name: value for name, value in ours.state_dict().items() if not is_token_branch(name)}
    transformer.load_state_dict(shared)
    return WanPipeline(
        pipeline.tokenizer, pipeline.text_encoder, pipeline.vae, pipeline.scheduler, transformer=transformer
    )


def save_whole(save: Callable[[Path], None], folder: Path) -> None:
    """Write a folder under another name first: whoever reads `folder` finds the old one or the new one, whole."""
    partial, old = (folder.with_name(f".{word}-{folder.name}") for word in ("partial", "old"))
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    save(partial)
    if folder.exists():
        os.rename(folder, old)
    os.rename(partial, folder)
    shutil.rmtree(old, ignore_errors=True)


def open_data(
    settings: dict[str, Any], pipeline: UniViGUPipeline, prompt_encoder: Path | None, batch_size: int
) -> StageData:
    """What a stage learns from. `kind: clips` reads a cache of any clips, `kind: toybox` that of the toy world."""
    from training.config import build_config
    from training.toybox.dataset import ToyDataConfig, open_toybox

    kind = settings.get("kind")
    rest = {key: value for key, value in settings.items() if key != "kind"}
    if kind == "clips":
        from training.cache import open_clips
        from training.data import DataConfig

        return open_clips(build_config(DataConfig, rest, "data."), pipeline, prompt_encoder)
    if kind != "toybox":
        raise ValueError(f"data.kind must be clips or toybox, not {kind!r}.")
    return open_toybox(build_config(ToyDataConfig, rest, "data."), pipeline, batch_size)
