"""The walk through the unit square (tau_video, tau_text), and the one denoising loop.

A task is a path to (1, 1): generate starts at (0, 1), understand at (1, 0), joint at (0, 0) (equations 17, 16, 18).
`walk` takes any such path, evaluates the network once a step (more with guidance), lets each modality's scheduler take
the step, and yields where it is. It knows nothing of files, prompts, pixels or Gradio.
"""

from __future__ import annotations

import inspect
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.guiders.classifier_free_zero_star_guidance import cfg_zero_star_scale
from diffusers.utils.torch_utils import randn_tensor

from univigu.token_flow import TokenFlowScheduler, shift_tau
from univigu.transformer import UniViGUTransformer3DModel, VideoCache

TASKS = ("generate", "understand", "joint")
ORDERS = ("together", "video_first", "text_first")
VIDEO_SCHEDULERS = ("euler", "stochastic", "unipc", "dpm++", "sde-dpm++")
# Up to so many places in the latents, guidance's two branches go through the network as one batch: on a CPU a quarter
# cheaper than one after the other. Beyond it nothing would be won, and the memory of a pass would double.
SMALL_LATENTS = 4096

Path = list[tuple[float, float]]


@dataclass(frozen=True)
class Guidance:
    """How far to push away from the unconditional prediction; 1 is no push and costs nothing.

    `video`: the prompt against the negative prompt. `caption`: the clip against no clip, which this model knows as a
    clip at tau_video = 0. `fitted`: the clip's other prediction is first scaled to come as near to the prompted one as
    it can (CFG-Zero*, arXiv 2503.18886), so that what is pushed away from is its direction, not its length."""

    video: float = 1.0
    caption: float = 1.0
    fitted: bool = False


@dataclass
class WalkStep:
    """Where the walk is after a step, and what the network believed when taking it."""

    index: int
    total: int
    tau_video: float
    tau_text: float
    latents: torch.Tensor
    clean_latents: torch.Tensor
    tokens: torch.Tensor | None
    token_ids: torch.Tensor | None
    token_confidence: torch.Tensor | None
    state_token_ids: torch.Tensor | None
    generator_state: torch.Tensor | None


def video_taus(scheduler, num_steps: int) -> list[float]:
    """The video's times: uniform, shifted as Wan's scheduler says (3 for 480p, 5 for 720p)."""
    shift = _video_shift(scheduler)
    return [shift_tau(index / num_steps, shift) for index in range(num_steps + 1)]


def text_taus(scheduler: TokenFlowScheduler, num_steps: int) -> list[float]:
    scheduler.set_timesteps(num_steps)
    return scheduler.taus.tolist()


def video_scheduler(name: str, like):
    """A flow scheduler for the clip by its short name, with the time shift of another.

    "stochastic" takes Euler's guess of the clean clip and draws all of the noise anew at every step, "sde-dpm++" as
    much of it as keeps the distribution: the errors of a network that is not exact are forgotten with the noise they
    were made in, where the other solvers add them up."""
    shift = _video_shift(like)
    if name in ("euler", "stochastic"):
        return FlowMatchEulerDiscreteScheduler(shift=shift, stochastic_sampling=name == "stochastic")
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    if name == "unipc":
        return UniPCMultistepScheduler(**flow)
    if name == "dpm++":
        return DPMSolverMultistepScheduler(**flow)
    if name == "sde-dpm++":
        return DPMSolverMultistepScheduler(**flow, algorithm_type="sde-dpmsolver++")
    raise ValueError(f"Unknown scheduler {name!r}: choose one of {', '.join(VIDEO_SCHEDULERS)}.")


def takes_sigmas(scheduler) -> bool:
    return "sigmas" in inspect.signature(scheduler.set_timesteps).parameters


def make_path(task: str, video: Sequence[float], text: Sequence[float], order: str = "together") -> Path:
    """A task's path from the times of each modality. In sequence, each modality takes all its steps, so the walk is
    twice as long."""
    if task == "generate":  # equation 17
        return [(tau_video, 1.0) for tau_video in video]
    if task == "understand":  # equation 16
        return [(1.0, tau_text) for tau_text in text]
    if task != "joint":
        raise ValueError(f"Unknown task {task!r}: choose one of {', '.join(TASKS)}.")
    if order == "together":  # equation 18
        return list(zip(video, text, strict=True))
    if order == "video_first":
        return [(tau_video, text[0]) for tau_video in video] + [(video[-1], tau_text) for tau_text in text[1:]]
    if order == "text_first":
        return [(video[0], tau_text) for tau_text in text] + [(tau_video, text[-1]) for tau_video in video[1:]]
    raise ValueError(f"Unknown order {order!r}: choose one of {', '.join(ORDERS)}.")


