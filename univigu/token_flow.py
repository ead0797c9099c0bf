"""The two caption flows, as schedulers with one interface.

`EmbeddingFlowScheduler` is the paper's: a token travels from Gaussian noise to its row of E (equations 7, 8, 16).
`MixtureFlowScheduler` is the released weights': a token is an id all the way and jumps from noise to its word.
Both make noise, add noise, step and decode; a state is theirs to interpret, everyone else only carries it. `table` is E
as the network uses it, and the mixture flow has no use for it. Neither knows the network, the video or the prompt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor


@dataclass
class TokenFlowOutput(BaseOutput):
    """The state at the next tau; the argmax decode of the model's clean guess, with the probability of each token."""

    prev_sample: torch.Tensor
    token_ids: torch.Tensor
    confidence: torch.Tensor


def caption_shift(dim: int, entropy: float) -> float:
    """The time shift that puts a token's moment of decision in the middle of the walk: a = sqrt(d / (2 H)).

    With rows of length sqrt(d) a token of H nats becomes readable at tau / (1 - tau) = sqrt(2 H / d): at d = 1536
    that is tau = 0.06 for 3 nats, and uniform times would spend nine steps in ten on tokens already decided."""
    return math.sqrt(dim / (2 * entropy))


def shift_tau(tau, shift: float):
    """tau' = tau / (tau + a (1 - tau)): Wan's shift of the noise level, written in tau."""
    return tau / (tau + shift * (1 - tau))


