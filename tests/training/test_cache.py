"""What the cache holds, what a crash costs, what is refused, and in which order training reads it."""

from __future__ import annotations

import dataclasses
import json
import resource

import pytest
import torch
from clips import make_clips, write_manifest
from tiny import tiny_pipeline, tiny_vae

from training import cache
from training.cache import CachedClips, HeldOutClips, TrainingBatches, fill, fingerprint, load_encoders
from training.data import DataConfig, Size, read_clip, read_rows

NEEDS = ("prompt", "caption")


@pytest.fixture(scope="module")
def pipeline():
    return tiny_pipeline()


@pytest.fixture
def data(tmp_path) -> DataConfig:
    rows = make_clips(tmp_path / "clips", 4)
    rows += [{**r, "video": f"short/{r['video']}"} for r in make_clips(tmp_path / "clips/short", 3, frames=5)]
    return DataConfig(
        source=str(write_manifest(tmp_path / "clips/clips.jsonl", rows)),
        cache=str(tmp_path / "cache"),
        sizes=[(9, 32, 32), (5, 32, 32)],
        fps=8.0,
        prompt_tokens=(0, 10),
        caption_tokens=(0, 12),
        tokens_per_batch=3 * (2 * 16 + 12),  # three short clips, or two long ones
    )


def test_a_batch_holds_what_the_pipeline_would_make(data, pipeline):
    assert fill(data, pipeline, NEEDS) == 0
    clips = CachedClips(data, pipeline)
    row = read_rows(data)[0][0]
    example = clips.examples[0]
    item = clips.item(example, 7)
    wanted = pipeline.encode_video(read_clip(row, Size(9, 32, 32), data))[0]
    assert item["latents"].shape == (4, 3, 8, 8)
    torch.testing.assert_close(item["latents"].float(), wanted, atol=2e-3, rtol=2e-3)
    with torch.no_grad():
        torch.testing.assert_close(item["prompt_embeds"], pipeline.encode_prompt(row.prompt)[0], atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(clips.empty_prompt, pipeline.encode_prompt("")[0], atol=2e-3, rtol=2e-3)
    assert item["caption_ids"].tolist() == pipeline.caption_ids(row.caption)[0].tolist()
    assert item["prompt_ids"].tolist() == pipeline.caption_ids(row.prompt)[0].tolist()
    assert int(item["position"]) == 7


def test_every_epoch_shows_every_clip_in_batches_of_one_size_within_the_budget(data, pipeline):
    fill(data, pipeline, NEEDS)
    batches = TrainingBatches(CachedClips(data, pipeline), CachedClips(data, pipeline).examples)
    epochs = [[batches.numbers(p) for p in range(start, start + 3)] for start in (0, 3, 6)]
    for epoch in epochs:
        assert sorted(n for batch in epoch for n in batch) == list(range(7))
        for batch in epoch:
            assert len({batches.clips.shape(batches.examples[n]) for n in batch}) == 1
    assert epochs[0] != epochs[1]
    assert batches.numbers(4) == epochs[1][1] and batches.numbers(0) == epochs[0][0]  # whatever was read before
    batch = batches[5]
    size = len(batch["latents"])
    assert batch["latents"].shape[1] == 4 and batch["prompt_embeds"].shape[1:] == (16, 16)
    assert batch["position"].tolist() == list(range(5 * size, 6 * size))
    batches.micro_batches = 2  # all of a step have one size
    for step in range(4):
        shapes = {batches.clips.shape(batches.examples[n]) for m in (0, 1) for n in batches.numbers(2 * step + m)}
        assert len(shapes) == 1
    with pytest.raises(ValueError, match="tokens_per_batch=50 is less than one clip"):
        clips = CachedClips(dataclasses.replace(data, tokens_per_batch=50), pipeline)
        TrainingBatches(clips, clips.examples)


def test_held_out_clips_are_those_and_no_others(data, pipeline):
    fill(data, pipeline, NEEDS)
    clips = CachedClips(dataclasses.replace(data, held_out=3), pipeline)
    train, held_out = clips.split
    assert len(held_out) == 3 and not {e.latents for e in train} & {e.latents for e in held_out}
    assert [HeldOutClips(clips, held_out)[i]["latents"].shape for i in range(3)]
    with pytest.raises(ValueError, match="held_out must leave clips for training: it is 7 of 7"):
        _ = CachedClips(dataclasses.replace(data, held_out=7), pipeline).split


def state(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*.safetensors")}


def test_shares_add_up_and_a_second_run_makes_nothing(data, pipeline, tmp_path, capsys):
    assert fill(data, pipeline, NEEDS, (1, 2)) == 0
    with pytest.raises(ValueError, match=r"4 of 7 clips are not in .*cache'; run `python -m training cache` again"):
        CachedClips(data, pipeline)
    assert fill(data, pipeline, NEEDS, (0, 2)) == 0
    assert "7 of 7 clips are in the cache" in capsys.readouterr().out
    one = dataclasses.replace(data, cache=str(tmp_path / "one"))
    fill(one, pipeline, NEEDS)
    both, alone = CachedClips(data, pipeline), CachedClips(one, pipeline)
    assert both.examples == alone.examples
    for example in both.examples:
        assert all(
            (a == b).all() for a, b in zip(both.item(example, 0).values(), alone.item(example, 0).values(), strict=True)
        )
    before = state(tmp_path / "one")
    fill(one, pipeline, NEEDS)
    assert state(tmp_path / "one") == before


def test_a_changed_caption_costs_nothing_and_a_changed_clip_only_itself(data, pipeline, tmp_path):
    fill(data, pipeline, NEEDS)
    before = state(tmp_path / "cache")
    manifest = tmp_path / "clips/clips.jsonl"
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    rows[0]["caption"] = "a large red box moves ."
    write_manifest(manifest, rows)
    with pytest.raises(ValueError, match=r"is stale: .* changed after it was made"):
        CachedClips(data, pipeline)
    fill(data, pipeline, NEEDS)
    assert state(tmp_path / "cache") == before
    assert CachedClips(data, pipeline).examples[0].caption == "a large red box moves ."
    (tmp_path / "clips/0.mp4").write_bytes((tmp_path / "clips/1.mp4").read_bytes())
    fill(data, pipeline, NEEDS)
    assert state(tmp_path / "cache") == before  # that content is there already
    (tmp_path / "clips/0.mp4").unlink()
    make_clips(tmp_path / "clips", 1, frames=13)
    fill(data, pipeline, NEEDS)
    assert len(state(tmp_path / "cache")) == len(before) + 1


def test_a_cache_of_another_model_is_refused_with_the_reason(data, pipeline):
    fill(data, pipeline, NEEDS)
    other = tiny_pipeline()
    other.vae.decoder.conv_in.weight.data += 0.1
    for act in (lambda: CachedClips(data, other), lambda: fill(data, other, NEEDS)):
        with pytest.raises(ValueError, match=r"latents' was made (for another model|with other settings).*autoencoder"):
            act()
    other = tiny_pipeline()
    other.text_encoder.shared.weight.data[0, 0] += 1
    with pytest.raises(ValueError, match=r"prompts' was made for another model \(prompt encoder"):
        CachedClips(data, other)
    other = tiny_pipeline()
    other.register_to_config(max_prompt_tokens=12)
    with pytest.raises(ValueError, match="max prompt tokens 16 there, 12 now"):
        CachedClips(data, other)
    with pytest.raises(ValueError, match="holds no cache; run `python -m training cache`"):
        CachedClips(dataclasses.replace(data, cache=data.cache + "2"), pipeline)


def test_a_fingerprint_knows_weights_and_settings_and_not_precision():
    assert fingerprint(tiny_vae()) == fingerprint(tiny_vae()) == fingerprint(tiny_vae().bfloat16())
    assert fingerprint(tiny_vae()) != fingerprint(tiny_vae(seed=1))
    assert fingerprint(tiny_vae(), {"mean": 0}) != fingerprint(tiny_vae(), {"mean": 1})


def test_bad_rows_stop_everything_and_an_unreadable_clip_only_itself(data, pipeline, tmp_path, capsys):
    whole = (tmp_path / "clips/2.mp4").read_bytes()
    manifest = tmp_path / "clips/clips.jsonl"
    good = manifest.read_text()
    manifest.write_text(good + '{"video": "9.mp4", "prompt": "sea", "caption": "the sea"}\n')
    assert fill(data, pipeline, NEEDS) == 1
    assert "line 8: the file" in capsys.readouterr().out and not state(tmp_path / "cache")
    manifest.write_text(good)
    (tmp_path / "clips/2.mp4").write_bytes(whole[:-300])  # begins well
    assert fill(data, pipeline, NEEDS) == 1
    assert "line 3: '2.mp4'" in capsys.readouterr().out
    with pytest.raises(ValueError, match="1 of 7 clips are not in"):
        CachedClips(data, pipeline)
    (tmp_path / "clips/2.mp4").write_bytes(whole)
    assert fill(data, pipeline, NEEDS) == 0
    CachedClips(data, pipeline)


def test_a_shard_that_goes_missing_or_is_cut_is_named_and_made_again(data, pipeline, tmp_path):
    fill(data, pipeline, NEEDS)
    clips = CachedClips(data, pipeline)
    shard = next((tmp_path / "cache/latents").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:100])
    cache._handle.cache_clear()
    with pytest.raises(ValueError, match=r"latents/00000-000000.safetensors' of the cache is gone or damaged"):
        TrainingBatches(clips, clips.examples)[0]
    with pytest.raises(ValueError, match="7 of 7 clips are not in"):
        CachedClips(data, pipeline)
    assert fill(data, pipeline, NEEDS) == 0
    TrainingBatches(CachedClips(data, pipeline), clips.examples)[0]


def test_a_full_disk_is_one_message_and_leaves_nothing_half(data, pipeline, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))  # less than a shard has
    try:
        with pytest.raises(ValueError, match="cannot be written"):
            fill(data, pipeline, NEEDS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not state(tmp_path / "cache") and not list((tmp_path / "cache").rglob("*.partial"))
    assert fill(data, pipeline, NEEDS) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cache": ""}, "data.cache is empty"),
        ({"sizes": [(9, 36, 32)]}, "multiples of 8 pixels and 4k \\+ 1 frames"),
        ({"sizes": [(8, 32, 32)]}, "multiples of 8 pixels"),
    ],
)
def test_bad_settings_are_one_sentence(data, pipeline, settings, message):
    with pytest.raises(ValueError, match=message):
        fill(dataclasses.replace(data, **settings), pipeline, NEEDS)


def test_a_text_that_does_not_fit_the_stream_is_told_and_not_cut(data, pipeline):
    data = dataclasses.replace(data, caption_tokens=(0, 30))
    fill(data, pipeline, NEEDS)
    clips = CachedClips(data, pipeline)
    long = dataclasses.replace(clips.examples[0], caption="a " * 12)
    with pytest.raises(ValueError, match="line 1: a text of 13 tokens does not fit the caption stream's 12"):
        clips.item(long, 0)


def test_encoders_come_from_a_pipeline_without_its_network(data, pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "model")
    encoders = load_encoders(str(tmp_path / "model"), {"max_prompt_tokens": 16})
    assert encoders.transformer is None
    fill(data, encoders, NEEDS)
    CachedClips(data, pipeline)
