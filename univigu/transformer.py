"""The network: Wan2.1's diffusion transformer with a second stream.

Video patches and caption tokens run through the blocks as one sequence [video ; tokens]. Attention is shared
(equations 12 and 14), each modality has its own feed-forward expert (13 and 15) and its own time. With no tokens it is
`WanTransformer3DModel`, weight for weight. It knows nothing of noise, samplers, prompts or tokenizers: states go in,
the video's velocity and the tokens' prediction come out (equation 10).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.loaders import PeftAdapterMixin
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from diffusers.models.attention import AttentionMixin, FeedForward
from diffusers.models.attention_dispatch import SeqAllToAllDim, dispatch_attention_fn
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import FP32LayerNorm
from diffusers.models.transformers.transformer_wan import (
    WanAttention,
    WanRotaryPosEmbed,
    WanTimeTextImageEmbedding,
    WanTransformer3DModel,
    _get_qkv_projections,
)
from diffusers.utils import BaseOutput, apply_lora_scale
from torch import nn

WAN_1_3B = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30}
WAN_14B = {"num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824, "num_layers": 40}
UMT5_VOCAB_SIZE = 256384
PRESETS = {
    "wan2.1-1.3b": {**WAN_1_3B, "vocab_size": UMT5_VOCAB_SIZE},
    "wan2.1-14b": {**WAN_14B, "vocab_size": UMT5_VOCAB_SIZE},
}


@dataclass
class UniViGUTransformerOutput(BaseOutput):
    """`sample`: the video's velocity noise - clean (Wan's sign, the opposite of the paper's u_v); None when the video
    stream came from a cache. `token_sample`: logits over the vocabulary, or a vector of the embedding space."""

    sample: torch.Tensor | None
    token_sample: torch.Tensor | None = None


@dataclass
class VideoCache:
    """Keys and values of the video stream and the prompt, one entry a block, and the embedded time and prompt. Empty:
    the next forward fills it. Filled: the next forward computes the tokens only. Exact while the video, its time and
    the prompt stay the same and the video does not look at the tokens."""

    layers: list[dict[str, torch.Tensor]] = field(default_factory=list)
    condition: tuple[torch.Tensor, ...] = ()

    @property
    def is_filled(self) -> bool:
        return bool(self.layers) and bool(self.layers[-1])


class PatchEmbedding(nn.Conv3d):
    """Wan's patch convolution, returning (batch, positions, width) so that a context-parallel plan can split it.

    Rotary positions say how far apart two patches are and never where they are, so in Wan a patch of noise cannot know
    whether it is sky or ground. `places` (frames, height, width in patches) adds a learned vector for each
    place; it starts at zero, where the network is Wan's own."""

    def __init__(
        self,
        in_channels: int,
        inner_dim: int,
        patch_size: tuple[int, ...],
        places: tuple[int, int, int] | None = None,
    ) -> None:
        super().__init__(in_channels, inner_dim, kernel_size=patch_size, stride=patch_size)
        self.grid = places
        if places is not None:
            self.places = nn.Embedding(math.prod(places), inner_dim)
            nn.init.zeros_(self.places.weight)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        patches = super().forward(hidden_states)
        if self.grid is not None:
            places = self.places.weight.T.unflatten(1, self.grid).unsqueeze(0)
            if places.shape[2:] != patches.shape[2:]:  # another size of clip
                places = F.interpolate(places, patches.shape[2:], mode="trilinear", align_corners=True)
            patches = patches + places
        return patches.flatten(2).transpose(1, 2).contiguous()


