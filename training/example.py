"""Something to try the training commands on: a folder of clips with their texts, and a generator that knows nothing.

Clips and texts are of the toy world; the generator is a Wan pipeline of random weights, small enough for any machine.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

from training.ledger import writing
from training.toybox import FPS, brief, build_tokenizer, caption, render, scene_at
from univigu.video import write_video


def make_example(folder: Path, clips: int = 12, seed: int = 0) -> None:
    """`folder`/clips with clip.mp4, clip.txt (the caption) and clip.prompt.txt, and `folder`/generator."""
    with writing(folder):
        (folder / "clips").mkdir(parents=True, exist_ok=True)
        for index in range(clips):
            scene, random = scene_at(seed, index, "train"), np.random.default_rng([seed, index])
            path = folder / "clips" / f"{index:04d}.mp4"
            write_video(path, render(scene), FPS)
            path.with_suffix(".txt").write_text(caption(scene, random) + "\n", encoding="utf-8")
            path.with_suffix(".prompt.txt").write_text(brief(scene, random) + "\n", encoding="utf-8")
    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    encoder = UMT5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=96,
        num_layers=2,
        rope_max_seq_len=64,
    )
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
        scale_factor_temporal=4,
        scale_factor_spatial=4,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipeline = WanPipeline(tokenizer, UMT5EncoderModel(encoder), vae, scheduler, transformer)
    pipeline.save_pretrained(folder / "generator")
    print(
        f"{folder / 'clips'}: {clips} clips with their texts; {folder / 'generator'}: a generator that knows nothing."
    )
