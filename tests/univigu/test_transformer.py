"""The network against its originals: diffusers' Wan, the released weights' fixture, and its own promises."""

from __future__ import annotations

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from diffusers import FirstBlockCacheConfig, MagCacheConfig
from diffusers.hooks import apply_context_parallel
from diffusers.models._modeling_parallel import ContextParallelConfig, ParallelConfig
from peft import LoraConfig
from tiny import tiny_transformer, tiny_wan

from univigu import UniViGUTransformer3DModel
from univigu.transformer import PRESETS, VideoCache, linear_velocity


def inputs(batch_size=2, frames=3, size=8, tokens=6, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch_size, 4, frames, size, size, generator=generator).to(dtype),
        "timestep": torch.rand(batch_size, generator=generator) * 1000,
        "encoder_hidden_states": torch.randn(batch_size, 7, 16, generator=generator).to(dtype),
        "token_hidden_states": torch.randn(batch_size, tokens, 8, generator=generator),
        "token_timestep": torch.rand(batch_size, generator=generator) * 1000,
    }


VIDEO_ONLY = ("hidden_states", "timestep", "encoder_hidden_states")


@pytest.mark.parametrize("heads, head_dim, layers", [(2, 12, 2), (4, 16, 1), (1, 24, 3)])
@pytest.mark.parametrize("batch_size, frames, size, time", [(1, 1, 4, 1000.0), (2, 3, 8, 500.5), (3, 5, 6, 1.0)])
@torch.no_grad()
def test_without_tokens_it_is_wan(heads, head_dim, layers, batch_size, frames, size, time):
    wan = tiny_wan(num_attention_heads=heads, attention_head_dim=head_dim, num_layers=layers)
    model = UniViGUTransformer3DModel.from_wan(wan, vocab_size=11)
    given = {name: value for name, value in inputs(batch_size, frames, size).items() if name in VIDEO_ONLY}
    given["timestep"] = torch.full((batch_size,), time)
    expected = wan(**given, return_dict=False)[0]
    torch.testing.assert_close(model(**given).sample, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_every_pretrained_weight_is_kept_and_the_token_expert_starts_as_told():
    wan = tiny_wan()
    copied = UniViGUTransformer3DModel.from_wan(wan, vocab_size=11, token_expert_init="copy")
    fresh = UniViGUTransformer3DModel.from_wan(wan, vocab_size=11, token_expert_init="fresh")
    for model in (copied, fresh):
        state = model.state_dict()
        assert all(torch.equal(state[name], weight) for name, weight in wan.state_dict().items())
    for block in copied.blocks:
        assert torch.equal(block.token_ffn.net[2].weight, block.ffn.net[2].weight)
    for block in fresh.blocks:
        assert not torch.equal(block.token_ffn.net[2].weight, block.ffn.net[2].weight)


def test_an_image_conditioned_wan_is_refused():
    with pytest.raises(ValueError, match="text-to-video"):
        UniViGUTransformer3DModel.from_wan(tiny_wan(image_dim=8, added_kv_proj_dim=24), vocab_size=11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_shapes_and_dtypes_with_tokens(dtype):
    wan = tiny_wan().to(dtype)
    model = UniViGUTransformer3DModel.from_wan(wan, vocab_size=11, token_dim=8)
    for head, width in (("logits", 11), ("embedding", 8)):
        model = UniViGUTransformer3DModel.from_wan(wan, vocab_size=11, token_dim=8, token_head=head)
        output = model(**inputs(dtype=dtype))
        assert output.sample.shape == (2, 4, 3, 8, 8) and output.sample.dtype == dtype
        assert output.token_sample.shape == (2, 6, width) and output.token_sample.dtype == dtype


@torch.no_grad()
def test_ids_and_their_rows_of_e_are_the_same_tokens():
    model = tiny_transformer()
    given = inputs()
    ids = torch.randint(0, model.config.vocab_size, (2, 6), generator=torch.Generator().manual_seed(1))
    by_id = model(**{**given, "token_hidden_states": ids})
    by_row = model(**{**given, "token_hidden_states": model.token_table()[ids]})
    torch.testing.assert_close(by_id.sample, by_row.sample)
    torch.testing.assert_close(by_id.token_sample, by_row.token_sample)
    torch.testing.assert_close(model.token_table().norm(dim=-1), torch.full((model.config.vocab_size,), 8**0.5))


@pytest.mark.parametrize("noise_share", [0.05, 0.4, 1.0])
def test_the_linear_velocity_is_the_best_line_for_independent_numbers(noise_share):
    generator = torch.Generator().manual_seed(0)
    clean, noise = 0.5 * torch.randn(200_000, generator=generator), torch.randn(200_000, generator=generator)
    noisy, velocity = torch.lerp(clean, noise, noise_share), noise - clean
    best = (noisy * velocity).mean() / noisy.square().mean()
    ours = linear_velocity(noisy[None], torch.tensor([1000 * noise_share]), 0.5)[0]
    torch.testing.assert_close(ours, best * noisy, atol=0.05, rtol=0.01)


@torch.no_grad()
def test_a_skip_adds_the_linear_velocity_and_changes_nothing_else():
    plain, given = tiny_transformer(), inputs()
    model = UniViGUTransformer3DModel.from_config(plain.config, video_skip=0.5)
    model.load_state_dict(plain.state_dict())
    video, tokens = model(**given, return_dict=False)
    video_before, tokens_before = plain(**given, return_dict=False)
    added = linear_velocity(given["hidden_states"], given["timestep"], 0.5)
    torch.testing.assert_close(video, video_before + added)
    assert torch.equal(tokens, tokens_before)


@torch.no_grad()
def test_places_start_at_nothing_and_then_tell_patches_of_noise_apart():
    plain, given = tiny_transformer(), inputs()
    model = UniViGUTransformer3DModel.from_config(plain.config, video_places=(3, 4, 4), token_places=6)
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and all(".places." in name for name in missing)
    for ours, before in zip(model(**given, return_dict=False), plain(**given, return_dict=False), strict=True):
        assert torch.equal(ours, before)

    # what is the same everywhere gets nearly the same answer everywhere, whatever a patch's or a word's place
    given["hidden_states"], given["token_hidden_states"] = torch.ones(2, 4, 3, 8, 8), torch.ones(2, 6, 8)
    for places in (model.patch_embedding.places, model.token_embedding.places):
        torch.nn.init.normal_(places.weight)
    spreads = []
    for network in (plain, model):
        video, words = network(**given, return_dict=False)
        spreads.append((video[0, 0, :, ::2, ::2].std(), words[0, :, 0].std()))
    assert spreads[0][0] < 0.05 < 0.2 < spreads[1][0] and spreads[0][1] < spreads[1][1] / 5

    larger = model(**inputs(frames=5, size=16, tokens=3))  # clips of other sizes lie on the same grid, stretched
    assert larger.sample.shape == (2, 4, 5, 16, 16)
    with pytest.raises(ValueError, match="places for 6 tokens, not 7"):
        model(**inputs(tokens=7))


def test_a_masked_video_does_not_depend_on_the_tokens():
    model, given = tiny_transformer(), inputs()
    given["token_hidden_states"].requires_grad_()
    model(**given, video_sees_tokens=False).sample.square().sum().backward()
    assert torch.equal(given["token_hidden_states"].grad, torch.zeros(2, 6, 8))
    given["token_hidden_states"].grad = None
    model(**given).sample.square().sum().backward()
    assert given["token_hidden_states"].grad.abs().max() > 0


@torch.no_grad()
def test_the_mask_chosen_sample_by_sample_is_the_mask():
    model, given = tiny_transformer(), inputs()
    mixed = model(**given, video_sees_tokens=torch.tensor([True, False]))
    for index, sees in enumerate([True, False]):
        alone = model(**given, video_sees_tokens=sees)
        torch.testing.assert_close(mixed.sample[index], alone.sample[index], atol=1e-5, rtol=0)
        torch.testing.assert_close(mixed.token_sample[index], alone.token_sample[index], atol=1e-5, rtol=0)


@torch.no_grad()
def test_cached_video_gives_the_same_caption_step():
    model, given, cache = tiny_transformer(), inputs(), VideoCache()
    first = model(**given, video_sees_tokens=False, video_cache=cache)
    assert cache.is_filled and first.sample is not None
    for seed in (1, 2):
        later = {**given, **{name: inputs(seed=seed)[name] for name in ("token_hidden_states", "token_timestep")}}
        cached = model(**later, video_sees_tokens=False, video_cache=cache)
        full = model(**later, video_sees_tokens=False)
        assert cached.sample is None
        torch.testing.assert_close(cached.token_sample, full.token_sample, atol=1e-5, rtol=0)


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        model = tiny_transformer()
        if checkpointing:
            model.enable_gradient_checkpointing()
        output = model(**inputs())
        (output.sample.square().mean() + output.token_sample.square().mean()).backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters()})
    for name, gradient in gradients[0].items():
        if name == "token_embedding.table.weight":  # vectors were given, so no row was looked up
            assert gradient is None
            continue
        torch.testing.assert_close(gradients[1][name], gradient)


