"""A whole clip at once against diffusers' own walk in chunks."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from tiny import tiny_pipeline

from univigu import pipeline
from univigu.whole_clip import decode_clip, encode_clip

TWO_HALVINGS = {
    "base_dim": 8,
    "z_dim": 4,
    "dim_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [True, True],
    "latents_mean": [0.0] * 4,
    "latents_std": [1.0] * 4,
}


@pytest.mark.parametrize("shape", [{}, {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12}])
@pytest.mark.parametrize("frames", [1, 5, 9])
def test_a_whole_clip_gives_the_numbers_of_chunk_by_chunk(shape, frames):
    torch.manual_seed(0)
    vae = AutoencoderKLWan(**TWO_HALVINGS, **shape).eval()
    clip = torch.rand(2, 3, frames, 16, 16) * 2 - 1
    with torch.no_grad():
        latents = vae.encode(clip).latent_dist
        torch.testing.assert_close(encode_clip(vae, clip), latents.parameters, atol=1e-4, rtol=1e-4)
        decoded = decode_clip(vae, latents.mean).clamp(-1, 1)
        torch.testing.assert_close(decoded, vae.decode(latents.mean).sample, atol=1e-4, rtol=1e-4)


def test_a_pipeline_makes_the_same_of_small_clips_whole_and_in_chunks(monkeypatch):
    pipe = tiny_pipeline()
    frames = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)
    latents = pipe.encode_video(frames)
    decoded = pipe.decode_latents(latents)
    monkeypatch.setattr(pipeline, "WHOLE_CLIP_PIXELS", 0)
    torch.testing.assert_close(pipe.encode_video(frames), latents, atol=1e-4, rtol=1e-4)
    assert np.abs(pipe.decode_latents(latents).astype(int) - decoded).max() <= 1
