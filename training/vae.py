"""Training the small video autoencoder: diffusers' AutoencoderKLWan, its loss and its figures.

Clips go through it whole (`univigu/whole_clip.py`). This file knows nothing of captions or flows.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanAttentionBlock, WanResample, WanResidualBlock
from torch.nn.functional import avg_pool3d
from torch.utils.data import Dataset

from training.config import OptimConfig, RunConfig
from training.toybox import FRAMES, render, scene_at
from univigu.whole_clip import decode_clip, encode_clip

STATISTICS_CLIPS = 512
EVENNESS = 0.5


@dataclass
class VAEObjectiveConfig:
    scene_seed: int = 0
    # Frames of the clips of step 0, 1, … in turn. The network is causal in time, so short clips teach most of it at a
    # fraction of the cost.
    frames: tuple[int, ...] = (17,)
    kl_weight: float = 1e-5  # on the mean over latent elements
    actor_weight: float = 2.0  # added to the weight 1 of pixels that an actor covers
    coarse_weight: float = 0.5  # the same error on clips averaged over 4x4 pixels
    decoder_alone: bool = False  # the encoder stands still, so that latents made before stay valid
    validation_clips: int = 24


@dataclass
class VAERun:
    run: RunConfig = field(default_factory=RunConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    model: dict[str, Any] = field(default_factory=dict)  # the arguments of AutoencoderKLWan
    start: str = ""  # the weights folder of an earlier run to go on from; empty: new weights
    objective: VAEObjectiveConfig = field(default_factory=VAEObjectiveConfig)


@torch.no_grad()
def start_near_linear(vae: AutoencoderKLWan) -> None:
    """Begin as averages that go straight through: every learned branch adds nothing yet, every plain convolution keeps
    its channels apart. 150 steps from here are worth 19.4 dB; from diffusers' own start 17.4 dB."""
    for layer in vae.modules():
        if isinstance(layer, WanResidualBlock):
            silent = layer.conv2
        elif isinstance(layer, WanAttentionBlock):
            silent = layer.proj
        elif isinstance(layer, WanResample) and layer.mode != "none":
            silent = layer.time_conv if layer.mode == "downsample3d" else layer.resample[1]
        else:
            continue
        torch.nn.init.zeros_(silent.weight)
        torch.nn.init.zeros_(silent.bias)
    ends = (vae.encoder, vae.decoder)
    for conv in (*(e.conv_in for e in ends), *(e.conv_out for e in ends), vae.quant_conv, vae.post_quant_conv):
        centre = [-1, *(size // 2 for size in conv.kernel_size[1:])]  # causal: the present frame is the last
        torch.nn.init.zeros_(conv.weight)
        torch.nn.init.zeros_(conv.bias)
        conv.weight[:, :, centre[0], centre[1], centre[2]] = torch.nn.init.orthogonal_(
            torch.empty(conv.weight.shape[:2])
        )
    z_dim = vae.config.z_dim
    vae.quant_conv.weight[z_dim:] *= 0.1
    vae.quant_conv.bias[z_dim:] = -6.0  # little noise, else the first hundreds of steps go into outgrowing it


def to_tensor(clips: np.ndarray) -> torch.Tensor:
    """uint8 (B, F, H, W, 3) to float (B, 3, F, H, W) in [-1, 1]."""
    return torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


class ToyClips(Dataset):
    """Rendered clips without end: the frames, and where an actor covers the background.

    Batch after batch takes the next length of `frames`; clips shorter than a whole one are cut out at random places.
    """

    def __init__(self, seed: int, split: str, frames: tuple[int, ...] = (FRAMES,), batch_size: int = 1):
        self.seed, self.split, self.frames, self.batch_size = seed, split, frames, batch_size

    def __len__(self) -> int:
        return 2**62

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        scene = scene_at(self.seed, index, self.split)
        clip = render(scene)
        empty = render(dataclasses.replace(scene, actors=()))
        frames = self.frames[index // self.batch_size % len(self.frames)]
        start = np.random.default_rng([self.seed, index]).integers(0, len(clip) - frames + 1)
        window = slice(start, start + frames)
        actors = np.abs(clip[window].astype(np.int16) - empty[window]).max(axis=-1) > 12
        return {"clip": torch.from_numpy(clip[window]), "actors": torch.from_numpy(actors)}


class VAEObjective(torch.nn.Module):
    def __init__(
        self, model: dict[str, Any], settings: VAEObjectiveConfig, batch_size: int, seed: int, start: str = ""
    ):
        super().__init__()
        z_dim = model["z_dim"]
        torch.manual_seed(seed)
        self.vae = AutoencoderKLWan(**model, latents_mean=[0.0] * z_dim, latents_std=[1.0] * z_dim)
        for layer in self.vae.modules():
            if isinstance(layer, torch.nn.Conv3d):
                layer.to(memory_format=torch.channels_last_3d)
            elif isinstance(layer, torch.nn.Conv2d):
                layer.to(memory_format=torch.channels_last)
        if start:
            self.vae.load_state_dict(_weights_of(start, self.vae))
        else:
            start_near_linear(self.vae)
        if settings.decoder_alone:
            self.vae.encoder.requires_grad_(False)
            self.vae.quant_conv.requires_grad_(False)
        self.settings = settings
        self.train_data = ToyClips(settings.scene_seed, "train", settings.frames, batch_size)
        held_out = ToyClips(settings.scene_seed, "held_out")
        examples = [held_out[index] for index in range(settings.validation_clips)]
        self.held_out = {key: torch.stack([example[key] for example in examples]) for key in examples[0]}

    def forward(self, batch: dict[str, torch.Tensor], generator: torch.Generator) -> tuple[torch.Tensor, dict]:
        clip = batch["clip"].permute(0, 4, 1, 2, 3).float() / 127.5 - 1
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.settings.decoder_alone):
            mean, log_variance = encode_clip(self.vae, clip).float().chunk(2, dim=1)
        log_variance = log_variance.clamp(-30, 20)
        noise = torch.randn(mean.shape, generator=generator, device=mean.device)
        decoded = decode_clip(self.vae, mean + torch.exp(0.5 * log_variance) * noise).float()
        error = decoded - clip
        weight = 1 + self.settings.actor_weight * batch["actors"][:, None].float()
        pixels = (error.abs() * weight).mean()
        coarse = avg_pool3d(error, (1, 4, 4)).abs().mean()
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        loss = pixels + self.settings.coarse_weight * coarse + self.settings.kl_weight * kl
        return loss, {"pixels": pixels, "coarse": coarse, "kl": kl, "latent_std": mean.std()}

    def validate(self) -> dict[str, float]:
        whole, actors, means = [], [], []
        for start in range(0, len(self.held_out["clip"]), 4):
            clip = to_tensor(self.held_out["clip"][start : start + 4].numpy())
            mean = encode_clip(self.vae, clip).chunk(2, dim=1)[0]
            error = (decode_clip(self.vae, mean).clamp(-1, 1) - clip).square() / 4
            covered = self.held_out["actors"][start : start + 4, None].expand_as(error)
            whole += [float(e.mean()) for e in error]
            actors += [float(e[c].mean()) for e, c in zip(error, covered, strict=True)]
            means.append(mean)
        return {
            "psnr": float(np.mean(-10 * np.log10(whole))),
            "psnr_worst": float(-10 * np.log10(max(whole))),
            "psnr_actors": float(np.mean(-10 * np.log10(actors))),
            "latent_std": float(torch.cat(means).std()),
        }

    def draw_samples(self, folder: Path, step: int) -> None:
        """Six held-out clips at five times, each above its reconstruction."""
        frames = self.held_out["clip"][:6].numpy()
        decoded = decode_clip(self.vae, encode_clip(self.vae, to_tensor(frames)).chunk(2, dim=1)[0])
        decoded = ((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 4, 1).numpy()
        times = np.linspace(0, frames.shape[1] - 1, 5).astype(int)
        strips = [
            np.concatenate(list(clip[times]), axis=1) for pair in zip(frames, decoded, strict=True) for clip in pair
        ]
        columns = [np.concatenate(strips[: len(strips) // 2]), np.concatenate(strips[len(strips) // 2 :])]
        sheet = np.repeat(np.repeat(np.concatenate(columns, axis=1), 2, axis=0), 2, axis=1)
        cv2.imwrite(str(folder / f"step-{step:08d}.png"), sheet[..., ::-1])

    def export(self, folder: Path) -> None:
        self.vae.save_pretrained(folder)


def _weights_of(folder: str, vae: AutoencoderKLWan) -> dict[str, torch.Tensor]:
    if not Path(folder, "config.json").is_file():
        raise ValueError(f"start names no autoencoder: {folder!r} holds no config.json.")
    earlier = AutoencoderKLWan.from_pretrained(folder, torch_dtype=torch.float32)
    different = [
        key for key in ("z_dim", "base_dim", "dim_mult", "patch_size") if earlier.config[key] != vae.config[key]
    ]
    if different:
        raise ValueError(f"The autoencoder in {folder!r} has another {different[0]} than model.{different[0]}.")
    return earlier.state_dict()


@torch.no_grad()
def measure_latents(
    vae: AutoencoderKLWan, seed: int, clips: int = STATISTICS_CLIPS
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (z) and covariance (z, z) of the latents of training clips."""
    data = ToyClips(seed, "train")
    total, square, count = 0.0, 0.0, 0
    for start in range(0, clips, 8):
        batch = np.stack([data[index]["clip"].numpy() for index in range(start, min(start + 8, clips))])
        means = encode_clip(vae, to_tensor(batch)).chunk(2, dim=1)[0].double().transpose(0, 1).flatten(1)
        total, square, count = total + means.sum(1), square + means @ means.T, count + means.shape[1]
    mean = total / count
    return mean, square / count - torch.outer(mean, mean)


@torch.no_grad()
def even_out(vae: AutoencoderKLWan, mean: torch.Tensor, covariance: torch.Tensor, evenness: float) -> torch.Tensor:
    """Turn the latents to their principal axes and give axis k the variance e_k^(1 - evenness), 1 on average, inside
    the 1x1 convolutions at both ends of the bottleneck: every clip decodes as before. Returns the map, (z, z).

    An autoencoder puts light and colour into a few strong axes and shapes into many weak ones, which in a flow drown in
    noise almost to the end and weigh next to nothing in its loss."""
    variances, axes = torch.linalg.eigh(covariance)
    variances, axes = variances.flip(0), axes.flip(1)
    scales = variances.clamp_min(1e-6 * variances[0]) ** (-evenness / 2)
    scales /= (scales.square() * variances).mean().sqrt()
    forward, backward = scales[:, None] * axes.T, axes / scales
    z = len(mean)
    into, out_of = vae.quant_conv, vae.post_quant_conv
    weight, bias = (part[:z].double().flatten(1) for part in (into.weight, into.bias[:, None]))
    into.weight[:z] = (forward @ weight).view_as(into.weight[:z])
    into.bias[:z] = forward @ (bias[:, 0] - mean)
    # the spread of each latent in the old directions says little in the new ones: a hundredth of their size
    into.weight[z:], into.bias[z:] = 0, -9.2
    weight = out_of.weight.double().flatten(1)
    out_of.weight.copy_((weight @ backward).view_as(out_of.weight))
    out_of.bias.copy_(weight @ mean + out_of.bias.double())
    return forward


def finish(
    weights: Path, target: Path, seed: int = 0, clips: int = STATISTICS_CLIPS, evenness: float = EVENNESS
) -> None:
    """Store a trained autoencoder for use: its latents evened out, their statistics in its configuration, weights in
    half precision."""
    if not 0 <= evenness <= 1:
        raise ValueError(f"evenness is a number from 0 (as it is) to 1 (all axes alike), not {evenness}.")
    vae = AutoencoderKLWan.from_pretrained(weights).eval()
    even_out(vae, *measure_latents(vae, seed, clips), evenness)
    vae.register_to_config(latents_mean=[0.0] * vae.config.z_dim, latents_std=[1.0] * vae.config.z_dim)
    vae.half().save_pretrained(target)
