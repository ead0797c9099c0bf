"""The published figures: how shares are counted, and one whole evaluation of a tiny model."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from toy import CHANNELS, SIZES, save_vae
from transformers import UMT5Config, UMT5EncoderModel

from training import evaluate
from training.__main__ import main
from training.baselines import AutoregressiveCaptioner
from training.evaluate import left_out, wilson
from training.sampling import sample
from training.stages import as_wan
from training.toybox import ActorFacts, Facts, build_tokenizer, render, scene_at
from training.toybox.dataset import encode
from univigu import EmbeddingFlowScheduler, UniViGUPipeline, UniViGUTransformer3DModel


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> UniViGUPipeline:
    from diffusers import AutoencoderKLWan

    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    encoder = UMT5EncoderModel(
        UMT5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    )
    transformer = UniViGUTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
        vocab_size=len(tokenizer),
        token_dim=8,
    )
    torch.nn.init.normal_(transformer.token_proj_out.weight)
    vae = AutoencoderKLWan.from_pretrained(save_vae(tmp_path_factory.mktemp("vae")))
    return UniViGUPipeline(
        tokenizer,
        encoder.eval(),
        transformer.eval(),
        vae.eval(),
        FlowMatchEulerDiscreteScheduler(shift=2.0),
        EmbeddingFlowScheduler(shift=1.4),
        **SIZES,
    )


def test_wilson_interval_against_known_values():
    assert wilson(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert wilson(0, 512) == pytest.approx((0.0, 0.00745), abs=1e-4)
    low, high = wilson(512, 512)
    assert high == pytest.approx(1.0) and low == pytest.approx(0.99255, abs=1e-4)


def test_what_the_prompt_left_out_is_judged_by_the_clip_actor_by_actor():
    red, blue = ActorFacts("ball", "red", "small", "left"), ActorFacts("car", "blue", "large", "spins")
    said = Facts("sea", "night", 2, (red, blue))
    shown = Facts("sea", "day", 2, (ActorFacts("car", "blue", "large", "still"), red))
    named = Facts("sea", None, None, (ActorFacts("car", "blue"),))
    assert left_out(said, named, shown) == {
        "time": (False,),
        "count": (True,),
        "kind": (True,),  # the ball, which the prompt does not have
        "colour": (True,),
        "size": (True, True),
        "motion": (True, False),
    }
    assert left_out(None, named, shown) == {}


def test_many_at_once_are_what_the_pipeline_makes_one_by_one(pipeline):
    clips = np.stack([render(scene_at(0, index, "held_out")) for index in range(3)])
    latents = encode(pipeline.vae, clips)
    _, captions = sample(pipeline, "understand", [""] * 3, [5, 6, 7], 4, clips=latents, batch_size=2)
    alone = [pipeline.understand(clip, num_inference_steps=4, seed=5 + i).text for i, clip in enumerate(clips)]
    assert captions == alone and len(set(captions)) > 1
    made, _ = sample(pipeline, "generate", ["a red ball", "a boat at sea"], [1, 2], 3, guidance_scale=1.0)
    run = pipeline.generate("a boat at sea", num_inference_steps=3, guidance_scale=1.0, seed=2, output_type="latent")
    assert torch.allclose(made[1:], run.frames, atol=1e-4)


def test_one_command_writes_the_whole_table(pipeline, tmp_path, capsys):
    pipeline.save_pretrained(tmp_path / "model")
    as_wan(pipeline).save_pretrained(tmp_path / "generator")
    torch.manual_seed(0)
    captioner = AutoregressiveCaptioner(
        CHANNELS, 80, len(pipeline.tokenizer), 1, width=16, heads=2, layers=1, ffn_dim=16
    )
    captioner.save_pretrained(tmp_path / "captioner")
    command = ["evaluate", str(tmp_path / "model"), "--count", "2", "--steps", "2"]
    command += ["--captioner", str(tmp_path / "captioner"), "--generator", str(tmp_path / "generator")]
    assert main(command) == 0
    result = json.loads((tmp_path / "model/evaluation/evaluation.json").read_text())
    assert set(result["understanding"]) == {"chance", "majority", "ours", "clip_replaced_by_noise", "captioner"}
    apart = {"ours_one_actor", "ours_two_actors"} & set(result["generation"])
    assert set(result["generation"]) == {"chance", "true_clips", "ours", "generator", *apart} and apart
    ours, parts = result["generation"]["ours"], [result["generation"][name] for name in apart]
    assert all(sum(part["whole"][key] for part in parts) == ours["whole"][key] for key in ("right", "total"))
    assert result["generation"]["true_clips"]["whole"]["share"] == 1.0
    assert result["oracle"]["true_clips"]["attributes"]["share"] > 0.9
    assert result["understanding"]["ours"]["grammatical"]["total"] == 2
    assert 0 < result["reconstruction"]["psnr"] < 30 and result["speed"]["joint_seconds"] > 0
    table = (tmp_path / "model/evaluation/evaluation.md").read_text()
    assert "2 held-out scenes" in table and "| captioner |" in table and table in capsys.readouterr().out


def test_processes_share_the_scenes_and_change_no_figure(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "_AT_ONCE", 2)
    pipeline.save_pretrained(tmp_path / "model")
    results = []
    for processes in ("1", "2"):
        command = ["evaluate", str(tmp_path / "model"), "--target", str(tmp_path / processes)]
        assert main([*command, "--count", "3", "--steps", "2", "--processes", processes]) == 0
        results.append(json.loads((tmp_path / processes / "evaluation.json").read_text()))
        del results[-1]["speed"], results[-1]["settings"]["processes"]
    assert results[0] == results[1]


def test_a_folder_without_a_model_is_refused(tmp_path, capsys):
    assert main(["evaluate", str(tmp_path)]) == 1
    assert "holds no model" in capsys.readouterr().err
