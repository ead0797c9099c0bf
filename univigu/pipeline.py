"""From files and prompts to clips and captions: the three tasks behind one diffusers pipeline.

It encodes what goes in, picks the path through the unit square, lets `sampler.walk` take it, and turns every step into
something to look at. Run it to the end (`generate`, `understand`, `joint`, or the diffusers-style call behind them) or
step by step (`stream`). It knows nothing of Gradio or of training.
"""

from __future__ import annotations

import copy
import html
import math
import os
import re
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline
from diffusers.loaders import WanLoraLoaderMixin
from diffusers.utils import BaseOutput, is_ftfy_available, logging
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from transformers import AutoTokenizer, UMT5EncoderModel

from univigu.preview import LatentPreviewer, colour_clips
from univigu.sampler import (
    ORDERS,
    TASKS,
    Guidance,
    Path,
    WalkStep,
    check_path,
    make_path,
    takes_sigmas,
    text_taus,
    video_taus,
    walk,
)
from univigu.token_flow import TokenFlowScheduler
from univigu.trajectory import Step, Trajectory
from univigu.transformer import UniViGUTransformer3DModel
from univigu.video import read_video
from univigu.whole_clip import decode_clip, encode_clip

if is_ftfy_available():
    import ftfy

logger = logging.get_logger(__name__)

WHOLE_CLIP_PIXELS = 2**18  # three times the small model's clips, a hundredth of Wan's


@dataclass
class UniViGUPipelineOutput(BaseOutput):
    """`frames`: uint8 (F, H, W, 3), or None for understand. `text`: the caption, or None for generate.
    `trajectory`: every step, when `keep_trajectory=True`."""

    frames: Any = None
    text: str | None = None
    trajectory: Trajectory | None = None


