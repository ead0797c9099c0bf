"""Synthesis with real classes of random weights: what comes out, what fails, what a crash costs, what is refused."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from training.config import config_to_dict, load_config
from training.synthesize import CaptionsConfig, ClipsConfig, SynthesisConfig, clip_problem, read_template, synthesize
from univigu.video import probe

ROOT = Path(__file__).parents[2]
WORDS = [
    *("a", "the", "red", "green", "blue", "small", "large", "ball", "box", "boat", "star", "moves"),
    *("left", "right", "up", "down", "over", "sea", "meadow", "and"),
]
PROMPTS = ["a red ball", "the blue boat moves left", "a red ball", "a star over the sea", "green box", "small meadow"]
CHAT = (
    "{% for message in messages %}<{{ message.role }}> {% for part in message.content %}"
    "{% if part.type == 'image' %}<image> {% else %}{{ part.text }} {% endif %}{% endfor %}"
    "{% if message.role == 'assistant' %}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"  # noqa: E501
)


def tokenizer(*control_tokens: str, end: bool) -> PreTrainedTokenizerFast:
    vocab = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *control_tokens, *WORDS])}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if end:
        words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=list(control_tokens),
    )


@pytest.fixture(scope="module")
def generator(tmp_path_factory) -> Path:
    """A Wan pipeline's folder."""
    folder, words = tmp_path_factory.mktemp("wan"), tokenizer(end=True)
    torch.manual_seed(0)
    encoder = UMT5Config(vocab_size=len(words), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=16,
        num_layers=1,
        rope_max_seq_len=32,
    )
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * 4,
        latents_std=[0.2] * 4,
        scale_factor_temporal=4,
        scale_factor_spatial=4,
    )
    WanPipeline(words, UMT5EncoderModel(encoder), vae, FlowMatchEulerDiscreteScheduler(), transformer).save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="module")
def captioner(tmp_path_factory) -> Path:
    """A vision-language model's folder. Its words are all about equally likely, the end of the text among them."""
    folder, words = tmp_path_factory.mktemp("llava"), tokenizer("<image>", "<user>", "<assistant>", end=False)
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=16,
    )
    text = LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    image_token = words.convert_tokens_to_ids("<image>")
    LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=image_token, image_seq_length=4)
    ).save_pretrained(folder)
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        tokenizer=words,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT,
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def config(generator, captioner, tmp_path) -> SynthesisConfig:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    return SynthesisConfig(
        prompts=str(prompts),
        folder=str(tmp_path / "out"),
        seed=3,
        device="cpu",
        prompt_tokens=(0, 8),
        caption_tokens=(8, 20),
        clips=ClipsConfig(
            model=str(generator),
            num_frames=5,
            height=32,
            width=48,
            fps=8.0,
            steps=2,
            guidance_scale=2.0,
            min_contrast=0.01,
            min_motion=0.01,
        ),
        captions=CaptionsConfig(
            model=str(captioner),
            content="images",
            frames=5,
            temperature=1.0,
            top_p=1.0,
            max_new_tokens=40,
            attempts=2,
            batch_size=1,
        ),
    )


def change(config: SynthesisConfig, **settings) -> SynthesisConfig:
    """The configuration with other settings; clips__seed=1 changes clips.seed."""
    for name, value in settings.items():
        section, _, key = name.partition("__")
        if key:
            name, value = section, dataclasses.replace(getattr(config, section), **{key: value})
        config = dataclasses.replace(config, **{name: value})
    return config


def rows(folder: str | Path, name: str = "manifest") -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / f"{name}.jsonl").read_text().splitlines()]


def state(folder: str | Path) -> dict[str, tuple[int, bytes]]:
    """Every file's time and content."""
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in Path(folder).rglob("*") if path.is_file()
    }


# ------------------------------------------------------------------------------------------------------ what comes out


