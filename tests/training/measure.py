"""Takes steps of a run in a process of its own and prints how many bytes they added at their fullest moment."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from diffusers.training_utils import EMAModel

from training.config import build_config
from training.dry_run import Sizes, build_network
from training.objective import FlowObjective, ObjectiveConfig
from training.stages import StageRun
from training.trainer import _recomputed
from univigu import EmbeddingFlowScheduler


def take_steps(arguments: dict, settings: dict, sizes: Sizes) -> None:
    config = build_config(StageRun, settings)
    network = build_network(arguments, config)
    if config.run.checkpointing:
        network.enable_gradient_checkpointing(_recomputed)
    objective = FlowObjective(
        network,
        ObjectiveConfig(times="independent"),
        "caption_ids",
        3.0,
        EmbeddingFlowScheduler(),
        empty_prompt=torch.zeros(sizes.prompt, network.config.text_dim),
    )
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer, average = torch.optim.AdamW(trained), EMAModel(trained, foreach=True)
    for step in range(2):
        ids = torch.zeros(sizes.batch, sizes.caption, dtype=torch.long)
        batch = {
            "latents": torch.randn(sizes.batch, network.config.in_channels, sizes.frames, sizes.height, sizes.width),
            "caption_ids": ids,
            "prompt_ids": ids,
            "prompt_embeds": torch.randn(sizes.batch, sizes.prompt, network.config.text_dim),
            "position": torch.arange(sizes.batch),
        }
        objective(batch, torch.Generator().manual_seed(step))[0].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.step(trained)


def resident(name: str) -> int:
    """Bytes by /proc/self/status: VmRSS now, VmHWM at the fullest moment since that was last forgotten."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


if __name__ == "__main__":
    arguments, settings, sizes = json.loads(sys.argv[1])
    # what is loaded and compiled at its first use is not the run's
    take_steps({**arguments, "num_layers": 1, "ffn_dim": 8, "vocab_size": 8}, settings, Sizes(**{**sizes, "batch": 1}))
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    take_steps(arguments, settings, Sizes(**sizes))
    print(resident("VmHWM") - before)
