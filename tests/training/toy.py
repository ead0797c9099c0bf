"""A toy world small enough for any test: a random autoencoder of the real shape in space and time, and its cache."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan

from training.config import build_config
from training.stages import StageRun
from training.toybox import build_tokenizer
from training.toybox.dataset import fill_cache

CHANNELS = 8
TRAIN, HELD_OUT = 12, 4


def save_vae(folder: Path, seed: int = 0) -> Path:
    """17 x 64 x 64 becomes 8 x 5 x 8 x 8."""
    torch.manual_seed(seed)
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=CHANNELS,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        patch_size=2,
        in_channels=12,
        out_channels=12,
        latents_mean=[0.0] * CHANNELS,
        latents_std=[0.1] * CHANNELS,
        scale_factor_temporal=4,
        scale_factor_spatial=8,
    )
    vae.save_pretrained(folder)
    return folder


def make_world(folder: Path) -> Path:
    """`folder`/vae, `folder`/tokenizer and `folder`/cache."""
    save_vae(folder / "vae")
    build_tokenizer().save_pretrained(folder / "tokenizer")
    counts = {"train": TRAIN, "held_out": HELD_OUT}
    fill_cache(folder / "vae", folder / "cache", counts, shard_clips=8, tokenizer=folder / "tokenizer")
    return folder


SIZES = {
    "max_prompt_tokens": 24,
    "max_caption_tokens": 32,
    "default_num_frames": 17,
    "default_height": 64,
    "default_width": 64,
    "default_fps": 8,
    "default_steps": 3,
    "default_guidance_scale": 2.0,
}


def stage_run(world: Path, name: str, folder: Path, start: Path | None = None, **changes) -> StageRun:
    """A stage of a few tiny steps; `changes` are settings such as run={"steps": 3}."""
    settings = {
        "run": {
            "folder": str(folder),
            "steps": 2,
            "batch_size": 4,
            "workers": 0,
            "log_every": 1,
            "save_every": 1,
            "validate_every": 1000,
        },
        "optim": {"lr": 1e-3, "warmup_steps": 1},
        "stage": {"name": name, **({"start": str(start)} if start else {})},
        "model": {"video_shift": 2.0, "pipeline": SIZES},
        "data": {"kind": "toybox", "cache": str(world / "cache"), "validation_clips": 2, "validation_prompts": 1},
        "objective": {},
    }
    if name == "pretrain":
        settings["model"] |= {
            "vae": str(world / "vae"),
            "transformer": {
                "num_attention_heads": 2,
                "attention_head_dim": 12,
                "ffn_dim": 32,
                "num_layers": 2,
                "freq_dim": 16,
                "rope_max_seq_len": 32,
            },
            "prompt_encoder": {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2},
        }
    if name == "recall":
        settings["model"] |= {"tokens": {"token_dim": 8}, "token_flow": {"shift": 1.4}}
        settings["model"]["pipeline"] = {**SIZES, "prompt_as_tokens": True}
    for part, values in changes.items():
        settings[part] = {**settings[part], **values}
    return build_config(StageRun, settings)
