"""Which weights from where: the released checkpoint, Wan folders, ours; and what is refused, in one sentence."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline
from safetensors.torch import load_file, save_file
from tiny import tiny_pipeline, tiny_tokenizer, tiny_wan
from transformers import UMT5Config, UMT5EncoderModel

from univigu import UniViGUPipeline, UniViGUTransformer3DModel
from univigu.weights import convert_released, find_model, load, load_released, load_wan, read_released

RELEASED = Path(__file__).parent.parent / "fixtures" / "released_tiny.safetensors"
SIZE = {"num_frames": 5, "height": 16, "width": 16}


def released_state() -> dict[str, torch.Tensor]:
    prefix = "state_dict."
    return {key[len(prefix) :]: value for key, value in load_file(RELEASED).items() if key.startswith(prefix)}


def save_wan(folder: Path, text_dim: int = 24, channels: int = 16, words: int = 61, **transformer_config) -> Path:
    """A Wan2.1 text-to-video folder as diffusers saves it, of the released fixture's sizes."""
    torch.manual_seed(0)
    encoder = UMT5Config(vocab_size=words, d_model=text_dim, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=channels,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.1] * channels,
        latents_std=[2.0] * channels,
        scale_factor_temporal=4,
        scale_factor_spatial=4,
    )
    WanPipeline(
        tokenizer=tiny_tokenizer(),
        text_encoder=UMT5EncoderModel(encoder),
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        transformer=tiny_wan(text_dim=text_dim, in_channels=channels, out_channels=channels, **transformer_config),
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def wan_folder(tmp_path_factory) -> Path:
    return save_wan(tmp_path_factory.mktemp("wan"))


# --------------------------------------------------------------------------------------------- the released checkpoint


@torch.no_grad()
def test_the_released_model_is_reproduced(wan_folder):
    pipe, tensors = load_released(RELEASED, wan_folder), load_file(RELEASED)
    output = pipe.transformer(
        hidden_states=tensors["input.video_latents"],
        timestep=tensors["input.timestep_video"],
        encoder_hidden_states=tensors["input.prompt_embeds"],
        token_hidden_states=tensors["input.token_ids"],
        token_timestep=tensors["input.timestep_text"],
    )
    torch.testing.assert_close(output.sample, tensors["output.video_velocity"], atol=2e-6, rtol=0)
    torch.testing.assert_close(output.token_sample, tensors["output.text_logits"], atol=2e-6, rtol=0)


def test_the_released_model_keeps_its_habits_and_runs_every_task(wan_folder):
    pipe = load_released(RELEASED, wan_folder, jumps="resample")
    config, token_scheduler = pipe.config, pipe.token_scheduler.config
    assert (config.zero_prompt_padding, config.empty_prompt, config.normalize_latents) == (False, "zeros", False)
    assert config.prompt_as_tokens and not config.blind_video
    assert (token_scheduler.source, token_scheduler.vocab_size, token_scheduler.jumps) == ("uniform", 61, "resample")
    assert load_released(RELEASED, wan_folder).token_scheduler.config.jumps == "euler"

    # raw latents: the autoencoder's mean and deviation are not applied
    frames = np.zeros((5, 16, 16, 3), np.uint8)
    raw = pipe.vae.encode(torch.full((1, 3, 5, 16, 16), -1.0)).latent_dist.mode()
    torch.testing.assert_close(pipe.encode_video(frames), raw)
    # no prompt is all zeros in understanding, and the encoder's own answer to padding stays elsewhere
    assert pipe.encode_prompt("", empty_as_zeros=True).abs().max() == 0
    assert pipe.encode_prompt("a ball")[0, -1].abs().max() > 0

    run = {"num_inference_steps": 2, "seed": 0}
    assert pipe.generate("a red ball", guidance_scale=2.0, **SIZE, **run).frames.shape == (5, 16, 16, 3)
    assert isinstance(pipe.understand(frames, **SIZE, **run).text, str)
    both = pipe.joint("a red ball", **SIZE, **run)
    assert both.frames.shape == (5, 16, 16, 3) and isinstance(both.text, str)


@pytest.mark.parametrize("form", ["model entry", "wrapped keys", "bare", "old format", "safetensors"])
def test_every_form_of_the_released_file_is_read(tmp_path, form):
    state = released_state()
    path = tmp_path / ("model.safetensors" if form == "safetensors" else "model.pth")
    if form == "safetensors":
        save_file(state, path)
    elif form == "wrapped keys":
        keys = (
            key.replace("blocks.", "_orig_mod.blocks.").replace("attn", "_fsdp_wrapped_module.attn") for key in state
        )
        torch.save({"model": dict(zip(keys, state.values(), strict=True)), "step": 3}, path)
    elif form == "old format":
        torch.save({"model": state}, path, _use_new_zipfile_serialization=False)
    else:
        torch.save(state if form == "bare" else {"model": state}, path)
    read = read_released(path)
    assert read.keys() == state.keys()
    assert all(torch.equal(read[key], value) for key, value in state.items())


def test_the_config_is_read_off_the_shapes():
    config, state = convert_released(released_state())
    expected = {"num_attention_heads": 2, "attention_head_dim": 32, "ffn_dim": 96, "token_ffn_dim": 96, "text_dim": 24}
    expected |= {"num_layers": 2, "in_channels": 16, "out_channels": 16, "vocab_size": 61, "patch_size": (1, 2, 2)}
    expected |= {"freq_dim": 256, "cross_attn_norm": True}
    assert {name: config[name] for name in expected} == expected
    UniViGUTransformer3DModel(**config).load_state_dict(state)


class RunsCode:
    def __reduce__(self):
        return os.system, ("touch it_ran",)


def test_a_checkpoint_that_wants_to_run_code_is_refused(tmp_path, monkeypatch, wan_folder):
    monkeypatch.chdir(tmp_path)
    for name, zipped in (("new.pth", True), ("old.pth", False)):
        torch.save({"model": released_state(), "extra": RunsCode()}, name, _use_new_zipfile_serialization=zipped)
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(RunsCode(), protocol=2))
    (tmp_path / "newer.pth").write_bytes(pickle.dumps(RunsCode(), protocol=4))
    for name in ("new.pth", "old.pth", "plain.pth"):
        with pytest.raises(ValueError, match=r"asks for posix.system.*convert it once with") as caught:
            load_released(name, wan_folder)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="not a checkpoint"):
        read_released("newer.pth")
    assert not Path("it_ran").exists()


