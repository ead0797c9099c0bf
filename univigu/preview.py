"""A look at latents without the autoencoder: one linear map from a latent's 3x3 neighbourhood to its pixels.

On a CPU, decoding takes longer than a denoising step and this takes a thousandth. The map is a least-squares fit to the
model's own autoencoder and is stored with the model. The first latent frame holds one picture, the others four, so each
has its own map.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn


class LatentPreviewer(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, latent_channels: int = 16, spatial_scale: int = 8, temporal_scale: int = 4):
        super().__init__()
        pixels = 3 * spatial_scale**2
        self.first = nn.Conv2d(latent_channels, pixels, 3, padding=1, padding_mode="replicate")
        self.rest = nn.Conv2d(latent_channels, pixels * temporal_scale, 3, padding=1, padding_mode="replicate")

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """(batch, channels, frames, height, width) normalised latents to pixels (batch, 3, frames, height, width)."""
        batch_size, _, num_latents, _, _ = latents.shape
        scale = self.config.spatial_scale
        frames = [F.pixel_shuffle(self.first(latents[:, :, 0]), scale).unsqueeze(1)]
        if num_latents > 1:
            rest = self.rest(latents[:, :, 1:].transpose(1, 2).flatten(0, 1))
            rest = F.pixel_shuffle(rest, scale)  # (batch * latents, temporal * 3, height, width)
            frames.append(
                rest.unflatten(1, (self.config.temporal_scale, 3)).unflatten(0, (batch_size, -1)).flatten(1, 2)
            )
        return torch.cat(frames, dim=1).transpose(1, 2).clamp(-1, 1)

    @torch.no_grad()
    def fit(self, latents: torch.Tensor, pixels: torch.Tensor, ridge: float = 1e-3) -> LatentPreviewer:
        """Least squares on pairs of normalised latents and the pixels they decode to."""
        scale, temporal = self.config.spatial_scale, self.config.temporal_scale
        pixels = F.pixel_unshuffle(pixels.transpose(1, 2), scale)  # (batch, frames, 3 * scale^2, h, w)
        self._solve(self.first, latents[:, :, 0], pixels[:, 0], ridge)
        if latents.shape[2] > 1:
            # pixel_shuffle wants (temporal, 3, scale^2) in this order
            targets = pixels[:, 1:].unflatten(1, (-1, temporal)).flatten(2, 3).flatten(0, 1)
            self._solve(self.rest, latents[:, :, 1:].transpose(1, 2).flatten(0, 1), targets, ridge)
        return self

    @staticmethod
    def _solve(conv: nn.Conv2d, latents: torch.Tensor, targets: torch.Tensor, ridge: float) -> None:
        neighbourhoods = F.unfold(F.pad(latents, (1, 1, 1, 1), mode="replicate"), 3).transpose(1, 2).flatten(0, 1)
        inputs = torch.cat([neighbourhoods, torch.ones_like(neighbourhoods[:, :1])], dim=1).double()
        outputs = targets.flatten(2).transpose(1, 2).flatten(0, 1).double()
        gram = inputs.T @ inputs
        gram += ridge * gram.diagonal().mean() * torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
        solution = torch.linalg.solve(gram, inputs.T @ outputs)
        conv.weight.copy_(solution[:-1].T.reshape(conv.weight.shape))
        conv.bias.copy_(solution[-1])


def colour_clips(count: int, num_frames: int, size: int, seed: int = 0) -> torch.Tensor:
    """Clips to fit a previewer on where no others are at hand: drifting blobs of colour, (count, 3, F, size, size)."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 3, 6, 6, generator=generator) * 2.4 - 1.2
    clips = F.interpolate(coarse, size=(num_frames, size, size), mode="trilinear", align_corners=True)
    sharp = torch.rand(count, 3, 1, size // 8, size // 8, generator=generator) * 2 - 1
    sharp = F.interpolate(sharp.squeeze(2), size=(size, size), mode="nearest").unsqueeze(2)
    mix = torch.rand(count, 1, 1, 1, 1, generator=generator)
    return (mix * clips + (1 - mix) * sharp).clamp(-1, 1)
