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
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import Dataset

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from training.config import OptimConfig, RunConfig, build_config  # noqa: E402
from training.lora import add_lora, has_lora, merged, save_adapters  # noqa: E402
from training.objective import FlowObjective, ObjectiveConfig  # noqa: E402
from training.sharded import shard, share_context, whole  # noqa: E402
from training.stages import is_token_branch  # noqa: E402
from training.trainer import train  # noqa: E402
from univigu import EmbeddingFlowScheduler  # noqa: E402


class Batches(Dataset):
    """Micro-batch i is drawn from seed i."""

    gives_batches = True
    gone_from: int | None = None  # from this one on, the data is gone
    size = 4

    def __len__(self) -> int:
        return 2**62

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if self.gone_from is not None and index >= self.gone_from:
            raise ValueError("'latents/3.safetensors' of the cache is gone.")
        generator = torch.Generator().manual_seed(index)
        return {
            "latents": torch.randn(self.size, 4, 2, 4, 4, generator=generator),
            "caption_ids": torch.randint(20, (self.size, 6), generator=generator),
            "prompt_ids": torch.randint(20, (self.size, 6), generator=generator),
            "prompt_embeds": torch.randn(self.size, 3, 16, generator=generator),
            "position": torch.arange(self.size) + self.size * index,
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
            add_lora(transformer, 2, 4.0, ["to_q", "to_v"], 0, also_trained=is_token_branch)
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
        transformer = self.flow.transformer
        if has_lora(transformer):
            merged(transformer).save_pretrained(folder)
            save_adapters(transformer, folder.with_name("lora"))
        else:
            transformer.save_pretrained(folder)


def run(settings: dict) -> int:
    objective = TinyObjective(settings.get("trained", "all"), settings.get("nan_from"))
    objective.train_data.gone_from = settings.get("gone_from")
    objective.train_data.size = settings.get("size", 4)
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
        path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        command = [sys.executable, __file__, json.dumps(settings)]
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def compare(cases: list[dict]) -> int:
    """Print for each case how far loss and gradients of these processes are from those of one."""
    torch.distributed.init_process_group("gloo")
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for case in cases:
        context, size = case.get("context", 1), case.get("size", 4)
        data, alone, objective = Batches(), *(TinyObjective(case.get("trained", "all")) for _ in range(2))
        data.size = size
        losses = []
        for group in range(world // context):
            loss, _ = alone(data[group], torch.Generator().manual_seed(group))
            (loss * context / world).backward()
            losses.append(loss.item())
        if context > 1:
            share_context(objective, torch.device("cpu"), context)
        if case.get("checkpointing"):
            objective.flow.transformer.enable_gradient_checkpointing()
        if case.get("large"):
            shard(objective, torch.device("cpu"), case["large"])
            model = objective
        else:
            model = nn.parallel.DistributedDataParallel(objective)
        group = rank // context
        loss, _ = model(data[group], torch.Generator().manual_seed(group))
        loss.backward()
        expected = {name: p.grad for name, p in alone.named_parameters() if p.requires_grad}
        found = {name: whole(p.grad) for name, p in objective.named_parameters() if p.requires_grad}
        assert expected.keys() == found.keys()
        gap = max(float((found[name] - gradient).abs().max()) for name, gradient in expected.items())
        largest = max(float(gradient.abs().max()) for gradient in expected.values())
        parts = sum(isinstance(part, FSDPModule) for part in objective.modules())
        print(json.dumps({"loss": abs(loss.item() - losses[group]), "gap": gap, "largest": largest, "parts": parts}))
    torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    sys.exit(compare(given["compare"]) if "compare" in given else run(given))
