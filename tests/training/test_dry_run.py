"""Sizes against arithmetic, memory against what a process really took, and every configuration's dry run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from training.__main__ import main
from training.config import build_config, load_config
from training.dry_run import (
    Sizes,
    build_network,
    estimate_memory,
    network_config,
    parameters_by_part,
    sizes_of,
    step_flops,
    tiny_step,
)
from training.stages import StageRun
from univigu.transformer import UMT5_VOCAB_SIZE

REAL = ("wan1.3b-1x24gb", "wan1.3b-8x80gb", "wan1.3b-16x80gb-paper", "wan14b-16x80gb")
SMALL = {
    "num_attention_heads": 6,
    "attention_head_dim": 64,
    "ffn_dim": 1536,
    "num_layers": 3,
    "text_dim": 64,
    "vocab_size": 500,
    "token_dim": 32,
}
SIZES = Sizes(batch=2, frames=4, height=24, width=24, caption=32, prompt=16)


def by_hand(width: int, ffn: int, layers: int) -> dict[str, int]:
    """Wan's sizes and the second stream's, from the architecture: a linear layer is in * out + out."""
    attention = 4 * (width * width + width) + 2 * width
    expert = width * ffn + ffn + ffn * width + width
    time = 256 * width + width + width * width + width + 6 * width * width + 6 * width
    text = 4096 * width + width + width * width + width
    ends = 64 * width + width + time + text + width * 64 + 64 + 2 * width
    return {
        "attention over video and caption": layers * attention,
        "attention to the prompt": layers * attention,
        "video expert": layers * expert,
        "caption expert": layers * expert,
        "norms and modulation": layers * (2 * width + 6 * width),
        "video in and out, time, prompt": ends,
        "caption embedding E": UMT5_VOCAB_SIZE * width,
        "caption head": UMT5_VOCAB_SIZE * (width + 1),
        "caption time": time + width + 2 * width,
    }


@pytest.mark.parametrize(
    ("name", "size", "wan"),
    [("wan1.3b-8x80gb", (1536, 8960, 30), 1_418_996_800), ("wan14b-16x80gb", (5120, 13824, 40), 14_288_491_584)],
)
def test_parameters_are_what_arithmetic_says(name, size, wan):
    config = load_config(StageRun, name, [], "recall")
    with torch.device("meta"):
        parts = parameters_by_part(build_network(network_config(config), config))
    assert parts == by_hand(*size)
    video = sum(count for part, count in parts.items() if "caption" not in part or "over video" in part)
    assert video == wan


@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_is_what_a_process_takes_within_15_percent(checkpointing):
    settings = {"stage": {"name": "recall"}, "run": {"checkpointing": checkpointing}}
    estimate = estimate_memory(SMALL, build_config(StageRun, settings), SIZES, 1, gpu=False)
    task = json.dumps([SMALL, settings, vars(SIZES)])
    command = [sys.executable, str(Path(__file__).with_name("measure.py")), task]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    measured = int(done.stdout.split()[-1])
    assert estimate.total == pytest.approx(measured, rel=0.15)


def test_arithmetic_is_what_torch_counts():
    config = build_config(StageRun, {"stage": {"name": "recall"}})
    network = build_network(SMALL, config)
    table = network.token_table()
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        video, tokens = network(
            torch.randn(2, 16, 4, 24, 24),
            torch.rand(2),
            torch.randn(2, 16, 64),
            table[torch.zeros(2, 32, dtype=torch.long)],
            torch.rand(2),
            return_dict=False,
        )
        (video.mean() + tokens.mean()).backward()
    assert step_flops(network, SIZES, checkpointing=False) == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_shared_out_weights_need_less_and_checkpointing_too():
    def total(processes=1, **run):
        config = build_config(StageRun, {"stage": {"name": "recall"}, "run": run})
        return estimate_memory(SMALL, config, SIZES, processes, gpu=True)

    whole, shared = total(), total(4, fsdp=True)
    assert shared.weights == whole.weights // 4 and shared.moments == whole.moments // 4
    assert shared.total < whole.total and total(checkpointing=True).total < whole.total
    assert total(4).total == whole.total
    shared_clips = total(4, fsdp=True, context_parallel=4)
    assert shared_clips.weights == shared.weights and shared_clips.activations < 0.3 * shared.activations
    with pytest.raises(ValueError, match="context_parallel=5 does not divide 576 video and 32 caption positions"):
        total(5, context_parallel=5)


@pytest.mark.parametrize("name", [*REAL, "cpu"])
@pytest.mark.parametrize("stage", ["recall", "refine"])
def test_every_configuration_takes_a_tiny_step(name, stage):
    config = load_config(StageRun, name, [], stage)
    assert config.stage.name == stage
    if name != "cpu":
        assert (config.run.steps, config.optim.betas) == ({"recall": 40000, "refine": 60000}[stage], (0.9, 0.95))
        assert sizes_of(config).video == 32760 and sizes_of(config).batch == 1
        assert tiny_step(config, network_config(load_config(StageRun, name, [], "recall"))) > 0


def test_a_dry_run_says_what_the_run_takes(capsys):
    assert main(["refine", "wan1.3b-16x80gb-paper", "--dry-run", "--gpus", "16", "run.checkpointing=true"]) == 0
    printed = capsys.readouterr().out
    expert = 30 * (2 * 1536 * 8960 + 1536 + 8960) / 1e6
    for text in (
        f"{expert:.1f} M  caption expert",
        "parameters, of which",
        "1 clips of 32760 video and 256 caption tokens",
    ):
        assert text in printed
    assert (
        "GiB  on each of 16 GPUs" in printed and "days for 60000 steps" in printed and "one tiny step: loss" in printed
    )


def test_gpus_that_share_clips_take_as_much_longer_for_as_many(capsys):
    settings = ["recall", "wan1.3b-8x80gb", "--dry-run", "optim.accumulate=1", "run.context_parallel=2"]
    assert main([*settings, "--gpus", "8"]) == 0
    assert "a step: 4 clips; 2 GPUs share the positions of each" in capsys.readouterr().out
    assert main([*settings, "--gpus", "9"]) == 1
    assert "run.context_parallel=2 does not divide --gpus 9" in capsys.readouterr().err


def test_a_start_of_unknown_size_is_refused(capsys):
    assert main(["recall", "wan1.3b-8x80gb", "--dry-run", "stage.start=nowhere"]) == 1
    assert "stage.start='nowhere' is no pipeline folder here" in capsys.readouterr().err