def test_damaged_and_foreign_checkpoints_are_refused(tmp_path):
    whole = tmp_path / "whole.pth"
    torch.save({"model": released_state()}, whole)
    content = {
        "empty.pth": b"",
        "cut.pth": whole.read_bytes()[:5000],
        "text.pth": b"not a checkpoint at all",
        "cut.safetensors": RELEASED.read_bytes()[:5000],
        "text.safetensors": b"not a checkpoint at all",
    }
    for name, data in content.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"'{name}'.*(empty|cut short)") as caught:
            read_released(tmp_path / name)
        assert "\n" not in str(caught.value)
    torch.save({"model": {"epoch": 3}}, tmp_path / "numbers.pth")
    with pytest.raises(ValueError, match="no state dict"):
        read_released(tmp_path / "numbers.pth")
    with pytest.raises(ValueError, match="There is no checkpoint"):
        read_released(tmp_path / "missing.pth")


def without(key):
    return lambda state: state.pop(key)


def reshaped(key, *shape):
    return lambda state: state.update({key: torch.zeros(shape)})


@pytest.mark.parametrize(
    "damage, message",
    [
        (without("vocab_embed.weight"), "not a released Uni-ViGU checkpoint: it lacks vocab_embed.weight"),
        (without("blocks.1.ffn_t.net.2.bias"), "blocks.1.ffn_t.net.2.bias is missing"),
        (without("time_embedding_v.time_proj.weight"), "time_embedding_v.time_proj.weight is missing"),
        (reshaped("blocks.1.attn1.to_q.extra", 3), "blocks.1.attn1.to_q.extra has no place"),
        (
            reshaped("text_head.linear.weight", 60, 64),
            r"text_head.linear.weight is \(60, 64\) where \(61, 64\) is needed",
        ),
        (
            reshaped("scale_shift_table_t", 1, 2, 32),
            r"scale_shift_table_t is \(1, 2, 32\) where \(1, 2, 64\) is needed",
        ),
        (reshaped("rotary_emb_text.inv_freq", 16), "does not have base 10000"),
    ],
)
def test_weights_that_do_not_fit_are_named(damage, message):
    state = released_state()
    damage(state)
    with pytest.raises(ValueError, match=message):
        convert_released(state)


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"text_dim": 16}, r"cond_text_embedder.linear_1.weight is \(64, 24\), but this prompt encoder's width is 16"),
        ({"channels": 4}, r"patch_embedding.weight is \(64, 16, 1, 2, 2\), but this autoencoder's latents have 4"),
        ({"words": 60}, r"vocab_embed.weight is \(61, 64\)"),
    ],
)
def test_a_checkpoint_of_another_wan_is_refused(tmp_path, sizes, message):
    with pytest.raises(ValueError, match=message):
        load_released(RELEASED, save_wan(tmp_path, **sizes))