def test_prompts_become_clips_with_captions_and_failures_are_kept_apart(config, generator, captioner):
    assert synthesize(config) == 0
    manifest, failures, pairs = (rows(config.folder, name) for name in ("manifest", "failures", "pairs"))
    kinds = {kind for row in failures for kind in ("short", "long", "did not end") if kind in row["reason"]}
    assert manifest and len(kinds) == 3  # a captioner that draws words by chance gives all sorts
    assert [row["prompt"] for row in pairs] == PROMPTS
    assert len({row["video"] for row in pairs}) == len({row["seed"] for row in pairs}) == len(PROMPTS)
    assert {row["id"] for row in manifest} | {row["id"] for row in failures} == {row["id"] for row in pairs}
    assert len(manifest) + len(failures) == len(PROMPTS)
    for row in manifest:
        assert 8 <= row["caption_tokens"] == len(row["caption"].split()) + 1 <= 20
        assert row["prompt_tokens"] == len(row["prompt"].split()) + 1
        info = probe(Path(config.folder) / row["video"])
        assert (info.num_frames, info.height, info.width, info.fps) == (5, 32, 48, 8)
        assert row["made_by"]["clips"]["model"] == str(generator)
        assert row["made_by"]["captions"]["model"] == str(captioner)
        assert row["made_by"]["clips"]["steps"] == 2 and row["made_by"]["captions"]["dtype"] == "float32"
    for row in failures:
        assert row["phase"] == "captions" and row["attempts"] == 2
        if "too short" in row["reason"]:
            assert row["tokens"] < 8
        elif "too long" in row["reason"]:
            assert row["tokens"] > 20
        else:
            assert "did not end within 40 tokens" in row["reason"]
    before = state(config.folder)
    synthesize(config)
    after = state(config.folder)
    assert {k: v[1] for k, v in before.items()} == {k: v[1] for k, v in after.items()}
    assert all(before[name] == after[name] for name in before if name.endswith(".mp4") or "part-" in name)


def test_shards_and_batches_make_what_one_process_makes(config, tmp_path):
    synthesize(config)
    shards = change(config, folder=str(tmp_path / "shards"), captions__batch_size=3)
    synthesize(shards, shard="1/2")
    assert 0 < len(rows(shards.folder, "pairs")) < len(PROMPTS)
    synthesize(shards, phase="clips", shard="0/2")
    synthesize(shards, phase="captions", shard="0/2")
    assert {path.name for path in (tmp_path / "shards/clips").glob("part-*")} == {
        "part-00000.jsonl",
        "part-00001.jsonl",
    }
    for name in ("manifest", "failures", "pairs"):
        assert rows(shards.folder, name) == rows(config.folder, name)
    for row in rows(config.folder, "pairs"):
        assert (tmp_path / "shards" / row["video"]).read_bytes() == (tmp_path / "out" / row["video"]).read_bytes()


