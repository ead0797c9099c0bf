"""The toy world's cache: what it holds, that a crash costs a shard at most, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file
from toy import CHANNELS, HELD_OUT, TRAIN, make_world, save_vae

from training.__main__ import main
from training.toybox import build_tokenizer, caption, facts, parse_caption, render, scene_at
from training.toybox.dataset import LatentCache, ToyLatents, encode, fill_cache, vae_version, world_version


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def copy(world, tmp_path) -> Path:
    shutil.copytree(world, tmp_path / "copy")
    return tmp_path / "copy"


def test_cache_holds_the_latents_of_numbered_scenes(world):
    latents = LatentCache(world / "cache", "train")
    assert len(latents) == TRAIN and len(latents.shards) == 2 and latents[0].shape == (CHANNELS, 5, 8, 8)
    vae = AutoencoderKLWan.from_pretrained(world / "vae")
    clip = render(scene_at(0, TRAIN - 1, "train"))
    expected = encode(vae, clip[None])[0]
    assert torch.allclose(latents[TRAIN - 1].float(), expected, atol=1e-2, rtol=1e-2)
    # the same numbers as diffusers' own chunk-by-chunk encoding
    pixels = torch.from_numpy(clip).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    with torch.no_grad():
        official = vae.encode(pixels).latent_dist.mode() / torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    assert torch.allclose(expected, official[0], atol=1e-4)


def test_items_are_a_function_of_their_position(world):
    tokenizer = build_tokenizer()
    latents = LatentCache(world / "cache", "train")
    data = ToyLatents(latents, "train", 0, tokenizer, shuffled=True)
    again = ToyLatents(latents, "train", 0, tokenizer, shuffled=True)
    for position in (0, 5, TRAIN + 5, 10**12):
        for name, tensor in data[position].items():
            assert torch.equal(tensor, again[position][name]), name
    assert sorted(data.scene_index(i) for i in range(TRAIN)) == list(range(TRAIN))
    assert [data.scene_index(i) for i in range(TRAIN)] != [data.scene_index(i) for i in range(TRAIN, 2 * TRAIN)]


def test_training_can_begin_with_one_actor_and_prompts_that_leave_nothing_open(world):
    tokenizer, latents = build_tokenizer(), LatentCache(world / "cache", "train")
    data = ToyLatents(latents, "train", 0, tokenizer, shuffled=True, two_actors=0, detailed_prompts=1.0)
    single = [i for i in range(TRAIN) if len(scene_at(0, i, "train").actors) == 1]
    assert 0 < len(single) < TRAIN and sorted(map(data.scene_index, range(len(single)))) == single
    for position in range(2 * len(single)):
        said = parse_caption(tokenizer.decode(data[position]["prompt_ids"], skip_special_tokens=True))
        assert said == facts(scene_at(0, data.scene_index(position), "train"))


def test_clips_of_two_actors_come_as_often_as_asked(world):
    tokenizer, latents = build_tokenizer(), LatentCache(world / "cache", "train")
    data = ToyLatents(latents, "train", 0, tokenizer, shuffled=True, two_actors=0.75)
    shown = [data.scene_index(position) for position in range(8 * TRAIN)]
    actors = [len(scene_at(0, index, "train").actors) for index in shown]
    assert all(sum(count == 2 for count in actors[: 4 * n]) == 3 * n for n in range(2 * TRAIN))
    for count in (1, 2):  # each kind comes round as a whole before any of it comes again
        kind = [index for index in range(TRAIN) if len(scene_at(0, index, "train").actors) == count]
        visits = [index for index, found in zip(shown, actors, strict=True) if found == count]
        assert sorted(visits[: len(kind)]) == sorted(visits[len(kind) : 2 * len(kind)]) == kind
    with pytest.raises(ValueError, match="two_actors is a share between 0 and 1"):
        ToyLatents(latents, "train", 0, tokenizer, shuffled=True, two_actors=1.5)


def test_words_are_new_at_every_visit_and_always_true(world):
    tokenizer = build_tokenizer()
    data = ToyLatents(LatentCache(world / "cache", "train"), "train", 0, tokenizer, shuffled=True)
    visits = [position for position in range(6 * TRAIN) if data.scene_index(position) == 3]
    items = [data[position] for position in visits]
    texts = {tokenizer.decode(item["caption_ids"], skip_special_tokens=True) for item in items}
    assert len(texts) > 3
    truth = facts(scene_at(0, 3, "train"))
    said = [parse_caption(text) for text in texts]
    assert {(one.place, one.time, one.count) for one in said} == {(truth.place, truth.time, truth.count)}
    for item in items:
        assert item["caption_ids"].shape == item["prompt_ids"].shape == (32,)
        assert item["caption_ids"][-1] == tokenizer.eos_token_id
        length = int(item["prompt_encoder_mask"].sum())
        assert torch.equal(item["prompt_encoder_ids"][:length], item["prompt_ids"][:length])
        assert item["prompt_encoder_ids"][length:].eq(tokenizer.pad_token_id).all()


def test_a_filled_cache_goes_on_with_what_is_missing(copy, capsys):
    lost = copy / "cache/train-0000008.safetensors"
    whole, before = lost.read_bytes(), load_file(lost)["latents"]
    kept = copy / "cache/train-0000000.safetensors"
    time = kept.stat().st_mtime_ns
    lost.unlink()
    (copy / "cache/.train-0000008.partial").write_bytes(whole[:100])  # a process that was killed while writing
    fill_cache(copy / "vae", copy / "cache", {"train": TRAIN, "held_out": HELD_OUT}, shard_clips=8)
    assert torch.equal(load_file(lost)["latents"], before) and kept.stat().st_mtime_ns == time
    assert capsys.readouterr().out.count("clips a second") == 1
    assert not list((copy / "cache").glob(".*.partial"))


def test_damage_and_strangers_are_one_sentence_each(copy):
    shard = copy / "cache/train-0000008.safetensors"
    whole, tensors = shard.read_bytes(), load_file(shard)
    shard.write_bytes(whole[:-50])
    with pytest.raises(
        ValueError, match=r"train-0000008.safetensors' is damaged .*run python -m training toybox-cache"
    ):
        LatentCache(copy / "cache", "train")
    shard.write_bytes(whole[:-50] + bytes(50))
    with pytest.raises(ValueError, match="its checksum is wrong"):
        LatentCache(copy / "cache", "train")
    save_file(tensors, shard, {"world": "another"})
    with pytest.raises(ValueError, match=r"does not belong there \(its world is another"):
        LatentCache(copy / "cache", "train")
    shard.unlink()
    (copy / "cache/settings.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged: it is not JSON"):
        LatentCache(copy / "cache", "train")


def test_a_missing_shard_in_the_middle_is_noticed(copy):
    (copy / "cache/train-0000000.safetensors").unlink()
    with pytest.raises(ValueError, match=r"its start is 8 instead of 0"):
        LatentCache(copy / "cache", "train")


def test_another_autoencoder_is_refused(copy, tmp_path, capsys):
    other = save_vae(tmp_path / "other", seed=1)
    assert vae_version(other) != vae_version(copy / "vae")
    assert main(["toybox-cache", str(other), str(copy / "cache"), "--train", "8", "--held-out", "8"]) == 1
    assert "made with another autoencoder" in capsys.readouterr().err
    assert main(["toybox-cache", str(tmp_path), str(tmp_path / "new")]) == 1
    assert "config.json' is missing" in capsys.readouterr().err


def test_the_world_can_be_looked_at(tmp_path, capsys):
    assert main(["toybox", str(tmp_path / "sheet.png"), "--count", "2", "--split", "held_out"]) == 0
    assert cv2.imread(str(tmp_path / "sheet.png")).shape[0] == 2 * 128
    assert main(["toybox", str(tmp_path / "nowhere/sheet.png"), "--count", "1"]) == 1
    assert "cannot be written" in capsys.readouterr().err


def test_the_worlds_fingerprint_is_stable_within_a_version():
    assert world_version() == world_version() and len(world_version()) == 16
    rng = np.random.default_rng(0)
    assert parse_caption(caption(scene_at(0, 0, "held_out"), rng)) is not None
