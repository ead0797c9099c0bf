"""The walk: the exact flow reaches its end, every path is walked, and a branch goes on where its run was."""

from __future__ import annotations

import threading

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_utils import ModelMixin
from tiny import tiny_transformer

from univigu import EmbeddingFlowScheduler, MixtureFlowScheduler, sampler
from univigu.sampler import Guidance, check_path, make_path, text_taus, video_scheduler, video_taus, walk

VOCAB, DIM, LENGTH = 26, 8, 6
SHAPE = (1, 4, 3, 8, 8)
SCHEDULERS = {
    "euler": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "unipc": lambda: UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    "dpm++": lambda: video_scheduler("dpm++", FlowMatchEulerDiscreteScheduler(shift=3.0)),
    "stochastic": lambda: video_scheduler("stochastic", FlowMatchEulerDiscreteScheduler(shift=3.0)),
    "sde-dpm++": lambda: video_scheduler("sde-dpm++", FlowMatchEulerDiscreteScheduler(shift=3.0)),
}
NOISY = ("stochastic", "sde-dpm++")


class ExactFlow(ModelMixin, CacheMixin):
    """The network that is right: clips are Gaussian with a known mean and deviation, the caption is one known text."""

    def __init__(self, deviation: float = 0.5):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.mean = torch.randn(SHAPE, generator=generator)
        self.ids = torch.randint(0, VOCAB, (1, LENGTH), generator=generator)
        self.table = torch.nn.functional.normalize(torch.randn(VOCAB, DIM, generator=generator), dim=-1) * DIM**0.5
        self.deviation = deviation
        self.times: list[tuple[float, float]] = []

    def token_table(self):
        return self.table

    def forward(self, hidden_states, timestep, token_timestep, token_hidden_states, **_):
        self.times.append((timestep[0].item(), token_timestep[0].item()))
        tau = 1 - timestep[0] / 1000
        variance = (1 - tau) ** 2 + tau**2 * self.deviation**2
        # d/dtau of tau * mean + sqrt(variance) * noise, along the line that goes through the state; Wan's sign is minus
        slope = (tau * self.deviation**2 - (1 - tau)) / variance
        velocity = self.mean + slope * (hidden_states - tau * self.mean)
        return -velocity, torch.nn.functional.one_hot(self.ids, VOCAB).float() * 100


def exact_walk(path, scheduler="euler", deviation=0.5, **kwargs):
    network, flow = ExactFlow(deviation), EmbeddingFlowScheduler()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(SHAPE, generator=generator)
    tokens = flow.noise(1, LENGTH, network.table, generator)
    steps = walk(
        network,
        path,
        latents=noise,
        tokens=tokens,
        prompt_embeds=torch.zeros(1, 1, 1),
        video_scheduler=SCHEDULERS[scheduler](),
        token_scheduler=flow,
        generator=generator,
        **kwargs,
    )
    return network, noise, steps


def joint_path(scheduler, num_steps, order="together"):
    return make_path(
        "joint",
        video_taus(SCHEDULERS[scheduler](), num_steps),
        text_taus(EmbeddingFlowScheduler(shift=1.4), num_steps),
        order,
    )


