"""A small run to train in this process or, as `python engine.py SETTINGS`, in several that find each other by RANK."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import clips  # noqa: F401  (finds tiny)
import torch
from tiny import tiny_transformer
from torch import nn
from torch.utils.data import Dataset

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from training.config import OptimConfig, RunConfig, build_config  # noqa: E402
from training.lora import add_lora  # noqa: E402
from training.objective import FlowObjective, ObjectiveConfig  # noqa: E402
from training.stages import is_token_branch  # noqa: E402
from training.trainer import train  # noqa: E402
from univigu import EmbeddingFlowScheduler  # noqa: E402


class Batches(Dataset):
    """Micro-batch i is drawn from seed i."""

    gives_batches = True
    gone_from: int | None = None  # from this one on, the data is gone

    def __len__(self) -> int:
        return 2**62

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if self.gone_from is not None and index >= self.gone_from:
            raise ValueError("'latents/3.safetensors' of the cache is gone.")
        generator = torch.Generator().manual_seed(index)
        return {
            "latents": torch.randn(4, 4, 2, 4, 4, generator=generator),
            "caption_ids": torch.randint(20, (4, 6), generator=generator),
            "prompt_ids": torch.randint(20, (4, 6), generator=generator),
            "prompt_embeds": torch.randn(4, 3, 16, generator=generator),
            "position": torch.arange(4) + 4 * index,
        }


class TinyObjective(nn.Module):
    def __init__(self, trained: str = "all", nan_from: int | None = None):
        super().__init__()
        transformer = tiny_transformer()
        self.flow = FlowObjective(
            transformer,
            ObjectiveConfig(),
            "caption_ids",
            3.0,
            EmbeddingFlowScheduler(),
            empty_prompt=torch.zeros(3, 16),
        )
        if trained == "token_branch":
            for name, parameter in transformer.named_parameters():
                parameter.requires_grad_(is_token_branch(name))
        elif trained == "lora":
            add_lora(transformer, 2, 4.0, ["to_q", "to_v"], 0)
        self.train_data = Batches()
        self.nan_from = nan_from

    def forward(self, batch, generator):
        loss, figures = self.flow(batch, generator)
        if self.nan_from is not None and int(batch["position"][0]) >= 4 * self.nan_from:
            loss = loss * float("nan")
        return loss, figures

    def validate(self) -> dict[str, float]:
        transformer = self.flow.transformer
        batch = Batches()[1000]
        output = transformer(batch["latents"], torch.full((4,), 500.0), batch["prompt_embeds"], return_dict=False)[0]
        return {"output": float(output.square().mean())}

    def draw_samples(self, folder: Path, step: int) -> None:
        (folder / f"{step}.json").write_text(json.dumps(self.validate()))

    def export(self, folder: Path) -> None:
        self.flow.transformer.save_pretrained(folder)


def run(settings: dict) -> int:
    objective = TinyObjective(settings.get("trained", "all"), settings.get("nan_from"))
    objective.train_data.gone_from = settings.get("gone_from")
    run_config = build_config(
        RunConfig,
        {"steps": 4, "save_every": 2, "keep": 9, "validate_every": 4, "workers": 0, "log_every": 1, **settings["run"]},
    )
    optim = build_config(OptimConfig, {"lr": 1e-2, "warmup_steps": 1, "schedule": "constant", **settings["optim"]})
    return train(objective, run_config, optim, {"model": settings.get("trained", "all")})


def run_in_processes(settings: dict, count: int = 2) -> list[tuple[int, str]]:
    """Exit code and output of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(count):
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
        environment = {**os.environ, **{k: str(v) for k, v in names.items()}, "MASTER_ADDR": "127.0.0.1"}
        environment["OMP_NUM_THREADS"] = "1"
        command = [sys.executable, __file__, json.dumps(settings)]
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


if __name__ == "__main__":
    sys.exit(run(json.loads(sys.argv[1])))
