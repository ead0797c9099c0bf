"""The bench at a size that says nothing of speed: it measures what it says it measures."""

from __future__ import annotations

import torch

from univigu.bench import SIZES, STEPS, build_steps, measure_times, memory_of, num_video_tokens, report

CPU = torch.device("cpu")


def test_the_small_size_is_what_the_goals_are_set_for():
    assert num_video_tokens("small") >= 2000


@torch.no_grad()
def test_each_step_does_the_work_it_is_named_for():
    steps = build_steps("tiny", CPU, tuple(STEPS))
    frames, height, width = SIZES["tiny"]["latents"]
    (wan,) = steps["wan"]()
    video, tokens = steps["generate"]()
    assert wan.shape == video.shape == (1, 16, frames, height, width)
    assert tokens.shape == (1, num_video_tokens("tiny") // 128, SIZES["tiny"]["vocab"])
    cached_video, cached_tokens = steps["cached"]()
    assert cached_video is None
    torch.testing.assert_close(cached_tokens, steps["recomputed"]()[1], atol=1e-5, rtol=0)


def test_ratios_and_memory_are_reported():
    result = measure_times("tiny", CPU, rounds=3)
    assert result["generation_ratio"] > 0 and result["cached_caption_speedup"] > 0
    assert (result["video_tokens"], result["caption_tokens"], result["dtype"]) == (128, 1, "float32")
    assert result["seconds"].keys() == STEPS.keys()
    megabytes = memory_of("generate", "tiny", CPU)
    assert 0 < megabytes < 500
    text = report({**result, "peak_megabytes": dict.fromkeys(STEPS, megabytes)})
    assert f"{result['generation_ratio']:.3f} times Wan's" in text and f"{megabytes:.0f}" in text