class TokenEmbedding(nn.Module):
    """The learnable matrix E of section 3.1, and the way from a token's state into the stream.

    `normalize` uses every row at length sqrt(token_dim): the velocity loss alone is smallest at E = 0, and a row whose
    length cannot change cannot go there. `places` adds a learned vector for each place in the caption, from zero: see
    `PatchEmbedding`."""

    def __init__(
        self, vocab_size: int, token_dim: int, inner_dim: int, normalize: bool, places: int | None = None
    ) -> None:
        super().__init__()
        self.normalize = normalize
        self.table = nn.Embedding(vocab_size, token_dim)
        self.proj = nn.Linear(token_dim, inner_dim) if token_dim != inner_dim else nn.Identity()
        self.places = None
        if places is not None:
            self.places = nn.Embedding(places, inner_dim)
            nn.init.zeros_(self.places.weight)

    def rows(self, weight: torch.Tensor) -> torch.Tensor:
        if not self.normalize:
            return weight
        return F.normalize(weight.float(), dim=-1).type_as(weight) * weight.shape[-1] ** 0.5

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        states = self.proj(tokens if tokens.is_floating_point() else self.rows(self.table(tokens)))
        if self.places is None:
            return states
        if states.shape[1] > len(self.places.weight):
            raise ValueError(f"This network has places for {len(self.places.weight)} tokens, not {states.shape[1]}.")
        return states + self.places.weight[: states.shape[1]]


class TokenHead(nn.Linear):
    """The caption's last layer. With `read`, that function of states, weight and bias takes the place of the product: a
    loss that never holds the logits of all positions, computed where the weights are at hand however they are kept."""

    def forward(self, states: torch.Tensor, read: Callable[..., torch.Tensor] | None = None) -> torch.Tensor:
        return super().forward(states) if read is None else read(states, self.weight, self.bias)