# ---------------------------------------------------------------------------------------------------- starting from Wan


@pytest.mark.parametrize("flow", ["embedding", "mixture"])
def test_a_wan_folder_becomes_a_pipeline_that_generates_as_wan(wan_folder, flow):
    pipe = load_wan(wan_folder, caption_flow=flow)
    assert pipe.scheduler.config.shift == 3.0 and not pipe.config.prompt_as_tokens
    assert pipe.transformer.config.vocab_size == 61
    assert (pipe.config.default_num_frames, pipe.config.default_height, pipe.config.default_width) == (81, 480, 832)
    assert (pipe.config.default_fps, pipe.config.default_steps, pipe.config.default_guidance_scale) == (16, 50, 5.0)

    wan = WanPipeline.from_pretrained(wan_folder)
    wan.set_progress_bar_config(disable=True)
    latents = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    wan.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    wan.scheduler.set_timesteps(sigmas=[1.0])
    shared = {"num_inference_steps": 1, "guidance_scale": 2.0, "output_type": "latent", **SIZE}
    expected = wan("a red ball", latents=latents.clone(), **shared).frames
    given = pipe.generate("a red ball", latents=latents.clone(), **shared).frames
    torch.testing.assert_close(given, expected, atol=1e-5, rtol=1e-5)

    caption = pipe.understand(np.zeros((5, 16, 16, 3), np.uint8), num_inference_steps=2, seed=0, **SIZE).text
    assert isinstance(caption, str)  # untrained, but it walks


def test_new_weights_come_from_the_seed(wan_folder):
    first, again, other = (load_wan(wan_folder, seed=seed, token_dim=8).transformer.state_dict() for seed in (1, 1, 2))
    table = "token_embedding.table.weight"
    assert torch.equal(first[table], again[table]) and not torch.equal(first[table], other[table])
    assert first[table].shape == (61, 8)


def test_what_cannot_start_uni_vigu_is_refused(tmp_path, wan_folder):
    with pytest.raises(ValueError, match="text-to-video"):
        load_wan(save_wan(tmp_path / "image", image_dim=8, added_kv_proj_dim=24))
    with pytest.raises(ValueError, match="caption_flow is 'embedding' or 'mixture'"):
        load_wan(wan_folder, caption_flow="words")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no model_index.json"):
        load_wan(tmp_path / "empty")
    changed = tmp_path / "changed"
    shutil.copytree(wan_folder, changed)
    index = json.loads((changed / "model_index.json").read_text())
    for change, message in (
        ({"transformer_2": ["diffusers", "WanTransformer3DModel"]}, "is a Wan2.2 model"),
        ({"_class_name": "FluxPipeline"}, "holds a FluxPipeline, not a WanPipeline"),
    ):
        (changed / "model_index.json").write_text(json.dumps({**index, **change}))
        with pytest.raises(ValueError, match=message):
            load_wan(changed)
    (changed / "model_index.json").write_text(json.dumps(index))
    weights = changed / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be loaded") as caught:
        load_wan(changed)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------------ finding a model


def test_models_are_found_by_what_they_are(tmp_path, wan_folder):
    tiny_pipeline().save_pretrained(tmp_path / "ours")
    assert find_model(tmp_path / "ours").kind == "univigu"
    assert find_model(wan_folder).kind == "wan"
    assert find_model(RELEASED).kind == find_model(RELEASED.parent).kind == "released"
    assert isinstance(load(tmp_path / "ours"), UniViGUPipeline)
    assert load(wan_folder).transformer.config.vocab_size == 61
    assert load(RELEASED, wan_model=wan_folder).transformer.config.ffn_dim == 96
    assert load(RELEASED.parent, wan_model=wan_folder).config.empty_prompt == "zeros"