def _expand(tau: float | torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    tau = torch.as_tensor(tau, dtype=torch.float32, device=like.device)
    return tau.reshape(-1, *[1] * (like.ndim - 1)) if tau.ndim else tau


def _check_shift(shift: float) -> None:
    if not shift > 0:
        raise ValueError(f"shift must be a positive number, not {shift!r}.")


class TokenFlowScheduler(SchedulerMixin):
    """The tokens' own time, which both flows share."""

    order = 1

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        self.num_inference_steps = num_inference_steps
        self.taus = self.shift_tau(torch.linspace(0, 1, num_inference_steps + 1, dtype=torch.float64))
        self.timesteps = ((1 - self.taus[:-1]) * self.config.num_train_timesteps).float().to(device)

    def shift_tau(self, tau):
        return shift_tau(tau, self.config.shift)


class EmbeddingFlowScheduler(TokenFlowScheduler, ConfigMixin):
    """The paper's caption flow, and what it takes to train it.

    * `prediction_type`: what the network's output is: `"logits"` (the clean guess is softmax(logits) E), `"clean"` (the
      clean embedding itself) or `"velocity"` (the paper, literally). The same ODE is integrated in each case.
    * `shift`: the time shift a, in training and in sampling alike; see `caption_shift`. 1 is the paper's uniform time.
    * `stochastic_sampling`: every step draws the noise anew around the clean guess, where the ODE keeps what it began
      with. A word that leant the wrong way is then forgotten with its noise, and can still come to fit the others.
    """

    @register_to_config
    def __init__(
        self,
        prediction_type: str = "logits",
        shift: float = 1.0,
        stochastic_sampling: bool = False,
        num_train_timesteps: int = 1000,
    ):
        if prediction_type not in ("logits", "clean", "velocity"):
            raise ValueError(f"prediction_type is 'logits', 'clean' or 'velocity', not {prediction_type!r}.")
        _check_shift(shift)

    def noise(self, batch_size: int, length: int, table: torch.Tensor, generator=None) -> torch.Tensor:
        shape = (batch_size, length, table.shape[-1])
        return randn_tensor(shape, generator=generator, device=table.device, dtype=torch.float32)

    def clean(self, token_ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return table[token_ids].float()

    def add_noise(self, token_ids: torch.Tensor, tau, table: torch.Tensor, generator=None) -> torch.Tensor:
        noise = self.noise(*token_ids.shape, table, generator)
        tau = _expand(tau, noise)
        return (1 - tau) * noise + tau * self.clean(token_ids, table)  # equation 7

    def predict_clean(self, model_output: torch.Tensor, tau, state: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        if self.config.prediction_type == "logits":
            return model_output.float().softmax(-1) @ table.float()
        if self.config.prediction_type == "clean":
            return model_output.float()
        return state + (1 - _expand(tau, state)) * model_output.float()

    def logits(self, model_output: torch.Tensor, tau, state: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """The model's belief about each token; what the cross-entropy is taken of."""
        if self.config.prediction_type == "logits":
            return model_output.float()
        # rows and guess have length sqrt(d): a right guess scores sqrt(d), a wrong row about a unit Gaussian
        clean = self.predict_clean(model_output, tau, state, table)
        return clean @ table.float().T / table.shape[-1] ** 0.5

    def step(
        self,
        model_output: torch.Tensor,
        tau: float,
        tau_next: float,
        state: torch.Tensor,
        table: torch.Tensor,
        generator: torch.Generator | None = None,
    ) -> TokenFlowOutput:
        confidence, token_ids = self.logits(model_output, tau, state, table).softmax(-1).max(-1)
        clean = self.predict_clean(model_output, tau, state, table)
        if self.config.stochastic_sampling:
            noise = self.noise(*state.shape[:2], table, generator)
            return TokenFlowOutput((1 - tau_next) * noise + tau_next * clean, token_ids, confidence)
        velocity = (clean - state) / (1 - tau)
        return TokenFlowOutput(state + (tau_next - tau) * velocity, token_ids, confidence)  # equation 16

    def decode(self, state: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return (state.float() @ table.float().T).argmax(-1)  # equation 8


class MixtureFlowScheduler(TokenFlowScheduler, ConfigMixin):
    """The released weights' caption flow: at tau a token is its word with probability tau, else a draw from the source.

    * `source`: `"uniform"` over the vocabulary (the released weights) or `"mask"`.
    * `jumps`: `"euler"`, a step of the continuous-time Markov chain on the tokens' own time, or `"resample"`, the
      released joint sampler, which redraws every token with probability i / (n - 1) whatever it already is.
    * `temperature`: of the drawn words; 0 takes the likeliest.
    """

    @register_to_config
    def __init__(
        self,
        vocab_size: int,
        source: str = "uniform",
        mask_token_id: int | None = None,
        jumps: str = "euler",
        shift: float = 1.0,
        temperature: float = 1.0,
        num_train_timesteps: int = 1000,
    ):
        if source not in ("uniform", "mask"):
            raise ValueError(f"source is 'uniform' or 'mask', not {source!r}.")
        if source == "mask" and mask_token_id is None:
            raise ValueError("source='mask' needs mask_token_id, the token that stands for noise.")
        if jumps not in ("euler", "resample"):
            raise ValueError(f"jumps is 'euler' or 'resample', not {jumps!r}.")
        if not temperature >= 0:
            raise ValueError(f"temperature must be 0 or more, not {temperature!r}.")
        _check_shift(shift)

    def noise(self, batch_size: int, length: int, table: torch.Tensor, generator=None) -> torch.Tensor:
        if self.config.source == "mask":
            return torch.full((batch_size, length), self.config.mask_token_id, device=table.device)
        drawn = self._uniform((batch_size, length), table.device, generator) * self.config.vocab_size
        return drawn.long().clamp_(max=self.config.vocab_size - 1)

    def clean(self, token_ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return token_ids

    def add_noise(self, token_ids: torch.Tensor, tau, table: torch.Tensor, generator=None) -> torch.Tensor:
        noise = self.noise(*token_ids.shape, table, generator)
        kept = self._uniform(token_ids.shape, token_ids.device, generator) < _expand(tau, token_ids)
        return torch.where(kept, token_ids, noise)

    def logits(self, model_output: torch.Tensor, tau, state: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return model_output.float()

    def step(
        self,
        model_output: torch.Tensor,
        tau: float,
        tau_next: float,
        state: torch.Tensor,
        table: torch.Tensor,
        generator: torch.Generator | None = None,
    ) -> TokenFlowOutput:
        probabilities = model_output.float().softmax(-1)
        confidence, token_ids = probabilities.max(-1)
        if tau_next >= 1:
            return TokenFlowOutput(token_ids, token_ids, confidence)

        words = token_ids if self.config.temperature == 0 else self._draw(model_output, generator)
        # Given its word, a token that has not jumped by tau has done so by tau_next with this probability exactly.
        jump = (tau_next - tau) / (1 - tau)
        if self.config.jumps == "resample":
            steps_done = int((self.taus < tau_next).sum()) - 1
            jump = steps_done / max(self.num_inference_steps - 1, 1)
        jumps = self._uniform(state.shape, state.device, generator) < jump
        if self.config.source == "mask":
            jumps &= state == self.config.mask_token_id
        return TokenFlowOutput(torch.where(jumps, words, state), token_ids, confidence)

    def decode(self, state: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return state

    def _draw(self, logits: torch.Tensor, generator) -> torch.Tensor:
        # inverse CDF: one number a token crosses to the device, not a probability a word; float64, as 256k words add up
        cumulative = F.softmax(logits.double() / self.config.temperature, dim=-1).cumsum(-1)
        threshold = self._uniform(logits.shape[:-1], logits.device, generator).double().unsqueeze(-1)
        return torch.searchsorted(cumulative, threshold).squeeze(-1).clamp_(max=logits.shape[-1] - 1)

    @staticmethod
    def _uniform(shape, device, generator) -> torch.Tensor:
        source = generator.device if generator is not None else device
        return torch.rand(tuple(shape), generator=generator, device=source).to(device)
