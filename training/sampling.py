"""Many clips or captions at once, through the sampler's own walk: what validation and evaluation run.

A pipeline takes one prompt or clip at a time; here they share each pass. Each has a seed of its own, from which the
noise it starts with is drawn as the pipeline draws it; what flows and schedulers draw on the way is the batch's. It
knows nothing of what is right or wrong.
"""

from __future__ import annotations

import copy
from collections import deque

import numpy as np
import torch

from univigu import UniViGUPipeline
from univigu.sampler import Guidance, make_path, text_taus, video_taus, walk
from univigu.whole_clip import decode_clip


@torch.no_grad()
def sample(
    pipeline: UniViGUPipeline,
    task: str,
    prompts: list[str],
    seeds: list[int],
    steps: int,
    guidance_scale: float = 1.0,
    clips: torch.Tensor | None = None,
    batch_size: int = 32,
) -> tuple[torch.Tensor | None, list[str] | None]:
    """Latents (N, C, F, H, W), None for understand; and captions, None for generate.

    `clips`: the clean latents to understand."""
    latents, captions = [], []
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        made, said = _sample(
            pipeline, task, prompts[part], seeds[part], steps, guidance_scale, None if clips is None else clips[part]
        )
        latents.append(made)
        captions += said
    return None if task == "understand" else torch.cat(latents), None if task == "generate" else captions


def _sample(pipeline, task, prompts, seeds, steps, guidance_scale, clips) -> tuple[torch.Tensor, list[str]]:
    config, device = pipeline.config, pipeline._execution_device
    scheduler, token_scheduler = copy.deepcopy(pipeline.scheduler), copy.deepcopy(pipeline.token_scheduler)
    captioned = token_scheduler is not None and (task != "generate" or config.prompt_as_tokens)
    table = pipeline.transformer.token_table() if captioned else None
    embeds = torch.cat([pipeline.encode_prompt(prompt, empty_as_zeros=task == "understand") for prompt in prompts])
    latents, tokens = [], []
    for number, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        generator = torch.Generator("cpu").manual_seed(seed)
        if task == "understand":
            latents.append(clips[number : number + 1].to(device).float())
        else:
            size = config.default_num_frames, config.default_height, config.default_width
            latents.append(pipeline.prepare_latents(*size, generator))
        if captioned and task == "generate":
            tokens.append(token_scheduler.clean(pipeline.caption_ids(prompt), table))
        elif captioned:
            tokens.append(token_scheduler.noise(1, config.max_caption_tokens, table, generator))
    text_times = text_taus(token_scheduler, steps) if token_scheduler is not None else [0.0] * (steps + 1)
    steps_taken = walk(
        pipeline.transformer,
        make_path(task, video_taus(scheduler, steps), text_times),
        latents=torch.cat(latents),
        tokens=torch.cat(tokens) if captioned else None,
        prompt_embeds=embeds,
        negative_prompt_embeds=pipeline.encode_prompt("").expand_as(embeds),
        video_scheduler=scheduler,
        token_scheduler=token_scheduler,
        guidance=Guidance(video=guidance_scale, fitted=config.fit_guidance),
        video_sees_tokens=not (task == "understand" and config.blind_video),
        generator=torch.Generator("cpu").manual_seed(seeds[0]),
    )
    last = deque(steps_taken, maxlen=1).pop()
    return last.latents, [] if last.token_ids is None else [to_text(pipeline, ids) for ids in last.token_ids.tolist()]


def to_text(pipeline: UniViGUPipeline, ids: list[int]) -> str:
    """A caption's words up to its end."""
    end = pipeline.tokenizer.eos_token_id
    return pipeline.tokenizer.decode(ids[: ids.index(end)] if end in ids else ids, skip_special_tokens=True)


@torch.no_grad()
def decode(pipeline: UniViGUPipeline, latents: torch.Tensor, batch_size: int = 8) -> np.ndarray:
    """Normalised latents to uint8 clips (N, F, H, W, 3)."""
    vae, clips = pipeline.vae, []
    for part in latents.split(batch_size):
        scaled = pipeline._scale(part.to(vae.device).float(), into_latents=False)
        pixels = decode_clip(vae, scaled.to(vae.dtype)).float()
        pixels = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        clips.append(pixels.permute(0, 2, 3, 4, 1).cpu().numpy())
    return np.concatenate(clips)