@pytest.mark.parametrize("name", ["toybax", "no/such/folder", "bad name/x", "../etc", ""])
def test_an_unknown_name_says_what_would_be_right(name):
    with pytest.raises(ValueError, match=r"There is no model.*toybox.*Hub id such as") as caught:
        load(name)
    assert "\n" not in str(caught.value)


def test_folders_without_a_model_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no model"):
        find_model(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(ValueError, match="holds a FluxPipeline"):
        find_model(tmp_path)
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        find_model(tmp_path)
    (tmp_path / "model_index.json").unlink()
    for name in ("one.pth", "two.pth"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=r"holds one\.pth, two\.pth"):
        load_released(tmp_path)
    with pytest.raises(ValueError, match="There is no device 'abacus'"):
        load(RELEASED, device="abacus")


# ------------------------------------------------------------------------------------------------------------- saving

IN_A_FRESH_PROCESS = """
import sys, torch
from univigu.weights import load
pipe = load(sys.argv[1])
latents = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(0))
run = dict(num_inference_steps=2, seed=3, num_frames=5, height=16, width=16)
both = pipe.joint("a red ball", latents=latents, output_type="latent", **run)
preview = torch.from_numpy(pipe.preview(both.frames))
torch.save({"latents": both.frames, "text": both.text, "preview": preview}, sys.argv[2])
"""


@torch.no_grad()
def test_an_import_is_saved_in_our_format_and_loads_from_the_hub_in_a_fresh_process(tmp_path, wan_folder):
    pipe = load_released(RELEASED, wan_folder, previewer=True)
    # where huggingface_hub keeps what it has fetched
    repository = tmp_path / "hub" / "models--someone--captions"
    pipe.save_pretrained(repository / "snapshots" / "0123")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123")
    index = json.loads((repository / "snapshots" / "0123" / "model_index.json").read_text())
    assert index["transformer"] == ["univigu.transformer", "UniViGUTransformer3DModel"]
    assert index["token_scheduler"] == ["univigu.token_flow", "MixtureFlowScheduler"]
    assert index["previewer"] == ["univigu.preview", "LatentPreviewer"]

    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", IN_A_FRESH_PROCESS, "someone/captions", str(tmp_path / "result.pt")]
    subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, check=True, capture_output=True)

    latents = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    both = pipe.joint("a red ball", latents=latents, output_type="latent", num_inference_steps=2, seed=3, **SIZE)
    result = torch.load(tmp_path / "result.pt", weights_only=True)
    torch.testing.assert_close(result["latents"], both.frames)
    assert result["text"] == both.text
    np.testing.assert_array_equal(result["preview"].numpy(), pipe.preview(both.frames))


def test_half_precision_keeps_the_float32_modules(tmp_path, wan_folder):
    load_released(RELEASED, wan_folder).save_pretrained(tmp_path)
    for pipe in (
        load(tmp_path, dtype=torch.bfloat16),
        load_released(RELEASED, wan_folder, dtype=torch.bfloat16),
        load_wan(wan_folder, dtype=torch.bfloat16),
    ):
        transformer = pipe.transformer
        dtypes = {name: weight.dtype for name, weight in transformer.named_parameters()}
        for name in ("scale_shift_table", "token_scale_shift_table", "blocks.1.norm2.weight"):
            assert dtypes[name] == torch.float32, name
        assert dtypes["condition_embedder.time_embedder.linear_1.weight"] == torch.float32
        assert dtypes["token_time_embedding.time_embedder.linear_1.weight"] == torch.float32
        for name in ("blocks.0.attn1.to_q.weight", "blocks.0.token_ffn.net.2.weight", "token_embedding.table.weight"):
            assert dtypes[name] == torch.bfloat16, name
        assert transformer.token_rope.frequencies.dtype == torch.float32
        assert pipe.vae.dtype == torch.float32 and pipe.text_encoder.dtype == torch.bfloat16
        both = pipe.joint("a red ball", num_inference_steps=1, seed=0, **SIZE)
        assert both.frames.shape == (5, 16, 16, 3)
