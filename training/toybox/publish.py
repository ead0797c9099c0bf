"""From a finished run to the folder that the repository carries: previews, the model's own settings, small files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan

from training.stages import save_whole
from training.toybox.render import render
from training.toybox.scenes import scene_at
from training.vae import to_tensor
from univigu import UniViGUPipeline

_PREVIEW_CLIPS = 96
_SHARD = "9MB"  # files in the repository stay under 10 MB
_TOTAL = 60_000_000


def publish(source: Path, target: Path, decoder: Path | None = None, caption_shift: float | None = None) -> None:
    """Store a trained pipeline in half precision, with the linear preview fitted on clips of the world.

    `decoder`: an autoencoder whose decoder has learned on since the pipeline's latents were made.
    `caption_shift`: the time shift of captions in sampling, where it is to be another than in training. The larger it
    is, the later words are chosen, and the more of the clip is there for them to be true of."""
    if not (source / "model_index.json").is_file():
        raise ValueError(f"'{source}' holds no pipeline: give the weights folder of a finished run.")
    pipeline = UniViGUPipeline.from_pretrained(source)
    if decoder is not None:
        _take_decoder(pipeline.vae, decoder)
    if caption_shift is not None:
        flow = pipeline.token_scheduler
        pipeline.register_modules(token_scheduler=type(flow).from_config(flow.config, shift=caption_shift))
    clips = np.stack([render(scene_at(0, index, "train")) for index in range(_PREVIEW_CLIPS)])
    pipeline.fit_previewer(to_tensor(clips))
    for part in (pipeline.transformer, pipeline.text_encoder, pipeline.vae, pipeline.previewer):
        for name, parameter in part.named_parameters():
            if not torch.isfinite(parameter.half()).all():
                raise ValueError(f"{name} has values that half precision cannot hold.")
        part.half()
    save_whole(lambda folder: pipeline.save_pretrained(folder, max_shard_size=_SHARD), target)
    sizes = {path: path.stat().st_size for path in target.rglob("*") if path.is_file()}
    largest = max(sizes, key=sizes.get)
    print(
        f"{target}: {sum(sizes.values()) / 1e6:.1f} MB in {len(sizes)} files, the largest {sizes[largest] / 1e6:.1f}."
    )
    if sizes[largest] >= 10_000_000 or sum(sizes.values()) >= _TOTAL:
        raise ValueError(f"'{target}' is too large for the repository: {largest.name} or all files together.")


def _take_decoder(vae: AutoencoderKLWan, folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise ValueError(f"'{folder}' holds no autoencoder: give the weights folder of python -m training vae.")
    learned, kept = AutoencoderKLWan.from_pretrained(folder).half().state_dict(), vae.half().state_dict()
    for name, weight in kept.items():
        if not name.startswith(("decoder.", "post_quant_conv.")) and not torch.equal(weight, learned.get(name)):
            raise ValueError(f"The autoencoder in '{folder}' makes other latents than the model's: {name} differs.")
    vae.load_state_dict(learned)
    vae.float()
