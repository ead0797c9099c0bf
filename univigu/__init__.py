"""Uni-ViGU: one diffusion model that generates video from text, describes video in text, and denoises both together."""

from univigu.pipeline import UniViGUPipeline, UniViGUPipelineOutput
from univigu.preview import LatentPreviewer
from univigu.token_flow import EmbeddingFlowScheduler, MixtureFlowScheduler
from univigu.trajectory import Step, Trajectory
from univigu.transformer import UniViGUTransformer3DModel

__all__ = [
    "EmbeddingFlowScheduler",
    "LatentPreviewer",
    "MixtureFlowScheduler",
    "Step",
    "Trajectory",
    "UniViGUPipeline",
    "UniViGUPipelineOutput",
    "UniViGUTransformer3DModel",
]
