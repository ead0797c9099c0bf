"""Takes steps of a run in a process of its own and prints how many bytes they added at their fullest moment."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import psutil
import torch
from diffusers.training_utils import EMAModel

from training.config import build_config
from training.dry_run import Sizes, build_network
from training.objective import FlowObjective, ObjectiveConfig
from training.stages import StageRun
from training.trainer import _recomputed
from univigu import EmbeddingFlowScheduler


def main(arguments: dict, settings: dict, sizes: Sizes) -> int:
    config = build_config(StageRun, settings)
    layer = torch.nn.Linear(64, 64)  # what the first product and the first step load is not the run's
    layer(torch.randn(64, 64)).sum().backward()
    torch.optim.AdamW(layer.parameters()).step()
    before = psutil.Process().memory_info().rss
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
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


if __name__ == "__main__":
    arguments, settings, sizes = json.loads(sys.argv[1])
    print(main(arguments, settings, Sizes(**sizes)))
