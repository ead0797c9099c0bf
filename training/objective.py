"""Equation 11: the loss of one network that learns both flows, for every stage and every kind of data.

A batch is a dictionary of tensors, whoever made it:

* `latents` (B, C, F, H, W): clean, normalised, in any floating dtype.
* `caption_ids` (B, L): the detailed caption; `prompt_ids` (B, L): the brief prompt in the same tokenizer. Both end with
  EOS and are filled with EOS to the full length.
* the prompt as a condition, either `prompt_embeds` (B, S, D), encoded beforehand and zero after its end, or
  `prompt_encoder_ids` and `prompt_encoder_mask` (B, S) for an encoder that is here.
* `position` (B,): the examples' numbers in the endless list that training reads.

The paper draws both times independently, and so never visits the two edges of the unit square that inference walks
along. The default mixture does: part of a batch is on the edge of understanding (tau_video = 1), part on the edge of
generation (tau_text = 1), the rest anywhere. It knows nothing of files, pipelines, stages or words.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from training.chunked_loss import mean_in_chunks
from univigu.token_flow import EmbeddingFlowScheduler, TokenFlowScheduler, shift_tau
from univigu.transformer import UniViGUTransformer3DModel, VideoCache

# Shares of the unit interval; the golden ratio walks through it evenly.
_GOLDEN = 0.6180339887498949
_VALIDATION_TAUS = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclass
class ObjectiveConfig:
    """What equation 11 leaves open. `times: independent`, `text_loss: velocity`, and a token flow of shift 1 over
    embeddings that are not normalised make it the paper's, literally."""

    times: Literal["mixture", "independent"] = "mixture"
    understand_share: float = 0.4  # of the mixture: tau_video = 1, and the video does not see the caption
    generate_share: float = 0.3  # of the mixture: tau_text = 1
    prompt_as_tokens: float = (
        0.5  # of the generation edge: the clean tokens are the prompt, which is what inference has
    )
    captions_per_clip: int = 1  # on the understanding edge: caption states that share one pass of the video
    # How often the prompt is left out (p of section 3.3). In understanding it is left out at inference too; on the
    # generation edge the clean tokens go with it, which is guidance's unconditional branch.
    prompt_dropout: float = 0.1
    prompt_dropout_understand: float = 0.8
    # What the error of each latent channel counts, made 1 on average; none given: all alike. A small network with room
    # for some of what a clip holds does well to spend it on what shows.
    channel_weights: list[float] = field(default_factory=list)
    lambda_video: float = 1.0  # both losses are means over elements, so that 1 and 1 is the paper's balance
    lambda_text: float = 1.0
    # cross_entropy: of the clean prediction. velocity: equation 9, mean squared. both: their sum.
    text_loss: Literal["cross_entropy", "velocity", "both"] = "cross_entropy"


