"""Uni-ViGU: one diffusion model that generates video from text, describes video in text, and denoises both together."""

from univigu.transformer import UniViGUTransformer3DModel

__all__ = ["UniViGUTransformer3DModel"]
