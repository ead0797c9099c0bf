"""Equation 11: who gets which loss at which times, and why the paper's own form of it collapses."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from test_chunked_loss import LargestTensor

from training.objective import FlowObjective, ObjectiveConfig
from univigu import EmbeddingFlowScheduler, MixtureFlowScheduler, UniViGUTransformer3DModel

WORDS, LENGTH = 20, 6


def network(seed: int = 0, **config) -> UniViGUTransformer3DModel:
    torch.manual_seed(seed)
    model = UniViGUTransformer3DModel(
        **{
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 8,
            "freq_dim": 16,
            "ffn_dim": 32,
            "num_layers": 2,
            "rope_max_seq_len": 32,
            "vocab_size": WORDS,
            "token_dim": 8,
            **config,
        }
    )
    if model.config.vocab_size:
        torch.nn.init.normal_(model.token_proj_out.weight, std=0.2)
    return model


def batch(size: int = 8, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "latents": torch.randn(size, 4, 2, 4, 4, generator=generator),
        "caption_ids": torch.randint(0, WORDS, (size, LENGTH), generator=generator),
        "prompt_ids": torch.randint(0, WORDS, (size, LENGTH), generator=generator),
        "prompt_embeds": torch.randn(size, 5, 8, generator=generator),
        "position": torch.arange(size),
    }


def objective(model=None, target="caption_ids", flow=None, **settings) -> FlowObjective:
    flow = flow or EmbeddingFlowScheduler(shift=1.4)
    return FlowObjective(model or network(), ObjectiveConfig(**settings), target, 2.0, flow, None, torch.zeros(5, 8))


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


UNDERSTAND = {"understand_share": 1.0, "generate_share": 0.0}
GENERATE = {"understand_share": 0.0, "generate_share": 1.0}


def test_losses_are_weighted_and_repeatable():
    loss, figures = objective(lambda_video=2.0, lambda_text=3.0)(batch(), draw())
    assert loss.item() == pytest.approx(float(2 * figures["video"] + 3 * figures["text"]), rel=1e-5)
    again, _ = objective(lambda_video=2.0, lambda_text=3.0)(batch(), draw())
    other, _ = objective(lambda_video=2.0, lambda_text=3.0)(batch(), draw(1))
    assert again.item() == loss.item() != other.item()


def test_every_group_of_the_mixture_takes_its_share_of_a_batch():
    loss = objective(understand_share=0.4, generate_share=0.3)
    counts = [loss._shares(batch(8), draw(seed)) for seed in range(200)]
    understood, generated = (sum(part) / len(counts) / 8 for part in zip(*counts, strict=True))
    assert understood == pytest.approx(0.4, abs=0.03) and generated == pytest.approx(0.3, abs=0.03)
    assert {count[0] for count in counts} == {3, 4}


def test_a_batch_of_one_is_one_task_whatever_the_process_draws():
    loss, tasks = objective(understand_share=0.4, generate_share=0.3), Counter()
    for position in range(400):
        one = {**batch(1), "position": torch.tensor([position])}
        task = loss._shares(one, draw(position))
        assert task == loss._shares(one, draw(position + 1))
        tasks[task] += 1
    assert tasks[(1, 0)] == pytest.approx(160, abs=3) and tasks[(0, 1)] == pytest.approx(120, abs=3)


def gradients(loss: FlowObjective, data: dict | None = None) -> dict[str, float]:
    total, _ = loss(data or batch(), draw())
    total.backward()
    return {
        name: 0.0 if p.grad is None else float(p.grad.abs().sum()) for name, p in loss.transformer.named_parameters()
    }


@pytest.mark.parametrize("captions", [1, 3])
def test_understanding_teaches_the_caption_through_the_video_and_never_its_velocity(captions):
    found = gradients(objective(captions_per_clip=captions, **UNDERSTAND))
    assert found["proj_out.weight"] == 0 and found["token_proj_out.weight"] > 0
    assert found["patch_embedding.weight"] > 0 and found["blocks.0.ffn.net.2.weight"] > 0


def test_the_video_does_not_see_the_caption_while_it_is_understood():
    # one token's embedding reaches the loss through the tokens alone: the first block's video expert must not feel it
    model = network(num_layers=1)
    found = gradients(objective(model, **UNDERSTAND))
    assert found["blocks.0.ffn.net.2.weight"] == 0  # after the only attention: a video that nobody looks at any more
    assert found["blocks.0.token_ffn.net.2.weight"] > 0


def test_generation_teaches_the_video_and_never_the_caption():
    found = gradients(objective(**GENERATE))
    assert found["token_proj_out.weight"] == 0 and found["proj_out.weight"] > 0
    assert found["token_embedding.table.weight"] > 0  # the clip is made from these words


def test_without_a_target_it_is_a_video_generator():
    model = network(vocab_size=None)
    loss, figures = objective(model, target=None)(batch(), draw())
    assert set(figures) == {"video"} and float(loss) == float(figures["video"])
    grid = objective(model, target=None).losses_on_grid(batch(), 0)
    assert all(name.startswith("video_at_") and name.endswith("_1") for name in grid)


def test_channels_count_what_they_are_given():
    model, data = network(), batch()
    for extra in ({"model": network(vocab_size=None), "target": None}, {"model": model, **GENERATE}):
        alike = objective(**extra)(data, draw())[1]["video"]
        assert objective(**extra, channel_weights=[2.0] * 4)(data, draw())[1]["video"] == alike
        alone = [
            objective(**extra, channel_weights=[float(i == channel) for i in range(4)])(data, draw())[1]["video"]
            for channel in range(4)
        ]
        assert torch.allclose(sum(alone) / 4, alike, rtol=1e-5) and max(alone) > 1.05 * min(alone)
    for wrong in ([1.0] * 3, [0.0] * 4, [-1.0, 1.0, 1.0, 1.0]):
        with pytest.raises(ValueError, match="channel_weights needs 4 numbers from 0 up"):
            objective(channel_weights=wrong)


def test_dropping_the_prompt_takes_it_from_every_part():
    def felt(**settings) -> float:
        data = batch()
        data["prompt_embeds"].requires_grad_(True)
        objective(**settings)(data, draw())[0].backward()
        return float(data["prompt_embeds"].grad.abs().sum())

    assert felt(prompt_dropout=0.0, prompt_dropout_understand=0.0) > 0
    assert felt(prompt_dropout=1.0, prompt_dropout_understand=1.0) == 0
    assert felt(prompt_dropout=0.0, prompt_dropout_understand=1.0, **UNDERSTAND) == 0


def test_generation_without_its_prompt_has_no_caption_either():
    def loss(ids: int, dropout: float, as_prompt: float = 0.0, changed: str = "caption_ids") -> float:
        data = batch()
        data[changed] = torch.full_like(data[changed], ids)
        settings = {"prompt_dropout": dropout, "prompt_as_tokens": as_prompt, **GENERATE}
        return float(objective(**settings)(data, draw())[0])

    assert loss(1, dropout=1.0) == loss(2, dropout=1.0)
    assert loss(1, dropout=0.0) != loss(2, dropout=0.0)
    # half the time, or here always, the clean tokens are the prompt itself
    assert loss(1, 0.0, as_prompt=1.0) == loss(2, 0.0, as_prompt=1.0)
    assert loss(1, 0.0, as_prompt=1.0, changed="prompt_ids") != loss(2, 0.0, as_prompt=1.0, changed="prompt_ids")


def test_independent_times_are_the_papers_and_all_there_is():
    _, figures = objective(times="independent")(batch(), draw())
    assert {"video_joint", "text_joint"} <= set(figures)
    assert not {"text_understand", "video_generate"} & set(figures)


def test_the_released_flow_trains_too():
    model = network(token_state="ids", normalize_token_embedding=False)
    flow = MixtureFlowScheduler(vocab_size=WORDS)
    loss, figures = objective(model, flow=flow)(batch(), draw())
    loss.backward()
    assert torch.isfinite(loss) and "embedding_std" not in figures
    with pytest.raises(ValueError, match="needs the embedding flow"):
        objective(model, flow=flow, text_loss="velocity")


@pytest.mark.parametrize("kind", ["embedding", "vectors", "mixture"])
def test_a_caption_loss_in_pieces_is_the_caption_loss(kind):
    config, flow, settings = {
        "embedding": ({}, None, {}),
        "vectors": ({"token_head": "embedding"}, EmbeddingFlowScheduler("clean"), {"text_loss": "both"}),
        "mixture": ({"token_state": "ids"}, MixtureFlowScheduler(vocab_size=WORDS), {}),
    }[kind]
    found = []
    for logits_at_once in (1 << 24, 5 * WORDS):  # of 8 captions of 6 positions all, or 5 positions
        loss = objective(network(**config), flow=flow, **settings)
        loss.logits_at_once = logits_at_once
        total, _ = loss(batch(), draw())
        total.backward()
        found.append((total, [p.grad for p in loss.parameters()], loss.losses_on_grid(batch(), 0)))
    (whole, gradients, grid), (pieces, same_gradients, same_grid) = found
    torch.testing.assert_close(pieces, whole)
    torch.testing.assert_close(same_gradients, gradients)
    assert same_grid == pytest.approx(grid, rel=1e-5)


@pytest.mark.parametrize("state", ["embedding", "ids"])
def test_a_vocabulary_of_umt5s_size_never_has_its_logits_whole(state):
    words = 256_384
    flow = MixtureFlowScheduler(words) if state == "ids" else None
    loss = objective(network(vocab_size=words, token_state=state, num_layers=1), flow=flow, **UNDERSTAND)
    with LargestTensor() as largest:
        loss(batch(12), draw())[0].backward()
    assert words * 24 < largest.elements <= loss.logits_at_once < 12 * LENGTH * words
    with LargestTensor() as largest, torch.no_grad():
        loss.losses_on_grid(batch(12), 0)
    assert largest.elements <= loss.logits_at_once


def test_losses_on_the_grid_are_fixed():
    loss = objective()
    grid = loss.losses_on_grid(batch(), seed=3)
    assert grid == loss.losses_on_grid(batch(), seed=3) != loss.losses_on_grid(batch(), seed=4)
    assert {"video_at_0.1_1", "text_at_1_0.9", "video_at_0.5_0.5", "text_at_0.5_0.5"} <= set(grid)


def test_shares_must_be_shares():
    with pytest.raises(ValueError, match="together more than 1"):
        objective(understand_share=0.7, generate_share=0.4)
    with pytest.raises(ValueError, match="prompt_dropout is a share"):
        objective(prompt_dropout=1.5)


def learn(
    model: UniViGUTransformer3DModel, flow: EmbeddingFlowScheduler, **settings
) -> tuple[list[float], list[float]]:
    """The caption loss and the spread of E over a short training on one batch."""
    loss = objective(model, flow=flow, times="independent", lambda_video=0.0, **settings)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses, spreads = [], []
    for step in range(60):
        total, figures = loss(batch(16), draw(step))
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
        losses.append(float(figures["text"]))
        spreads.append(float(figures["embedding_std"]))
    return losses, spreads


def test_the_literal_loss_falls_by_shrinking_the_words_and_ours_does_not():
    literal = network(token_head="embedding", normalize_token_embedding=False)
    losses, spreads = learn(literal, EmbeddingFlowScheduler("velocity", shift=1.0), text_loss="velocity")
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])  # it looks like learning
    assert spreads[-1] < 0.75 * spreads[0]  # and is the words going to zero
    losses, spreads = learn(network(), EmbeddingFlowScheduler(shift=1.4))
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    assert spreads[-1] == pytest.approx(1.0, abs=0.1)