class TokenTimeEmbedding(nn.Module):
    """The tokens' own time, embedded as Wan embeds the video's."""

    def __init__(self, dim: int, freq_dim: int) -> None:
        super().__init__()
        self.timesteps_proj = Timesteps(num_channels=freq_dim, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedder = TimestepEmbedding(in_channels=freq_dim, time_embed_dim=dim)
        self.time_proj = nn.Linear(dim, 6 * dim)

    def forward(self, timestep: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        frequencies = self.timesteps_proj(timestep).to(self.time_embedder.linear_1.weight.dtype)
        temb = self.time_embedder(frequencies).to(dtype)
        return temb, self.time_proj(F.silu(temb)).unflatten(1, (6, -1))


class TokenRotaryPosEmbed(nn.Module):
    """1-D rotary positions 0 ... L-1 for tokens, over the full head width (half-split pairs, where Wan interleaves)."""

    def __init__(self, attention_head_dim: int, theta: float = 10000.0) -> None:
        super().__init__()
        frequencies = theta ** -(torch.arange(0, attention_head_dim, 2, dtype=torch.float32) / attention_head_dim)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        positions = torch.arange(num_tokens, device=self.frequencies.device, dtype=torch.float32)
        angles = torch.outer(positions, self.frequencies.float())[None, :, None, :]
        return angles.cos(), angles.sin()


def rotate(states: torch.Tensor, video_rotary, token_rotary, num_tokens: int) -> torch.Tensor:
    """Rotary positions on (batch, [video ; tokens], heads, head_dim), each stream with its own."""
    num_video = states.shape[1] - num_tokens
    rotated = torch.empty_like(states)
    if num_video:
        cos, sin = video_rotary[0][..., 0::2], video_rotary[1][..., 1::2]
        even, odd = states[:, :num_video].unflatten(-1, (-1, 2)).unbind(-1)
        rotated[:, :num_video, :, 0::2] = even * cos - odd * sin
        rotated[:, :num_video, :, 1::2] = even * sin + odd * cos
    if num_tokens:
        cos, sin = token_rotary
        half = states.shape[-1] // 2
        first, second = states[:, num_video:].chunk(2, dim=-1)
        rotated[:, num_video:, :, :half] = first * cos - second * sin
        rotated[:, num_video:, :, half:] = first * sin + second * cos
    return rotated


class UniViGUAttnProcessor:
    """Equations 12 and 14: one attention over [video ; tokens].

    `video_sees_tokens=False` keeps the tokens out of the video's keys, which makes the video stream independent of
    them: two attention calls instead of a mask, so every backend can run it. A tensor chooses sample by sample, at
    the price of a mask."""

    _attention_backend = None
    _parallel_config = None
    attention_record: list[torch.Tensor] | None = None

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple | None = None,
        num_tokens: int = 0,
        video_sees_tokens: bool | torch.Tensor = True,
        cached_video: dict[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        query, key, value = _get_qkv_projections(attn, hidden_states, encoder_hidden_states)
        query = rotate(attn.norm_q(query).unflatten(2, (attn.heads, -1)), *rotary_emb, num_tokens)
        key = rotate(attn.norm_k(key).unflatten(2, (attn.heads, -1)), *rotary_emb, num_tokens)
        value = value.unflatten(2, (attn.heads, -1))
        num_video = query.shape[1] - num_tokens

        if cached_video:
            key = torch.cat([cached_video["key"], key], dim=1)
            value = torch.cat([cached_video["value"], value], dim=1)
        elif cached_video is not None:
            cached_video["key"], cached_video["value"] = key[:, :num_video], value[:, :num_video]

        if self.attention_record is not None:
            scores = torch.einsum("bqhd,bkhd->bhqk", query[:, num_video:].float(), key.float())
            weights = (scores / query.shape[-1] ** 0.5).softmax(-1)
            self.attention_record.append(weights[..., : key.shape[1] - num_tokens].mean(1))

        if isinstance(video_sees_tokens, torch.Tensor):
            is_video = torch.arange(query.shape[1], device=query.device) < num_video
            hidden = is_video[:, None] & ~is_video[None, :]
            mask = (~hidden)[None] | video_sees_tokens[:, None, None].bool()
            attended = self.attend(query, key, value, mask[:, None])
        elif video_sees_tokens or not num_tokens or not num_video:
            attended = self.attend(query, key, value)
        else:
            seen_by_video = self.attend(query[:, :num_video], key[:, :num_video], value[:, :num_video])
            attended = torch.cat([seen_by_video, self.attend(query[:, num_video:], key, value)], dim=1)
        attended = attended.flatten(2, 3).type_as(query)
        return attn.to_out[1](attn.to_out[0](attended))

    def attend(self, query, key, value, mask=None) -> torch.Tensor:
        parallel, group = self._parallel_config, None
        if parallel is not None and parallel.context_parallel_config.ring_degree == 1:
            # A share of the positions becomes a share of the heads. diffusers' attention would do this itself, but has
            # no gradient where keys outnumber queries, as when the tokens look at the video and not the other way.
            group, parallel = parallel.context_parallel_config._ulysses_mesh.get_group(), None
            query, key, value = (SeqAllToAllDim.apply(group, part, 2, 1) for part in (query, key, value))
        attended = dispatch_attention_fn(
            query, key, value, attn_mask=mask, backend=self._attention_backend, parallel_config=parallel
        )
        return attended if group is None else SeqAllToAllDim.apply(group, attended, 1, 2)


class PromptAttnProcessor:
    """Equation 4: Wan's cross-attention to the prompt. With a cache the prompt's keys and values are kept too: at 512
    positions they would be most of what is left of a caption step."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple | None = None,
        cached_video: dict[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        if cached_video is not None and "prompt_key" in cached_video:
            query, key, value = attn.to_q(hidden_states), cached_video["prompt_key"], cached_video["prompt_value"]
        else:
            query, key, value = _get_qkv_projections(attn, hidden_states, encoder_hidden_states)
            key, value = attn.norm_k(key).unflatten(2, (attn.heads, -1)), value.unflatten(2, (attn.heads, -1))
            if cached_video is not None:
                cached_video["prompt_key"], cached_video["prompt_value"] = key, value
        query = attn.norm_q(query).unflatten(2, (attn.heads, -1))
        # no parallel_config: every process of a context-parallel group holds the whole prompt
        attended = dispatch_attention_fn(query, key, value, backend=self._attention_backend)
        return attn.to_out[1](attn.to_out[0](attended.flatten(2, 3).type_as(query)))


def linear_velocity(noisy: torch.Tensor, timestep: torch.Tensor, deviation: float) -> torch.Tensor:
    """The velocity that is best in the mean if a clip's latents are independent numbers of that standard deviation.

    A velocity holds all the noise of its clip, so the network carries the noise through every layer. Wan is 24 times as
    wide as its patches have numbers; one that is only as wide has little room for more. With this added to what it
    says, it has the clean clip to say and little of the noise (the skip of Karras et al. 2022)."""
    noise = (timestep.float() / 1000).view(-1, *(1,) * (noisy.ndim - 1))  # the noise's share of the state
    clean = (1 - noise) * deviation**2
    return noisy.float() * (noise - clean) / (noise.square() + (1 - noise) * clean)


def split(stream: torch.Tensor, num_tokens: int) -> list[torch.Tensor]:
    """[video ; tokens] as [video, tokens], or as [video] where there are no tokens."""
    num_video = stream.shape[1] - num_tokens
    return [stream[:, :num_video], stream[:, num_video:]] if num_tokens else [stream]


def join(streams: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(streams, dim=1) if len(streams) > 1 else streams[0]


# One fused pass over the stream where Wan takes two: it pays for joining the streams again.
def modulate(normed: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch.addcmul(shift, normed, 1 + scale)


def add_gated(hidden_states: torch.Tensor, update: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return torch.addcmul(hidden_states.float(), update.float(), gate).type_as(hidden_states)


class UniViGUTransformerBlock(nn.Module):
    """Wan's block on the concatenated stream: shared attention, one feed-forward expert a modality."""

    def __init__(
        self,
        dim: int,
        ffn_dim: int,
        token_ffn_dim: int,
        num_heads: int,
        cross_attn_norm: bool,
        eps: float,
        with_tokens: bool,
    ) -> None:
        super().__init__()
        head_dim = dim // num_heads
        self.norm1 = FP32LayerNorm(dim, eps, elementwise_affine=False)
        self.attn1 = WanAttention(
            dim=dim, heads=num_heads, dim_head=head_dim, eps=eps, processor=UniViGUAttnProcessor()
        )
        self.attn2 = WanAttention(
            dim=dim,
            heads=num_heads,
            dim_head=head_dim,
            eps=eps,
            cross_attention_dim_head=head_dim,
            processor=PromptAttnProcessor(),
        )
        self.norm2 = FP32LayerNorm(dim, eps, elementwise_affine=True) if cross_attn_norm else nn.Identity()
        self.ffn = FeedForward(dim, inner_dim=ffn_dim, activation_fn="gelu-approximate")
        self.token_ffn = (
            FeedForward(dim, inner_dim=token_ffn_dim, activation_fn="gelu-approximate") if with_tokens else None
        )
        self.norm3 = FP32LayerNorm(dim, eps, elementwise_affine=False)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        token_temb: torch.Tensor | None,
        rotary_emb: tuple,
        num_tokens: int = 0,
        video_sees_tokens: bool | torch.Tensor = True,
        cached_video: dict[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        # each stream is modulated by its own time, through the block's one table
        modulation = [(self.scale_shift_table + temb.float()).chunk(6, dim=1)]
        if num_tokens:
            modulation.append((self.scale_shift_table + token_temb.float()).chunk(6, dim=1))

        # equation 14: self-attention over [video ; tokens], shared
        normed = split(self.norm1(hidden_states.float()), num_tokens)
        normed = [modulate(part, shift, scale) for part, (shift, scale, *_) in zip(normed, modulation, strict=True)]
        attended = self.attn1(
            join(normed).type_as(hidden_states),
            None,
            None,
            rotary_emb,
            num_tokens=num_tokens,
            video_sees_tokens=video_sees_tokens,
            cached_video=cached_video,
        )
        streams = zip(split(hidden_states, num_tokens), split(attended, num_tokens), modulation, strict=True)
        hidden_states = join([add_gated(part, update, gate) for part, update, (_, _, gate, *_) in streams])

        # equation 4: cross-attention to the prompt, shared
        normed = self.norm2(hidden_states.float()).type_as(hidden_states)
        hidden_states = hidden_states + self.attn2(normed, encoder_hidden_states, None, None, cached_video=cached_video)

        # equation 15: one expert a modality, routed by what a position is
        experts = [self.ffn, self.token_ffn] if num_tokens else [self.ffn]
        parts, normed = split(hidden_states, num_tokens), split(self.norm3(hidden_states.float()), num_tokens)
        outputs = []
        for expert, part, norm, (_, _, _, shift, scale, gate) in zip(experts, parts, normed, modulation, strict=True):
            outputs.append(add_gated(part, expert(modulate(norm, shift, scale).type_as(part)), gate))
        return join(outputs)


# The stream goes through the blocks as one tensor, so that step caches that skip blocks skip both modalities alike.
TransformerBlockRegistry.register(
    UniViGUTransformerBlock,
    TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=None),
)


class UniViGUTransformer3DModel(ModelMixin, ConfigMixin, PeftAdapterMixin, CacheMixin, AttentionMixin):
    """Predicts both velocities from both states, both times and the prompt (equation 10).

    Arguments beyond `WanTransformer3DModel`'s:

    * `vocab_size`: words of the caption; `None` builds the video stream alone.
    * `token_state`: what a token is on its way: `"embedding"` (a vector, the paper) or `"ids"` (the released weights).
    * `token_dim`: width d of E; `None` is the network's own width, as in the paper.
    * `token_head`: `"logits"` over the vocabulary, or `"embedding"`, a vector of width d.
    * `normalize_token_embedding`: rows of E used at length sqrt(d).
    * `token_ffn_dim`: width of the token expert; `None` as the video's.
    * `token_expert_init`: how `from_wan` starts the token expert: `"copy"` of the video expert (the released weights)
      or `"fresh"` (the paper).
    * `video_places`, `token_places`: the grid of patches and the length of caption for which each place has a vector of
      its own, see `PatchEmbedding`; `None` is the paper's network, which knows no places.
    * `video_skip`: a way for the noisy clip around the network, see `linear_velocity`; `None` is the paper's network.
    """

    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns = ["patch_embedding", "condition_embedder", "token_", "norm"]
    _no_split_modules = ["UniViGUTransformerBlock"]
    _keep_in_fp32_modules = [
        "rope",
        "token_rope",
        "time_embedder",
        "scale_shift_table",
        "token_scale_shift_table",
        "norm1",
        "norm2",
        "norm3",
    ]
    _repeated_blocks = ["UniViGUTransformerBlock"]
    _cp_plan = {
        "rope": {
            0: ContextParallelInput(split_dim=1, expected_dims=4, split_output=True),
            1: ContextParallelInput(split_dim=1, expected_dims=4, split_output=True),
        },
        "token_rope": {
            0: ContextParallelInput(split_dim=1, expected_dims=4, split_output=True),
            1: ContextParallelInput(split_dim=1, expected_dims=4, split_output=True),
        },
        # Each stream is split before they are joined: every rank holds a share of both.
        "patch_embedding": {0: ContextParallelInput(split_dim=1, expected_dims=3, split_output=True)},
        "token_embedding": {0: ContextParallelInput(split_dim=1, expected_dims=3, split_output=True)},
        "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
        # before their head, so that all logits of a caption are made in one place, or none
        "token_norm_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
    }

    @register_to_config
    def __init__(
        self,
        patch_size: tuple[int, ...] = (1, 2, 2),
        num_attention_heads: int = 12,
        attention_head_dim: int = 128,
        in_channels: int = 16,
        out_channels: int = 16,
        text_dim: int = 4096,
        freq_dim: int = 256,
        ffn_dim: int = 8960,
        num_layers: int = 30,
        cross_attn_norm: bool = True,
        qk_norm: str | None = "rms_norm_across_heads",
        eps: float = 1e-6,
        image_dim: int | None = None,
        rope_max_seq_len: int = 1024,
        vocab_size: int | None = None,
        token_state: str = "embedding",
        token_dim: int | None = None,
        token_head: str = "logits",
        normalize_token_embedding: bool = True,
        token_ffn_dim: int | None = None,
        token_expert_init: str = "copy",
        video_places: tuple[int, int, int] | None = None,
        token_places: int | None = None,
        video_skip: float | None = None,
    ) -> None:
        super().__init__()
        if token_state not in ("embedding", "ids"):
            raise ValueError(f"token_state is 'embedding' or 'ids', not {token_state!r}.")
        if token_head not in ("logits", "embedding"):
            raise ValueError(f"token_head is 'logits' or 'embedding', not {token_head!r}.")
        inner_dim = num_attention_heads * attention_head_dim
        with_tokens = vocab_size is not None

        self.rope = WanRotaryPosEmbed(attention_head_dim, patch_size, rope_max_seq_len)
        self.patch_embedding = PatchEmbedding(in_channels, inner_dim, patch_size, video_places)
        self.condition_embedder = WanTimeTextImageEmbedding(
            dim=inner_dim, time_freq_dim=freq_dim, time_proj_dim=inner_dim * 6, text_embed_dim=text_dim
        )
        self.blocks = nn.ModuleList(
            UniViGUTransformerBlock(
                inner_dim, ffn_dim, token_ffn_dim or ffn_dim, num_attention_heads, cross_attn_norm, eps, with_tokens
            )
            for _ in range(num_layers)
        )
        self.norm_out = FP32LayerNorm(inner_dim, eps, elementwise_affine=False)
        self.proj_out = nn.Linear(inner_dim, out_channels * math.prod(patch_size))
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, inner_dim) / inner_dim**0.5)

        if with_tokens:
            token_dim = token_dim or inner_dim
            self.token_rope = TokenRotaryPosEmbed(attention_head_dim)
            self.token_embedding = TokenEmbedding(
                vocab_size, token_dim, inner_dim, normalize_token_embedding, token_places
            )
            self.token_time_embedding = TokenTimeEmbedding(inner_dim, freq_dim)
            self.token_norm_out = FP32LayerNorm(inner_dim, bias=False)
            self.token_scale_shift_table = nn.Parameter(torch.randn(1, 2, inner_dim) / inner_dim**0.5)
            self.token_proj_out = TokenHead(inner_dim, vocab_size if token_head == "logits" else token_dim)
            # Nothing is known of any word yet: start from equal odds.
            nn.init.zeros_(self.token_proj_out.weight)
            nn.init.zeros_(self.token_proj_out.bias)

        self.gradient_checkpointing = False

    @classmethod
    def from_wan(
        cls, wan: WanTransformer3DModel, vocab_size: int | None, token_expert_init: str = "copy", **token_config
    ) -> UniViGUTransformer3DModel:
        """Grow the second stream on a pretrained Wan generator; every pretrained weight is kept (section 3.2)."""
        if wan.config.image_dim is not None or wan.config.added_kv_proj_dim is not None:
            raise ValueError("This Wan model is conditioned on an image; start from a text-to-video one (T2V).")
        if token_expert_init not in ("copy", "fresh"):
            raise ValueError(f"token_expert_init is 'copy' or 'fresh', not {token_expert_init!r}.")
        shared = {name: wan.config[name] for name in cls._get_init_keys(cls) if name in wan.config}
        default_dtype = torch.get_default_dtype()
        torch.set_default_dtype(wan.proj_out.weight.dtype)
        try:
            model = cls(**shared, vocab_size=vocab_size, token_expert_init=token_expert_init, **token_config)
        finally:
            torch.set_default_dtype(default_dtype)
        # assign: no second copy of 14 billion weights, and each keeps its own dtype; the two models share storage
        unused = model.load_state_dict(wan.state_dict(), strict=False, assign=True).unexpected_keys
        if unused:
            raise ValueError(f"This Wan model has weights that Uni-ViGU has no place for, such as {unused[0]!r}.")
        if vocab_size is not None:
            video_time, token_time = model.condition_embedder, model.token_time_embedding
            token_time.time_embedder = copy.deepcopy(video_time.time_embedder)
            token_time.time_proj = copy.deepcopy(video_time.time_proj)
            model.token_scale_shift_table = copy.deepcopy(model.scale_shift_table)
            if token_expert_init == "copy":
                for block in model.blocks:
                    block.token_ffn.load_state_dict(block.ffn.state_dict())
        return model

    def token_table(self) -> torch.Tensor:
        """E as it is used: (vocab_size, token_dim)."""
        return self.token_embedding.rows(self.token_embedding.table.weight)

    @contextmanager
    def record_token_attention(self):
        """Collect where tokens look: a list that each forward fills with one (batch, tokens, video positions) tensor a
        block, the mean over heads."""
        record: list[torch.Tensor] = []
        for block in self.blocks:
            block.attn1.processor.attention_record = record
        try:
            yield record
        finally:
            for block in self.blocks:
                block.attn1.processor.attention_record = None

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: torch.Tensor | None,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        token_hidden_states: torch.Tensor | None = None,
        token_timestep: torch.Tensor | None = None,
        video_sees_tokens: bool | torch.Tensor = True,
        video_cache: VideoCache | None = None,
        project_tokens: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> UniViGUTransformerOutput | tuple:
        """One evaluation of equation 10.

        Args:
            hidden_states: video latents (batch, channels, frames, height, width); None when `video_cache` is filled.
            timestep: (batch,) the video's time on Wan's noise scale, 1000 * (1 - tau_video).
            encoder_hidden_states: the encoded prompt (batch, length, text_dim).
            token_hidden_states: the caption's state: ids (batch, length), or vectors (batch, length, token_dim).
            token_timestep: (batch,) the tokens' own time, 1000 * (1 - tau_text).
            video_sees_tokens: whether video positions attend to tokens; a bool tensor decides for each sample.
            video_cache: see `VideoCache`.
            project_tokens: False gives the tokens' last states, which `token_proj_out` takes.
        """
        tokens_only = video_cache is not None and video_cache.is_filled
        if tokens_only:
            temb, timestep_proj, encoder_hidden_states = video_cache.condition
        else:
            temb, timestep_proj, encoder_hidden_states, _ = self.condition_embedder(timestep, encoder_hidden_states)
            timestep_proj = timestep_proj.unflatten(1, (6, -1))

        streams, video_rotary, token_rotary, token_temb, token_timestep_proj = [], None, None, None, None
        if not tokens_only:
            batch_size, _, num_frames, height, width = hidden_states.shape
            video_rotary = self.rope(hidden_states)
            streams.append(self.patch_embedding(hidden_states))
        if token_hidden_states is not None:
            token_rotary = self.token_rope(token_hidden_states.shape[1])
            if token_hidden_states.is_floating_point():
                token_hidden_states = token_hidden_states.to(encoder_hidden_states.dtype)
            streams.append(self.token_embedding(token_hidden_states))
            token_temb, token_timestep_proj = self.token_time_embedding(token_timestep, encoder_hidden_states.dtype)
        stream = torch.cat(streams, dim=1) if len(streams) > 1 else streams[0]
        num_tokens = streams[-1].shape[1] if token_hidden_states is not None else 0
        num_video = stream.shape[1] - num_tokens

        if video_cache is not None and not video_cache.layers:
            video_cache.layers = [{} for _ in self.blocks]
            video_cache.condition = (temb, timestep_proj, encoder_hidden_states)
        for index, block in enumerate(self.blocks):
            arguments = (
                stream,
                encoder_hidden_states,
                timestep_proj,
                token_timestep_proj,
                (video_rotary, token_rotary),
                num_tokens,
                video_sees_tokens,
                video_cache.layers[index] if video_cache is not None else None,
            )
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                stream = self._gradient_checkpointing_func(block, *arguments)
            else:
                stream = block(*arguments)

        sample = token_sample = None
        if not tokens_only:
            shift, scale = (self.scale_shift_table.to(temb.device) + temb.unsqueeze(1)).chunk(2, dim=1)
            video = stream[:, :num_video]
            video = (self.norm_out(video.float()) * (1 + scale) + shift).type_as(video)
            p_t, p_h, p_w = self.config.patch_size
            sample = self.proj_out(video)
            sample = sample.reshape(batch_size, num_frames // p_t, height // p_h, width // p_w, p_t, p_h, p_w, -1)
            sample = sample.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)
            if self.config.video_skip is not None:
                sample = sample + linear_velocity(hidden_states, timestep, self.config.video_skip).type_as(sample)
        if token_hidden_states is not None:
            shift, scale = (self.token_scale_shift_table.to(temb.device) + token_temb.unsqueeze(1)).chunk(2, dim=1)
            tokens = stream[:, num_video:]
            tokens = (self.token_norm_out(tokens.float()) * (1 + scale) + shift).type_as(tokens)
            token_sample = self.token_proj_out(tokens) if project_tokens else tokens

        if not return_dict:
            return sample, token_sample
        return UniViGUTransformerOutput(sample=sample, token_sample=token_sample)