def test_the_list_may_grow_and_be_reordered(config):
    synthesize(config, phase="clips")
    before = state(Path(config.folder) / "videos")
    longer = ["large boat", *reversed(PROMPTS[1:])]
    Path(config.prompts).with_suffix(".jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in longer))
    synthesize(change(config, prompts=str(Path(config.prompts).with_suffix(".jsonl"))), phase="clips")
    assert [row["prompt"] for row in rows(config.folder, "pairs")] == longer
    after = state(Path(config.folder) / "videos")
    assert len(after) == len(before) + 1 and before.items() <= after.items()


def test_more_attempts_take_failures_up_where_they_ended(config):
    synthesize(config)
    failed = {row["id"]: row for row in rows(config.folder, "failures")}
    made = rows(config.folder)
    synthesize(change(config, captions__attempts=12))
    again = {row["id"]: row for row in rows(config.folder) + rows(config.folder, "failures")}
    assert [row for row in rows(config.folder) if row["id"] not in failed] == made
    assert all(again[id].get("caption_seed", again[id]["seed"]) != row["seed"] for id, row in failed.items())
    assert any("caption_seed" in again[id] for id in failed)
    fresh = change(config, folder=config.folder + "-2", captions__attempts=12)
    synthesize(fresh)
    assert rows(fresh.folder) == rows(config.folder)  # the interruption changed nothing


def test_a_prompt_with_a_control_token_fails_alone(config):
    Path(config.prompts).write_text("a red ball\na red <image> ball\n")
    synthesize(change(config, caption_tokens=(0, 50), captions__max_new_tokens=300))
    assert [row["prompt"] for row in rows(config.folder)] == ["a red ball"]
    (failure,) = rows(config.folder, "failures")
    assert failure["reason"] == "The prompt holds <image>, a control token of the captioner."


def test_a_clip_that_cannot_be_read_fails_alone(config):
    synthesize(config, phase="clips")
    broken = rows(config.folder, "pairs")[1]
    (Path(config.folder) / broken["video"]).write_bytes(b"no video")
    synthesize(config)
    reasons = {row["id"]: row["reason"] for row in rows(config.folder, "failures")}
    assert "cannot be read as a video" in reasons[broken["id"]]
    assert len(rows(config.folder)) + len(reasons) == len(PROMPTS) and rows(config.folder)


# ------------------------------------------------------------------------------------------------------- useless clips


def test_useless_clips_are_told_apart():
    noise = np.random.default_rng(0).random((5, 8, 8, 3), np.float32)
    assert clip_problem(noise, 2, 0.1) is None
    assert "black" in clip_problem(noise / 1000, 2, 0.1)
    assert "blank" in clip_problem(0.7 + noise / 1000, 2, 0.1)
    assert "static" in clip_problem(np.repeat(noise[:1], 5, axis=0), 2, 0.1)
    noise[2, 3, 4, 0] = np.nan
    assert "not numbers" in clip_problem(noise, 2, 0.1)


def test_clips_that_fail_are_tried_with_other_seeds_and_then_kept_apart(config):
    config = change(config, clips__min_contrast=254.0, clips__attempts=3, clips__batch_size=4)
    synthesize(config)
    failures = rows(config.folder, "failures")
    assert [row["prompt"] for row in failures] == PROMPTS and rows(config.folder, "pairs") == []
    assert all("contrast" in row["reason"] and row["attempts"] == 3 and row["phase"] == "clips" for row in failures)
    assert not list(Path(config.folder).rglob("*.mp4"))


def test_a_pipeline_that_makes_numbers_of_nothing_is_noticed(config, generator, tmp_path):
    pipe = WanPipeline.from_pretrained(generator)
    pipe.transformer.proj_out.bias.data.fill_(float("nan"))
    pipe.save_pretrained(tmp_path / "nan")
    synthesize(change(config, clips__model=str(tmp_path / "nan")), phase="clips")
    assert {row["reason"] for row in rows(config.folder, "failures")} == {"the clip holds values that are not numbers"}


# --------------------------------------------------------------------------------------------------------------- crash


def run_and_kill(config: SynthesisConfig, line: str) -> None:
    """Start a run in a process of its own and kill it as soon as it prints a line that begins so."""
    code = (
        "import json, sys; from training.config import build_config; "
        "from training.synthesize import SynthesisConfig, synthesize; "
        "synthesize(build_config(SynthesisConfig, json.loads(sys.argv[1])))"
    )
    command = [sys.executable, "-c", code, json.dumps(config_to_dict(config))]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        for printed in process.stdout:
            if printed.startswith(line):
                process.send_signal(signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL


def test_a_kill_loses_no_finished_item(config, tmp_path):
    whole = change(config, folder=str(tmp_path / "whole"))
    synthesize(whole)

    run_and_kill(config, "clip 2 of 6")
    clips = state(Path(config.folder) / "videos")
    lines = (Path(config.folder) / "clips/part-00000.jsonl").read_bytes()
    assert 2 <= len(clips) < len(PROMPTS) and lines.count(b"\n") >= 2
    run_and_kill(config, "caption 2 of 6")
    assert clips.items() <= state(Path(config.folder) / "videos").items()  # nothing was made twice
    assert (Path(config.folder) / "clips/part-00000.jsonl").read_bytes().startswith(lines)
    captions = (Path(config.folder) / "captions/part-00000.jsonl").read_bytes()
    assert captions.count(b"\n") >= 2 and not (Path(config.folder) / "manifest.jsonl").exists()

    clips = state(Path(config.folder) / "videos")
    synthesize(config)
    assert state(Path(config.folder) / "videos") == clips
    assert (Path(config.folder) / "captions/part-00000.jsonl").read_bytes().startswith(captions)
    for name in ("manifest.jsonl", "failures.jsonl", "pairs.jsonl", "clips/part-00000.jsonl"):
        assert (Path(config.folder) / name).read_bytes() == (Path(whole.folder) / name).read_bytes()
    assert not list(Path(config.folder).rglob("*.partial"))


def test_half_a_line_and_half_a_clip_count_as_never_written(config):
    synthesize(config, phase="clips")
    part = Path(config.folder) / "clips/part-00000.jsonl"
    whole, pairs = part.read_bytes(), rows(config.folder, "pairs")
    part.write_bytes(whole[:-20])
    part.with_suffix(".partial").write_bytes(b"half a clip")
    (Path(config.folder) / pairs[0]["video"]).unlink()
    foreign = part.with_name("part-00007.jsonl")
    foreign.write_bytes(whole.splitlines()[1][:30])
    synthesize(config, phase="clips")
    assert rows(config.folder, "pairs") == pairs
    assert sorted(set(part.read_bytes().splitlines())) == sorted(whole.splitlines())
    assert not part.with_suffix(".partial").exists()


def test_a_full_disk_is_one_message_and_costs_nothing(config):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))  # less than a clip has
    try:
        with pytest.raises(ValueError, match="cannot be written: File too large"):
            synthesize(config, phase="clips")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(Path(config.folder).rglob("*.mp4")) and not list(Path(config.folder).rglob("*.partial"))
    synthesize(config, phase="clips")
    assert len(rows(config.folder, "pairs")) == len(PROMPTS)


# ---------------------------------------------------------------------------------------------------------- what is wrong  # noqa: E501


