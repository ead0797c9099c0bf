"""Both caption flows: their ends, their middle, and that a step goes where it should."""

from __future__ import annotations

import pytest
import torch

from univigu import EmbeddingFlowScheduler, MixtureFlowScheduler
from univigu.token_flow import caption_shift, shift_tau

VOCAB, DIM = 50, 64


@pytest.fixture
def table():
    rows = torch.randn(VOCAB, DIM, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.normalize(rows, dim=-1) * DIM**0.5


def token_ids(batch_size=4, length=200):
    return torch.randint(0, VOCAB, (batch_size, length), generator=torch.Generator().manual_seed(1))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def flows():
    return [EmbeddingFlowScheduler(shift=3.0), MixtureFlowScheduler(VOCAB, shift=3.0)]


def sure_logits(ids):
    return torch.nn.functional.one_hot(ids, VOCAB).float() * 100


@pytest.mark.parametrize("flow", flows(), ids=lambda flow: type(flow).__name__)
def test_the_ends_are_noise_and_the_words_themselves(flow, table):
    ids = token_ids()
    assert torch.equal(flow.decode(flow.clean(ids, table), table), ids)
    assert torch.equal(flow.decode(flow.add_noise(ids, 1.0, table, generator()), table), ids)
    noise = flow.decode(flow.add_noise(ids, 0.0, table, generator()), table)
    assert (noise == ids).float().mean() < 3 / VOCAB


@pytest.mark.parametrize("flow", flows(), ids=lambda flow: type(flow).__name__)
def test_a_sure_network_reaches_its_words(flow, table):
    ids, draw = token_ids(), generator()
    flow.set_timesteps(7)
    state = flow.noise(*ids.shape, table, draw)
    right = []
    for tau, tau_next in zip(flow.taus[:-1].tolist(), flow.taus[1:].tolist(), strict=True):
        moved = flow.step(sure_logits(ids), tau, tau_next, state, table, draw)
        assert torch.equal(moved.token_ids, ids) and moved.confidence.min() > 0.99
        state = moved.prev_sample
        right.append((flow.decode(state, table) == ids).float().mean().item())
    assert right == sorted(right) and right[0] < 1 and right[-1] == 1


def test_noise_is_added_on_the_straight_line(table):
    """Equation 7."""
    flow, ids = EmbeddingFlowScheduler(), token_ids()
    noise = flow.noise(*ids.shape, table, generator())
    tau = torch.tensor([0.0, 0.25, 0.5, 1.0])
    state = flow.add_noise(ids, tau, table, generator())
    expected = (1 - tau)[:, None, None] * noise + tau[:, None, None] * table[ids]
    torch.testing.assert_close(state, expected)


def test_stochastic_sampling_forgets_the_noise_it_came_with(table):
    """The next state is equation 7 around the clean guess, whatever noise the state had."""
    ids, flow = token_ids(), EmbeddingFlowScheduler(stochastic_sampling=True)
    states = [flow.add_noise(ids, 0.3, table, generator(seed)) for seed in (1, 2)]
    moved = [flow.step(sure_logits(ids), 0.3, 0.5, state, table, generator(9)).prev_sample for state in states]
    torch.testing.assert_close(*moved)
    torch.testing.assert_close(moved[0], flow.add_noise(ids, 0.5, table, generator(9)))
    last = flow.step(sure_logits(ids), 0.5, 1.0, moved[0], table, generator(9)).prev_sample
    torch.testing.assert_close(last, flow.clean(ids, table))


def test_three_predictions_are_one_flow(table):
    """Logits, the clean embedding and the velocity that follows from it take the same step (equation 16)."""
    ids, tau = token_ids(), 0.3
    logits = torch.randn(*ids.shape, VOCAB, generator=generator(5))
    state = EmbeddingFlowScheduler().add_noise(ids, tau, table, generator())
    clean = logits.softmax(-1) @ table
    velocity = (clean - state) / (1 - tau)
    stepped = {}
    for kind, output in (("logits", logits), ("clean", clean), ("velocity", velocity)):
        flow = EmbeddingFlowScheduler(prediction_type=kind)
        stepped[kind] = flow.step(output, tau, 0.5, state, table).prev_sample
        torch.testing.assert_close(flow.predict_clean(output, tau, state, table), clean, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(stepped["clean"], stepped["logits"])
    torch.testing.assert_close(stepped["velocity"], stepped["logits"], atol=1e-4, rtol=1e-4)


def test_the_shift_puts_the_decision_in_the_middle():
    assert caption_shift(1536, 3.0) == pytest.approx(16.0)
    taus = EmbeddingFlowScheduler(shift=16.0)
    taus.set_timesteps(2)
    # half of the steps are spent before tau = 1/17, where a token of 3 nats is decided
    assert taus.taus.tolist() == pytest.approx([0, 1 / 17, 1])
    assert shift_tau(0.3, 1.0) == pytest.approx(0.3)


def test_a_mixture_state_is_its_word_with_probability_tau(table):
    flow, ids = MixtureFlowScheduler(VOCAB), token_ids(8, 2000)
    for tau in (0.2, 0.7):
        right = (flow.add_noise(ids, tau, table, generator()) == ids).float().mean().item()
        assert right == pytest.approx(tau + (1 - tau) / VOCAB, abs=0.02)


def test_euler_jumps_follow_the_tokens_own_time(table):
    """Walking with the truth keeps the state distributed as the path says, whatever the steps."""
    flow, ids, draw = MixtureFlowScheduler(VOCAB), token_ids(8, 2000), generator()
    state = flow.noise(*ids.shape, table, draw)
    for tau, tau_next in ((0.0, 0.1), (0.1, 0.6), (0.6, 0.75)):
        state = flow.step(sure_logits(ids), tau, tau_next, state, table, draw).prev_sample
        right = (state == ids).float().mean().item()
        assert right == pytest.approx(tau_next + (1 - tau_next) / VOCAB, abs=0.02)


def test_drawn_words_follow_their_probabilities_and_temperature(table):
    probabilities = torch.tensor([0.5, 0.3, 0.2] + [0.0] * (VOCAB - 3))
    logits = probabilities.log().expand(1, 20000, VOCAB)
    state = torch.full((1, 20000), 7)
    for temperature, expected in ((1.0, 0.5), (0.5, 0.25 / 0.38), (0.0, 1.0)):
        flow = MixtureFlowScheduler(VOCAB, temperature=temperature)
        moved = flow.step(logits, 0.0, 0.999999, state, table, generator()).prev_sample
        assert (moved == 0).float().mean().item() == pytest.approx(expected, abs=0.02)


def test_a_masked_source_never_takes_a_word_back(table):
    flow, ids, draw = MixtureFlowScheduler(VOCAB, source="mask", mask_token_id=0), token_ids(), generator()
    state = flow.noise(*ids.shape, table, draw)
    assert (state == 0).all()
    once = flow.step(sure_logits(ids), 0.0, 0.5, state, table, draw).prev_sample
    twice = flow.step(sure_logits((ids + 1) % VOCAB), 0.5, 0.9, once, table, draw).prev_sample
    placed = once != 0
    assert placed.any() and torch.equal(twice[placed], once[placed])


def test_the_released_joint_sampler_redraws_by_progress(table):
    flow, ids, draw = MixtureFlowScheduler(VOCAB, jumps="resample"), token_ids(8, 2000), generator()
    flow.set_timesteps(5)
    shares = []
    for tau, tau_next in zip(flow.taus[:-1].tolist(), flow.taus[1:].tolist(), strict=True):
        state = torch.full_like(ids, -1)
        shares.append(
            (flow.step(sure_logits(ids), tau, tau_next, state, table, draw).prev_sample == ids).float().mean()
        )
    assert torch.tensor(shares).tolist() == pytest.approx([0, 0.25, 0.5, 0.75, 1.0], abs=0.02)


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda: EmbeddingFlowScheduler(prediction_type="noise"), "prediction_type is"),
        (lambda: EmbeddingFlowScheduler(shift=0), "shift must be"),
        (lambda: MixtureFlowScheduler(9, source="normal"), "source is"),
        (lambda: MixtureFlowScheduler(9, source="mask"), "needs mask_token_id"),
        (lambda: MixtureFlowScheduler(9, jumps="all"), "jumps is"),
        (lambda: MixtureFlowScheduler(9, temperature=float("nan")), "temperature must be"),
    ],
)
def test_a_wrong_setting_is_named(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


@pytest.mark.parametrize("flow", flows(), ids=lambda flow: type(flow).__name__)
def test_schedulers_save_and_load(flow, tmp_path):
    flow.save_pretrained(tmp_path)
    assert type(flow).from_pretrained(tmp_path).config.shift == 3.0