def check_path(path: Path) -> None:
    if len(path) < 2:
        raise ValueError("A path needs at least two points (tau_video, tau_text).")
    for point in path:
        if len(point) != 2 or not all(0 <= tau <= 1 for tau in point):
            raise ValueError(f"A path's points are pairs (tau_video, tau_text) between 0 and 1, not {point!r}.")
    for before, after in pairwise(path):
        if after[0] < before[0] or after[1] < before[1]:
            raise ValueError(f"A path only goes from noise to clean, so {tuple(after)} cannot follow {tuple(before)}.")


@torch.no_grad()
def walk(
    transformer: UniViGUTransformer3DModel,
    path: Path,
    *,
    latents: torch.Tensor,
    tokens: torch.Tensor | None,
    prompt_embeds: torch.Tensor,
    negative_prompt_embeds: torch.Tensor | None = None,
    video_scheduler=None,
    token_scheduler: TokenFlowScheduler | None = None,
    guidance: Guidance = Guidance(),
    video_sees_tokens: bool = True,
    recompute_video_every: int | None = None,
    generator: torch.Generator | None = None,
    start: int = 0,
) -> Generator[WalkStep, dict | None, None]:
    """Walk `path` from its point `start`, yielding after every step.

    Args:
        latents, tokens: the states at `path[start]`; to branch, hand back those of a recorded step, edited or not.
            `tokens=None` walks a model without captions.
        video_sees_tokens: False keeps the video blind to the caption; where the path also leaves the video still, its
            keys and values are computed once, and each step costs the tokens alone.
        recompute_video_every: reuse the video's keys and values for this many steps although the video does see the
            tokens: an approximation, for models trained without that mask. 1 recomputes always.
        generator: for flows and schedulers that draw as they go; its state is part of each step, so that a branch can
            go on from it.
    """
    check_path(path)
    total = len(path) - 1
    video_moves = path[-1][0] > path[start][0]
    text_moves = path[-1][1] > path[start][1]
    table = transformer.token_table() if tokens is not None else None
    if video_moves:
        _set_video_times(video_scheduler, path, start, latents.device)
    scheduler_draws = video_moves and "generator" in inspect.signature(video_scheduler.step).parameters

    # A clip that does not change needs one pass; "blind" is the branch without the clip.
    if recompute_video_every is None:
        recompute_video_every = 1 if video_sees_tokens else total
    caches: dict[str, VideoCache] = {}
    # The unconditional branches' noise has its own generator, so that a branch from a recorded step draws the same.
    aside = None
    if generator is not None:
        aside = torch.Generator(generator.device).manual_seed((generator.initial_seed() + 1) % 2**63)
    blind_latents = negative_tokens = None
    if guidance.caption != 1 and text_moves:
        blind_latents = randn_tensor(latents.shape, generator=aside, device=latents.device, dtype=latents.dtype)
    if guidance.video != 1 and video_moves and tokens is not None:
        negative_tokens = token_scheduler.noise(*tokens.shape[:2], table, aside)

    def predict(branch, latents, tau_video, tokens, tau_text, prompt_embeds, step):
        cache = None
        if not video_moves and recompute_video_every > 1:
            if (step - start) % recompute_video_every == 0:
                caches[branch] = VideoCache()
            cache = caches[branch]
        batch_size = latents.shape[0]
        with transformer.cache_context(branch, step_index=step, num_inference_steps=total, sigma=1 - tau_video):
            velocity, token_output = transformer(
                hidden_states=latents.to(prompt_embeds.dtype),
                timestep=_timestep(tau_video, batch_size, latents.device),
                encoder_hidden_states=prompt_embeds,
                token_hidden_states=tokens,
                token_timestep=_timestep(tau_text, batch_size, latents.device) if tokens is not None else None,
                video_sees_tokens=video_sees_tokens,
                video_cache=cache,
                return_dict=False,
            )
        return velocity.float() if velocity is not None else None, token_output

    def predict_both(latents, tau_video, cond, uncond, step):
        (tokens, tau_text, embeds), (other_tokens, other_tau, other_embeds) = cond, uncond
        is_small = latents[:, 0].numel() <= SMALL_LATENTS and embeds.shape == other_embeds.shape
        if not is_small or transformer.is_cache_enabled:
            return (
                predict("cond", latents, tau_video, tokens, tau_text, embeds, step),
                predict("uncond", latents, tau_video, other_tokens, other_tau, other_embeds, step),
            )
        velocity, token_output = predict(
            "both",
            torch.cat([latents, latents]),
            tau_video,
            torch.cat([tokens, other_tokens]) if tokens is not None else None,
            [tau_text, other_tau],
            torch.cat([embeds, other_embeds]),
            step,
        )
        token_outputs = token_output.chunk(2) if token_output is not None else (None, None)
        return tuple(zip(velocity.chunk(2), token_outputs, strict=True))

    try:
        for step in range(start, total):
            (tau_video, tau_text), (next_video, next_text) = path[step], path[step + 1]
            if guidance.video != 1 and next_video > tau_video:
                # The other branch knows no words at all: the clip is pushed towards its caption as towards the prompt
                branches = (tokens, tau_text, prompt_embeds), (negative_tokens, 0.0, negative_prompt_embeds)
                (velocity, token_output), (other, _) = predict_both(latents, tau_video, *branches, step)
                if guidance.fitted:
                    other = other * cfg_zero_star_scale(velocity.flatten(1), other.flatten(1)).view(-1, 1, 1, 1, 1)
                velocity = other + guidance.video * (velocity - other)
            else:
                velocity, token_output = predict("cond", latents, tau_video, tokens, tau_text, prompt_embeds, step)
            if guidance.caption != 1 and next_text > tau_text:
                _, other = predict("blind", blind_latents, 0.0, tokens, tau_text, prompt_embeds, step)
                token_output = other + guidance.caption * (token_output - other)

            clean_latents = latents
            if velocity is not None and tau_video < 1:
                clean_latents = latents - (1 - tau_video) * velocity
            if next_video > tau_video:  # equation 17
                timestep = video_scheduler.timesteps[_video_step(path, step)]
                draws = {"generator": generator} if scheduler_draws else {}
                latents = video_scheduler.step(velocity, timestep, latents, **draws, return_dict=False)[0]

            token_ids = confidence = state_token_ids = None
            if tokens is not None:
                if next_text > tau_text:  # equation 16
                    moved = token_scheduler.step(token_output, tau_text, next_text, tokens, table, generator)
                    tokens, token_ids, confidence = moved.prev_sample, moved.token_ids, moved.confidence
                elif tau_text < 1:
                    logits = token_scheduler.logits(token_output, tau_text, tokens, table)
                    confidence, token_ids = logits.softmax(-1).max(-1)
                state_token_ids = token_scheduler.decode(tokens, table)
                if token_ids is None:
                    token_ids, confidence = state_token_ids, torch.ones(state_token_ids.shape, device=latents.device)

            edited = yield WalkStep(
                index=step,
                total=total,
                tau_video=next_video,
                tau_text=next_text,
                latents=latents,
                clean_latents=latents if next_video == 1 else clean_latents,
                tokens=tokens,
                token_ids=token_ids,
                token_confidence=confidence,
                state_token_ids=state_token_ids,
                generator_state=generator.get_state() if generator is not None else None,
            )
            if edited:  # a callback may send back other states to go on from
                latents, tokens = edited.get("latents", latents), edited.get("tokens", tokens)
    finally:
        if transformer.is_cache_enabled:
            transformer._reset_stateful_cache()


