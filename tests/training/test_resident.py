"""The toy world in the accelerator's memory: the same clips and true words, whatever the cache's pace."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest
import torch
from toy import HELD_OUT, TRAIN, make_world, stage_run

from training.stages import build_stage
from training.toybox import build_tokenizer, facts, parse_caption, resident, scene_at
from training.toybox.dataset import LatentCache, ToyDataConfig, fill_cache
from training.toybox.resident import ResidentToyLatents
from training.trainer import train

TOKENIZER = build_tokenizer()
SHARDS = ["train-0000000.safetensors", "train-0000008.safetensors"]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def open_resident(cache: Path, size: int = 16, **settings) -> ResidentToyLatents:
    config = ToyDataConfig(cache=str(cache), **{"resident": TRAIN, **settings})
    return ResidentToyLatents(config, LatentCache(cache, "held_out").settings, TOKENIZER, size)


def clips_of(batch: dict, world: Path) -> list[int]:
    """Which scene each latent of a batch is of."""
    latents = LatentCache(world / "cache", "train")
    known = torch.stack([latents[index] for index in range(TRAIN)])
    return [int((known == latent).flatten(1).all(1).nonzero().item()) for latent in batch["latents"]]


def words(ids: torch.Tensor) -> str:
    return TOKENIZER.decode(ids, skip_special_tokens=True)


def test_words_are_those_of_their_clips(world):
    batch = open_resident(world / "cache", detailed_prompts=1.0)[3]
    for row, index in enumerate(clips_of(batch, world)):
        scene = scene_at(0, index, "train")
        assert parse_caption(words(batch["caption_ids"][row])) == facts(scene)
        said = parse_caption(words(batch["prompt_ids"][row]))
        assert said in (facts(scene), None)  # one that would be too long stays brief
    assert torch.equal(batch["position"], torch.arange(48, 64))


def test_a_batch_has_the_form_that_single_items_have(world):
    batch = open_resident(world / "cache")[0]
    ids, mask = batch["prompt_encoder_ids"], batch["prompt_encoder_mask"]
    end, pad = TOKENIZER.eos_token_id, TOKENIZER.pad_token_id
    for row, length in enumerate(mask.sum(1).tolist()):
        assert ids[row, length - 1] == end and (ids[row, length:] == pad).all() and mask[row, :length].all()
        assert torch.equal(batch["prompt_ids"][row, :length], ids[row, :length])
        assert (batch["prompt_ids"][row, length:] == end).all()
    assert not (batch["caption_ids"] == pad).any() and batch["caption_ids"].shape == batch["prompt_ids"].shape


def test_a_batch_is_a_function_of_its_number(world):
    one, other = open_resident(world / "cache", two_actors=0.7), open_resident(world / "cache", two_actors=0.7)
    one[0], one[7]
    for name, tensor in one[5].items():
        assert torch.equal(tensor, other[5][name]), name
    assert not torch.equal(one[5]["latents"], one[6]["latents"])


def test_clips_of_two_actors_come_as_often_as_asked(world):
    data = open_resident(world / "cache", two_actors=0.7)
    shown = [index for number in range(5) for index in clips_of(data[number], world)]
    assert sum(len(scene_at(0, index, "train").actors) == 2 for index in shown) == 56  # floor(80 x 0.7)
    with pytest.raises(ValueError, match="two_actors is a share between 0 and 1"):
        open_resident(world / "cache", two_actors=2)


def test_a_step_knows_the_clips_it_should_and_waits_for_them(world, tmp_path):
    cache = tmp_path / "cache"
    shutil.copytree(world / "cache", cache)
    (cache / SHARDS[1]).rename(tmp_path / "late")
    data = open_resident(cache, resident_first=8, resident_growth=2.0)
    data.micro_batches = 2
    assert [data.known_at(step) for step in (0, 1, 9)] == [8, TRAIN, TRAIN]
    early = data[1]  # the second half of the first step
    assert max(clips_of(early, world)) < 8
    comes = threading.Timer(0.2, lambda: (tmp_path / "late").rename(cache / SHARDS[1]))
    comes.start()
    late = [index for number in (2, 3, 4, 5) for index in clips_of(data[number], world)]
    assert max(late) >= 8
    again = open_resident(world / "cache", resident_first=8, resident_growth=2.0)
    again.micro_batches = 2
    assert torch.equal(early["latents"], again[1]["latents"])


def test_what_is_missing_or_strange_is_one_sentence(world, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    shutil.copytree(world / "cache", cache)
    (cache / SHARDS[1]).unlink()
    with pytest.raises(ValueError, match=r"data.resident is 12, .* ends after 8 training clips: fill it"):
        open_resident(cache)[0]
    monkeypatch.setattr(resident, "_PATIENCE", 0.0)
    growing = open_resident(cache, resident_first=8, resident_growth=8.0)
    growing[0]
    with pytest.raises(ValueError, match="ends after 8 training clips"):
        growing[1]
    (cache / SHARDS[0]).write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match=r"is damaged .* run python -m training toybox-cache again"):
        open_resident(cache)[0]
    fill_cache(world / "vae", tmp_path / "wordless", {"train": 8, "held_out": HELD_OUT}, shard_clips=8)
    with pytest.raises(ValueError, match=r"holds no words: fill a new cache with .*--tokenizer"):
        open_resident(tmp_path / "wordless", resident=8)[0]


def test_a_stage_learns_from_it_and_resumes(world, tmp_path):
    def steps(folder: str, number: int) -> dict:
        data = {"kind": "toybox", "cache": str(world / "cache"), "resident": TRAIN, "validation_clips": 2}
        run = {"steps": number, "save_every": 2, "validate_every": 100}
        config = stage_run(world, "pretrain", tmp_path / folder, run=run, data=data)
        objective = build_stage(config)
        assert train(objective, config.run, config.optim, config) == 0
        return objective.state_dict()

    whole = steps("whole", 4)
    steps("halves", 2)
    for name, weight in steps("halves", 4).items():
        assert torch.equal(weight, whole[name]), name