class UniViGUPipeline(DiffusionPipeline, WanLoraLoaderMixin):
    """One model, three walks.

    What the model expects of its inputs is part of its configuration:

    * `zero_prompt_padding`: embeddings after the prompt's end are zero (Wan) or the encoder's own (released weights).
    * `empty_prompt`: what "no prompt" is in understanding: `"encoded"` (Wan) or `"zeros"` (released weights).
    * `normalize_latents`: latents are scaled by the autoencoder's mean and deviation (Wan) or raw (released weights).
    * `prompt_as_tokens`: generation carries the prompt as clean tokens too (equation 17); not for a Wan model whose
      tokens were never trained.
    * `blind_video`: in understanding the video does not look at the caption, so that it is computed once.
    * `fit_guidance`: see `sampler.Guidance`.
    * `default_*`: what a call uses where it is told nothing else.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _callback_tensor_inputs = ["latents", "tokens"]
    _optional_components = ["token_scheduler", "previewer"]

    def __init__(
        self,
        tokenizer: AutoTokenizer,
        text_encoder: UMT5EncoderModel,
        transformer: UniViGUTransformer3DModel,
        vae: AutoencoderKLWan,
        scheduler,
        token_scheduler: TokenFlowScheduler | None = None,
        previewer: LatentPreviewer | None = None,
        max_prompt_tokens: int = 512,
        max_caption_tokens: int = 256,
        zero_prompt_padding: bool = True,
        empty_prompt: str = "encoded",
        normalize_latents: bool = True,
        prompt_as_tokens: bool = True,
        blind_video: bool = True,
        fit_guidance: bool = False,
        default_num_frames: int = 81,
        default_height: int = 480,
        default_width: int = 832,
        default_fps: int = 16,
        default_steps: int = 50,
        default_guidance_scale: float = 5.0,
        default_caption_guidance: float = 1.0,
    ) -> None:
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            transformer=transformer,
            vae=vae,
            scheduler=scheduler,
            token_scheduler=token_scheduler,
            previewer=previewer,
        )
        self.register_to_config(
            max_prompt_tokens=max_prompt_tokens,
            max_caption_tokens=max_caption_tokens,
            zero_prompt_padding=zero_prompt_padding,
            empty_prompt=empty_prompt,
            normalize_latents=normalize_latents,
            prompt_as_tokens=prompt_as_tokens,
            blind_video=blind_video,
            fit_guidance=fit_guidance,
            default_num_frames=default_num_frames,
            default_height=default_height,
            default_width=default_width,
            default_fps=default_fps,
            default_steps=default_steps,
            default_guidance_scale=default_guidance_scale,
            default_caption_guidance=default_caption_guidance,
        )
        self.vae_scale_factor_temporal = vae.config.scale_factor_temporal if vae is not None else 4
        self.vae_scale_factor_spatial = vae.config.scale_factor_spatial if vae is not None else 8
        self.video_processor = VideoProcessor(vae_scale_factor=self.vae_scale_factor_spatial)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> UniViGUPipeline:
        """Load a folder of ours, or a Hub repository of ours (fetched whole: diffusers does not resolve components of
        other packages on the Hub)."""
        name = str(pretrained_model_name_or_path)
        if not os.path.isdir(name):
            hub = {
                key: kwargs.pop(key) for key in ("revision", "cache_dir", "token", "local_files_only") if key in kwargs
            }
            try:
                name = snapshot_download(name, **hub)
            except (HFValidationError, RepositoryNotFoundError, LocalEntryNotFoundError, OSError) as error:
                raise ValueError(
                    f"No model {name!r}: it is neither a folder here nor a repository that the Hub could be asked for."
                ) from error
        if not os.path.isfile(os.path.join(name, "model_index.json")):
            raise ValueError(f"{name!r} holds no model_index.json, so it is not a pipeline folder.")
        return super().from_pretrained(name, **kwargs)

    # ------------------------------------------------------------------------------------------------ the three tasks

    def generate(self, prompt: str, **kwargs) -> UniViGUPipelineOutput:
        """A clip from a prompt (equation 17)."""
        return self(task="generate", prompt=prompt, **kwargs)

    def understand(self, video, **kwargs) -> UniViGUPipelineOutput:
        """A caption from a clip: a file, or uint8 frames (F, H, W, 3) (equation 16)."""
        return self(task="understand", video=video, **kwargs)

    def joint(self, prompt: str = "", **kwargs) -> UniViGUPipelineOutput:
        """A clip and its caption, denoised together (equation 18)."""
        return self(task="joint", prompt=prompt, **kwargs)

    def __call__(
        self,
        task: str,
        prompt: str | None = None,
        video=None,
        *,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] | list[str] = ("latents",),
        keep_trajectory: bool = False,
        output_type: str = "np",
        return_dict: bool = True,
        **kwargs,
    ) -> UniViGUPipelineOutput | tuple:
        """Run a task to its end. Further arguments are those of `stream`.

        Args:
            callback_on_step_end: `callback(pipe, step, timestep, tensors) -> dict`, as in diffusers; tensors it returns
                ("latents", "tokens") are what the walk goes on from. Set `pipe._interrupt = True` in it to stop.
            output_type: `"np"` (uint8 frames), `"pil"` or `"latent"`.
        """
        if output_type not in ("np", "pil", "latent"):
            raise ValueError(f"output_type is 'np', 'pil' or 'latent', not {output_type!r}.")
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(f"A callback can be given {self._callback_tensor_inputs}, not {sorted(unknown)}.")
        self._interrupt = False
        steps, edited, last, progress = [], None, None, None
        run = self.stream(task, prompt, video, decode_last=output_type != "latent", **kwargs)
        try:
            while True:
                try:
                    last = run.send(edited)
                except StopIteration:
                    break
                progress = progress or self.progress_bar(total=last.total)
                progress.update()
                edited = None
                if callback_on_step_end is not None:
                    tensors = {"latents": last.latents, "tokens": last.token_state}
                    tensors = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    moving = last.tau_text if task == "understand" else last.tau_video
                    edited = callback_on_step_end(self, last.index, 1000 * (1 - moving), tensors)
                if keep_trajectory:
                    steps.append(last)
                if self._interrupt:
                    break
        finally:
            run.close()
            if progress is not None:
                progress.close()

        frames = None
        if task != "understand":
            frames = last.latents if output_type == "latent" else last.frames("clean")
            if output_type == "pil":
                frames = self.video_processor.numpy_to_pil(frames.astype(np.float32) / 255)
        text = last.text if task != "generate" else None
        trajectory = None
        if keep_trajectory:
            trajectory = Trajectory(
                task=task,
                prompt=prompt or "",
                seed=kwargs.get("seed"),
                settings={key: value for key, value in kwargs.items() if isinstance(value, (str, int, float))},
                fps=self.config.default_fps,
                steps=steps,
                frames=last.frames("clean"),
                text=text,
            )
        if not return_dict:
            return frames, text, trajectory
        return UniViGUPipelineOutput(frames, text, trajectory)

    @torch.no_grad()
    def stream(
        self,
        task: str,
        prompt: str | None = None,
        video=None,
        *,
        negative_prompt: str = "",
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        caption_guidance: float | None = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        order: str = "together",
        path: Path | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        scheduler=None,
        recompute_video_every: int | None = None,
        start: Step | None = None,
        caption: str | None = None,
        pin_caption: bool = False,
        decode_last: bool = True,
    ) -> Generator[Step, dict | None, None]:
        """Walk a task step by step. Close it, or stop reading, and nothing goes on.

        Args:
            task: `"generate"`, `"understand"` or `"joint"`.
            prompt: what to show; may be empty. In understanding, an optional hint.
            video: for understanding: a file, or uint8 frames (F, H, W, 3).
            negative_prompt: what guidance pushes the clip away from.
            guidance_scale: the clip's guidance; 1 is none. caption_guidance: the caption's.
            num_frames, height, width: the clip's size where the model allows others than its own.
            order: of a joint walk: `"together"`, `"video_first"` or `"text_first"`.
            path: any other walk: a list of (tau_video, tau_text) from its start to its end.
            seed, generator: one of them makes a run repeatable.
            latents: the clip's starting noise. prompt_embeds, negative_prompt_embeds: instead of the texts.
            scheduler: another diffusers flow scheduler for the clip, such as `UniPCMultistepScheduler`.
            recompute_video_every: see `sampler.walk`.
            start: branch: go on from this step of an earlier run with the same settings.
            caption: with `start`: what the caption is to be from there. `pin_caption` holds it to the end; otherwise it
                is put back at that step's noise level and walks on.
            decode_last: decode the finished clip with the autoencoder.
        """
        check_task(task)
        config = self.config
        steps = config.default_steps if num_inference_steps is None else num_inference_steps
        guidance = Guidance(
            video=config.default_guidance_scale if guidance_scale is None else guidance_scale,
            caption=config.default_caption_guidance if caption_guidance is None else caption_guidance,
            fitted=config.fit_guidance,
        )
        num_frames = config.default_num_frames if num_frames is None else num_frames
        height = config.default_height if height is None else height
        width = config.default_width if width is None else width
        # schedulers keep count of their steps: a run has its own, so that runs may overlap
        scheduler = copy.deepcopy(scheduler or self.scheduler)
        token_scheduler = copy.deepcopy(self.token_scheduler)
        self.check_inputs(
            task,
            prompt,
            video,
            negative_prompt,
            steps,
            guidance,
            num_frames,
            height,
            width,
            order,
            seed,
            generator,
            scheduler,
        )
        if caption is not None and start is None:
            raise ValueError("caption edits a recorded step, so it needs start, the step to go on from.")

        device = self._execution_device
        if seed is not None:
            generator = torch.Generator("cpu").manual_seed(seed)
        captioned = token_scheduler is not None and not (
            task == "generate" and (not config.prompt_as_tokens or prompt is None)
        )

        # what goes in
        if prompt_embeds is None:
            prompt_embeds = self.encode_prompt(prompt or "", empty_as_zeros=task == "understand")
        if negative_prompt_embeds is None and guidance.video != 1 and task != "understand":
            negative_prompt_embeds = self.encode_prompt(negative_prompt)
        prompt_embeds = prompt_embeds.to(device)
        if task == "understand" and start is None:
            latents = self.encode_video(self.load_frames(video, num_frames, height, width))
        elif start is None:
            latents = self.prepare_latents(num_frames, height, width, generator, latents)

        # which way
        text_times = text_taus(token_scheduler, steps) if token_scheduler is not None else [0.0] * (steps + 1)
        if path is None:
            path = make_path(task, video_taus(scheduler, steps), text_times, order)
        check_path(path)

        # from where
        tokens, first = None, 0
        if captioned:
            table = self.transformer.token_table()
        if start is not None:
            first = start.index + 1
            if first >= len(path) - 1:
                raise ValueError("This is the walk's last step: there is nothing left to run; pick an earlier one.")
            latents, tokens = start.latents.to(device), start.token_state
            tokens = tokens.to(device) if tokens is not None else None
            if generator is not None and start.generator_state is not None:
                generator.set_state(start.generator_state)
            if caption is not None and captioned:
                ids, tau_text = self.caption_ids(caption), 1.0 if pin_caption else path[first][1]
                tokens = token_scheduler.add_noise(ids, tau_text, table, generator)
                if pin_caption:
                    path = path[:first] + [(tau_video, 1.0) for tau_video, _ in path[first:]]
        elif captioned and path[0][1] == 1:
            tokens = token_scheduler.clean(self.caption_ids(prompt or ""), table)
        elif captioned:
            tokens = token_scheduler.noise(1, config.max_caption_tokens, table, generator)

        if start is None and 0 < path[0][0] < 1 and task != "understand":
            raise ValueError("A clip that is made starts from noise: the path's first tau_video must be 0.")
        steps_taken = walk(
            self.transformer,
            path,
            latents=latents,
            tokens=tokens,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds.to(device) if negative_prompt_embeds is not None else None,
            video_scheduler=scheduler,
            token_scheduler=token_scheduler,
            guidance=guidance,
            video_sees_tokens=not (task == "understand" and config.blind_video),
            recompute_video_every=recompute_video_every,
            generator=generator,
            start=first,
        )
        edited = None
        try:
            while True:
                try:
                    taken = steps_taken.send(edited)
                except StopIteration:
                    return
                edited = yield self._step(taken, task, decode_last)
        finally:
            steps_taken.close()
            self.maybe_free_model_hooks()

    # -------------------------------------------------------------------------------------------- what goes in and out

    def check_inputs(
        self,
        task,
        prompt,
        video,
        negative_prompt,
        steps,
        guidance,
        num_frames,
        height,
        width,
        order,
        seed,
        generator,
        scheduler,
    ) -> None:
        for name, text in (("prompt", prompt), ("negative_prompt", negative_prompt)):
            if text is not None and not isinstance(text, str):
                raise ValueError(f"{name} must be text (str), not {type(text).__name__}.")
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"num_inference_steps must be a whole number from 1 up, not {steps!r}.")
        for name, value in (("guidance_scale", guidance.video), ("caption_guidance", guidance.caption)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, not {value!r}.")
        if order not in ORDERS:
            raise ValueError(f"Unknown order {order!r}: choose one of {', '.join(ORDERS)}.")
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63):
            raise ValueError(f"seed must be a whole number from 0 up, not {seed!r}.")
        if seed is not None and generator is not None:
            raise ValueError("Give seed or generator, not both.")
        if not takes_sigmas(scheduler) and not scheduler.config.get("use_flow_sigmas"):
            raise ValueError(
                f"{type(scheduler).__name__} cannot be given its times; use FlowMatchEulerDiscreteScheduler, "
                "UniPCMultistepScheduler or DPMSolverMultistepScheduler with flow sigmas."
            )
        if task != "generate" and self.token_scheduler is None:
            raise ValueError("This model has no caption stream: it can generate, but not understand or do both.")
        if task == "understand" and video is None:
            raise ValueError("understand needs video: a file, or uint8 frames (F, H, W, 3).")
        self.check_size(num_frames, height, width)

    def check_size(self, num_frames: int, height: int, width: int) -> None:
        temporal = self.vae_scale_factor_temporal
        _, p_h, p_w = self.transformer.config.patch_size
        multiples = {"height": self.vae_scale_factor_spatial * p_h, "width": self.vae_scale_factor_spatial * p_w}
        if not isinstance(num_frames, int) or num_frames < 1 or (num_frames - 1) % temporal:
            raise ValueError(
                f"num_frames must be a multiple of {temporal} plus 1 (such as {4 * temporal + 1}), not {num_frames!r}."
            )
        for name, value in (("height", height), ("width", width)):
            if not isinstance(value, int) or value < 1 or value % multiples[name]:
                raise ValueError(f"{name} must be a positive multiple of {multiples[name]}, not {value!r}.")

    def cut_from_prompt(self, prompt: str) -> str:
        """The end of a prompt that does not fit and is left out; empty where all of it fits."""
        encoded = self.tokenizer(clean_prompt(prompt), add_special_tokens=False)["input_ids"]
        special = len(self.tokenizer("")["input_ids"])
        cut = encoded[self.config.max_prompt_tokens - special :]
        return self.tokenizer.decode(cut, skip_special_tokens=True) if cut else ""

    def encode_prompt(self, prompt: str, empty_as_zeros: bool = False) -> torch.Tensor:
        """A prompt's embeddings, (1, max_prompt_tokens, text_dim)."""
        length = self.config.max_prompt_tokens
        text = clean_prompt(prompt)
        if not text and empty_as_zeros and self.config.empty_prompt == "zeros":
            width = self.transformer.config.text_dim
            return torch.zeros(1, length, width, dtype=self.transformer.dtype, device=self._execution_device)
        cut = self.cut_from_prompt(prompt)
        if cut:
            logger.warning(f"The prompt is longer than {length} tokens; left out: {cut!r}")
        inputs = self.tokenizer(text, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        inputs = inputs.to(self._execution_device)
        mask = inputs.attention_mask
        embeds = self.text_encoder(inputs.input_ids, mask).last_hidden_state
        if self.config.zero_prompt_padding:
            embeds = embeds * mask.unsqueeze(-1).to(embeds.dtype)
        return embeds.to(self.transformer.dtype)

    def caption_ids(self, caption: str) -> torch.Tensor:
        """A caption as the token stream carries it: its words, the end, and the end again to the full length."""
        end = self.tokenizer.eos_token_id
        ids = self.tokenizer(clean_prompt(caption), add_special_tokens=False)["input_ids"]
        room = self.config.max_caption_tokens - 1
        if len(ids) > room:
            cut = self.tokenizer.decode(ids[room:], skip_special_tokens=True)
            logger.warning(f"The caption stream holds {room} tokens; left out: {cut!r}")
        ids = ids[:room] + [end] * (1 + room - len(ids[:room]))
        return torch.tensor([ids], device=self._execution_device)

    def load_frames(self, video, num_frames: int, height: int, width: int) -> np.ndarray:
        """A clip's frames at the model's size, from a file or from frames that already have it."""
        if isinstance(video, (str, os.PathLike)):
            return read_video(FilePath(video), num_frames, height, width).frames
        if not isinstance(video, np.ndarray) or video.dtype != np.uint8 or video.ndim != 4 or video.shape[-1] != 3:
            shape = f"{video.dtype} {video.shape}" if isinstance(video, np.ndarray) else type(video).__name__
            raise ValueError(f"video must be a file or uint8 frames (F, H, W, 3), not {shape}.")
        if video.shape[:3] != (num_frames, height, width):
            raise ValueError(
                f"These frames are {video.shape[0]} x {video.shape[1]} x {video.shape[2]} (frames x height x width); "
                f"this run needs {num_frames} x {height} x {width}."
            )
        return video

    def prepare_latents(self, num_frames, height, width, generator, latents=None) -> torch.Tensor:
        shape = (
            1,
            self.transformer.config.in_channels,
            (num_frames - 1) // self.vae_scale_factor_temporal + 1,
            height // self.vae_scale_factor_spatial,
            width // self.vae_scale_factor_spatial,
        )
        device = self._execution_device
        if latents is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents must have shape {shape}, not {tuple(latents.shape)}.")
        return latents.to(device, torch.float32)

    @torch.no_grad()
    def encode_video(self, frames: np.ndarray) -> torch.Tensor:
        """uint8 frames to clean latents."""
        pixels = torch.from_numpy(frames).to(self._execution_device).permute(3, 0, 1, 2).unsqueeze(0)
        pixels = (pixels.float() / 127.5 - 1).to(self.vae.dtype)
        if self._takes_whole(pixels[0, 0].numel()):
            latents = encode_clip(self.vae, pixels).chunk(2, dim=1)[0]
        else:
            latents = self.vae.encode(pixels).latent_dist.mode()
        return self._scale(latents.float(), into_latents=True)

    @torch.no_grad()
    def decode_latents(self, latents: torch.Tensor) -> np.ndarray:
        """Clean latents to uint8 frames, through the autoencoder."""
        latents = self._scale(latents.to(self._execution_device), into_latents=False).to(self.vae.dtype)
        scale = self.vae_scale_factor_temporal * self.vae_scale_factor_spatial**2
        if self._takes_whole(latents[0, 0].numel() * scale):
            return _to_frames(decode_clip(self.vae, latents))
        return _to_frames(self.vae.decode(latents, return_dict=False)[0])

    def _takes_whole(self, pixels: int) -> bool:
        """Whether the autoencoder takes a clip of so many pixels at once: if it is small, and nobody asked for tiles or
        for weights that are only there during a call."""
        return pixels <= WHOLE_CLIP_PIXELS and not self.vae.use_tiling and not hasattr(self.vae, "_hf_hook")

    @torch.no_grad()
    def preview(self, latents: torch.Tensor) -> np.ndarray:
        """Latents to uint8 frames, through the model's linear map where it has one."""
        if self.previewer is None:
            return self.decode_latents(latents)
        return _to_frames(self.previewer(latents.to(self.previewer.device, self.previewer.dtype)))

    @torch.no_grad()
    def fit_previewer(self, clips: torch.Tensor | None = None) -> LatentPreviewer:
        """Fit the linear preview to this model's autoencoder, on clips in [-1, 1] of (batch, 3, F, H, W)."""
        scale = self.vae_scale_factor_spatial
        if clips is None:
            clips = colour_clips(16, 4 * self.vae_scale_factor_temporal + 1, 8 * scale)
        previewer = LatentPreviewer(self.transformer.config.in_channels, scale, self.vae_scale_factor_temporal)
        device = self._execution_device
        latents = [self.vae.encode(clip[None].to(device, self.vae.dtype)).latent_dist.mode() for clip in clips]
        pixels = torch.cat([self.vae.decode(latent, return_dict=False)[0] for latent in latents]).float()
        latents = self._scale(torch.cat(latents).float(), into_latents=True)
        self.register_modules(previewer=previewer.to(device).fit(latents, pixels))
        return self.previewer

    @torch.no_grad()
    def token_attention(self, step: Step, token_index: int, prompt: str = "", task: str = "joint") -> np.ndarray:
        """Where one caption token looks at this step: float32 (F, H, W) on the clip's frames, the mean of the shared
        attention over blocks and heads, at most 1."""
        device = self._execution_device
        latents, tokens = step.latents.to(device), step.token_state.to(device)
        embeds = self.encode_prompt(prompt, empty_as_zeros=task == "understand")
        with self.transformer.record_token_attention() as record:
            self.transformer(
                latents.to(embeds.dtype),
                torch.full((1,), 1000 * (1 - step.tau_video), device=device),
                embeds,
                tokens,
                torch.full((1,), 1000 * (1 - step.tau_text), device=device),
                video_sees_tokens=not (task == "understand" and self.config.blind_video),
            )
        weights = torch.stack([layer[0, token_index] for layer in record]).mean(0)
        p_t, p_h, p_w = self.transformer.config.patch_size
        num_latents, height, width = latents.shape[2] // p_t, latents.shape[3] // p_h, latents.shape[4] // p_w
        weights = weights.reshape(num_latents, height, width).float().cpu()
        # latent frame 0 is frame 0, each later one is four frames
        repeats = torch.tensor([1] + [self.vae_scale_factor_temporal] * (latents.shape[2] - 1))
        weights = weights.repeat_interleave(p_t, dim=0).repeat_interleave(repeats, dim=0)
        size = (latents.shape[3] * self.vae_scale_factor_spatial, latents.shape[4] * self.vae_scale_factor_spatial)
        weights = torch.nn.functional.interpolate(weights[:, None], size=size, mode="bilinear")[:, 0]
        return (weights / weights.max().clamp_min(1e-12)).numpy()

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    def _scale(self, latents: torch.Tensor, into_latents: bool) -> torch.Tensor:
        if not self.config.normalize_latents:
            return latents
        mean = torch.tensor(self.vae.config.latents_mean, device=latents.device).view(1, -1, 1, 1, 1)
        std = torch.tensor(self.vae.config.latents_std, device=latents.device).view(1, -1, 1, 1, 1)
        return (latents - mean) / std if into_latents else latents * std + mean

    def _step(self, taken: WalkStep, task: str, decode_last: bool) -> Step:
        is_last = taken.index == taken.total - 1
        final_frames = None
        if is_last and decode_last:
            final_frames = self.decode_latents(taken.latents)

        def to_numpy(tensor, dtype):
            return tensor[0].cpu().numpy().astype(dtype) if tensor is not None else None

        return Step(
            index=taken.index,
            total=taken.total,
            tau_video=taken.tau_video,
            tau_text=taken.tau_text,
            token_ids=to_numpy(taken.token_ids, np.int64),
            token_confidence=to_numpy(taken.token_confidence, np.float32),
            state_token_ids=to_numpy(taken.state_token_ids, np.int64),
            latents=taken.latents.cpu(),
            clean_latents=taken.clean_latents.cpu(),
            token_state=taken.tokens.cpu() if taken.tokens is not None else None,
            generator_state=taken.generator_state,
            tokenizer=self.tokenizer,
            preview=self.preview,
            final_frames=final_frames,
        )


def check_task(task: str) -> None:
    if task not in TASKS:
        raise ValueError(f"Unknown task {task!r}: choose one of {', '.join(TASKS)}.")


def clean_prompt(text: str) -> str:
    """As Wan cleans its prompts: repaired encoding, no HTML entities, single spaces."""
    if is_ftfy_available():
        text = ftfy.fix_text(text)
    text = html.unescape(html.unescape(text))
    return re.sub(r"\s+", " ", text).strip()


def _to_frames(pixels: torch.Tensor) -> np.ndarray:
    pixels = (pixels[0].float().clamp(-1, 1) + 1) * 127.5
    return pixels.round().to(torch.uint8).permute(1, 2, 3, 0).cpu().numpy()