def _timestep(tau: float | list[float], batch_size: int, device) -> torch.Tensor:
    """The network's time for each of a batch; of several times, each holds for an equal part of it."""
    taus = tau if isinstance(tau, list) else [tau]
    times = torch.tensor([1000.0 * (1 - tau) for tau in taus], device=device)
    return times.repeat_interleave(batch_size // len(taus))


def _video_shift(scheduler) -> float:
    return scheduler.config.get("flow_shift") or scheduler.config.get("shift") or 1.0


def _video_step(path: Path, step: int) -> int:
    """How many of the steps before this one moved the video: the video scheduler counts only those."""
    return sum(after[0] > before[0] for before, after in pairwise(path[: step + 1]))


def _set_video_times(scheduler, path: Path, start: int, device) -> None:
    """Give a diffusers scheduler exactly the path's video times, from wherever the walk begins."""
    taus = [before[0] for before, after in pairwise(path) if after[0] > before[0]]
    if path[-1][0] < 1:
        taus.append(path[-1][0])  # the scheduler's own last time is always tau = 1
    shift = _video_shift(scheduler)
    # the scheduler shifts what it is given: hand it the times that its shift turns into ours
    sigmas = np.array([(1 - tau) / (shift - (shift - 1) * (1 - tau)) for tau in taus])
    if takes_sigmas(scheduler):
        scheduler.set_timesteps(sigmas=sigmas, device=device)
    else:  # DPM-Solver++ only lays a grid of its own, so ours is put in its place; at 1 its logarithm has no value
        scheduler.set_timesteps(len(taus), device=device)
        scheduler.sigmas = torch.tensor([min(1 - tau, 1 - 1e-6) for tau in taus] + [0.0])
        scheduler.timesteps = 1000 * scheduler.sigmas[:-1].to(device)
    scheduler.set_begin_index(_video_step(path, start))
