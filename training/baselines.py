"""The autoregressive captioner that ours is compared with: the same latents, the same words, one word after another.

A plain pre-norm transformer over [video patches ; words]: patches see all patches, words see the video and the words
before them. It knows nothing of flows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from training.config import OptimConfig, RunConfig
from training.stages import save_whole
from training.toybox.captions import CAPTION_TOKENS, parse_caption
from training.toybox.dataset import ToyDataConfig, open_toybox
from training.toybox.facts import facts
from training.toybox.probe import score
from training.toybox.scenes import scene_at
from univigu.weights import load


@dataclass
class CaptionerConfig:
    width: int = 256
    heads: int = 8
    layers: int = 14
    ffn_dim: int = 1024


@dataclass
class CaptionerRun:
    start: str  # a pipeline folder, whose tokenizer and autoencoder are used
    run: RunConfig = field(default_factory=RunConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    model: CaptionerConfig = field(default_factory=CaptionerConfig)
    data: ToyDataConfig = field(default_factory=ToyDataConfig)


class AutoregressiveCaptioner(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(
        self,
        channels: int,
        patches: int,
        vocab_size: int,
        end_token_id: int,
        length: int = CAPTION_TOKENS,
        width: int = 256,
        heads: int = 8,
        layers: int = 14,
        ffn_dim: int = 1024,
    ):
        super().__init__()
        self.patch_embedding = nn.Conv3d(channels, width, (1, 2, 2), (1, 2, 2))
        self.words = nn.Embedding(vocab_size, width)
        self.positions = nn.Parameter(0.02 * torch.randn(patches + length, width))
        layer = nn.TransformerEncoderLayer(
            width, heads, ffn_dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, vocab_size)

    def forward(self, latents: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Logits (B, L, V) of each word of `ids` given the clip and the words before it."""
        video = self.patch_embedding(latents).flatten(2).transpose(1, 2)
        before = torch.cat([torch.full_like(ids[:, :1], self.config.end_token_id), ids[:, :-1]], dim=1)
        patches, size = video.shape[1], video.shape[1] + ids.shape[1]
        stream = torch.cat([video, self.words(before)], dim=1) + self.positions[:size]
        hidden = torch.ones(size, size, dtype=torch.bool, device=stream.device).triu(1)
        hidden[:patches, :patches] = False
        return self.head(self.blocks(stream, mask=hidden)[:, patches:])

    @torch.no_grad()
    def caption(self, latents: torch.Tensor) -> torch.Tensor:
        """The likeliest next word until every caption has ended, ids (B, L)."""
        end, length = self.config.end_token_id, self.config.length
        ids = torch.full((len(latents), length), end, device=latents.device)
        ended = torch.zeros(len(latents), dtype=torch.bool, device=latents.device)
        for position in range(length):
            word = self(latents, ids[:, : position + 1])[:, -1].argmax(-1)
            ids[:, position] = torch.where(ended, end, word)
            ended |= word == end
            if ended.all():
                break
        return ids


class CaptionerObjective(nn.Module):
    def __init__(self, config: CaptionerRun):
        super().__init__()
        pipeline = load(config.start, "cpu")
        self.tokenizer = pipeline.tokenizer
        data = open_toybox(config.data, pipeline, config.run.batch_size)
        self.train_data, self.held_out, self.seed = data.train, data.held_out, data.held_out.latents.settings["seed"]
        channels, frames, height, width = self.held_out[0]["latents"].shape
        torch.manual_seed(config.run.seed)
        self.model = AutoregressiveCaptioner(
            channels,
            frames * (height // 2) * (width // 2),
            len(self.tokenizer),
            self.tokenizer.eos_token_id,
            **vars(config.model),
        )

    def forward(self, batch: dict[str, torch.Tensor], generator: torch.Generator) -> tuple[torch.Tensor, dict]:
        logits = self.model(batch["latents"].float(), batch["caption_ids"])
        return F.cross_entropy(logits.flatten(0, 1), batch["caption_ids"].flatten()), {}

    def validate(self) -> dict[str, float]:
        latents = torch.stack([self.held_out[index]["latents"].float() for index in range(len(self.held_out))])
        latents = latents.to(next(self.parameters()).device)
        self.said = read_captions(self.model, latents, self.tokenizer)
        stated = [parse_caption(text) for text in self.said]
        shown = [facts(scene_at(self.seed, index, "held_out")) for index in range(len(stated))]
        return score("seen", shown, stated) | {"grammatical": sum(s is not None for s in stated) / len(stated)}

    def draw_samples(self, folder: Path, step: int) -> None:
        (folder / f"step-{step:08d}.txt").write_text("\n".join(self.said) + "\n", encoding="utf-8")

    def export(self, folder: Path) -> None:
        save_whole(self.model.save_pretrained, folder)


def read_captions(model: AutoregressiveCaptioner, latents: torch.Tensor, tokenizer) -> list[str]:
    texts, end = [], tokenizer.eos_token_id
    for part in latents.split(64):
        for ids in model.caption(part).tolist():
            texts.append(tokenizer.decode(ids[: ids.index(end)] if end in ids else ids, skip_special_tokens=True))
    return texts