@torch.no_grad()
def test_lora_attaches_saves_and_loads(tmp_path):
    model, given = tiny_transformer(), inputs()
    before = model(**given)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    adapted = model(**given)
    assert not torch.allclose(adapted.sample, before.sample)
    model.save_lora_adapter(tmp_path)
    other = tiny_transformer()
    other.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    torch.testing.assert_close(other(**given).sample, adapted.sample)
    torch.testing.assert_close(other(**given).token_sample, adapted.token_sample)


@torch.no_grad()
def test_bfloat16_loading_keeps_the_float32_modules(tmp_path):
    tiny_transformer().save_pretrained(tmp_path)
    model = UniViGUTransformer3DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    kept = {name for name, weight in model.named_parameters() if weight.dtype == torch.float32}
    assert {"scale_shift_table", "token_scale_shift_table", "blocks.0.norm2.weight"} <= kept
    assert any("token_time_embedding.time_embedder" in name for name in kept)
    assert model.blocks[0].token_ffn.net[2].weight.dtype == torch.bfloat16
    assert model.token_rope.frequencies.dtype == torch.float32
    assert model(**inputs(dtype=torch.bfloat16)).sample.isfinite().all()


@pytest.mark.parametrize(
    "config",
    [
        FirstBlockCacheConfig(threshold=1e9),
        MagCacheConfig(num_inference_steps=3, retention_ratio=0.3, mag_ratios=[1.0, 1.0, 1.0], threshold=1e9),
    ],
    ids=["first_block", "mag"],
)
@torch.no_grad()
def test_step_caches_leave_both_streams_right(config):
    """With unchanged inputs a skipped step must reproduce the computed one, in both modalities."""
    model, given = tiny_transformer(), inputs()
    expected = model(**given)
    model.enable_cache(config)
    for step in range(3):
        with model.cache_context("cond", step_index=step, num_inference_steps=3, sigma=0.5):
            output = model(**given)
        torch.testing.assert_close(output.sample, expected.sample, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(output.token_sample, expected.token_sample, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_blocks_trace_whole():
    model, given = tiny_transformer(), inputs()
    expected = model(**given)
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    traced = model(**given)
    torch.testing.assert_close(traced.sample, expected.sample, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(traced.token_sample, expected.token_sample, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_recorded_attention_is_a_share_of_the_video():
    model, given = tiny_transformer(), inputs()
    with model.record_token_attention() as record:
        model(**given)
    assert len(record) == 2 and record[0].shape == (2, 6, 3 * 4 * 4)
    share = record[0].sum(-1)
    assert (share > 0).all() and (share < 1).all()  # the rest goes to the other tokens
    model(**given)
    assert len(record) == 2


@pytest.mark.parametrize("name, layers, width, ffn", [("wan2.1-1.3b", 30, 1536, 8960), ("wan2.1-14b", 40, 5120, 13824)])
def test_presets_build_on_the_meta_device(name, layers, width, ffn):
    with torch.device("meta"):
        model = UniViGUTransformer3DModel(**PRESETS[name])
    assert len(model.blocks) == layers and model.proj_out.in_features == width
    count = sum(weight.numel() for weight in model.blocks[0].token_ffn.parameters())
    assert count == 2 * width * ffn + width + ffn


def context_parallel_rank(rank: int, port: int, results) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    model = tiny_transformer()
    config = ContextParallelConfig(ulysses_degree=2)
    mesh = dist.init_device_mesh("cpu", (1, 2), mesh_dim_names=("ring", "ulysses"))
    parallel = ParallelConfig(context_parallel_config=config)
    parallel.setup(rank, 2, torch.device("cpu"), mesh=mesh)
    for block in model.blocks:
        block.attn1.processor._parallel_config = parallel
    apply_context_parallel(model, config, model._cp_plan)
    with torch.no_grad():
        output = model(**inputs())
    if rank == 0:
        results.put((output.sample.numpy(), output.token_sample.numpy()))
    dist.destroy_process_group()


@torch.no_grad()
def test_two_processes_share_one_context():
    expected = tiny_transformer()(**inputs())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = mp.get_context("spawn").SimpleQueue()
    mp.spawn(context_parallel_rank, args=(port, results), nprocs=2)
    sample, token_sample = results.get()
    torch.testing.assert_close(torch.from_numpy(sample), expected.sample, atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.from_numpy(token_sample), expected.token_sample, atol=1e-5, rtol=0)
