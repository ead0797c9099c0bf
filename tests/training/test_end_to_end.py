"""From a folder of clips to a model that generates and understands, by the commands of docs/training.md."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from training.__main__ import _parser, main
from training.cache import fingerprint, stored_fingerprint
from training.config import load_config
from training.stages import StageRun, build_stage
from univigu import UniViGUPipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Clips, generator and cache."""
    folder = tmp_path_factory.mktemp("cpu")
    assert main(["example", str(folder), "--clips", "8"]) == 0
    assert main(["check", "cpu", *where(folder)]) == 0
    assert main(["cache", "cpu", *where(folder)]) == 0
    return folder


def where(folder: Path) -> list[str]:
    return [f"data.source={folder / 'clips'}", f"data.cache={folder / 'cache'}", f"stage.start={folder / 'generator'}"]


def stage(name: str, folder: Path, start: str, *changes: str) -> int:
    places = [f"data.source={folder / 'clips'}", f"data.cache={folder / 'cache'}"]
    settings = [f"run.folder={folder / name}", f"stage.start={folder / start}", "run.steps=4", "run.validate_every=4"]
    return main([name.split("-")[0], "cpu", *places, *settings, *changes])


@pytest.fixture(scope="module")
def recalled(folder) -> Path:
    assert stage("recall", folder, "generator") == 0
    return folder / "recall"


def test_clips_become_a_model_that_generates_and_understands(folder, recalled):
    assert stage("refine", folder, "recall/weights") == 0
    pipe = UniViGUPipeline.from_pretrained(str(folder / "refine/weights"))
    pipe.set_progress_bar_config(disable=True)
    made = pipe.generate("a red ball", seed=0)
    assert made.frames.shape == (17, 32, 32, 3) and made.frames.dtype == np.uint8 and made.text is None
    said = pipe.understand(str(folder / "clips/0000.mp4"), seed=0)
    assert isinstance(said.text, str) and said.frames is None
    assert pipe.joint("a red ball", seed=0).frames.shape == (17, 32, 32, 3)
    shown = [json.loads(line) for line in (folder / "refine/samples/captions.jsonl").read_text().splitlines()]
    assert len(shown) == 2 and shown[0].keys() == {"step", "prompt", "caption", "said"}
    assert len(list((folder / "refine/samples").glob("step-00000004-*.mp4"))) == 2
    lines = [json.loads(line) for line in (folder / "refine/log.jsonl").read_text().splitlines()]
    assert {"text_understand", "loss", "gradient_norm"} <= lines[-2].keys() and lines[-2]["lr"] == pytest.approx(5e-5)
    before, after = (
        load_file(folder / name / "weights/transformer/diffusion_pytorch_model.safetensors")
        for name in ("recall", "refine")
    )
    assert before.keys() == after.keys() and any((before[name] != after[name]).any() for name in before)


def test_the_prompt_encoder_is_not_loaded_and_yet_exported(folder, recalled):
    places = [f"data.source={folder / 'clips'}", f"data.cache={folder / 'cache'}"]
    for name, start in (("recall", "generator"), ("refine", "recall/weights")):
        config = load_config(StageRun, "cpu", [*places, f"stage.start={folder / start}"], name)
        assert build_stage(config).pipeline.text_encoder is None
    with pytest.raises(ValueError, match="prompts are not embedded beforehand"):
        build_stage(
            load_config(
                StageRun,
                "cpu",
                [*places, f"stage.start={folder / 'generator'}", "stage.train_prompt_encoder=true"],
                "recall",
            )
        )
    encoder = UniViGUPipeline.from_pretrained(str(recalled / "weights")).text_encoder
    start = load_file(folder / "generator/text_encoder/model.safetensors")
    assert all((encoder.state_dict()[name] == tensor).all() for name, tensor in start.items())
    assert fingerprint(encoder) == stored_fingerprint(folder / "generator/text_encoder")


def test_lora_is_exported_merged_and_by_itself(folder, recalled):
    assert stage("recall-lora", folder, "generator", "stage.trained=lora", "stage.lora_rank=2", "optim.lr=0.01") == 0
    merged = UniViGUPipeline.from_pretrained(str(folder / "recall-lora/weights")).transformer
    start = load_file(folder / "generator/transformer/diffusion_pytorch_model.safetensors")
    changed = {name for name, tensor in start.items() if (merged.state_dict()[name] != tensor).any()}
    assert changed and all(
        any(f".{end}." in f"{name}." for end in ("to_q", "to_k", "to_v", "to_out.0")) for name in changed
    )
    adapters = load_file(folder / "recall-lora/lora/pytorch_lora_weights.safetensors")
    name = "blocks.0.attn1.to_q"
    keys = {key.split(".lora_")[1][0]: tensor for key, tensor in adapters.items() if name in key}
    delta = merged.state_dict()[f"{name}.weight"] - start[f"{name}.weight"]
    torch.testing.assert_close(delta, keys["B"] @ keys["A"] * 64 / 2, atol=1e-5, rtol=1e-3)


def test_another_model_than_the_cache_was_made_for_is_refused(folder, recalled, tmp_path, capsys):
    assert main(["example", str(tmp_path), "--clips", "1"]) == 0
    weights = tmp_path / "generator/vae/diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-40:] = bytes(40)
    weights.write_bytes(data)
    assert stage("recall", folder, "generator", f"stage.start={tmp_path / 'generator'}", f"run.folder={tmp_path}") == 1
    assert "was made for another model (autoencoder" in capsys.readouterr().err


def test_rows_with_something_wrong_stop_the_cache_and_are_all_named(folder, tmp_path, capsys):
    rows = [{"video": "no.mp4", "prompt": "a ball", "caption": "a ball ."}, {"video": str(folder / "clips/0000.mp4")}]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [*where(folder), f"data.source={tmp_path / 'm.jsonl'}", f"data.cache={tmp_path / 'cache'}"]
    for command in ("check", "cache"):
        assert main([command, "cpu", *settings]) == 1
        printed = capsys.readouterr().out
        assert "line 1: the file" in printed and "line 2: no prompt; no caption" in printed
    assert main(["check", "cpu", *where(folder), "data.sizes=[[33, 32, 32]]"]) == 1
    assert capsys.readouterr().out.count("too few frames: 17 at 8 per second") == 8


def test_a_configuration_of_another_stage_or_kind_of_data_is_refused(folder, capsys):
    assert main(["check", "recall"]) == 1
    assert "data.kind must be clips" in capsys.readouterr().err
    assert main(["pretrain", "cpu"]) == 1
    assert "stage" in capsys.readouterr().err


def test_the_page_names_commands_and_configurations_that_exist():
    page = (Path(__file__).parents[2] / "docs/training.md").read_text().replace("\\\n", " ")
    for name, value in re.findall(r'^([A-Z]+)="(.*)"$', page, re.MULTILINE):
        page = page.replace(f"${name}", value)
    commands = [line for line in page.splitlines() if line.startswith("python -m training")]
    assert len(commands) >= 13
    for command in commands:
        arguments = _parser().parse_args(shlex.split(command, comments=True)[3:])
        if hasattr(arguments, "overrides"):
            load_config(StageRun, arguments.config, arguments.overrides, "recall")