class FlowObjective(nn.Module):
    """The loss of `transformer` on a batch. With `target=None` it trains a video generator without captions."""

    logits_at_once = 1 << 24  # 64 MiB in float32

    def __init__(
        self,
        transformer: UniViGUTransformer3DModel,
        settings: ObjectiveConfig,
        target: Literal["prompt_ids", "caption_ids"] | None,
        video_shift: float,
        token_scheduler: TokenFlowScheduler | None = None,
        prompt_encoder: nn.Module | None = None,
        empty_prompt: tuple[torch.Tensor, torch.Tensor] | torch.Tensor | None = None,
    ):
        """`empty_prompt`: ids and mask (S,) for `prompt_encoder`, or without one the embeddings (S, D)."""
        super().__init__()
        for name in ("understand_share", "generate_share", "prompt_dropout", "prompt_dropout_understand"):
            if not 0 <= getattr(settings, name) <= 1:
                raise ValueError(f"objective.{name} is a share between 0 and 1, not {getattr(settings, name)}.")
        if settings.understand_share + settings.generate_share > 1:
            raise ValueError("objective.understand_share and objective.generate_share are together more than 1.")
        if settings.text_loss != "cross_entropy" and not isinstance(token_scheduler, EmbeddingFlowScheduler):
            raise ValueError(
                "objective.text_loss 'velocity' needs the embedding flow; ids on their way have no velocity."
            )
        channels = transformer.config.in_channels
        weights = settings.channel_weights or [1.0] * channels
        if len(weights) != channels or min(weights) < 0 or sum(weights) == 0:
            raise ValueError(
                f"objective.channel_weights needs {channels} numbers from 0 up, one for each latent channel, "
                f"not {len(weights)} of which the least is {min(weights):g}."
            )
        weights = torch.tensor(weights) * (channels / sum(weights))
        self.register_buffer("channel_weights", weights.view(1, -1, 1, 1, 1), persistent=False)
        self.transformer, self.prompt_encoder = transformer, prompt_encoder
        self.settings, self.target, self.video_shift = settings, target, video_shift
        self.token_scheduler = token_scheduler
        empty = empty_prompt if isinstance(empty_prompt, tuple) else (empty_prompt,)
        for number, tensor in enumerate(empty):
            self.register_buffer(f"empty_prompt_{number}", tensor, persistent=False)

    def forward(
        self, batch: dict[str, torch.Tensor], generator: torch.Generator
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        latents = batch["latents"].float()
        size, device = len(latents), latents.device
        with _attention(device):
            if self.target is None:
                dropped = _rand(size, generator) < self.settings.prompt_dropout
                return self._generator_alone(latents, self._prompts(batch, dropped), generator)
            understood, generated = self._shares(batch, generator)
            chance = torch.full((size,), self.settings.prompt_dropout, device=device)
            chance[:understood] = self.settings.prompt_dropout_understand
            dropped = _rand(size, generator) < chance
            prompts = self._prompts(batch, dropped)
            target = batch[self.target]

            figures: dict[str, torch.Tensor] = {}
            video, text, texts, unused = None, 0.0, 0, 0.0
            if understood:
                part = slice(0, understood)
                loss, unused = self._understand(latents[part], prompts[part], target[part], generator)
                figures["text_understand"] = loss
                text, texts = text + understood * loss, texts + understood
            if understood < size:
                part = slice(understood, size)
                tokens = target[part]
                as_prompt = _rand(generated, generator) < self.settings.prompt_as_tokens
                tokens = torch.cat(
                    [
                        torch.where(as_prompt[:, None], batch["prompt_ids"][part][:generated], tokens[:generated]),
                        tokens[generated:],
                    ]
                )
                video, loss, unused = self._noise_both(
                    latents[part], prompts[part], tokens, generated, dropped[part], generator, figures
                )
                if loss is not None:
                    figures["text_joint"] = loss
                    text, texts = text + (size - understood - generated) * loss, texts + size - understood - generated
            # equation 11, each modality averaged over the samples that carry it
            total = 0.0 * unused
            if video is not None:
                figures["video"] = video
                total = total + self.settings.lambda_video * video
            if texts:
                figures["text"] = text / texts
                total = total + self.settings.lambda_text * figures["text"]
        if isinstance(self.token_scheduler, EmbeddingFlowScheduler):
            embedding = self.transformer.token_embedding
            with torch.no_grad():  # enough rows to see a collapse
                figures["embedding_std"] = embedding.rows(embedding.table.weight[:4096]).std()
        return total, {name: value.detach() for name, value in figures.items()}

    @torch.no_grad()
    def losses_on_grid(self, batch: dict[str, torch.Tensor], seed: int) -> dict[str, float]:
        """Both losses without dropout at fixed times on the edges and the diagonal, with fixed noise."""
        latents = batch["latents"].float()
        size, device = len(latents), latents.device
        generator = torch.Generator(device).manual_seed(seed)
        noise = torch.randn(latents.shape, generator=generator, device=device)
        keep = torch.zeros(size, dtype=torch.bool, device=device)
        prompts, no_prompts = self._prompts(batch, keep), self._prompts(batch, ~keep)

        def losses(tau_video: float, tau_text: float | None, prompts: torch.Tensor) -> list[float]:
            tau = torch.full((size,), tau_video, device=device)
            inputs = [_mix(latents, noise, tau), 1000 * (1 - tau), prompts]
            if tau_text is not None:
                ids, tau_text = batch[self.target], torch.full((size,), tau_text, device=device)
                state, aim = self._noised(ids, tau_text, torch.Generator(device).manual_seed(seed + 1))
                inputs += [state, 1000 * (1 - tau_text)]
            video, hidden = self.transformer(
                *inputs, video_sees_tokens=tau_video < 1, project_tokens=False, return_dict=False
            )
            values = [float(F.mse_loss(video.float(), noise - latents))]
            if tau_text is not None:
                values.append(float(self._text_loss(hidden, tau_text, state, ids, aim, "cross_entropy")))
            return values

        figures = {}
        with _attention(device):
            for tau in _VALIDATION_TAUS:
                figures[f"video_at_{tau}_1"] = losses(tau, None if self.target is None else 1.0, prompts)[0]
                if self.target is not None:
                    figures[f"text_at_1_{tau}"] = losses(1.0, tau, no_prompts)[1]
                    figures[f"video_at_{tau}_{tau}"], figures[f"text_at_{tau}_{tau}"] = losses(tau, tau, prompts)
        return figures

    # ---- who does what, and when ----

    def _shares(self, batch: dict[str, torch.Tensor], generator: torch.Generator) -> tuple[int, int]:
        """How many of the batch are on the edge of understanding, and how many on the edge of generation.

        Of a large batch each takes its share. A batch too small for that does one task as a whole, chosen by its number
        in the endless list: the batches of a step share the tasks out, however many processes compute them.
        """
        settings, size = self.settings, len(batch["latents"])
        if settings.times == "independent":
            return 0, 0
        bounds = (settings.understand_share, settings.understand_share + settings.generate_share)
        if size * min(share for share in (bounds[0], 1 - bounds[0], 1.0) if share > 0) >= 1:
            # points (i + offset) / size: counts are within one of the share, and right on average
            offset = 0.0  # whole counts are the same for any offset, and reading one would hold up an accelerator
            if any(bound * size % 1 for bound in bounds):
                offset = float(_rand(1, generator))
            first, second = (sum((i + offset) / size < bound for i in range(size)) for bound in bounds)
            return first, second - first
        if settings.captions_per_clip > 1 and torch.distributed.is_initialized():
            raise ValueError(
                f"objective.captions_per_clip above 1 in several processes needs micro-batches that hold every task: "
                f"{size} are too few."  # processes with different tasks would wait for different passes
            )
        point = int(batch["position"][0]) // size * _GOLDEN % 1
        return (size, 0) if point < bounds[0] else (0, size) if point < bounds[1] else (0, 0)

    def _prompts(self, batch: dict[str, torch.Tensor], dropped: torch.Tensor) -> torch.Tensor:
        """The prompts' embeddings (B, S, D), those of the empty prompt where it is dropped."""
        if self.prompt_encoder is None:
            return torch.where(dropped[:, None, None], self.empty_prompt_0, batch["prompt_embeds"])
        ids = torch.where(dropped[:, None], self.empty_prompt_0, batch["prompt_encoder_ids"])
        mask = torch.where(dropped[:, None], self.empty_prompt_1, batch["prompt_encoder_mask"])
        # as the encoder would prepare it, but for a look at whether all is masked, for which an accelerator would wait
        hidden = torch.zeros(mask.shape, device=mask.device).masked_fill(mask == 0, torch.finfo(torch.float32).min)
        hidden = hidden[:, None, None, :].expand(-1, 1, mask.shape[1], -1)
        embeds = self.prompt_encoder(ids, hidden).last_hidden_state
        return embeds * mask.unsqueeze(-1).to(embeds.dtype)

    # ---- the passes ----

    def _generator_alone(self, latents, prompts, generator) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Equation 3: plain flow matching of the video."""
        tau = shift_tau(_even(len(latents), generator), self.video_shift)
        noise = torch.randn(latents.shape, generator=generator, device=latents.device)
        velocity = self.transformer(_mix(latents, noise, tau), 1000 * (1 - tau), prompts, return_dict=False)[0]
        loss = self._video_errors(velocity, noise - latents).mean()
        return loss, {"video": loss.detach()}

    def _understand(self, latents, prompts, ids, generator) -> tuple[torch.Tensor, torch.Tensor]:
        """The edge tau_video = 1: the clip is given, and only the caption has a loss."""
        times = torch.zeros(len(latents), device=latents.device)
        repeats = self.settings.captions_per_clip
        if repeats == 1:
            tau, state, aim = self._noisy_tokens(ids, None, generator)
            video, hidden = self.transformer(
                latents,
                times,
                prompts,
                state,
                1000 * (1 - tau),
                video_sees_tokens=False,
                project_tokens=False,
                return_dict=False,
            )
            return self._text_loss(hidden, tau, state, ids, aim, self.settings.text_loss), video.sum()
        if self.transformer.gradient_checkpointing:
            raise ValueError("objective.captions_per_clip above 1 keeps the video's keys: leave run.checkpointing off.")
        # The video does not see the caption, so one pass of it serves several captions at several times.
        cache = VideoCache()
        self.transformer(latents, times, prompts, video_cache=cache)
        cache.layers = [{key: _repeat(value, repeats) for key, value in layer.items()} for layer in cache.layers]
        cache.condition = tuple(_repeat(tensor, repeats) for tensor in cache.condition)
        ids = _repeat(ids, repeats)
        tau, state, aim = self._noisy_tokens(ids, None, generator)
        hidden = self.transformer(
            None,
            _repeat(times, repeats),
            None,
            state,
            1000 * (1 - tau),
            video_cache=cache,
            project_tokens=False,
            return_dict=False,
        )[1]
        loss = self._text_loss(hidden, tau, state, ids, aim, self.settings.text_loss)
        return loss, torch.zeros((), device=latents.device)

    def _noise_both(self, latents, prompts, ids, generated, dropped, generator, figures):
        """The edge tau_text = 1 for the first `generated` samples, which have no caption loss; the others have both
        times drawn independently (section 3.3)."""
        size, device = len(latents), latents.device
        tau_video = shift_tau(_even(size, generator), self.video_shift)
        noise = torch.randn(latents.shape, generator=generator, device=device)
        # without its prompt the generation edge becomes guidance's other branch: tokens that say nothing
        fixed = 1.0 - dropped[:generated].float()
        tau_text, state, aim = self._noisy_tokens(ids, fixed, generator)
        velocity, hidden = self.transformer(
            _mix(latents, noise, tau_video),
            1000 * (1 - tau_video),
            prompts,
            state,
            1000 * (1 - tau_text),
            project_tokens=False,
            return_dict=False,
        )
        errors = self._video_errors(velocity, noise - latents)
        for name, part in (("video_generate", errors[:generated]), ("video_joint", errors[generated:])):
            if len(part):
                figures[name] = part.mean()
        if generated == size:
            return errors.mean(), None, self.transformer.token_proj_out(hidden[:, :1]).sum()
        joint = (part[generated:] for part in (hidden, tau_text, state, ids, aim))
        return errors.mean(), self._text_loss(*joint, self.settings.text_loss), torch.zeros((), device=device)

    def _video_errors(self, velocity: torch.Tensor, aim: torch.Tensor) -> torch.Tensor:
        """Equation 6 for each sample; Wan's sign."""
        return ((velocity.float() - aim).square() * self.channel_weights).flatten(1).mean(1)

    # ---- the caption ----

    def _noisy_tokens(self, ids, fixed: torch.Tensor | None, generator) -> tuple[torch.Tensor, ...]:
        """Times, caption states and the velocities to aim at; the first `len(fixed)` samples are at those times."""
        drawn = len(ids) - (len(fixed) if fixed is not None else 0)
        tau = self.token_scheduler.shift_tau(_even(drawn, generator))
        if fixed is not None:
            tau = torch.cat([fixed, tau])
        return tau, *self._noised(ids, tau, generator)

    def _noised(self, ids, tau, generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Caption states at their times, and the velocities to aim at (of no use to the mixture flow). Only those rows
        of E are made ready that these captions have: with umT5's words all of them would be gigabytes."""
        scheduler, embedding = self.token_scheduler, self.transformer.token_embedding
        table = embedding.table.weight
        if not isinstance(scheduler, EmbeddingFlowScheduler):
            state = scheduler.add_noise(ids, tau, table, generator)
            return state, state
        noise = scheduler.noise(*ids.shape, table, generator)
        clean = embedding.rows(embedding.table(ids)).float()
        return _mix(clean, noise, tau), clean - noise  # equation 7

    def _text_loss(self, hidden, tau, state, ids, aim, kind: str) -> torch.Tensor:
        """The caption's loss from its last states, with the logits of a few positions at a time."""
        scheduler, transformer = self.token_scheduler, self.transformer
        table = None  # all of E, where a guess is made from it or compared with it
        if kind != "cross_entropy" or transformer.config.token_head != "logits":
            table = transformer.token_table()

        def loss(hidden, tau, state, ids, aim, weight, bias) -> torch.Tensor:
            output, total = F.linear(hidden, weight, bias), 0.0
            if kind != "velocity":
                total = F.cross_entropy(scheduler.logits(output, tau, state, table), ids)
            if kind != "cross_entropy":
                if scheduler.config.prediction_type == "velocity":
                    velocity = output.float()
                else:  # a guess near tau = 1 would be divided by nothing
                    remaining = (1 - tau).clamp_min(0.05)[:, None]
                    velocity = (scheduler.predict_clean(output, tau, state, table) - state) / remaining
                total = total + F.mse_loss(velocity, aim)  # equation 9
            return total

        def read(hidden, weight, bias) -> torch.Tensor:
            positions = (hidden, tau[:, None].expand(ids.shape), state, ids, aim)
            return mean_in_chunks(
                partial(loss, weight=weight, bias=bias),
                max(1, self.logits_at_once // transformer.config.vocab_size),
                *(part.flatten(0, 1) for part in positions),
            )

        return transformer.token_proj_out(hidden, read)


def _attention(device: torch.device):
    """On CPUs under bf16 the backward of torch's flash attention takes 40 % of a step, plain products far less; in
    float32 flash is the faster by a third."""
    plain = device.type == "cpu" and torch.is_autocast_enabled("cpu")
    return sdpa_kernel(SDPBackend.MATH) if plain else nullcontext()


def _rand(size: int, generator: torch.Generator) -> torch.Tensor:
    return torch.rand(size, generator=generator, device=generator.device)


def _even(size: int, generator: torch.Generator) -> torch.Tensor:
    """Uniform numbers in random order, one in each of `size` equal parts of the unit interval."""
    parts = torch.randperm(size, generator=generator, device=generator.device)
    return (parts + _rand(size, generator)) / max(size, 1)


def _mix(clean: torch.Tensor, noise: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
    """Equation 2: (1 - tau) noise + tau clean."""
    return torch.lerp(noise, clean, tau.reshape(-1, *[1] * (clean.ndim - 1)))


def _repeat(tensor: torch.Tensor, times: int) -> torch.Tensor:
    return tensor.repeat_interleave(times, dim=0)