def test_the_configuration_file_says_what_the_defaults_are():
    from_file = config_to_dict(load_config(SynthesisConfig, "synthesize", []))
    assert from_file == config_to_dict(SynthesisConfig())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompts": ""}, "prompts is empty"),
        ({"folder": ""}, "folder is empty"),
        ({"prompts": "nowhere.txt"}, "There is no file of prompts 'nowhere.txt'"),
        ({"device": "quantum"}, "There is no device 'quantum' here"),
        ({"caption_tokens": (9, 3)}, "caption_tokens must be two rising numbers"),
        ({"clips__num_frames": 6}, "clips.num_frames must be 4k + 1"),
        ({"captions__frames": 16}, "captions.frames must be 4k + 1"),
        ({"captions__batch_size": 0}, "captions.batch_size must be 1 or more"),
        ({"captions__temperature": -1.0}, "captions.temperature must be 0 or more"),
        ({"captions__top_p": 0.0}, "captions.top_p must be above 0"),
        ({"clips__model": "nowhere"}, "There is no model 'nowhere'"),
        ({"captions__model": "no/such/folder"}, "There is no model 'no/such/folder'; set captions.model"),
        (
            {"captions__template": "nothing"},
            "There is no prompt template 'nothing': give a .txt file or one of detailed",
        ),
        ({"clips__height": 40}, "divisible by 16"),
    ],
)
def test_bad_settings_are_one_sentence(config, settings, message):
    with pytest.raises(ValueError) as error:
        synthesize(change(config, **settings))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b" \n\n", "holds no prompts"),
        ("p.txt", b"a\n\xff\xfe\n", "is not UTF-8"),
        ("p.txt", b"a red ball\n\n" + b"a " * 8 + b"\nsea\n", "3 (9)."),
        ("p.jsonl", b'{"prompt": "sea"}\n{"text": "sea"}\n', "Line 2 of"),
        ("p.jsonl", b'{"prompt": " "}\n', "Line 1 of"),
        ("p.jsonl", b"sea\n", "Line 1 of"),
    ],
)
def test_bad_prompts_are_one_sentence(config, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as error:
        synthesize(change(config, prompts=str(tmp_path / name)))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("shard", ["2/2", "1", "a/b", "0/0"])
def test_a_shard_that_is_none_is_refused(config, shard):
    with pytest.raises(ValueError, match="A shard is i/n"):
        synthesize(config, shard=shard)


def test_a_folder_of_other_settings_or_another_model_is_refused(config, generator, tmp_path):
    copy = shutil.copytree(generator, tmp_path / "copy")
    config = change(config, clips__model=str(copy))
    synthesize(config, phase="clips")
    with pytest.raises(ValueError, match=r"was made with other settings: steps \(2 there, 3 now\); choose another"):
        synthesize(change(config, clips__steps=3))
    synthesize(change(config, clips__batch_size=2), phase="clips")  # how fast is not what
    weights = next((copy / "transformer").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x3e")
    with pytest.raises(ValueError, match="was made with other settings: model_sha256"):
        synthesize(config)


def test_the_same_shard_twice_at_once_is_refused(config):
    synthesize(config, phase="clips")
    with (Path(config.folder) / "clips/part-00000.jsonl").open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match=r"Another process is at work on .*part-00000.jsonl"):
            synthesize(config, phase="clips")
        synthesize(config, phase="clips", shard="1/2")


def test_models_that_cannot_be_loaded_are_one_sentence(config, generator, captioner, tmp_path):
    for broken in ("empty", "blind"):
        (tmp_path / broken).mkdir()
    with pytest.raises(ValueError, match="The tokenizer in .* cannot be loaded"):  # noqa: RUF043
        synthesize(change(config, clips__model=str(tmp_path / "empty")))
    with pytest.raises(ValueError, match="The text-to-video pipeline in .* cannot be loaded"):  # noqa: RUF043
        synthesize(change(config, clips__model=str(captioner), tokenizer=str(generator), folder=config.folder + "1"))
    with pytest.raises(ValueError, match="The vision-language model in .* cannot be loaded"):  # noqa: RUF043
        synthesize(change(config, captions__model=str(tmp_path / "blind"), folder=config.folder + "2"))
    assert len(rows_of_part(config.folder + "2")) == len(PROMPTS)


def rows_of_part(folder: str) -> list[str]:
    return (Path(folder) / "clips/part-00000.jsonl").read_text().splitlines()


def test_templates_know_their_fields(tmp_path):
    fields = ("prompt", "min_words", "max_words")
    assert "$prompt" in read_template("detailed_caption", fields, "prompt").template
    for text, message in [("$prompt $length", "not 'length'"), ("$prompt costs $5", "not "), ("hello", "not use")]:
        (tmp_path / "t.txt").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_template(str(tmp_path / "t.txt"), fields, "prompt")
