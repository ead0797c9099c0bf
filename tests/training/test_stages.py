"""The stages one after another on a tiny toy world: what each starts from, trains and leaves behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from toy import CHANNELS, make_world, stage_run

from training.baselines import AutoregressiveCaptioner, CaptionerObjective, CaptionerRun
from training.config import build_config
from training.stages import build_stage, is_token_branch, save_whole
from training.toybox.publish import publish
from training.trainer import train
from univigu import UniViGUPipeline
from univigu.weights import load


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def run(config) -> list[dict]:
    """Train, and give back the log."""
    assert train(build_stage(config), config.run, config.optim, config) == 0
    return [json.loads(line) for line in Path(config.run.folder, "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def generator(world, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "pretrain"
    run(stage_run(world, "pretrain", folder))
    return folder / "weights"


@pytest.fixture(scope="module")
def recalled(world, generator, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "recall"
    run(stage_run(world, "recall", folder, generator))
    return folder / "weights"


def test_pretraining_leaves_a_wan_pipeline(world, generator):
    pipeline = WanPipeline.from_pretrained(generator)
    assert pipeline.transformer.config.in_channels == 8
    encoder = build_stage(stage_run(world, "pretrain", Path("unused"))).pipeline.text_encoder
    changed = [
        not torch.equal(a, b) for a, b in zip(encoder.parameters(), pipeline.text_encoder.parameters(), strict=True)
    ]
    assert all(changed)  # the prompt encoder is trained in this stage


def test_pretraining_goes_on_from_a_generator(world, generator):
    stage = build_stage(stage_run(world, "pretrain", Path("unused"), generator))
    expected = WanPipeline.from_pretrained(generator)
    for name, tensor in expected.transformer.state_dict().items():
        assert torch.equal(tensor, stage.pipeline.transformer.state_dict()[name]), name
    assert stage.pipeline.transformer.config.vocab_size is None
    assert all(p.requires_grad for p in stage.parameters())


def test_a_generator_to_compare_with_goes_on_from_our_own_model_without_its_captions(world, recalled, tmp_path):
    changes = {"transformer": {"video_places": [5, 4, 4]}}
    refined = build_stage(stage_run(world, "refine", tmp_path, recalled, model=changes))
    refined.export(tmp_path / "refined")
    config = stage_run(world, "pretrain", tmp_path / "run", tmp_path / "refined")
    alone, both = build_stage(config).pipeline.transformer.state_dict(), refined.pipeline.transformer.state_dict()
    assert alone.keys() == {name for name in both if not is_token_branch(name)}
    assert all(torch.equal(tensor, both[name]) for name, tensor in alone.items())
    run(config)
    generator = load(tmp_path / "run/weights", device="cpu")
    assert generator.token_scheduler is None and generator.transformer.config.vocab_size is None
    made = [generator.generate("a red ball", num_inference_steps=2, seed=seed).frames for seed in (0, 1)]
    assert made[0].shape == (17, 64, 64, 3) and (made[0] != made[1]).any()
    with pytest.raises(ValueError, match="video_places, which Wan does not know"):
        build_stage(stage_run(world, "pretrain", Path("unused"), model=changes))


def test_recall_starts_from_the_generator_and_freezes_its_prompt_encoder(world, generator, recalled):
    before, after = WanPipeline.from_pretrained(generator), UniViGUPipeline.from_pretrained(recalled)
    stage = build_stage(stage_run(world, "recall", Path("unused"), generator))
    for name, tensor in before.transformer.state_dict().items():
        assert torch.equal(tensor, stage.pipeline.transformer.state_dict()[name]), name
    for a, b in zip(before.text_encoder.parameters(), after.text_encoder.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(before.transformer.proj_out.weight, after.transformer.proj_out.weight)
    assert after.token_scheduler.config.shift == 1.4 and after.config.prompt_as_tokens


def test_a_small_prompt_encoder_can_learn_on(world, recalled, tmp_path):
    run(stage_run(world, "refine", tmp_path / "run", recalled, stage={"train_prompt_encoder": True}))
    before, after = (UniViGUPipeline.from_pretrained(folder) for folder in (recalled, tmp_path / "run/weights"))
    for a, b in zip(before.text_encoder.parameters(), after.text_encoder.parameters(), strict=True):
        assert not torch.equal(a, b)


def test_recall_from_scratch_has_new_weights_and_the_old_prompt_encoder(world, generator):
    known = build_stage(stage_run(world, "recall", Path("unused"), generator)).pipeline
    new = build_stage(stage_run(world, "recall", Path("unused"), generator, stage={"from_scratch": True})).pipeline
    assert new.transformer.config == known.transformer.config
    assert not torch.equal(new.transformer.proj_out.weight, known.transformer.proj_out.weight)
    assert torch.equal(new.text_encoder.shared.weight, known.text_encoder.shared.weight)


def test_token_branch_alone_leaves_the_generator_as_it_is_bit_for_bit(world, recalled, tmp_path):
    run(stage_run(world, "refine", tmp_path / "run", recalled, stage={"trained": "token_branch"}))
    before = UniViGUPipeline.from_pretrained(recalled).transformer.state_dict()
    after = UniViGUPipeline.from_pretrained(tmp_path / "run/weights").transformer.state_dict()
    for name in before:
        assert torch.equal(before[name], after[name]) != is_token_branch(name), name


def test_refined_model_is_published_in_small_files_that_the_application_loads(world, recalled, tmp_path):
    log = run(stage_run(world, "refine", tmp_path / "run", recalled, run={"validate_every": 2}))
    figures = {key for line in log for key in line}
    assert {"validation/seen_attributes", "validation/grammatical", "validation/shown_whole"} <= figures
    assert {"validation/text_at_1_0.5", "text_understand", "video_generate", "text_joint"} <= figures
    assert list((tmp_path / "run/samples").glob("*.png"))
    publish(tmp_path / "run/weights", tmp_path / "toybox", caption_shift=3.0)
    pipeline = load(tmp_path / "toybox", device="cpu")
    assert pipeline.token_scheduler.config.shift == 3.0
    assert pipeline.previewer is not None and pipeline.transformer.dtype == torch.float32
    again = build_stage(stage_run(world, "refine", Path("unused"), tmp_path / "toybox")).pipeline
    assert again.transformer.dtype == again.text_encoder.dtype == torch.float32  # stored in half of that
    out = pipeline.joint("a red ball over the sea", num_inference_steps=2, seed=0)
    assert out.frames.shape == (17, 64, 64, 3)
    assert max(path.stat().st_size for path in (tmp_path / "toybox").rglob("*.safetensors")) < 10_000_000


def test_captioner_to_compare_with_learns_from_the_same_clips(world, recalled, tmp_path):
    settings = {
        "start": str(recalled),
        "run": {"folder": str(tmp_path), "steps": 2, "batch_size": 4, "workers": 0},
        "model": {"width": 16, "heads": 2, "layers": 1, "ffn_dim": 16},
        "data": {"cache": str(world / "cache"), "validation_clips": 2, "validation_prompts": 1},
    }
    config = build_config(CaptionerRun, settings)
    assert train(CaptionerObjective(config), config.run, config.optim, config) == 0
    captioner = AutoregressiveCaptioner.from_pretrained(tmp_path / "weights")
    latents, ids = torch.randn(2, 8, 5, 8, 8), torch.randint(0, 40, (2, 32))
    later = ids.clone()
    later[:, 10:] = 7
    with torch.no_grad():
        before, after = captioner(latents, ids), captioner(latents, later)
        assert torch.allclose(before[:, :11], after[:, :11], atol=1e-5)  # a word sees only those before it
        assert not torch.allclose(before[:, 11:], after[:, 11:], atol=1e-5)
        said = captioner.caption(latents)
        assert torch.equal(captioner(latents, said)[:, 0].argmax(-1), said[:, 0])


def test_refinement_adds_parts_that_start_at_nothing(world, recalled):
    before = UniViGUPipeline.from_pretrained(recalled)
    changes = {"transformer": {"video_places": [5, 4, 4]}, "token_flow": {"stochastic_sampling": True}}
    after = build_stage(stage_run(world, "refine", Path("unused"), recalled, model=changes)).pipeline
    kept = after.transformer.state_dict()
    assert not kept.pop("patch_embedding.places.weight").any() and kept.keys() == before.transformer.state_dict().keys()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in before.transformer.state_dict().items())
    assert after.token_scheduler.config.stochastic_sampling and after.token_scheduler.config.shift == 1.4
    with pytest.raises(ValueError, match="leaves no place for blocks"):
        build_stage(stage_run(world, "refine", Path("unused"), recalled, model={"transformer": {"num_layers": 1}}))


@pytest.mark.parametrize("name", ["refine", "pretrain"])
def test_a_network_grown_by_layers_says_what_it_said(world, recalled, name):
    torch.manual_seed(0)
    state = [torch.randn(2, CHANNELS, 5, 8, 8), torch.tensor([900.0, 300.0]), torch.randn(2, 24, 16)]
    if name == "refine":
        state += [torch.randn(2, 32, 8), torch.tensor([500.0, 100.0])]
    said = []
    for layers in (2, 4):
        changes = {"transformer": {"num_layers": layers}}
        network = build_stage(stage_run(world, name, Path("unused"), recalled, model=changes)).pipeline.transformer
        assert len(network.blocks) == layers
        with torch.no_grad():
            said.append([part for part in network(*state, return_dict=False) if part is not None])
    assert len(said[0]) == (2 if name == "refine" else 1)
    for before, after in zip(*said, strict=True):
        assert torch.equal(before, after)


def test_a_stage_without_its_start_says_so(world, tmp_path):
    with pytest.raises(ValueError, match=r"stage.start is empty: name the generator"):
        build_stage(stage_run(world, "recall", tmp_path))
    with pytest.raises(ValueError, match=r"model.vae names no autoencoder"):
        build_stage(stage_run(world, "pretrain", tmp_path, model={"vae": str(tmp_path)}))


def test_an_interrupted_export_leaves_the_old_one(world, recalled):
    def breaks(folder: Path) -> None:
        folder.mkdir()
        raise OSError("disk full")

    before = sorted(recalled.rglob("*"))
    with pytest.raises(OSError):
        save_whole(breaks, recalled)
    assert sorted(recalled.rglob("*")) == before