@pytest.mark.parametrize(
    "scheduler, num_steps, tolerance", [("euler", 300, 0.02), ("unipc", 30, 0.02), ("dpm++", 60, 0.02)]
)
def test_the_exact_flow_is_integrated_to_its_end(scheduler, num_steps, tolerance):
    network, noise, steps = exact_walk(joint_path(scheduler, num_steps), scheduler)
    *_, last = steps
    assert (last.tau_video, last.tau_text) == (1.0, 1.0)
    torch.testing.assert_close(last.latents, network.mean + network.deviation * noise, atol=tolerance, rtol=0)
    assert torch.equal(last.token_ids, network.ids) and torch.equal(last.state_token_ids, network.ids)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_flow_to_one_point_is_exact_at_any_step_count(scheduler):
    network, _, steps = exact_walk(joint_path(scheduler, 3), scheduler, deviation=0.0)
    for step in steps:
        torch.testing.assert_close(step.clean_latents, network.mean, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(step.latents, network.mean, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("order", ["together", "video_first", "text_first"])
def test_the_network_is_told_the_paths_own_times(scheduler, order):
    path = joint_path(scheduler, 4, order)
    network, _, steps = exact_walk(path, scheduler)
    walked = [(step.tau_video, step.tau_text) for step in steps]
    assert walked == path[1:]
    told = torch.tensor(network.times)
    torch.testing.assert_close(told, 1000 * (1 - torch.tensor(path[:-1])), atol=1e-3, rtol=0)
    assert len(path) == (5 if order == "together" else 9)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_any_monotone_path_is_walked(scheduler):
    path = [(0, 0), (0.2, 0), (0.2, 0.6), (0.5, 0.7), (0.5, 1), (0.8, 1)]
    network, noise, steps = exact_walk(path, scheduler, deviation=0.0)
    *_, last = steps
    assert (last.tau_video, last.tau_text) == (0.8, 1)
    left = (last.latents - 0.8 * network.mean) / 0.2
    if scheduler in NOISY:  # noise that is not the first one, and as strong
        assert abs(left.std().item() - 1) < 0.1 and (left - noise).abs().max() > 1
    else:
        torch.testing.assert_close(left, noise, atol=1e-3, rtol=1e-3)


def test_a_stochastic_solver_keeps_the_distribution():
    """Of 768 independent numbers of deviation 0.5 around a known mean; the deviation of an estimate is 0.013."""
    network, noise, steps = exact_walk(joint_path("sde-dpm++", 60), "sde-dpm++")
    *_, last = steps
    made = last.latents - network.mean
    assert abs(made.std().item() - 0.5) < 0.05 and abs(made.mean().item()) < 0.08
    assert torch.corrcoef(torch.stack([made.flatten(), noise.flatten()]))[0, 1] < 0.5  # it is drawn anew


@pytest.mark.parametrize("scheduler", NOISY)
def test_a_stochastic_run_repeats_from_its_generator(scheduler):
    first, second = (list(exact_walk(joint_path(scheduler, 5), scheduler)[2])[-1].latents for _ in range(2))
    torch.testing.assert_close(first, second, atol=0, rtol=0)


def test_the_times_are_wans():
    """Uniform times under Wan's shift, not diffusers' default grid with its doubly shifted end."""
    taus = video_taus(SCHEDULERS["euler"](), 5)
    assert [1 - tau for tau in taus] == pytest.approx([1, 0.9231, 0.8182, 0.6667, 0.4286, 0], abs=1e-4)
    assert video_taus(SCHEDULERS["unipc"](), 5) == pytest.approx(taus)


def test_paths_of_the_three_tasks():
    video, text = [0.0, 0.3, 1.0], [0.0, 0.6, 1.0]
    assert make_path("generate", video, text) == [(0.0, 1.0), (0.3, 1.0), (1.0, 1.0)]
    assert make_path("understand", video, text) == [(1.0, 0.0), (1.0, 0.6), (1.0, 1.0)]
    assert make_path("joint", video, text) == [(0.0, 0.0), (0.3, 0.6), (1.0, 1.0)]


@pytest.mark.parametrize(
    "path, sentence",
    [
        ([(0, 0)], "at least two points"),
        ([(0, 0), (1.5, 1)], "between 0 and 1"),
        ([(0, 0), (float("nan"), 1)], "between 0 and 1"),
        ([(0, 0), (0.5, 0.5), (0.4, 1)], "only goes from noise to clean"),
    ],
)
def test_a_path_that_cannot_be_walked_is_named(path, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_path(path)


# ------------------------------------------------------------------------------------------------------- real networks


def tiny_walk(path, network=None, flow=None, seed=0, **kwargs):
    network = network or tiny_transformer()
    flow = flow or EmbeddingFlowScheduler(shift=1.4)
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.Generator().manual_seed(9)
    states = {"latents": torch.randn(1, 4, 3, 8, 8, generator=generator)}
    states["tokens"] = flow.noise(1, LENGTH, network.token_table().detach(), generator)
    states.update({name: kwargs.pop(name) for name in ("latents", "tokens") if name in kwargs})
    return walk(
        network,
        path,
        **states,
        prompt_embeds=torch.randn(1, 5, 16, generator=prompts),
        negative_prompt_embeds=torch.randn(1, 5, 16, generator=prompts),
        video_scheduler=SCHEDULERS["euler"](),
        token_scheduler=flow,
        generator=generator,
        **kwargs,
    )


def understanding_path(num_steps=6):
    return [(1.0, tau) for tau in text_taus(EmbeddingFlowScheduler(shift=1.4), num_steps)]


def mixture():
    return MixtureFlowScheduler(VOCAB), tiny_transformer(vocab_size=VOCAB, token_state="ids")


def test_cached_understanding_is_exact():
    cached = list(tiny_walk(understanding_path(), video_sees_tokens=False))
    full = list(tiny_walk(understanding_path(), video_sees_tokens=False, recompute_video_every=1))
    for one, other in zip(cached, full, strict=True):
        torch.testing.assert_close(one.tokens, other.tokens, atol=1e-5, rtol=0)
        torch.testing.assert_close(one.token_confidence, other.token_confidence, atol=1e-5, rtol=0)


def test_a_model_that_was_not_masked_can_recompute_now_and_then():
    exact = list(tiny_walk(understanding_path()))
    every = list(tiny_walk(understanding_path(), recompute_video_every=1))
    third = list(tiny_walk(understanding_path(), recompute_video_every=3))
    assert torch.equal(exact[-1].tokens, every[-1].tokens)
    # freshly computed at steps 0 and 3, so step 0 is exact and step 1 is an approximation
    torch.testing.assert_close(third[0].tokens, exact[0].tokens, atol=1e-5, rtol=0)
    assert not torch.allclose(third[1].tokens, exact[1].tokens, atol=1e-6)


@pytest.mark.parametrize("order", ["together", "video_first", "text_first"])
@pytest.mark.parametrize("kind", ["embedding", "mixture"])
def test_a_branch_without_an_edit_repeats_its_run(order, kind):
    flow, network = mixture() if kind == "mixture" else (EmbeddingFlowScheduler(), tiny_transformer())
    path = make_path("joint", video_taus(SCHEDULERS["euler"](), 4), text_taus(flow, 4), order)
    guidance = Guidance(video=2.0, caption=1.5)
    run = list(tiny_walk(path, network, flow, guidance=guidance))
    left = run[2]
    generator_state = left.generator_state
    generator = torch.Generator().manual_seed(0)
    generator.set_state(generator_state)
    branch = list(
        walk(
            network,
            path,
            latents=left.latents,
            tokens=left.tokens,
            prompt_embeds=(prompts := torch.randn(2, 1, 5, 16, generator=torch.Generator().manual_seed(9)))[0],
            negative_prompt_embeds=prompts[1],
            video_scheduler=SCHEDULERS["euler"](),
            token_scheduler=flow,
            guidance=guidance,
            generator=generator,
            start=3,
        )
    )
    assert [step.index for step in branch] == [step.index for step in run[3:]]
    assert torch.equal(branch[-1].latents, run[-1].latents) and torch.equal(branch[-1].tokens, run[-1].tokens)


def test_an_edited_caption_changes_the_clip():
    path = joint_path("euler", 4)
    network = tiny_transformer()
    left = list(tiny_walk(path, network))[1]
    ids = torch.randint(0, VOCAB, (1, LENGTH), generator=torch.Generator().manual_seed(4))
    edited = EmbeddingFlowScheduler().clean(ids, network.token_table().detach())
    pinned = [(tau_video, 1.0) for tau_video, _ in path]
    *_, changed = tiny_walk(pinned, network, latents=left.latents, tokens=edited, start=2)
    *_, same = tiny_walk(path, network, latents=left.latents, tokens=left.tokens, start=2)
    assert torch.equal(changed.state_token_ids, ids)
    assert not torch.allclose(changed.latents, same.latents)


def count_calls(network):
    calls = []
    network.register_forward_pre_hook(lambda module, args: calls.append(1))
    return calls


@pytest.mark.parametrize("places, pair", [(sampler.SMALL_LATENTS, 1), (0, 2)])
@pytest.mark.parametrize("guidance, others", [(Guidance(), 0), (Guidance(video=3), 0), (Guidance(3, 2), 1)])
def test_guidance_costs_what_it_does(monkeypatch, guidance, others, places, pair):
    monkeypatch.setattr(sampler, "SMALL_LATENTS", places)
    network = tiny_transformer()
    calls = count_calls(network)
    steps = list(tiny_walk(joint_path("euler", 3), network, guidance=guidance))
    assert len(calls) == 3 * (others + (1 if guidance == Guidance() else pair))
    plain = list(tiny_walk(joint_path("euler", 3)))
    assert torch.equal(plain[-1].latents, steps[-1].latents) == (guidance == Guidance())


@pytest.mark.parametrize("task", ["joint", "generate"])
def test_guidance_pushes_away_from_a_clip_without_any_words(monkeypatch, task):
    monkeypatch.setattr(sampler, "SMALL_LATENTS", 0)  # each branch a pass of its own
    network, seen = tiny_transformer(), []
    network.register_forward_pre_hook(
        lambda _, args, given: seen.append((given["token_timestep"].item(), given["token_hidden_states"])),
        with_kwargs=True,
    )
    path = make_path(task, video_taus(SCHEDULERS["euler"](), 3), text_taus(EmbeddingFlowScheduler(), 3))
    list(tiny_walk(path, network, guidance=Guidance(video=3)))
    others = seen[1::2]
    assert len(others) == 3 and all(time == 1000 for time, _ in others)
    assert all(torch.equal(tokens, others[0][1]) for _, tokens in others)
    assert [time for time, _ in seen[::2]] == pytest.approx([1000 * (1 - tau_text) for _, tau_text in path[:-1]])


def test_fitted_guidance_forgets_the_length_of_what_it_pushes_away_from():
    """Where the other prediction points the same way as the prompted one, there is nothing to push away from."""

    class TwiceAsFar(ModelMixin, CacheMixin):
        def forward(self, hidden_states, encoder_hidden_states, **_):
            return direction * (1 + encoder_hidden_states.mean((1, 2)).view(-1, 1, 1, 1, 1)), None

    direction, latents = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0)).unbind()
    taken = {}
    for guidance in (Guidance(), Guidance(video=3), Guidance(video=3, fitted=True)):
        steps = walk(
            TwiceAsFar(),
            make_path("generate", video_taus(SCHEDULERS["euler"](), 2), []),
            latents=latents,
            tokens=None,
            prompt_embeds=torch.zeros(1, 3, 4),
            negative_prompt_embeds=torch.ones(1, 3, 4),
            video_scheduler=SCHEDULERS["euler"](),
            guidance=guidance,
        )
        taken[guidance] = [step.latents for step in steps][-1]
    plain, pushed, fitted = taken.values()
    torch.testing.assert_close(fitted, plain)
    assert not torch.allclose(pushed, plain, atol=0.1)


@pytest.mark.parametrize("task", ["joint", "generate"])
def test_both_branches_of_guidance_in_one_pass_are_the_two_passes(monkeypatch, task):
    network = tiny_transformer()
    path = make_path(task, video_taus(SCHEDULERS["euler"](), 3), text_taus(EmbeddingFlowScheduler(), 3))
    once = list(tiny_walk(path, network, guidance=Guidance(video=3)))
    monkeypatch.setattr(sampler, "SMALL_LATENTS", 0)
    twice = list(tiny_walk(path, network, guidance=Guidance(video=3)))
    for one, other in zip(once, twice, strict=True):
        torch.testing.assert_close(one.latents, other.latents, atol=1e-4, rtol=0)
        torch.testing.assert_close(one.tokens, other.tokens, atol=1e-4, rtol=0)


def test_a_consumer_that_stops_reading_stops_everything():
    network = tiny_transformer()
    calls, threads = count_calls(network), threading.active_count()
    steps = tiny_walk(joint_path("euler", 50), network)
    next(steps)
    next(steps)
    steps.close()
    assert len(calls) == 2 and threading.active_count() == threads
    assert torch.is_grad_enabled()


def test_states_sent_back_are_what_the_walk_goes_on_from():
    steps = tiny_walk(joint_path("euler", 2))
    first = next(steps)
    last = steps.send({"latents": torch.zeros_like(first.latents)})
    *_, untouched = tiny_walk(joint_path("euler", 2))
    assert not torch.allclose(last.latents, untouched.latents)
